//! The steps from observed to desired state: pure, in an order that fails closed.
//!
//! ```text
//! 1 nftables   rules that the new routes need
//! 2 floor      `unreachable` under everything
//! 3 TUN        MTU, queue, up, addresses
//! 4 probes     `unreachable` default, rule, routes
//! 5 routes     VXLAN devices with their entries; then routes, added and replaced
//! 6 sysctls    router advertisements, reverse path filter, then forwarding
//! 7 foreign    tagged rules in other programs' chains
//! 8 withdrawn  routes, probe routes, rules, addresses, floor, and last their nftables rules
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use cow_map::CowMap;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh::{
    interface::InterfaceName,
    kernel_state::{Desired, Floor, RouteVia},
};

use super::{
    Options,
    change::KernelChange,
    failure::{Failure, FailureCause},
    firewall, foreign,
    observed::ObservedKernel,
    route::{KernelRoute, KernelRule, NextHop},
    sysctl::{self, Setting},
    vxlan,
};

/// The metric of every route to a peer. Below the kernel's 256 and 1024 for IPv6, and unlikely to be another's: with
/// destination and table it is the identity of a route.
pub(crate) const ROUTE_METRIC: u32 = 158;

/// The metric of the networks' fallback routes and of the probe table's `unreachable` default: behind any other route.
pub(crate) const FLOOR_METRIC: u32 = 4_000_000_158;

/// The metric of the fallback routes of external peers' prefixes.
pub(crate) const OUTSIDE_FLOOR_METRIC: u32 = 4_000_000_159;

/// The main table's number.
pub(crate) const MAIN_TABLE: u32 = 254;

/// The steps of one pass, and its failures.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KernelPlan {
    /// In order.
    pub changes: Vec<KernelChange>,
    /// Changes that cannot be made, and why.
    pub failures: Vec<Failure>,
}

/// Compares.
pub fn plan(options: &Options, desired: &Desired, observed: &ObservedKernel) -> KernelPlan {
    let mut plan = KernelPlan::default();
    let mut withdrawn = Vec::new();
    let diff = firewall::render(options, desired).diff(&options.table_name, observed.table.as_ref());
    if !diff.before.is_empty() {
        plan.changes.push(KernelChange::FirewallBefore(diff.before));
    }

    let routes = wanted_routes(options, desired, observed, &mut plan.failures);
    let seen = by_key(&observed.routes);

    routes_of(&routes.floor, &seen, &mut plan.changes);
    settings_of(sysctl::plan_underlay(desired, &observed.sysctls), &mut plan.changes);
    tun(desired, observed, &mut plan, &mut withdrawn);
    routes_of(&routes.probe_floor, &seen, &mut plan.changes);
    let rules = rules(options, desired, observed, &mut plan.changes);
    routes_of(&routes.probes, &seen, &mut plan.changes);
    let (vxlan, unused) = vxlan::plan(desired, &observed.vxlan);
    plan.changes.extend(vxlan.into_iter().map(KernelChange::Vxlan));
    routes_of(&routes.peers, &seen, &mut plan.changes);
    settings_of(sysctl::plan(options, desired, &observed.sysctls, &mut plan.failures), &mut plan.changes);
    let edits = foreign::plan(options, desired, &observed.foreign, &mut plan.failures);
    plan.changes.extend(edits.into_iter().map(KernelChange::Foreign));

    withdrawn.extend(unused.into_iter().map(KernelChange::Vxlan));
    plan.changes.append(&mut withdraw(&routes, &seen, rules, withdrawn));
    if !diff.after.is_empty() {
        plan.changes.push(KernelChange::FirewallAfter(diff.after));
    }
    plan
}

/// The steps that add the fallback routes of `floor` where ours are these routes, and remove those of external peers'
/// prefixes that hold one of the addresses that must stay reachable.
pub(super) fn floor(floor: &Floor, protected: &[IpAddr], routes: &[KernelRoute]) -> Vec<KernelChange> {
    let mut changes = Vec::new();
    routes_of(&floor_routes(floor), &by_key(routes), &mut changes);
    let covers = |route: &&KernelRoute| protected.iter().any(|address| route.dst.contains(address));
    let removed = routes.iter().filter(|route| route.metric == OUTSIDE_FLOOR_METRIC).filter(covers);
    changes.extend(removed.cloned().map(KernelChange::RouteRemove));
    changes
}

/// Whether this is a fallback route.
pub(super) fn is_floor(route: &KernelRoute) -> bool {
    matches!(route.metric, FLOOR_METRIC | OUTSIDE_FLOOR_METRIC)
}

/// The route difference of two desired states: `before` and `desired` without their common routes.
pub(super) fn differing(before: &Desired, desired: &Desired) -> (Desired, Desired) {
    let changed = desired.routes.changes(&before.routes);
    let only = |of: &Desired| Desired {
        routes: changed.iter().filter_map(|dst| Some((**dst, of.routes.get(*dst)?.clone()))).collect(),
        ..Desired { routes: CowMap::default(), ..of.clone() }
    };
    (only(before), only(desired))
}

/// The routes that a pass over `desired` leaves behind when nothing fails.
pub(super) fn routes_after(options: &Options, desired: &Desired, observed: &ObservedKernel) -> Vec<KernelRoute> {
    let WantedRoutes { floor, probe_floor, probes, peers, .. } =
        wanted_routes(options, desired, observed, &mut Vec::new());
    [floor, probe_floor, probes, peers].into_iter().flatten().collect()
}

/// Routes by the step that makes them.
#[derive(Default)]
struct WantedRoutes {
    floor: Vec<KernelRoute>,
    probe_floor: Vec<KernelRoute>,
    probes: Vec<KernelRoute>,
    peers: Vec<KernelRoute>,
    /// Keys of routes that cannot be set now: existing routes with these keys stay.
    held: BTreeSet<(IpNet, u32, u32)>,
}

fn wanted_routes(
    options: &Options,
    desired: &Desired,
    observed: &ObservedKernel,
    failures: &mut Vec<Failure>,
) -> WantedRoutes {
    let mut wanted = WantedRoutes { floor: floor_routes(&desired.floor), ..WantedRoutes::default() };
    for ipv4 in families(desired) {
        wanted.probe_floor.push(unreachable(default_of(ipv4), options.probe_table));
    }
    let mut taken = BTreeSet::new();
    for probe in &desired.probes {
        let dst = IpNet::from(probe.overlay);
        match direct(dst, probe.via, &probe.dev, observed, false) {
            _ if !taken.insert(dst) => {
                failures.push(Failure::new(format!("probe route to {dst}"), FailureCause::Twice))
            }
            Ok(target) => wanted.probes.push(KernelRoute {
                dst,
                table: options.probe_table,
                metric: ROUTE_METRIC,
                target,
                mtu: None,
                // The probe's socket is bound to the overlay address itself.
                src: None,
            }),
            Err(problem) => failures.push(Failure::new(format!("probe route to {dst}"), problem)),
        }
    }
    peer_routes(options, desired, observed, &mut wanted, failures);
    wanted
}

fn peer_routes(
    options: &Options,
    desired: &Desired,
    observed: &ObservedKernel,
    wanted: &mut WantedRoutes,
    failures: &mut Vec<Failure>,
) {
    let mut want_tun = false;
    for (dst, route) in desired.routes.iter() {
        let dst = dst.trunc();
        let target = match (&route.via, &observed.tun) {
            (RouteVia::Unreachable, _) => Ok(NextHop::Unreachable),
            (RouteVia::Tunnel, Some(tun)) => Ok(NextHop::Device { gateway: None, index: tun.index, onlink: false }),
            (RouteVia::Neighbour { via, dev }, Some(_)) => direct(dst, *via, dev, observed, false),
            (RouteVia::Vtep { via, dev }, Some(_)) => direct(dst, *via, dev, observed, true),
            // Their source address is on the TUN device, whose failure is reported once.
            (RouteVia::Tunnel | RouteVia::Neighbour { .. } | RouteVia::Vtep { .. }, None) => {
                want_tun = true;
                wanted.held.insert((dst, MAIN_TABLE, ROUTE_METRIC));
                continue;
            }
        };
        match target {
            Ok(target) => {
                let ends = target == NextHop::Unreachable;
                wanted.peers.push(KernelRoute {
                    dst,
                    table: MAIN_TABLE,
                    metric: ROUTE_METRIC,
                    target,
                    mtu: route.mtu.filter(|_| !ends).map(u32::from),
                    src: route.src.filter(|_| !ends),
                });
            }
            // Fail closed: an existing route may lead to the wrong place.
            Err(problem) => {
                failures.push(Failure::new(format!("route to {dst}"), problem));
                wanted.peers.push(KernelRoute { metric: ROUTE_METRIC, ..unreachable(dst, MAIN_TABLE) });
            }
        }
    }
    if observed.tun.is_none() && (want_tun || !desired.overlay.is_empty()) {
        failures.push(Failure::new(format!("device {}", options.tun), FailureCause::NoTun));
    }
}

fn floor_routes(floor: &Floor) -> Vec<KernelRoute> {
    let of = |prefixes: &[IpNet], metric| {
        let prefixes: BTreeSet<IpNet> = prefixes.iter().map(IpNet::trunc).collect();
        prefixes.into_iter().map(move |dst| KernelRoute { metric, ..unreachable(dst, MAIN_TABLE) })
    };
    of(&floor.networks, FLOOR_METRIC).chain(of(&floor.outside, OUTSIDE_FLOOR_METRIC)).collect()
}

fn by_key(routes: &[KernelRoute]) -> BTreeMap<(IpNet, u32, u32), Vec<&KernelRoute>> {
    let mut by_key: BTreeMap<_, Vec<&KernelRoute>> = BTreeMap::new();
    for route in routes {
        by_key.entry(route.key()).or_default().push(route);
    }
    by_key
}

fn direct(
    dst: IpNet,
    via: IpAddr,
    dev: &InterfaceName,
    observed: &ObservedKernel,
    onlink: bool,
) -> Result<NextHop, FailureCause> {
    if via.is_ipv4() != matches!(dst, IpNet::V4(_)) {
        return Err(FailureCause::OtherFamily { via });
    }
    let Some(index) = observed.links.get(dev.as_str()) else {
        return Err(FailureCause::NoDevice { dev: dev.clone() });
    };
    Ok(NextHop::Device { gateway: Some(via), index: *index, onlink })
}

/// Adds and replaces. A key of ours that is there is replaced, one that is not is added exclusively: so a route of
/// someone else's with the same key is never overwritten.
fn routes_of(
    wanted: &[KernelRoute],
    seen: &BTreeMap<(IpNet, u32, u32), Vec<&KernelRoute>>,
    changes: &mut Vec<KernelChange>,
) {
    for route in wanted {
        match seen.get(&route.key()).map(Vec::as_slice) {
            None | Some([]) => changes.push(KernelChange::RouteAdd(route.clone())),
            Some([one]) if *one == route => {}
            Some([_]) => changes.push(KernelChange::RouteReplace(route.clone())),
            // Siblings under one key, possible for IPv6 only: someone appended with our protocol number.
            Some(several) => {
                for extra in several.iter().filter(|r| **r != route) {
                    changes.push(KernelChange::RouteRemove((*extra).clone()));
                }
                if !several.contains(&route) {
                    changes.push(KernelChange::RouteAdd(route.clone()));
                }
            }
        }
    }
}

fn settings_of(settings: impl IntoIterator<Item = Setting>, changes: &mut Vec<KernelChange>) {
    changes.extend(settings.into_iter().map(KernelChange::Sysctl));
}

fn tun(desired: &Desired, observed: &ObservedKernel, plan: &mut KernelPlan, withdrawn: &mut Vec<KernelChange>) {
    let Some(tun) = &observed.tun else {
        return;
    };
    let index = tun.index;
    if tun.mtu != desired.tun.mtu {
        plan.changes.push(KernelChange::Mtu { index, mtu: desired.tun.mtu });
    }
    if tun.txqueuelen != desired.tun.txqueuelen {
        plan.changes.push(KernelChange::TxQueueLen { index, packets: desired.tun.txqueuelen });
    }
    settings_of(sysctl::plan_tun(&observed.sysctls), &mut plan.changes);
    if tun.up != desired.tun.up {
        plan.changes.push(KernelChange::Up { index, up: desired.tun.up });
    }
    let wanted: BTreeSet<IpNet> = desired.overlay.iter().copied().map(IpNet::from).collect();
    for address in wanted.difference(&observed.addresses) {
        plan.changes.push(KernelChange::AddressAdd { index, address: *address });
    }
    for address in observed.addresses.difference(&wanted) {
        withdrawn.push(KernelChange::AddressRemove { index, address: *address });
    }
}

/// Adds rules; returns those to remove.
fn rules(
    options: &Options,
    desired: &Desired,
    observed: &ObservedKernel,
    changes: &mut Vec<KernelChange>,
) -> Vec<KernelRule> {
    let wanted: Vec<KernelRule> = families(desired)
        .into_iter()
        .map(|ipv4| KernelRule {
            ipv4,
            priority: options.rule_priority,
            mark: Some(options.probe_mark),
            table: options.probe_table,
        })
        .collect();
    for rule in &wanted {
        if !observed.rules.contains(rule) {
            changes.push(KernelChange::RuleAdd(rule.clone()));
        }
    }
    let mut kept = BTreeSet::new();
    observed.rules.iter().filter(|rule| !wanted.contains(rule) || !kept.insert((*rule).clone())).cloned().collect()
}

fn withdraw(
    wanted: &WantedRoutes,
    seen: &BTreeMap<(IpNet, u32, u32), Vec<&KernelRoute>>,
    rules: Vec<KernelRule>,
    addresses: Vec<KernelChange>,
) -> Vec<KernelChange> {
    let keys: BTreeSet<_> = [&wanted.floor, &wanted.probe_floor, &wanted.probes, &wanted.peers]
        .into_iter()
        .flatten()
        .map(KernelRoute::key)
        .collect();
    let gone = seen
        .iter()
        .filter(|(key, _)| !keys.contains(*key) && !wanted.held.contains(*key))
        .flat_map(|(_, routes)| routes.iter().copied().cloned());
    let (floor, routes): (Vec<_>, Vec<_>) = gone.partition(is_floor);
    let mut changes: Vec<KernelChange> = routes.into_iter().map(KernelChange::RouteRemove).collect();
    changes.extend(rules.into_iter().map(KernelChange::RuleRemove));
    changes.extend(addresses);
    changes.extend(floor.into_iter().map(KernelChange::RouteRemove));
    changes
}

/// The families that the mesh has.
fn families(desired: &Desired) -> Vec<bool> {
    let has = |ipv4: bool| {
        desired.overlay.iter().any(|a| a.is_ipv4() == ipv4)
            || desired.floor.networks.iter().any(|net| matches!(net, IpNet::V4(_)) == ipv4)
    };
    [true, false].into_iter().filter(|f| has(*f)).collect()
}

fn unreachable(dst: IpNet, table: u32) -> KernelRoute {
    KernelRoute { dst, table, metric: FLOOR_METRIC, target: NextHop::Unreachable, mtu: None, src: None }
}

fn default_of(ipv4: bool) -> IpNet {
    if ipv4 {
        Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into()
    }
}

#[cfg(test)]
mod tests;
