//! Real containers by podman, which speaks CNI 1.0.0.
//!
//! ```text
//!   east1 (pod of a1 and a2, b) ── switch ── router ── switch ── west1 (c)
//! ```

use std::net::IpAddr;

use integration::{Podman, await_ok};
use serde_json::json;

use crate::{Nodes, SOON, assert_nothing_left, reserved};

const PAGE: (&str, &str) = ("page", "a page of the pod");
const SERVE: [&str; 6] = ["/bin/httpd", "-f", "-p", "8080", "-h", "/"];
const WAIT: [&str; 2] = ["/bin/sleep", "1000000"];

#[test]
fn containers_of_a_pod_by_localhost_and_pods_of_a_node_and_across_sites() {
    let mesh = Nodes::start("cni-podman", 1, 1);
    let prefixes = ["10.244.0.0/16", "fd42:244::/48"].map(|text| text.parse().unwrap());
    let sniffer = mesh.sites.router.sniff(&prefixes);
    let podmen: Vec<Podman> =
        mesh.nodes.iter().map(|node| Podman::on(node.host(), &[node.cni_plugin(&json!({}))], &[PAGE])).collect();
    podmen[0].run("a1", &SERVE);
    podmen[0].join("a2", "a1", &WAIT);
    podmen[0].run("b", &WAIT);
    podmen[1].run("c", &WAIT);

    for localhost in ["127.0.0.1", "::1"] {
        gets_the_page(&podmen[0], "a2", localhost.parse().unwrap());
    }
    let addresses = podmen[0].addresses("a1");
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    for address in addresses {
        gets_the_page(&podmen[0], "b", address);
        gets_the_page(&podmen[1], "c", address);
    }
    mesh.await_endpoints(3);
    // podman says DEL.
    podmen[0].remove("b");
    mesh.await_endpoints(2);
    assert_eq!(reserved(&mesh.nodes[0]).len(), 2);
    drop(podmen);
    for node in &mesh.nodes {
        assert_nothing_left(node);
    }
    mesh.await_endpoints(0);
    sniffer.assert_clean();
}

#[track_caller]
fn gets_the_page(podman: &Podman, from: &str, address: IpAddr) {
    let host = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
    let url = format!("http://{host}:8080/{}", PAGE.0);
    await_ok(&format!("{from} to get {url}"), SOON, || {
        let output = podman.exec(from, &["/bin/busybox", "timeout", "5", "/bin/wget", "-q", "-O", "-", &url]);
        if output.stdout.contains(PAGE.1) { Ok(()) } else { Err(output.describe()) }
    });
}
