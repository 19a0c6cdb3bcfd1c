//! Problems of enforcement for operators.

use std::time::Instant;

use mesh::problem::Problem;

use super::Enforcement;

impl Enforcement {
    /// What is wrong now. `expected`: the mesh is known and its policies should be in force.
    #[must_use]
    pub fn problems(&self, expected: bool) -> Vec<Problem> {
        let applied = *self.applied.borrow();
        let mut problems = Vec::new();
        if expected && applied.generation == 0 {
            problems.push(Problem::new(
                "policies_not_in_force",
                "no complete picture of the policies is in force yet: until then only this node's own processes reach its \
                 pods, but for what rules of an earlier run allow",
                "see what else status says; it passes once the policies are read and the kernel takes their rules",
            ));
        }
        if applied.refused {
            problems.push(Problem::new(
                "policy_rules_refused",
                "the kernel does not take the rules of the policies; what was in force before stays so, see the log",
                "check that the kernel has nf_tables with sets, maps and connection tracking; it is tried again",
            ));
        }
        problems.extend(self.unmatched.borrow().problems(Instant::now()));
        let host = self.host.borrow();
        if host.bridged && !host.switched_judged {
            problems.push(Problem::new(
                "bridge_not_filtered",
                "pods are attached to a bridge, and packets that it passes from pod to pod do not come by nftables: they \
                 are refused",
                "modprobe br_netfilter; sysctl -w net.bridge.bridge-nf-call-iptables=1 \
                 net.bridge.bridge-nf-call-ip6tables=1 # and the same below /etc/modules-load.d and /etc/sysctl.d, to stay",
            ));
        }
        if !host.strangers.is_empty() {
            problems.push(Problem::new(
                "bridge_port_unknown",
                format!(
                    "no attachment tells whose port {} is, on a bridge of pods: what is behind it may borrow others' \
                     addresses",
                    host.strangers.join(", ")
                ),
                "put meshd-cni into the chain of plugins, and make the pods that are there anew",
            ));
        }
        if !host.learning.is_empty() {
            problems.push(Problem::new(
                "bridge_learns_link_local",
                format!(
                    "cannot turn off link-local learning on bridge {}: a pod on it can attract other pods' frames",
                    host.learning.join(", ")
                ),
                "ip link set dev BRIDGE type bridge no_linklocal_learn 1, or recreate the bridge; the daemon retries",
            ));
        }
        if !host.refused_sources.is_empty() {
            problems.push(Problem::new(
                "allowed_source_refused",
                format!("packets from these allowedSources of pods are dropped: {}", host.refused_sources.join("; ")),
                "take the prefixes out of allowedSources in the CNI configuration and recreate the pods, or move what they \
                 overlap",
            ));
        }
        if host.ipvs {
            problems.push(Problem::new(
                "ipvs",
                "this node has virtual services of IPVS: what they rewrite is not judged by where it goes",
                "run kube-proxy in nftables or iptables mode",
            ));
        }
        if let Err(error) = &self.reports {
            problems.push(Problem::new(
                "flows_not_reported",
                format!("what nftables reports of its verdicts cannot be read: {error}"),
                "policies hold without; give a group that no other program reads by --policy-log-group",
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
