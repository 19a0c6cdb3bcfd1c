//! The package of the previous release is replaced by this one, with containers attached and traffic both ways.
//!
//! ```text
//!   east1: machine with systemd, ─┐
//!   containers db, client, other  ├─ switch ── router ── switch ── west1: a node of this release, pods client and other
//!   outside: no node              ─┘              │
//!                                               etcd
//! ```

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use integration::{
    Etcd, Lab, Machine, Meshd, Namespace, TcpCheck, await_ok, previous,
    topology::{CONFIG, TwoSites},
};
use serde_json::{Value, json};

use crate::{
    SOON,
    debian::{await_running, configure, status},
    package::package,
};

/// Slow enough for a busy machine, fast enough that a gap shows.
const PACE: u64 = 200_000;
const PORT: u16 = 7000;
/// Between two datagrams of one that may not send.
const INTERVAL: Duration = Duration::from_millis(2);

/// `attach COMMAND CONTAINER NAMESPACE`, as a runtime does it.
const ATTACH: &str = r#"
cat > /usr/local/bin/attach <<'.'
#!/bin/bash
echo '{"cniVersion": "1.0.0", "name": "mesh", "type": "meshd-cni"}' |
    CNI_COMMAND=$1 CNI_CONTAINERID=$2 CNI_NETNS=/run/netns/$3 CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin:/usr/lib/cni \
    /opt/cni/bin/meshd-cni
.
chmod +x /usr/local/bin/attach
"#;

struct Container {
    namespace: Namespace,
    addresses: Vec<IpAddr>,
}

impl Container {
    /// Attaches a container of this name.
    #[track_caller]
    fn add(lab: &Lab, machine: &Machine, name: &str) -> Self {
        let namespace = lab.host(name);
        machine.lend(&namespace);
        let printed = machine.sh(&format!("attach ADD {name} {}", file_name(&namespace))).stdout;
        let result: Value = serde_json::from_str(&printed).unwrap();
        let ips = result["ips"].as_array().unwrap().iter();
        let address = |ip: &Value| ip["address"].as_str()?.split('/').next()?.parse().ok();
        Self { namespace: Namespace::clone(&namespace), addresses: ips.filter_map(address).collect() }
    }
}

fn file_name(namespace: &Namespace) -> String {
    namespace.path().file_name().unwrap().to_string_lossy().into_owned()
}

/// Counts what comes to a container, by its source.
struct Listener {
    counts: Arc<Mutex<BTreeMap<IpAddr, u64>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Listener {
    fn start(on: &Namespace, addresses: &[IpAddr]) -> Self {
        let (counts, stop) = (Arc::<Mutex<BTreeMap<IpAddr, u64>>>::default(), Arc::new(AtomicBool::new(false)));
        let threads = addresses.iter().map(|address| {
            let socket = on.enter(|| UdpSocket::bind((*address, PORT))).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let (counts, stop) = (Arc::clone(&counts), Arc::clone(&stop));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Ok((_, from)) = socket.recv_from(&mut [0; 16]) {
                        *counts.lock().unwrap_or_else(PoisonError::into_inner).entry(from.ip()).or_default() += 1;
                    }
                }
            })
        });
        let threads = threads.collect();
        Self { counts, stop, threads }
    }

    fn from(&self, address: &IpAddr) -> u64 {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).get(address).copied().unwrap_or_default()
    }
}

/// Sends datagrams, each of them a new flow, for as long as it lives.
struct Sender {
    sent: Arc<Mutex<u64>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sender {
    fn start(from: &Namespace, to: &[IpAddr]) -> Self {
        let (sent, stop) = (Arc::<Mutex<u64>>::default(), Arc::new(AtomicBool::new(false)));
        let (from, to) = (from.clone(), to.to_vec());
        let (number, stopped) = (Arc::clone(&sent), Arc::clone(&stop));
        let send = move || {
            from.enter(|| {
                while !stopped.load(Ordering::Relaxed) {
                    let sent = to.iter().filter(|to| send_one(**to).is_ok()).count();
                    *number.lock().unwrap_or_else(PoisonError::into_inner) += sent as u64;
                    thread::sleep(INTERVAL);
                }
            });
        };
        Self { sent, stop, thread: Some(thread::spawn(send)) }
    }

    fn sent(&self) -> u64 {
        *self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn send_one(to: IpAddr) -> io::Result<()> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    UdpSocket::bind((any, 0))?.send_to(b"new", (to, PORT)).map(drop)
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// A Pod of this name and of its `app`, and the policy that lets only clients reach the db.
fn put_pod(etcd: &Etcd, name: &str, app: &str, node: &str, addresses: &[IpAddr]) {
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    let pod = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "default", "name": name, "labels": {"app": app}},
        "spec": {"nodeName": node}, "status": {"phase": "Running", "podIPs": ips}});
    etcd.put(&format!("/meshd/pods/default/{name}"), &pod.to_string());
}

fn put_policy(etcd: &Etcd) {
    let policy = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "default", "name": "db"},
        "spec": {"podSelector": {"matchLabels": {"app": "db"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}]}});
    etcd.put("/meshd/networkpolicies/default/db", &policy.to_string());
}

#[track_caller]
fn await_in_force(etcd: &Etcd, status: impl Fn() -> Option<Value>) {
    let revision = i64::try_from(etcd.revision()).unwrap();
    await_ok(&format!("revision {revision} to be in force"), SOON, || {
        let policy = status().ok_or("no status")?["policy"].clone();
        if policy["revision"].as_i64() >= Some(revision) { Ok(()) } else { Err(policy.to_string()) }
    });
}

/// What the daemon and etcd know of containers: container, addresses.
fn attached(machine: &Machine, etcd: &Etcd) -> [Vec<Value>; 2] {
    let listed = machine.sh("curl -s --unix-socket /run/meshd/meshd.sock http://meshd/v1/attachments").stdout;
    let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
    let listed = listed.iter().map(|one| json!([one["containerId"], one["addresses"]])).collect();
    let keys = etcd.get_prefix("/meshd/endpoints/").into_iter();
    let read = |(key, value): (String, String)| {
        let value: Value = serde_json::from_str(&value).unwrap();
        json!([key, value["addresses"]])
    };
    [listed, keys.map(read).collect()]
}

#[test]
fn the_package_of_the_previous_release_is_upgraded_under_traffic_with_containers_attached() {
    let sites = TwoSites::with_hosts("package-upgrade", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let west = Meshd::on(&sites.west.hosts[0], &etcd).site("west").start();
    let machine = Machine::boot(&sites.east.hosts[0], "east-1");
    machine.put(&previous("meshd.deb"), "/root/previous.deb");
    machine.put(package(), "/root/meshd.deb");
    machine.sh("dpkg -i ./previous.deb");
    configure(&machine, &etcd);
    await_running(&machine);
    west.await_ready(SOON);
    machine.sh("meshd install-cni");
    machine.sh(ATTACH);
    let [db, client, other] = ["db", "client", "other"].map(|name| Container::add(&sites.lab, &machine, name));
    let [far_client, far_other] = ["client", "other"].map(|name| west.pod(name));
    for (name, app, container) in [("db", "db", &db), ("client", "client", &client), ("other", "other", &other)] {
        put_pod(&etcd, name, app, "east-1", &container.addresses);
    }
    put_pod(&etcd, "far-client", "client", west.name(), far_client.addresses());
    put_pod(&etcd, "far-other", "other", west.name(), far_other.addresses());
    let outside = sites.lab.host("outside");
    outside.connect(&sites.east.switch, &["192.0.2.66/24", "2001:db8:1::66/64"]);
    for (address, via) in db.addresses.iter().zip([sites.east.v4(0), sites.east.v6(0)]) {
        outside.route(&address.to_string(), &format!("via {via}"));
    }

    // Without a policy every host with an address of the mesh gets there.
    let listener = Listener::start(&db.namespace, &db.addresses);
    let senders = [&other.namespace, &*far_other, &*outside].map(|from| Sender::start(from, &db.addresses));
    let strangers: Vec<IpAddr> = other.addresses.iter().chain(far_other.addresses()).copied().collect();
    await_ok("the others to reach the db without a policy", SOON, || {
        let missing: Vec<_> = strangers.iter().filter(|address| listener.from(address) == 0).collect();
        if missing.is_empty() { Ok(()) } else { Err(format!("nothing from {missing:?}")) }
    });
    put_policy(&etcd);
    await_in_force(&etcd, || status(&machine).ok());
    await_in_force(&etcd, || west.try_json(&["status"]));
    let stream = |from: &Namespace, to: &Namespace, address: &IpAddr| TcpCheck::start(from, to, *address, PACE);
    let streams: Vec<TcpCheck> = (0..2)
        .flat_map(|family| {
            [
                stream(&client.namespace, &db.namespace, &db.addresses[family]),
                stream(&far_client, &db.namespace, &db.addresses[family]),
                stream(&db.namespace, &far_client, &far_client.addresses()[family]),
            ]
        })
        .collect();
    let before = attached(&machine, &etcd);
    assert_eq!(before.each_ref().map(Vec::len), [3, 3], "{before:?}");
    let arrived = listener.counts.lock().unwrap().clone();
    let sent = senders.each_ref().map(Sender::sent);

    let program = machine.sh("sha256sum /usr/bin/meshd").stdout;
    machine.sh("dpkg --force-confold -i ./meshd.deb");
    assert_ne!(machine.sh("sha256sum /usr/bin/meshd").stdout, program);
    let after = await_running(&machine);
    for stream in &streams {
        stream.await_progress(SOON);
    }
    put_policy(&etcd);
    await_in_force(&etcd, || status(&machine).ok());
    assert_eq!(attached(&machine, &etcd), before);
    assert_eq!(after["problems"], json!([]), "{after}");
    for (sender, before) in senders.iter().zip(sent) {
        assert!(sender.sent() > before + 100, "{} datagrams within the upgrade", sender.sent() - before);
    }
    assert_eq!(*listener.counts.lock().unwrap(), arrived, "what no policy allows got through");

    // The new plugin gives out no address that is in use, and frees what the old one gave.
    machine.sh("meshd install-cni");
    let late = Container::add(&sites.lab, &machine, "late");
    let taken: Vec<&IpAddr> = [&db, &client, &other].into_iter().flat_map(|one| &one.addresses).collect();
    assert!(!late.addresses.iter().any(|address| taken.contains(&address)), "{:?} of {taken:?}", late.addresses);
    for stream in streams {
        stream.finish().assert_intact();
    }
    for (name, container) in [("db", &db), ("client", &client), ("other", &other), ("late", &late)] {
        machine.sh(&format!("attach DEL {name} {}", file_name(&container.namespace)));
    }
    await_ok("no container to be attached", SOON, || {
        let left = attached(&machine, &etcd);
        if left.iter().all(Vec::is_empty) { Ok(()) } else { Err(format!("{left:?}")) }
    });
    assert_eq!(*listener.counts.lock().unwrap(), arrived, "what no policy allows got through");
}
