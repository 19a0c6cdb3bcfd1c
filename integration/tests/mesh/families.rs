//! Meshes of one family only: inside, and underneath.
//!
//! ```text
//!   east1 (pod) ─┐                                 ┌─ west1 (pod)
//!                ├─ switch ──── router ──── switch ┤
//!   east2 (pod) ─┘         sniffs │                └─ west2 (pod)
//!                               etcd
//! ```

use integration::topology::{Mesh, TwoSites};

use crate::{SOON, underlay::ipv6_underlay};

/// All pairs, by the paths that the sites suggest, and nothing in the clear.
#[track_caller]
fn carries(mesh: &Mesh, family: fn(&std::net::IpAddr) -> bool) {
    for pod in &mesh.pods {
        assert!(pod.addresses().len() == 1 && pod.addresses().iter().all(family), "{:?}", pod.addresses());
    }
    mesh.await_all_reach_each_other();
    mesh.node("east1").await_path("east2", "direct", SOON);
    mesh.node("west2").await_path("west1", "direct", SOON);
    mesh.node("east2").await_path("west1", "wireguard", SOON);
    mesh.await_all_reach_each_other();
    for node in &mesh.nodes {
        let status = node.await_status("to be well", SOON, |status| status["state"] == "running");
        assert_eq!(status["overlay"].as_array().map(Vec::len), Some(1), "{status}");
    }
    assert!(mesh.sniffer.frames() > 0, "the router saw the tunnel");
    mesh.sniffer.assert_clean();
}

#[test]
fn an_ipv4_mesh() {
    let config = r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "wireguard"}}"#;
    let mesh = Mesh::start_on(TwoSites::new("ipv4-only"), config, |meshd| meshd);
    carries(&mesh, std::net::IpAddr::is_ipv4);
    // The other family is left as it was.
    let routes = mesh.node("east1").host().run("ip -6 route show table all");
    assert!(!routes.stdout.contains("unreachable fd"), "{}", routes.stdout);
}

#[test]
fn an_ipv6_mesh() {
    let config = r#"{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd42:244::/48",
        "Backend": {"Type": "wireguard"}}"#;
    let mesh = Mesh::start_on(TwoSites::new("ipv6-only"), config, |meshd| meshd);
    carries(&mesh, std::net::IpAddr::is_ipv6);
    assert!(mesh.node("east1").subnet_env("FLANNEL_IPV6_SUBNET").is_some());
}

/// IPv4 and IPv6 inside, and only IPv6 between the machines.
#[test]
fn an_ipv6_underlay_carries_both() {
    let mesh = ipv6_underlay("ipv6-underlay", 2);
    mesh.await_all_reach_each_other();
    let east1 = mesh.node("east1");
    let west = east1.await_path("west1", "wireguard", SOON);
    assert!(west["endpoint"].as_str().is_some_and(|at| at.starts_with("[2001:db8:2::11]")), "{west}");
    // IPv4 has no direct path here: that family goes through the tunnel, and says why.
    let east = east1.await_path("east2", "wireguard", SOON);
    assert!(east["endpoint"].as_str().is_some_and(|at| at.starts_with("[2001:db8:1::12]")), "{east}");
    mesh.sniffer.assert_clean();
}
