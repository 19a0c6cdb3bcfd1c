use std::collections::{BTreeMap, BTreeSet};

use mesh::kernel_state::{Firewall, Floor, Forwarding, PeerRoute, ProbeRoute, Tun};
use netfilter::ListedChain;
use proptest::prelude::*;

use super::*;
use crate::{
    netlink::ObservedTun,
    nft::{NftRule, ObservedSet, ObservedTable},
};

fn options() -> Options {
    Options::new(InterfaceName::new("meshd0").unwrap(), "/nonexistent".into())
}

/// What a kernel holds that did all that it was told. Naive on purpose: a map, one step after the other.
fn applied(mut observed: ObservedKernel, changes: &[KernelChange]) -> ObservedKernel {
    for change in changes {
        match change {
            KernelChange::RouteAdd(r) => {
                assert!(!observed.routes.iter().any(|o| o.key() == r.key()), "{r} is there");
                observed.routes.push(r.clone());
            }
            KernelChange::RouteReplace(r) => {
                assert!(observed.routes.iter().any(|o| o.key() == r.key()), "no {r}");
                observed.routes.retain(|o| o.key() != r.key());
                observed.routes.push(r.clone());
            }
            KernelChange::RouteRemove(r) => {
                let at = observed.routes.iter().position(|o| o == r).expect("a route");
                observed.routes.remove(at);
            }
            KernelChange::RuleAdd(r) => observed.rules.push(r.clone()),
            KernelChange::RuleRemove(r) => {
                let at = observed.rules.iter().position(|o| o == r).expect("a rule");
                observed.rules.remove(at);
            }
            KernelChange::AddressAdd { address, .. } => assert!(observed.addresses.insert(*address)),
            KernelChange::AddressRemove { address, .. } => assert!(observed.addresses.remove(address)),
            KernelChange::Mtu { mtu, .. } => observed.tun.as_mut().unwrap().mtu = *mtu,
            KernelChange::TxQueueLen { packets, .. } => {
                observed.tun.as_mut().unwrap().txqueuelen = *packets;
            }
            KernelChange::Up { up, .. } => observed.tun.as_mut().unwrap().up = *up,
            KernelChange::FirewallBefore(_) | KernelChange::FirewallAfter(_) => {}
            KernelChange::Sysctl(s) => {
                observed.sysctls.values.insert(s.key.clone(), s.value.clone());
            }
            KernelChange::Foreign(_) | KernelChange::Vxlan(_) => {}
        }
    }
    observed
}

/// The table as `nft` would list it.
fn listed(table: &crate::nft::NftTable) -> ObservedTable {
    ObservedTable {
        sets: table
            .sets
            .iter()
            .map(|(name, set)| {
                let seen = ObservedSet { kind: Some(set.kind), elements: Some(set.elements.clone()) };
                (name.to_string(), seen)
            })
            .collect(),
        chains: table
            .chains
            .iter()
            .map(|(name, chain)| {
                let seen = ListedChain {
                    base: chain.base.as_ref().map(|b| (b.kind.to_owned(), b.hook.to_owned(), b.priority)),
                    policy_drop: false,
                    comments: chain.rules.iter().map(|r: &NftRule| Some(r.comment())).collect(),
                };
                (name.to_string(), seen)
            })
            .collect(),
        counters: table.counters.iter().map(|name| (name.to_string(), Default::default())).collect(),
    }
}

fn small_net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (0u8..4, 22u8..=25).prop_map(|(n, len)| IpNet::new(IpAddr::from([10, 244, n, 0]), len).unwrap().trunc()),
        (0u16..4, 62u8..=65)
            .prop_map(|(n, len)| IpNet::new(IpAddr::from([0xfd42, 0x244, 0, n, 0, 0, 0, 0]), len).unwrap().trunc()),
    ]
}

fn address_like(net: &IpNet, host: u8) -> IpAddr {
    match net {
        IpNet::V4(_) => IpAddr::from([192, 0, 2, host]),
        IpNet::V6(_) => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(host)]),
    }
}

fn any_route() -> impl Strategy<Value = PeerRoute> {
    (small_net(), 0u8..4, 1u8..4, proptest::option::of(1280u16..1400)).prop_map(|(dst, path, host, mtu)| PeerRoute {
        via: match path {
            0 => RouteVia::Tunnel,
            1 => RouteVia::Unreachable,
            n => RouteVia::Neighbour {
                via: address_like(&dst, host),
                // One of the two is not there.
                dev: InterfaceName::new(if n == 2 { "eth0" } else { "gone0" }).unwrap(),
            },
        },
        dst,
        mtu,
        src: None,
    })
}

prop_compose! {
    fn any_desired()(
        routes in prop::collection::vec(any_route(), 0..8),
        networks in prop::collection::vec(small_net(), 0..3),
        outside in prop::collection::vec(small_net(), 0..3),
        overlay in prop::collection::vec(small_net(), 0..3),
        probes in prop::collection::vec((small_net(), 1u8..4), 0..4),
        mtu in 1280u32..1500,
        up in any::<bool>(),
    ) -> Desired {
        let eth0 = InterfaceName::new("eth0").unwrap();
        let floor = Floor { networks, outside };
        Desired {
            tun: Tun { mtu, txqueuelen: 1000, up },
            overlay: overlay.iter().map(IpNet::addr).collect(),
            firewall: Firewall { networks: floor.prefixes().copied().collect(), ..Firewall::default() },
            routes: routes.into_iter().map(|route| (route.dst, route)).collect(),
            floor,
            probes: probes
                .into_iter()
                .map(|(net, host)| ProbeRoute {
                    overlay: net.addr(),
                    via: address_like(&net, host),
                    dev: eth0.clone(),
                })
                .collect(),
            vxlan: Vec::new(),
            forwarding: Forwarding::default(),
            underlay: vec![eth0],
            underlay4: None,
            pods: Vec::new(),
            forward_accept: false,
        }
    }
}

fn bare(tun: bool) -> ObservedKernel {
    ObservedKernel {
        tun: tun.then_some(ObservedTun { index: 7, mtu: 1500, txqueuelen: 500, up: false }),
        links: BTreeMap::from([("eth0".to_owned(), 2), ("meshd0".to_owned(), 7)]),
        ..ObservedKernel::default()
    }
}

/// Where a packet to `dst` goes by `routes`: the longest prefix, then the lowest metric.
fn lookup(routes: &[KernelRoute], dst: IpAddr) -> Option<&KernelRoute> {
    routes
        .iter()
        .filter(|r| r.table == MAIN_TABLE && r.dst.contains(&dst))
        .min_by_key(|r| (std::cmp::Reverse(r.dst.prefix_len()), r.metric))
}

proptest! {
    /// From any state of ours to any other: one pass gets there, the second has nothing to do.
    #[test]
    fn one_pass_converges(from in any_desired(), to in any_desired(), tun in any::<bool>()) {
        let options = options();
        let start = bare(tun);
        let mut between = applied(start.clone(), &plan(&options, &from, &start).changes);
        between.table = Some(listed(&firewall::render(&options, &from)));
        let pass = plan(&options, &to, &between);
        let mut end = applied(between, &pass.changes);
        end.table = Some(listed(&firewall::render(&options, &to)));
        let second = plan(&options, &to, &end);
        prop_assert_eq!(&second.changes, &vec![]);
        prop_assert_eq!(&second.failures, &pass.failures);
    }

    /// At no step of a pass does a destination that the mesh has before and after fall out of it: while a prefix, of
    /// the mesh or of an external peer, is claimed on both sides, a packet to it meets a route of ours.
    #[test]
    fn no_step_leaves_the_mesh_without_a_route(from in any_desired(), to in any_desired()) {
        let options = options();
        let start = bare(true);
        let mut state = applied(start.clone(), &plan(&options, &from, &start).changes);
        let lasting: BTreeSet<IpNet> = from.floor.prefixes().copied().collect();
        for change in plan(&options, &to, &state).changes {
            state = applied(state, std::slice::from_ref(&change));
            for net in to.floor.prefixes().filter(|net| lasting.contains(net)) {
                prop_assert!(lookup(&state.routes, net.addr()).is_some(), "{change}");
            }
        }
    }

    /// The routes that stand in the end are the desired ones, by a model that knows only the desired state.
    #[test]
    fn the_end_is_what_was_desired(from in any_desired(), to in any_desired()) {
        let options = options();
        let start = bare(true);
        let between = applied(start.clone(), &plan(&options, &from, &start).changes);
        let end = applied(between.clone(), &plan(&options, &to, &between).changes);
        let mut wanted = BTreeMap::new();
        for route in to.routes.values() {
            let target = match &route.via {
                RouteVia::Tunnel => NextHop::Device { gateway: None, index: 7, onlink: false },
                RouteVia::Neighbour { via, dev } if dev.as_str() == "eth0" => {
                    NextHop::Device { gateway: Some(*via), index: 2, onlink: false }
                }
                _ => NextHop::Unreachable,
            };
            wanted.entry(route.dst).or_insert(target);
        }
        let peers: BTreeMap<IpNet, NextHop> = end
            .routes
            .iter()
            .filter(|r| r.table == MAIN_TABLE && r.metric == ROUTE_METRIC)
            .map(|r| (r.dst, r.target.clone()))
            .collect();
        prop_assert_eq!(peers, wanted);
        for (metric, claimed) in [(FLOOR_METRIC, &to.floor.networks), (OUTSIDE_FLOOR_METRIC, &to.floor.outside)] {
            let floor: BTreeSet<IpNet> =
                end.routes.iter().filter(|r| r.table == MAIN_TABLE && r.metric == metric).map(|r| r.dst).collect();
            prop_assert_eq!(floor, claimed.iter().copied().collect::<BTreeSet<_>>());
        }
    }
}

/// Firewall, floor, rules, routes; and back in reverse.
#[test]
fn order_fails_closed() {
    let options = options();
    let net: IpNet = "10.244.0.0/16".parse().unwrap();
    let dst: IpNet = "10.244.2.0/24".parse().unwrap();
    let eth0 = InterfaceName::new("eth0").unwrap();
    let full = Desired {
        tun: Tun { mtu: 1420, txqueuelen: 1000, up: true },
        overlay: vec!["10.244.1.0".parse().unwrap()],
        routes: [(dst, PeerRoute { dst, via: RouteVia::Tunnel, mtu: None, src: None })].into_iter().collect(),
        floor: Floor { networks: vec![net], outside: Vec::new() },
        probes: vec![ProbeRoute {
            overlay: "10.244.2.0".parse().unwrap(),
            via: "192.0.2.2".parse().unwrap(),
            dev: eth0.clone(),
        }],
        firewall: Firewall { networks: vec![net], ..Firewall::default() },
        vxlan: Vec::new(),
        forwarding: Forwarding { ipv4: true, ipv6: false },
        underlay: vec![eth0],
        underlay4: None,
        pods: Vec::new(),
        forward_accept: false,
    };
    let mut start = bare(true);
    start.sysctls.values.insert("net/ipv4/ip_forward".to_owned(), "0".to_owned());
    let word = |change: &KernelChange| match change {
        KernelChange::FirewallBefore(_) => "firewall",
        KernelChange::FirewallAfter(_) => "firewall shrinks",
        KernelChange::RouteAdd(r) | KernelChange::RouteRemove(r) if r.metric == FLOOR_METRIC => "floor",
        KernelChange::RouteAdd(_) | KernelChange::RouteRemove(_) => "route",
        KernelChange::RuleAdd(_) | KernelChange::RuleRemove(_) => "rule",
        KernelChange::Sysctl(_) => "sysctl",
        KernelChange::AddressAdd { .. } | KernelChange::AddressRemove { .. } => "address",
        _ => "link",
    };
    let words = |plan: &KernelPlan| plan.changes.iter().map(word).collect::<Vec<_>>();
    let up = plan(&options, &full, &start);
    assert_eq!(
        words(&up),
        ["firewall", "floor", "link", "link", "link", "address", "floor", "rule", "route", "route", "sysctl"]
    );
    let mut there = applied(start, &up.changes);
    there.table = Some(listed(&firewall::render(&options, &full)));
    let nothing = Desired {
        overlay: vec![],
        routes: CowMap::default(),
        floor: Floor::default(),
        probes: vec![],
        firewall: Firewall::default(),
        ..full
    };
    assert_eq!(
        words(&plan(&options, &nothing, &there)),
        ["route", "route", "rule", "address", "floor", "floor", "firewall shrinks"]
    );
}

proptest! {
    /// To follow a change takes the same steps, but for their order among routes, as to compare everything.
    #[test]
    fn what_differs_is_all_that_need_be_compared(from in any_desired(), to in any_desired()) {
        let options = options();
        let start = bare(true);
        let first = plan(&options, &from, &start);
        prop_assume!(first.failures.is_empty());
        let mut there = applied(start, &first.changes);
        there.table = Some(firewall::render(&options, &from).as_observed());
        let whole = plan(&options, &to, &there);
        let (before, after) = differing(&from, &to);
        let remembered = ObservedKernel { routes: routes_after(&options, &before, &there), ..there.clone() };
        let followed = plan(&options, &after, &remembered);
        prop_assert_eq!(&followed.failures, &whole.failures);
        prop_assert_eq!(followed.changes, whole.changes);
    }
}
