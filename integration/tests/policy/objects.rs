//! Kubernetes objects as `kubectl get -o json` prints them, put into etcd.

use std::net::IpAddr;

use integration::Etcd;
use serde_json::{Value, json};

const PREFIX: &str = "/meshd";

/// Puts a Namespace.
pub(crate) fn put_namespace(etcd: &Etcd, name: &str, labels: &Value) {
    let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
    etcd.put(&format!("{PREFIX}/namespaces/{name}"), &object.to_string());
}

/// Puts a running Pod on `node` with these addresses.
pub(crate) fn put_pod(etcd: &Etcd, (namespace, name): (&str, &str), labels: &Value, node: &str, addresses: &[IpAddr]) {
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    let object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "labels": labels},
        "spec": {"nodeName": node},
        "status": {"phase": "Running", "podIPs": ips},
    });
    etcd.put(&format!("{PREFIX}/pods/{namespace}/{name}"), &object.to_string());
}

/// Puts a NetworkPolicy.
pub(crate) fn put_policy(etcd: &Etcd, namespace: &str, name: &str, spec: &Value) {
    let object = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace, "name": name},
        "spec": spec,
    });
    etcd.put(&format!("{PREFIX}/networkpolicies/{namespace}/{name}"), &object.to_string());
}

/// Takes a NetworkPolicy away.
pub(crate) fn delete_policy(etcd: &Etcd, namespace: &str, name: &str) {
    etcd.del(&format!("{PREFIX}/networkpolicies/{namespace}/{name}"));
}
