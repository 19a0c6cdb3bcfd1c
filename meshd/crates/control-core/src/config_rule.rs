//! Decides whether a value of `config` is accepted, or the previous configuration stays in force.
//!
//! It is refused if it would exclude leased subnets (its deletion excludes all of them), if it would cover an accepted
//! node's underlay or prefixes of an accepted external peer, or if it names an unsupported backend.
//!
//! All nodes decide alike, because the decision depends only on etcd and on the previous configuration, which is also
//! from etcd (and stays in the cache over a restart). A node without a previous configuration decides by the nodes'
//! leased subnets, and ignores external peers: those that conflict are then refused instead.

use cow_map::CowMap;
use etcd_schema::{
    Key, NetworkConfig, NodeId, NodeRecord, OutsidePeer, PeerName, SubnetKey, SubnetLease, Violations, config_change,
    config_conflicts, node_conflicts, peer_conflicts,
};
use ipnet::IpNet;
use mesh::{
    backend::is_supported,
    problem::{Problem, ProblemCode},
    records::Record,
};

/// Longest configuration, as JSON, that a problem repeats.
const MAX_REPEATED: usize = 4096;

/// Inputs for the decision on a configuration.
pub(crate) struct ConfigReview<'a> {
    /// The configuration in force.
    pub(crate) before: Option<&'a Record<NetworkConfig>>,
    /// Whether `config` exists, readable or not.
    pub(crate) present: bool,
    /// The subnets in force. Retained ones count: their nodes are about to put them back, or may live on them.
    pub(crate) subnets: &'a CowMap<SubnetKey, Record<SubnetLease>>,
    /// The external peers in force.
    pub(crate) peers: &'a CowMap<PeerName, Record<OutsidePeer>>,
    /// The nodes' records in force.
    pub(crate) nodes: &'a CowMap<NodeId, Record<NodeRecord>>,
}

impl ConfigReview<'_> {
    /// Why `new` is not taken; `None` for `new`: there is no value under `config` that could be. No problem: it is.
    pub(crate) fn refusal(&self, new: Option<&Record<NetworkConfig>>) -> Option<Problem> {
        let then = if self.before.is_some() { "the previous one stays in force" } else { "there is no earlier one" };
        let problem = |cause: String, remedy: String| Problem {
            code: ProblemCode::ConfigRefused,
            key: Some(Key::Config.to_string()),
            cause: format!("{cause}; {then}"),
            remedy,
        };
        let outside = self.left_outside(new.map(|new| &*new.value));
        let Some(new) = new else {
            let subnet = Key::Subnet(outside?);
            let what = if self.present { "cannot be read" } else { "was deleted" };
            return Some(problem(format!("config {what} while `{subnet}` is leased"), self.put_back()));
        };
        if !is_supported(new.value.backend.kind) {
            return Some(problem(
                format!("Backend.Type \"{}\" is not supported by this version", new.value.backend.kind),
                "put \"Backend\": {\"Type\": \"wireguard\"}, \"vxlan\" or \"host-gw\"".into(),
            ));
        }
        if let Some(outside) = outside {
            let violations = self.before.and_then(|before| {
                let leased = self.subnets.iter().filter(|(_, record)| is_leased(record));
                let leased: Vec<SubnetKey> = leased.map(|(key, _)| *key).collect();
                config_change(&before.value, &new.value, &leased).err()
            });
            let cause = violations.map_or_else(
                || format!("the leased `{}` would be outside its networks", Key::Subnet(outside)),
                |violations| violations.to_string(),
            );
            return Some(problem(
                cause,
                self.put_family_back(&new.value).unwrap_or_else(|| {
                    let fields = if new.value.is_flat() { "a Network and SubnetLen" } else { "Networks" };
                    format!(
                        "put {fields} that cover every leased subnet; to change a network, drain its nodes and delete \
                         their keys first"
                    )
                }),
            ));
        }
        let before = self.before?;
        if let Some(violations) = self.covered_node(before, new) {
            return Some(problem(violations, "put networks that contain no endpoint or address of a node".into()));
        }
        let violations = self.covered_peers(before, new).err()?;
        Some(problem(
            violations.to_string(),
            "put networks that do not overlap prefixes of external peers, or delete or change those peers below \
             `peers/`"
                .into(),
        ))
    }

    /// The first leased subnet that `new` would leave outside, if any.
    fn left_outside(&self, new: Option<&NetworkConfig>) -> Option<SubnetKey> {
        let counts = |key: &SubnetKey, record: &Record<SubnetLease>| match self.before {
            Some(before) => is_leased(record) && before.value.covers(key),
            None => record.lease.is_some() && record.value.node.is_some(),
        };
        self.subnets
            .iter()
            .find(|(key, record)| counts(key, record) && !new.is_some_and(|new| new.covers(key)))
            .map(|(key, _)| *key)
    }

    /// The first node that the mesh has accepted and `new` would cut off, because a network of it contains the node's
    /// underlay. One that was written after `new` is judged against it.
    fn covered_node(&self, before: &Record<NetworkConfig>, new: &Record<NetworkConfig>) -> Option<String> {
        self.nodes.iter().find_map(|(id, node)| {
            let accepted = node.mod_revision < new.mod_revision && node_conflicts(&node.value, &before.value).is_ok();
            let conflict = accepted.then(|| node_conflicts(&node.value, &new.value).err()).flatten()?;
            Some(format!("it would cut off node {} ({id}): {conflict}", node.value.name))
        })
    }

    /// Whether `new` leaves alone the external peers that the mesh has accepted. A peer that was written after `new`
    /// is judged against it, and not the other way round: so nodes that saw both at once agree with those that did not.
    fn covered_peers(&self, before: &Record<NetworkConfig>, new: &Record<NetworkConfig>) -> Result<(), Violations> {
        let accepted = self.peers.iter().filter(|(_, peer)| {
            peer.mod_revision < new.mod_revision && peer_conflicts(&peer.value, &before.value).is_ok()
        });
        config_conflicts(&new.value, accepted.map(|(name, peer)| (name, &*peer.value)))
    }

    /// The remedy if `new` lacks an address family of the mesh.
    fn put_family_back(&self, new: &NetworkConfig) -> Option<String> {
        let before = &self.before?.value;
        if !before.is_flat() || !new.is_flat() {
            return None;
        }
        let lost =
            before.networks().find(|net| !new.networks().any(|new| new.addr().is_ipv4() == net.addr().is_ipv4()));
        let (fields, example) = match lost? {
            IpNet::V6(network) => ("EnableIPv6", format!("\"EnableIPv6\": true, \"IPv6Network\": \"{network}\"")),
            IpNet::V4(network) => ("EnableIPv4", format!("\"EnableIPv4\": true, \"Network\": \"{network}\"")),
        };
        Some(format!("put a config with {example}: {fields} must stay while a subnet of that family is leased"))
    }

    fn put_back(&self) -> String {
        let json = self.before.map(|before| before.value.to_json()).filter(|json| json.len() <= MAX_REPEATED);
        json.and_then(|json| String::from_utf8(json).ok()).map_or_else(
            || "put a valid configuration under `config`".into(),
            |json| format!("put it back under `config`; the value in force is {json}"),
        )
    }
}

/// Whether a node has it: neither a block that a node gave up nor a reservation for a host.
fn is_leased(record: &Record<SubnetLease>) -> bool {
    record.lease.is_some() || record.value.node.is_some()
}
