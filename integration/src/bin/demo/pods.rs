//! Pods attached by `meshd-cni`, and the paths to one of them.

use std::{fs, net::IpAddr, time::Instant};

use integration::{CniPod, CniRuntime, Etcd, Host, MeshdNode, Namespace, Process, await_until};
use serde_json::json;

use super::{Act, SOON, millis, text};

const HOST_PORT: u16 = 8081;
const PORT: u16 = 8080;
/// NodePorts with externalTrafficPolicy Cluster and Local.
const NODE_PORTS: [u16; 2] = [30_080, 30_081];
const PAGE: &str = "a page of the web pod";

/// The pod's uid, as Kubernetes would give it one.
pub(super) fn uid(name: &str) -> String {
    format!("uid-of-{name}")
}

/// A network of `meshd-cni` alone, for the pod of this name.
pub(super) fn network(node: &MeshdNode, name: &str) -> CniRuntime {
    let arguments = format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name};K8S_POD_UID={}", uid(name));
    node.cni("1.0.0", &json!({})).args(&arguments)
}

/// A pod on each node.
pub(super) fn add(nodes: &[MeshdNode], networks: &[CniRuntime], act: &mut Act<'_>) -> Vec<CniPod> {
    let mut slowest = 0;
    let mut pods = Vec::new();
    for (node, network) in nodes.iter().zip(networks) {
        let namespace = network.namespace("pod");
        let began = Instant::now();
        let pod = network.attach("pod", &namespace);
        slowest = began.elapsed().as_millis().max(slowest);
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        let interface = text(&pod.result["interfaces"][0]["name"]);
        act.line(format!("{:<6} {:<34} eth0 ─ {interface}", node.name(), addresses.join("  ")));
        pods.push(pod);
    }
    act.good(format!("each ADD returned with policy in force for its pod, within {slowest} ms"));
    pods
}

/// A server on the first node, and who gets its page by which way.
pub(super) fn reach(nodes: &[MeshdNode], pods: &[CniPod], laptop: &Host, east: [String; 2], act: &mut Act<'_>) {
    let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}});
    let network = CniRuntime::new(nodes[0].host(), "1.0.0", &[nodes[0].cni_plugin(&json!({})), portmap])
        .capability("portMappings", json!([{"hostPort": HOST_PORT, "containerPort": PORT, "protocol": "tcp"}]));
    act.command("cat 10-mesh.conflist    {… \"plugins\": [{\"type\": \"meshd-cni\"}, {\"type\": \"portmap\", …}]}");
    let web = network.pod("web");
    let server = serve(&nodes[0], &web);
    let overlay = nodes[0].overlay()[0];
    let [node, other] = east.map(|address| address.parse::<IpAddr>().expect("an address"));
    act.command("nft -f -    NodePorts as kube-proxy programs them, on east1 and east2");
    for node in &nodes[..2] {
        node_ports(node, web.v4());
    }
    let [cluster, local] = NODE_PORTS;
    let ways: [(&str, &Namespace, IpAddr, u16); 8] = [
        ("pod → pod, same node", &pods[0], web.v4(), PORT),
        ("pod → pod, same site, direct", &pods[1], web.v4(), PORT),
        ("pod → pod, other site, by the tunnel", &pods[2], web.v6(), PORT),
        ("outside → node's hostPort → pod", laptop, node, HOST_PORT),
        ("the node → its own hostPort → pod", nodes[0].host(), node, HOST_PORT),
        ("pod of the other site → hostPort, by the tunnel", &pods[3], overlay, HOST_PORT),
        ("outside → other node's NodePort, Cluster → pod", laptop, other, cluster),
        ("outside → its node's NodePort, Local → pod", laptop, node, local),
    ];
    for (way, from, to, port) in ways {
        let took = get(from, to, port);
        act.line(format!("{way:<48} {:<30} {took} ms", format!("{to} port {port}")));
    }
    drop(server);
    for node in &nodes[..2] {
        node.host().nft("delete table ip kube-proxy");
    }
    network.del("web", Some(&web)).unwrap_or_else(|failure| panic!("DEL: {failure}"));
    act.good("the pod is reachable by every path");
}

/// What kube-proxy's nftables mode makes of a Service with this one endpoint, on one node. With policy Cluster the pod
/// sees the node, with Local who asks.
fn node_ports(node: &MeshdNode, pod: IpAddr) {
    let [cluster, local] = NODE_PORTS;
    node.host().nft(&format!(
        "table ip kube-proxy {{
            map service-nodeports {{
                type inet_proto . inet_service : verdict
                elements = {{ tcp . {cluster} : goto external-cluster, tcp . {local} : goto external-local }}
            }}
            chain nat-prerouting {{
                type nat hook prerouting priority dstnat
                fib daddr type local meta l4proto . th dport vmap @service-nodeports
            }}
            chain nat-postrouting {{
                type nat hook postrouting priority srcnat
                mark and 0x4000 == 0 return
                mark set mark xor 0x4000
                masquerade fully-random
            }}
            chain external-cluster {{ mark set mark or 0x4000; goto endpoint; }}
            chain external-local {{ goto endpoint; }}
            chain endpoint {{ meta l4proto tcp dnat to {pod}:{PORT}; }}
        }}"
    ));
}

/// DEL for every pod.
pub(super) fn del(nodes: &[MeshdNode], networks: &[CniRuntime], pods: &[CniPod], etcd: &Etcd, act: &mut Act<'_>) {
    for (network, pod) in networks.iter().zip(pods) {
        network.del("pod", Some(pod)).unwrap_or_else(|failure| panic!("DEL: {failure}"));
    }
    for (node, pod) in nodes.iter().zip(pods) {
        let left = node.pod_addresses();
        assert!(left.is_empty(), "addresses are left on {}: {left:?}", node.name());
        let interface = text(&pod.result["interfaces"][0]["name"]);
        assert!(
            !node.host().run("ip -brief link").stdout.contains(interface),
            "{interface} is left on {}",
            node.name()
        );
        await_until(&format!("the rules for {} to be gone", pod.v4()), SOON, || {
            let rules = node.host().run("nft list table inet meshd_policy").stdout;
            (!rules.contains(&pod.v4().to_string())).then_some(())
        });
    }
    await_until("the records of the pods to be gone", SOON, || {
        etcd.get_prefix("/meshd/endpoints/").is_empty().then_some(())
    });
    act.good("no address, interface, rule or record of them is left");
}

fn serve(node: &MeshdNode, pod: &CniPod) -> Process {
    let folder = node.run_dir().join("www");
    let written = fs::create_dir_all(&folder).and_then(|()| fs::write(folder.join("page"), PAGE));
    written.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let port = PORT.to_string();
    pod.spawn("/bin/busybox", &["httpd", "-f", "-p", &port, "-h", &folder.to_string_lossy()])
}

/// Gets the page; how long that took when it came, in milliseconds.
fn get(from: &Namespace, to: IpAddr, port: u16) -> String {
    let host = if to.is_ipv6() { format!("[{to}]") } else { to.to_string() };
    let url = format!("http://{host}:{port}/page");
    await_until(&format!("{} to get {url}", from.name()), SOON, || {
        let began = Instant::now();
        let output = from.try_run(&["timeout", "3", "busybox", "wget", "-q", "-O", "-", &url]);
        output.stdout.contains(PAGE).then(|| millis(began.elapsed()))
    })
}
