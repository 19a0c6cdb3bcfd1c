//! Kubernetes at scale: `meshd-sync` with 100,000 pods, policies on 20 nodes, etcd with 200 watchers.
//!
//! ```text
//!   cp: API server, its etcd, the mesh's etcd, two meshd-sync ── switch ── n1 … n20 (meshd, each with a pod)
//! ```
//!
//! Objects are written by `curl`, as `kubectl` would write them: no kubelets run. `BENCH_QUICK=1` takes a hundredth of the
//! objects and a quarter of the nodes.

use std::{
    env,
    fmt::Write as _,
    fs, io,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use etcd_client::{Client, WatchOptions};
use integration::{
    Etcd, EtcdWriter, Host, KubernetesApi, Lab, Meshd, MeshdNode, Process, await_until, binary,
    measure::{Comparison, Machine, Series, process_cpu, resident_bytes},
};
use serde_json::{Value, json};
use tokio::{runtime::Builder, sync::mpsc};

const SUBJECT: &str = "meshd-sync";
const SOON: Duration = Duration::from_secs(120);
/// For all objects to be there.
const LONG: Duration = Duration::from_secs(1800);
const CONFIG: &str = r#"{"Network": "10.64.0.0/10", "SubnetLen": 24, "Backend": {"Type": "wireguard"}}"#;
/// Processes of curl at once.
const WRITERS: usize = 6;
/// Objects in each namespace.
const IN_NAMESPACE: usize = 100;

struct Sizes {
    pods: usize,
    policies: usize,
    nodes: usize,
    changes: usize,
    watchers: usize,
}

/// A request to the API server.
struct Request {
    method: &'static str,
    path: String,
    body: Value,
}

struct Bed {
    host: Host,
    api: KubernetesApi,
    etcd: Etcd,
    nodes: Vec<MeshdNode>,
    /// Files of curl's requests.
    folder: PathBuf,
    _lab: Lab,
}

fn main() {
    let quick = env::var("BENCH_QUICK").is_ok_and(|value| !value.is_empty() && value != "0");
    let sizes = if quick {
        Sizes { pods: 1000, policies: 100, nodes: 5, changes: 20, watchers: 20 }
    } else {
        Sizes { pods: 100_000, policies: 10_000, nodes: 20, changes: 200, watchers: 200 }
    };
    let machine = Machine::this();
    println!("{}\n", machine.line());
    let title = format!("{} pods, {} policies, {} nodes", sizes.pods, sizes.policies, sizes.nodes);
    let mut figures = Comparison::new("kubernetes", &title);
    figures.note(
        "API server, both etcds, meshd-sync and the nodes share this machine's cores. In force means that a node's status \
         says so of the revision at which the policy is in etcd.",
    );
    let mut bed = Bed::start(sizes.nodes);
    policies_on_all_nodes(&bed, sizes.changes, &mut figures);
    // The rest is about meshd-sync and etcd.
    bed.nodes.clear();
    copy_at_scale(&bed, &sizes, &mut figures);
    fan_out(&bed, sizes.watchers, &mut figures);
    println!("{figures}");
    match figures.write_json(&machine, &[format!("meshd: {}", env!("CARGO_PKG_VERSION"))]) {
        Ok(path) => println!("All values: {}", path.display()),
        Err(error) => eprintln!("cannot write the values: {error}"),
    }
}

impl Bed {
    fn start(nodes: usize) -> Self {
        let lab = Lab::new("kubernetes-bench");
        let (host, lan) = (lab.host("cp"), lab.switch("lan"));
        host.connect(&lan, &["192.0.2.10/24"]);
        host.run("ip route add default via 192.0.2.1");
        let etcd = Etcd::start(&host, &["192.0.2.10"], 1);
        etcd.put("/meshd/config", CONFIG);
        let api = KubernetesApi::start(&host);
        let nodes: Vec<MeshdNode> = (0..nodes)
            .map(|number| {
                let host = lab.host(&format!("n{number}"));
                host.connect(&lan, &[&format!("192.0.2.{}/24", 20 + number)]);
                host.run("ip route add default via 192.0.2.1");
                Meshd::on(&host, &etcd).site("east").start()
            })
            .collect();
        nodes.iter().for_each(|node| drop(node.await_ready(SOON)));
        let folder = lab.folder().join("requests");
        fs::create_dir(&folder).expect("a folder for requests");
        Self { host, api, etcd, nodes, folder, _lab: lab }
    }

    fn sync(&self) -> Process {
        let kubeconfig = self.api.kubeconfig().display().to_string();
        let args = ["--cluster", "east", "--kubeconfig", &kubeconfig, "--etcd-endpoints", "http://127.0.0.1:2379"];
        self.host.spawn(binary("meshd-sync").to_string_lossy().into_owned(), &args)
    }

    /// Sends all requests, by several connections.
    fn send(&self, requests: &[Request]) {
        let authority = self.api.kubeconfig().with_file_name("ca.pem").display().to_string();
        let parts = requests.chunks(requests.len().div_ceil(WRITERS).max(1)).enumerate();
        let writers: Vec<Process> = parts
            .map(|(number, part)| {
                let mut text = String::new();
                for (at, Request { method, path, body }) in part.iter().enumerate() {
                    let next = if at == 0 { "" } else { "next\n" };
                    let kind = if *method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
                    let _ = writeln!(
                        text,
                        "{next}url = \"https://127.0.0.1:6443{path}\"\nrequest = {method}\nheader = \"Authorization: Bearer admin-token\"\n\
                         header = \"Content-Type: {kind}\"\ncacert = {authority}\noutput = /dev/null\nfail\nsilent\nshow-error\n\
                         data = {:?}",
                        body.to_string()
                    );
                }
                let file = self.folder.join(number.to_string());
                fs::write(&file, text).expect("a file of requests");
                self.host.spawn("curl", &["-K", &file.display().to_string()])
            })
            .collect();
        for writer in &writers {
            let status = await_until("requests to be answered", LONG, || writer.exit_status());
            assert!(status.success(), "{}", writer.log());
        }
    }

    /// How many objects of a kind the copy has, as its state says; `None` while it is not complete.
    fn copied(&self, kind: &str) -> Option<u64> {
        let state: Value = serde_json::from_str(&self.etcd.get("/meshd/k8s/east/state")?).ok()?;
        state["counts"][kind].as_u64()
    }
}

fn namespace(number: usize) -> Request {
    let name = format!("ns-{number}");
    let body = json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "labels": {"team": format!("t{}", number % 50)}}});
    Request { method: "POST", path: "/api/v1/namespaces".to_owned(), body }
}

fn pod(number: usize) -> Request {
    let namespace = format!("ns-{}", number / IN_NAMESPACE);
    let body = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("pod-{number}"), "labels": {"app": format!("app-{}", number % 10), "tier": "backend"}},
        "spec": {"nodeName": format!("n{}", number % 500), "containers": [{"name": "main", "image": "registry.example/app:1",
            "ports": [{"name": "http", "containerPort": 8080}]}]}});
    Request { method: "POST", path: format!("/api/v1/namespaces/{namespace}/pods"), body }
}

fn policy(namespace: &str, name: &str, app: usize) -> Request {
    let select = |app: usize| json!({"matchLabels": {"app": format!("app-{}", app % 10)}});
    let body = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name},
        "spec": {"podSelector": select(app), "ingress": [{"from": [{"podSelector": select(app + 1)}],
            "ports": [{"port": "http"}]}]}});
    Request { method: "POST", path: format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies"), body }
}

/// From the request to the API server until every node enforces the policy.
fn policies_on_all_nodes(bed: &Bed, changes: usize, figures: &mut Comparison) {
    let sync = bed.sync();
    sync.await_log("leading", SOON);
    bed.send(&[namespace(0)]);
    await_until("the namespace to be copied", SOON, || bed.etcd.get("/meshd/k8s/east/namespaces/ns-0"));
    let (mut all, mut kubectl) = (Series::default(), Series::default());
    for number in 0..changes {
        let name = format!("np-{number}");
        let start = Instant::now();
        // As a user would, one time in ten; starting kubectl takes longer than all the rest.
        let by_kubectl = number.is_multiple_of(10);
        let request = policy("ns-0", &name, number);
        if by_kubectl {
            let mut object = request.body.clone();
            object["metadata"]["namespace"] = "ns-0".into();
            bed.api.apply(&object.to_string());
        } else {
            bed.send(&[request]);
        }
        let key = format!("/meshd/k8s/east/networkpolicies/ns-0/{name}");
        await_until("the policy to be copied", SOON, || bed.etcd.get(&key));
        // At this revision or before it.
        let revision = bed.etcd.revision();
        for node in &bed.nodes {
            await_until("the policy to be in force", SOON, || node.policy_revision().filter(|is| *is >= revision));
        }
        let took = start.elapsed().as_secs_f64() * 1e3;
        if by_kubectl { kubectl.push(took) } else { all.push(took) }
    }
    // In order, so that the next leader need not wait for its lease.
    assert!(sync.term(SOON).success());
    for (name, series) in [("API request", &all), ("kubectl apply", &kubectl)] {
        for (share, part) in [("p50", 0.5), ("p99", 0.99), ("worst", 1.0)] {
            let metric = format!("policy, {name} until in force on all nodes, {share}, ms");
            figures.lower(SUBJECT, &metric, series.quantile(part));
        }
    }
}

fn copy_at_scale(bed: &Bed, sizes: &Sizes, figures: &mut Comparison) {
    let namespaces = sizes.pods / IN_NAMESPACE;
    bed.send(&(1..namespaces).map(namespace).collect::<Vec<_>>());
    bed.send(&(0..sizes.pods).map(pod).collect::<Vec<_>>());
    let policies =
        (0..sizes.policies).map(|number| policy(&format!("ns-{}", number % namespaces), &format!("p{number}"), number));
    bed.send(&policies.collect::<Vec<_>>());

    let [leader, other] = [bed.sync(), bed.sync()];
    let start = Instant::now();
    let all = u64::try_from(sizes.pods).unwrap_or(u64::MAX);
    await_until("all pods to be copied", LONG, || bed.copied("pods").filter(|count| *count >= all));
    figures.lower(SUBJECT, "first copy of all objects, s", start.elapsed().as_secs_f64());
    let (leader, other) = if leader.log().contains("leading") { (leader, other) } else { (other, leader) };
    let megabytes = |process: &Process| resident_bytes(process.pid()) as f64 / 1e6;
    figures.lower(SUBJECT, "RSS after the first copy, MB", megabytes(&leader));

    // A hundred labels changed in a second.
    let (turns, pace) = (30, Duration::from_secs(1));
    let (begin, before) = (Instant::now(), process_cpu(leader.pid()));
    for turn in 0..turns {
        thread::sleep((begin + pace * turn).saturating_duration_since(Instant::now()));
        let changed = (0..100).map(|number| {
            let number = (turn as usize * 100 + number) * 7 % sizes.pods;
            let (namespace, label) = (number / IN_NAMESPACE, format!("r{turn}"));
            let path = format!("/api/v1/namespaces/ns-{namespace}/pods/pod-{number}");
            Request { method: "PATCH", path, body: json!({"metadata": {"labels": {"revision": label}}}) }
        });
        bed.send(&changed.collect::<Vec<_>>());
    }
    let share = (process_cpu(leader.pid()) - before).as_secs_f64() / begin.elapsed().as_secs_f64() * 100.0;
    figures.lower(SUBJECT, "CPU while 100 pods change in a second, % of a core", share);
    figures.lower(SUBJECT, "RSS after it, MB", megabytes(&leader));

    let copied = bed.etcd.get_prefix("/meshd/k8s/east/pods/").len();
    let start = Instant::now();
    leader.kill9();
    other.await_log("leading", SOON);
    figures.lower(SUBJECT, "killed until another leads, s", start.elapsed().as_secs_f64());
    // What was written while none led.
    bed.send(&[policy("ns-0", "after", 1)]);
    let key = "/meshd/k8s/east/networkpolicies/ns-0/after";
    await_until("the copy to go on", LONG, || bed.etcd.get(key));
    figures.lower(SUBJECT, "killed until the copy goes on, s", start.elapsed().as_secs_f64());
    figures.lower(SUBJECT, "RSS of the next leader, MB", megabytes(&other));
    assert_eq!(bed.etcd.get_prefix("/meshd/k8s/east/pods/").len(), copied, "nothing is lost");
}

/// What one changed key costs etcd, with each node watching everything.
fn fan_out(bed: &Bed, watchers: usize, figures: &mut Comparison) {
    const PUTS: usize = 1000;
    let value = "x".repeat(250);
    let mut writer = EtcdWriter::connect(&bed.etcd, &bed.host);
    let endpoint = bed.etcd.endpoints();
    let (seen_in, mut seen) = mpsc::unbounded_channel::<Instant>();
    let (stop_in, stop) = std::sync::mpsc::channel::<()>();
    thread::scope(|scope| {
        let host = &bed.host;
        scope.spawn(move || {
            let watched = host.enter(move || -> io::Result<()> {
                let runtime = Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(async {
                    for _ in 0..watchers {
                        let mut client = Client::connect([endpoint.clone()], None).await.map_err(io::Error::other)?;
                        let options = WatchOptions::new().with_prefix();
                        let mut stream = client.watch("/fan-out/", Some(options)).await.map_err(io::Error::other)?;
                        let seen = seen_in.clone();
                        tokio::spawn(async move {
                            let _client = client;
                            while let Ok(Some(message)) = stream.message().await {
                                for _ in message.events() {
                                    let _ = seen.send(Instant::now());
                                }
                            }
                        });
                    }
                    // The first says that all watch.
                    let _ = seen_in.send(Instant::now());
                    while stop.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    Ok(())
                })
            });
            watched.expect("watchers of etcd");
        });
        seen.blocking_recv();
        let (begin, before) = (Instant::now(), bed.etcd.cpu());
        let mut delays = Series::default();
        for number in 0..PUTS {
            thread::sleep(
                (begin + Duration::from_millis(10) * number as u32).saturating_duration_since(Instant::now()),
            );
            let start = Instant::now();
            writer.put_all(&[(format!("/fan-out/{}", number % 100), value.clone())]);
            for _ in 0..watchers {
                seen.blocking_recv();
            }
            delays.push(start.elapsed().as_secs_f64() * 1e3);
        }
        let cpu = (bed.etcd.cpu() - before).as_secs_f64();
        figures.lower("etcd", &format!("put until all {watchers} watchers have it, median, ms"), delays.median());
        figures.lower("etcd", "the same, p99, ms", delays.quantile(0.99));
        figures.lower("etcd", "CPU of one event at one watcher, us", cpu * 1e6 / (PUTS * watchers) as f64);
        let _ = stop_in.send(());
    });
}
