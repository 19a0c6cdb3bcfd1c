//! Behind Debian's plugins.
//!
//! ```text
//!   east1 (pods by bridge or ptp) ── switch ── router ── switch ── west1 (pods by meshd-cni)
//! ```

use integration::{CniPod, CniRuntime, MeshdNode, await_ok};
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::{Nodes, SOON, attachments, await_reaches, reserved};

/// Debian's `bridge` with all that Kubernetes installations put behind it.
fn bridge_chain(node: &MeshdNode) -> Vec<Value> {
    vec![
        // Its ports are as wide as ethernet: more than the tunnel carries.
        json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "mtu": 1500, "ipam": node.host_local()}),
        json!({"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.arp_announce": "2"}}),
        json!({"type": "portmap", "capabilities": {"portMappings": true}}),
        json!({"type": "bandwidth", "capabilities": {"bandwidth": true}}),
        json!({"type": "firewall"}),
    ]
}

fn with_all(network: CniRuntime) -> CniRuntime {
    network
        .capability("portMappings", json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]))
        .capability("bandwidth", json!({"ingressRate": 1_000_000_000, "ingressBurst": 100_000_000}))
}

#[test]
fn behind_bridge_and_the_usual_chain() {
    let mesh = Nodes::start("cni-chain", 1, 1);
    let (east, west) = (&mesh.nodes[0], &mesh.nodes[1]);
    let far = west.cni("1.0.0", &json!({})).pod("far");
    let alone = with_all(CniRuntime::new(east.host(), "1.0.0", &bridge_chain(east)));
    let chained = [bridge_chain(east), vec![east.cni_plugin(&json!({}))]].concat();
    let chained = with_all(CniRuntime::new(east.host(), "1.0.0", &chained));

    let pod = chained.pod("chained");
    // What the plugins before have said is what the runtime gets.
    let before = alone_result(&alone);
    assert_eq!(shape(&pod.result), shape(&before), "{}\n{before}", pod.result);
    let mtu = east.subnet_env("FLANNEL_MTU").unwrap();
    for route in ["ip -4 route show default", "ip -6 route show default"] {
        let shown = pod.run(route).stdout;
        assert!(shown.contains(&format!("mtu {mtu}")), "{route}: {shown}");
    }
    assert!(pod.run("ip link show eth0").stdout.contains("mtu 1500"), "the interface is the bridge plugin's");
    let known = cni::daemon::DaemonClient::new(east.run_dir()).attachments().unwrap();
    let attach = known[0].attach.clone().unwrap();
    assert_eq!(attach.addresses, pod.addresses);
    assert!(attach.interface.starts_with("veth"), "{attach:?}");
    mesh.await_endpoints(2);
    await_reaches(&far, &pod);
    await_reaches(&pod, &far);
    // A packet as large as the interface takes goes through by the route's MTU, in fragments.
    await_ok("a large packet", SOON, || {
        let report = integration::Ping::new(far.v4()).size(1472).option("-M want").count(2).run(&pod);
        if report.lost() == 0 { Ok(()) } else { Err(report.text) }
    });
    chained.del("chained", Some(&pod)).unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!((attachments(east), reserved(east)), (vec![], vec![]));
    chained.del("chained", None).unwrap_or_else(|failure| panic!("{failure}"));

    // Taken out of the chain, and put into it again, while pods are there.
    let first = chained.pod("first");
    alone.del("first", Some(&first)).unwrap_or_else(|failure| panic!("without it: {failure}"));
    let second = alone.pod("second");
    await_reaches(east.host(), &second);
    chained.del("second", Some(&second)).unwrap_or_else(|failure| panic!("with it: {failure}"));
}

/// What a pod by these plugins gets.
fn alone_result(network: &CniRuntime) -> Value {
    let pod = network.pod("alone");
    network.del("alone", Some(&pod)).unwrap_or_else(|failure| panic!("{failure}"));
    pod.result
}

/// A result without what differs from pod to pod.
fn shape(result: &Value) -> Value {
    fn blank(value: &Value) -> Value {
        match value {
            Value::Object(map) => map
                .iter()
                .map(|(key, value)| {
                    let differs = matches!(key.as_str(), "mac" | "sandbox" | "address") || key == "name";
                    (key.clone(), if differs { Value::Null } else { blank(value) })
                })
                .collect(),
            Value::Array(values) => values.iter().map(blank).collect(),
            other => other.clone(),
        }
    }
    blank(result)
}

#[test]
fn behind_ptp_in_every_version() {
    let mesh = Nodes::start("cni-ptp", 1, 1);
    let (east, west) = (&mesh.nodes[0], &mesh.nodes[1]);
    let far = west.cni("1.0.0", &json!({})).pod("far");
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let ptp = json!({"type": "ptp", "mtu": 1500, "ipam": east.host_local()});
        let network = CniRuntime::new(east.host(), version, &[ptp, east.cni_plugin(&json!({}))]);
        let name = format!("v{}", version.replace('.', "-"));
        let pod = network.pod(&name);
        assert_eq!(pod.result["cniVersion"], version);
        await_reaches(&far, &pod);
        await_reaches(&pod, &far);
        if version != "0.3.1" {
            network.check(&name, &pod).unwrap_or_else(|failure| panic!("{failure}"));
        }
        network.del(&name, Some(&pod)).unwrap_or_else(|failure| panic!("{failure}"));
        assert_eq!((attachments(east), reserved(east)), (vec![], vec![]));
    }
}

/// Flannel's plugin reads `RUN/subnet.env` and has `bridge` do the work with this configuration.
#[test]
fn behind_what_flannels_plugin_makes_of_subnet_env() {
    let mesh = Nodes::start("cni-flannel", 1, 1);
    let (east, west) = (&mesh.nodes[0], &mesh.nodes[1]);
    let far = west.cni("1.0.0", &json!({})).pod("far");
    let env = |name: &str| east.subnet_env(name).expect("a running node");
    let subnet = |name: &str| env(name).parse::<IpNet>().expect("a subnet").trunc();
    let mtu: u16 = env("FLANNEL_MTU").parse().expect("an MTU");
    let delegate = json!({
        "type": "bridge", "bridge": "cni0", "mtu": mtu, "isGateway": true, "ipMasq": env("FLANNEL_IPMASQ") != "true",
        "hairpinMode": true,
        "ipam": {"type": "host-local", "dataDir": east.run_dir().join("ipam"),
            "ranges": [[{"subnet": subnet("FLANNEL_SUBNET")}], [{"subnet": subnet("FLANNEL_IPV6_SUBNET")}]],
            "routes": [{"dst": env("FLANNEL_NETWORK")}, {"dst": env("FLANNEL_IPV6_NETWORK")}]},
    });
    let chain =
        [delegate, json!({"type": "portmap", "capabilities": {"portMappings": true}}), east.cni_plugin(&json!({}))];
    let network = CniRuntime::new(east.host(), "0.3.1", &chain);
    let pod = network.pod("flannel");
    await_reaches(&far, &pod);
    await_reaches(&pod, &far);
    mesh.await_endpoints(2);
    network.del("flannel", Some(&pod)).unwrap_or_else(|failure| panic!("{failure}"));
    mesh.await_endpoints(1);
}

#[test]
fn a_chain_without_the_daemon_fails_and_takes_nothing_along() {
    let mesh = Nodes::start("cni-chain-alone", 1, 0);
    let node = &mesh.nodes[0];
    let ptp = json!({"type": "ptp", "ipam": node.host_local()});
    let chain = [ptp, node.cni_plugin(&json!({}))];
    let network = CniRuntime::new(node.host(), "1.0.0", &chain);
    node.term();
    let namespace = network.namespace("pod");
    let failure = network.add("pod", &namespace).unwrap_err();
    assert_eq!((failure.plugin.as_str(), failure.code()), ("meshd-cni", Some(100)), "{failure}");
    // The runtime says DEL after a failed ADD, without a result.
    network.del("pod", Some(&namespace)).unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(reserved(node), [""; 0]);
    node.start();
    node.await_ready(SOON);
    let pod: CniPod = network.pod("pod2");
    await_reaches(node.host(), &pod);
    // First in a chain that gives no address it cannot say who is attached.
    let wrong = CniRuntime::new(node.host(), "1.0.0", &[json!({"type": "loopback"}), node.cni_plugin(&json!({}))]);
    let failure = wrong.add("lo", &wrong.namespace("lo")).unwrap_err();
    assert_eq!(failure.code(), Some(7), "{failure}");
}
