//! How fast pods come and go: 2,000 pairs of ADD and DEL on one node, 8 at a time and then a few one by one. Beside
//! each pair, under the same load: what host-local takes for its addresses, and a bare `ip link delete`.
//!
//! ```text
//!   east1 (pods) ── switch ── router ── etcd
//! ```

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use integration::{CniRuntime, Meshd, MeshdNode, Namespace, binary, topology::CONFIG, topology::TwoSites};
use serde_json::json;

const PAIRS: usize = 2000;
const AT_ONCE: usize = 8;
const ONE_BY_ONE: usize = 200;
const STARTS: usize = 200;

/// What one pair took.
struct Pair {
    add: Duration,
    del: Duration,
    delegate_add: Duration,
    delegate_del: Duration,
    bare: Duration,
    /// The same once more: how far two deletions of the same kind differ.
    bare_again: Duration,
}

/// Who makes the pairs.
struct Bench<'a> {
    node: &'a MeshdNode,
    network: CniRuntime,
    /// host-local alone, with a folder of its own: what addresses cost without a daemon.
    addresses: CniRuntime,
}

fn main() {
    // `PAIRS=200` for a look; `cargo bench` hands its own words on as arguments.
    let pairs = env::var("PAIRS").ok().and_then(|text| text.parse().ok()).unwrap_or(PAIRS);
    let plugin = plugin();
    println!("| what | figure |\n|---|---|");
    start_time(&plugin);
    let sites = TwoSites::with_hosts("bench-cni", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let node = Meshd::on(&sites.east.hosts[0], &etcd).site("east").start();
    node.await_ready(Duration::from_secs(60));
    let ranges: Vec<_> = node.subnets().iter().map(|subnet| json!([{"subnet": subnet}])).collect();
    let ipam = json!({"type": "host-local", "dataDir": node.run_dir().join("bare-ipam"), "ranges": ranges});
    let alone = [json!({"type": "host-local", "ipam": ipam})];
    let folder = plugin.parent().unwrap_or_else(|| Path::new("/"));
    let bench = Bench {
        network: node.cni("1.0.0", &json!({})).plugins_from(folder),
        addresses: CniRuntime::new(node.host(), "1.0.0", &alone),
        node: &node,
    };
    // The daemon is warm.
    bench.run(1, 20);
    bench.report(AT_ONCE, pairs);
    if pairs > ONE_BY_ONE {
        bench.report(1, ONE_BY_ONE);
    }
    let left = node.pod_addresses().len();
    let attached = cni::daemon::DaemonClient::new(node.run_dir()).attachments().map_or(0, |left| left.len());
    let links = node.host().run("ip -brief link").stdout.lines().filter(|line| line.starts_with("mesh")).count();
    println!("| addresses, attachments and interfaces that are left | {left}, {attached}, {links} |");
    assert_eq!((left, attached, links), (0, 0, 0), "something leaked");
}

/// The plugin in its own build profile, where that was built: `cargo build --profile cni -p cni`.
fn plugin() -> PathBuf {
    let own = binary("meshd-cni");
    let target = own.parent().and_then(Path::parent).unwrap_or_else(|| Path::new("/"));
    let small = target.join("cni/meshd-cni");
    if small.is_file() { small } else { own }
}

fn start_time(plugin: &Path) {
    let mut times: Vec<Duration> = (0..STARTS)
        .map(|_| {
            let begin = Instant::now();
            let mut command = Command::new(plugin);
            command.env("CNI_COMMAND", "VERSION").stdin(Stdio::null()).stdout(Stdio::null());
            let status = command.status().unwrap_or_else(|error| panic!("{}: {error}", plugin.display()));
            assert!(status.success(), "{}", plugin.display());
            begin.elapsed()
        })
        .collect();
    times.sort();
    let profile = plugin.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let size = fs::metadata(plugin).map_or(0, |data| data.len()) as f64 / 1e6;
    println!("| `meshd-cni`, profile {profile}: size; start to end of VERSION: median, p99 | {size:.2} MB; {} |", {
        let at = |share| millis(quantile(&times, share));
        format!("{}, {}", at(0.5), at(0.99))
    });
}

impl Bench<'_> {
    /// Makes pairs, `at_once` at a time; how long that took, and what each took.
    fn run(&self, at_once: usize, pairs: usize) -> (Duration, Vec<Pair>) {
        let namespaces: Vec<Namespace> =
            (0..at_once).map(|i| self.network.namespace(&format!("n{at_once}-{pairs}-{i}"))).collect();
        let (next, measured) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(pairs)));
        let begin = Instant::now();
        thread::scope(|scope| {
            for (worker, namespace) in namespaces.iter().enumerate() {
                let (next, measured) = (&next, &measured);
                scope.spawn(move || {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= pairs {
                            return;
                        }
                        let pair = self.pair(namespace, worker, &format!("p{at_once}-{pairs}-{number}"));
                        measured.lock().unwrap_or_else(PoisonError::into_inner).push(pair);
                    }
                });
            }
        });
        (begin.elapsed(), measured.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn report(&self, at_once: usize, pairs: usize) {
        let (elapsed, measured) = self.run(at_once, pairs);
        let beside: Duration =
            measured.iter().map(|pair| pair.bare + pair.bare_again + pair.delegate_add + pair.delegate_del).sum();
        let own = elapsed.as_secs_f64() - beside.as_secs_f64() / at_once as f64;
        println!("| {pairs} pairs of ADD and DEL, {at_once} at a time: rate | {:.1} /s |", pairs as f64 / own);
        let p99 = |of: &dyn Fn(&Pair) -> Duration| {
            let mut times: Vec<Duration> = measured.iter().map(of).collect();
            times.sort();
            quantile(&times, 0.99)
        };
        let row = |what: &str, of: &dyn Fn(&Pair) -> Duration| {
            let mut times: Vec<Duration> = measured.iter().map(of).collect();
            times.sort();
            let [median, p99, worst] = [0.5, 0.99, 1.0].map(|share| millis(quantile(&times, share)));
            println!("| {at_once} at a time, {what}: median, p99, worst | {median}, {p99}, {worst} |");
        };
        row("ADD", &|pair| pair.add);
        row("ADD of host-local alone", &|pair| pair.delegate_add);
        row("DEL", &|pair| pair.del);
        row("DEL of host-local alone", &|pair| pair.delegate_del);
        row("a bare `ip link delete` of a veth pair", &|pair| pair.bare);
        row("DEL beyond that", &|pair| pair.del.saturating_sub(pair.bare));
        row("a second bare deletion beyond the first", &|pair| pair.bare_again.saturating_sub(pair.bare));
        // A deletion waits for the kernel's grace periods, now longer and now shorter: what differs from pair to pair
        // is mostly that, so the tails are compared as well.
        let less = p99(&|pair| pair.del).saturating_sub(p99(&|pair| pair.bare));
        println!("| {at_once} at a time, p99 of DEL less p99 of a bare one | {} |", millis(less));
    }

    fn pair(&self, namespace: &Namespace, worker: usize, name: &str) -> Pair {
        let timed = |work: &dyn Fn()| {
            let begin = Instant::now();
            work();
            begin.elapsed()
        };
        let add = |network: &CniRuntime| {
            timed(&|| drop(network.add(name, namespace).unwrap_or_else(|failure| panic!("ADD: {failure}"))))
        };
        let del = |network: &CniRuntime| {
            timed(&|| network.del(name, Some(namespace)).unwrap_or_else(|failure| panic!("DEL: {failure}")))
        };
        let (own_add, own_del) = (add(&self.network), del(&self.network));
        let (delegate_add, delegate_del) = (add(&self.addresses), del(&self.addresses));
        let host = self.node.host();
        let veth = format!("bare{worker}");
        // Both ends are up, as a pod's are: the kernel waits longer to take those down.
        let bare = || {
            host.ip(&[&format!("link add {veth} up type veth peer name eth0 netns {}", namespace.path().display())]);
            namespace.run_args(&["ip", "link", "set", "eth0", "up"]);
            timed(&|| drop(host.run(&format!("ip link delete {veth}"))))
        };
        Pair { add: own_add, del: own_del, delegate_add, delegate_del, bare: bare(), bare_again: bare() }
    }
}

fn quantile(sorted: &[Duration], share: f64) -> Duration {
    let at = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or_default()
}

fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}
