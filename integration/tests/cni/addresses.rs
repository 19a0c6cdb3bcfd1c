//! The addresses of a node's pods: one store for all of its networks, whatever version of the plugin took them.
//!
//! ```text
//!   east1 (pods) ── switch ── router ── etcd
//! ```

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::IpAddr,
    os::unix::net::UnixListener,
    thread,
};

use cni::environment::AttachmentName;
use integration::{CniPod, CniRuntime, MeshdNode, Namespace, await_ok};
use serde_json::{Value, json};

use crate::{
    Nodes, SOON, SWEPT, assert_nothing_left, attachments, await_reaches, pod_interfaces, reserved,
    reserved_by_host_local,
};

#[test]
fn two_networks_of_a_node_share_its_addresses() {
    let mesh = Nodes::start("cni-two-networks", 1, 0);
    let node = &mesh.nodes[0];
    let networks = ["mesh", "second"].map(|name| node.cni("1.1.0", &json!({})).named(name));
    let mut pods: Vec<(usize, CniPod)> = Vec::new();
    for number in 0..8 {
        let network = number % 2;
        pods.push((network, networks[network].pod(&format!("p{number}"))));
    }
    let addresses: BTreeSet<IpAddr> = pods.iter().flat_map(|(_, pod)| pod.addresses.clone()).collect();
    assert_eq!(addresses.len(), 16);
    await_reaches(&pods[0].1, &pods[1].1);
    // An address that has just become free is not the next one, also after a restart.
    let (network, freed) = pods.remove(0);
    networks[network].del(&freed.id, Some(&freed)).unwrap_or_else(|failure| panic!("{failure}"));
    node.restart();
    node.await_ready(SOON);
    let next = networks[1].pod("next");
    assert!(next.addresses.iter().all(|address| !addresses.contains(address)), "{:?}", next.addresses);
    // GC of one network leaves those of the other.
    networks[1].gc(&[]).unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(attachments(node), ["p2", "p4", "p6"]);
    networks[0].gc(&[]).unwrap_or_else(|failure| panic!("{failure}"));
    assert_nothing_left(node);
    mesh.await_endpoints(0);
}

#[test]
fn ranges_of_the_configuration_bound_what_the_daemon_allocates() {
    let mesh = Nodes::start("cni-ranges", 1, 0);
    let node = &mesh.nodes[0];
    let subnet = node.subnets()[0];
    let at = |last: u8| subnet.to_string().replace(".0/24", &format!(".{last}"));
    let range = json!({"subnet": subnet, "rangeStart": at(100), "rangeEnd": at(101)});
    let ipam = json!({"type": "host-local", "ranges": [[range]], "routes": [{"dst": "192.0.2.0/24"}]});
    let network = node.cni("1.1.0", &json!({"ipam": ipam}));
    let pods = ["one", "two"].map(|name| network.pod(name));
    let addresses: Vec<String> = pods.iter().flat_map(|pod| &pod.addresses).map(ToString::to_string).collect();
    assert_eq!(addresses, [at(100), at(101)], "one family, as configured");
    assert!(pods[0].run("ip route").stdout.contains("192.0.2.0/24"));
    let failure = network.add("three", &network.namespace("three")).unwrap_err();
    assert_eq!(failure.code(), Some(103), "{failure}");
    assert_eq!(network.status().unwrap_err().code(), Some(50));
    network.check("one", &pods[0]).unwrap_or_else(|failure| panic!("{failure}"));
    // A named plugin with a store of its own is called, and its addresses are those of the daemon's store, too.
    let other = node.cni("1.0.0", &json!({"ipam": node.host_local()})).named("other");
    let pod = other.pod("own-store");
    assert_eq!(reserved_by_host_local(node), pod.addresses.iter().copied().collect());
    other.check("own-store", &pod).unwrap_or_else(|failure| panic!("{failure}"));
    let wanted = node.cni("1.0.0", &json!({})).args(&format!("IP={}", pod.v4()));
    let failure = wanted.add("wanted", &wanted.namespace("wanted")).unwrap_err();
    assert!(failure.code() == Some(103) && failure.to_string().contains("own-store"), "{failure}");
    other.del("own-store", Some(&pod)).unwrap_or_else(|failure| panic!("{failure}"));
    for pod in &pods {
        network.del(&pod.id, Some(pod)).unwrap_or_else(|failure| panic!("{failure}"));
    }
    assert_nothing_left(node);
}

#[test]
fn what_host_local_gave_out_before_an_upgrade_stays_its_containers() {
    let mesh = Nodes::start("cni-taken-over", 1, 0);
    let node = &mesh.nodes[0];
    // As an earlier version of the plugin had host-local do it.
    let mut ipam = node.host_local();
    ipam["dataDir"] = json!(node.run_dir().join("ipam"));
    let before = CniRuntime::new(node.host(), "1.0.0", &[json!({"type": "host-local", "ipam": ipam})]);
    let namespaces = ["kept", "dead"].map(|name| before.namespace(name));
    let given: Vec<Value> = ["kept", "dead"]
        .iter()
        .zip(&namespaces)
        .map(|(name, namespace)| before.add(name, namespace).unwrap_or_else(|failure| panic!("{failure}")))
        .collect();
    let first = |result: &Value| result["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
    let [kept, dead] = [first(&given[0]), first(&given[1])];
    announce(node, "kept", &namespaces[0].path().display().to_string(), &kept);
    let network = node.cni("1.1.0", &json!({}));
    let pod = network.pod("new");
    assert!(![&kept, &dead].contains(&&pod.v4().to_string()), "{:?}", pod.addresses);
    let asks = |name: &str, namespace: &Namespace, address: &str| {
        let network = node.cni("1.1.0", &json!({})).args(&format!("IP={address}"));
        let result = network.add(name, namespace);
        result.map(|result| first(&result)).map_err(|failure| failure.to_string())
    };
    let [early, late] = ["early", "late"].map(|name| network.namespace(name));
    let error = asks("early", &early, &kept).unwrap_err();
    assert!(error.contains("in use by container kept"), "{error}");
    // Of `dead` there is neither a record nor an interface: its address is free once that was seen twice.
    await_ok("the address of a dead container", SWEPT, || asks("late", &late, &dead).map(drop));
    // Old and new: one that is announced with another's address is refused.
    let client = cni::daemon::DaemonClient::new(node.run_dir());
    let name = AttachmentName { container_id: "late2".to_owned(), ifname: "eth0".to_owned() };
    let begin = json!({"network": "mesh", "netns": "/proc/1/ns/net"});
    assert_eq!(client.begin(&name, &serde_json::from_value(begin).unwrap()).unwrap().addresses, None);
    let attach = json!({"pod": {"namespace": "a", "name": "b"}, "addresses": [pod.v4()], "interface": "x"});
    let refused = client.attach(&name, &serde_json::from_value(attach).unwrap()).unwrap().in_force().unwrap_err();
    assert!(refused.to_string().contains("belongs to container new"), "{refused}");
    client.detach(&name).unwrap();
    // DEL by the new plugin frees host-local's file, too.
    network.del("kept", Some(&namespaces[0])).unwrap_or_else(|failure| panic!("{failure}"));
    assert!(!node.run_dir().join("ipam/mesh").join(&kept).exists());
    assert_eq!(asks("early", &early, &kept).unwrap(), kept);
}

/// What an earlier version of the plugin said of a container with this address.
fn announce(node: &MeshdNode, container: &str, netns: &str, address: &str) {
    let client = cni::daemon::DaemonClient::new(node.run_dir());
    let name = AttachmentName { container_id: container.to_owned(), ifname: "eth0".to_owned() };
    let begin = json!({"network": "mesh", "netns": netns, "interface": "meshearlier"});
    client.begin(&name, &serde_json::from_value(begin).unwrap()).unwrap();
    let attach = json!({"pod": {"namespace": "a", "name": "b"}, "addresses": [address], "interface": "meshearlier"});
    client.attach(&name, &serde_json::from_value(attach).unwrap()).unwrap().in_force().unwrap();
}

#[test]
fn a_daemon_that_allocates_no_addresses_is_named_and_nothing_is_left() {
    let mesh = Nodes::start("cni-older-daemon", 1, 0);
    let node = &mesh.nodes[0];
    // The answers of the version before: it knows nothing of the request for addresses.
    let folder = mesh.sites.lab.folder().join("older");
    fs::create_dir_all(&folder).unwrap();
    let listener = UnixListener::bind(folder.join(cni::daemon::SOCKET)).unwrap();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut asked = vec![0; 4096];
            let read = stream.read(&mut asked).unwrap_or(0);
            let answer = match asked[..read].split(|byte| *byte == b' ').next() {
                Some(b"POST") => {
                    "HTTP/1.0 200 OK\r\n\r\n{\"networks\":[],\"subnets\":[\"10.244.3.0/24\"],\"overlay\":[],\"mtu\":1420}"
                }
                _ => "HTTP/1.0 204 No Content\r\n\r\n",
            };
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    let network = CniRuntime::new(node.host(), "1.0.0", &[json!({"type": "meshd-cni", "runDir": folder})]);
    let namespace = network.namespace("pod");
    let failure = network.add("pod", &namespace).unwrap_err();
    assert!(failure.code() == Some(102) && failure.to_string().contains("restart meshd"), "{failure}");
    assert_eq!((pod_interfaces(node), reserved(node)), (vec![], vec![]));
    assert_eq!(namespace.run("ip -brief link").stdout.lines().count(), 1, "only lo");
    network.del("pod", Some(&namespace)).unwrap_or_else(|failure| panic!("{failure}"));
}
