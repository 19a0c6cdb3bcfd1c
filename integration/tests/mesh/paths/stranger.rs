//! Others with a peer's address.

use integration::{
    Etcd, Lab, Meshd, Sniffer, await_until, ping,
    topology::{CONFIG, TwoSites},
};

use super::{CHANGE, Pair, READY, WATCH, route_to, watch};

/// ```text
///   east1 (pod) ─┐
///   east2 (pod) ─┼─ switch
///   mallory ─────┘  takes 192.0.2.12, east2's
/// ```
#[test]
fn a_stranger_that_takes_a_peers_address_gets_nothing_in_the_clear() {
    let sites = TwoSites::new("stranger");
    let mallory = sites.lab.host("mallory");
    let plug = mallory.connect(&sites.east.switch, &[]);
    let networks = ["10.244.0.0/16", "fd42:244::/48"].map(|net| net.parse().expect("a prefix"));
    let sniffer = mallory.sniff(&networks);
    let pair = Pair::start_on(sites, |meshd| meshd.site("east"));
    pair.await_direct();
    pair.ping_all();
    sniffer.assert_clean();

    // She announces the address as hers, as a machine does that takes over: east1's neighbour entry becomes hers.
    let east1 = pair.nodes[0].host();
    plug.down();
    mallory.sysctl(&format!("net/ipv4/conf/{}/arp_notify", plug.name()), "1");
    plug.add_address("192.0.2.12/32");
    plug.up();
    mallory.route("192.0.2.0/24", &format!("dev {}", plug.name()));
    let mac = mac_of(&mallory, plug.name());
    // Otherwise east2's kernel asks for its neighbours again within seconds, which takes the address back.
    pair.switch_rules(&format!("ether saddr != {mac} arp saddr ip 192.0.2.12 counter drop"));
    await_until("east1 to take mallory for its neighbour", CHANGE, || {
        mallory.try_run(&["ping", "-c", "1", "-W", "1", "-I", "192.0.2.12", "192.0.2.11"]);
        let entry = east1.run("ip neigh show 192.0.2.12").stdout;
        entry.contains(&mac).then_some(())
    });
    pair.nodes[0].await_path("east2", "wireguard", CHANGE);
    await_until("the route to lead into the tunnel", CHANGE, || {
        route_to(east1, pair.pods[1].v4()).contains(pair.nodes[0].interface()).then_some(())
    });
    // What she got until it was noticed is part of the scenario; from now on there is nothing.
    drop(sniffer.take_violations());
    watch(WATCH, || {
        let _ = ping(&pair.pods[0], pair.pods[1].v4());
        let peer = pair.nodes[0].peer("east2").expect("the peer is there");
        assert_ne!(peer["path"], "direct", "{peer}");
    });
    assert_only_probes(&sniffer);
}

/// Probes go on, since the path may come back; they carry nothing and prove nothing to who cannot answer them.
#[track_caller]
fn assert_only_probes(sniffer: &Sniffer) {
    let seen = sniffer.take_violations();
    assert!(seen.iter().all(|seen| seen.frame.windows(4).any(|bytes| bytes == b"mshp")), "{seen:?}");
}

/// The MAC address of an interface, as `ip` prints it.
fn mac_of(host: &integration::Host, interface: &str) -> String {
    let link = host.run(&format!("ip -o link show {interface}")).stdout;
    let mac = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
    mac.expect("a MAC address").to_owned()
}

/// Two homes with the same network that were given the same site name by mistake. Each has a stranger with the address
/// of the other home's node.
///
/// ```text
///   home1 192.168.1.11 ─┬─ LAN    ╔════════════╗    LAN ─┬─ home2 192.168.1.12
///   neighbour1     .12 ─┘    └─.21╢ management ╟.22─┘    └─ neighbour2     .11
///                                 ╚═════╤══════╝
///                                     store (etcd)
/// ```
#[test]
fn two_homes_with_the_same_network_and_site_name_are_never_direct() {
    let lab = Lab::new("two-homes");
    let management = lab.switch("management");
    let store = lab.host("store");
    store.connect(&management, &["203.0.113.10/24"]);
    let etcd = Etcd::start(&store, &["203.0.113.10"], 1);
    etcd.put("/meshd/config", CONFIG);
    let networks = ["10.244.0.0/16", "fd42:244::/48"].map(|net| net.parse().expect("a prefix"));
    let homes = [(1, 11, 12), (2, 12, 11)].map(|(nth, own, others)| {
        let lan = lab.switch(&format!("lan{nth}"));
        let host = lab.host(&format!("home{nth}"));
        let interface = host.connect(&lan, &[&format!("192.168.1.{own}/24")]);
        host.connect(&management, &[&format!("203.0.113.2{nth}/24")]);
        let neighbour = lab.host(&format!("neighbour{nth}"));
        neighbour.connect(&lan, &[&format!("192.168.1.{others}/24")]);
        let sniffer = neighbour.sniff(&networks);
        let args = format!("--iface {} --endpoint 203.0.113.2{nth}:51820", interface.name());
        (Meshd::on(&host, &etcd).site("home").args(&args).start(), sniffer)
    });
    let pods = homes.each_ref().map(|(node, _)| {
        node.await_ready(READY);
        node.pod("pod")
    });
    await_until("the homes to reach each other", CHANGE, || (ping(&pods[0], pods[1].v4()).lost() == 0).then_some(()));
    watch(WATCH, || {
        for (nth, (node, _)) in homes.iter().enumerate() {
            let peer = node.peer(["home2", "home1"][nth]).expect("the peer is there");
            assert_eq!(peer["path"], "wireguard", "{peer}");
        }
    });
    for (_, sniffer) in &homes {
        assert_only_probes(sniffer);
    }
}
