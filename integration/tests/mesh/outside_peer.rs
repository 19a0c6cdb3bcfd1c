//! What the scenarios with outside WireGuard peers share: a machine elsewhere, and the way an operator adds it.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use integration::{
    Host, Implementation, Interface, Namespace, WireguardPeer, await_ok, key_pair, ping,
    topology::{Mesh, TwoSites},
};
use serde_json::{Value, json};

use crate::SOON;

/// ```text
///   router ──╢ abroad ╟──┬── outside1 (.11)
///         .1             └── outside2 (.12), …       100.65.0.0/24, 2001:db8:9::/64
/// ```
pub(crate) struct Abroad {
    pub(crate) hosts: Vec<Host>,
    pub(crate) interfaces: Vec<Interface>,
}

/// Adds a network abroad with this many hosts.
pub(crate) fn add_abroad(sites: &TwoSites, hosts: u8) -> Abroad {
    let switch = sites.lab.switch("abroad");
    sites.router.connect(&switch, &["100.65.0.1/24", "2001:db8:9::1/64"]);
    let mut abroad = Abroad { hosts: Vec::new(), interfaces: Vec::new() };
    for number in 1..=hosts {
        let host = sites.lab.host(&format!("outside{number}"));
        let at = 10 + number;
        abroad.interfaces.push(host.connect(&switch, &[&format!("100.65.0.{at}/24"), &format!("2001:db8:9::{at}/64")]));
        host.route("default", "via 100.65.0.1");
        host.route("default", "via 2001:db8:9::1");
        abroad.hosts.push(host);
    }
    abroad
}

/// An external peer: its record in etcd and its program.
pub(crate) struct OutsidePeer {
    pub(crate) name: String,
    pub(crate) host: Host,
    pub(crate) private_key: String,
    pub(crate) public_key: String,
    /// Its own addresses: 10.9.0.N and fd09::N.
    pub(crate) v4: IpAddr,
    pub(crate) v6: IpAddr,
    pub(crate) wg: WireguardPeer,
}

impl OutsidePeer {
    /// Puts `peers/NAME` (`more` adds fields), and starts the program with the file that `meshctl peers config` prints.
    pub(crate) fn join(
        mesh: &Mesh,
        host: &Host,
        implementation: Implementation,
        name: &str,
        number: u8,
        more: &Value,
    ) -> Self {
        let (private_key, public_key) = key_pair(host);
        let addresses = [format!("10.9.0.{number}/32"), format!("fd09::{number}/128")];
        mesh.etcd.put(&format!("/meshd/peers/{name}"), &record(&public_key, &addresses, more));
        await_known(mesh, name);
        let file = config(mesh, name, &private_key, more["presharedKey"].as_str());
        let address = values(&file, "Address").concat();
        assert_eq!(address, addresses, "{file}");
        let wg = WireguardPeer::start(host, implementation, &[&addresses[0], &addresses[1]]);
        wg.setconf(&file);
        for net in values(&file, "AllowedIPs").concat() {
            wg.route(&net);
        }
        let own = |text: &str| text.split('/').next().unwrap().parse().unwrap();
        let (v4, v6) = (own(&addresses[0]), own(&addresses[1]));
        Self { name: name.to_owned(), host: host.clone(), private_key, public_key, v4, v6, wg }
    }

    /// Calls a node at this underlay address.
    pub(crate) fn call(&self, mesh: &Mesh, node: &str, at: &str) {
        let at = if at.contains(':') { format!("[{at}]") } else { at.to_owned() };
        self.wg.set(&format!("peer {} endpoint {at}:51820", node_key(mesh, node)));
    }

    /// Lets the peer believe that these addresses, too, are behind the node with this key.
    pub(crate) fn allow_more(&self, key: &str, addresses: &[IpAddr]) {
        let text = self.wg.show("allowed-ips");
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        let mut allowed: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        allowed.extend(addresses.iter().map(ToString::to_string));
        self.wg.set(&format!("peer {key} allowed-ips {}", allowed.join(",")));
    }

    /// Where it thinks that the node is.
    pub(crate) fn endpoint(&self, mesh: &Mesh, node: &str) -> String {
        let key = node_key(mesh, node);
        let text = self.wg.show("endpoints");
        text.lines().find_map(|line| line.strip_prefix(&key)).unwrap_or_default().trim().to_owned()
    }

    /// Waits until it reaches these addresses.
    #[track_caller]
    pub(crate) fn await_reaches(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        for address in addresses {
            await_reaches(&self.host, address);
        }
    }
}

/// The WireGuard key of a node.
pub(crate) fn node_key(mesh: &Mesh, node: &str) -> String {
    let id = mesh.node(node).status()["id"].as_str().unwrap().to_owned();
    let record: Value = serde_json::from_str(&mesh.etcd.get(&format!("/meshd/nodes/{id}")).unwrap()).unwrap();
    record["publicKey"].as_str().unwrap().to_owned()
}

/// The value of `peers/NAME`.
pub(crate) fn record(public_key: &str, addresses: &[String], more: &Value) -> String {
    let mut record = json!({"publicKey": public_key, "allowedIPs": addresses});
    for (key, value) in more.as_object().into_iter().flatten() {
        record[key] = value.clone();
    }
    record.to_string()
}

/// Waits until every node has the external peer in its tunnel.
#[track_caller]
pub(crate) fn await_known(mesh: &Mesh, name: &str) {
    for node in &mesh.nodes {
        node.await_path(name, "wireguard", SOON);
    }
}

/// What `meshctl peers config NAME` prints at the first node, completed as an operator does it: with the keys that
/// only the peer has.
#[track_caller]
pub(crate) fn config(mesh: &Mesh, name: &str, private_key: &str, preshared_key: Option<&str>) -> String {
    await_ok("a file with every node as a peer", SOON, || {
        let output = mesh.nodes[0].meshctl(&["peers", "config", name]);
        let complete = output.success() && output.stdout.matches("[Peer]").count() == mesh.nodes.len();
        if !complete {
            return Err(output.describe());
        }
        let file = output.stdout.replace("[Interface]\n", &format!("[Interface]\nPrivateKey = {private_key}\n"));
        Ok(match preshared_key {
            Some(key) => file.replace("[Peer]\n", &format!("[Peer]\nPresharedKey = {key}\n")),
            None => file,
        })
    })
}

/// The lists behind each `key =` of the file.
fn values(file: &str, key: &str) -> Vec<Vec<String>> {
    file.lines()
        .filter_map(|line| line.strip_prefix(key)?.trim().strip_prefix('='))
        .map(|list| list.split(',').map(|item| item.trim().to_owned()).collect())
        .collect()
}

/// Waits until an echo comes back.
#[track_caller]
pub(crate) fn await_reaches(from: &Namespace, address: IpAddr) {
    await_ok(&format!("{} to reach {address}", from.name()), SOON, || {
        let report = ping(from, address);
        if report.answers.is_empty() { Err(report.text) } else { Ok(()) }
    });
}

/// Connects by TCP and returns the address that the server sees.
#[track_caller]
pub(crate) fn seen_as(from: &Namespace, to: &Namespace, address: IpAddr) -> IpAddr {
    let listener = to.enter(|| TcpListener::bind((address, 0))).unwrap();
    let target: SocketAddr = listener.local_addr().unwrap();
    let _client = from.enter(|| TcpStream::connect_timeout(&target, SOON)).unwrap();
    listener.accept().unwrap().1.ip()
}

/// How many packets the node has dropped for this reason.
pub(crate) fn drops(status: &Value, reason: &str) -> u64 {
    let counts = status["drops"].as_array().into_iter().flatten();
    counts.filter(|count| count["reason"] == reason).filter_map(|count| count["packets"].as_u64()).sum()
}
