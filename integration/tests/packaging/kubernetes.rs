//! The DaemonSet of `deploy/kubernetes`: its containers run as a kubelet would, on machines with systemd, and pods come
//! to the mesh by the plugin that they install.
//!
//! ```text
//!   east-1 (DaemonSet, pod) ── switch ── router ── switch ── west-1 (DaemonSet, pod)
//!                                          │
//!                                        etcd
//! ```

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use integration::{
    Machine, Output, await_ok, binary,
    topology::{CONFIG, TwoSites},
};
use serde_json::Value;

use crate::{SOON, debian::left_in_kernel};

/// podman as these machines can run it, its containers in the machine's own files.
pub(crate) const PODMAN: &str = "podman --runtime runc --storage-driver vfs --cgroup-manager cgroupfs";
pub(crate) const LIMITS: &str = "--ulimit nofile=1024:1024 --ulimit nproc=1024:1024";

/// What unpacks the image, and leaves the node without a network as a cluster's is.
const UNPACK: &str = "mkdir image && tar -C image -xf image.tar && rm image.tar && rm -rf /etc/cni/net.d/*";
/// What makes a pod's root file system and has podman use the plugins of the node.
pub(crate) const PREPARE: &str = r#"
mkdir -p pod/{bin,proc,sys,dev,etc,tmp,run,var} /etc/containers
cp /bin/busybox pod/bin/busybox
for applet in sh sleep ping ip; do ln -s busybox pod/bin/$applet; done
printf '%s\n' '[engine]' 'events_logger = "none"' '[containers]' 'pids_limit = 0' '[network]' 'network_backend = "cni"' \
    'network_config_dir = "/etc/cni/net.d"' 'cni_plugin_dirs = ["/opt/cni/bin", "/usr/lib/cni"]' > /etc/containers/containers.conf
"#;

/// The documents of the manifest.
fn manifest() -> Vec<Value> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/meshd.yaml");
    serde_saphyr::from_multiple(&fs::read_to_string(file).unwrap()).unwrap()
}

/// The daemon's own.
fn daemon_set(manifest: &[Value]) -> Value {
    let is_daemon = |document: &&Value| document["kind"] == "DaemonSet" && document["metadata"]["name"] == "meshd";
    manifest.iter().find(is_daemon).unwrap().clone()
}

/// The pod that the DaemonSet makes.
fn pod() -> Value {
    daemon_set(&manifest())["spec"]["template"]["spec"].clone()
}

fn list<'v>(value: &'v Value, field: &str) -> impl Iterator<Item = &'v Value> {
    value[field].as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// The files of the image, as the Dockerfile lays them out, of the binaries that were built beside this test.
fn image(to: &Path) {
    let folder = to.with_extension("root");
    let script = format!(
        "mkdir -p {folder}/binaries && cd {folder} && cp {binaries}/meshd {binaries}/meshctl {binaries}/meshd-sync {binaries}/meshd-etcd {binaries}/meshd-cni binaries/ \
         && strip binaries/* && {scripts}/image-root binaries root $(dpkg --print-architecture) && tar -C root -cf {to} . && rm -r {folder}",
        folder = folder.display(),
        binaries = binary("meshd").parent().unwrap().display(),
        scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts").display(),
        to = to.display(),
    );
    let made = Command::new("bash").args(["-euo", "pipefail", "-c", &script]).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// A machine of the cluster.
struct Node {
    machine: Machine,
    /// Variables that differ from the manifest's: this test's etcd has no certificates.
    other: BTreeMap<&'static str, Option<String>>,
}

impl Node {
    fn env(&self, container: &Value) -> String {
        let mut variables = BTreeMap::from([("PATH", Some("/usr/bin:/usr/sbin".to_owned()))]);
        for variable in list(container, "env") {
            let name = self.machine.name();
            let value = variable["value"].as_str().unwrap_or_else(|| {
                assert_eq!(variable["valueFrom"]["fieldRef"]["fieldPath"], "spec.nodeName", "{variable}");
                name
            });
            variables.insert(text(&variable["name"]), Some(value.to_owned()));
        }
        variables.extend(self.other.iter().map(|(name, value)| (*name, value.clone())));
        let set = variables.iter().filter_map(|(name, value)| Some(format!("-e {name}={}", value.as_deref()?)));
        set.collect::<Vec<_>>().join(" ")
    }

    fn mounts(pod: &Value, container: &Value) -> String {
        let mut options = String::new();
        for mount in list(container, "volumeMounts") {
            let volume = list(pod, "volumes").find(|volume| volume["name"] == mount["name"]);
            let volume = volume.unwrap_or_else(|| panic!("no such volume: {mount}"));
            let Some(path) = volume["hostPath"]["path"].as_str() else { continue };
            let read = if mount["readOnly"] == true { "ro" } else { "rw" };
            let propagation = match mount["mountPropagation"].as_str() {
                None => "rprivate",
                Some("HostToContainer") => "rslave",
                Some(other) => panic!("{other}"),
            };
            options += &format!("-v {path}:{}:{read},{propagation} ", text(&mount["mountPath"]));
        }
        options
    }

    /// Starts a container as the manifest says.
    fn run(&self, pod: &Value, container: &Value, how: &str) {
        assert_eq!(pod["hostNetwork"], true);
        for folder in list(pod, "volumes").filter(|volume| volume["hostPath"]["type"] == "DirectoryOrCreate") {
            self.machine.sh(&format!("mkdir -p {}", text(&folder["hostPath"]["path"])));
        }
        let security = &container["securityContext"];
        assert_eq!((&security["privileged"], &security["readOnlyRootFilesystem"]), (&false.into(), &true.into()));
        let mut options = format!("--user {} --read-only --read-only-tmpfs=false", security["runAsUser"]);
        if security["allowPrivilegeEscalation"] == false {
            options += " --security-opt no-new-privileges";
        }
        for (field, option) in [("drop", "--cap-drop"), ("add", "--cap-add")] {
            for capability in list(&security["capabilities"], field) {
                options += &format!(" {option} {}", text(capability));
            }
        }
        let command: Vec<&str> = list(container, "command").chain(list(container, "args")).map(text).collect();
        let (mounts, env) = (Self::mounts(pod, container), self.env(container));
        let (name, command) = (text(&container["name"]), command.join(" "));
        self.machine.sh(&format!(
            "{PODMAN} run {how} --name {name} --network host {LIMITS} {options} {mounts} {env} --rootfs /root/image {command}"
        ));
    }

    /// Runs a command of `meshd` as `kubectl debug node --profile=sysadmin` would: with the node's files at /host.
    #[track_caller]
    fn debug(&self, command: &str) {
        let output = self.try_debug(command);
        assert!(output.success(), "{}", output.describe());
    }

    fn try_debug(&self, command: &str) -> Output {
        let files: String = ["/var/lib/meshd", "/run/meshd", "/opt/cni", "/etc/cni"]
            .map(|path| format!("-v {path}:/host{path} "))
            .concat();
        self.machine.try_sh(&format!(
            "{PODMAN} run --rm --privileged --network host {LIMITS} {files} --rootfs /root/image /usr/bin/meshd {command}"
        ))
    }

    /// A pod that does nothing; returns its addresses.
    fn pod(&self, name: &str) -> Vec<String> {
        self.machine.sh(&format!(
            "{PODMAN} run -d --name {name} --network meshd --cap-add NET_RAW {LIMITS} --rootfs /root/pod /bin/sleep 1000000"
        ));
        let shown = self.machine.sh(&format!("{PODMAN} exec {name} /bin/ip addr show dev eth0 scope global")).stdout;
        let lines = shown.lines().map(str::trim).filter(|line| line.starts_with("inet"));
        lines.map(|line| line.split([' ', '/']).nth(1).unwrap().to_owned()).collect()
    }

    #[track_caller]
    fn reaches(&self, from: &str, address: &str) {
        await_ok(&format!("{from} to reach {address}"), SOON, || {
            let output = self.machine.try_sh(&format!("{PODMAN} exec {from} /bin/ping -c 1 -W 1 {address}"));
            if output.success() { Ok(()) } else { Err(output.describe()) }
        });
    }

    /// What a probe of the container asks.
    #[track_caller]
    fn await_probe(&self, container: &Value, probe: &str) {
        let get = &container[probe]["httpGet"];
        let url = format!("http://{}:{}{}", text(&get["host"]), get["port"], text(&get["path"]));
        await_ok(&url, SOON, || {
            let output = self.machine.try_sh(&format!("curl -sf -m 5 {url}"));
            let why = || format!("curl -s -m 5 '{url}?verbose'; {PODMAN} logs {}", text(&container["name"]));
            if output.success() { Ok(()) } else { Err(self.machine.try_sh(&why()).describe()) }
        });
    }
}

#[test]
fn the_daemon_set_brings_pods_onto_the_mesh() {
    let sites = TwoSites::with_hosts("daemonset", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let sniffer = sites.router.sniff(&["10.244.0.0/16", "fd42:244::/48"].map(|text| text.parse().unwrap()));
    let tar = sites.lab.folder().join("image.tar");
    image(&tar);
    let pod = pod();
    let containers: BTreeMap<&str, &Value> =
        list(&pod, "containers").map(|container| (text(&container["name"]), container)).collect();
    let nodes: Vec<Node> = [("east", &sites.east), ("west", &sites.west)]
        .map(|(site, network)| Node {
            machine: Machine::boot(&network.hosts[0], &format!("{site}-1")),
            other: BTreeMap::from([
                ("MESHD_SITE", Some(site.to_owned())),
                ("MESHD_ETCD_ENDPOINTS", Some(etcd.endpoints())),
                ("MESHD_ETCD_ENDPOINTS_FILE", None),
                ("MESHD_ETCD_ALLOW_PLAINTEXT", Some("true".to_owned())),
                ("MESHD_ETCD_CAFILE", None),
                ("MESHD_ETCD_CERTFILE", None),
                ("MESHD_ETCD_KEYFILE", None),
            ]),
        })
        .into();
    for node in &nodes {
        node.machine.put(&tar, "/root/image.tar");
        node.machine.sh(UNPACK);
        node.machine.sh(PREPARE);
        for container in list(&pod, "initContainers") {
            node.run(&pod, container, "--rm");
        }
        // The plugin's container needs no daemon to start with.
        node.run(&pod, containers["cni"], "-d");
        assert!(!node.machine.try_sh("ls /etc/cni/net.d/10-meshd.conflist").success(), "before the daemon is ready");
        node.run(&pod, containers["meshd"], "-d");
    }
    for node in &nodes {
        node.await_probe(containers["meshd"], "livenessProbe");
        node.await_probe(containers["meshd"], "readinessProbe");
        await_ok("the plugin's configuration", SOON, || {
            let shown = node.machine.try_sh("cat /etc/cni/net.d/10-meshd.conflist");
            if shown.success() { Ok(()) } else { Err(shown.describe()) }
        });
        await_ok("the node to be well", SOON, || {
            let told = node.machine.try_sh(&format!("{PODMAN} exec meshd /usr/bin/meshctl -o json status"));
            let status: Value = serde_json::from_str(&told.stdout).map_err(|_| told.describe())?;
            if status["state"] == "running" { Ok(()) } else { Err(status.to_string()) }
        });
        for (container, capabilities) in [("meshd", "0000000000003000"), ("cni", "0000000000000000")] {
            let pid = format!("$({PODMAN} inspect --format '{{{{.State.Pid}}}}' {container})");
            let of = node.machine.sh(&format!("grep CapEff /proc/{pid}/status")).stdout;
            assert_eq!(of.split_whitespace().nth(1), Some(capabilities), "{container}");
        }
    }
    let addresses: Vec<Vec<String>> = nodes.iter().map(|node| node.pod("app")).collect();
    for address in &addresses[1] {
        nodes[0].reaches("app", address);
    }
    // An upgrade: another container in the first one's place. Pods stay as they are.
    nodes[0].machine.sh(&format!("{PODMAN} stop meshd && {PODMAN} rm meshd"));
    nodes[0].run(&pod, containers["meshd"], "-d");
    for address in &addresses[1] {
        nodes[0].reaches("app", address);
    }
    // The documentation's way to uninstall it. A pod that was left behind is deleted without the daemon.
    let remove =
        "install-cni --remove --bin-dir /host/opt/cni/bin --conf-dir /host/etc/cni/net.d --run-dir /host/run/meshd";
    for node in &nodes {
        node.machine.sh(&format!("{PODMAN} rm -f -t 10 meshd cni"));
        let refused = node.try_debug(remove);
        assert!(!refused.success() && refused.stderr.contains("still attached"), "{}", refused.describe());
        node.machine.sh(&format!("{PODMAN} rm -f -t 0 app"));
        node.debug("cleanup --state-dir /host/var/lib/meshd --run-dir /host/run/meshd");
        node.debug(remove);
        assert_eq!(left_in_kernel(node.machine.host()), Vec::<String>::new());
        node.machine.sh("test ! -e /etc/cni/net.d/10-meshd.conflist -a ! -e /opt/cni/bin/meshd-cni");
    }
    sniffer.assert_clean();
}

#[test]
fn the_manifest_holds_together() {
    let documents = manifest();
    let set = &daemon_set(&documents);
    assert_eq!(set["spec"]["selector"]["matchLabels"], set["spec"]["template"]["metadata"]["labels"]);
    let pod = pod();
    let account = documents.iter().find(|it| it["kind"] == "ServiceAccount" && it["metadata"]["name"] == "meshd");
    assert_eq!(account.unwrap()["automountServiceAccountToken"], false);
    assert_eq!((&pod["serviceAccountName"], &pod["automountServiceAccountToken"]), (&"meshd".into(), &false.into()));
    let help = Command::new(binary("meshd")).args(["run", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for container in list(&pod, "initContainers").chain(list(&pod, "containers")) {
        for variable in list(container, "env") {
            assert!(help.contains(&format!("[env: {}=]", text(&variable["name"]))), "{variable}");
        }
        for mount in list(container, "volumeMounts") {
            assert!(list(&pod, "volumes").any(|volume| volume["name"] == mount["name"]), "{mount}");
        }
    }
}
