//! The local API: who may change something, and what a request may cost.
//!
//! ```text
//!   east1 (one daemon, no pods) ── switch ── router ── etcd
//! ```

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::PathBuf,
};

use integration::{MeshdNode, stepped::Then};
use serde_json::json;

use crate::{Nodes, assert_nothing_left, attachments, await_reaches, pod_interfaces, reserved};

#[test]
fn only_root_may_attach_and_no_request_is_unbounded() {
    let mesh = Nodes::start("cni-api", 1, 0);
    let node = &mesh.nodes[0];
    let begin = json!({"network": "mesh", "netns": "/proc/1/ns/net", "ofTheNextVersion": {"a": 1}}).to_string();
    let one = "/v1/attachments/c1/eth0";

    // What is of another version is read as far as it is known.
    let answer = ask(node, "POST", one, &begin);
    assert!(answer.starts_with("HTTP/1.0 200") && answer.contains("\"subnets\""), "{answer}");
    assert_eq!(attachments(node), ["c1"]);

    for (method, path, body, status) in [
        ("POST", one, "{", "400"),
        ("POST", one, "[]", "422"),
        ("POST", "/v1/attachments/..%2Fc1/eth0", begin.as_str(), "400"),
        ("POST", "/v1/attachments/c1/a%2Fb", begin.as_str(), "400"),
        (
            "PUT",
            "/v1/attachments/c2/eth0",
            r#"{"pod":{"namespace":"a","name":"b"},"addresses":["10.0.0.1"],"interface":"x"}"#,
            "404",
        ),
        ("PUT", one, r#"{"pod":{"namespace":"a","name":"b"},"addresses":[],"interface":"x"}"#, "400"),
        ("GET", "/v1/attachments/c2/eth0", "", "404"),
        ("DELETE", "/v1/attachments/c2/eth0", "", "204"),
    ] {
        let answer = ask(node, method, path, body);
        assert!(answer.starts_with(&format!("HTTP/1.0 {status}")), "{method} {path} {body}: {answer}");
    }
    let long = json!({"network": "n".repeat(1 << 20), "netns": "/x"}).to_string();
    let answer = ask(node, "POST", one, &long);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.0 413"), "{answer}");

    // Somebody else, who was given the socket, may look and not touch.
    let socket = socket(node);
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    let request = |method: &str| {
        let url = format!("http://meshd{one}");
        let socket = socket.to_string_lossy().into_owned();
        let other = ["setpriv", "--reuid", "65534", "--clear-groups", "curl", "-s", "--unix-socket", &socket];
        node.host()
            .run_args(
                &[&other[..], &["-X", method, "-H", "content-type: application/json", "-d", &begin, &url]].concat(),
            )
            .stdout
    };
    for method in ["POST", "PUT", "DELETE"] {
        assert!(request(method).contains("\"denied\""), "{method}");
    }
    assert!(request("GET").contains("\"containerId\":\"c1\""));
    assert_eq!(attachments(node), ["c1"]);

    // Silent connections keep no other out.
    let idle: Vec<UnixStream> = (0..200).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let pod = node.cni("1.0.0", &json!({})).pod("pod");
    await_reaches(node.host(), &pod);
    drop(idle);
}

#[test]
fn a_daemon_that_stands_still_costs_an_add_its_time_and_leaves_nothing() {
    let mesh = Nodes::start("cni-api-slow", 1, 0);
    let node = &mesh.nodes[0];
    let network = node.cni("1.1.0", &json!({}));
    let namespace = network.namespace("undisturbed");
    // The daemon has settled.
    network.add("first", &namespace).unwrap_or_else(|failure| panic!("{failure}"));
    network.del("first", Some(&namespace)).unwrap_or_else(|failure| panic!("{failure}"));
    let steps = network.stepped("ADD", "undisturbed", &namespace, usize::MAX, || unreachable!());
    network.del("undisturbed", Some(&namespace)).unwrap_or_else(|failure| panic!("{failure}"));
    let [begins, attaches] = steps.requests[..] else { panic!("{steps:?}") };
    for (name, step) in [("at-first", begins), ("at-last", attaches)] {
        let namespace = network.namespace(name);
        let ended = network.stepped("ADD", name, &namespace, step, || {
            node.stop();
            Then::GoOn
        });
        assert!(ended.reached && !ended.status.success(), "{ended:?}");
        assert_eq!((pod_interfaces(node), reserved(node)), (vec![], vec![]), "what ADD itself had");
        assert_eq!(namespace.run("ip -brief link").stdout.lines().count(), 1, "only lo");
        node.cont();
        // What the daemon was asked for meanwhile it reads only now, before or after the DEL.
        network.del(name, Some(&namespace)).unwrap_or_else(|failure| panic!("{failure}"));
        assert_nothing_left(node);
    }
    let pod = network.pod("after");
    await_reaches(node.host(), &pod);
}

fn socket(node: &MeshdNode) -> PathBuf {
    node.run_dir().join(cni::daemon::SOCKET)
}

/// All that is answered to a request; nothing when the daemon hangs up on it.
fn ask(node: &MeshdNode, method: &str, path: &str, body: &str) -> String {
    let mut stream = UnixStream::connect(socket(node)).unwrap();
    let length = body.len();
    let head =
        format!("{method} {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n");
    let mut answer = String::new();
    if stream.write_all((head + body).as_bytes()).is_ok() {
        let _ = stream.read_to_string(&mut answer);
    }
    answer
}
