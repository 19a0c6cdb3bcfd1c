//! Policies at scale, on a whole node: 10,000 policies over 50,000 pods in a real etcd.
//!
//! ```text
//!   one (pod) ── router ── two (pod)        the other pods are records: they have no machines
//!                  └── store
//! ```
//!
//! `BENCH_QUICK=1` takes a tenth of everything. The engine by itself is measured by `cargo bench -p policy`.

use std::{
    env,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use integration::{
    Etcd, EtcdWriter, Iperf, LARGE_CONFIG, Meshd, MeshdNode, await_until,
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
const SUBJECT: &str = "meshd";
/// Pods in each namespace.
const PODS: usize = 100;
/// Policies in each namespace.
const POLICIES: usize = 20;

fn main() {
    let quick = env::var("BENCH_QUICK").is_ok_and(|value| !value.is_empty() && value != "0");
    let (namespaces, changes, transfers) = if quick { (50, 30, 1) } else { (500, 300, 5) };
    let machine = Machine::this();
    println!("{}\n", machine.line());
    let title = format!("{} policies over {} pods in a real etcd", namespaces * POLICIES, namespaces * PODS);
    let mut figures = Comparison::new("policy", &title);
    figures.note(
        "In force means that the status says so of the revision, which it does once both the tunnel's end and nftables judge \
         by it. A change is a policy put or deleted, or a pod's labels, in turn; ten come in a second.",
    );
    let mut star = Star::new("policy-bench");
    let (store, address) = star.host("store");
    let etcd = Etcd::start(&store, &[&address], 1);
    etcd.put("/meshd/config", LARGE_CONFIG);
    let mut writer = EtcdWriter::connect(&etcd, &store);
    let nodes: Vec<MeshdNode> = ["one", "two"]
        .into_iter()
        .map(|name| {
            let (host, _) = star.host(name);
            Meshd::on(&host, &etcd).site(name).start()
        })
        .collect();
    nodes.iter().for_each(|node| drop(node.await_ready(SOON)));
    let pods: Vec<_> = nodes.iter().map(|node| node.pod("pod")).collect();
    await_until("the pods to reach each other", SOON, || (ping(&pods[0], pods[1].v4()).lost() == 0).then_some(()));
    // Pods that nobody knows would be isolated by every policy.
    for (name, pod) in ["client", "server"].iter().zip(&pods) {
        writer.put_all(&[object("bench", name, "bench", pod.v4())]);
    }
    etcd.put("/meshd/namespaces/bench", r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench"}}"#);
    let node = &nodes[1];
    let transfer = |figures: &mut Comparison, metric: &str| {
        for _ in 0..transfers {
            let speed = Iperf::new(pods[1].v4()).run(&pods[0], &pods[1]).bits_per_second / 1e9;
            figures.record(metric, Better::Higher, SUBJECT, speed);
        }
    };
    transfer(&mut figures, "TCP through the tunnel without policies, Gbit/s");
    figures.lower(SUBJECT, "RSS of the daemon without policies, MB", node.resident_megabytes());

    let start = Instant::now();
    for namespace in 0..namespaces {
        writer.put_all(&records(namespace, &node.subnets()));
    }
    let took = start.elapsed().as_secs_f64();
    figures.note(format!("Writing them took etcd and two daemons that take them in {took:.1} s."));
    await_revision(node, etcd.revision(), SOON);
    thread::sleep(Duration::from_secs(3));
    figures.lower(SUBJECT, "RSS of the daemon with them, MB", node.resident_megabytes());
    transfer(&mut figures, "TCP through the tunnel with them, Gbit/s");

    let start = Instant::now();
    node.restart();
    await_revision(node, etcd.revision(), SOON);
    figures.lower(SUBJECT, "start of the daemon until all is in force, s", start.elapsed().as_secs_f64());
    figures.lower(SUBJECT, "RSS of the daemon that started with them, MB", node.resident_megabytes());

    thread::sleep(Duration::from_secs(3));
    let mut times = Series::default();
    let share = node.share_of_a_core(|| times = change(node, &etcd, &mut writer, namespaces, changes));
    figures.lower(SUBJECT, "CPU while ten of them change in a second, % of a core", share);
    for (name, part) in [("median", 0.5), ("p99", 0.99), ("worst", 1.0)] {
        figures.lower(SUBJECT, &format!("put until in force in both places, {name}, ms"), times.quantile(part));
    }
    println!("{figures}");
    match figures.write_json(&machine, &[format!("meshd: {}", env!("CARGO_PKG_VERSION"))]) {
        Ok(path) => println!("All values: {}", path.display()),
        Err(error) => eprintln!("cannot write the values: {error}"),
    }
}

/// One namespace with its pods and policies. In the first one the pods are of a node with these subnets.
fn records(namespace: usize, own: &[IpNet]) -> Vec<(String, String)> {
    let object = json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": format!("ns-{namespace}"), "labels": {"team": format!("t{}", namespace % 50)}}});
    let mut records = vec![(format!("/meshd/namespaces/ns-{namespace}"), object.to_string())];
    records.extend((0..PODS).map(|number| pod(namespace, number, number % 10, own)));
    records.extend((0..POLICIES).map(|number| policy(namespace, number, 0)));
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
    let object = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": ns}, "spec": spec});
    (format!("/meshd/networkpolicies/{ns}/{name}"), object.to_string())
}

/// Changes one thing after the other, every tenth in the node's own namespace, and returns how long each took to be in
/// force, in milliseconds.
fn change(node: &MeshdNode, etcd: &Etcd, writer: &mut EtcdWriter, namespaces: usize, count: u32) -> Series {
    let own = node.subnets();
    let mut revision = etcd.revision();
    let begin = Instant::now();
    let mut times = Series::default();
    for number in 0..count {
        thread::sleep((begin + CHANGE * number).saturating_duration_since(Instant::now()));
        let at = number as usize;
        let namespace = if at.is_multiple_of(10) { 0 } else { (at * 37) % namespaces };
        let start = Instant::now();
        match at % 3 {
            0 => writer.put_all(&[policy(namespace, at % POLICIES, 1 + at % 7)]),
            1 => writer.put_all(&[pod(namespace, at % PODS, at % 10, &own)]),
            _ => writer.delete_all(&[policy(namespace, at % POLICIES, 0).0]),
        }
        revision += 1;
        await_revision(node, revision, SOON);
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times
}

/// Waits until the node says that policies are in force up to this revision.
fn await_revision(node: &MeshdNode, revision: u64, patience: Duration) {
    let deadline = Instant::now() + patience;
    while in_force(node).is_none_or(|is| is < revision) {
        assert!(Instant::now() < deadline, "revision {revision} is not in force: {:?}", in_force(node));
        thread::sleep(LOOK);
    }
}

/// The revision whose policies are in force, asked without a process for each question.
fn in_force(node: &MeshdNode) -> Option<u64> {
    let mut stream = UnixStream::connect(node.run_dir().join("meshd.sock")).ok()?;
    stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: meshd\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let status: Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
    status["policy"]["revision"].as_u64()
}
