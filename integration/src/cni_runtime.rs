//! A container runtime's calls of CNI plugins: runs a list of plugins in a host's namespace, each with the previous
//! result, like libcni.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{Seek as _, Write as _},
    net::IpAddr,
    ops::Deref,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
};

use cni::daemon::Attached;
use serde_json::{Value, json};

use crate::{
    Host, MeshdNode, Namespace, binary,
    stepped::{self, Steps, Then},
};

/// Where Debian has its plugins.
const DEBIAN: &str = "/usr/lib/cni";
/// The interface inside.
const IFNAME: &str = "eth0";

/// A network: a list of plugins on a host.
pub struct CniRuntime {
    host: Host,
    list: Value,
    path: String,
    args: String,
    capabilities: BTreeMap<String, Value>,
    /// The results that a runtime keeps for CHECK and DEL.
    results: Mutex<BTreeMap<String, Value>>,
}

/// A plugin that did not succeed.
#[derive(Debug, Clone)]
pub struct CniFailure {
    /// The plugin's `type`.
    pub plugin: String,
    /// What it printed: an error by the specification, if it keeps to it.
    pub error: Value,
    /// What it logged.
    pub log: String,
}

/// A pod that plugins have attached: a namespace. Dereferences to it.
#[derive(Debug, Clone)]
pub struct CniPod {
    namespace: Namespace,
    /// The container's id.
    pub id: String,
    /// What the last plugin returned.
    pub result: Value,
    /// Its addresses, in the result's order.
    pub addresses: Vec<IpAddr>,
}

impl MeshdNode {
    /// A network on this node of `meshd-cni` alone, with these additional fields in its configuration.
    #[must_use]
    pub fn cni(&self, version: &str, more: &Value) -> CniRuntime {
        CniRuntime::new(self.host(), version, &[self.cni_plugin(more)])
    }

    /// The configuration of `meshd-cni` for this node's daemon.
    ///
    /// # Panics
    /// When `more` is no object.
    #[must_use]
    pub fn cni_plugin(&self, more: &Value) -> Value {
        let mut plugin = json!({"type": "meshd-cni", "runDir": self.run_dir()});
        match (plugin.as_object_mut(), more.as_object()) {
            (Some(plugin), Some(more)) => plugin.extend(more.clone()),
            _ => panic!("{more} is no object"),
        }
        plugin
    }

    /// The addresses of this node's attachments, by the daemon's files: it may be away.
    ///
    /// # Panics
    /// When a file is not an attachment's.
    #[must_use]
    #[track_caller]
    pub fn pod_addresses(&self) -> Vec<IpAddr> {
        let folder = self.run_dir().join(cni::daemon::RECORDS);
        let names: Vec<String> = fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        let withdrawn: Vec<_> = names.iter().filter_map(|name| cni::daemon::withdrawn_by(name)).collect();
        let records =
            names.iter().filter(|name| name.contains('@') && !name.starts_with('.') && !name.ends_with(".new"));
        let mut addresses = Vec::new();
        for name in records {
            // One that is withdrawn meanwhile does not count.
            let Ok(bytes) = fs::read(folder.join(name)) else { continue };
            let attached: Attached = serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
            if !withdrawn.contains(&attached.name()) {
                addresses.extend(attached.addresses());
            }
        }
        addresses.sort();
        addresses
    }

    /// A configuration of host-local with a store of its own: this node's subnets, in both families.
    ///
    /// # Panics
    /// When the node has a subnet without room for a pod.
    #[must_use]
    #[track_caller]
    pub fn host_local(&self) -> Value {
        let ranges: Vec<Value> = self
            .subnets()
            .iter()
            .map(|subnet| {
                let (first, last) = cni::ipam::range(subnet, &self.overlay())
                    .unwrap_or_else(|| panic!("{subnet} has no room for a pod"));
                json!([{"subnet": subnet, "rangeStart": first, "rangeEnd": last}])
            })
            .collect();
        json!({"type": "host-local", "dataDir": self.run_dir().join("host-local"), "ranges": ranges,
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]})
    }
}

impl CniRuntime {
    /// The network `mesh` of these plugins.
    #[must_use]
    pub fn new(host: &Host, version: &str, plugins: &[Value]) -> Self {
        let own = binary("meshd-cni");
        let own = own.parent().unwrap_or_else(|| Path::new("/")).display().to_string();
        Self {
            host: host.clone(),
            list: json!({"cniVersion": version, "name": "mesh", "plugins": plugins}),
            path: format!("{own}:{DEBIAN}"),
            args: "IgnoreUnknown=1".to_owned(),
            capabilities: BTreeMap::new(),
            results: Mutex::default(),
        }
    }

    /// Another name than `mesh`.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.list["name"] = name.into();
        self
    }

    /// More for `CNI_ARGS`: `K8S_POD_NAME=web;K8S_POD_NAMESPACE=shop`.
    #[must_use]
    pub fn args(mut self, args: &str) -> Self {
        self.args = format!("{};{args}", self.args);
        self
    }

    /// A capability's argument, for the plugins that have the capability.
    #[must_use]
    pub fn capability(mut self, name: &str, value: Value) -> Self {
        self.capabilities.insert(name.to_owned(), value);
        self
    }

    /// A namespace that is attached.
    ///
    /// # Panics
    /// When ADD fails.
    #[must_use]
    #[track_caller]
    pub fn pod(&self, name: &str) -> CniPod {
        self.attach(name, &self.namespace(name))
    }

    /// Attaches a namespace that is there.
    ///
    /// # Panics
    /// When ADD fails.
    #[must_use]
    #[track_caller]
    pub fn attach(&self, name: &str, namespace: &Namespace) -> CniPod {
        let result = self.add(name, namespace).unwrap_or_else(|failure| panic!("ADD of {name}: {failure}"));
        CniPod { addresses: addresses(&result), namespace: namespace.clone(), id: name.to_owned(), result }
    }

    /// Takes plugins from this folder first: another build of `meshd-cni`.
    #[must_use]
    pub fn plugins_from(mut self, folder: &Path) -> Self {
        self.path = format!("{}:{}", folder.display(), self.path);
        self
    }

    /// A namespace that is not attached yet.
    #[must_use]
    pub fn namespace(&self, name: &str) -> Namespace {
        self.host.sibling(&format!("{}-{name}", self.host.name()))
    }

    /// ADD: the last plugin's result.
    ///
    /// # Errors
    /// What the first plugin that failed said. As with libcni, cleaning up is up to the caller.
    pub fn add(&self, container: &str, namespace: &Namespace) -> Result<Value, CniFailure> {
        let mut result = None;
        for plugin in self.plugins() {
            let config = self.config(plugin, result.as_ref());
            result = Some(self.run(&config, "ADD", container, &netns(Some(namespace)))?);
        }
        let result = result.unwrap_or_default();
        self.results().insert(container.to_owned(), result.clone());
        Ok(result)
    }

    /// DEL, in the reverse order.
    ///
    /// # Errors
    /// What the first plugin that failed said.
    pub fn del(&self, container: &str, namespace: Option<&Namespace>) -> Result<(), CniFailure> {
        let known = self.results().get(container).cloned();
        for plugin in self.plugins().rev() {
            self.run(&self.config(plugin, known.as_ref()), "DEL", container, &netns(namespace))?;
        }
        self.results().remove(container);
        Ok(())
    }

    /// CHECK.
    ///
    /// # Errors
    /// What the first plugin that failed said.
    pub fn check(&self, container: &str, namespace: &Namespace) -> Result<(), CniFailure> {
        let known = self.results().get(container).cloned();
        for plugin in self.plugins() {
            self.run(&self.config(plugin, known.as_ref()), "CHECK", container, &netns(Some(namespace)))?;
        }
        Ok(())
    }

    /// STATUS of every plugin.
    ///
    /// # Errors
    /// What the first plugin that failed said.
    pub fn status(&self) -> Result<(), CniFailure> {
        self.plugins().try_for_each(|plugin| self.run(&self.config(plugin, None), "STATUS", "", "").map(drop))
    }

    /// GC: only these containers are there.
    ///
    /// # Errors
    /// What the first plugin that failed said.
    pub fn gc(&self, valid: &[&str]) -> Result<(), CniFailure> {
        let valid: Vec<Value> = valid.iter().map(|id| json!({"containerID": id, "ifname": IFNAME})).collect();
        self.plugins().try_for_each(|plugin| {
            let mut config = self.config(plugin, None);
            config["cni.dev/valid-attachments"] = valid.clone().into();
            self.run(&config, "GC", "", "").map(drop)
        })
    }

    /// Runs the first plugin with this command, up to before step number `step`; `at` says there how it goes on. DEL
    /// gets the result of an ADD that is known.
    ///
    /// # Panics
    /// When it cannot be started or watched.
    #[track_caller]
    pub fn stepped(
        &self,
        command: &str,
        container: &str,
        namespace: &Namespace,
        step: usize,
        at: impl FnOnce() -> Then + Send,
    ) -> Steps {
        let Some(plugin) = self.plugins().next() else { panic!("no plugin") };
        let known = self.results().get(container).cloned();
        let config = self.config(plugin, known.as_ref());
        let mut process = self.command(&config, command, container, &netns(Some(namespace)));
        process.stdin(file_with(&config.to_string())).stdout(Stdio::null()).stderr(Stdio::null());
        let ran = self.host.enter(|| stepped::run(&mut process, step, at));
        ran.unwrap_or_else(|error| panic!("{command} up to step {step}: {error}"))
    }

    /// Starts the first plugin with this command and leaves it running, for callers that end it early.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    #[track_caller]
    pub fn start(&self, command: &str, container: &str, namespace: &Namespace) -> Child {
        let Some(plugin) = self.plugins().next() else { panic!("no plugin") };
        let config = self.config(plugin, None);
        let mut process = self.command(&config, command, container, &netns(Some(namespace)));
        let input = file_with(&config.to_string());
        self.host
            .enter(|| process.stdin(input).stdout(Stdio::null()).stderr(Stdio::null()).spawn())
            .unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    fn plugins(&self) -> impl DoubleEndedIterator<Item = &Value> {
        self.list["plugins"].as_array().into_iter().flatten()
    }

    /// A plugin's own configuration, as the runtime makes it of the list's.
    fn config(&self, plugin: &Value, previous: Option<&Value>) -> Value {
        let mut config = plugin.clone();
        for key in ["cniVersion", "name"] {
            config[key] = self.list[key].clone();
        }
        for (name, value) in &self.capabilities {
            if plugin["capabilities"][name] == true {
                config["runtimeConfig"][name] = value.clone();
            }
        }
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        config
    }

    fn run(&self, config: &Value, command: &str, container: &str, netns: &str) -> Result<Value, CniFailure> {
        let mut process = self.command(config, command, container, netns);
        let input = file_with(&config.to_string());
        let output = self.host.enter(|| process.stdin(input).output());
        let output = output.unwrap_or_else(|error| panic!("{command} of {config}: {error}"));
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = serde_json::from_str(&printed).unwrap_or(Value::String(printed));
        if output.status.success() {
            return Ok(said);
        }
        Err(CniFailure {
            plugin: config["type"].as_str().unwrap_or_default().to_owned(),
            error: said,
            log: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    fn command(&self, config: &Value, command: &str, container: &str, netns: &str) -> Command {
        let kind = config["type"].as_str().unwrap_or_default();
        let found = self.path.split(':').map(|dir| Path::new(dir).join(kind)).find(|path| path.is_file());
        let program: PathBuf = found.unwrap_or_else(|| panic!("plugin {kind:?} is not in {}", self.path));
        let mut process = Command::new(program);
        process
            // Cargo's, where the loader would look for every library first.
            .env_remove("LD_LIBRARY_PATH")
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", container)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", if container.is_empty() { "" } else { IFNAME })
            .env("CNI_ARGS", &self.args)
            .env("CNI_PATH", &self.path);
        process
    }

    fn results(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Value>> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CniFailure {
    /// The error's code.
    #[must_use]
    pub fn code(&self) -> Option<u64> {
        self.error["code"].as_u64()
    }
}

impl fmt::Display for CniFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} said {} and logged {:?}", self.plugin, self.error, self.log)
    }
}

impl CniPod {
    /// Its first IPv4 address.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    #[track_caller]
    pub fn v4(&self) -> IpAddr {
        self.first(IpAddr::is_ipv4)
    }

    /// Its first IPv6 address.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    #[track_caller]
    pub fn v6(&self) -> IpAddr {
        self.first(IpAddr::is_ipv6)
    }

    #[track_caller]
    fn first(&self, family: fn(&IpAddr) -> bool) -> IpAddr {
        let found = self.addresses.iter().copied().find(family);
        found.unwrap_or_else(|| panic!("{} has no address of that family: {}", self.id, self.result))
    }
}

impl Deref for CniPod {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

fn netns(namespace: Option<&Namespace>) -> String {
    namespace.map(|namespace| namespace.path().display().to_string()).unwrap_or_default()
}

fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().into_iter().flatten();
    ips.filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok()).collect()
}

fn file_with(text: &str) -> fs::File {
    let file = tempfile::tempfile().and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.rewind()?;
        Ok(file)
    });
    file.unwrap_or_else(|error| panic!("a temporary file: {error}"))
}
