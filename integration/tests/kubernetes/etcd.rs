//! The etcd that the chart brings, without kubelets: setup against a real API server, the member as its pod runs it.
//!
//! ```text
//!   cp (192.0.2.10): API server with a Node of this address; meshd-etcd setup and maintain; the member
//! ```

use std::{fs, path::PathBuf, process::Command};

use integration::{Host, KubernetesApi, Lab, Output, Process, await_ok, binary};
use serde_json::{Value, json};

use crate::SOON;

const NO_RESTORE: &str = "";
/// `config` as the chart has it.
const NETWORK: &str = r#"{"Network": "10.42.0.0/16"}"#;

struct Bed {
    api: KubernetesApi,
    host: Host,
    /// What a member's pod mounts.
    folder: PathBuf,
    _lab: Lab,
}

impl Bed {
    fn start() -> Self {
        let lab = Lab::new("kubernetes-etcd");
        let (host, lan) = (lab.host("cp"), lab.switch("lan"));
        host.connect(&lan, &["192.0.2.10/24"]);
        host.run("ip route add default via 192.0.2.1");
        let folder = lab.folder().join("member");
        for part in ["record", "server", "root", "node", "sync-west", "data"] {
            fs::create_dir_all(folder.join(part)).unwrap();
        }
        let api = KubernetesApi::start(&host);
        Self { api, host, folder, _lab: lab }
    }

    /// A Node as a kubelet registers it on a control plane, with a podCIDR.
    fn register(&self, name: &str) {
        let node = json!({"apiVersion": "v1", "kind": "Node", "spec": {"podCIDR": "10.42.0.0/24", "podCIDRs": ["10.42.0.0/24"]},
            "metadata": {"name": name, "labels": {"node-role.kubernetes.io/control-plane": "true"}}});
        self.api.apply(&node.to_string());
        let status = json!({"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.10"}],
            "conditions": [{"type": "Ready", "status": "True"}]}});
        let args = ["patch", "node", name, "--subresource=status", "--type=merge", "-p", &status.to_string()];
        self.api.kubectl(&args, "");
    }

    fn command(&self, command: &str, restore: &str, config: &str) -> Vec<String> {
        let kubeconfig = format!("--kubeconfig={}", self.api.kubeconfig().display());
        let mut args = vec![command.to_owned(), kubeconfig, "--cluster=east".into(), "--timeout=100s".into()];
        args.push("--other-clusters=west".to_owned());
        args.push(format!("--config={config}"));
        if !restore.is_empty() {
            args.push(format!("--restore={restore}"));
        }
        if command == "maintain" {
            args.push(format!("--snapshots={}", self.folder.join("data/snapshots").display()));
        }
        args
    }

    fn spawn_setup(&self, restore: &str, config: &str) -> Process {
        let args = self.command("setup", restore, config);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.host.spawn(binary("meshd-etcd").to_string_lossy().into_owned(), &args)
    }

    fn maintain(&self) -> Output {
        let args = self.command("maintain", NO_RESTORE, NETWORK);
        let program = binary("meshd-etcd").to_string_lossy().into_owned();
        let command: Vec<&str> = std::iter::once(program.as_str()).chain(args.iter().map(String::as_str)).collect();
        self.host.run_with_input(&command, "")
    }

    /// Waits until setup has labelled the node, as the DaemonSet does, and writes what the pod mounts.
    fn await_pod(&self, member: &str) {
        await_ok("the node's label", SOON, || {
            let nodes = self.api.list("nodes");
            let label = &nodes[0]["metadata"]["labels"]["meshd.node-restriction.kubernetes.io/etcd"];
            if label == "meshd-etcd" && self.record().contains(member) { Ok(()) } else { Err(format!("{nodes:?}")) }
        });
        fs::write(self.folder.join("record/members"), self.record()).unwrap();
        for part in ["server", "root", "node", "sync-west"] {
            let secret = self.get(&format!("secret meshd-etcd-{part} -n kube-system"));
            for (file, data) in secret["data"].as_object().unwrap() {
                let script = format!("echo {} | base64 -d >{}", data.as_str().unwrap(), self.file(part, file));
                assert!(Command::new("sh").args(["-ec", &script]).status().unwrap().success());
            }
        }
    }

    fn record(&self) -> String {
        let map = self.get("configmap meshd-etcd -n kube-system");
        map["data"]["members"].as_str().unwrap_or_default().to_owned()
    }

    fn get(&self, what: &str) -> Value {
        let args: Vec<&str> = ["get"].into_iter().chain(what.split(' ')).chain(["-o", "json"]).collect();
        serde_json::from_str(&self.api.try_kubectl(&args, "").stdout).unwrap_or_default()
    }

    fn file(&self, part: &str, file: &str) -> String {
        self.folder.join(part).join(file).display().to_string()
    }

    /// The member, as its container runs it.
    fn start_member(&self) -> Process {
        let path = format!("PATH={}:/usr/bin", programs().display());
        let (record, data) = (self.file("record", "members"), self.file("data", ""));
        let certificates = self.file("server", "");
        self.host.spawn(
            "env",
            &[
                &path,
                &binary("meshd-etcd").to_string_lossy(),
                "member",
                "--node=cp",
                &format!("--record={record}"),
                &format!("--certificates={certificates}"),
                &format!("--data-dir={data}"),
            ],
        )
    }

    /// Runs etcdctl as this user.
    fn etcdctl(&self, user: &str, args: &[&str]) -> Output {
        let etcdctl = programs().join("etcdctl").display().to_string();
        let [ca, cert, key] = ["ca.crt", "tls.crt", "tls.key"].map(|file| self.file(user, file));
        let tls = [format!("--cacert={ca}"), format!("--cert={cert}"), format!("--key={key}")];
        let tls = tls.iter().map(String::as_str);
        let endpoint = "--endpoints=https://192.0.2.10:2391";
        let command: Vec<&str> =
            [etcdctl.as_str(), endpoint].into_iter().chain(tls).chain(args.iter().copied()).collect();
        self.host.run_with_input(&command, "")
    }

    #[track_caller]
    fn get_key(&self, key: &str) -> String {
        let told = self.etcdctl("root", &["get", key, "--print-value-only"]);
        assert!(told.success(), "{}", told.describe());
        told.stdout.trim().to_owned()
    }
}

fn programs() -> PathBuf {
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/install-etcd");
    let output = Command::new(&script).arg("--path").output().unwrap();
    let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    assert!(folder.join("complete").exists(), "etcd is not built; run: scripts/install-etcd");
    folder
}

#[test]
fn setup_brings_a_member_users_and_the_network_and_a_snapshot_brings_them_back() {
    let bed = Bed::start();
    // Setup may come before the first node.
    let setup = bed.spawn_setup(NO_RESTORE, NETWORK);
    setup.await_log("no node may run a member", SOON);
    bed.register("cp");
    bed.await_pod("cp-");
    let first = bed.record();
    let member = bed.start_member();
    setup.await_log("etcd is set up", SOON);
    let config: Value = serde_json::from_str(&bed.get_key("/meshd/config")).unwrap();
    assert_eq!((&config["Network"], &config["Allocate"]), (&"10.42.0.0/16".into(), &"kubernetes".into()), "{config}");
    let endpoints = bed.get("configmap meshd-etcd -n kube-system")["data"]["endpoints"].clone();
    assert_eq!(endpoints, "https://192.0.2.10:2391\n");

    // A daemon's certificate: nodes' own records, and nothing that decides for others.
    assert!(bed.etcdctl("node", &["put", "/meshd/nodes/n1", "{}"]).success());
    for key in ["/meshd/config", "/meshd/k8s/east/pods/a/b", "/meshd/removed/n1", "/other"] {
        let refused = bed.etcdctl("node", &["put", key, "{}"]);
        assert!(!refused.success() && refused.stderr.contains("permission denied"), "{key}: {}", refused.describe());
    }
    assert!(!bed.etcdctl("node", &["user", "list"]).success());
    // meshd-sync of another cluster: its own keys.
    assert!(bed.etcdctl("sync-west", &["put", "/meshd/k8s/west/pods/a/b", "{}"]).success());
    assert!(!bed.etcdctl("sync-west", &["put", "/meshd/k8s/east/pods/a/b", "{}"]).success());

    // Run again: nothing changes, the network least of all.
    let again = bed.spawn_setup(NO_RESTORE, r#"{"Network": "10.43.0.0/16", "Allocate": "mesh"}"#);
    again.await_log("etcd is set up", SOON);
    assert_eq!(serde_json::from_str::<Value>(&bed.get_key("/meshd/config")).unwrap(), config);
    assert!(bed.record().contains(r#""joined": true"#));

    let kept = bed.maintain();
    let file =
        kept.stderr.lines().find_map(|line| line.split_once("snapshot written file=")).map(|(_, file)| file.trim());
    let file = file.unwrap_or_else(|| panic!("{}", kept.describe())).rsplit('/').next().unwrap().to_owned();
    assert!(bed.etcdctl("root", &["put", "/meshd/peers/later", "{}"]).success());

    // The snapshot, in another member's folder; the pod is the DaemonSet's to restart.
    let restore = bed.spawn_setup(&format!("cp/{file}"), NETWORK);
    restore.await_log("step=Restart", SOON);
    drop(member);
    assert_ne!(bed.record(), first);
    bed.await_pod(&file);
    let member = bed.start_member();
    restore.await_log("etcd is set up", SOON);
    assert_eq!(bed.get_key("/meshd/peers/later"), "", "written after the snapshot");
    assert_eq!(bed.get_key("/meshd/nodes/n1"), "{}", "written before it");

    // Without its data, a member that has joined does not begin again as an empty one.
    drop(member);
    fs::write(bed.folder.join("record/members"), bed.record()).unwrap();
    fs::remove_dir_all(bed.folder.join("data")).unwrap();
    bed.start_member().await_log("has joined, but its data is not in", SOON);
}
