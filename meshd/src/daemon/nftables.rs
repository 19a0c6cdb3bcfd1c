//! Failures of nftables, one problem for each cause: the firewall, other programs' rules and the policies all depend on
//! it, so one fault shows in several places.

use kernel::Failure;
use mesh::problem::{Problem, ProblemCode};

/// The failures of nftables among those of a pass over the kernel's state; those with the same message are one problem.
pub(super) fn refused(failures: &[Failure]) -> Vec<Problem> {
    let mut causes: Vec<(&str, &'static str, Vec<&str>)> = Vec::new();
    for failure in failures {
        let kernel::FailureCause::Firewall { message, remedy } = &failure.problem else { continue };
        match causes.iter_mut().find(|(known, ..)| known == message) {
            Some((.., what)) => what.push(&failure.what),
            None => causes.push((message, remedy, vec![&failure.what])),
        }
    }
    let problem = |cause: String, remedy: &str| Problem::new(ProblemCode::NftablesRefused, cause, remedy);
    let causes = causes.into_iter();
    let mut problems: Vec<Problem> =
        causes.map(|(message, remedy, what)| problem(format!("{}: {message}", what.join(", ")), remedy)).collect();
    for held in failures.iter().filter(|failure| failure.problem == kernel::FailureCause::NoFirewall) {
        let cause = format!("{}: {}", held.what, held.problem);
        match problems.first_mut() {
            Some(first) => first.cause += &format!("; {cause}"),
            None => problems.push(problem(cause, held.remedy())),
        }
    }
    problems
}

/// Whether a failure is of nftables.
pub(super) const fn is_of(failure: &Failure) -> bool {
    matches!(failure.problem, kernel::FailureCause::Firewall { .. } | kernel::FailureCause::NoFirewall)
}

/// Merges the policies' failure into that of nftables, instead of a second problem. `policies`: their rules are
/// refused.
pub(super) fn join_policies(problems: &mut Vec<Problem>, policies: bool) {
    let with = |code: ProblemCode| problems.iter().position(|problem| problem.code == code);
    let of_policies =
        with(ProblemCode::PolicyRulesRefused).or_else(|| with(ProblemCode::PoliciesNotInForce)).filter(|_| policies);
    if let (Some(nftables), Some(of_policies)) = (with(ProblemCode::NftablesRefused), of_policies) {
        problems[nftables].cause = format!("{}; {}", problems[nftables].cause, problems[of_policies].cause);
        problems.remove(of_policies);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(what: &str, message: &str) -> Failure {
        let problem = kernel::FailureCause::Firewall { message: message.to_owned(), remedy: "install nft" };
        Failure { what: what.to_owned(), problem }
    }

    fn causes(problems: &[Problem]) -> Vec<&str> {
        problems.iter().map(|problem| problem.cause.as_str()).collect()
    }

    #[test]
    fn one_fault_is_one_problem() {
        let held = Failure { what: "2 changes".to_owned(), problem: kernel::FailureCause::NoFirewall };
        let route = Failure { what: "route".to_owned(), problem: kernel::FailureCause::Twice };
        let failures = [failure("table a", "no nft"), route, failure("table b", "no nft"), held.clone()];
        let found = refused(&failures);
        assert_eq!(causes(&found), ["table a, table b: no nft; 2 changes: postponed until the firewall is in place"]);
        assert_eq!((found[0].code, found[0].remedy.as_str()), (ProblemCode::NftablesRefused, "install nft"));
        assert_eq!(refused(&[failure("table a", "no nft"), failure("table b", "busy")]).len(), 2);
        assert_eq!(causes(&refused(&[held])), ["2 changes: postponed until the firewall is in place"]);
        assert_eq!(failures.iter().filter(|failure| !is_of(failure)).count(), 1);
    }

    #[test]
    fn policies_that_fail_with_the_firewall_are_no_second_problem() {
        let nftables = Problem::new(ProblemCode::NftablesRefused, "no nft", "install nft");
        for code in [ProblemCode::PolicyRulesRefused, ProblemCode::PoliciesNotInForce] {
            let all =
                [Problem::new(code, "no policies", ""), nftables.clone(), Problem::new(ProblemCode::Ipvs, "y", "z")];
            let mut problems = all.to_vec();
            join_policies(&mut problems, true);
            assert_eq!(causes(&problems), ["no nft; no policies", "y"]);
            // Each by itself stays what it is.
            for (mut alone, refused) in
                [(all.to_vec(), false), (vec![all[0].clone()], true), (vec![nftables.clone()], true)]
            {
                let before = alone.clone();
                join_policies(&mut alone, refused);
                assert_eq!(causes(&alone), causes(&before));
            }
        }
    }
}
