//! The plugin, and the daemon under it, are killed before every single step by which an ADD or a DEL changes something:
//! what is left is freed by the next DEL, by GC, by the daemon that starts next, or once the container is gone.
//!
//! ```text
//!   east1 (pods) ── switch ── router ── etcd
//! ```

use std::collections::BTreeSet;

use integration::{
    CniRuntime, MeshdNode, Namespace, await_ok,
    stepped::{Steps, Then},
};
use serde_json::{Value, json};

use crate::{
    Nodes, SOON, SWEPT, assert_nothing_left, attachments, await_reaches, del_until_free, kills::remove, pod_interfaces,
    reserved,
};

/// More steps than any command has.
const ALL: usize = 10_000;

/// A node with the network to be tried.
fn start(title: &str, more: &Value) -> (Nodes, CniRuntime) {
    let mesh = Nodes::start(title, 1, 0);
    let network = mesh.nodes[0].cni("1.1.0", more);
    // The daemon has settled.
    let namespace = network.namespace("first");
    network.add("first", &namespace).unwrap_or_else(|failure| panic!("{failure}"));
    network.del("first", Some(&namespace)).unwrap_or_else(|failure| panic!("{failure}"));
    (mesh, network)
}

/// The steps of an undisturbed command.
fn steps_of(network: &CniRuntime, command: &str, namespace: &Namespace) -> Steps {
    let steps = network.stepped(command, "undisturbed", namespace, ALL, || unreachable!());
    assert!(steps.status.success(), "{command}: {steps:?}");
    assert!(steps.calls.len() > 5, "{command} has few steps: {steps:?}");
    steps
}

fn killed(network: &CniRuntime, command: &str, container: &str, namespace: &Namespace, step: usize) {
    let steps = network.stepped(command, container, namespace, step, || Then::Kill);
    assert!(steps.reached || steps.status.success(), "{command} {step}: {steps:?}");
}

#[track_caller]
fn nothing_is_left(node: &MeshdNode, when: &str) {
    assert_eq!((pod_interfaces(node), attachments(node), reserved(node)), (vec![], vec![], vec![]), "{when}");
    let bridge = node.host().try_run(&["ip", "link", "show", "meshbr0"]);
    assert!(!bridge.success(), "{when}: {}", bridge.stdout);
}

fn del_frees_what_any_step_has_left(title: &str, more: &Value) {
    let (mesh, network) = start(title, more);
    let node = &mesh.nodes[0];
    let namespace = network.namespace("undisturbed");
    let add = steps_of(&network, "ADD", &namespace).calls.len();
    let del = steps_of(&network, "DEL", &namespace).calls.len();
    nothing_is_left(node, "undisturbed");
    for step in 0..add {
        let name = format!("a{step}");
        let namespace = network.namespace(&name);
        killed(&network, "ADD", &name, &namespace, step);
        let when = format!("after ADD killed before step {step} of {add}");
        del_until_free(&network, node, &name, &namespace, &when);
        nothing_is_left(node, &when);
    }
    for step in 0..del {
        let name = format!("d{step}");
        let namespace = network.namespace(&name);
        network.add(&name, &namespace).unwrap_or_else(|failure| panic!("{failure}"));
        killed(&network, "DEL", &name, &namespace, step);
        let when = format!("after DEL killed before step {step} of {del}");
        del_until_free(&network, node, &name, &namespace, &when);
        nothing_is_left(node, &when);
    }
    mesh.await_endpoints(0);
    let pod = network.pod("after");
    await_reaches(node.host(), &pod);
}

#[test]
fn del_frees_what_a_plugin_killed_at_any_step_has_left() {
    del_frees_what_any_step_has_left("cni-steps-del", &json!({}));
}

#[test]
fn del_frees_what_a_plugin_killed_at_any_step_has_left_on_a_bridge() {
    del_frees_what_any_step_has_left("cni-steps-bridge", &json!({"mode": "bridge"}));
}

/// Every ADD and every DEL is killed before another step; returns the names.
fn leave_everything(network: &CniRuntime) -> Vec<(String, Namespace)> {
    let namespace = network.namespace("undisturbed");
    let add = steps_of(network, "ADD", &namespace).calls.len();
    let del = steps_of(network, "DEL", &namespace).calls.len();
    let mut left = Vec::new();
    for step in 0..add {
        let name = format!("a{step}");
        let namespace = network.namespace(&name);
        killed(network, "ADD", &name, &namespace, step);
        left.push((name, namespace));
    }
    for step in 0..del {
        let name = format!("d{step}");
        let namespace = network.namespace(&name);
        network.add(&name, &namespace).unwrap_or_else(|failure| panic!("{failure}"));
        killed(network, "DEL", &name, &namespace, step);
        left.push((name, namespace));
    }
    left
}

#[test]
fn gc_frees_what_a_plugin_killed_at_any_step_has_left() {
    let (mesh, network) = start("cni-steps-gc", &json!({"mode": "bridge"}));
    let node = &mesh.nodes[0];
    let kept = network.pod("kept");
    let left = leave_everything(&network);
    assert!(attachments(node).len() > left.len() / 2, "{:?}", attachments(node));
    network.gc(&["kept"]).unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(attachments(node), ["kept"]);
    assert_eq!(pod_interfaces(node).len(), 1);
    assert_eq!(reserved(node).len(), 2);
    await_reaches(node.host(), &kept);
    network.gc(&[]).unwrap_or_else(|failure| panic!("{failure}"));
    nothing_is_left(node, "GC");
    mesh.await_endpoints(0);
}

#[test]
fn the_daemon_that_starts_next_frees_what_was_left_while_it_was_away_and_the_containers_went() {
    let (mesh, network) = start("cni-steps-start", &json!({"mode": "bridge"}));
    let node = &mesh.nodes[0];
    let left = leave_everything(&network);
    node.kill9();
    // The runtime is gone, too: there is no DEL.
    for (_, namespace) in &left {
        remove(namespace);
    }
    drop(left);
    node.start();
    node.await_ready(SOON);
    await_ok("everything to be freed", SWEPT, || {
        let left = (pod_interfaces(node), attachments(node), reserved(node));
        let bridge = node.host().try_run(&["ip", "link", "show", "meshbr0"]);
        if left == (vec![], vec![], vec![]) && !bridge.success() { Ok(()) } else { Err(format!("{left:?}")) }
    });
    mesh.await_endpoints(0);
}

#[test]
fn a_daemon_killed_at_any_request_is_waited_for_or_leaves_nothing_that_del_does_not_free() {
    let (mesh, network) = start("cni-steps-daemon", &json!({}));
    let node = &mesh.nodes[0];
    let namespace = network.namespace("undisturbed");
    let add = steps_of(&network, "ADD", &namespace);
    let del = steps_of(&network, "DEL", &namespace);
    // Before connecting, before asking, and when it has been asked.
    let requests =
        |steps: &Steps| -> BTreeSet<usize> { steps.requests.iter().flat_map(|at| [*at, at + 1, at + 2]).collect() };
    let (adds, dels) = (requests(&add), requests(&del));
    // An ADD announces the attachment right after it got its addresses.
    assert!(adds.len() == 5 && dels.len() == 3, "{adds:?} {dels:?}");
    let restart = || {
        node.kill9();
        node.start();
        Then::GoOn
    };
    for step in adds {
        let mut attempt = 0;
        let when = format!("with the daemon killed before step {step}");
        await_ok(&format!("ADD to succeed {when}"), SOON, || {
            attempt += 1;
            let name = format!("a{step}x{attempt}");
            let namespace = network.namespace(&name);
            let steps = network.stepped("ADD", &name, &namespace, step, restart);
            assert!(steps.reached, "{when}: {steps:?}");
            node.await_ready(SOON);
            if steps.status.success() {
                assert_eq!(attachments(node), [name.as_str()]);
            }
            del_until_free(&network, node, &name, &namespace, &when);
            assert_nothing_left(node);
            // A daemon that needs more than three seconds to start is not waited for.
            if steps.status.success() { Ok(()) } else { Err(format!("{steps:?}")) }
        });
    }
    for step in dels {
        let name = format!("d{step}");
        let namespace = network.namespace(&name);
        network.add(&name, &namespace).unwrap_or_else(|failure| panic!("{failure}"));
        let steps = network.stepped("DEL", &name, &namespace, step, restart);
        assert!(steps.reached && steps.status.success(), "DEL, daemon killed before step {step}: {steps:?}");
        node.await_ready(SOON);
        // One that it had read before it was killed is withdrawn by its file, or was by itself.
        assert_nothing_left(node);
    }
    mesh.await_endpoints(0);
}
