//! A real API server with an etcd of its own, on one host.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde_json::Value;

use super::kubernetes_programs;
use crate::{Host, Output, Process, await_until};

const READY: Duration = Duration::from_secs(180);
const PORT: &str = "6443";
/// Of Services.
const SERVICES: &str = "10.96.0.0/16";
const SERVICES_DUAL: &str = "10.96.0.0/16,fd42:96::/112";
const STORE: &str = "http://127.0.0.1:12379";
const STORE_PEER: &str = "http://127.0.0.1:12380";

/// The control plane of a cluster: for objects alone, or for nodes, with controllers and a scheduler.
pub struct KubernetesApi {
    host: Host,
    programs: PathBuf,
    folder: PathBuf,
    /// Where nodes reach it, if there are any.
    address: Option<String>,
    store: Mutex<Option<Process>>,
    server: Mutex<Option<Process>>,
    controllers: Mutex<Vec<Process>>,
}

impl KubernetesApi {
    /// Starts both, with a certificate authority of their own, and waits until the API server is ready.
    ///
    /// # Panics
    /// When it is not in time, or when the programs were not built.
    #[must_use]
    #[track_caller]
    pub fn start(host: &Host) -> Self {
        let api = Self::new(host, None);
        api.make_certificates(&[]);
        api.start_processes();
        api
    }

    /// Starts a whole control plane for nodes of these names, which reach it at `address`.
    ///
    /// # Panics
    /// When it is not ready in time, or when the programs were not built.
    #[must_use]
    #[track_caller]
    pub fn start_for_nodes(host: &Host, address: &str, nodes: &[&str]) -> Self {
        let api = Self::new(host, Some(address.to_owned()));
        api.make_certificates(nodes);
        api.start_processes();
        // They end at once unless the server has made its roles.
        api.start_controllers();
        api
    }

    #[track_caller]
    fn new(host: &Host, address: Option<String>) -> Self {
        let folder = host.lab().folder().join(format!("kubernetes-{}", host.name()));
        fs::create_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        Self {
            host: host.clone(),
            programs: kubernetes_programs("api"),
            folder,
            address,
            store: Mutex::default(),
            server: Mutex::default(),
            controllers: Mutex::default(),
        }
    }

    #[track_caller]
    fn start_processes(&self) {
        self.start_store();
        self.start_server();
        self.await_ready();
    }

    /// The host that it runs on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// A file by which a node or one of its programs reaches the server.
    pub(crate) fn kubeconfig_of(&self, who: &str) -> PathBuf {
        self.folder.join(format!("{who}.kubeconfig"))
    }

    /// The authority's certificate.
    pub(crate) fn authority(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// The file by which an administrator reaches it, from this host.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.kubeconfig_of("admin")
    }

    /// Runs kubectl with `input`.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn kubectl(&self, args: &[&str], input: &str) -> Output {
        let output = self.try_kubectl(args, input);
        assert!(output.success(), "{}", output.describe());
        output
    }

    /// Runs a plugin of kubectl, which finds kubectl in its search path.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn kubectl_plugin(&self, plugin: &Path, args: &[&str]) -> Output {
        let (kubectl, kubeconfig) = (self.program("kubectl"), self.kubeconfig());
        let folder = Path::new(&kubectl).parent().map_or_else(String::new, |folder| folder.display().to_string());
        let (path, kubeconfig) = (format!("PATH={folder}:/usr/bin:/bin"), kubeconfig.to_string_lossy());
        let plugin = plugin.to_string_lossy();
        let command = [&["env", path.as_str(), &plugin, "--kubeconfig", &kubeconfig], args].concat();
        self.host.run_args(&command)
    }

    /// [`kubectl`](Self::kubectl) for a command that may fail.
    #[must_use]
    #[track_caller]
    pub fn try_kubectl(&self, args: &[&str], input: &str) -> Output {
        let (program, kubeconfig) = (self.program("kubectl"), self.kubeconfig());
        let kubeconfig = kubeconfig.to_string_lossy();
        let command = [&[program.as_str(), "--kubeconfig", &kubeconfig, "--request-timeout=60s"], args].concat();
        self.host.run_with_input(&command, input)
    }

    /// Starts a kubectl that goes on running.
    #[must_use]
    #[track_caller]
    pub fn spawn_kubectl(&self, args: &[&str]) -> Process {
        let kubeconfig = self.kubeconfig();
        self.host.spawn(self.program("kubectl"), &[&["--kubeconfig", &kubeconfig.to_string_lossy()], args].concat())
    }

    /// Puts an object or a list of them.
    #[track_caller]
    pub fn apply(&self, objects: &str) {
        self.kubectl(&["apply", "-f", "-"], objects);
    }

    /// All objects of a kind, as the API server prints them.
    #[must_use]
    #[track_caller]
    pub fn list(&self, kind: &str) -> Vec<Value> {
        let output = self.kubectl(&["get", kind, "-A", "-o", "json"], "");
        let list: Value = serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{kind}: {error}"));
        list["items"].as_array().cloned().unwrap_or_default()
    }

    /// Sets fields of a pod's status, as a kubelet does.
    #[track_caller]
    pub fn set_pod_status(&self, namespace: &str, name: &str, status: &str) {
        let patch = format!(r#"{{"status": {status}}}"#);
        self.kubectl(
            &["patch", "pod", name, "-n", namespace, "--subresource=status", "--type=merge", "-p", &patch],
            "",
        );
    }

    /// Kills the API server (`SIGKILL`); its etcd goes on.
    pub fn kill_server(&self) {
        if let Some(server) = self.server.lock().unwrap_or_else(PoisonError::into_inner).take() {
            server.kill9();
        }
    }

    /// Starts the API server again and waits until it is ready.
    pub fn start_server_again(&self) {
        self.start_server();
        self.await_ready();
    }

    /// Starts the API server again on an empty store, without controllers and scheduler, and waits until it is ready.
    pub fn start_with_other_store(&self) {
        self.controllers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.restart_with(|own, aside| fs::rename(own, aside));
    }

    /// Goes back from [`start_with_other_store`](Self::start_with_other_store).
    pub fn start_with_own_store(&self) {
        self.restart_with(|own, aside| fs::remove_dir_all(own).and_then(|()| fs::rename(aside, own)));
        self.start_controllers();
    }

    fn restart_with(&self, change: impl FnOnce(&Path, &Path) -> io::Result<()>) {
        self.kill_server();
        if let Some(store) = self.store.lock().unwrap_or_else(PoisonError::into_inner).take() {
            store.kill9();
        }
        let data = self.data();
        change(&data, &data.with_extension("aside")).unwrap_or_else(|error| panic!("the API server's etcd: {error}"));
        self.start_processes();
    }

    /// Replaces its etcd by an empty one, while the API server is down.
    pub fn empty_store(&self) {
        if let Some(store) = self.store.lock().unwrap_or_else(PoisonError::into_inner).take() {
            store.kill9();
        }
        fs::remove_dir_all(self.data()).unwrap_or_else(|error| panic!("the API server's etcd: {error}"));
        self.start_store();
    }

    fn start_store(&self) {
        let process = self.host.spawn(
            self.program("etcd"),
            &[
                "--data-dir",
                &self.data().to_string_lossy(),
                "--listen-client-urls",
                STORE,
                "--advertise-client-urls",
                STORE,
                "--listen-peer-urls",
                STORE_PEER,
                "--initial-advertise-peer-urls",
                STORE_PEER,
                "--initial-cluster",
                &format!("default={STORE_PEER}"),
                "--log-level",
                "warn",
                // What it holds is worth nothing after the machine's end.
                "--unsafe-no-fsync",
            ],
        );
        *self.store.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
    }

    fn start_server(&self) {
        let file = |name: &str| self.folder.join(name).to_string_lossy().into_owned();
        let mut args = vec![
            ("etcd-servers", STORE.to_owned()),
            ("secure-port", PORT.to_owned()),
            ("tls-cert-file", file("server.pem")),
            ("tls-private-key-file", file("server.key")),
            ("client-ca-file", file("ca.pem")),
            ("token-auth-file", file("tokens.csv")),
            ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
            ("service-account-key-file", file("accounts.pub")),
            ("service-account-signing-key-file", file("accounts.key")),
            ("cert-dir", file("certificates")),
        ];
        match &self.address {
            None => args.extend([
                ("bind-address", "127.0.0.1".to_owned()),
                ("advertise-address", "192.0.2.10".to_owned()),
                ("service-cluster-ip-range", SERVICES.to_owned()),
                ("authorization-mode", "RBAC".to_owned()),
                ("endpoint-reconciler-type", "none".to_owned()),
                // Nothing makes service accounts here.
                ("disable-admission-plugins", "ServiceAccount".to_owned()),
            ]),
            Some(address) => args.extend([
                ("bind-address", "0.0.0.0".to_owned()),
                ("advertise-address", address.clone()),
                ("service-cluster-ip-range", SERVICES_DUAL.to_owned()),
                ("authorization-mode", "Node,RBAC".to_owned()),
                ("allow-privileged", "true".to_owned()),
                // Names of nodes are in no DNS.
                ("kubelet-preferred-address-types", "InternalIP".to_owned()),
            ]),
        }
        let process = self.spawn("kube-apiserver", &self.programs, args);
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
    }

    fn start_controllers(&self) {
        let cluster = kubernetes_programs("cluster");
        let kubeconfig = self.kubeconfig().to_string_lossy().into_owned();
        let file = |name: &str| self.folder.join(name).to_string_lossy().into_owned();
        let common = |name: &str| {
            let flags = ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"];
            let flags = flags.map(|flag| (flag, kubeconfig.clone())).into_iter();
            flags.chain([("leader-elect", "false".to_owned()), ("cert-dir", file(name))])
        };
        let manager = common("manager").chain([
            ("service-account-private-key-file", file("accounts.key")),
            ("root-ca-file", file("ca.pem")),
            ("allocate-node-cidrs", "false".to_owned()),
            ("node-monitor-grace-period", "60s".to_owned()),
        ]);
        let processes = vec![
            self.spawn("kube-controller-manager", &cluster, manager),
            self.spawn("kube-scheduler", &cluster, common("scheduler")),
        ];
        *self.controllers.lock().unwrap_or_else(PoisonError::into_inner) = processes;
    }

    fn spawn(&self, program: &str, folder: &Path, args: impl IntoIterator<Item = (&'static str, String)>) -> Process {
        let args: Vec<String> = args.into_iter().map(|(flag, value)| format!("--{flag}={value}")).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.host.spawn(folder.join(program), &args)
    }

    #[track_caller]
    fn await_ready(&self) {
        await_until("the API server to be ready", READY, || {
            for slot in [&self.store, &self.server] {
                let process = slot.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some((process, status)) = process.as_ref().and_then(|it| Some((it, it.exit_status()?))) {
                    panic!("{} ended with {status}:\n{}", process.name(), process.log());
                }
            }
            let ready = self.try_kubectl(&["get", "--raw", "/readyz"], "").success();
            // Made by the server itself, after it is ready.
            (ready && self.try_kubectl(&["get", "namespace", "kube-system", "default"], "").success()).then_some(())
        });
    }

    /// As docs and distributions have it: an authority, a server's certificate, a key for service accounts, tokens.
    fn make_certificates(&self, nodes: &[&str]) {
        let address = self.address.as_deref().unwrap_or("127.0.0.1");
        let script = "
            new() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj \"$1\" -keyout \"$2.key\" \"${@:3}\"; }
            new /CN=cluster-ca ca -x509 -days 7 -out ca.pem
            new /CN=kube-apiserver server -out server.csr
            openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 7 -out server.pem \
                -extfile <(echo \"subjectAltName=DNS:kubernetes,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:10.96.0.1,IP:$1\")
            openssl genrsa -out accounts.key 2048
            openssl rsa -in accounts.key -pubout -out accounts.pub";
        let made = Command::new("bash").args(["-ec", script, "bash", address]).current_dir(&self.folder).output();
        let made = made.unwrap_or_else(|error| panic!("bash: {error}"));
        assert!(made.status.success(), "certificates: {}", String::from_utf8_lossy(&made.stderr));
        let mut tokens = "admin-token,admin,admin,\"system:masters\"\n\
            proxy-token,system:kube-proxy,proxy,\"system:node-proxier\"\n"
            .to_owned();
        for node in nodes {
            let _ = writeln!(tokens, "{node}-token,system:node:{node},{node},\"system:nodes\"");
        }
        self.write("tokens.csv", &tokens);
        for who in ["admin", "proxy"].iter().chain(nodes) {
            let authority = if nodes.is_empty() || *who == "admin" {
                self.authority().display().to_string()
            } else {
                "/etc/kubernetes/ca.pem".to_owned()
            };
            let text = format!(
                r#"{{"apiVersion": "v1", "kind": "Config", "current-context": "c",
                    "clusters": [{{"name": "k", "cluster": {{"server": "https://{address}:{PORT}", "certificate-authority": "{authority}"}}}}],
                    "users": [{{"name": "u", "user": {{"token": "{who}-token"}}}}],
                    "contexts": [{{"name": "c", "context": {{"cluster": "k", "user": "u"}}}}]}}"#
            );
            self.write(&format!("{who}.kubeconfig"), &text);
        }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.folder.join(name), text).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    fn program(&self, name: &str) -> String {
        self.programs.join(name).to_string_lossy().into_owned()
    }

    fn data(&self) -> PathBuf {
        self.folder.join("etcd")
    }
}
