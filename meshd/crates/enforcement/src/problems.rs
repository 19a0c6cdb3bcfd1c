//! Problems of enforcement for operators.

use std::time::Instant;

use mesh::problem::{Problem, ProblemCode};

use super::Enforcement;

/// The problem of bridges whose packets nftables does not see. `off`: the missing module or setting.
pub fn bridge_not_filtered(off: &str, remedy: impl Into<String>) -> Problem {
    let cause = format!("{off}: packets between pods on a bridge bypass nftables, so they are dropped");
    Problem::new(ProblemCode::BridgeNotFiltered, cause, remedy)
}

impl Enforcement {
    /// Current problems. `expected`: the mesh is known and its policies should be in force.
    #[must_use]
    pub fn problems(&self, expected: bool) -> Vec<Problem> {
        let applied = *self.applied.borrow();
        let mut problems = Vec::new();
        let refused =
            "check that the kernel supports nf_tables with sets, maps and connection tracking; the daemon retries";
        if expected && applied.generation == 0 {
            let (why, remedy) = if applied.refused {
                ("; the kernel refuses their rules, see the log", refused)
            } else {
                ("", "see the other problems; this one ends once policies are read and the kernel accepts their rules")
            };
            let cause = "policies are not in force yet: only this node's own processes can reach its pods, plus \
                         connections allowed by rules of an earlier run";
            problems.push(Problem::new(ProblemCode::PoliciesNotInForce, format!("{cause}{why}"), remedy));
        } else if applied.refused && applied.generation > 0 {
            let cause = "the kernel refuses the policy rules; the previous rules stay in force, see the log";
            problems.push(Problem::new(ProblemCode::PolicyRulesRefused, cause, refused));
        }
        problems.extend(self.unmatched.borrow().problems(Instant::now()));
        let host = self.host.borrow();
        if host.bridged && !host.switched_judged {
            problems.push(bridge_not_filtered(
                "br_netfilter is missing or off",
                "modprobe br_netfilter; sysctl -w net.bridge.bridge-nf-call-iptables=1 \
                 net.bridge.bridge-nf-call-ip6tables=1 # make it persistent in /etc/modules-load.d and /etc/sysctl.d",
            ));
        }
        if !host.strangers.is_empty() {
            problems.push(Problem::new(
                ProblemCode::BridgePortUnknown,
                format!(
                    "unknown port {} on a bridge of pods, with no attachment: the host behind it can spoof pods' \
                     addresses",
                    host.strangers.join(", ")
                ),
                "add meshd-cni to the plugin chain, and recreate the existing pods",
            ));
        }
        if !host.learning.is_empty() {
            problems.push(Problem::new(
                ProblemCode::BridgeLearnsLinkLocal,
                format!(
                    "cannot disable link-local learning on bridge {}: a pod on it can attract other pods' frames",
                    host.learning.join(", ")
                ),
                "ip link set dev BRIDGE type bridge no_linklocal_learn 1, or recreate the bridge; the daemon retries",
            ));
        }
        if !host.refused_sources.is_empty() {
            problems.push(Problem::new(
                ProblemCode::AllowedSourceRefused,
                format!("packets from these allowedSources of pods are dropped: {}", host.refused_sources.join("; ")),
                "remove the prefixes from allowedSources in the CNI configuration and recreate the pods, or resolve \
                 the overlap",
            ));
        }
        if host.ipvs {
            problems.push(Problem::new(
                ProblemCode::Ipvs,
                "this node has IPVS virtual services: policies do not see the final destination of their packets",
                "run kube-proxy in nftables or iptables mode",
            ));
        }
        if let Err(error) = &self.reports {
            problems.push(Problem::new(
                ProblemCode::FlowsNotReported,
                format!("cannot read the verdicts that nftables reports: {error}"),
                "policies are enforced nevertheless; set --policy-log-group to a group that no other program reads",
            ));
        }
        problems
    }

    /// Nodes that most likely give their pods' packets their own address, so that policies here refuse them: nothing of
    /// this node is wrong.
    #[must_use]
    pub fn hints(&self) -> Vec<Problem> {
        self.gate.samples().hints(Instant::now())
    }
}
