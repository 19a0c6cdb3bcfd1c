//! `make demo`: a working two-site mesh of real components, in network namespaces of this machine.
//!
//! Exits with 0 only if every step succeeds. `KEEP=1` leaves the mesh running.

mod pods;

use std::{
    env,
    fmt::Display,
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    panic::{self, AssertUnwindSafe},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use integration::{
    CniPod, CniRuntime, Etcd, Host, Implementation, Iperf, MeshdNode, Namespace, Ping, Sniffer, WireguardPeer,
    await_until, key_pair, topology::TwoSites,
};
use serde_json::{Value, json};

const CONFIG: &str = r#"{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd42:244::/48", "Backend": {"Type": "wireguard"}}"#;
const LAPTOP_V4: &str = "10.9.0.2";
const LAPTOP_V6: &str = "fd42:9::2";
const SOON: Duration = Duration::from_secs(30);

const PICTURE: &str = "
        site east                                          site west
     ┌───────┐                                                ┌───────┐
     │ east1 ├──┐                                          ┌──┤ west1 │
     └───────┘  ├── switch ───── router ───── switch ──────┤  └───────┘
     ┌───────┐  │             captures all │               │  ┌───────┐
     │ east2 ├──┘               ┌──────────┴───┐           └──┤ west2 │
     └───────┘                etcd          laptop            └───────┘

  Each node runs meshd and gets a pod. The router is untrusted.
";

fn main() -> ExitCode {
    let style = Style::new();
    println!("{}{PICTURE}", style.bold("meshd: a real mesh of two sites, in network namespaces of this machine"));
    // A failure is reported once, by its step.
    panic::set_hook(Box::new(|_| {}));
    let started = Instant::now();
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| show(&style)));
    match outcome {
        Ok(lab_id) => {
            let kept = env::var_os("KEEP").is_some();
            if !kept
                && fs::read_dir("/run/netns").is_ok_and(|names| {
                    names.flatten().any(|name| name.file_name().to_string_lossy().starts_with(&lab_id))
                })
            {
                println!("{} namespaces were left behind", style.bad("✗"));
                return ExitCode::FAILURE;
            }
            let seconds = started.elapsed().as_secs_f32();
            let end = if kept { "the mesh stays up (KEEP=1)" } else { "nothing is left behind" };
            println!("\n{} in {seconds:.0} s; {end}.", style.good("All checks passed"));
            ExitCode::SUCCESS
        }
        Err(payload) => {
            let text = payload
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| payload.downcast_ref::<&str>().copied())
                .unwrap_or("a step failed");
            println!("  {} {text}", style.bad("✗"));
            ExitCode::FAILURE
        }
    }
}

/// The whole show; returns the Lab's id.
fn show(style: &Style) -> String {
    let sites = TwoSites::new("demo");
    let laptop = laptop(&sites);
    let prefixes = ["10.244.0.0/16", "fd42:244::/48", "10.9.0.0/24", "fd42:9::/64"];
    let sniffer = sites.router.sniff(&prefixes.map(|text| text.parse().expect("a prefix")));
    let mut act = Act { style, number: 0 };

    act.opens("The operator puts one key into etcd");
    let etcd = sites.start_etcd(1);
    act.command(&format!("etcdctl put /meshd/config '{CONFIG}'"));
    etcd.put("/meshd/config", CONFIG);

    act.opens("Four nodes start, lease subnets and find each other");
    let nodes = start_nodes(&sites, &etcd, &mut act);

    act.opens("On each node a container runtime calls meshd-cni for a pod");
    let networks: Vec<CniRuntime> = nodes.iter().zip(NAMES).map(|(node, name)| pods::network(node, name)).collect();
    let pods = pods::add(&nodes, &networks, &mut act);

    act.opens("Every pod pings every other, in IPv4 and IPv6");
    ping_all(&nodes, &pods, &mut act);

    act.opens("Each kind of path, measured once (both ends and the load share this machine)");
    await_direct(&nodes);
    peers(&nodes[0], &mut act);
    measure(&pods, &mut act);

    act.opens("A web server in a pod, reachable from pods of its node, its site and the other site, and from outside");
    pods::reach(&nodes, &pods, &laptop, [sites.east.v4(0), sites.east.v4(1)], &mut act);

    act.opens("Packets captured on the router");
    capture(&sniffer, &sites.store, &pods[0], &mut act);

    act.opens("A NetworkPolicy is put into etcd: only pods with app=client may reach the database, on one port");
    policies(&etcd, &nodes, &pods, &mut act);

    act.opens("A laptop with a stock wireguard-go joins, while everything runs");
    let peer = join_laptop(&laptop, &etcd, &nodes, &pods, &mut act);

    act.opens("A bad value is put into etcd");
    bad_value(&etcd, &nodes[0], &laptop, &pods, &mut act);
    sniffer.assert_clean();
    drop(peer);

    act.opens("The pods are deleted without residue");
    pods::del(&nodes, &networks, &pods, &etcd, &mut act);

    sites.lab.id().to_owned()
}

/// A machine that is no node, on a network of its own behind the router.
fn laptop(sites: &TwoSites) -> Host {
    let cafe = sites.lab.switch("cafe");
    sites.router.connect(&cafe, &["100.64.7.1/24"]);
    let laptop = sites.lab.host("laptop");
    laptop.connect(&cafe, &["100.64.7.20/24"]);
    laptop.route("default", "via 100.64.7.1");
    laptop
}

fn start_nodes(sites: &TwoSites, etcd: &Etcd, act: &mut Act<'_>) -> Vec<MeshdNode> {
    let started = Instant::now();
    let nodes = sites.start_nodes(etcd, |meshd| meshd);
    for node in &nodes {
        let status = node.await_ready(SOON);
        let subnets: Vec<&str> = status["subnets"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        act.line(format!("{:<6} {:<5} {}", node.name(), text(&status["site"]), subnets.join("  ")));
    }
    act.good(format!("four nodes have their subnets after {:.1} s", started.elapsed().as_secs_f32()));
    nodes
}

fn ping_all(nodes: &[MeshdNode], pods: &[CniPod], act: &mut Act<'_>) {
    let mut answered = 0;
    act.line(format!(
        "{:<12}{}",
        "from \\ to",
        nodes.iter().map(|node| format!("{:>16}", node.name())).collect::<String>()
    ));
    for (from, node) in pods.iter().zip(nodes) {
        let row: Vec<String> = thread::scope(|scope| {
            let cells: Vec<_> = pods
                .iter()
                .map(|to| {
                    let same = to.addresses == from.addresses;
                    scope.spawn(move || (!same).then(|| [to.v4(), to.v6()].map(|address| first_answer(from, address))))
                })
                .collect();
            cells
                .into_iter()
                .map(|cell| cell.join().expect("a ping"))
                .map(|cell| {
                    cell.map_or_else(
                        || "·".to_owned(),
                        |[v4, v6]| {
                            answered += 2;
                            format!("{} / {}", millis(v4), millis(v6))
                        },
                    )
                })
                .collect()
        });
        act.line(format!("{:<12}{}", node.name(), row.iter().map(|cell| format!("{cell:>16}")).collect::<String>()));
    }
    act.good(format!("{answered} of 24 pairs answered (round trips in ms, IPv4 / IPv6)"));
    assert_eq!(answered, 24, "every pair must answer");
}

/// The round trip of the first ping that is answered.
fn first_answer(from: &Namespace, address: std::net::IpAddr) -> Duration {
    await_until(&format!("{} to reach {address}", from.name()), SOON, || {
        let report = Ping::new(address).count(2).wait(Duration::from_secs(1)).run(from);
        report.answers.last().map(|(_, round_trip)| *round_trip)
    })
}

fn await_direct(nodes: &[MeshdNode]) {
    for (node, peer) in [(0, "east2"), (1, "east1"), (2, "west2"), (3, "west1")] {
        nodes[node].await_path(peer, "direct", SOON);
    }
}

fn peers(node: &MeshdNode, act: &mut Act<'_>) {
    act.command(&format!("meshctl peers    (on {})", node.name()));
    for peer in node.peers().as_array().into_iter().flatten() {
        act.line(format!(
            "{:<6} {:<5} {:<11} {}",
            text(&peer["name"]),
            text(&peer["site"]),
            text(&peer["path"]),
            text(&peer["endpoint"])
        ));
    }
}

fn measure(pods: &[CniPod], act: &mut Act<'_>) {
    for (what, from, to) in [("direct     east1 → east2", 0, 1), ("wireguard  east1 → west1", 0, 2)] {
        let to = &pods[to];
        let throughput = Iperf::new(to.v4()).seconds(2).run(&pods[from], to);
        let gigabits = throughput.bits_per_second / 1e9;
        act.good(format!(
            "{what}   TCP {gigabits:>5.2} Gbit/s   ping {} ms",
            millis(first_answer(&pods[from], to.v4()))
        ));
        assert!(gigabits > 0.0, "nothing went through");
    }
}

fn capture(sniffer: &Sniffer, store: &Host, pod: &CniPod, act: &mut Act<'_>) {
    let frames = sniffer.frames();
    assert!(frames > 1000, "the capture holds only {frames} frames");
    sniffer.assert_clean();
    act.good(format!("{frames} frames crossed the router, none with a pod's or overlay address in the clear"));
    // Whether the capture would have noticed: a packet that should not be there.
    let stray = Ping::new(pod.v4()).count(1).wait(Duration::from_millis(200)).run(store);
    assert_eq!(stray.answers.len(), 0, "a pod must be unreachable from outside the mesh");
    let caught = await_until("the capture to show a planted packet", SOON, || {
        Some(sniffer.take_violations().len()).filter(|count| *count > 0)
    });
    act.good(format!(
        "the same capture shows {caught} when a packet to a pod is planted in the clear, and it gets no answer"
    ));
}

/// Who is who while policies are shown: the pods of the nodes, in their order.
const NAMES: [&str; 4] = ["client", "neighbour", "database", "stranger"];
const DATABASE: usize = 2;

fn policies(etcd: &Etcd, nodes: &[MeshdNode], pods: &[CniPod], act: &mut Act<'_>) {
    let cluster: Vec<(&MeshdNode, &CniPod, &str)> =
        nodes.iter().zip(pods).zip(NAMES).map(|((node, pod), name)| (node, pod, name)).collect();
    for (node, pod, name) in &cluster {
        let ips: Vec<Value> = pod.addresses.iter().map(|ip| json!({"ip": ip})).collect();
        let object = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "shop", "name": name, "uid": pods::uid(name), "labels": {"app": name}},
            "spec": {"nodeName": node.name()}, "status": {"phase": "Running", "podIPs": ips}});
        etcd.put(&format!("/meshd/pods/shop/{name}"), &object.to_string());
    }
    let spec = json!({"podSelector": {"matchLabels": {"app": "database"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}], "ports": [{"port": 5432}]}]});
    let policy = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "shop", "name": "database"}, "spec": spec});
    act.command(&format!("etcdctl put /meshd/networkpolicies/shop/database '{{… \"spec\": {spec}}}'"));
    etcd.put("/meshd/networkpolicies/shop/database", &policy.to_string());
    let revision = i64::try_from(etcd.revision()).expect("a revision");
    for node in nodes {
        node.await_status("to enforce the policy", SOON, |status| {
            status["policy"]["revision"].as_i64().is_some_and(|applied| applied >= revision)
        });
    }
    let database = &pods[DATABASE];
    let listeners = [5432, 8080].map(|port| {
        let at = SocketAddr::new(database.v4(), port);
        database.enter(|| TcpListener::bind(at)).unwrap_or_else(|error| panic!("{at}: {error}"))
    });
    for (from, port, allowed) in
        [(0, 5432, true), (0, 8080, false), (1, 5432, false), (3, 5432, false), (DATABASE, 8080, true)]
    {
        let (node, pod, name) = cluster[from];
        let at = SocketAddr::new(database.v4(), port);
        let connects = || pod.enter(|| TcpStream::connect_timeout(&at, Duration::from_millis(800)).is_ok());
        let connected = if allowed {
            await_until(&format!("{name} to reach the database"), SOON, || connects().then_some(true))
        } else {
            connects()
        };
        assert_eq!(connected, allowed, "{name} to port {port} of the database");
        let path = match node.peer(nodes[DATABASE].name()) {
            Some(peer) => text(&peer["path"]).to_owned(),
            None => "its own node".to_owned(),
        };
        let verdict = if allowed { "allowed" } else { "refused" };
        act.line(format!("{name:<10} → database:{port:<5} by {path:<12} {verdict}"));
        let asked = ["policy", "explain", &format!("shop/{name}"), "shop/database", &format!("tcp/{port}")];
        let explained = nodes[DATABASE].meshctl(&asked);
        assert_eq!(explained.code(), Some(if allowed { 0 } else { 6 }), "{}", explained.describe());
        if let Some(why) = explained.stdout.lines().find(|line| line.contains("ingress of")) {
            act.line(format!("{:<10}   {}", "", why.trim()));
        }
    }
    drop(listeners);
    act.good("policies are enforced on tunnel packets after decryption, on direct packets by nftables");
    etcd.del("/meshd/networkpolicies/shop/database");
    for name in NAMES {
        etcd.del(&format!("/meshd/pods/shop/{name}"));
    }
    first_answer(&pods[3], database.v4());
    act.good("without the policy the stranger's ping gets an answer again");
}

fn join_laptop(laptop: &Host, etcd: &Etcd, nodes: &[MeshdNode], pods: &[CniPod], act: &mut Act<'_>) -> WireguardPeer {
    let (private, public) = key_pair(laptop);
    let value = format!(r#"{{"publicKey": "{public}", "allowedIPs": ["{LAPTOP_V4}/32", "{LAPTOP_V6}/128"]}}"#);
    act.command(&format!("etcdctl put /meshd/peers/laptop '{value}'"));
    etcd.put("/meshd/peers/laptop", &value);
    await_until("the laptop among the peers", SOON, || nodes[0].peer("laptop"));
    act.command("meshctl peers config laptop > wg0.conf    (and wg-quick up wg0 on the laptop)");
    let file = nodes[0].meshctl(&["peers", "config", "laptop"]);
    assert!(file.success(), "{}", file.describe());
    let file = file.stdout.replacen("[Interface]", &format!("[Interface]\nPrivateKey = {private}"), 1);
    let wireguard = WireguardPeer::start(
        laptop,
        Implementation::WireguardGo,
        &[&format!("{LAPTOP_V4}/32"), &format!("{LAPTOP_V6}/128")],
    );
    wireguard.setconf(&file);
    for network in ["10.244.0.0/16", "fd42:244::/48"] {
        wireguard.route(network);
    }
    for pod in pods {
        for address in [pod.v4(), pod.v6()] {
            first_answer(laptop, address);
        }
    }
    act.good("the laptop reaches every pod, in IPv4 and IPv6");
    first_answer(&pods[3], LAPTOP_V4.parse().expect("an address"));
    act.good(format!("a pod of {} reaches the laptop", nodes[3].name()));
    wireguard
}

fn bad_value(etcd: &Etcd, node: &MeshdNode, laptop: &Host, pods: &[CniPod], act: &mut Act<'_>) {
    let bad = r#"{"publicKey": "not a key", "allowedIPs": ["10.244.0.0/16"]}"#;
    act.command(&format!("etcdctl put /meshd/peers/laptop '{bad}'"));
    etcd.put("/meshd/peers/laptop", bad);
    let status = node.await_status("to say what is wrong", SOON, |status| {
        status["problems"]
            .as_array()
            .is_some_and(|problems| problems.iter().any(|problem| text(&problem["cause"]).contains("peers/laptop")))
    });
    act.command(&format!("meshctl status    (on {})", node.name()));
    for problem in status["problems"].as_array().into_iter().flatten() {
        act.line(format!("{}: {}", text(&problem["code"]), text(&problem["cause"])));
        act.line(format!("remedy: {}", text(&problem["remedy"])));
    }
    first_answer(laptop, pods[0].v4());
    act.good("the last good value stays in force: the laptop still reaches the pods");
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

fn millis(duration: Duration) -> String {
    format!("{:.2}", duration.as_secs_f64() * 1e3)
}

/// The steps, numbered.
struct Act<'a> {
    style: &'a Style,
    number: usize,
}

impl Act<'_> {
    fn opens(&mut self, title: &str) {
        self.number += 1;
        println!("\n{}", self.style.bold(&format!("{}. {title}", self.number)));
    }

    fn command(&self, command: &str) {
        println!("  {}", self.style.dim(&format!("$ {command}")));
    }

    fn line(&self, line: impl Display) {
        println!("    {line}");
    }

    fn good(&self, line: impl Display) {
        println!("  {} {line}", self.style.good("✓"));
    }
}

/// Colours on a terminal, unless NO_COLOR is set.
struct Style(bool);

impl Style {
    fn new() -> Self {
        use std::io::IsTerminal as _;
        let wanted = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self(wanted && std::io::stdout().is_terminal())
    }

    fn paint(&self, code: u8, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn bold(&self, text: &str) -> String {
        self.paint(1, text)
    }

    fn dim(&self, text: &str) -> String {
        self.paint(2, text)
    }

    fn good(&self, text: &str) -> String {
        self.paint(32, text)
    }

    fn bad(&self, text: &str) -> String {
        self.paint(31, text)
    }
}
