//! ```text
//!   east1 (a, b) ─┐
//!                 ├─ switch ──── router ──── switch ── west1 (d)
//!   east2 (c) ────┘        sniffs │
//!                               etcd
//! ```

use std::net::IpAddr;

use cni::version::CniVersion;
use integration::{CniPod, CniRuntime};
use serde_json::{Value, json};

use crate::{Nodes, SOON, assert_nothing_left, await_reaches, pod_interfaces, reserved};

#[test]
fn routed_pods_reach_each_other_on_one_node_direct_and_through_the_tunnel() {
    reach_each_other("cni-routed", &json!({}));
}

#[test]
fn bridged_pods_reach_each_other_on_one_node_direct_and_through_the_tunnel() {
    reach_each_other("cni-bridge", &json!({"mode": "bridge"}));
}

fn reach_each_other(title: &str, more: &Value) {
    let mesh = Nodes::start(title, 2, 1);
    let prefixes = ["10.244.0.0/16", "fd42:244::/48"].map(|text| text.parse().unwrap());
    let sniffer = mesh.sites.router.sniff(&prefixes);
    mesh.nodes[0].await_path("east2", "direct", SOON);
    let networks: Vec<CniRuntime> = mesh.nodes.iter().map(|node| node.cni("1.1.0", more)).collect();
    let pods: Vec<(usize, CniPod)> =
        [(0, "a"), (0, "b"), (1, "c"), (2, "d")].map(|(node, name)| (node, networks[node].pod(name))).into();
    for (_, from) in &pods {
        for (_, to) in pods.iter().filter(|(_, to)| to.id != from.id) {
            await_reaches(from, to);
        }
    }
    // Nodes and their own pods, with their overlay addresses for those of others.
    await_reaches(mesh.nodes[0].host(), &pods[0].1);
    await_reaches(mesh.nodes[2].host(), &pods[0].1);
    for overlay in mesh.nodes[2].overlay() {
        crate::await_reaches_address(&pods[0].1, overlay);
    }
    for (node, pod) in &pods {
        let mtu = pod.run("cat /proc/sys/net/ipv6/conf/eth0/mtu").stdout;
        assert_eq!(Some(mtu.trim()), mesh.nodes[*node].subnet_env("FLANNEL_MTU").as_deref());
        assert_eq!(pod.read_sysctl("net/ipv6/conf/eth0/accept_ra"), "0");
        networks[*node].check(&pod.id, pod).unwrap_or_else(|failure| panic!("CHECK of {}: {failure}", pod.id));
    }
    mesh.await_endpoints(4);
    let record = mesh.etcd.get_prefix("/meshd/endpoints/").into_iter().find(|(key, _)| key.ends_with("/a/eth0"));
    let record: Value = serde_json::from_str(&record.unwrap().1).unwrap();
    assert_eq!(record["pod"]["name"], "a");
    assert_eq!(record["addresses"], json!([pods[0].1.v4(), pods[0].1.v6()]));

    // Containers go on while the daemon is away, and after it has come back.
    mesh.nodes[0].restart();
    mesh.nodes[0].await_ready(SOON);
    await_reaches(&pods[0].1, &pods[3].1);
    let refused = {
        mesh.nodes[0].term();
        mesh.nodes[0].cleanup(&[])
    };
    assert!(!refused.success() && refused.stderr.contains("attached"), "{}", refused.describe());
    await_reaches(&pods[0].1, &pods[1].1);
    mesh.nodes[0].start();
    mesh.nodes[0].await_ready(SOON);

    for (node, pod) in &pods {
        networks[*node].del(&pod.id, Some(pod)).unwrap_or_else(|failure| panic!("DEL of {}: {failure}", pod.id));
    }
    for node in &mesh.nodes {
        assert_nothing_left(node);
        let bridge = node.host().try_run(&["ip", "link", "show", "meshbr0"]);
        assert!(!bridge.success(), "the bridge stays behind the last pod: {}", bridge.stdout);
    }
    mesh.await_endpoints(0);
    sniffer.assert_clean();
    // Nothing is attached any more.
    for node in &mesh.nodes {
        node.term();
        let cleaned = node.cleanup(&[]);
        assert!(cleaned.success(), "{}", cleaned.describe());
    }
}

#[test]
fn every_version_of_the_specification_gets_its_own_result() {
    let mesh = Nodes::start("cni-versions", 1, 0);
    let node = &mesh.nodes[0];
    for version in CniVersion::ALL {
        let network = node.cni(version.as_str(), &json!({}));
        let name = format!("v{}", version.as_str().replace('.', "-"));
        let pod = network.pod(&name);
        assert_eq!(pod.result["cniVersion"], version.as_str());
        assert_eq!(pod.result["ips"][0].get("version").is_some(), version < CniVersion::V1_0_0, "{}", pod.result);
        assert_eq!(pod.result["interfaces"][1]["sandbox"], pod.path().display().to_string());
        assert_eq!(pod.result["interfaces"][0]["name"], pod_interfaces(node)[0]);
        let checked = network.check(&name, &pod);
        assert_eq!(checked.is_ok(), version >= CniVersion::V0_4_0, "{checked:?}");
        let stated = network.status();
        assert_eq!(stated.is_ok(), version >= CniVersion::V1_1_0, "{stated:?}");
        // The runtime removes the namespace first: DEL gets none.
        network.del(&name, None).unwrap_or_else(|failure| panic!("{failure}"));
        network.del(&name, Some(&pod)).unwrap_or_else(|failure| panic!("again: {failure}"));
    }
    assert_nothing_left(node);
}

#[test]
fn what_the_runtime_asks_for_is_given() {
    let mesh = Nodes::start("cni-wishes", 1, 0);
    let node = &mesh.nodes[0];
    let subnets = node.subnets();
    let (v4, v6) = (subnets[0].to_string().replace(".0/24", ".77"), subnets[1].to_string().replace("/64", "77"));
    let wishes = json!({"capabilities": {"ips": true, "mac": true}});
    let network = node
        .cni("1.0.0", &wishes)
        .capability("ips", json!([v4, v6]))
        .capability("mac", json!("02:11:22:33:44:55"))
        .args("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1");
    let pod = network.pod("wishes");
    assert_eq!(reserved(node), [v4.clone(), v6.clone()]);
    assert_eq!(pod.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(), [v4, v6]);
    assert_eq!(pod.result["interfaces"][1]["mac"], "02:11:22:33:44:55");
    assert!(pod.run("ip link show eth0").stdout.contains("02:11:22:33:44:55"));
    await_reaches(node.host(), &pod);
    mesh.await_endpoints(1);
    let record: Value = serde_json::from_str(&mesh.etcd.get_prefix("/meshd/endpoints/")[0].1).unwrap();
    assert_eq!((&record["pod"]["namespace"], &record["pod"]["name"]), (&json!("shop"), &json!("web-0")));
    assert_eq!(record["uid"], "u-1");

    // The same by CNI_ARGS, for runtimes without the capabilities.
    let args = node.cni("1.0.0", &json!({}));
    let by_args = args.args(&format!("IP={};MAC=02:11:22:33:44:66", v4_next(&pod)));
    let named = by_args.pod("named");
    assert_eq!(named.v4(), v4_next(&pod));
    assert!(named.run("ip link show eth0").stdout.contains("02:11:22:33:44:66"));
    by_args.check("named", &named).unwrap_or_else(|failure| panic!("{failure}"));
    named.run("ip link set eth0 address 02:11:22:33:44:67");
    let failure = by_args.check("named", &named).unwrap_err();
    assert!(failure.code() == Some(105) && failure.to_string().contains("02:11:22:33:44:67"), "{failure}");
    by_args.del("named", Some(&named)).unwrap_or_else(|failure| panic!("{failure}"));
    let namespace = network.namespace("wrong");
    for wrong in ["MAC=01:00:5e:00:00:01", "MAC=02:11:22:33:44", "IP=10.244"] {
        let network = node.cni("1.0.0", &json!({})).args(wrong);
        let failure = network.add("wrong", &namespace).unwrap_err();
        assert_eq!(failure.code(), Some(4), "{wrong}: {failure}");
        network.del("wrong", Some(&namespace)).unwrap_or_else(|failure| panic!("{wrong}: {failure}"));
    }

    // The next one with the same wish cannot have it, and leaves nothing.
    let second = network.namespace("second");
    let failure = network.add("second", &second).unwrap_err();
    assert_eq!((failure.plugin.as_str(), failure.code()), ("meshd-cni", Some(103)), "{failure}");
    assert_eq!(crate::attachments(node), ["wishes"]);
    assert_eq!(pod_interfaces(node).len(), 1);
    assert_eq!(second.run("ip -brief link").stdout.lines().count(), 1, "only lo");
}

/// The address behind a pod's.
fn v4_next(pod: &CniPod) -> IpAddr {
    let IpAddr::V4(address) = pod.v4() else { panic!("{}", pod.v4()) };
    std::net::Ipv4Addr::from(u32::from(address) + 1).into()
}

#[test]
fn a_name_that_the_runtime_made_up_refuses_no_container_and_keeps_the_configured_pod() {
    let mesh = Nodes::start("cni-runtime-names", 1, 0);
    let node = &mesh.nodes[0];
    let configured = json!({"pod": {"namespace": "shop", "labels": {"app": "web"}}});
    // As podman 3 gives them: the first is no valid name in Kubernetes.
    for (number, name) in ["quirky_turing", "web1"].into_iter().enumerate() {
        let network = node.cni("1.0.0", &configured).args(&format!("K8S_POD_NAMESPACE={name};K8S_POD_NAME={name}"));
        let pod = network.pod(&format!("c{number}"));
        await_reaches(node.host(), &pod);
        mesh.await_endpoints(number + 1);
    }
    for (_, record) in mesh.etcd.get_prefix("/meshd/endpoints/") {
        let record: Value = serde_json::from_str(&record).unwrap();
        assert_eq!((&record["pod"]["namespace"], &record["pod"]["labels"]["app"]), (&json!("shop"), &json!("web")));
        assert!(record.get("uid").is_none(), "{record}");
    }
}
