//! Plugin and daemon are killed at any moment, many times; everything is freed in the end.
//!
//! ```text
//!   east1 (pods) ── switch ── router ── etcd
//! ```

use std::{thread, time::Duration};

use integration::{Namespace, await_ok};
use serde_json::json;

use crate::{
    Nodes, SOON, SWEPT, assert_nothing_left, attachments, await_reaches, del_until_free, pod_interfaces, reserved,
};

/// How often each is killed. The delays go from nothing to more than an undisturbed ADD takes.
const KILLS: u32 = 40;

fn delay(i: u32) -> Duration {
    Duration::from_micros(u64::from(i) * 2500)
}

#[test]
fn a_plugin_that_is_killed_leaves_nothing_that_del_does_not_free() {
    let mesh = Nodes::start("cni-kill-plugin", 1, 0);
    let node = &mesh.nodes[0];
    let network = node.cni("1.1.0", &json!({}));
    let mut ended = 0;
    for i in 0..KILLS {
        let name = format!("k{i}");
        let namespace = network.namespace(&name);
        let mut add = network.start("ADD", &name, &namespace);
        thread::sleep(delay(i));
        let _ = add.kill();
        ended += u32::from(add.wait().unwrap().success());
        // DEL may be killed as well; said again, it ends what is left.
        let mut del = network.start("DEL", &name, &namespace);
        thread::sleep(delay(KILLS - i) / 2);
        let _ = del.kill();
        del.wait().unwrap();
        del_until_free(&network, node, &name, &namespace, &format!("after kill {i}"));
    }
    assert!(ended < KILLS, "no ADD was caught");
    assert_eq!(reserved(node), [""; 0]);
    mesh.await_endpoints(0);
    let pod = network.pod("after");
    await_reaches(node.host(), &pod);
}

#[test]
fn what_a_killed_runtime_has_left_is_freed_once_its_containers_are_gone() {
    let mesh = Nodes::start("cni-kill-runtime", 1, 0);
    let node = &mesh.nodes[0];
    let network = node.cni("1.1.0", &json!({}));
    let kept = network.pod("kept");
    for i in 0..10 {
        let name = format!("k{i}");
        let namespace = network.namespace(&name);
        let mut add = network.start("ADD", &name, &namespace);
        thread::sleep(delay(i * 4));
        let _ = add.kill();
        add.wait().unwrap();
        // Nobody says DEL.
        remove(&namespace);
    }
    await_ok("what is gone to be freed", SWEPT, || {
        let left = (pod_interfaces(node), attachments(node), reserved(node));
        if left.0.len() == 1 && left.1 == ["kept"] && left.2.len() == 2 { Ok(()) } else { Err(format!("{left:?}")) }
    });
    mesh.await_endpoints(1);
    await_reaches(node.host(), &kept);
}

#[test]
fn a_daemon_that_is_killed_forgets_nobody() {
    let mesh = Nodes::start("cni-kill-daemon", 1, 0);
    let node = &mesh.nodes[0];
    let network = node.cni("1.1.0", &json!({}));
    let mut pods = Vec::new();
    for i in 0..8 {
        let name = format!("k{i}");
        let namespace = network.namespace(&name);
        let added = thread::scope(|scope| {
            let add = scope.spawn(|| network.add(&name, &namespace));
            thread::sleep(delay(i * 5));
            node.kill9();
            node.start();
            add.join().unwrap()
        });
        node.await_ready(SOON);
        match added {
            Ok(_) => pods.push(name),
            Err(failure) => {
                assert!(matches!(failure.code(), Some(11 | 100 | 101)), "{failure}");
                network.del(&name, Some(&namespace)).unwrap_or_else(|failure| panic!("{failure}"));
                remove(&namespace);
            }
        }
        let mut known = attachments(node);
        known.sort();
        assert_eq!(known, pods, "after kill {i}");
        assert_eq!((pod_interfaces(node).len(), reserved(node).len()), (pods.len(), 2 * pods.len()));
    }
    mesh.await_endpoints(pods.len());
    for name in &pods {
        network.del(name, None).unwrap_or_else(|failure| panic!("{failure}"));
    }
    assert_nothing_left(node);
    mesh.await_endpoints(0);
}

/// Takes a container's namespace away, as a runtime does.
pub(crate) fn remove(namespace: &Namespace) {
    let path = namespace.path().to_string_lossy().into_owned();
    nix::mount::umount2(&*path, nix::mount::MntFlags::MNT_DETACH).unwrap();
    std::fs::remove_file(&path).unwrap();
}
