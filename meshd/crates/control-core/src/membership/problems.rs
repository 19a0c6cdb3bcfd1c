//! What keeps this node from its subnet or its records, for people.

use etcd_schema::{Cluster, Key};
use mesh::problem::{Problem, ProblemCode, node_removed};
use text::quote;

use super::{Membership, MembershipState};

impl Membership {
    /// Problems of this node. `prefix` is that of all keys, for commands.
    #[must_use]
    pub fn problems(&self, prefix: &str) -> Vec<Problem> {
        let problem = |code, cause: String, remedy: &str| Problem { code, key: None, cause, remedy: remedy.to_owned() };
        let mut problems = Vec::new();
        match &self.state {
            MembershipState::NoConfig => problems.push(problem(
                ProblemCode::NoConfig,
                "there is no valid network configuration".into(),
                &format!(
                    "meshctl check config FILE && etcdctl put {} < FILE # if the mesh has another prefix, correct \
                     --etcd-prefix: etcdctl get --prefix --keys-only / | grep '/config$'",
                    quote(&format!("{prefix}/config"))
                ),
            )),
            MembershipState::NoNetwork { cluster } => {
                let (cause, remedy) = if cluster.is_flat() {
                    let cause = "`config` has networks of clusters only, and this node is of no cluster".to_owned();
                    (cause, "start meshd with --cluster, or put an entry without `cluster` into Networks")
                } else {
                    let cause = format!("`config` has no network of cluster {cluster}, which this node is of");
                    (cause, "put an entry with this `cluster` into Networks, or correct --cluster")
                };
                problems.push(problem(ProblemCode::NoNetwork, cause, remedy));
            }
            MembershipState::AwaitingBlock { cluster } => problems.push(problem(
                ProblemCode::AwaitingBlock,
                self.awaited(cluster),
                &format!(
                    "kubectl describe node {} # its InternalIP, PodCIDRs and Events of meshd-sync, which also logs what is \
                     wrong",
                    quote(self.facts.name.as_str())
                ),
            )),
            MembershipState::PoolExhausted { family, total } => problems.push(problem(
                ProblemCode::PoolExhausted,
                format!("all {total} {family} subnets are taken"),
                "remove nodes that are gone (meshctl node remove NAME), or widen SubnetMin to SubnetMax",
            )),
            MembershipState::SubnetLost { subnet, reason } => problems.push(problem(
                ProblemCode::SubnetLost,
                format!("{} no longer belongs to this node: {reason}", Key::Subnet(*subnet)),
                "drain this node: it leases a new subnet once no pod is attached",
            )),
            MembershipState::Removed => problems.push(node_removed(
                "an operator removed this node or its key from the mesh",
                "stop meshd here; to let the node back in, delete its key below `removed/`",
            )),
            MembershipState::Cloned { reason } => problems.push(problem(
                ProblemCode::Cloned,
                format!("{reason}; this daemon forwards no packets"),
                "if this machine is the clone: stop meshd here, delete its state directory, start meshd; if the other \
                 machine is: stop meshd there, and this node resumes within 30 s",
            )),
            MembershipState::Connecting | MembershipState::Joining | MembershipState::Joined { .. } => {}
        }
        if let (MembershipState::Joined { subnet }, true) = (&self.state, self.records.is_outdated()) {
            problems.push(problem(
                ProblemCode::SubnetOutdated,
                format!("`{}` does not match the current `config`; it stays in use", Key::Subnet(*subnet)),
                "to lease a new subnet: drain this node, stop meshd, delete that key, start meshd; if Kubernetes allocates, wait \
                 for meshd-sync to reserve its podCIDRs",
            ));
        }
        if let Some(cause) = &self.bad_facts {
            problems.push(problem(
                ProblemCode::BadFacts,
                format!("this node's record would be invalid and was not written: {cause}"),
                "correct the flags or the settings file of meshd on this node",
            ));
        }
        problems.extend(self.alive.problems(&self.identity.id));
        problems
    }

    /// The cause for a node that waits for a block.
    fn awaited(&self, cluster: &Cluster) -> String {
        let addresses: Vec<String> = self.facts.addresses.iter().map(|net| net.addr().to_string()).collect();
        format!(
            "Kubernetes allocates subnets: waiting for meshd-sync{} to reserve the podCIDRs of the Node {} whose InternalIP \
             is one of {}",
            if cluster.is_flat() { String::new() } else { format!(" of cluster {cluster}") },
            self.facts.name,
            if addresses.is_empty() { "no known address".to_owned() } else { addresses.join(", ") }
        )
    }
}
