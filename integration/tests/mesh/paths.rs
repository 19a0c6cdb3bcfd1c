//! Direct or tunnel, per peer and family: what proves a path, what it takes to leave it, and what traffic notices.

mod abuse;
mod blocked;
mod cost;
mod neighbour;
mod settings;
mod stranger;
mod translated;

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use integration::{
    Etcd, Flow, Host, Meshd, MeshdNode, Namespace, Pod, Switch, TcpCheck, await_until, ping,
    topology::{CONFIG, TwoSites},
};

/// A path that is to change: losses, a proof of 30 s, a machine that is busy with other tests.
const CHANGE: Duration = Duration::from_secs(120);
/// For a node to come up.
const READY: Duration = Duration::from_secs(120);
/// How long it is watched that something does not happen.
const WATCH: Duration = Duration::from_secs(20);

/// Two nodes of site east with a pod each:
///
/// ```text
///   east1 (pod) ─┐ east: 192.0.2.0/24, 2001:db8:1::/64
///                ├─ switch ──── router ──── store (etcd)
///   east2 (pod) ─┘
/// ```
struct Pair {
    pods: [Pod; 2],
    nodes: [MeshdNode; 2],
    etcd: Etcd,
    sites: TwoSites,
}

impl Pair {
    /// Both up and direct in both families.
    #[track_caller]
    fn direct(title: &str) -> Self {
        let pair = Self::start_on(TwoSites::new(title), |meshd| meshd.site("east"));
        pair.await_direct();
        pair
    }

    /// Both up.
    #[track_caller]
    fn start_on(sites: TwoSites, finish: impl Fn(Meshd) -> Meshd) -> Self {
        let etcd = sites.start_etcd(1);
        etcd.put("/meshd/config", CONFIG);
        let nodes = [0, 1].map(|nth| finish(Meshd::on(&sites.east.hosts[nth], &etcd)).start());
        let pods = nodes.each_ref().map(|node| {
            node.await_ready(READY);
            node.pod("pod")
        });
        Self { pods, nodes, etcd, sites }
    }

    /// Each end goes direct to the other, in both families.
    #[track_caller]
    fn await_direct(&self) {
        self.await_both("direct");
    }

    /// Each end reaches the other by this path in the family that fares worse.
    #[track_caller]
    fn await_both(&self, path: &str) {
        for (node, other) in self.ends() {
            node.await_path(other.name(), path, CHANGE);
        }
    }

    fn ends(&self) -> [(&MeshdNode, &MeshdNode); 2] {
        let [a, b] = &self.nodes;
        [(a, b), (b, a)]
    }

    /// How many times the paths of both nodes have changed since their daemons started.
    fn changes(&self) -> [usize; 2] {
        self.nodes.each_ref().map(changes)
    }

    /// A TCP stream each, and a numbered flow each way, in both families.
    fn traffic(&self) -> Traffic {
        let [a, b] = &self.pods;
        let rate = 100_000;
        let interval = Duration::from_millis(20);
        Traffic {
            streams: vec![TcpCheck::start(a, b, b.v4(), rate), TcpCheck::start(b, a, a.v6(), rate)],
            flows: [
                [Flow::udp(a, b, b.v4(), interval), Flow::udp(b, a, a.v4(), interval)],
                [Flow::udp(a, b, b.v6(), interval), Flow::udp(b, a, a.v6(), interval)],
            ],
        }
    }

    /// What the switch east does with every frame between its ports, in place of what it did.
    fn switch_rules(&self, rules: &str) {
        set_rules(&self.sites.east.switch, rules);
    }

    /// Overlay address of a node in a family.
    fn overlay(&self, nth: usize, ipv4: bool) -> IpAddr {
        let addresses = self.nodes[nth].overlay();
        addresses.into_iter().find(|address| address.is_ipv4() == ipv4).expect("an overlay address")
    }

    #[track_caller]
    fn ping_all(&self) {
        let [a, b] = &self.pods;
        for (from, to) in [(a, b), (b, a)] {
            for address in to.addresses() {
                let from: &Namespace = from;
                await_until(&format!("{} to reach {address}", from.name()), CHANGE, || {
                    (ping(from, address).lost() == 0).then_some(())
                });
            }
        }
    }
}

/// A switch with these lets pass only what comes from addresses of its own network, ARP included: as clouds do.
const DROP_FOREIGN_SOURCES: &str = "ether type arp arp saddr ip != 192.0.2.0/24 counter drop
    ip saddr 10.244.0.0/16 counter drop
    ip6 saddr fd42:244::/48 counter drop";

/// What a switch does with every frame between its ports, in place of what it did.
fn set_rules(switch: &Switch, rules: &str) {
    let base = "type filter hook forward priority 0; policy accept;";
    switch.nft(&format!(
        "table bridge lab\ndelete table bridge lab\ntable bridge lab {{\nchain between {{\n{base}\n{rules}\n}}\n}}\n"
    ));
}

/// What runs while a path is changed.
struct Traffic {
    streams: Vec<TcpCheck>,
    /// Of IPv4 and IPv6, one each way.
    flows: [[Flow; 2]; 2],
}

impl Traffic {
    #[track_caller]
    fn await_progress(&self) {
        self.streams.iter().for_each(|stream| stream.await_progress(CHANGE));
        self.flows.iter().flatten().for_each(|flow| flow.await_answer(CHANGE));
    }

    /// Ends it; the streams must be whole, and in no flow may so many packets be missing as take this long.
    #[track_caller]
    fn finish(self, missing: Duration) {
        self.finish_each([missing; 2]);
    }

    /// The same with another time for IPv4 than for IPv6.
    #[track_caller]
    fn finish_each(self, missing: [Duration; 2]) {
        for stream in self.streams {
            stream.finish().assert_intact();
        }
        for (flows, missing) in self.flows.into_iter().zip(missing) {
            for report in flows.map(Flow::finish) {
                let most = u64::try_from(missing.as_millis() / 20).unwrap_or(u64::MAX);
                assert!(report.answered > 0 && report.lost <= most, "{report}; at most {most} may be lost");
            }
        }
    }
}

/// How many times paths have changed since the daemon started.
fn changes(node: &MeshdNode) -> usize {
    node.log().matches("peer path changed").count()
}

/// Looks again and again for a while that nothing goes wrong.
fn watch(span: Duration, mut look: impl FnMut()) {
    let start = Instant::now();
    while start.elapsed() < span {
        look();
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// What the kernel would do with a packet to this address.
fn route_to(host: &Host, address: IpAddr) -> String {
    host.run(&format!("ip route get {address}")).stdout
}

/// Why this node does not reach that peer by a better path.
fn reason(node: &MeshdNode, peer: &str) -> String {
    node.peer(peer).and_then(|peer| Some(peer["reason"].as_str()?.to_owned())).unwrap_or_default()
}
