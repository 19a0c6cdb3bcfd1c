//! A node of a cluster: a machine of its own by namespaces and control groups, with containerd, kubelet and kube-proxy.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use super::{KubernetesApi, kubernetes_programs};
use crate::{Host, Output, Process, await_until};

/// Mounts the disk and boots; runs inside the host's network namespace.
const SCRIPT: &str = include_str!("node.sh");
/// For containerd to start and to take the images, on a busy machine.
const BOOTED: Duration = Duration::from_secs(180);
/// Lines of each program's log that a failed scenario prints.
const LOG_LINES: usize = 30;

/// How kube-proxy brings Services about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyMode {
    /// By iptables.
    Iptables,
    /// By nftables.
    Nftables,
}

impl fmt::Display for ProxyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        })
    }
}

/// A node. Its files are this machine's as they are now; what is written to them is kept in memory, across reboots, and
/// is gone with it. Only root's view of it is complete: `sh` runs there.
pub struct KubernetesNode {
    host: Host,
    folder: PathBuf,
    group: String,
    /// Keeps the mount that is the node's disk.
    disk: Process,
    /// The process whose only child is the node's first process; none while it is off.
    power: Mutex<Option<Process>>,
}

impl KubernetesNode {
    /// Begins to boot a new node, named like its host, with the `*.tar` images in a folder. It joins by itself.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    #[track_caller]
    pub fn boot(host: &Host, api: &KubernetesApi, options: &NodeOptions<'_>) -> Self {
        let lab = host.lab().folder();
        // Of a node that this one replaces, the logs stay.
        let number = (0..).find(|number| !lab.join(format!("{}-{number}.files", host.name())).exists()).unwrap_or(0);
        let name = format!("{}-{number}", host.name());
        let folder = lab.join(&name);
        let node = Self {
            host: host.clone(),
            group: format!("meshd-lab-{}-{name}", host.lab().id()),
            disk: {
                // One for each: a shell reads its script as it goes.
                let script = folder.with_extension("sh");
                write(&script, SCRIPT);
                for folder in [folder.clone(), lab.join(format!("{name}.logs")), lab.join(format!("{name}.files"))] {
                    fs::create_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
                }
                let command = ["--mount", "bash", &text(&script), "disk", &text(&folder)];
                host.spawn("unshare", &command)
            },
            folder,
            power: Mutex::default(),
        };
        node.disk.await_log("ready", BOOTED);
        node.write_files(api, options);
        node.power_on();
        node
    }

    fn write_files(&self, api: &KubernetesApi, options: &NodeOptions<'_>) {
        let files = self.folder.with_extension("files");
        let settings = format!(
            "API={}\nCLUSTER={}\nIMAGES={}\nADDRESS={}\nNODE_IPS={}\nLABELS={}\nPROXY_MODE={}\nPOD_NETWORKS={}\nDNS={}\n",
            kubernetes_programs("api").display(),
            kubernetes_programs("cluster").display(),
            options.images.display(),
            options.addresses[0],
            options.addresses.join(","),
            options.labels,
            options.proxy_mode,
            options.pod_networks.join(","),
            options.dns,
        );
        write(&files.join("settings"), &settings);
        let copy = |from: &Path, to: &str| {
            fs::copy(from, files.join(to)).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        };
        copy(&api.kubeconfig_of(self.host.name()), "kubelet.kubeconfig");
        copy(&api.kubeconfig_of("proxy"), "proxy.kubeconfig");
        copy(&api.authority(), "ca.pem");
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.host.name()
    }

    /// The host that it is on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Cuts the power: all processes end at once, the disk stays.
    pub fn power_off(&self) {
        if let Some(power) = self.power.lock().unwrap_or_else(PoisonError::into_inner).take() {
            power.kill9();
        }
    }

    /// Boots from the disk.
    ///
    /// # Panics
    /// When it is on.
    #[track_caller]
    pub fn power_on(&self) {
        let mut power = self.power.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(power.is_none(), "{} is on", self.name());
        let (disk, script) = (self.disk.pid().to_string(), text(&self.folder.with_extension("sh")));
        let boot = ["bash", &script, "boot", &text(&self.folder), self.name(), &self.group].map(str::to_owned);
        let args: Vec<&str> = ["-t", &disk, "-m"].into_iter().chain(boot.iter().map(String::as_str)).collect();
        *power = Some(self.host.spawn("nsenter", &args));
    }

    /// Ends it for good, with its disk.
    pub fn destroy(self) {
        self.power_off();
        self.disk.kill9();
    }

    /// Waits until its programs are started.
    ///
    /// # Panics
    /// When they are not in time.
    #[track_caller]
    pub fn await_booted(&self) {
        let power = self.power.lock().unwrap_or_else(PoisonError::into_inner);
        power.as_ref().unwrap_or_else(|| panic!("{} is off", self.name())).await_log("up", BOOTED);
    }

    /// Runs a script as root.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn sh(&self, script: &str) -> Output {
        let output = self.try_sh(script);
        assert!(output.success(), "{}", output.describe());
        output
    }

    /// [`sh`](Self::sh) for a script that may fail.
    ///
    /// # Panics
    /// When the node is off.
    #[must_use]
    #[track_caller]
    pub fn try_sh(&self, script: &str) -> Output {
        let pid = self.first_process();
        let enter = ["nsenter", "-t", &pid, "-m", "-p", "-u", "-i", "-C", "-r", "-w", "bash", "-euo", "pipefail", "-c"];
        self.host.try_run(&[&enter[..], &[script]].concat())
    }

    /// Its first process, as this machine counts.
    #[track_caller]
    fn first_process(&self) -> String {
        let power = self.power.lock().unwrap_or_else(PoisonError::into_inner);
        let outer = power.as_ref().unwrap_or_else(|| panic!("{} is off", self.name())).pid();
        await_until(&format!("{} to boot", self.name()), BOOTED, || {
            let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).ok()?;
            children.split_whitespace().next().map(str::to_owned)
        })
    }

    /// The log of one of its programs: `kubelet`, `kube-proxy`, `containerd`.
    #[must_use]
    pub fn log(&self, program: &str) -> String {
        let file = self.folder.with_extension("logs").join(format!("{program}.log"));
        String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned()
    }
}

impl Drop for KubernetesNode {
    fn drop(&mut self) {
        if thread::panicking() {
            for program in ["images", "containerd", "kubelet", "kube-proxy"] {
                let log = self.log(program);
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("──── {}: log of {program}", self.name());
                for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                    eprintln!("{line}");
                }
            }
        }
    }
}

/// What a node is started with.
#[derive(Debug, Clone, Copy)]
pub struct NodeOptions<'o> {
    /// Its address of each family, of IPv4 first.
    pub addresses: &'o [&'o str],
    /// Labels of its Node object, as `--node-labels` takes them.
    pub labels: &'o str,
    /// How kube-proxy works.
    pub proxy_mode: ProxyMode,
    /// The prefix of all pods, of each family.
    pub pod_networks: &'o [&'o str],
    /// Where pods ask for names.
    pub dns: &'o str,
    /// A folder with images beside those of the suites.
    pub images: &'o Path,
}

fn write(path: &Path, content: &str) {
    fs::write(path, content).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
