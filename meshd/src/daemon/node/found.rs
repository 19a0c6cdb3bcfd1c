//! Results of a pass over the kernel's state, as problems.

use kernel::{PassReport, ReconcileError};
use mesh::problem::{Problem, ProblemCode};
use node_core::Reconciled;

use crate::{
    daemon::nftables,
    doctor::{filters::foreign_forward_drop, host::not_forwarding},
};

/// The same for the node's state machine.
pub(super) fn reconciled(report: Result<PassReport, ReconcileError>) -> Reconciled {
    let report = match report {
        Ok(report) => report,
        Err(error) => {
            let problem =
                Problem::new(ProblemCode::KernelUnreadable, error.to_string(), "see the log; the daemon retries");
            return Reconciled { problems: vec![problem], failed: true, ..Reconciled::default() };
        }
    };
    let failures = &report.failures;
    let mut problems: Vec<Problem> = failures.iter().filter(|failure| !nftables::is_of(failure)).map(refused).collect();
    problems.extend(nftables::refused(failures));
    problems.extend(found(&report));
    Reconciled {
        problems,
        failed: !failures.is_empty(),
        no_tun: failures.iter().any(|failure| failure.problem == kernel::FailureCause::NoTun),
        routes: !failures.iter().any(kernel::Failure::may_concern_routes),
        others: Some(report.others),
    }
}

fn refused(failure: &kernel::Failure) -> Problem {
    let cause = format!("{}: {}", failure.what, failure.problem);
    Problem::new(ProblemCode::KernelRefused, cause, failure.remedy())
}

/// Problems of other programs' state, as a pass found it.
fn found(report: &PassReport) -> Vec<Problem> {
    let mut problems = Vec::new();
    if let Some(interface) = &report.not_forwarding {
        problems.push(not_forwarding(interface.as_str()));
    }
    for met in &report.met {
        let (source, destination) = met.packet;
        let at = format!("chain {} of table {}", met.chain, met.table);
        let unused = "so direct paths cannot be used";
        let (code, cause) = match met.effect {
            kernel::RuleEffect::Translates => {
                let effect = "the receiver sees an address of this node, so policies by label match the wrong sender";
                let what = format!("rewrites the source of packets from {source} to {destination}: {effect}");
                (ProblemCode::PodsMasqueraded, what)
            }
            kernel::RuleEffect::Drops => {
                (ProblemCode::ProbesDropped, format!("drops probes from {source} to {destination}, {unused}"))
            }
            kernel::RuleEffect::Remarks => {
                let what = format!("rewrites the packet mark of probes from {source} to {destination}, {unused}");
                (ProblemCode::ProbesRemarked, what)
            }
        };
        let cause = format!("{at} {cause}");
        problems.push(Problem::new(code, cause, met.remedy.clone()));
    }
    for drop in &report.foreign_drops {
        let table = format!("{} {}", drop.family, drop.table);
        problems.push(foreign_forward_drop(&drop.chain, &table, "forwarded pod packets", drop.remedy.clone()));
    }
    problems
}
