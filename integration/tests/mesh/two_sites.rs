//! ```text
//!   east1 (pod) ─┐                               ┌─ west1 (pod)
//!                ├─ switch ──── router ──── switch ┤
//!   east2 (pod) ─┘         sniffs │              └─ west2 (pod)
//!                               etcd
//! ```

use integration::topology::Mesh;

use crate::SOON;

#[test]
fn every_pod_reaches_every_other_and_nothing_crosses_in_the_clear() {
    let mesh = Mesh::start("two-sites");
    mesh.await_all_reach_each_other();
    mesh.node("east1").await_path("east2", "direct", SOON);
    mesh.node("east1").await_path("west1", "wireguard", SOON);
    mesh.node("west2").await_path("west1", "direct", SOON);
    mesh.await_all_reach_each_other();
    for node in &mesh.nodes {
        node.await_status("to be well", SOON, |status| status["state"] == "running");
    }
    assert!(mesh.sniffer.frames() > 0, "the router saw the tunnel");
    mesh.sniffer.assert_clean();
}
