//! The ruleset that keeps mesh packets on their path, rendered from typed values.
//!
//! ```text
//! forward     filter - 450 vxlan_fwd    no pod sends VXLAN packets of the mesh
//! input       defrag - 50  vxlan        inner sources in VXLAN packets are those of the peer at the outer one
//! prerouting  defrag - 50  source       mesh sources arrive from the TUN, their route's interface, or a direct peer
//! output      raw          untracked    probes bypass conntrack, so no NAT rewrites them
//! forward     mangle       clamp_fwd ┐
//! output      mangle       clamp_out ┴▶ clamp     TCP segments fit both paths
//! postrouting srcnat - 10  guard        mesh destinations leave by the TUN or to the next hop of a direct route
//! postrouting srcnat       masq         traffic out of the mesh gets the node's address
//! ```
//!
//! The source check precedes conntrack's reassembly (-400), which combines fragments of any interface: a later check
//! would see only the interface of the last fragment.
//!
//! The guard is at postrouting, not at forward and output. There, for both kinds of packets, all destination rewrites
//! are done and the interface is final; at output, a rewritten packet still shows the interface of its first
//! destination.

use std::{borrow::Cow, collections::BTreeSet};

use ipnet::IpNet;
use mesh::kernel_state::{Desired, Firewall, PrefixVia, ProbeRoute};

use super::{
    Options,
    nft::{BaseChain, Chain, NftRule, NftSet, NftTable},
};

/// Where the guard looks at packets that leave, behind routing.
pub(crate) const GUARD_PRIORITY: i32 = 90;

/// Drop counters of the source guard, by family.
const SOURCE: [&str; 2] = ["source4", "source6"];
/// Drop counters of the destination guard, by family.
const GUARD: [&str; 2] = ["guard4", "guard6"];
/// Counter of VXLAN packets that are none of a peer's, before they are unpacked.
const VXLAN: &str = "vxlan";

/// The table for `desired`.
pub(crate) fn render(options: &Options, desired: &Desired) -> NftTable {
    let mut table = NftTable::default();
    sets(&mut table, desired);
    table.counters.extend(SOURCE.map(Cow::Borrowed));
    table.counters.extend(GUARD.map(Cow::Borrowed));
    table.counters.insert(Cow::Borrowed(VXLAN));
    vxlan(&mut table, desired);
    source(&mut table, options, desired);
    untracked(&mut table, options, desired.firewall.probe_port);
    guard(&mut table, options, &desired.firewall);
    clamp(&mut table, options, desired.tun.mtu);
    masquerade(&mut table, options, desired.firewall.ip_masq);
    table
}

/// IPv4 and IPv6: nft's word for the header, the suffix of our names, and the name of the family in `meta nfproto`.
const FAMILIES: [FamilyRules; 2] = [
    FamilyRules {
        ip: "ip",
        nfproto: "ipv4",
        networks: "networks4",
        own: "own4",
        direct: "direct4",
        probes: "probes4",
        accepted: "accepted4",
        vteps: "vteps4",
        source: "source4",
        guard: "guard4",
        masquerade: "masq4",
        tcp_headers: 40,
    },
    FamilyRules {
        ip: "ip6",
        nfproto: "ipv6",
        networks: "networks6",
        own: "own6",
        direct: "direct6",
        probes: "probes6",
        accepted: "accepted6",
        vteps: "vteps6",
        source: "source6",
        guard: "guard6",
        masquerade: "masq6",
        tcp_headers: 60,
    },
];

struct FamilyRules {
    ip: &'static str,
    nfproto: &'static str,
    networks: &'static str,
    own: &'static str,
    direct: &'static str,
    probes: &'static str,
    accepted: &'static str,
    vteps: &'static str,
    source: &'static str,
    guard: &'static str,
    masquerade: &'static str,
    tcp_headers: u32,
}

fn sets(table: &mut NftTable, desired: &Desired) {
    let firewall = &desired.firewall;
    let probe = |route: &ProbeRoute| PrefixVia { prefix: route.overlay.into(), dev: route.dev.clone(), via: route.via };
    let probes: Vec<PrefixVia> = desired.probes.iter().map(probe).collect();
    for (ipv4, family) in [true, false].into_iter().zip(&FAMILIES) {
        // Own subnets lie in the networks already; naming them again keeps the guard whole if they should not.
        let networks: Vec<&IpNet> = firewall.networks.iter().chain(&firewall.own).collect();
        table.sets.insert(family.networks.into(), NftSet::prefixes(ipv4, networks));
        table.sets.insert(family.own.into(), NftSet::prefixes(ipv4, &firewall.own));
        table.sets.insert(family.direct.into(), NftSet::prefixes_via(ipv4, &firewall.direct));
        table.sets.insert(family.probes.into(), NftSet::prefixes_via(ipv4, &probes));
        table.sets.insert(family.accepted.into(), NftSet::prefixes_on(ipv4, &firewall.accepted));
    }
    // Packets to own pods do not leave by a VXLAN device either.
    let vxlan = desired.vxlan.iter().map(|device| &device.name);
    table.sets.insert("underlay".into(), NftSet::interfaces(desired.underlay.iter().chain(vxlan.clone())));
    table.sets.insert("vxlan_devices".into(), NftSet::interfaces(vxlan));
    table.sets.insert("carriers".into(), NftSet::interfaces(&desired.underlay));
    for (ipv4, family) in [true, false].into_iter().zip(&FAMILIES) {
        let devices = desired.vxlan.iter().filter(|device| device.local.address.is_ipv4() == ipv4);
        table.sets.insert(family.vteps.into(), NftSet::vteps(ipv4, devices.flat_map(|device| &device.peers)));
    }
}

/// Binds the inner source of a VXLAN packet to the outer one: only a peer's own prefixes come from its address. At the
/// input hook, where outer fragments of IPv4 have been reassembled, and before the device sees the packet. Those of IPv6
/// have been where conntrack is at work, else they are dropped. Masquerading would give a pod's own datagram this node's
/// outer address, so none is forwarded but between interfaces of the underlay; and none is taken from elsewhere.
///
/// Offsets count bits from the UDP header (RFC 7348, 5): the identifier at 96, the inner EtherType at 224, the inner IPv4
/// source at 336 and the inner IPv6 source at 304. A VLAN tag, ARP or anything else in the EtherType's place is dropped.
fn vxlan(table: &mut NftTable, desired: &Desired) {
    let mut entry = Vec::new();
    let mut forwarded = Vec::new();
    let mut rules = Vec::new();
    for port in desired.vxlan.iter().map(|device| device.port).collect::<BTreeSet<u16>>() {
        let drop = |condition: &str, purpose| {
            NftRule::new(format!("{condition} udp dport {port} counter name \"{VXLAN}\" drop"), purpose)
        };
        forwarded.push(drop("iifname != @carriers", "a pod's own VXLAN packet"));
        entry.push(drop("meta nfproto ipv6 exthdr frag exists", "a fragment"));
        entry.push(drop("iifname != @carriers", "not from the underlay"));
    }
    for device in &desired.vxlan {
        let f = if device.local.address.is_ipv4() { &FAMILIES[0] } else { &FAMILIES[1] };
        let (ethertype, source) = if f.ip == "ip" { ("0x0800", "@th,336,32") } else { ("0x86dd", "@th,304,128") };
        entry.push(NftRule::new(
            format!("meta nfproto {} udp dport {} @th,96,24 {} jump vxlan_inner", f.nfproto, device.port, device.vni),
            "VXLAN packets of the mesh",
        ));
        rules.push(NftRule::new(
            format!("@th,224,16 {ethertype} {} saddr . {source} @{} return", f.ip, f.vteps),
            "a peer's own prefixes",
        ));
    }
    rules.push(NftRule::new(format!("counter name \"{VXLAN}\" drop"), "not a peer's own"));
    table.chains.insert("vxlan_inner".into(), Chain { base: None, rules });
    insert_base(table, "vxlan", ("filter", "input", -450), entry);
    insert_base(table, "vxlan_fwd", ("filter", "forward", -450), forwarded);
}

fn source(table: &mut NftTable, options: &Options, desired: &Desired) {
    let mut entry = vec![NftRule::new(
        format!("iifname {{ \"lo\", \"{}\" }} return", options.tun),
        "this host, and the tunnel, which checks keys",
    )];
    for (f, counter) in FAMILIES.iter().zip(SOURCE) {
        entry.push(NftRule::new(format!("{} saddr @{} jump {}", f.ip, f.networks, f.source), "mesh sources"));
        let mut rules = vec![NftRule::new(
            format!("iifname @vxlan_devices {} daddr != @{} counter name \"{counter}\" drop", f.ip, f.own),
            "a VXLAN packet for others",
        )];
        let overlay = desired.overlay.iter().filter(|address| address.is_ipv4() == (f.ip == "ip"));
        for (address, port) in overlay.filter_map(|address| Some((address, desired.firewall.probe_port?))) {
            let probe = format!("{} daddr {address} udp dport {port} {} saddr . iifname @{}", f.ip, f.ip, f.accepted);
            rules.push(NftRule::new(format!("{probe} notrack return"), "probes of eligible direct peers"));
        }
        rules.extend([
            NftRule::new(format!("{} saddr . iifname @{} return", f.ip, f.accepted), "eligible direct peers"),
            NftRule::new("fib saddr . iif oif exists return".to_owned(), "its route points there"),
            NftRule::new(format!("counter name \"{counter}\" drop"), "a mesh source from elsewhere"),
        ]);
        table.chains.insert(f.source.into(), Chain { base: None, rules });
    }
    insert_base(table, "source", ("filter", "prerouting", -450), entry);
}

/// Probes are of no connection, in either direction: no NAT rule, of whomever, applies to them, nor does one that an
/// earlier connection of the same addresses and ports had.
fn untracked(table: &mut NftTable, options: &Options, probe_port: Option<u16>) {
    let rule = |port| NftRule::new(format!("meta mark {:#x} udp sport {port} notrack", options.probe_mark), "probes");
    insert_base(table, "untracked", ("filter", "output", -300), probe_port.into_iter().map(rule).collect());
}

fn guard(table: &mut NftTable, options: &Options, firewall: &Firewall) {
    let mut entry =
        vec![NftRule::new(format!("oifname {{ \"lo\", \"{}\" }} return", options.tun), "this host, and the tunnel")];
    for (f, counter) in FAMILIES.iter().zip(GUARD) {
        entry.push(NftRule::new(format!("{} daddr @{} jump {}", f.ip, f.networks, f.guard), "mesh destinations"));
        let mut rules = vec![
            NftRule::new(format!("{} @{} return", next_hop(f), f.direct), "direct routes"),
            NftRule::new(format!("{} daddr @{} oifname != @underlay return", f.ip, f.own), "own pods"),
        ];
        if let Some(port) = firewall.probe_port {
            rules.push(NftRule::new(
                format!("meta mark {:#x} udp sport {port} {} @{} return", options.probe_mark, next_hop(f), f.probes),
                "probes to eligible peers",
            ));
        }
        rules.push(NftRule::new(format!("counter name \"{counter}\" drop"), "neither tunnel nor direct route"));
        table.chains.insert(f.guard.into(), Chain { base: None, rules });
    }
    insert_base(table, "guard", ("filter", "postrouting", GUARD_PRIORITY), entry);
}

/// Where a packet really goes. A destination and an interface alone would also be those of a default route to a router,
/// which a packet follows once the direct route is flushed.
fn next_hop(f: &FamilyRules) -> String {
    format!("{0} daddr . oifname . rt {0} nexthop", f.ip)
}

fn clamp(table: &mut NftTable, options: &Options, mtu: u32) {
    let mut rules = Vec::new();
    for f in &FAMILIES {
        for direction in ["daddr", "saddr"] {
            rules.push(NftRule::new(
                format!("{} {direction} @{} tcp option maxseg size set rt mtu", f.ip, f.networks),
                "the smaller route of both directions",
            ));
        }
        let segment = mtu.saturating_sub(f.tcp_headers).clamp(1, 65_535);
        rules.push(NftRule::new(
            format!("iifname \"{}\" meta nfproto {} tcp option maxseg size set {segment}", options.tun, f.nfproto),
            "from the tunnel",
        ));
    }
    table.chains.insert("clamp".into(), Chain { base: None, rules });
    for (name, hook) in [("clamp_fwd", "forward"), ("clamp_out", "output")] {
        let entry = vec![NftRule::new("tcp flags & (syn | rst) == syn jump clamp".to_owned(), "new connections")];
        insert_base(table, name, ("filter", hook, -150), entry);
    }
}

fn masquerade(table: &mut NftTable, options: &Options, on: bool) {
    let mut entry = Vec::new();
    for f in &FAMILIES {
        let mut rules = Vec::new();
        if on {
            entry.push(NftRule::new(format!("{} saddr @{} jump {}", f.ip, f.own, f.masquerade), "own subnets"));
            rules = vec![
                NftRule::new(format!("oifname {{ \"lo\", \"{}\" }} return", options.tun), "stays in the mesh"),
                NftRule::new(format!("{} daddr @{} return", f.ip, f.networks), "stays in the mesh"),
                NftRule::new(
                    "fib daddr type { local, broadcast, multicast } return".to_owned(),
                    "own addresses and groups",
                ),
                NftRule::new("masquerade fully-random".to_owned(), "leaves the mesh"),
            ];
        }
        table.chains.insert(f.masquerade.into(), Chain { base: None, rules });
    }
    insert_base(table, "masq", ("nat", "postrouting", 100), entry);
}

fn insert_base(
    table: &mut NftTable,
    name: &'static str,
    (kind, hook, priority): (&'static str, &'static str, i32),
    rules: Vec<NftRule>,
) {
    let base = Some(BaseChain { kind, hook, priority });
    table.chains.insert(name.into(), Chain { base, rules });
}
