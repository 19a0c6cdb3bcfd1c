//! The chart alone on a new cluster: it brings an etcd for the mesh, which grows, loses a member and is restored.

use integration::{Output, ProxyMode, await_ok};
use serde_json::{Value, json};

use crate::{
    SOON,
    fixture::{Cluster, NODES, RELEASE, images, name},
    policies::policy,
    workload::{PORT, pod},
};

/// A key of this scenario's own, that no part of the mesh minds.
const MARKER: &str = "/scenario";

#[test]
fn the_chart_alone_brings_a_network_and_keeps_its_etcd() {
    let mut cluster = Cluster::boot_all("cluster-etcd", ProxyMode::Iptables, None);
    make_control_plane(&cluster, "east1");
    install(&cluster, 1, "");
    cluster.await_ready();
    cluster.create_namespace("shop");
    cluster.apply(&NODES.map(|node| pod("shop", node, "web", node)));
    cluster.await_pods("shop", NODES.len());
    await_mesh_of_pods(&cluster);
    policies_are_in_force(&cluster);
    assert_eq!(etcdctl(&cluster, "endpoint status").stdout.lines().count(), 1);
    rights_are_least(&cluster);

    // From one member to three; daemons learn of the new ones while they run.
    for node in ["east2", "west1"] {
        make_control_plane(&cluster, node);
    }
    install(&cluster, 3, "");
    await_members(&cluster, &["east1", "east2", "west1"]);

    // A member's machine is gone, with its Node.
    let place = cluster.nodes.iter().position(|node| node.name() == "east2").unwrap();
    cluster.nodes.remove(place).destroy();
    cluster.kubectl("delete node east2");
    etcdctl(&cluster, &format!("put {MARKER} written-with-two"));
    maintain(&cluster, "after-loss");
    await_members(&cluster, &["east1", "west1"]);
    let new = cluster.boot("east2", images());
    new.await_booted();
    cluster.nodes.push(new);
    make_control_plane(&cluster, "east2");
    cluster.await_ready();
    let snapshot = maintain(&cluster, "replaced");
    await_members(&cluster, &["east1", "west1", "east2"]);

    // Back to the snapshot, on its node first.
    etcdctl(&cluster, &format!("put {MARKER} after-the-snapshot"));
    install(&cluster, 3, &snapshot);
    await_ok("the snapshot's data", SOON, || {
        let told = try_etcdctl(&cluster, &format!("get {MARKER} --print-value-only"))?;
        if told.stdout.trim() == "written-with-two" { Ok(()) } else { Err(told.describe()) }
    });
    await_members(&cluster, &NODES);
    cluster.await_ready();
    await_mesh_of_pods(&cluster);

    // Uninstalled and installed again: the data is still there.
    cluster.helm(&["uninstall", RELEASE, "-n", "kube-system", "--wait", "--timeout", "3m"]);
    install(&cluster, 3, &snapshot);
    await_members(&cluster, &NODES);
    assert_eq!(etcdctl(&cluster, &format!("get {MARKER} --print-value-only")).stdout.trim(), "written-with-two");
    cluster.await_ready();
    await_mesh_of_pods(&cluster);
    cluster.sniffer.assert_clean();
}

fn install(cluster: &Cluster, members: usize, restore: &str) {
    let image = Cluster::image_values();
    let sites = r#"{"east": {"nodeSelector": {"topology.kubernetes.io/zone": "east"}},
        "west": {"nodeSelector": {"topology.kubernetes.io/zone": "west"}}}"#;
    let values = format!(r#"{{{image}, "sites": {sites}, "etcd": {{"members": {members}, "restore": "{restore}"}}}}"#);
    cluster.install_release(&values);
}

#[track_caller]
pub(crate) fn make_control_plane(cluster: &Cluster, node: &str) {
    await_ok(&format!("node {node} to be registered"), SOON, || {
        let nodes = cluster.api.list("nodes");
        if nodes.iter().any(|it| name(it) == Some(node)) { Ok(()) } else { Err(format!("{} nodes", nodes.len())) }
    });
    cluster.kubectl(&format!("label node {node} node-role.kubernetes.io/control-plane= --overwrite"));
}

/// Runs etcdctl in a member's container that is Ready.
fn try_etcdctl(cluster: &Cluster, args: &str) -> Result<Output, String> {
    let pods = cluster.get("pods -n kube-system -l app.kubernetes.io/name=meshd-etcd");
    let ready = |pod: &&Value| crate::fixture::condition(pod, "Ready") == Some("True");
    let pod = pods["items"].as_array().unwrap().iter().find(ready).ok_or("no member is Ready")?;
    let exec = ["-n", "kube-system", "exec", name(pod).unwrap(), "--", "etcdctl"];
    let args: Vec<&str> = args.split_whitespace().collect();
    let output = cluster.api.try_kubectl(&[&exec[..], &args].concat(), "");
    if output.success() { Ok(output) } else { Err(output.describe()) }
}

#[track_caller]
fn etcdctl(cluster: &Cluster, args: &str) -> Output {
    let mut answer = None;
    await_ok(&format!("etcdctl {args}"), SOON, || {
        answer = Some(try_etcdctl(cluster, args)?);
        Ok(())
    });
    answer.unwrap()
}

/// Waits until members run on these nodes and on no other, as the record, etcd and the daemons say.
#[track_caller]
fn await_members(cluster: &Cluster, nodes: &[&str]) {
    let mut wanted: Vec<&str> = nodes.to_vec();
    wanted.sort_unstable();
    await_ok(&format!("members on {wanted:?}"), SOON * 2, || {
        let map = cluster.get("configmap meshd-etcd -n kube-system");
        let record: Value = serde_json::from_str(map["data"]["members"].as_str().unwrap()).unwrap();
        let members = record["members"].as_array().unwrap();
        let mut joined: Vec<&str> =
            members.iter().filter(|it| it["joined"] == true).filter_map(|it| it["node"].as_str()).collect();
        joined.sort_unstable();
        let listed: Value = serde_json::from_str(&try_etcdctl(cluster, "member list -w json")?.stdout).unwrap();
        let listed = listed["members"].as_array().unwrap();
        let voting = listed.iter().filter(|it| it["isLearner"] != true).count();
        let logs = ["meshd-etcd-setup", "meshd-etcd"].map(|name| {
            let select = format!("app.kubernetes.io/name={name}");
            cluster.api.try_kubectl(&["-n", "kube-system", "logs", "-l", &select, "--tail=15", "--prefix"], "").stdout
        });
        let said = format!("{record:#}\n{listed:?}\n{}", logs.concat());
        if joined == wanted && members.len() == nodes.len() && (listed.len(), voting) == (nodes.len(), nodes.len()) {
            Ok(())
        } else {
            Err(said)
        }
    });
}

/// Runs the CronJob's work now. The snapshot that it took, as `etcd.restore` takes it.
#[track_caller]
fn maintain(cluster: &Cluster, job: &str) -> String {
    cluster.kubectl(&format!("-n kube-system create job {job} --from=cronjob/meshd-etcd-maintain"));
    let pods = || cluster.get(&format!("pods -n kube-system -l job-name={job}"));
    await_ok(&format!("job {job}"), SOON * 2, || {
        let done = cluster.get(&format!("job {job} -n kube-system"))["status"]["succeeded"] == 1;
        let logs = cluster.api.try_kubectl(&["-n", "kube-system", "logs", "-l", &format!("job-name={job}")], "");
        if done { Ok(()) } else { Err(format!("{:#}\n{}", pods()["items"], logs.stdout)) }
    });
    let pods = pods();
    let pod = pods["items"].as_array().unwrap().iter().find(|pod| pod["status"]["phase"] == "Succeeded").unwrap();
    let log = cluster.kubectl(&format!("-n kube-system logs {}", name(pod).unwrap()));
    let file =
        log.lines().find_map(|line| line.split_once("snapshot written file=")).unwrap_or_else(|| panic!("{log}"));
    let file = file.1.trim().rsplit('/').next().unwrap();
    format!("{}/{file}", pod["spec"]["nodeName"].as_str().unwrap())
}

/// What daemons and meshd-sync may do with their certificates, and no more.
fn rights_are_least(cluster: &Cluster) {
    let told = etcdctl(cluster, "user get meshd-node").stdout;
    assert!(told.contains("Roles: meshd-nodes"), "{told}");
    let daemon = cluster.daemon_on("east1");
    // The daemon's image has etcdctl.
    let tls = "--cacert=/etc/meshd/etcd/ca.crt --cert=/etc/meshd/etcd/tls.crt --key=/etc/meshd/etcd/tls.key";
    let address = cluster.get("node east1")["status"]["addresses"][0]["address"].as_str().unwrap().to_owned();
    let put = |key: &str| {
        let command = format!("etcdctl --endpoints=https://{address}:2391 {tls} put {key} x");
        let exec = format!("-n kube-system exec {daemon} -c meshd -- {command}");
        let args: Vec<&str> = exec.split_whitespace().collect();
        cluster.api.try_kubectl(&args, "")
    };
    for key in ["/meshd/config", "/meshd/k8s/default/networkpolicies/shop/x", "/meshd/peers/x", "/elsewhere"] {
        let refused = put(key);
        assert!(!refused.success() && refused.stderr.contains("permission denied"), "{key}: {}", refused.describe());
    }
    // Without a certificate there is no connection.
    let node = cluster.node("east2");
    let bare = node.try_sh(&format!("curl -ksS -m 5 https://{address}:2391/version"));
    assert!(!bare.success(), "{}", bare.describe());
    // A daemon's certificate opens the clients' port, and not the members' own.
    for part in ["ca.crt", "tls.crt", "tls.key"] {
        let secret = cluster.get("secret meshd-etcd-node -n kube-system");
        let text = secret["data"][part].as_str().unwrap();
        node.sh(&format!("echo {text} | base64 -d >/root/{part}"));
    }
    let ask = |port: u16| {
        let tls = "--cacert /root/ca.crt --cert /root/tls.crt --key /root/tls.key";
        node.try_sh(&format!("curl -sS -m 5 {tls} https://{address}:{port}/version"))
    };
    assert!(ask(2391).success(), "{}", ask(2391).describe());
    assert!(!ask(2392).success(), "{}", ask(2392).describe());
}

fn policies_are_in_force(cluster: &Cluster) {
    let url = format!("{}:{PORT}/hostname", cluster.address("shop", "west1"));
    cluster.await_answer("shop", "east1", &url, "west1");
    cluster.apply(&[policy(&json!([{"podSelector": {"matchLabels": {"app": "buyer"}}}]))]);
    await_ok("the policy to be in force", SOON, || match cluster.ask("shop", "east1", &url) {
        Err(_) => Ok(()),
        Ok(answered) => Err(answered),
    });
    cluster.kubectl("-n shop delete networkpolicy --all");
    cluster.await_answer("shop", "east1", &url, "west1");
}

#[track_caller]
fn await_mesh_of_pods(cluster: &Cluster) {
    cluster.apply(&NODES.map(|node| pod("shop", node, "web", node)));
    crate::lifecycle::await_mesh_of_pods(cluster);
}
