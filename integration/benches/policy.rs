//! Policies at scale, on a whole node: 10,000 policies over 50,000 pods in a real etcd.
//!
//! ```text
//!   one (pod) ─── router ─── two (two pods)        the other pods are records: they have no machines
//!   three (pod) ───┘  └───── four (two pods)       a mesh of its own, to compare with
//! ```
//!
//! `BENCH_QUICK=1` takes a tenth of everything. The engine by itself is measured by `cargo bench -p policy`.

use std::{
    env,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use integration::{
    Etcd, EtcdWriter, Iperf, LARGE_CONFIG, Meshd, MeshdNode, Pod, await_until,
    measure::{Better, Comparison, Machine, Series},
    ping,
    topology::Star,
};
use ipnet::IpNet;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(120);
/// Between two changes: ten a second.
const CHANGE: Duration = Duration::from_millis(100);
/// Between two looks at the status, which takes the daemon some 50 us.
const LOOK: Duration = Duration::from_millis(2);
/// Longer than the daemon waits before it gives back memory.
const SETTLED: Duration = Duration::from_secs(10);
const SUBJECT: &str = "meshd";
/// Pods in each namespace.
const PODS: usize = 100;
/// Policies in each namespace.
const POLICIES: usize = 20;

/// What others are compared with.
const BARE: &str = "no policy";
/// What nftables' cost is compared with.
const FEW: &str = "10 policies";
/// New flows in each turn: few enough for conntrack to hold all turns.
const FLOWS: u16 = 2000;

fn main() {
    let quick = env::var("BENCH_QUICK").is_ok_and(|value| !value.is_empty() && value != "0");
    let (namespaces, changes, turns) = if quick { (50, 30, 2) } else { (500, 300, 15) };
    let machine = Machine::this();
    println!("{}\n", machine.line());
    let title = format!("{} policies over {} pods in a real etcd", namespaces * POLICIES, namespaces * PODS);
    let mut figures = Comparison::new("policy", &title);
    figures.note(
        "In force means that the status says so of the revision, which it does once both the tunnel's end and nftables judge \
         by it. A change is a policy put or deleted, or a pod's labels, in turn; ten come in a second. Another mesh beside \
         it has no policy at first, and ten at the end; it takes turns with this one.",
    );
    let mut star = Star::new("policy-bench");
    let mut many = Pair::start(&mut star, ["store", "one", "two"]);
    let mut few = Pair::start(&mut star, ["other-store", "three", "four"]);
    figures.lower(SUBJECT, "RSS of the daemon without policies, MB", many.node().resident_megabytes());

    let own = many.node().subnets();
    many.name_pods();
    let start = Instant::now();
    for namespace in 0..namespaces {
        many.writer.put_all(&records(namespace, POLICIES, &own));
    }
    let took = start.elapsed().as_secs_f64();
    figures.note(format!("Writing them took etcd and two daemons that take them in {took:.1} s."));
    many.await_in_force();
    thread::sleep(SETTLED);
    figures.lower(SUBJECT, "RSS of the daemon with them, MB", many.node().resident_megabytes());

    for turn in 0..turns {
        let mut speeds = [0.0; 2];
        for at in [turn % 2, 1 - turn % 2] {
            let pods = &[&many, &few][at].pods;
            speeds[at] = Iperf::new(pods[1].v4()).run(&pods[0], &pods[1]).bits_per_second / 1e9;
        }
        for (subject, speed) in [SUBJECT, BARE].into_iter().zip(speeds) {
            figures.record("TCP through the tunnel, Gbit/s", Better::Higher, subject, speed);
        }
    }

    let start = Instant::now();
    many.node().restart();
    many.await_in_force();
    figures.lower(SUBJECT, "start of the daemon until all is in force, s", start.elapsed().as_secs_f64());
    figures.lower(SUBJECT, "RSS of the daemon as it has started with them, MB", many.node().resident_megabytes());
    thread::sleep(SETTLED);
    figures.lower(SUBJECT, "RSS of the daemon ten seconds later, MB", many.node().resident_megabytes());

    let mut times = Series::default();
    let (node, writer) = (&many.nodes[1], &mut many.writer);
    let share = node.share_of_a_core(|| times = change(node, writer, namespaces, changes));
    figures.lower(SUBJECT, "CPU while ten of them change in a second, % of a core", share);
    for (name, part) in [("median", 0.5), ("p99", 0.99), ("worst", 1.0)] {
        figures.lower(SUBJECT, &format!("put until in force in both places, {name}, ms"), times.quantile(part));
    }
    for _ in 0..11 {
        figures.lower(SUBJECT, "rules are back after nft flush ruleset, ms", flushed(many.node()).as_secs_f64() * 1e3);
    }

    let own = few.node().subnets();
    few.name_pods();
    few.writer.put_all(&records(0, 8, &own));
    few.await_in_force();
    for turn in 0..turns {
        let mut costs = [0.0; 2];
        for at in [turn % 2, 1 - turn % 2] {
            costs[at] = [&many, &few][at].new_flows();
        }
        for (subject, cost) in [SUBJECT, FEW].into_iter().zip(costs) {
            figures.record("first packet of a flow from pod to pod on a node, us", Better::Lower, subject, cost);
        }
    }
    println!("{figures}");
    match figures.write_json(&machine, &[format!("meshd: {}", env!("CARGO_PKG_VERSION"))]) {
        Ok(path) => println!("All values: {}", path.display()),
        Err(error) => eprintln!("cannot write the values: {error}"),
    }
}

/// A mesh of two nodes.
struct Pair {
    etcd: Etcd,
    writer: EtcdWriter,
    nodes: Vec<MeshdNode>,
    /// One of each node, and another one of the second.
    pods: Vec<Pod>,
}

impl Pair {
    fn start(star: &mut Star, [store, one, two]: [&str; 3]) -> Self {
        let (store, address) = star.host(store);
        let etcd = Etcd::start(&store, &[&address], 1);
        etcd.put("/meshd/config", LARGE_CONFIG);
        let writer = EtcdWriter::connect(&etcd, &store);
        let start = |name| Meshd::on(&star.host(name).0, &etcd).site(name).start();
        let nodes: Vec<MeshdNode> = [one, two].map(start).into();
        nodes.iter().for_each(|node| drop(node.await_ready(SOON)));
        let pods = vec![nodes[0].pod("pod"), nodes[1].pod("pod"), nodes[1].pod("near")];
        await_until("the pods to reach each other", SOON, || (ping(&pods[0], pods[1].v4()).lost() == 0).then_some(()));
        Self { etcd, writer, nodes, pods }
    }

    /// The node that is looked at.
    fn node(&self) -> &MeshdNode {
        &self.nodes[1]
    }

    /// Makes the pods known, with two policies that isolate them both ways and let them reach each other.
    fn name_pods(&mut self) {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench"}});
        let mut records = vec![("/meshd/namespaces/bench".to_owned(), namespace.to_string())];
        records.extend(
            ["client", "server", "near"]
                .iter()
                .zip(&self.pods)
                .map(|(name, pod)| object("bench", name, "bench", pod.v4())),
        );
        let ports = json!([{"port": 1, "endPort": 65535}, {"protocol": "UDP", "port": 1, "endPort": 65535}]);
        for (name, types, rules, peers) in [("in", "Ingress", "ingress", "from"), ("out", "Egress", "egress", "to")] {
            let spec = json!({"podSelector": {}, "policyTypes": [types],
                rules: [{peers: [{"podSelector": {"matchLabels": {"app": "bench"}}}], "ports": ports}]});
            records.push(network_policy("bench", name, &spec));
        }
        self.writer.put_all(&records);
    }

    fn await_in_force(&self) {
        await_revision(self.node(), self.etcd.revision(), SOON);
    }

    /// Sends first packets of flows between two pods of one node, and returns how long each took on its way, in
    /// microseconds: it goes the whole of it before the call that sends it comes back.
    fn new_flows(&self) -> f64 {
        let (from, to) = (&self.pods[1], &self.pods[2]);
        // No process listens, and no error is to say so.
        to.nft("add table inet quiet\nadd chain inet quiet input { type filter hook input priority 0; policy drop; }");
        let socket = from.enter(|| UdpSocket::bind(("0.0.0.0", 0))).expect("a socket");
        let start = Instant::now();
        for number in 0..FLOWS {
            socket.send_to(b"first", (to.v4(), 1024 + number)).expect("a way there");
        }
        start.elapsed().as_secs_f64() * 1e6 / f64::from(FLOWS)
    }
}

/// Removes all rules of the machine, and returns how long until those of the policies are back.
fn flushed(node: &MeshdNode) -> Duration {
    node.host().run("nft flush ruleset");
    let start = Instant::now();
    await_until("the rules to be back", SOON, || {
        // All of them come in one transaction.
        node.host().run("nft list tables").stdout.contains("inet meshd_policy").then_some(())
    });
    start.elapsed()
}

/// One namespace with its pods and policies. In the first one the pods are of a node with these subnets.
fn records(namespace: usize, policies: usize, own: &[IpNet]) -> Vec<(String, String)> {
    let object = json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": format!("ns-{namespace}"), "labels": {"team": format!("t{}", namespace % 50)}}});
    let mut records = vec![(format!("/meshd/namespaces/ns-{namespace}"), object.to_string())];
    records.extend((0..PODS).map(|number| pod(namespace, number, number % 10, own)));
    records.extend((0..policies).map(|number| policy(namespace, number, 0)));
    records
}

fn pod(namespace: usize, number: usize, app: usize, own: &[IpNet]) -> (String, String) {
    // Beyond the node's own address and those of the real pods; elsewhere far beyond any drawn subnet's use.
    let first = match own.iter().find_map(|net| match net.network() {
        IpAddr::V4(v4) if namespace == 0 => Some(u32::from(v4)),
        _ => None,
    }) {
        Some(first) => first + 100,
        None => u32::from(Ipv4Addr::new(10, 120, 0, 1)) + u32::try_from(namespace * PODS).unwrap_or_default(),
    };
    let address = Ipv4Addr::from(first + u32::try_from(number).unwrap_or_default());
    object(&format!("ns-{namespace}"), &format!("pod-{number}"), &format!("app-{app}"), address.into())
}

fn object(namespace: &str, name: &str, app: &str, address: IpAddr) -> (String, String) {
    let object = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "uid": format!("{namespace}-{name}"),
            "labels": {"app": app, "instance": name}},
        "spec": {"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": address}]}});
    (format!("/meshd/pods/{namespace}/{name}"), object.to_string())
}

fn policy(namespace: usize, number: usize, variant: usize) -> (String, String) {
    let (ns, name) = (format!("ns-{namespace}"), format!("np-{number}"));
    let app = |of: usize| json!({"matchLabels": {"app": format!("app-{}", of % 10)}});
    let team = json!({"matchLabels": {"team": format!("t{}", (namespace + variant) % 50)}});
    let spec = match number % 5 {
        0 => json!({"podSelector": app(number), "policyTypes": ["Ingress"]}),
        1 => json!({"podSelector": app(number), "ingress":
            [{"from": [{"podSelector": app(number + variant)}], "ports": [{"port": 80}]}]}),
        2 => json!({"podSelector": app(number), "ingress":
            [{"from": [{"namespaceSelector": team, "podSelector": app(variant)}], "ports": [{"port": "http"}]}]}),
        3 => json!({"podSelector": app(number), "policyTypes": ["Egress"], "egress":
            [{"to": [{"ipBlock": {"cidr": "10.64.0.0/10", "except": ["10.127.0.0/16"]}}], "ports": [{"port": 443}]},
             {"to": [{"namespaceSelector": team}], "ports": [{"protocol": "UDP", "port": 53}]}]}),
        _ => json!({"podSelector": app(number), "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": app(variant)}], "ports": [{"port": 8000, "endPort": 9000}]}],
            "egress": [{"ports": [{"port": 443}]}]}),
    };
    network_policy(&ns, &name, &spec)
}

fn network_policy(namespace: &str, name: &str, spec: &Value) -> (String, String) {
    let object = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace}, "spec": spec});
    (format!("/meshd/networkpolicies/{namespace}/{name}"), object.to_string())
}

/// Changes one thing after the other, every tenth in the node's own namespace, and returns how long each took to be in
/// force, in milliseconds.
fn change(node: &MeshdNode, writer: &mut EtcdWriter, namespaces: usize, count: u32) -> Series {
    let own = node.subnets();
    let begin = Instant::now();
    let mut times = Series::default();
    for number in 0..count {
        thread::sleep((begin + CHANGE * number).saturating_duration_since(Instant::now()));
        let at = number as usize;
        let namespace = if at.is_multiple_of(10) { 0 } else { (at * 37) % namespaces };
        let start = Instant::now();
        let revision = match at % 3 {
            0 => writer.put_all(&[policy(namespace, at % POLICIES, 1 + at % 7)]),
            1 => writer.put_all(&[pod(namespace, at % PODS, at % 10, &own)]),
            _ => writer.delete_all(&[policy(namespace, at % POLICIES, 0).0]),
        };
        await_revision(node, revision, SOON);
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times
}

/// Waits until the node says that policies are in force up to this revision.
fn await_revision(node: &MeshdNode, revision: u64, patience: Duration) {
    let deadline = Instant::now() + patience;
    while node.policy_revision().is_none_or(|is| is < revision) {
        assert!(Instant::now() < deadline, "revision {revision} is not in force: {:?}", node.policy_revision());
        thread::sleep(LOOK);
    }
}
