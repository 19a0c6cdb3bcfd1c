//! Real containers: podman with its CNI backend on a host of the Lab, with a busybox root file system.

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use serde_json::{Value, json};

use crate::{Host, Output, binary};

/// Debian's static busybox, and what of it the scenarios call.
const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 8] = ["sh", "sleep", "ping", "nc", "wget", "httpd", "ip", "cat"];
/// What this machine gives to processes in containers; podman's own defaults are more than some machines allow.
const LIMITS: [&str; 4] = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"];

/// podman on one host, with storage of its own. Its containers end with it.
pub struct Podman {
    host: Host,
    folder: PathBuf,
    /// Names of the containers, in the order of their start.
    containers: Mutex<Vec<String>>,
}

impl Podman {
    /// podman on this host, with a CNI network `mesh` of these plugins. Every container has the files of `rootfs`: name
    /// and content, in its top folder.
    ///
    /// # Panics
    /// When a file cannot be written.
    #[must_use]
    #[track_caller]
    pub fn on(host: &Host, plugins: &[Value], files: &[(&str, &str)]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let folder = host.lab().folder().join(format!("podman{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let podman = Self { host: host.clone(), folder, containers: Mutex::default() };
        podman.write_files(plugins, files).unwrap_or_else(|error| panic!("podman on {}: {error}", host.name()));
        podman
    }

    /// Starts a container in the network `mesh`.
    ///
    /// # Panics
    /// When it does not start.
    #[track_caller]
    pub fn run(&self, name: &str, command: &[&str]) {
        self.start(name, "mesh", command);
    }

    /// Starts a container in the pod of another one: it has the same network.
    ///
    /// # Panics
    /// When it does not start.
    #[track_caller]
    pub fn join(&self, name: &str, other: &str, command: &[&str]) {
        self.start(name, &format!("container:{other}"), command);
    }

    /// Runs a command in a container.
    #[must_use]
    pub fn exec(&self, container: &str, command: &[&str]) -> Output {
        self.podman(&[&["exec", container], command].concat())
    }

    /// Removes a container.
    ///
    /// # Panics
    /// When podman says that it could not.
    #[track_caller]
    pub fn remove(&self, container: &str) {
        let output = self.podman(&["rm", "-f", "-t", "0", container]);
        assert!(output.success(), "{}", output.describe());
        self.names().retain(|name| name != container);
    }

    /// The container's addresses, as it sees them itself.
    #[must_use]
    pub fn addresses(&self, container: &str) -> Vec<IpAddr> {
        let shown = self.exec(container, &["/bin/ip", "addr", "show", "dev", "eth0", "scope", "global"]).stdout;
        let found = shown.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            words.next().filter(|word| word.starts_with("inet"))?;
            words.next()?.split('/').next()?.parse().ok()
        });
        found.collect()
    }

    #[track_caller]
    fn start(&self, name: &str, network: &str, command: &[&str]) {
        let rootfs = self.folder.join("rootfs").display().to_string();
        self.names().push(name.to_owned());
        let options = ["run", "-d", "--name", name, "--network", network];
        let output = self.podman(&[&options[..], &LIMITS, &["--rootfs", &rootfs], command].concat());
        assert!(output.success(), "{}", output.describe());
    }

    fn podman(&self, args: &[&str]) -> Output {
        let at = |name: &str| self.folder.join(name).display().to_string();
        let (config, root, run) = (format!("CONTAINERS_CONF={}", at("containers.conf")), at("root"), at("run"));
        let podman = ["podman", "--root", &root, "--runroot", &run, "--runtime", "runc", "--storage-driver", "vfs"];
        self.host.try_run(&[&["env", &config][..], &podman, &["--cgroup-manager", "cgroupfs"], args].concat())
    }

    fn write_files(&self, plugins: &[Value], files: &[(&str, &str)]) -> std::io::Result<()> {
        let at = |name: &str| self.folder.join(name);
        for folder in ["bin", "proc", "sys", "dev", "etc", "tmp", "run", "var"] {
            fs::create_dir_all(at("rootfs").join(folder))?;
        }
        fs::copy(BUSYBOX, at("rootfs/bin/busybox"))?;
        for applet in APPLETS {
            symlink("busybox", at("rootfs/bin").join(applet))?;
        }
        for (name, content) in files {
            fs::write(at("rootfs").join(name), content)?;
        }
        fs::create_dir_all(at("net.d"))?;
        let list = json!({"cniVersion": "1.0.0", "name": "mesh", "plugins": plugins});
        fs::write(at("net.d/10-mesh.conflist"), list.to_string())?;
        let own = binary("meshd-cni");
        let own = own.parent().unwrap_or_else(|| Path::new("/"));
        let config = format!(
            "[engine]\nevents_logger = \"none\"\n[containers]\npids_limit = 0\n[network]\nnetwork_backend = \"cni\"\n\
             network_config_dir = {:?}\ncni_plugin_dirs = [{own:?}, \"/usr/lib/cni\"]\n",
            at("net.d")
        );
        fs::write(at("containers.conf"), config)
    }

    fn names(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Podman {
    /// Those that joined others go first.
    fn drop(&mut self) {
        let names: Vec<String> = self.names().drain(..).rev().collect();
        for name in names {
            let output = self.podman(&["rm", "-f", "-t", "0", &name]);
            if !output.success() {
                eprintln!("{}", output.describe());
            }
        }
    }
}
