//! A real API server with an etcd of its own, on one host; no kubelets.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde_json::Value;

use crate::{Host, Output, Process, await_until};

const READY: Duration = Duration::from_secs(180);
const SERVER: &str = "https://127.0.0.1:6443";
const STORE: &str = "http://127.0.0.1:12379";
const STORE_PEER: &str = "http://127.0.0.1:12380";

/// The control plane of a cluster, as far as objects go.
pub struct KubernetesApi {
    host: Host,
    programs: PathBuf,
    folder: PathBuf,
    store: Mutex<Option<Process>>,
    server: Mutex<Option<Process>>,
}

impl KubernetesApi {
    /// Starts both, with a certificate authority of their own, and waits until the API server is ready.
    ///
    /// # Panics
    /// When it is not in time, or when the programs were not built.
    #[must_use]
    #[track_caller]
    pub fn start(host: &Host) -> Self {
        let folder = host.lab().folder().join(format!("kubernetes-{}", host.name()));
        fs::create_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let api = Self {
            host: host.clone(),
            programs: programs(),
            folder,
            store: Mutex::default(),
            server: Mutex::default(),
        };
        api.make_certificates();
        api.start_store();
        api.start_server();
        api.await_ready();
        api
    }

    /// The file by which an administrator reaches it, from this host.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubeconfig")
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
        let process = self.host.spawn(
            self.program("kube-apiserver"),
            &[
                "--etcd-servers",
                STORE,
                "--bind-address",
                "127.0.0.1",
                "--advertise-address",
                "192.0.2.10",
                "--secure-port",
                "6443",
                "--service-cluster-ip-range",
                "10.96.0.0/16",
                "--tls-cert-file",
                &file("server.pem"),
                "--tls-private-key-file",
                &file("server.key"),
                "--client-ca-file",
                &file("ca.pem"),
                "--token-auth-file",
                &file("tokens.csv"),
                "--authorization-mode",
                "RBAC",
                "--service-account-issuer",
                "https://kubernetes.default.svc",
                "--service-account-key-file",
                &file("accounts.pub"),
                "--service-account-signing-key-file",
                &file("accounts.key"),
                "--cert-dir",
                &file("certificates"),
                "--endpoint-reconciler-type",
                "none",
                // Nothing makes service accounts here.
                "--disable-admission-plugins",
                "ServiceAccount",
            ],
        );
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
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

    fn try_kubectl(&self, args: &[&str], input: &str) -> Output {
        let (program, kubeconfig) = (self.program("kubectl"), self.kubeconfig());
        let kubeconfig = kubeconfig.to_string_lossy();
        let command = [&[program.as_str(), "--kubeconfig", &kubeconfig, "--request-timeout=60s"], args].concat();
        self.host.run_with_input(&command, input)
    }

    /// As docs and distributions have it: an authority, a server's certificate, a key for service accounts, a token.
    fn make_certificates(&self) {
        let script = "
            new() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj \"$1\" -keyout \"$2.key\" \"${@:3}\"; }
            new /CN=cluster-ca ca -x509 -days 7 -out ca.pem
            new /CN=kube-apiserver server -out server.csr
            openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 7 -out server.pem \
                -extfile <(echo 'subjectAltName=DNS:kubernetes,IP:127.0.0.1,IP:10.96.0.1')
            openssl genrsa -out accounts.key 2048
            openssl rsa -in accounts.key -pubout -out accounts.pub
            echo 'admin-token,admin,admin,\"system:masters\"' > tokens.csv
            cat > kubeconfig <<END
apiVersion: v1
kind: Config
current-context: c
clusters: [{name: k, cluster: {server: \"$1\", certificate-authority: $PWD/ca.pem}}]
users: [{name: u, user: {token: admin-token}}]
contexts: [{name: c, context: {cluster: k, user: u}}]
END";
        let made = Command::new("bash").args(["-ec", script, "bash", SERVER]).current_dir(&self.folder).output();
        let made = made.unwrap_or_else(|error| panic!("bash: {error}"));
        assert!(made.status.success(), "certificates: {}", String::from_utf8_lossy(&made.stderr));
    }

    fn program(&self, name: &str) -> String {
        self.programs.join(name).to_string_lossy().into_owned()
    }

    fn data(&self) -> PathBuf {
        self.folder.join("etcd")
    }
}

/// Where `scripts/install-kubernetes` keeps what it builds.
#[track_caller]
fn programs() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/install-kubernetes");
    let output = Command::new(&script).arg("--path").output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", script.display()));
    let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    assert!(folder.join("complete").exists(), "the API server is not built; run: scripts/install-kubernetes");
    folder
}
