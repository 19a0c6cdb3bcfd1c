//! The race at a pod's start: three senders flood its address from before its ADD, and nothing gets in that policy
//! refuses.
//!
//! ```text
//!   east1 (near, the pod) ─┐
//!                          ├─ switch ── router ── switch ── west1 (far, friend)
//!   east2 (beside) ────────┘               │
//!                                        etcd
//! ```

use std::{
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use integration::{CniPod, CniRuntime, Namespace, Sniffer, await_ok, await_until};
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::{Nodes, SOON, await_in_force};

const PORT: u16 = 5000;
/// Between two datagrams of one flood: many in the time that an ADD takes.
const PAUSE: Duration = Duration::from_micros(300);

/// A mesh with senders, and an address on its first node that pods get one after the other.
pub(crate) struct Race {
    pub(crate) mesh: Nodes,
    /// On the node of the pod, on its site, on another one.
    pub(crate) senders: Vec<CniPod>,
    friend: CniPod,
    pub(crate) wanted: [IpAddr; 2],
}

/// Datagrams to some addresses, until dropped.
pub(crate) struct Flood {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A watch per sender inside a pod's namespace, from before its interface is there.
pub(crate) struct Watch(Vec<Sniffer>);

impl Race {
    pub(crate) fn new(mesh: Nodes) -> Self {
        mesh.nodes[0].await_path("east2", "direct", SOON);
        mesh.nodes[0].await_path("west1", "wireguard", SOON);
        let place = [(0, "near"), (1, "beside"), (2, "far")];
        let senders = place.map(|(node, name)| mesh.nodes[node].cni("1.1.0", &shop(name, "sender")).pod(name)).into();
        let friend = mesh.nodes[2].cni("1.1.0", &shop("friend", "friend")).pod("friend");
        let spec = json!({"podSelector": {"matchLabels": {"app": "db"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "friend"}}}]}]});
        let policy = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": "shop", "name": "db"}, "spec": spec});
        mesh.etcd.put("/meshd/networkpolicies/shop/db", &policy.to_string());
        mesh.await_endpoints(4);
        await_in_force(&mesh);
        let subnets = mesh.nodes[0].subnets();
        let (v4, v6) = (subnets[0].to_string().replace(".0/24", ".77"), subnets[1].to_string().replace("/64", "77"));
        Self { senders, friend, wanted: [v4.parse().unwrap(), v6.parse().unwrap()], mesh }
    }

    /// A network on the first node whose pods get the address.
    pub(crate) fn network(&self, more: &Value) -> CniRuntime {
        let mut more = more.clone();
        more["capabilities"] = json!({"ips": true});
        self.mesh.nodes[0].cni("1.1.0", &more).capability("ips", json!(self.wanted))
    }

    pub(crate) fn flood(&self) -> Vec<Flood> {
        self.senders.iter().map(|sender| Flood::start(sender, self.wanted)).collect()
    }

    pub(crate) fn watch(&self, namespace: &Namespace) -> Watch {
        Watch(
            self.senders
                .iter()
                .map(|sender| {
                    let of: Vec<IpNet> = sender.addresses.iter().map(|address| IpNet::from(*address)).collect();
                    namespace.sniff(&of)
                })
                .collect(),
        )
    }

    /// A pod without a policy: every sender gets through.
    pub(crate) fn open_pod(&self, name: &str) {
        let network = self.network(&shop("open", "open"));
        let namespace = network.namespace(name);
        let watch = self.watch(&namespace);
        network.add(name, &namespace).unwrap_or_else(|failure| panic!("{failure}"));
        watch.await_all();
        network.del(name, Some(&namespace)).unwrap_or_else(|failure| panic!("{failure}"));
        watch.forgive();
    }

    /// A pod with the policy: no sender gets through, ever, and the friend does.
    pub(crate) fn closed_pod(&self, network: &CniRuntime, name: &str) {
        let namespace = network.namespace(name);
        let watch = self.watch(&namespace);
        network.add(name, &namespace).unwrap_or_else(|failure| panic!("{failure}"));
        self.friend_gets_through(&namespace);
        watch.assert_clean();
        network.del(name, Some(&namespace)).unwrap_or_else(|failure| panic!("{failure}"));
    }

    pub(crate) fn friend_gets_through(&self, pod: &Namespace) {
        for address in self.wanted {
            let at = SocketAddr::new(address, 8080);
            let _listener = pod.enter(|| TcpListener::bind(at)).unwrap();
            await_ok(&format!("the friend to reach {at}"), SOON, || {
                let connected = self.friend.enter(|| TcpStream::connect_timeout(&at, Duration::from_secs(1)));
                connected.map(drop).map_err(|error| error.to_string())
            });
        }
    }
}

impl Flood {
    fn start(from: &Namespace, to: [IpAddr; 2]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let sockets = from
            .enter(|| ["0.0.0.0:0", "[::]:0"].map(|any| UdpSocket::bind(any.parse::<SocketAddr>().unwrap()).unwrap()));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for (socket, address) in sockets.iter().zip(to) {
                    // The error of an earlier datagram is returned for a later one.
                    let _ = socket.send_to(b"flood", (address, PORT));
                }
                thread::sleep(PAUSE);
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Watch {
    /// Waits until something of every sender was seen.
    #[track_caller]
    pub(crate) fn await_all(&self) {
        for sniffer in &self.0 {
            await_until("a sender to get through", SOON, || (sniffer.violations() > 0).then_some(()));
        }
    }

    /// Nothing of any sender was seen.
    #[track_caller]
    pub(crate) fn assert_clean(self) {
        for sniffer in &self.0 {
            sniffer.assert_clean();
        }
    }

    /// What was seen was to be.
    pub(crate) fn forgive(self) {
        for sniffer in &self.0 {
            let _ = sniffer.take_violations();
        }
    }
}

/// Whom the plugin's configuration speaks of.
pub(crate) fn shop(name: &str, app: &str) -> Value {
    json!({"pod": {"namespace": "shop", "name": name, "labels": {"app": app}}})
}

/// `CNI_ARGS` of Kubernetes.
fn kubernetes(network: CniRuntime, name: &str) -> CniRuntime {
    network.args(&format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name};K8S_POD_UID=u-{name}"))
}

fn pod_object(name: &str, app: &str) -> String {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "shop", "name": name, "uid": format!("u-{name}"), "labels": {"app": app}},
        "spec": {"nodeName": "east1"}, "status": {"phase": "Pending"}})
    .to_string()
}

#[test]
fn nothing_that_policy_refuses_gets_in_from_the_first_packet_on() {
    let race = Race::new(Nodes::start("cni-race", 2, 1));
    let _floods = race.flood();
    for round in 0..4 {
        // The address was another one's, who let everyone in.
        race.open_pod(&format!("open{round}"));
        race.closed_pod(&race.network(&shop("db", "db")), &format!("db{round}"));
    }
    // Labels that Kubernetes knows.
    race.mesh.etcd.put("/meshd/pods/shop/db-0", &pod_object("db-0", "db"));
    await_in_force(&race.mesh);
    race.open_pod("open-k8s");
    race.closed_pod(&kubernetes(race.network(&json!({})), "db-0"), "k8s");

    // While etcd is away: attachments cannot be read there.
    race.mesh.etcd.stop();
    for round in 0..2 {
        race.open_pod(&format!("open-alone{round}"));
        race.closed_pod(&race.network(&shop("db", "db")), &format!("db-alone{round}"));
    }
    race.mesh.etcd.start_again();
    race.mesh.etcd.await_ready();
    race.mesh.await_endpoints(4);
}

#[test]
fn a_pod_whose_labels_nobody_knows_yet_is_closed_until_somebody_does() {
    let race = Race::new(Nodes::start("cni-race-unknown", 2, 1));
    let _floods = race.flood();
    race.open_pod("open");
    let network = kubernetes(race.network(&json!({})), "web-0");
    let namespace = network.namespace("web");
    let watch = race.watch(&namespace);
    network.add("web", &namespace).unwrap_or_else(|failure| panic!("{failure}"));
    // The node's own processes are never judged: the pod is there.
    for address in race.wanted {
        crate::await_reaches_address(race.mesh.nodes[0].host(), address);
    }
    watch.assert_clean();
    let watch = race.watch(&namespace);
    race.mesh.etcd.put("/meshd/pods/shop/web-0", &pod_object("web-0", "web"));
    watch.await_all();
    network.del("web", Some(&namespace)).unwrap_or_else(|failure| panic!("{failure}"));
    watch.forgive();
}

#[test]
fn del_withdraws_rules_flows_and_record() {
    let race = Race::new(Nodes::start("cni-race-del", 2, 1));
    let host = race.mesh.nodes[0].host();
    let network = race.network(&shop("db", "db"));
    let pod = network.pod("db");
    race.mesh.await_endpoints(5);
    // The pod asks: answers come as replies in its flow.
    let asked = race.senders[1].enter(|| UdpSocket::bind(SocketAddr::new(race.senders[1].v4(), PORT))).unwrap();
    let socket = pod.enter(|| UdpSocket::bind(SocketAddr::new(race.wanted[0], PORT))).unwrap();
    asked.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let from = await_ok("the pod's question to arrive", SOON, || {
        socket.send_to(b"question", asked.local_addr().unwrap()).unwrap();
        asked.recv_from(&mut [0; 16]).map(|(_, from)| from).map_err(|error| error.to_string())
    });
    let v4 = race.wanted[0].to_string();
    let flows = || host.try_run(&["conntrack", "-L", "-p", "udp"]).stdout;
    let rules = || host.run("nft list table inet meshd_policy").stdout;
    assert!(flows().contains(&v4), "{}", flows());
    assert!(rules().contains(&v4), "{}", rules());
    let _answers = {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let _ = asked.send_to(b"answer", from);
                thread::sleep(PAUSE);
            }
        });
        Flood { stop, thread: Some(thread) }
    };
    network.del("db", Some(&pod)).unwrap_or_else(|failure| panic!("{failure}"));
    drop(socket);
    await_ok("rules and flows to be gone", SOON, || {
        let (flows, rules) = (flows(), rules());
        if flows.contains(&v4) || rules.contains(&v4) { Err(format!("{flows}\n{rules}")) } else { Ok(()) }
    });
    race.mesh.await_endpoints(4);
    // What was an answer for the one before is a stranger's for the next one.
    race.closed_pod(&network, "next");
}
