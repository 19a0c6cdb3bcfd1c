//! The fixture: both servers, and what etcd should hold.

use std::collections::{BTreeMap, BTreeSet};

use etcd_schema::{KubernetesKey, KubernetesName};
use integration::{Etcd, Host, KubernetesApi, Lab, Meshd, MeshdNode, Output, Process, Switch, await_ok, binary};
use policy::objects::{self, Object};
use serde_json::Value;

use crate::SOON;

/// Below this, the cluster's keys.
pub(crate) const ROOT: &str = "/meshd/k8s/east/";
const KINDS: [&str; 5] = ["namespaces", "nodes", "networkpolicies", "clusternetworkpolicies", "pods"];

/// A cluster, the mesh's etcd, and a host for meshd-sync.
pub(crate) struct Cluster {
    pub(crate) api: KubernetesApi,
    pub(crate) etcd: Etcd,
    host: Host,
    lan: Switch,
    lab: Lab,
}

impl Cluster {
    pub(crate) fn start(title: &str) -> Self {
        let lab = Lab::new(title);
        let host = lab.host("cp");
        let lan = lab.switch("lan");
        host.connect(&lan, &["192.0.2.10/24"]);
        host.run("ip route add default via 192.0.2.1");
        let etcd = Etcd::start(&host, &["192.0.2.10"], 1);
        Self { api: KubernetesApi::start(&host), etcd, host, lan, lab }
    }

    /// Starts a node of the mesh on the same host.
    pub(crate) fn node(&self) -> MeshdNode {
        self.node_of("")
    }

    /// The same with more words on its command line.
    pub(crate) fn node_of(&self, args: &str) -> MeshdNode {
        Meshd::on(&self.host, &self.etcd).site("east").args(args).start()
    }

    /// Starts a node of the mesh on another host, beside the cluster.
    pub(crate) fn node_beside(&self) -> MeshdNode {
        let host = self.lab.host("beside");
        host.connect(&self.lan, &["192.0.2.20/24"]);
        host.run("ip route add default via 192.0.2.1");
        Meshd::on(&host, &self.etcd).site("east").start()
    }

    fn command(&self, more: &[&str]) -> (String, Vec<String>) {
        let kubeconfig = self.api.kubeconfig().to_string_lossy().into_owned();
        let mut args = vec!["--cluster".to_owned(), "east".to_owned(), "--kubeconfig".to_owned(), kubeconfig];
        args.extend(["--etcd-endpoints".to_owned(), "http://127.0.0.1:2379".to_owned()]);
        args.extend(more.iter().map(|&arg| arg.to_owned()));
        (binary("meshd-sync").to_string_lossy().into_owned(), args)
    }

    /// Starts meshd-sync.
    pub(crate) fn sync(&self, more: &[&str]) -> Process {
        let (program, args) = self.command(more);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.host.spawn(&program, &args)
    }

    /// What meshd-sync would do, a line each.
    #[track_caller]
    pub(crate) fn dry_run(&self) -> Vec<String> {
        let (program, args) = self.command(&["--dry-run"]);
        let command: Vec<&str> = [program.as_str()].into_iter().chain(args.iter().map(String::as_str)).collect();
        let output = self.host.run_with_input(&command, "");
        assert!(output.success(), "{}", output.describe());
        output.stdout.lines().map(str::to_owned).collect()
    }

    /// Runs meshctl against the mesh's etcd.
    pub(crate) fn meshctl(&self, args: &[&str]) -> Output {
        let program = binary("meshctl");
        let command = ["env", "-u", "MESHD_CONFIG", program.to_str().unwrap()];
        self.host.run_with_input(&[&command, args].concat(), "")
    }

    /// Runs a script on the host.
    #[track_caller]
    pub(crate) fn sh(&self, script: &str) -> String {
        let output = self.host.run_with_input(&["sh", "-ec", script], "");
        assert!(output.success(), "{}", output.describe());
        output.stdout
    }

    /// The keys of objects in etcd, below the cluster's root.
    pub(crate) fn keys(&self) -> BTreeSet<String> {
        self.copied().into_keys().collect()
    }

    pub(crate) fn copied(&self) -> BTreeMap<String, String> {
        let all = self.etcd.get_prefix(ROOT).into_iter();
        let all = all.map(|(key, value)| (key.strip_prefix(ROOT).unwrap().to_owned(), value));
        all.filter(|(key, _)| key.contains('/')).collect()
    }

    pub(crate) fn state(&self) -> Option<Value> {
        self.etcd.get(&format!("{ROOT}state")).map(|state| serde_json::from_str(&state).unwrap())
    }

    /// Waits until etcd holds what the API server does, no more and no less.
    #[track_caller]
    pub(crate) fn await_copy(&self, definitions: bool) {
        await_ok("the copy to be the API server's", SOON, || {
            let copied = self.copied();
            let mut wanted = BTreeSet::new();
            for kind in KINDS.into_iter().filter(|kind| definitions || *kind != "clusternetworkpolicies") {
                for object in self.api.list(kind) {
                    let text = |field: &str| object["metadata"][field].as_str();
                    let namespace = text("namespace").map(|namespace| format!("{namespace}/")).unwrap_or_default();
                    let key = format!("{kind}/{namespace}{}", text("name").unwrap());
                    let value = copied.get(&key).ok_or_else(|| format!("{key} is not there"))?;
                    same(&object, value).map_err(|why| format!("{key}: {why}: {value}"))?;
                    wanted.insert(key);
                }
            }
            let more: Vec<_> = copied.keys().filter(|key| !wanted.contains(*key)).collect();
            if more.is_empty() { Ok(()) } else { Err(format!("left over: {more:?}")) }
        });
    }
}

/// Whether a copied value says what the object does, to those who read it.
fn same(object: &Value, copied: &str) -> Result<(), String> {
    let value: Value = serde_json::from_str(copied).map_err(|error| error.to_string())?;
    for field in ["apiVersion", "kind"] {
        if object[field] != value[field] {
            return Err(field.to_owned());
        }
    }
    let name = |field: &str| object["metadata"][field].as_str().unwrap_or_default().parse::<KubernetesName>();
    match object["kind"].as_str().unwrap_or_default() {
        "Pod" => {
            let key = KubernetesKey::Pod(name("namespace").unwrap(), name("name").unwrap());
            let read = |value: &str| match objects::read(&key, value.as_bytes(), false) {
                Ok(reading) => match reading.object {
                    Object::Pod(pod) => Ok(pod),
                    other => Err(format!("{other:?}")),
                },
                Err(refusal) => Err(refusal.violations.to_string()),
            };
            let (copied, mut whole) = (read(copied)?, read(&object.to_string()).unwrap());
            if whole.finished || whole.host_network {
                whole.addresses.clear();
            }
            equal(&copied, &whole)
        }
        "Namespace" => equal(&value["metadata"]["labels"], &object["metadata"]["labels"]),
        "Node" => {
            equal(&value["metadata"]["labels"], &object["metadata"]["labels"])?;
            equal(&value["spec"]["podCIDRs"], &object["spec"]["podCIDRs"])
        }
        _ => equal(&value["spec"], &object["spec"]),
    }
}

fn equal<T: PartialEq + std::fmt::Debug>(found: &T, wanted: &T) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err(format!("{found:?}, not {wanted:?}")) }
}

/// A Namespace.
pub(crate) fn namespace(name: &str, label: &str) -> String {
    format!(
        r#"{{"apiVersion": "v1", "kind": "Namespace", "metadata": {{"name": "{name}", "labels": {{"team": "{label}"}}}}}}"#
    )
}

/// A Pod of one container with a named port.
pub(crate) fn pod(name: &str, label: &str) -> String {
    format!(
        r#"{{"apiVersion": "v1", "kind": "Pod", "metadata": {{"name": "{name}", "namespace": "shop", "labels": {{"app": "{label}"}}}},
            "spec": {{"nodeName": "e1", "containers": [{{"name": "c", "image": "x", "ports": [{{"name": "http", "containerPort": 80}}]}}]}}}}"#
    )
}

/// A List of objects.
pub(crate) fn list(items: impl IntoIterator<Item = String>) -> String {
    let items: Vec<String> = items.into_iter().collect();
    format!(r#"{{"apiVersion": "v1", "kind": "List", "items": [{}]}}"#, items.join(","))
}
