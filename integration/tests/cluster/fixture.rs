//! The cluster: topology, control plane, nodes, and the chart's releases.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Instant,
};

use integration::{
    Etcd, KubernetesApi, KubernetesNode, NodeOptions, Output, ProxyMode, Sniffer, await_ok, binary,
    topology::{CONFIG, TwoSites},
};
use serde_json::Value;

use crate::SOON;

/// The image's name; the chart's values say it in two parts.
const REPOSITORY: &str = "localhost/meshd";
const TAG: &str = "lab";
/// Both together.
pub(crate) const IMAGE: &str = "localhost/meshd:lab";
/// Where the control plane is.
pub(crate) const CONTROL_PLANE: &str = "203.0.113.10";
/// The cluster's name in the mesh.
pub(crate) const NAME: &str = "lab";
const POD_NETWORKS: [&str; 2] = ["10.244.0.0/16", "fd42:244::/48"];
pub(crate) const DNS: &str = "10.96.0.10";
pub(crate) const NODES: [&str; 3] = ["east1", "east2", "west1"];
/// Of the chart.
pub(crate) const RELEASE: &str = "meshd";
/// Of the daemons: one for each site.
pub(crate) const DAEMON_SETS: [&str; 2] = ["meshd-east", "meshd-west"];

/// A cluster that is ready for pods.
pub(crate) struct Cluster {
    /// Before the rest, because their logs say more when all still runs.
    pub(crate) nodes: Vec<KubernetesNode>,
    pub(crate) api: KubernetesApi,
    /// The mesh's, unless the chart brings it.
    etcd: Option<Etcd>,
    /// Fails the scenario when an address of a pod passes the router in clear text.
    pub(crate) sniffer: Sniffer,
    pub(crate) sites: TwoSites,
    proxy_mode: ProxyMode,
}

impl Cluster {
    /// Starts everything and waits until every node is Ready.
    pub(crate) fn start(title: &str, proxy_mode: ProxyMode) -> Self {
        Self::start_with(title, proxy_mode, CONFIG)
    }

    /// With this network.
    pub(crate) fn start_with(title: &str, proxy_mode: ProxyMode, config: &str) -> Self {
        let begin = Instant::now();
        let cluster = Self::boot_all(title, proxy_mode, Some(config));
        cluster.install();
        cluster.await_nodes_ready();
        println!("{title}: the nodes are Ready after {:.1?}", begin.elapsed());
        cluster
    }

    /// Starts control plane and nodes, which have no network; with a `config`, an etcd for the mesh too.
    pub(crate) fn boot_all(title: &str, proxy_mode: ProxyMode, config: Option<&str>) -> Self {
        let begin = Instant::now();
        let (images, _) = (images(), helm());
        let mut sites = TwoSites::with_hosts(title, 1);
        sites.east.add_host(&sites.lab);
        let sniffer = sites.router.sniff(&POD_NETWORKS.map(|network| network.parse().unwrap()));
        let etcd = config.map(|config| {
            let etcd = sites.start_etcd(1);
            etcd.put("/meshd/config", config);
            etcd
        });
        let api = KubernetesApi::start_for_nodes(&sites.store, CONTROL_PLANE, &NODES);
        println!("{title}: the control plane is ready after {:.1?}", begin.elapsed());
        let mut cluster = Self { nodes: Vec::new(), api, etcd, sniffer, sites, proxy_mode };
        cluster.nodes = NODES.iter().map(|name| cluster.boot(name, images)).collect();
        for node in &cluster.nodes {
            node.await_booted();
        }
        cluster
    }

    /// The mesh's etcd.
    #[track_caller]
    pub(crate) fn etcd(&self) -> &Etcd {
        self.etcd.as_ref().expect("the chart brought etcd")
    }

    /// A new node on the host of this name.
    pub(crate) fn boot(&self, name: &str, images: &Path) -> KubernetesNode {
        let (host, site) = self.sites.hosts_and_sites().find(|(host, _)| host.name() == name).unwrap();
        let place = if site == "east" { &self.sites.east } else { &self.sites.west };
        let number = place.hosts.iter().position(|one| one.name() == name).unwrap();
        let options = NodeOptions {
            addresses: &[&place.v4(number), &place.v6(number)],
            labels: &format!("topology.kubernetes.io/zone={site}"),
            proxy_mode: self.proxy_mode,
            pod_networks: &POD_NETWORKS,
            dns: DNS,
            images,
        };
        KubernetesNode::boot(host, &self.api, &options)
    }

    /// Installs the chart: as docs/kubernetes.md has it for two sites.
    fn install(&self) {
        let sites = ["east", "west"]
            .map(|site| format!(r#""{site}": {{"nodeSelector": {{"topology.kubernetes.io/zone": "{site}"}}}}"#));
        let values = format!(
            r#"{{{}, "etcd": {{"endpoints": ["http://{CONTROL_PLANE}:2379"], "allowPlaintext": true}},
                "sites": {{{}}}, "sync": {{"cluster": "{NAME}"}},
                "kubernetesServiceHost": "{CONTROL_PLANE}", "kubernetesServicePort": "6443"}}"#,
            Self::image_values(),
            sites.join(", "),
        );
        self.install_release(&values);
    }

    /// Installs the release with these values, or upgrades it to them.
    pub(crate) fn install_release(&self, values: &str) {
        let file = self.sites.lab.folder().join("values.json");
        fs::write(&file, values).unwrap();
        self.helm(&["upgrade", "--install", RELEASE, &chart(), "-n", "kube-system", "-f", &file.to_string_lossy()]);
    }

    /// The chart's values for the image of this build.
    pub(crate) fn image_values() -> String {
        format!(r#""image": {{"repository": "{REPOSITORY}", "tag": "{TAG}", "pullPolicy": "Never"}}"#)
    }

    /// Runs helm.
    #[track_caller]
    pub(crate) fn helm(&self, args: &[&str]) -> Output {
        let (helm, kubeconfig) = (helm(), self.api.kubeconfig());
        let (helm, kubeconfig) = (helm.to_string_lossy(), kubeconfig.to_string_lossy());
        let command = [&[&*helm, "--kubeconfig", &kubeconfig], args].concat();
        self.api.host().run_args(&command)
    }

    #[track_caller]
    pub(crate) fn node(&self, name: &str) -> &KubernetesNode {
        self.nodes.iter().find(|node| node.name() == name).unwrap()
    }

    /// Runs kubectl and returns what it prints.
    #[track_caller]
    pub(crate) fn kubectl(&self, args: &str) -> String {
        let args: Vec<&str> = args.split_whitespace().collect();
        self.api.kubectl(&args, "").stdout
    }

    /// One object, as the API server prints it.
    #[track_caller]
    pub(crate) fn get(&self, what: &str) -> Value {
        serde_json::from_str(&self.kubectl(&format!("get {what} -o json"))).unwrap()
    }

    /// Waits until all nodes are Ready, with meshd and meshd-sync on them.
    #[track_caller]
    pub(crate) fn await_nodes_ready(&self) {
        self.await_ready();
        for set in DAEMON_SETS {
            self.kubectl(&format!("-n kube-system rollout status ds/{set} --timeout=100s"));
        }
        self.kubectl("-n kube-system rollout status deployment/meshd-sync --timeout=100s");
    }

    /// Waits until all nodes are Ready.
    #[track_caller]
    pub(crate) fn await_ready(&self) {
        await_ok("all nodes to be Ready", SOON, || {
            let nodes = self.api.list("nodes");
            let ready = |node: &&Value| condition(node, "Ready") == Some("True");
            let names: Vec<&str> = nodes.iter().filter(ready).filter_map(|node| name(node)).collect();
            if names == NODES {
                return Ok(());
            }
            Err(format!("{names:?} of {}\n{}", nodes.len(), self.kubectl("-n kube-system get pods -o wide")))
        });
    }

    /// Runs meshctl in the daemon's container on a node.
    #[track_caller]
    pub(crate) fn meshctl(&self, node: &str, args: &str) -> Output {
        let pod = self.daemon_on(node);
        let args: Vec<&str> = args.split_whitespace().collect();
        let exec = ["-n", "kube-system", "exec", &pod, "-c", "meshd", "--", "meshctl"];
        self.api.kubectl(&[&exec[..], &args].concat(), "")
    }

    /// The name of the DaemonSet's pod on a node.
    #[track_caller]
    pub(crate) fn daemon_on(&self, node: &str) -> String {
        let select = format!(
            "-n kube-system get pods -l app.kubernetes.io/name=meshd --field-selector=spec.nodeName={node} -o name"
        );
        self.kubectl(&select).lines().next().unwrap().trim_start_matches("pod/").to_owned()
    }
}

/// The name of an object.
pub(crate) fn name(object: &Value) -> Option<&str> {
    object["metadata"]["name"].as_str()
}

/// The status of a condition.
pub(crate) fn condition<'o>(object: &'o Value, kind: &str) -> Option<&'o str> {
    let conditions = object["status"]["conditions"].as_array()?;
    conditions.iter().find(|one| one["type"] == kind)?["status"].as_str()
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn chart() -> String {
    repository().join("deploy/helm/meshd").to_string_lossy().into_owned()
}

fn helm() -> PathBuf {
    let script = Command::new(repository().join("scripts/install-helm")).arg("--path").output().unwrap();
    let helm = PathBuf::from(String::from_utf8_lossy(&script.stdout).trim());
    assert!(helm.exists(), "helm is not built; run: scripts/install-helm");
    helm
}

/// The folder with the image of the binaries that were built beside this test, made once.
pub(crate) fn images() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let binaries = binary("meshd").parent().unwrap().to_owned();
        let folder = binaries.join("images-of-cluster");
        fs::create_dir_all(&folder).unwrap();
        let mut script = Command::new(repository().join("scripts/image"));
        script.arg("--binaries").arg(&binaries).arg("--name").arg(format!("{REPOSITORY}:{TAG}"));
        let made = script.arg("--output").arg(folder.join("meshd.tar")).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        folder
    })
}
