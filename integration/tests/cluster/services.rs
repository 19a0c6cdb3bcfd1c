//! Services by both of kube-proxy's modes, ports of nodes and hosts, and names.

use std::collections::BTreeSet;

use integration::{ProxyMode, await_ok};
use serde_json::{Value, json};

use crate::{
    SOON,
    fixture::{CONTROL_PLANE, Cluster, NODES},
    workload::pod,
};

/// Ports of nodes: of a Service that goes to all nodes, and of one that stays on the node.
const ANYWHERE: u16 = 30080;
const HERE: u16 = 30081;
const HOST_PORT: u16 = 8081;

#[test]
fn services_work_with_iptables() {
    services(&Cluster::start("cluster-services-iptables", ProxyMode::Iptables));
}

#[test]
fn services_work_with_nftables() {
    services(&Cluster::start("cluster-services-nftables", ProxyMode::Nftables));
}

fn services(cluster: &Cluster) {
    cluster.api.apply(include_str!("dns.yaml"));
    cluster.create_namespace("shop");
    cluster.apply(&NODES.map(|node| pod("shop", node, "web", node)));
    cluster.apply(&[service("web", ANYWHERE, "Cluster"), service("local", HERE, "Local"), with_host_port()]);
    cluster.await_pods("shop", NODES.len() + 1);
    cluster.kubectl("-n kube-system rollout status deployment/coredns --timeout=50s");
    let all: BTreeSet<String> = NODES.map(str::to_owned).into();
    for from in NODES {
        await_backends(&format!("pod {from} by the Service's name"), &all, || {
            cluster.ask("shop", from, "web/hostname")
        });
        // The API server, behind a Service, too: by its certificate's name.
        let api = "curl -sS -m 3 -o /dev/null --cacert /var/run/secrets/kubernetes.io/serviceaccount/ca.crt \
            https://kubernetes.default.svc/livez";
        await_ok("the API server", SOON, || {
            let output = cluster.exec("shop", from, api);
            if output.success() { Ok(()) } else { Err(output.describe()) }
        });
    }
    for (node, address) in NODES.into_iter().zip(addresses(cluster)) {
        let anywhere = format!("{address}:{ANYWHERE}/hostname");
        await_backends(&format!("another host by {node}"), &all, || from_outside(cluster, &anywhere));
        await_backends(&format!("a pod by {node}"), &all, || cluster.ask("shop", "west1", &anywhere));
        let here = format!("{address}:{HERE}");
        let own = BTreeSet::from([node.to_owned()]);
        await_backends(&format!("another host by {node} alone"), &own, || {
            from_outside(cluster, &format!("{here}/hostname"))
        });
        await_client(cluster, &format!("{here}/clientip"));
    }
    await_client(cluster, &format!("{}:{HOST_PORT}/clientip", cluster.sites.west.v4(0)));
    cluster.sniffer.assert_clean();
}

fn addresses(cluster: &Cluster) -> [String; 3] {
    [cluster.sites.east.v4(0), cluster.sites.east.v4(1), cluster.sites.west.v4(0)]
}

fn service(name: &str, node_port: u16, traffic: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": name},
        "spec": {"type": "NodePort", "externalTrafficPolicy": traffic, "selector": {"app": "web"},
            "ports": [{"port": 80, "targetPort": "http", "nodePort": node_port}]}})
}

fn with_host_port() -> Value {
    let mut pod = pod("shop", "front", "front", "west1");
    pod["spec"]["containers"][0]["ports"][0]["hostPort"] = HOST_PORT.into();
    pod
}

/// From a host that is in no cluster.
fn from_outside(cluster: &Cluster, url: &str) -> Result<String, String> {
    let output = cluster.sites.store.try_run(&["curl", "-sS", "-m", "3", &format!("http://{url}")]);
    if output.success() { Ok(output.stdout) } else { Err(output.describe()) }
}

/// Waits until the answers are those of all these pods, and of no other.
#[track_caller]
fn await_backends(what: &str, wanted: &BTreeSet<String>, mut ask: impl FnMut() -> Result<String, String>) {
    let mut found = BTreeSet::new();
    await_ok(&format!("answers to {what}"), SOON, || {
        found.insert(ask()?);
        if found.is_superset(wanted) { Ok(()) } else { Err(format!("{found:?}")) }
    });
    assert_eq!(&found, wanted, "{what}");
}

/// Waits until the server sees the outside host's own address.
#[track_caller]
fn await_client(cluster: &Cluster, url: &str) {
    await_ok(&format!("{url} to see the client"), SOON, || {
        let seen = from_outside(cluster, url)?;
        let address = seen.rsplit_once(':').map(|(address, _)| address);
        if address == Some(CONTROL_PLANE) { Ok(()) } else { Err(seen) }
    });
}
