use proptest::prelude::*;

use super::*;
use etcd_schema::NodeId;

use crate::{
    kernel_state::{Floor, RouteVia},
    path::{DirectState, MacAddress, NotDirect, PathAgents, Reach, Reason},
};

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn key(seed: u8) -> etcd_schema::PublicKey {
    keys::PrivateKey::from_bytes([seed; 32]).public()
}

fn topology(config: &str) -> Topology {
    let mut topology = Topology {
        network: Some(NetworkConfig::parse(config.as_bytes()).unwrap()),
        own_subnets: vec!["10.244.1.0-24&fd42:244:0:1::-64".parse().unwrap()],
        ..Topology::default()
    };
    topology.members.insert(PeerId::Node("bb".parse().unwrap()), Arc::new(member("b", "east", 2)));
    topology.members.insert(PeerId::Node("cc".parse().unwrap()), Arc::new(member("c", "west", 3)));
    topology
}

const DUAL: &str = r#"{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd42:244::/48"}"#;

/// Node number `n`: subnets `10.244.n.0/24` and `fd42:244:0:n::/64`, interface address `192.168.1.n` or `192.168.2.n`.
fn member(name: &str, site: &str, n: u8) -> NodePeer {
    let third = if site == "east" { 1 } else { 2 };
    NodePeer {
        name: name.to_owned(),
        site: Some(site.parse().unwrap()),
        keys: vec![key(n)],
        listen_port: 51820,
        endpoints: vec![format!("192.168.{third}.{n}:51820").parse().unwrap()],
        addresses: vec![net(&format!("192.168.{third}.{n}/24"))],
        vteps: Vec::new(),
        subnets: vec![format!("10.244.{n}.0-24&fd42:244:0:{n}::-64").parse().unwrap()],
        unusable: None,
        version: "0.1.0".to_owned(),
    }
}

fn local() -> Local {
    let link =
        UnderlayLink { name: "eth0".parse().unwrap(), index: 7, mtu: 1500, addresses: vec![net("192.168.1.1/24")] };
    Local {
        vteps: BTreeMap::new(),
        site: Some("east".to_owned()),
        underlay: BTreeMap::from([(Family::V4, link)]),
        has_endpoint: true,
        listen_port: 51820,
        protected: vec![(ip("192.168.1.1"), "this node's address".to_owned())],
        ip_masq: true,
        forward_accept: false,
    }
}

/// The plan with paths of which nothing is known.
fn plan(topology: &Topology, local: &Local, observed: &Observed) -> Plan {
    super::plan(Instant::now(), topology, local, observed, &mut PathAgents::default())
}

/// The plan with the IPv4 path to the node bb in this state.
fn plan_while(state: DirectState, topology: &Topology, local: &Local) -> (Plan, PathAgents) {
    let (now, mut agents, observed) = (Instant::now(), PathAgents::default(), Observed::default());
    let _ = super::plan(now, topology, local, &observed, &mut agents);
    let id = ("bb".parse().unwrap(), Family::V4);
    if agents.state(&id).is_some() {
        agents.drive(now, &id, state);
    }
    (super::plan(now, topology, local, &observed, &mut agents), agents)
}

fn route<'a>(plan: &'a Plan, dst: &str) -> &'a kernel_state::PeerRoute {
    plan.kernel.routes.values().find(|route| route.dst == net(dst)).unwrap()
}

#[test]
fn an_unproven_neighbour_is_reached_through_the_tunnel_and_probed() {
    let mut agents = PathAgents::default();
    let plan = super::plan(Instant::now(), &topology(DUAL), &local(), &Observed::default(), &mut agents);
    assert_eq!(route(&plan, "10.244.2.0/24").via, RouteVia::Tunnel);
    let target = &agents.targets().peers[&("bb".parse().unwrap(), Family::V4)];
    assert_eq!((target.overlay, target.next_hop, target.port), (ip("10.244.2.0"), ip("192.168.1.2"), 51821));
    assert_eq!(plan.kernel.probes.len(), 1, "the other site is not probed");
    assert!(plan.kernel.firewall.direct.is_empty());
}

#[test]
fn what_an_eligible_neighbour_sends_direct_is_accepted_before_it_is_sent_to() {
    let plan = plan(&topology(DUAL), &local(), &Observed::default());
    let accepted: Vec<IpNet> = plan.kernel.firewall.accepted.iter().map(|source| source.prefix).collect();
    assert_eq!(accepted, [net("10.244.2.0/24")], "IPv6 has no direct link here, and west is far");
}

#[test]
fn a_proven_neighbour_is_direct_per_family_and_with_the_same_mtu() {
    let (plan, _) = plan_while(DirectState::Direct, &topology(DUAL), &local());
    let direct = route(&plan, "10.244.2.0/24");
    let via = RouteVia::Neighbour { via: ip("192.168.1.2"), dev: "eth0".parse().unwrap() };
    assert_eq!((&direct.via, direct.mtu, direct.src), (&via, Some(1420), Some(ip("10.244.1.0"))));
    assert_eq!(route(&plan, "fd42:244:0:2::/64").via, RouteVia::Tunnel);
    let hops: Vec<IpAddr> = plan.kernel.firewall.direct.iter().map(|direct| direct.via).collect();
    assert_eq!(hops, [ip("192.168.1.2")]);
    assert!(plan.tunnel.peers.values().any(|peer| peer.name == "nodes/bb"), "the tunnel stays ready");
}

#[test]
fn any_of_the_published_addresses_leads_direct() {
    let (mut topology, mut local) = (topology(DUAL), local());
    local.underlay.get_mut(&Family::V4).unwrap().addresses.push(net("10.0.0.1/16"));
    let bb = Arc::make_mut(topology.members.get_mut(&PeerId::Node("bb".parse().unwrap())).unwrap());
    bb.addresses = vec![net("172.16.0.2/24"), net("10.0.0.2/16")];
    bb.endpoints = vec!["172.16.0.2:51820".parse().unwrap(), "10.0.0.2:51820".parse().unwrap()];
    let (plan, agents) = plan_while(DirectState::Direct, &topology, &local);
    assert_eq!(agents.targets().peers[&("bb".parse().unwrap(), Family::V4)].next_hop, ip("10.0.0.2"));
    let via = RouteVia::Neighbour { via: ip("10.0.0.2"), dev: "eth0".parse().unwrap() };
    assert_eq!(route(&plan, "10.244.2.0/24").via, via);
    // And the tunnel calls it there first.
    let peer = plan.tunnel.peers.values().find(|peer| peer.name == "nodes/bb").unwrap();
    assert_eq!(peer.candidates, ["10.0.0.2:51820".parse().unwrap(), "172.16.0.2:51820".parse().unwrap()]);
}

#[test]
fn without_direct_routing_nothing_is_sent_accepted_or_probed() {
    let config = DUAL.replace('}', r#", "Backend": {"Type": "wireguard", "DirectRouting": false}}"#);
    let (plan, agents) = plan_while(DirectState::Direct, &topology(&config), &local());
    assert_eq!(route(&plan, "10.244.2.0/24").via, RouteVia::Tunnel);
    assert!(plan.kernel.firewall.accepted.is_empty() && plan.kernel.firewall.direct.is_empty());
    assert!(agents.targets().peers.is_empty());
}

#[test]
fn every_prefix_has_one_route_and_the_floor_lies_under_all() {
    let plan = plan(&topology(DUAL), &local(), &Observed::default());
    let mut destinations: Vec<IpNet> = plan.kernel.routes.values().map(|route| route.dst).collect();
    destinations.sort();
    assert_eq!(
        destinations,
        [net("10.244.2.0/24"), net("10.244.3.0/24"), net("fd42:244:0:2::/64"), net("fd42:244:0:3::/64")]
    );
    assert_eq!(plan.kernel.floor.networks, [net("10.244.0.0/16"), net("fd42:244::/48")]);
}

#[test]
fn a_silent_neighbour_goes_nowhere_but_the_tunnel() {
    let (plan, _) = plan_while(DirectState::Silent, &topology(DUAL), &local());
    assert_eq!(route(&plan, "10.244.2.0/24").via, RouteVia::Tunnel);
    let chosen = &plan.paths[&(PeerId::Node("bb".parse().unwrap()), Family::V4)];
    assert_eq!((chosen.reach, &chosen.reason), (Reach::Unreachable, &Reason::NoAnswer));
}

#[test]
fn a_member_without_a_key_is_unreachable_with_its_reason() {
    let mut topology = topology(DUAL);
    let member = Arc::make_mut(topology.members.get_mut(&PeerId::Node("cc".parse().unwrap())).unwrap());
    member.keys.clear();
    member.unusable = Some("nodes/cc is missing".to_owned());
    let plan = plan(&topology, &local(), &Observed::default());
    assert_eq!(route(&plan, "10.244.3.0/24").via, RouteVia::Unreachable);
    assert_eq!(
        plan.paths[&(PeerId::Node("cc".parse().unwrap()), Family::V4)].reason.to_string(),
        "nodes/cc is missing"
    );
    assert!(plan.tunnel.peers.values().all(|peer| peer.name != "nodes/cc"));
}

#[test]
fn two_nodes_that_only_call_out_cannot_reach_each_other() {
    let mut topology = topology(DUAL);
    Arc::make_mut(topology.members.get_mut(&PeerId::Node("cc".parse().unwrap())).unwrap()).endpoints.clear();
    let local = Local { has_endpoint: false, ..local() };
    let plan = plan(&topology, &local, &Observed::default());
    assert_eq!(route(&plan, "10.244.3.0/24").via, RouteVia::Unreachable);
    let bb = plan.tunnel.peers.values().find(|peer| peer.name == "nodes/bb").unwrap();
    assert!(bb.call_out, "the one that can be called is called at once");
    assert_eq!(bb.keepalive, Some(Duration::from_secs(25)));
}

#[test]
fn a_network_that_covers_the_underlay_programs_nothing() {
    let config = DUAL.replace("10.244.0.0/16", "192.168.0.0/16");
    let plan = plan(&topology(&config), &local(), &Observed::default());
    assert_eq!(plan.problems[0].code.as_str(), "covers_underlay");
    assert!(plan.kernel.routes.is_empty() && plan.tunnel.peers.is_empty());
    // Packets to the other network leave by no default route.
    assert_eq!(plan.kernel.floor, Floor { networks: vec![net("fd42:244::/48")], outside: Vec::new() });
    assert_eq!(plan.kernel.firewall.networks, [net("fd42:244::/48")]);
}

#[test]
fn what_is_in_force_stays_when_the_underlay_moves_into_it() {
    let mut local = local();
    local.protected.push((ip("10.244.9.9"), "this node's address on eth1".to_owned()));
    let networks = vec![net("10.244.0.0/16"), net("fd42:244::/48")];
    let programmed = Floor { networks, outside: Vec::new() };
    let observed = Observed { programmed, ..Observed::default() };
    let plan = plan(&topology(DUAL), &local, &observed);
    assert_eq!(plan.problems[0].code.as_str(), "covers_underlay");
    assert_eq!(plan.kernel.routes.len(), 4);
}

#[test]
fn a_change_of_other_networks_takes_nothing_away_from_a_node_whose_underlay_has_moved() {
    let mut local = local();
    local.protected.push((ip("10.244.9.9"), "this node's address on eth1".to_owned()));
    // One has gone since, one has come.
    let networks = vec![net("10.99.0.0/16"), net("10.244.0.0/16")];
    let observed = Observed { programmed: Floor { networks, outside: Vec::new() }, ..Observed::default() };
    let plan = plan(&topology(DUAL), &local, &observed);
    assert_eq!(plan.problems[0].code.as_str(), "covers_underlay");
    assert_eq!(plan.kernel.routes.len(), 4);
}

#[test]
fn the_floor_and_the_guard_outlive_a_config_that_cannot_be_carried() {
    let networks = vec![net("10.244.0.0/16"), net("fd42:244::/48")];
    let floor = Floor { networks, outside: vec![net("10.9.0.2/32")] };
    let observed = Observed { programmed: floor.clone(), ..Observed::default() };
    for gone in [None, Some(DUAL.replace("10.244.0.0/16", "192.168.0.0/16"))] {
        let mut topology = topology(DUAL);
        topology.network = gone.map(|text| NetworkConfig::parse(text.as_bytes()).unwrap());
        let plan = plan(&topology, &local(), &observed);
        assert!(plan.kernel.routes.is_empty() && plan.tunnel.peers.is_empty());
        assert_eq!(plan.kernel.floor, floor);
        assert!(plan.kernel.firewall.networks.iter().eq(floor.prefixes()));
    }
}

#[test]
fn an_outside_peer_that_covers_etcd_is_refused_alone() {
    let mut topology = topology(DUAL);
    let outside = |nets: &[&str], n: u8| {
        Arc::new(ExternalPeer {
            public_key: key(n),
            preshared_key: None,
            allowed_ips: nets.iter().map(|text| net(text)).collect(),
            endpoint: None,
            persistent_keepalive: None,
            site: None,
        })
    };
    topology.outside.insert("bad".parse().unwrap(), outside(&["203.0.113.0/24"], 21));
    topology.outside.insert("good".parse().unwrap(), outside(&["10.9.0.2/32"], 22));
    let mut local = local();
    local.protected.push((ip("203.0.113.5"), "etcd".to_owned()));
    let plan = plan(&topology, &local, &Observed::default());
    assert_eq!(plan.problems.len(), 1);
    assert!(plan.problems[0].cause.contains("peers/bad"), "{}", plan.problems[0].cause);
    assert_eq!(route(&plan, "10.9.0.2/32").via, RouteVia::Tunnel);
    assert!(plan.kernel.routes.values().all(|route| route.dst != net("203.0.113.0/24")));
    assert!(plan.kernel.firewall.networks.contains(&net("10.9.0.2/32")));
    assert_eq!(plan.kernel.floor.outside, [net("10.9.0.2/32")]);
}

#[test]
fn mtu_follows_the_interface_or_the_config() {
    let small = Local {
        underlay: BTreeMap::from([(Family::V4, UnderlayLink { mtu: 1400, ..local().underlay[&Family::V4].clone() })]),
        ..local()
    };
    assert_eq!(plan(&topology(DUAL), &local(), &Observed::default()).mtu, 1420);
    assert_eq!(plan(&topology(DUAL), &small, &Observed::default()).mtu, 1320);
    let config = DUAL.replace('}', r#", "Backend": {"Type": "wireguard", "MTU": 1300}}"#);
    assert_eq!(plan(&topology(&config), &local(), &Observed::default()).mtu, 1300);
}

#[test]
fn a_lower_path_mtu_lowers_that_peers_routes_only() {
    let (topology, local, observed) = (topology(DUAL), local(), Observed::default());
    let (now, mut agents, mut planner) = (Instant::now(), PathAgents::default(), Planner::default());
    planner.plan(now, &topology, &local, &observed, &mut agents);
    agents.on_mtu(|peer| (peer.to_string() == "nodes/cc").then_some(1340));
    let plan = planner.plan(now, &topology, &local, &observed, &mut agents);
    assert_eq!(route(&plan, "10.244.3.0/24").mtu, Some(1340));
    assert_eq!(route(&plan, "10.244.2.0/24").mtu, None);
}

#[test]
fn a_node_without_a_subnet_sends_nothing_into_the_mesh() {
    let mut topology = topology(DUAL);
    topology.own_subnets.clear();
    let plan = plan(&topology, &local(), &Observed::default());
    assert!(plan.kernel.routes.is_empty());
    assert_eq!(plan.kernel.floor.networks.len(), 2, "the floor stands");
}

#[test]
fn where_a_peer_was_heard_from_is_tried_first_and_never_inside_of_the_mesh() {
    let mut topology = topology(DUAL);
    Arc::make_mut(topology.members.get_mut(&PeerId::Node("cc".parse().unwrap())).unwrap()).endpoints.clear();
    let candidates = |roamed: &[(&str, &str)]| -> Vec<Vec<String>> {
        let roamed: BTreeMap<_, _> =
            roamed.iter().map(|(name, at)| ((*name).to_owned(), at.parse().unwrap())).collect();
        let plan = plan(&topology, &local(), &Observed { roamed: roamed.into(), ..Observed::default() });
        let peers = plan.tunnel.peers.values().cloned();
        peers.map(|peer| peer.candidates.iter().map(ToString::to_string).collect()).collect()
    };
    let known = candidates(&[])[0].clone();
    let roamed = candidates(&[("nodes/bb", "203.0.113.7:9"), ("nodes/cc", "203.0.113.8:9")]);
    assert_eq!(roamed, [[vec!["203.0.113.7:9".to_owned()], known.clone()].concat(), vec!["203.0.113.8:9".to_owned()]]);
    assert_eq!(candidates(&[("nodes/bb", &known[0]), ("nodes/cc", "10.244.9.9:9")]), [known, Vec::new()]);
}

/// What changes for a plan; small numbers, so that things meet.
#[derive(Debug, Clone)]
enum Step {
    /// Node `n` has these subnets, at this site, with an endpoint or without, and can be spoken to or not.
    Member {
        n: u8,
        subnets: Vec<u8>,
        east: bool,
        called: bool,
        usable: bool,
    },
    Gone(u8),
    Path {
        n: u8,
        state: u8,
    },
    Mtu {
        name: String,
        mtu: Option<u16>,
    },
    Outside {
        n: u8,
        there: bool,
    },
    OwnSubnet(bool),
    HasEndpoint(bool),
    DirectRouting(bool),
    Interface(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let n = 10u8..16;
    prop_oneof![
        6 => (n.clone(), proptest::collection::vec(2u8..12, 0..3), any::<bool>(), any::<bool>(), any::<bool>())
            .prop_map(|(n, subnets, east, called, usable)| Step::Member { n, subnets, east, called, usable }),
        2 => n.clone().prop_map(Step::Gone),
        3 => (n.clone(), 0u8..3).prop_map(|(n, state)| Step::Path { n, state }),
        2 => (n, any::<bool>(), proptest::option::of(1280u16..1430))
            .prop_map(|(n, node, mtu)| Step::Mtu { name: if node { format!("nodes/n{n}") } else { format!("peers/p{}", n - 10) }, mtu }),
        1 => (0u8..3, any::<bool>()).prop_map(|(n, there)| Step::Outside { n, there }),
        1 => any::<bool>().prop_map(Step::OwnSubnet),
        1 => any::<bool>().prop_map(Step::HasEndpoint),
        1 => any::<bool>().prop_map(Step::DirectRouting),
        1 => (1300u32..1500).prop_map(Step::Interface),
    ]
}

fn take(step: &Step, topology: &mut Topology, local: &mut Local, agents: &mut PathAgents, now: &mut Instant) {
    let node = |n: &u8| -> NodeId { format!("n{n}").parse().unwrap() };
    match step {
        Step::Member { n, subnets, east, called, usable } => {
            let mut member = member(&format!("name{n}"), if *east { "east" } else { "west" }, *n);
            let key =
                |third: &u8| -> SubnetKey { format!("10.244.{third}.0-24&fd42:244:0:{third}::-64").parse().unwrap() };
            // A subnet has one owner.
            let taken = |key: &SubnetKey| {
                topology
                    .members
                    .iter()
                    .any(|(owner, other)| *owner != PeerId::Node(node(n)) && other.subnets.contains(key))
            };
            member.subnets = subnets.iter().map(key).filter(|key| !taken(key)).collect();
            member.subnets.dedup();
            if !called {
                member.endpoints.clear();
            }
            if !usable {
                member.keys.clear();
                member.unusable = Some("no record".to_owned());
            }
            topology.members.insert(PeerId::Node(node(n)), Arc::new(member));
        }
        Step::Gone(n) => drop(topology.members.remove(&PeerId::Node(node(n)))),
        Step::Path { n, state } => {
            let state = match state {
                0 => DirectState::Direct,
                1 => DirectState::Silent,
                _ => DirectState::Tunnel(NotDirect::Failed),
            };
            let id = (node(n), Family::V4);
            // It fell silent: only an echo ends that here.
            if agents.state(&id).is_some_and(|now| now != DirectState::Silent) {
                *now = agents.drive(*now, &id, state);
            }
        }
        Step::Mtu { name, mtu } => agents.on_mtu(|peer| mtu.filter(|_| peer.to_string() == *name)),
        Step::Outside { n, there } => {
            let outside = Arc::new(ExternalPeer {
                public_key: key(100 + n),
                preshared_key: None,
                allowed_ips: vec![net(&format!("10.9.{n}.0/24"))],
                endpoint: None,
                persistent_keepalive: None,
                site: None,
            });
            topology.outside.set(format!("p{n}").parse().unwrap(), there.then_some(outside));
        }
        Step::OwnSubnet(there) => {
            let own = "10.244.1.0-24&fd42:244:0:1::-64".parse().unwrap();
            topology.own_subnets = if *there { vec![own] } else { Vec::new() };
        }
        Step::HasEndpoint(there) => local.has_endpoint = *there,
        Step::DirectRouting(on) => topology.network.as_mut().unwrap().backend.direct_routing = *on,
        Step::Interface(mtu) => local.underlay.get_mut(&Family::V4).unwrap().mtu = *mtu,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// A plan that is kept up to date says what one made from nothing says.
    #[test]
    fn what_was_planned_before_makes_no_difference(
        rounds in proptest::collection::vec(proptest::collection::vec(step(), 1..5), 1..12),
    ) {
        let (mut topology, mut local, observed) = (topology(DUAL), local(), Observed::default());
        let (mut now, mut agents, mut planner) = (Instant::now(), PathAgents::default(), Planner::default());
        for steps in rounds {
            for step in &steps {
                take(step, &mut topology, &mut local, &mut agents, &mut now);
            }
            let kept = planner.plan(now, &topology, &local, &observed, &mut agents);
            let (mut same, revision) = (agents.clone(), agents.revision());
            let fresh = super::plan(now, &topology, &local, &observed, &mut same);
            prop_assert_eq!(same.revision(), revision, "the candidates are not those from nothing");
            prop_assert_eq!(&kept.kernel, &fresh.kernel, "after {:?}", steps);
            prop_assert_eq!(&kept.tunnel, &fresh.tunnel);
            prop_assert_eq!(&kept.paths, &fresh.paths);
            prop_assert_eq!(&kept.owners, &fresh.owners);
            prop_assert_eq!((kept.mtu, &kept.problems), (fresh.mtu, &fresh.problems));
        }
    }
}

fn vtep(address: &str, last: u8) -> Vtep {
    Vtep { address: ip(address), mac: MacAddress([2, 0, 0, 0, 0, last]) }
}

/// The mesh with an end of IPv4 tunnels at each of the nodes, and this configuration of the backend.
fn vxlan_topology(backend: &str) -> (Topology, Local) {
    let config = format!(r#"{{"Network": "10.244.0.0/16", "Backend": {backend}}}"#);
    let mut topology = topology(&config);
    topology.own_subnets = vec!["10.244.1.0-24".parse().unwrap()];
    for (id, name, site, n) in [("bb", "b", "east", 2), ("cc", "c", "west", 3)] {
        let subnets = vec![format!("10.244.{n}.0-24").parse().unwrap()];
        let vteps = vec![vtep(&format!("192.0.2.{n}"), n)];
        let peer = NodePeer { subnets, vteps, ..member(name, site, n) };
        topology.members.insert(PeerId::Node(id.parse().unwrap()), Arc::new(peer));
    }
    let local = Local { vteps: [(Family::V4, vtep("192.0.2.1", 1))].into(), ..local() };
    (topology, local)
}

#[test]
fn vxlan_has_a_device_with_every_peers_end_and_routes_to_it() {
    let (topology, local) = vxlan_topology(r#"{"Type": "vxlan", "VNI": 7}"#);
    let plan = plan(&topology, &local, &Observed::default());
    let dev: InterfaceName = "flannel.7".parse().unwrap();
    let [device] = plan.kernel.vxlan.as_slice() else { panic!("{:?}", plan.kernel.vxlan) };
    assert_eq!((&device.name, device.vni, device.port, device.mtu), (&dev, 7, 8472, 1450));
    assert_eq!(device.underlay.as_str(), "eth0");
    let ends: Vec<_> = device.peers.iter().map(|peer| (peer.next_hop, peer.vtep, peer.prefixes.clone())).collect();
    let end = |n: u8| {
        (ip(&format!("10.244.{n}.0")), vtep(&format!("192.0.2.{n}"), n), vec![net(&format!("10.244.{n}.0/24"))])
    };
    assert_eq!(ends, [end(2), end(3)]);
    for n in [2, 3] {
        let dst = net(&format!("10.244.{n}.0/24"));
        let route = plan.kernel.routes.get(&dst).unwrap();
        let overlay = ip(&format!("10.244.{n}.0"));
        assert_eq!(route.via, RouteVia::Vtep { via: overlay, dev: dev.clone() });
        let direct = kernel_state::PrefixVia { prefix: dst, dev: dev.clone(), via: overlay };
        assert!(plan.kernel.firewall.direct.contains(&direct));
        assert!(plan.kernel.firewall.accepted.contains(&kernel_state::PrefixOn { prefix: dst, dev: dev.clone() }));
    }
    assert_eq!((plan.mtu, plan.tunnel.mtu), (1450, 1420), "external peers take 80 bytes");
}

#[test]
fn two_ends_with_one_hardware_address_are_one() {
    let (mut topology, local) = vxlan_topology(r#"{"Type": "vxlan"}"#);
    let (first, second) = (PeerId::Node("bb".parse().unwrap()), PeerId::Node("cc".parse().unwrap()));
    let claimed = |topology: &mut Topology, peer: &PeerId, mac| {
        let mut member = topology.members.get(peer).unwrap().as_ref().clone();
        member.vteps[0].mac = mac;
        topology.members.insert(peer.clone(), Arc::new(member));
    };
    let ends = |topology: &Topology| {
        let plan = plan(topology, &local, &Observed::default());
        plan.kernel.vxlan[0].peers.iter().map(|peer| peer.vtep.address.to_string()).collect::<Vec<_>>()
    };
    // The address that follows from the second one's id is the second one's, in either order.
    let own = crate::vxlan::mac(&"cc".parse().unwrap(), Family::V4);
    claimed(&mut topology, &first, own);
    claimed(&mut topology, &second, own);
    assert_eq!(ends(&topology), ["192.0.2.3"]);
    // And this node's own is no peer's.
    claimed(&mut topology, &second, MacAddress([2, 0, 0, 0, 0, 1]));
    assert_eq!(ends(&topology), ["192.0.2.2"]);
}

#[test]
fn without_vxlan_there_is_no_device() {
    for backend in [r#"{"Type": "wireguard"}"#, r#"{"Type": "host-gw"}"#] {
        let (topology, local) = vxlan_topology(backend);
        let plan = plan(&topology, &local, &Observed::default());
        assert_eq!(plan.kernel.vxlan, []);
        assert!(plan.kernel.routes.values().all(|route| !matches!(route.via, RouteVia::Vtep { .. })));
    }
}

#[test]
fn host_gw_has_no_route_into_the_tunnel() {
    let (topology, local) = vxlan_topology(r#"{"Type": "host-gw"}"#);
    let (plan, _) = plan_while(DirectState::Direct, &topology, &local);
    let via = |dst: &str| plan.kernel.routes.get(&net(dst)).unwrap().via.clone();
    assert_eq!(via("10.244.2.0/24"), RouteVia::Neighbour { via: ip("192.168.1.2"), dev: "eth0".parse().unwrap() });
    assert_eq!(via("10.244.3.0/24"), RouteVia::Unreachable);
    assert_eq!((plan.mtu, plan.tunnel.mtu), (1500, 1420));
}
