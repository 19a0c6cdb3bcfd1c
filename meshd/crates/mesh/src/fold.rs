//! Resolves a set of records: the holder of each claim.
//!
//! The set must be closed: no record outside of it claims the same as a record inside, and no subnet outside names a
//! node inside. Then the result is that part of the whole topology, regardless of all other records.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use etcd_schema::{
    BackendKind, NetworkConfig, NodeId, NodeRecord, OutsidePeer, PeerName, PublicKey, Removed, SubnetKey, SubnetLease,
    Vtep, node_conflicts, peer_conflicts,
};
use ipnet::IpNet;

use crate::{
    address::prefixes,
    claims::{Claims, Precedence, SiteAddresses},
    problem::{Problem, ProblemCode, covers_underlay, key_conflict, node_removed, prefix_conflict},
    records::{Record, Records},
    topology::{ExternalPeer, NodePeer, OwnRecord, PeerId, networks},
};

/// A record, by its key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum RecordId {
    /// `subnets/…`
    Subnet(SubnetKey),
    /// `nodes/ID`
    Node(NodeId),
    /// `removed/ID`
    Removed(NodeId),
    /// `peers/NAME`
    Peer(PeerName),
}

/// Records of one revision, each kind in the order of its keys.
#[derive(Default)]
pub(crate) struct Selected<'a> {
    pub(crate) removed: Vec<(&'a NodeId, &'a Record<Removed>)>,
    pub(crate) nodes: Vec<(&'a NodeId, &'a Record<NodeRecord>)>,
    pub(crate) subnets: Vec<(&'a SubnetKey, &'a Record<SubnetLease>)>,
    pub(crate) peers: Vec<(&'a PeerName, &'a Record<OutsidePeer>)>,
}

impl<'a> Selected<'a> {
    /// Adds the record `id` of `records`, if it has it.
    pub(crate) fn add(&mut self, records: &'a Records, id: &'a RecordId) {
        match id {
            RecordId::Removed(id) => self.removed.extend(records.removed.get(id).map(|record| (id, record))),
            RecordId::Node(id) => self.nodes.extend(records.nodes.get(id).map(|record| (id, record))),
            RecordId::Subnet(key) => self.subnets.extend(records.subnets.get(key).map(|record| (key, record))),
            RecordId::Peer(name) => self.peers.extend(records.peers.get(name).map(|record| (name, record))),
        }
    }
}

/// Where nodes that hold say they are.
#[derive(Debug, Default)]
pub(crate) struct NodeEndpoints(BTreeMap<IpAddr, Vec<NodeId>>);

impl NodeEndpoints {
    fn add(&mut self, id: &NodeId, node: &NodeRecord) {
        for endpoint in &node.endpoints {
            let ids = self.0.entry(endpoint.ip()).or_default();
            if !ids.contains(id) {
                ids.push(id.clone());
            }
        }
    }

    /// Takes a node out, which may not have been in.
    pub(crate) fn remove(&mut self, id: &NodeId, node: &NodeRecord) {
        for endpoint in &node.endpoints {
            if let Some(ids) = self.0.get_mut(&endpoint.ip()) {
                ids.retain(|held| held != id);
                if ids.is_empty() {
                    self.0.remove(&endpoint.ip());
                }
            }
        }
    }

    /// An endpoint that lies in one of `nets`: that of the first such node.
    fn covered<'a>(&'a self, nets: &[IpNet], records: &'a Records) -> Option<(IpNet, SocketAddr, &'a NodeId)> {
        let within = |net: &IpNet| self.0.range(net.network()..=net.broadcast()).flat_map(|(_, ids)| ids);
        let first = nets.iter().flat_map(within).min()?;
        records.nodes.get(first)?.value.endpoints.iter().find_map(|endpoint| {
            let net = nets.iter().find(|net| net.contains(&endpoint.ip()))?;
            Some((*net, *endpoint, first))
        })
    }
}

/// The resolved claims of a closed set of records.
#[derive(Default)]
pub(crate) struct Folded {
    /// Of the node itself, if its record is among the selected ones.
    pub(crate) own_record: OwnRecord,
    pub(crate) own_subnets: Vec<SubnetKey>,
    pub(crate) members: BTreeMap<PeerId, NodePeer>,
    pub(crate) outside: BTreeMap<PeerName, ExternalPeer>,
    /// Refused claims as problems.
    pub(crate) problems: BTreeMap<RecordId, Vec<Problem>>,
}

/// Resolves the `selected` records of `records`, as seen from the node `me`. `endpoints` has those of all other valid
/// nodes, and gets those of the selected ones.
pub(crate) fn fold(records: &Records, me: &NodeId, selected: Selected<'_>, endpoints: &mut NodeEndpoints) -> Folded {
    let network = records.config.as_ref().map(|config| config.value.as_ref());
    let mut builder = Builder { records, me, network, endpoints, claims: Claims::default(), out: Folded::default() };
    let nodes = builder.nodes(selected.removed, selected.nodes);
    builder.subnets(selected.subnets, &nodes);
    builder.outside_peers(selected.peers);
    builder.out
}

/// Work in progress: claims are put in order of precedence, kind by kind.
struct Builder<'a> {
    records: &'a Records,
    me: &'a NodeId,
    network: Option<&'a NetworkConfig>,
    endpoints: &'a mut NodeEndpoints,
    claims: Claims,
    out: Folded,
}

/// A node that holds.
struct HoldingNode<'a> {
    /// Its name, with its id where the name is an older node's.
    name: String,
    node: &'a NodeRecord,
    /// The interface addresses that it holds at its site.
    addresses: Vec<IpNet>,
}

impl Builder<'_> {
    /// Node records that hold: not removed, sole holder of their keys.
    fn nodes<'r>(
        &mut self,
        removed: Vec<(&NodeId, &Record<Removed>)>,
        nodes: Vec<(&'r NodeId, &'r Record<NodeRecord>)>,
    ) -> BTreeMap<&'r NodeId, HoldingNode<'r>> {
        // No node holds a removed key.
        for (id, removed) in removed {
            for key in &removed.value.public_keys {
                self.claims.grant_key(*key, &format!("removed/{id}"));
            }
        }
        let mut addresses = SiteAddresses::default();
        let mut holding = BTreeMap::new();
        for (id, record) in in_precedence(nodes) {
            let node = record.value.as_ref();
            if let Some(refusal) = self.node_refusal(id, node) {
                self.problem(RecordId::Node(id.clone()), refusal);
                continue;
            }
            let name = self.name_of_node(id, node);
            for key in node_keys(node) {
                self.claims.grant_key(key, &format!("nodes/{id}"));
            }
            let addresses = self.addresses_of_node(id, node, &mut addresses);
            self.endpoints.add(id, node);
            holding.insert(id, HoldingNode { name, node, addresses });
        }
        let own = RecordId::Node(self.me.clone());
        self.out.own_record = match holding.get(self.me) {
            Some(own) => OwnRecord::Holds { name: own.name.clone() },
            None => match self.out.problems.get(&own).and_then(|problems| problems.first()) {
                Some(problem) => OwnRecord::Refused { cause: problem.cause.clone() },
                None => OwnRecord::Missing,
            },
        };
        holding
    }

    /// Why a node's record is refused, and the remedy.
    fn node_refusal(&self, id: &NodeId, node: &NodeRecord) -> Option<Problem> {
        let who = format!("nodes/{id}");
        if self.records.removed.contains_key(id) {
            let cause = format!("{who} is refused: the node was removed (removed/{id})");
            return Some(node_removed(cause, format!("delete removed/{id} to let the node back in")));
        }
        if let Some(Err(violations)) = self.network.map(|network| node_conflicts(node, network)) {
            let remedy = "start the node with an underlay, --public-ip or --endpoint outside the mesh networks";
            return Some(Problem::new(ProblemCode::InsideNetwork, format!("{who} is invalid: {violations}"), remedy));
        }
        let taken = |key: PublicKey| Some((key, self.claims.holder_of_key(&key)?));
        let (key, holder) = node_keys(node).into_iter().find_map(taken)?;
        let remedy = "give the node its own key: move its key file away and restart it";
        Some(key_conflict(&who, &key, holder, remedy))
    }

    /// A name is no identity: it is the older one's, and the other is named with its id.
    fn name_of_node(&mut self, id: &NodeId, node: &NodeRecord) -> String {
        let name = node.name.to_string();
        let Err(older) = self.claims.claim_name(&node.name, id) else { return name };
        let shown = format!("{name} ({id})");
        let cause = format!(
            "nodes/{id} has the same name as nodes/{older}: it is shown as `{shown}`, and `{name}` means {older}"
        );
        let remedy = format!(
            "meshctl node remove {older} # if {id} replaces that machine; otherwise rename one of the two with --node"
        );
        self.problem(RecordId::Node(id.clone()), Problem::new(ProblemCode::NameConflict, cause, remedy));
        shown
    }

    /// The addresses that no other node of its site has.
    fn addresses_of_node(&mut self, id: &NodeId, node: &NodeRecord, claimed: &mut SiteAddresses) -> Vec<IpNet> {
        let mut held = Vec::new();
        let Some(site) = &node.site else { return held };
        let who = format!("nodes/{id}");
        for address in &node.addresses {
            if claimed.claim(site.as_str(), address.addr(), &who) {
                held.push(*address);
                continue;
            }
            let cause =
                format!("{who} has no direct path by {address}: another node of site {site} has the same address");
            let remedy = "give the two machines different addresses or different sites";
            self.problem(RecordId::Node(id.clone()), Problem::new(ProblemCode::AddressConflict, cause, remedy));
        }
        held
    }

    fn subnets(
        &mut self,
        subnets: Vec<(&SubnetKey, &Record<SubnetLease>)>,
        nodes: &BTreeMap<&NodeId, HoldingNode<'_>>,
    ) {
        if self.network.is_none() {
            // Without a network, subnets cannot be judged; its absence is a problem of its own.
            return;
        }
        for (subnet, record) in in_precedence(subnets) {
            if record.value.freed.is_some() {
                // It is no one's, whatever takes its place.
                continue;
            }
            let who = format!("subnets/{subnet}");
            let of = || RecordId::Subnet(*subnet);
            if let Some(reason) = self.outside_of_network(subnet) {
                let cause = format!("{who} is invalid: {reason}");
                self.problem(of(), Problem::new(ProblemCode::SubnetOutsideNetwork, cause, "delete the key"));
                continue;
            }
            let conflict = prefixes(subnet)
                .find_map(|net| self.claims.holder_of_prefix(&net).map(|(held, holder)| (held, holder.to_owned())));
            if let Some((held, holder)) = conflict {
                let remedy = format!("delete {who}; its node then leases another subnet");
                self.problem(of(), prefix_conflict(&who, format_args!("{held} belongs to {holder}"), remedy));
                continue;
            }
            for net in prefixes(subnet) {
                self.claims.grant_prefix(&net, &who);
            }
            self.grant_subnet(subnet, &record.value, nodes);
        }
    }

    /// Gives a subnet that holds to its owner.
    fn grant_subnet(&mut self, subnet: &SubnetKey, lease: &SubnetLease, nodes: &BTreeMap<&NodeId, HoldingNode<'_>>) {
        match &lease.node {
            Some(id) if self.records.removed.contains_key(id) => {}
            Some(id) if id == self.me => self.out.own_subnets.push(*subnet),
            Some(id) => {
                let owner = PeerId::Node(id.clone());
                let member = self.out.members.entry(owner).or_insert_with(|| match nodes.get(id) {
                    Some(node) => member_of_node(node),
                    None => unusable(id.to_string(), format!("nodes/{id} is missing or invalid")),
                });
                member.subnets.push(*subnet);
            }
            None => {
                let mut member = self.member_of_lease(subnet, lease);
                member.subnets.push(*subnet);
                self.out.members.insert(PeerId::Lease(*subnet), member);
            }
        }
    }

    /// A lease without `Node`: what its host speaks comes from flannel's BackendData.
    fn member_of_lease(&mut self, subnet: &SubnetKey, lease: &SubnetLease) -> NodePeer {
        let name = format!("subnets/{subnet}");
        let kind = lease.backend_type.as_deref().and_then(BackendKind::named);
        let ours = self.network.map_or(BackendKind::Wireguard, |network| network.backend.kind);
        match kind {
            Some(BackendKind::Wireguard) => self.wireguard_host(name, subnet, lease),
            Some(kind @ (BackendKind::Vxlan | BackendKind::HostGw)) if kind == ours => self.clear_host(name, lease),
            _ => {
                let backend = lease.backend_type.as_deref().unwrap_or("none");
                unusable(name, format!("its BackendType is {backend}, the mesh's {ours}, and it has no Node"))
            }
        }
    }

    /// A host of Flannel's vxlan or host-gw backend. It has no key and answers no probe.
    fn clear_host(&self, name: String, lease: &SubnetLease) -> NodePeer {
        let public = [lease.public_ip.map(IpAddr::V4), lease.public_ipv6.map(IpAddr::V6)];
        let hosts: Vec<IpAddr> = public.into_iter().flatten().collect();
        let inside = hosts.iter().find(|at| networks(self.network).any(|network| network.contains(*at)));
        if let Some(at) = inside {
            return unusable(name, format!("its address {at} is inside the mesh networks"));
        }
        let vni = self.network.map_or(1, |network| network.backend.vxlan.vni);
        let ends = public.into_iter().zip(lease.vxlan()).filter_map(|(address, data)| Some((address?, data?)));
        let ends: Vec<_> = ends.collect();
        if let Some((_, other)) = ends.iter().find(|(_, data)| data.vni != vni) {
            return unusable(name, format!("its VNI is {}, the mesh's {vni}", other.vni));
        }
        NodePeer {
            addresses: hosts.into_iter().map(IpNet::from).collect(),
            vteps: ends.into_iter().map(|(address, data)| Vtep { address, mac: data.mac }).collect(),
            unusable: None,
            ..unusable(name, String::new())
        }
    }

    /// A host of Flannel's wireguard backend.
    fn wireguard_host(&mut self, name: String, subnet: &SubnetKey, lease: &SubnetLease) -> NodePeer {
        let (v4, v6) = (lease.wireguard_v4(), lease.wireguard_v6());
        let Some(data) = v4.or(v6) else {
            return unusable(name, "its BackendData contains no WireGuard key and it has no Node".to_owned());
        };
        if let Some(holder) = self.claims.holder_of_key(&data.public_key) {
            return unusable(name, format!("its key {} belongs to {holder}", data.public_key));
        }
        // Flannel's two devices share one key; a value where they do not is spoken to by the first.
        let v6 = v6.filter(|v6| v6.public_key == data.public_key);
        let mut endpoints = Vec::new();
        endpoints.extend(v4.zip(lease.public_ip).map(|(data, ip)| SocketAddr::new(ip.into(), data.port)));
        endpoints.extend(v6.zip(lease.public_ipv6).map(|(data, ip)| SocketAddr::new(ip.into(), data.port)));
        let inside = endpoints.iter().find(|at| networks(self.network).any(|network| network.contains(&at.ip())));
        if let Some(endpoint) = inside {
            return unusable(name, format!("its endpoint {endpoint} is inside the mesh networks"));
        }
        self.claims.grant_key(data.public_key, &format!("subnets/{subnet}"));
        NodePeer {
            name,
            site: None,
            keys: vec![data.public_key],
            listen_port: data.port,
            endpoints,
            addresses: Vec::new(),
            vteps: Vec::new(),
            subnets: Vec::new(),
            unusable: None,
            version: String::new(),
        }
    }

    fn outside_peers(&mut self, peers: Vec<(&PeerName, &Record<OutsidePeer>)>) {
        for (name, record) in in_precedence(peers) {
            let who = format!("peers/{name}");
            let of = || RecordId::Peer(name.clone());
            let peer = record.value.as_ref();
            if let Some(holder) = self.claims.holder_of_key(&peer.public_key).map(str::to_owned) {
                let remedy = format!("put {who} with the peer's own publicKey, or delete it");
                self.problem(of(), key_conflict(&who, &peer.public_key, &holder, remedy));
                continue;
            }
            let conflicts = self.network.map(|network| peer_conflicts(peer, network));
            if let Some(Err(violations)) = conflicts {
                let remedy = format!("put {who} with prefixes and an endpoint outside the mesh networks");
                self.problem(of(), prefix_conflict(&who, violations, remedy));
                continue;
            }
            let covered = self.endpoints.covered(&peer.allowed_ips, self.records);
            if let Some((net, endpoint, node)) = covered.map(|(net, at, id)| (net, at, id.clone())) {
                let claim = format!("{who} is invalid: allowedIPs");
                let endpoint = format!("the endpoint {endpoint} of nodes/{node}");
                let remedy = format!("put {who} with prefixes that contain no node's endpoint");
                self.problem(of(), covers_underlay(&claim, net, endpoint, remedy));
                continue;
            }
            let conflict = peer
                .allowed_ips
                .iter()
                .find_map(|net| self.claims.holder_of_prefix(net).map(|(held, holder)| (held, holder.to_owned())));
            if let Some((held, holder)) = conflict {
                let remedy = format!("put {who} with prefixes that are still free");
                self.problem(of(), prefix_conflict(&who, format_args!("{held} belongs to {holder}"), remedy));
                continue;
            }
            self.claims.grant_key(peer.public_key, &who);
            for net in &peer.allowed_ips {
                self.claims.grant_prefix(net, &who);
            }
            self.out.outside.insert(
                name.clone(),
                ExternalPeer {
                    public_key: peer.public_key,
                    preshared_key: peer.preshared_key.clone(),
                    allowed_ips: peer.allowed_ips.clone(),
                    endpoint: peer.endpoint,
                    persistent_keepalive: peer.persistent_keepalive,
                    site: peer.site.clone(),
                },
            );
        }
    }

    /// Why a subnet is none of the configured networks', if so.
    fn outside_of_network(&self, subnet: &SubnetKey) -> Option<String> {
        let Some(network) = self.network else { return Some("there is no valid config".to_owned()) };
        if network.cluster_around(subnet).is_some() {
            return None;
        }
        let outside = prefixes(subnet).find(|net| !network.networks().any(|network| network.contains(net)));
        let Some(outside) = outside else {
            return Some("its prefixes lie in networks of different clusters".to_owned());
        };
        let (family, v4) = if outside.addr().is_ipv4() { ("IPv4", true) } else { ("IPv6", false) };
        let networks = network.networks().filter(|network| network.addr().is_ipv4() == v4);
        let networks: Vec<String> = networks.map(|network| network.to_string()).collect();
        Some(if networks.is_empty() {
            format!("{outside}: the mesh has no {family} network")
        } else {
            format!("{outside} is outside the {family} networks {}", networks.join(", "))
        })
    }

    fn problem(&mut self, of: RecordId, problem: Problem) {
        self.out.problems.entry(of).or_default().push(problem);
    }
}

fn node_keys(node: &NodeRecord) -> Vec<PublicKey> {
    std::iter::once(node.public_key).chain(node.next_public_key).collect()
}

fn member_of_node(HoldingNode { name, node, addresses }: &HoldingNode<'_>) -> NodePeer {
    NodePeer {
        name: name.clone(),
        site: node.site.clone(),
        keys: node_keys(node),
        listen_port: node.listen_port,
        endpoints: node.endpoints.clone(),
        addresses: addresses.clone(),
        vteps: node.vteps.clone(),
        subnets: Vec::new(),
        unusable: None,
        version: node.version.clone(),
    }
}

fn unusable(name: String, reason: String) -> NodePeer {
    NodePeer {
        name,
        site: None,
        keys: Vec::new(),
        listen_port: 0,
        endpoints: Vec::new(),
        addresses: Vec::new(),
        vteps: Vec::new(),
        subnets: Vec::new(),
        unusable: Some(reason),
        version: String::new(),
    }
}

/// Records in the order in which their claims count; the order that they come in, that of the keys, breaks ties.
fn in_precedence<'a, K, V>(mut ordered: Vec<(&'a K, &'a Record<V>)>) -> Vec<(&'a K, &'a Record<V>)> {
    ordered.sort_by_key(|(_, record)| Precedence {
        retained: record.retained.is_some(),
        create_revision: record.create_revision,
    });
    ordered
}
