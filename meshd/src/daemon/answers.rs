//! Answers of the local API, from the last plan and live counters.

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::PoisonError,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use api::{Check, Device, DevicePeer, Figures, Source};
use api_types::{DropCount, FlowSample, Peer, Route, Status};
use control_core::{core::ControlStatus, membership::MembershipState};
use etcd_schema::PeerName;
use ipnet::IpNet;
use mesh::{
    address::{overlay_addresses, prefixes},
    problem::{Problem, ProblemCode},
    topology::OwnRecord,
};
use text::quote;
use tunnel::OffloadState;

use super::{
    nftables, peer_config,
    peers::{counts, not_reached},
    published::{ApiState, NodeState},
};
use crate::echo::Echo;

impl ApiState {
    fn policy(&self) -> api_types::PolicyStatus {
        let applied = *self.enforcement.applied().borrow();
        let audit = self.enforcement.in_force().is_some_and(|in_force| in_force.mesh.audit);
        let mode = if audit { etcd_schema::PolicyMode::Audit } else { etcd_schema::PolicyMode::Enforce };
        api_types::PolicyStatus {
            revision: applied.revision,
            mode: mode.as_str().to_owned(),
            pods: applied.pods,
            policies: applied.policies,
            verdicts: occurred(self.verdicts()),
        }
    }

    /// The problem that policies refuse nothing: audit mode is meant for temporary use.
    fn audit(&self) -> Option<Problem> {
        let audit = self.enforcement.in_force().is_some_and(|in_force| in_force.mesh.audit);
        let key = quote(&format!("{}/config", self.etcd.prefix.trim_end_matches('/'))).into_owned();
        audit.then(|| {
            Problem::new(
                ProblemCode::PolicyAudit,
                "policyMode in config is audit: policies are evaluated but nothing is denied",
                format!(
                    "config=$(etcdctl get {key} --print-value-only | jq -e '.policyMode = \"enforce\"') && etcdctl \
                     put {key} \"$config\" # meshctl flows --denied shows the flows this would deny"
                ),
            )
        })
    }

    /// The problem that Kubernetes pods run here, but their labels and policies are not copied to etcd.
    fn not_copied(&self, control: &ControlStatus) -> Option<Problem> {
        let table = self.attachments.table();
        let table = table.borrow();
        let mut pods = table.attachments.values().filter_map(|attached| attached.attach.as_ref()?.pod.uid.as_ref());
        let first = pods.next().filter(|_| control.no_kubernetes_objects)?;
        Some(Problem::new(
            ProblemCode::KubernetesNotCopied,
            format!(
                "Kubernetes pods are attached here (such as uid {first}), but etcd contains no pods, namespaces or \
                 policies: no NetworkPolicy is in force"
            ),
            "sync them into etcd, see \"Pods and policies into etcd\" in docs/kubernetes.md (/usr/share/doc/meshd)",
        ))
    }

    /// Counts of packets from the tunnel, by verdict.
    fn verdicts(&self) -> Vec<DropCount> {
        let counts = self.enforcement.counts();
        counts.iter().map(|(reason, packets)| DropCount { reason: reason.name().to_owned(), packets }).collect()
    }

    /// Dropped packets, for every reason that there is.
    fn drops(&self) -> Vec<DropCount> {
        let of_tunnel = self.tunnel.drops();
        let named = of_tunnel.iter().map(|(reason, packets)| DropCount { reason: reason.name().to_owned(), packets });
        named.chain(self.lock().firewall_drops.iter().cloned()).collect()
    }

    /// Every problem of this node, each cause once.
    pub(super) fn problems(&self, control: &ControlStatus, peers: &[(String, Peer)]) -> NodeProblems {
        let in_force = self.lock();
        let mut problems = control.problems.clone();
        problems.extend(in_force.record_problems.iter().cloned());
        if let Some(plan) = &in_force.plan {
            problems.extend(plan.problems.iter().cloned());
        }
        problems.extend(in_force.topology.problems.iter().cloned());
        problems.extend(in_force.problems.iter().cloned());
        problems.extend(self.enforcement.problems(in_force.plan.is_some()));
        problems.extend(self.attachments.problem());
        problems.extend(not_reached(peers));
        one_for_etcd(&mut problems);
        nftables::join_policies(&mut problems, self.enforcement.applied().borrow().refused);
        problems.extend(self.tunnel.offloads().refused().map(|offload| {
            Problem::new(
                ProblemCode::OffloadRefused,
                format!("the kernel refused {offload}: the tunnel runs without it and is slower"),
                "none needed: no packets are lost; a newer kernel may support it, and a restart tries again",
            )
        }));
        let degrading = !problems.is_empty();
        problems.extend(self.warnings.lock().unwrap_or_else(PoisonError::into_inner).values().cloned());
        problems.extend(self.enforcement.hints());
        problems.extend(self.audit());
        problems.extend(self.not_copied(control));
        // Several parts of the daemon may find the same cause.
        let mut seen = HashSet::new();
        problems.retain(|problem| seen.insert((problem.code, problem.to_string())));
        NodeProblems { problems, degrading }
    }
}

impl Source for ApiState {
    fn status(&self) -> Status {
        let control = self.control.borrow().clone();
        let peers = self.peers_by_owner();
        let drops = occurred(self.drops());
        let NodeProblems { problems, degrading } = self.problems(&control, &peers);
        let in_force = self.lock();
        Status {
            node: self.identity.name.clone(),
            id: self.identity.id.clone(),
            site: self.identity.site.clone(),
            cluster: self.identity.cluster.to_string(),
            subnets: in_force.topology.own_prefixes().collect(),
            overlay: in_force.topology.own_overlay(),
            revision: in_force.topology.revision,
            etcd: api_types::Etcd {
                connected: control.connected,
                endpoint: control.endpoint.clone(),
                age: control.age(Instant::now()).map(|age| age.as_secs_f64()),
                revision: control.revision,
            },
            peers: counts(&peers),
            state: state(&control, &in_force, degrading),
            problems: problems.iter().map(Into::into).collect(),
            policy: self.policy(),
            copies: copies(&control),
            drops,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime: self.started.elapsed().as_secs(),
        }
    }

    fn peers(&self) -> Vec<Peer> {
        self.peers_by_owner().into_iter().map(|(_, peer)| peer).collect()
    }

    fn reach(&self, target: &str) -> Result<api_types::Ping, api_types::QuestionError> {
        Self::reach(self, target)
    }

    fn echo(&self, to: IpAddr, packet: u16) -> api_types::Echoed {
        match (Echo { packet, ..Echo::to(to) }).ask() {
            Ok(took) => api_types::Echoed { round_trip: Some(took.as_secs_f64()), text: String::new() },
            Err(error) => api_types::Echoed { round_trip: None, text: error.to_string() },
        }
    }

    fn diagnose(&self) -> api_types::Diagnosis {
        Self::diagnose(self)
    }

    fn routes(&self) -> Vec<Route> {
        self.mesh_routes()
    }

    fn policies(&self) -> Vec<api_types::Policy> {
        self.enforcement.policies().unwrap_or_default()
    }

    fn policy(&self, name: &str) -> Option<api_types::ShownPolicy> {
        self.enforcement.policy(name)
    }

    fn explain(&self, question: &api_types::Question) -> Result<api_types::Explained, api_types::QuestionError> {
        self.enforcement.explain(question)
    }

    fn flows(&self, after: u64) -> Vec<FlowSample> {
        self.enforcement.samples(after)
    }

    fn liveness(&self) -> Vec<Check> {
        self.watchdog.checks(Instant::now())
    }

    fn readiness(&self) -> Vec<Check> {
        let in_force = self.lock();
        let refused = [ProblemCode::KernelUnreadable, ProblemCode::KernelRefused, ProblemCode::NftablesRefused];
        let data_plane = match &in_force.plan {
            None => Some("the kernel has not been programmed yet".to_owned()),
            Some(_) => in_force
                .problems
                .iter()
                .find(|problem| refused.contains(&problem.code))
                .map(|problem| problem.cause.clone()),
        };
        let applied = *self.enforcement.applied().borrow();
        let policy = match applied {
            _ if applied.refused => Some("the kernel refuses the policy rules".to_owned()),
            _ if applied.generation == 0 => Some("policies have not been read completely yet".to_owned()),
            _ => None,
        };
        vec![
            Check::new("identity", no_identity(&self.control.borrow().state, &in_force.topology.own_record)),
            Check::new("subnet", no_subnet(&self.control.borrow().state, &in_force)),
            Check::new("data_plane", data_plane),
            Check::new("policy", policy),
        ]
    }

    fn figures(&self) -> Figures {
        let control = self.control.borrow();
        Figures {
            interface: self.identity.interface.clone(),
            lists: control.lists,
            audit_differences: control.audit_differences,
            attachments: self.attachments.table().borrow().attachments.len(),
            policy_apply: self.enforcement.applied().borrow().took,
            tunnel_bytes: self.tunnel.bytes(),
            drops: self.drops(),
            verdicts: self.verdicts(),
            offloads: self.tunnel.offloads().iter().map(|(name, state)| (name, state == OffloadState::On)).collect(),
        }
    }

    fn device(&self) -> Device {
        let mut tunnel = self.tunnel_peers();
        let in_force = self.lock();
        let configs = in_force.plan.iter().flat_map(|plan| plan.tunnel.peers.values());
        let peers = configs.flat_map(|config| {
            let status = tunnel.remove(&config.name);
            // During a rotation, the next key follows the one in use.
            config.keys.iter().enumerate().map(move |(at, key)| DevicePeer {
                public_key: *key,
                preshared_key: config.preshared_key.clone(),
                endpoint: status.as_ref().and_then(|status| status.endpoint),
                latest_handshake: status.as_ref().and_then(|status| status.latest_handshake),
                rx_bytes: status.as_ref().map_or(0, |status| status.rx_bytes),
                tx_bytes: status.as_ref().map_or(0, |status| status.tx_bytes),
                keepalive: config.keepalive,
                allowed: if at == 0 { config.allowed.clone() } else { Vec::new() },
            })
        });
        Device {
            peers: peers.collect(),
            private_key: Some(self.private_key.clone()),
            listen_port: self.tunnel.listen_port(),
            mark: 0,
        }
    }

    fn network(&self) -> Result<cni::daemon::Network, String> {
        let in_force = self.lock();
        let plan = in_force.plan.as_ref().ok_or("the daemon has not read the mesh yet")?;
        let new = in_force.topology.subnets_of_new(self.control.borrow().subnet);
        let subnets: Vec<IpNet> = new.iter().flat_map(prefixes).collect();
        if subnets.is_empty() {
            return Err("this node has no subnet".to_owned());
        }
        let overlay = new.iter().flat_map(overlay_addresses).chain(in_force.topology.own_overlay()).collect();
        Ok(cni::daemon::Network { networks: in_force.topology.networks().collect(), subnets, overlay, mtu: plan.mtu })
    }

    fn accept_etcd(&self) -> Result<api_types::EtcdAccepted, api_types::QuestionError> {
        let accepted = self.etcd_acceptor.accept();
        let accepted =
            accepted.ok_or_else(|| api_types::QuestionError::NotFound("the daemon is stopping".to_owned()))?;
        Ok(api_types::EtcdAccepted { withdrawn: accepted.withdrawn, changed: accepted.changed })
    }

    fn source_conflict(&self, prefix: &IpNet) -> Result<Option<String>, String> {
        let in_force = self.enforcement.in_force().ok_or("policy is not in force on this node yet")?;
        Ok(in_force.mesh.source_conflict(prefix))
    }

    fn outside_peer_config(&self, name: &str) -> Option<String> {
        let name: PeerName = name.parse().ok()?;
        let in_force = self.lock();
        let mtu = in_force.plan.as_ref()?.mtu;
        peer_config::wg_quick(&name, &in_force.topology, &self.identity, &in_force.own_endpoints, mtu)
    }
}

/// The problems of this node.
pub(super) struct NodeProblems {
    pub(super) problems: Vec<Problem>,
    /// Some of it keeps packets from their way, or may.
    degrading: bool,
}

/// A node that has never reached etcd reports a single problem: it waits for etcd, with the cause.
fn one_for_etcd(problems: &mut Vec<Problem>) {
    let with = |code| problems.iter().position(|problem: &Problem| problem.code == code);
    let Some(unreachable) = with(ProblemCode::EtcdUnreachable) else { return };
    match with(ProblemCode::WaitingForEtcd) {
        Some(waiting) => {
            let Problem { cause, remedy, .. } = problems[unreachable].clone();
            problems[waiting].cause = format!("{}; {cause}", problems[waiting].cause);
            problems[waiting].remedy = remedy;
            problems.remove(unreachable);
        }
        None => problems[unreachable].cause.push_str("; the last known state stays in force"),
    }
}

/// Copies of Kubernetes clusters, with their age by the clock of this machine.
fn copies(control: &ControlStatus) -> Vec<api_types::CopyStatus> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let copies = control.copies.iter().map(|(cluster, state)| api_types::CopyStatus {
        cluster: cluster.to_string(),
        age_seconds: now.saturating_sub(state.current_at),
        objects: state.objects.clone(),
        held: state.held,
    });
    copies.collect()
}

fn state(control: &ControlStatus, in_force: &NodeState, problems: bool) -> api_types::DaemonState {
    if control.state == MembershipState::Removed {
        api_types::DaemonState::Removed
    } else if matches!(control.state, MembershipState::Cloned { .. }) {
        api_types::DaemonState::Cloned
    } else if in_force.topology.network.is_none() {
        api_types::DaemonState::Starting
    } else if in_force.topology.own_subnets.is_empty() {
        api_types::DaemonState::Joining
    } else if problems || !control.connected {
        api_types::DaemonState::Degraded
    } else {
        api_types::DaemonState::Running
    }
}

fn occurred(mut counts: Vec<DropCount>) -> Vec<DropCount> {
    counts.retain(|count| count.packets > 0);
    counts
}

/// Why the other nodes do not take this node for one of the mesh. That etcd is away is no reason: the records in force
/// count.
fn no_identity(state: &MembershipState, own_record: &OwnRecord) -> Option<String> {
    match (state, own_record) {
        (MembershipState::Cloned { reason }, _) => Some(reason.clone()),
        (_, OwnRecord::Holds { .. }) => None,
        (_, OwnRecord::Refused { cause }) => Some(format!("the other nodes refuse this node: {cause}")),
        (_, OwnRecord::Missing) => Some("this node's record is not in etcd".to_owned()),
    }
}

/// Why the records in force give this node no subnet.
fn no_subnet(state: &MembershipState, in_force: &NodeState) -> Option<String> {
    let own = &in_force.topology.own_subnets;
    if in_force.subnet_holds && !own.is_empty() {
        return None;
    }
    let reason = match in_force.topology.network {
        None => "the mesh has not been read yet, neither from etcd nor from a cache",
        Some(_) if matches!(state, MembershipState::AwaitingBlock { .. }) => {
            "Kubernetes allocates subnets, and this node waits for its podCIDRs"
        }
        Some(_) if own.is_empty() => "this node has no subnet",
        Some(_) => "the key of this node's subnet is not in etcd",
    };
    Some(reason.to_owned())
}

#[cfg(test)]
mod tests {
    use etcd_schema::{Cluster, NetworkConfig};

    use super::*;

    #[test]
    fn a_node_is_ready_only_as_a_member_that_the_others_accept() {
        let holds = OwnRecord::Holds { name: "east1".to_owned() };
        let refused = OwnRecord::Refused { cause: "nodes/x: bad key".to_owned() };
        let cloned = MembershipState::Cloned { reason: "a clone runs".to_owned() };
        assert_eq!(no_identity(&MembershipState::Connecting, &holds), None, "etcd away, the cached view holds");
        assert_eq!(no_identity(&cloned, &holds).unwrap(), "a clone runs");
        let refusal = no_identity(&MembershipState::Joining, &refused).unwrap();
        assert!(refusal.contains("nodes/x: bad key"), "{refusal}");
        assert!(no_identity(&MembershipState::Joining, &OwnRecord::Missing).is_some());
    }

    #[test]
    fn a_node_is_ready_only_with_a_subnet_that_the_view_in_force_gives_it() {
        let joining = MembershipState::Joining;
        let mut in_force = NodeState { subnet_holds: true, ..NodeState::default() };
        assert!(no_subnet(&joining, &in_force).unwrap().contains("not been read"));
        in_force.topology.network = Some(NetworkConfig::parse(br#"{"Network": "10.244.0.0/16"}"#).unwrap());
        assert!(no_subnet(&joining, &in_force).unwrap().contains("no subnet"));
        let awaits = MembershipState::AwaitingBlock { cluster: Cluster::default() };
        assert!(no_subnet(&awaits, &in_force).unwrap().contains("Kubernetes allocates"));
        in_force.topology.own_subnets = vec!["10.244.3.0-24".parse().unwrap()];
        assert_eq!(no_subnet(&joining, &in_force), None);
        // It is in use all the same while its key is put back.
        in_force.subnet_holds = false;
        assert!(no_subnet(&joining, &in_force).unwrap().contains("not in etcd"));
    }
}
