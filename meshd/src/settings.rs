//! Settings: flags, then `MESHD_*` variables, then the file, then defaults. A start reports all errors at once.

mod flags;
mod trial;

use std::{
    fmt, fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args as _;
use control::etcd_options::EtcdOptions;
use etcd_schema::{Cluster, NodeName, SiteName};
use mesh::interface::InterfaceName;
use program::{etcd_flags::EtcdFlags, log::Log};
use serde::Deserialize as _;
use tunnel::OffloadSettings;

pub use flags::{CleanupFlags, OffloadFlag, RunFlags};
pub use trial::Trial;

/// The file that is read when none is named; its absence is no mistake.
pub(crate) const DEFAULT_FILE: &str = "/etc/meshd/meshd.toml";
const DEFAULT_STATE_DIR: &str = "/var/lib/meshd";
const DEFAULT_RUN_DIR: &str = "/run/meshd";
const DEFAULT_METRICS_ADDR: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9473);
const OBSOLETE_MARKS: &str =
    "--policy-marks is ignored: verdicts are no longer kept in connection marks. Remove it from flags and files";
/// WireGuard's usual port.
pub(crate) const DEFAULT_LISTEN_PORT: u16 = 51820;

/// Seconds that an ADD waits for its Pod object.
const DEFAULT_POD_WAIT: u64 = 5;
/// The plugin waits for 15 s in all.
const MAX_POD_WAIT: u64 = 9;

/// The group of nfnetlink_log that verdicts are reported to.
const DEFAULT_LOG_GROUP: u16 = 15_858;

/// Everything `meshd run` needs, checked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The file that they come from, if any.
    pub file: Option<PathBuf>,
    /// Unique name of this node; the host name unless set.
    pub node: NodeName,
    /// Site, if any: nodes of one site may be direct to each other.
    pub site: Option<SiteName>,
    /// The cluster whose networks this node draws its subnet from.
    pub cluster: Cluster,
    /// How etcd is reached.
    pub etcd: EtcdOptions,
    /// Underlay interface; `None`: per family, that of the default route.
    pub iface: Option<InterfaceName>,
    /// Addresses to publish instead of the interface's.
    pub public_ips: Vec<IpAddr>,
    /// Where the tunnel can be reached, if not at the published addresses.
    pub endpoint: EndpointSetting,
    /// UDP port of the tunnel; probes use the next one.
    pub listen_port: u16,
    /// The TUN device.
    pub interface: InterfaceName,
    /// What outlives a boot.
    pub state_dir: PathBuf,
    /// What does not.
    pub run_dir: PathBuf,
    /// Answer a foreign FORWARD drop with one tagged rule.
    pub forward_accept: bool,
    /// Masquerade what leaves the mesh.
    pub ip_masq: bool,
    /// Which of the kernel's offloads the tunnel uses.
    pub offloads: OffloadSettings,
    /// Where metrics and health are served.
    pub metrics: MetricsSettings,
    /// Loopback address and TCP port of the page for browsers; `None`: nowhere.
    pub ui: Option<SocketAddr>,
    /// How long an ADD waits for its Pod object.
    pub pod_wait: Duration,
    /// Warnings: settings that no longer have an effect.
    pub obsolete: Vec<&'static str>,
    /// The group of nfnetlink_log that nftables reports verdicts to.
    pub policy_log_group: u16,
    /// How the log looks.
    pub log: Log,
}

/// `--metrics-addr` and what belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetricsSettings {
    /// Address and TCP port; `None`: nowhere.
    pub address: Option<SocketAddr>,
    /// Whether there are series for each peer.
    pub per_peer: bool,
}

/// What `meshd cleanup` needs: where the daemon's state is.
#[derive(Debug, Clone)]
pub struct CleanupSettings {
    /// The TUN device.
    pub interface: InterfaceName,
    /// What outlives a boot.
    pub state_dir: PathBuf,
    /// What does not.
    pub run_dir: PathBuf,
    /// Also where containers are, or may be, attached.
    pub force: bool,
    /// How the log looks.
    pub log: Log,
    /// What is wrong with the file, where a default took its place.
    pub mistakes: Vec<String>,
}

/// What `meshd floor` needs: what the daemon would protect, and where its state is.
#[derive(Debug, Clone)]
pub struct FloorSettings {
    /// The TUN device.
    pub interface: InterfaceName,
    /// Underlay interface; `None`: per family, that of the default route.
    pub iface: Option<InterfaceName>,
    /// URLs of the members of etcd.
    pub etcd_endpoints: Vec<String>,
    /// What outlives a boot.
    pub state_dir: PathBuf,
    /// How the log looks.
    pub log: Log,
    /// What is wrong with the settings, where a default took its place.
    pub mistakes: Vec<String>,
}

/// `--endpoint`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndpointSetting {
    /// The published addresses with the listen port.
    Derived,
    /// This one, before the derived ones.
    At(SocketAddr),
    /// This node only calls out.
    None,
}

/// All mistakes of one start.
#[derive(Debug)]
pub struct SettingsError(Vec<String>);

impl SettingsError {
    /// The mistakes, one line each.
    #[must_use]
    pub fn into_lines(self) -> Vec<String> {
        self.0
    }
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.join("\n"))
    }
}

impl std::error::Error for SettingsError {}

impl Settings {
    /// Reads the file that `flags` name (or the default one), lays the flags over it and checks the whole.
    ///
    /// # Errors
    /// Every mistake, one line each.
    pub fn load(flags: RunFlags) -> Result<Self, SettingsError> {
        let (flags, mistakes) = over_file(flags);
        Self::check(flags, mistakes)
    }

    fn check(flags: RunFlags, mut mistakes: Vec<String>) -> Result<Self, SettingsError> {
        let file = file_of(&flags).map(Path::to_owned);
        let etcd = flags.etcd.check(&mut mistakes);
        let node = name(flags.node.or_else(host_name), "--node", &mut mistakes);
        if node.is_none() && mistakes.iter().all(|mistake| !mistake.starts_with("--node")) {
            mistakes.push("--node: this machine has no host name; set --node".to_owned());
        }
        let site = name(flags.site, "--site", &mut mistakes);
        let cluster = name(flags.cluster, "--cluster", &mut mistakes).unwrap_or_default();
        let iface = name(flags.iface.filter(|iface| iface != "auto"), "--iface", &mut mistakes);
        let interface = interface(flags.interface, &mut mistakes);
        let public_ips = public_ips(flags.public_ip.unwrap_or_default(), &mut mistakes);
        let endpoint = endpoint(flags.endpoint.as_deref(), &mut mistakes);
        let listen_port = flags.listen_port.unwrap_or(DEFAULT_LISTEN_PORT);
        if listen_port == 0 || listen_port == u16::MAX {
            mistakes.push(format!("--listen-port {listen_port}: must be 1 to 65534, since probes use the next port"));
        }
        let metrics_addr = metrics_address(flags.metrics_addr.as_deref(), &mut mistakes);
        let ui = page_address(flags.ui_addr.as_deref(), &mut mistakes);
        let pod_wait = flags.pod_wait.unwrap_or(DEFAULT_POD_WAIT);
        if pod_wait > MAX_POD_WAIT {
            mistakes.push(format!("--pod-wait {pod_wait}: must be 0 to {MAX_POD_WAIT} seconds"));
        }
        let obsolete = flags.policy_marks.map(|_| OBSOLETE_MARKS).into_iter().collect();
        let log = Log::from_flags(flags.log_level, flags.log_format, &mut mistakes);
        match (node, interface) {
            (Some(node), Some(interface)) if mistakes.is_empty() => Ok(Self {
                file,
                node,
                site,
                cluster,
                etcd,
                iface,
                public_ips,
                endpoint,
                listen_port,
                interface,
                state_dir: flags.state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
                run_dir: flags.run_dir.unwrap_or_else(|| DEFAULT_RUN_DIR.into()),
                forward_accept: flags.forward_accept.unwrap_or_default(),
                ip_masq: !flags.no_ip_masq.unwrap_or_default(),
                offloads: OffloadSettings {
                    udp_gso: flags.udp_gso.map(Into::into).unwrap_or_default(),
                    udp_gro: flags.udp_gro.map(Into::into).unwrap_or_default(),
                    tun_offload: flags.tun_offload.map(Into::into).unwrap_or_default(),
                },
                metrics: MetricsSettings {
                    address: metrics_addr,
                    per_peer: flags.metrics_per_peer.unwrap_or_default(),
                },
                ui,
                pod_wait: Duration::from_secs(pod_wait),
                obsolete,
                policy_log_group: flags.policy_log_group.unwrap_or(DEFAULT_LOG_GROUP),
                log,
            }),
            _ => Err(SettingsError(mistakes)),
        }
    }
}

fn public_ips(given: Vec<IpAddr>, mistakes: &mut Vec<String>) -> Vec<IpAddr> {
    let mut public_ips: Vec<IpAddr> = Vec::new();
    for ip in given {
        if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() {
            mistakes.push(format!("--public-ip {ip}: not an address that other nodes can reach"));
        } else if public_ips.iter().any(|have| have.is_ipv4() == ip.is_ipv4()) {
            mistakes.push(format!("--public-ip {ip}: at most one address per family"));
        } else {
            public_ips.push(ip);
        }
    }
    public_ips
}

fn endpoint(given: Option<&str>, mistakes: &mut Vec<String>) -> EndpointSetting {
    match given {
        None => EndpointSetting::Derived,
        Some("none") => EndpointSetting::None,
        Some(text) => match text.parse::<SocketAddr>() {
            Ok(at) if at.port() != 0 && !at.ip().is_unspecified() => EndpointSetting::At(at),
            _ => {
                mistakes.push(format!("--endpoint {text}: not IP:PORT, [IPv6]:PORT or none"));
                EndpointSetting::Derived
            }
        },
    }
}

fn metrics_address(given: Option<&str>, mistakes: &mut Vec<String>) -> Option<SocketAddr> {
    match given {
        None => Some(DEFAULT_METRICS_ADDR),
        Some("none") => None,
        Some(text) => {
            let at = text.parse::<SocketAddr>().ok().filter(|at| at.port() != 0);
            if at.is_none() {
                mistakes.push(format!("--metrics-addr {text}: not IP:PORT, [IPv6]:PORT or none"));
            }
            at
        }
    }
}

fn page_address(given: Option<&str>, mistakes: &mut Vec<String>) -> Option<SocketAddr> {
    let text = given.filter(|text| *text != "none")?;
    match text.parse::<SocketAddr>() {
        Ok(at) if at.port() != 0 && at.ip().is_loopback() => return Some(at),
        Ok(at) if at.port() != 0 => mistakes.push(format!(
            "--ui-addr {text}: not a loopback address; the page has no authentication: use 127.0.0.1:{port}, and \
             ssh -L {port}:127.0.0.1:{port} from other machines",
            port = at.port()
        )),
        _ => mistakes.push(format!("--ui-addr {text}: not 127.0.0.1:PORT, [::1]:PORT or none")),
    }
    None
}

impl CleanupSettings {
    /// Reads the file that `flags` name (or the default one) and takes from both what a cleanup needs. What the file
    /// says of the node and of etcd is not judged, and its mistakes are for `meshd run` to refuse: nothing in it keeps
    /// anybody from cleaning up, or from removing the package.
    ///
    /// # Errors
    /// Every mistake of the flags themselves, one line each.
    pub fn load(flags: &CleanupFlags) -> Result<Self, SettingsError> {
        let mut mistakes = Vec::new();
        name::<InterfaceName>(flags.interface.clone(), "--interface", &mut mistakes);
        Log::from_flags(flags.log_level.clone(), flags.log_format, &mut mistakes);
        if !mistakes.is_empty() {
            return Err(SettingsError(mistakes));
        }
        let (run, mut mistakes) = over_file(flags.as_run_flags());
        Ok(Self {
            interface: interface_or_default(run.interface, &mut mistakes),
            state_dir: run.state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
            run_dir: run.run_dir.unwrap_or_else(|| DEFAULT_RUN_DIR.into()),
            force: flags.force,
            log: Log::from_flags(run.log_level, run.log_format, &mut mistakes),
            mistakes,
        })
    }
}

impl FloorSettings {
    /// Reads the file that `flags` name (or the default one) and takes from both what the floor needs. Mistakes are for
    /// `meshd run` to refuse: they must not keep the floor away.
    #[must_use]
    pub fn load(flags: RunFlags) -> Self {
        let (run, mut mistakes) = over_file(flags);
        let iface = name(run.iface.filter(|iface| iface != "auto"), "--iface", &mut mistakes);
        Self {
            interface: interface_or_default(run.interface, &mut mistakes),
            iface,
            etcd_endpoints: run.etcd.given_endpoints(),
            state_dir: run.state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
            log: Log::from_flags(run.log_level, run.log_format, &mut mistakes),
            mistakes,
        }
    }

    /// What the daemon itself lays the floor by.
    #[must_use]
    pub fn of(settings: &Settings) -> Self {
        Self {
            interface: settings.interface.clone(),
            iface: settings.iface.clone(),
            etcd_endpoints: settings.etcd.reread().endpoints,
            state_dir: settings.state_dir.clone(),
            log: settings.log,
            mistakes: Vec::new(),
        }
    }
}

/// How the daemon of this machine reaches etcd, by its settings file, with `flags` over it. A user or certificate
/// among them takes the place of all that the file has of both: the operator is then no node. Mistakes in the
/// file that do not concern etcd are for `meshd run`.
///
/// # Errors
/// Every mistake, one line each; a file that cannot be read is none where the flags name etcd's members.
pub fn load_etcd(flags: EtcdFlags, file: Option<PathBuf>) -> Result<EtcdOptions, SettingsError> {
    let run = RunFlags { config: file, ..RunFlags::default() };
    let (file, mut mistakes) = match file_of(&run) {
        Some(path) => read_file(path),
        None => (RunFlags::default(), Vec::new()),
    };
    mistakes.retain(|mistake| match mistake.key() {
        Some(key) => key.starts_with("etcd-"),
        None => flags.endpoints.is_none() && flags.endpoints_file.is_none(),
    });
    let mut mistakes: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
    let below = if flags.has_identity() { file.etcd.without_identity() } else { file.etcd };
    let options = flags.over(below).check(&mut mistakes);
    if mistakes.is_empty() { Ok(options) } else { Err(SettingsError(mistakes)) }
}

/// The file that `flags` name, or the default one where it is there.
fn file_of(flags: &RunFlags) -> Option<&Path> {
    let default = || Some(Path::new(DEFAULT_FILE)).filter(|file| file.exists());
    flags.config.as_deref().or_else(default)
}

/// Lays `flags` over the file that they name, or over the default one; the mistakes in the file beside.
fn over_file(flags: RunFlags) -> (RunFlags, Vec<String>) {
    let Some(path) = file_of(&flags) else { return (flags, Vec::new()) };
    let (file, mistakes) = read_file(path);
    (flags.over(file), mistakes.iter().map(ToString::to_string).collect())
}

/// A mistake in a settings file.
struct FileMistake {
    path: PathBuf,
    /// `KEY: what is wrong`, or what keeps the whole file from being read.
    text: String,
}

impl FileMistake {
    /// The setting that it concerns; `None`: all of them.
    fn key(&self) -> Option<&str> {
        let (key, _) = self.text.split_once(": ")?;
        key.bytes().all(|b| b.is_ascii_lowercase() || b == b'-').then_some(key)
    }
}

impl fmt::Display for FileMistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--config {}: {}", self.path.display(), self.text)
    }
}

/// The settings in a file, as far as they can be read, and its mistakes.
fn read_file(path: &Path) -> (RunFlags, Vec<FileMistake>) {
    let (settings, mistakes) = match fs::read_to_string(path) {
        Ok(text) => parse_file(&text),
        Err(error) => (RunFlags::default(), vec![error.to_string()]),
    };
    (settings, mistakes.into_iter().map(|text| FileMistake { path: path.to_owned(), text }).collect())
}

/// The settings in a file's text, as far as they can be read, and its mistakes: a text that is no TOML, keys that are
/// no flags (as mistyped flags would be), values of another type.
fn parse_file(text: &str) -> (RunFlags, Vec<String>) {
    let mut settings = RunFlags::default();
    let table: toml::Table = match text.parse::<toml::Table>() {
        Ok(table) => table,
        Err(error) => return (settings, vec![error.to_string().trim_end().to_owned()]),
    };
    let mut mistakes = Vec::new();
    let known = RunFlags::augment_args(clap::Command::new("run"));
    let is_known =
        |key: &str| !matches!(key, "config" | "check") && known.get_arguments().any(|arg| arg.get_long() == Some(key));
    for (key, value) in table {
        if !is_known(&key) {
            mistakes.push(format!(
                "{key}: unknown setting; the keys are the flags of `meshd run` without the leading \
                               dashes"
            ));
            continue;
        }
        // Each by itself, so that one mistake does not hide another.
        let alone = toml::Table::from_iter([(key.clone(), value)]);
        match RunFlags::deserialize(alone) {
            Ok(one) => settings = one.over(settings),
            Err(error) => mistakes.push(format!("{key}: {}", error.message())),
        }
    }
    (settings, mistakes)
}

fn interface(given: Option<String>, mistakes: &mut Vec<String>) -> Option<InterfaceName> {
    name(Some(given.unwrap_or_else(|| "meshd0".to_owned())), "--interface", mistakes)
}

fn interface_or_default(given: Option<String>, mistakes: &mut Vec<String>) -> InterfaceName {
    interface(given, mistakes)
        .or_else(|| interface(None, mistakes))
        .unwrap_or_else(|| unreachable!("the default is a name"))
}

/// Parses a name, or notes the mistake.
fn name<T: std::str::FromStr<Err: fmt::Display>>(
    text: Option<String>,
    flag: &str,
    mistakes: &mut Vec<String>,
) -> Option<T> {
    let text = text?;
    match text.parse() {
        Ok(name) => Some(name),
        Err(error) => {
            mistakes.push(format!("{flag} {text}: {error}"));
            None
        }
    }
}

fn host_name() -> Option<String> {
    nix::unistd::gethostname().ok()?.into_string().ok().map(|name| name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests;
