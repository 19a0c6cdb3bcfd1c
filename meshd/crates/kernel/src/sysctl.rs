//! Sysctls below `/proc/sys/net`, and their earlier values.
//!
//! When IPv6 forwarding is turned on, the kernel drops default routes from router advertisements, unless the interface
//! has `accept_ra` 2. So meshd sets that first, on interfaces with such a route and on the underlay, and only where
//! `accept_ra` was 1 and forwarding off. Interfaces of pods stay unchanged: their advertisements are not trusted.
//!
//! For a direct packet from an overlay address, the kernel would send an ARP request with that address as its sender.
//! All neighbours receive it, and some ignore senders outside of the subnet. `arp_announce` 2 on the underlay makes the
//! kernel use the interface's own address.
//!
//! `/proc/sys/net` shows the network namespace of the thread that opens it, so all code here runs on the caller's.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Component, Path, PathBuf},
};

use mesh::{interface::InterfaceName, kernel_state::Desired};
use serde::{Deserialize, Serialize, de::Error as _};
use thiserror::Error;

use super::{
    Options,
    failure::{Failure, FailureCause},
    netlink::KernelLink,
};

/// Container runtimes make `/proc/sys` read-only unless the container is privileged. Where the host's is mounted here,
/// settings are made through it; both show the network namespace of the opening thread.
const WRITABLE_IN_CONTAINER: &str = "/host/proc/sys";

const FORWARD4: &str = "net/ipv4/ip_forward";
const FORWARD6: &str = "net/ipv6/conf/all/forwarding";
const RP_FILTER_ALL: &str = "net/ipv4/conf/all/rp_filter";
const ARP_ANNOUNCE_ALL: &str = "net/ipv4/conf/all/arp_announce";
const STATE_FILE: &str = "sysctls.json";
/// Longest file of that name that is read: some thousand settings.
const MAX_STATE: u64 = 1 << 20;

/// Settings as they are and as they were.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sysctls {
    /// Values by key, a path below `/proc/sys`. A setting that does not exist is not here.
    pub values: BTreeMap<String, String>,
    /// Sysctls changed earlier, with their previous values.
    pub saved: BTreeMap<String, Saved>,
    /// The file of earlier changes is unreadable: cleanup restores nothing.
    pub saved_unreadable: bool,
    /// Interfaces that have a default route by router advertisement.
    pub advertised: BTreeSet<InterfaceName>,
    /// The key of the TUN device's way to make link-local addresses.
    pub tun_addr_gen: Option<String>,
    /// Receiving interfaces of pods' packets: each pod's interface, or its bridge (`true`), which outlives the pod.
    pub pods: BTreeMap<InterfaceName, bool>,
}

/// A setting that was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Its value before.
    pub earlier: String,
    /// The value it was given.
    pub set: String,
}

/// A setting to change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// A path below `/proc/sys`.
    pub key: String,
    /// Its value now.
    pub earlier: String,
    /// Its value to be.
    pub value: String,
    /// Whether cleanup gives back the earlier value. Not for settings of our own devices, which go themselves.
    pub keep: bool,
    /// Whether it lets packets pass that did not pass before.
    pub opens: bool,
}

/// Why the earlier values cannot be read or kept.
#[derive(Debug, Error)]
pub enum StateError {
    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not ours or is damaged.
    #[error("{path} is damaged: {source}")]
    Format {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        Self::new("earlier kernel settings".to_owned(), FailureCause::Saved { message: error.to_string() })
    }
}

/// Reads the input of [`plan`].
pub(super) fn observe(
    options: &Options,
    desired: &Desired,
    links: &[KernelLink],
    advertised: BTreeSet<InterfaceName>,
    failures: &mut Vec<Failure>,
) -> Sysctls {
    let mut keys = vec![
        FORWARD4.to_owned(),
        FORWARD6.to_owned(),
        RP_FILTER_ALL.to_owned(),
        ARP_ANNOUNCE_ALL.to_owned(),
        rp_filter(&options.tun),
        addr_gen_mode(&options.tun),
    ];
    let pods = receiving(&desired.pods, links);
    keys.extend(desired.underlay4.iter().chain([&options.tun]).chain(pods.keys()).map(forwarding4));
    let vxlan: Vec<&InterfaceName> = desired.vxlan.iter().map(|device| &device.name).collect();
    keys.extend(vxlan.iter().flat_map(|dev| [rp_filter(dev), forwarding4(dev)]));
    for dev in &desired.underlay {
        keys.push(rp_filter(dev));
        keys.push(arp_announce(dev));
        keys.push(accept_ra(dev));
    }
    keys.extend(advertised.iter().map(accept_ra));
    let values = keys.into_iter().filter_map(|key| read(&key).ok().map(|value| (key, value))).collect();
    let saved = load(&options.state_dir).map_err(|error| failures.push(error.into()));
    Sysctls {
        values,
        saved_unreadable: saved.is_err(),
        saved: saved.unwrap_or_default(),
        advertised,
        tun_addr_gen: Some(addr_gen_mode(&options.tun)),
        pods,
    }
}

/// The receiving interface of packets from each of these: itself, or its bridge.
fn receiving(pods: &[InterfaceName], links: &[KernelLink]) -> BTreeMap<InterfaceName, bool> {
    let named: BTreeMap<&str, &KernelLink> = links.iter().map(|link| (link.name.as_str(), link)).collect();
    let by_index: BTreeMap<u32, &KernelLink> = links.iter().map(|link| (link.index, link)).collect();
    pods.iter()
        .filter_map(|pod| {
            let bridge = named.get(pod.as_str())?.master.and_then(|index| by_index.get(&index));
            match bridge {
                Some(bridge) => Some((InterfaceName::new(&bridge.name).ok()?, true)),
                None => Some((pod.clone(), false)),
            }
        })
        .collect()
}

/// The setting of the underlay's interface that keeps IPv4 packets from being forwarded, where it does.
pub(super) fn not_forwarding(desired: &Desired, sysctls: &Sysctls) -> Option<InterfaceName> {
    let is = |key: &str, value: &str| sysctls.values.get(key).is_some_and(|found| found == value);
    let underlay = desired.underlay4.as_ref().filter(|_| desired.forwarding.ipv4)?;
    // Writing the one for all writes each.
    (is(FORWARD4, "1") && is(&forwarding4(underlay), "0")).then(|| underlay.clone())
}

/// The TUN device makes no link-local addresses: it has no neighbours.
pub(super) fn plan_tun(sysctls: &Sysctls) -> Option<Setting> {
    change(sysctls, sysctls.tun_addr_gen.as_ref()?, "1", false, false)
}

/// The underlay asks for its neighbours by its own address. Belongs before the overlay's addresses.
pub(super) fn plan_underlay(desired: &Desired, sysctls: &Sysctls) -> Vec<Setting> {
    // The kernel takes the larger of both.
    if sysctls.values.get(ARP_ANNOUNCE_ALL).is_some_and(|all| all == "2") {
        return Vec::new();
    }
    let underlay: BTreeSet<_> = desired.underlay.iter().collect();
    underlay.into_iter().filter_map(|dev| change(sysctls, &arp_announce(dev), "2", true, false)).collect()
}

/// The settings that differ, in the order in which they must be made.
pub(super) fn plan(
    options: &Options,
    desired: &Desired,
    sysctls: &Sysctls,
    failures: &mut Vec<Failure>,
) -> Vec<Setting> {
    let value = |key: &str| sysctls.values.get(key).map(String::as_str);
    let mut settings = Vec::new();
    let was_host = value(FORWARD6) == Some("0") || sysctls.saved.get(FORWARD6).is_some_and(|s| s.earlier == "0");
    if desired.forwarding.ipv6 && was_host {
        let devices: BTreeSet<_> =
            desired.underlay.iter().chain(&sysctls.advertised).filter(|dev| **dev != options.tun).collect();
        let keys = devices.into_iter().map(accept_ra).filter(|key| value(key) == Some("1"));
        settings.extend(keys.filter_map(|key| change(sysctls, &key, "2", true, false)));
    }
    // The kernel takes the larger of both: 1 strict, 2 loose.
    let strict_all = value(RP_FILTER_ALL) == Some("1");
    let underlay: BTreeSet<_> = desired.underlay.iter().collect();
    let own: BTreeSet<_> = [&options.tun].into_iter().chain(desired.vxlan.iter().map(|device| &device.name)).collect();
    for dev in underlay.into_iter().chain(own.iter().copied()) {
        let key = rp_filter(dev);
        let found = value(&key);
        if found == Some("1") || (strict_all && found == Some("0")) {
            settings.extend(change(sysctls, &key, "2", !own.contains(dev), false));
        }
    }
    for (wanted, key) in [(desired.forwarding.ipv4, FORWARD4), (desired.forwarding.ipv6, FORWARD6)] {
        if !wanted {
            continue;
        }
        if value(key).is_none() {
            let message = "the kernel does not have this setting".to_owned();
            failures.push(Failure::new(key.to_owned(), FailureCause::Setting { message }));
        }
        settings.extend(change(sysctls, key, "1", true, true));
    }
    // IPv4 is forwarded by the setting of the interface that a packet comes in by, which new ones take from `default`;
    // IPv6 by that for all. Writing the latter writes each of the former.
    if desired.forwarding.ipv4 && value(FORWARD4) == Some("1") {
        settings.extend(own.iter().filter_map(|dev| change(sysctls, &forwarding4(dev), "1", false, true)));
        let pods = sysctls.pods.iter();
        settings.extend(pods.filter_map(|(dev, is_bridge)| change(sysctls, &forwarding4(dev), "1", *is_bridge, true)));
    }
    settings
}

/// The change of a setting to `value`, if it is there and differs.
fn change(sysctls: &Sysctls, key: &str, value: &str, keep: bool, opens: bool) -> Option<Setting> {
    let earlier = sysctls.values.get(key)?;
    // The earlier value cannot be saved; the failure of reading the file is reported.
    let unkept = keep && sysctls.saved_unreadable;
    (earlier != value && !unkept).then(|| Setting {
        key: key.to_owned(),
        earlier: earlier.clone(),
        value: value.to_owned(),
        keep,
        opens,
    })
}

/// Makes a setting, after its earlier value is on disk.
pub(crate) fn apply(state_dir: &Path, setting: &Setting) -> Result<(), FailureCause> {
    let failed = |message: String| FailureCause::Setting { message };
    if setting.keep {
        let mut saved = load(state_dir).map_err(|e| FailureCause::Saved { message: e.to_string() })?;
        let entry = saved
            .entry(setting.key.clone())
            .or_insert_with(|| Saved { earlier: setting.earlier.clone(), set: setting.value.clone() });
        entry.set.clone_from(&setting.value);
        store(state_dir, &saved).map_err(|e| FailureCause::Saved { message: e.to_string() })?;
    }
    write(&setting.key, &setting.value).map_err(|e| failed(e.to_string()))
}

/// Restores earlier values where ours are still set, and forgets them. Returns changes and failures.
pub(crate) fn restore(state_dir: &Path) -> Result<(Vec<String>, Vec<Failure>), StateError> {
    let mut saved = load(state_dir)?;
    let mut done = Vec::new();
    let mut failures = Vec::new();
    // Forwarding first: while it is on, an interface with `accept_ra` 1 would lose its advertised routes.
    let mut keys: Vec<String> = saved.keys().cloned().collect();
    // `cleanup` runs as root, and the daemon's user owns the file.
    if let Some(key) = keys.iter().find(|key| !is_below_net(key)) {
        let source = serde_json::Error::custom(format!("{key:?} is not a setting below net/"));
        return Err(StateError::Format { path: state_dir.join(STATE_FILE), source });
    }
    keys.sort_by_key(|key| key != FORWARD4 && key != FORWARD6);
    for key in keys {
        let Some(entry) = saved.get(&key) else {
            continue;
        };
        let restored = match read(&key) {
            Ok(now) if now == entry.set => write(&key, &entry.earlier).map(|()| true),
            Ok(_) => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        };
        match restored {
            Ok(changed) => {
                if changed {
                    done.push(format!("{key} restored to {}", entry.earlier));
                }
                saved.remove(&key);
            }
            Err(e) => failures.push(Failure::new(key, FailureCause::Setting { message: e.to_string() })),
        }
    }
    if saved.is_empty() {
        let path = state_dir.join(STATE_FILE);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(StateError::Io { path, source });
            }
            _ => {}
        }
    } else {
        store(state_dir, &saved)?;
    }
    Ok((done, failures))
}

fn is_below_net(key: &str) -> bool {
    let mut parts = Path::new(key).components();
    parts.next() == Some(Component::Normal("net".as_ref())) && parts.all(|part| matches!(part, Component::Normal(_)))
}

fn load(state_dir: &Path) -> Result<BTreeMap<String, Saved>, StateError> {
    let path = state_dir.join(STATE_FILE);
    // `meshd cleanup` reads it as root, and the daemon's user owns the directory.
    match atomic_file::read(&path, MAX_STATE) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|source| StateError::Format { path, source }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(source) => Err(StateError::Io { path, source }),
    }
}

fn store(state_dir: &Path, saved: &BTreeMap<String, Saved>) -> Result<(), StateError> {
    let path = state_dir.join(STATE_FILE);
    let write = || -> io::Result<()> {
        fs::create_dir_all(state_dir)?;
        atomic_file::write(&path, 0o600, &serde_json::to_vec_pretty(saved)?)
    };
    write().map_err(|source| StateError::Io { path, source })
}

fn read(key: &str) -> io::Result<String> {
    fs::read_to_string(Path::new("/proc/sys").join(key)).map(|text| text.trim().to_owned())
}

fn write(key: &str, value: &str) -> io::Result<()> {
    let in_container = Path::new(WRITABLE_IN_CONTAINER).join(key);
    let path = if in_container.exists() { in_container } else { Path::new("/proc/sys").join(key) };
    fs::write(path, value)
}

fn forwarding4(dev: &InterfaceName) -> String {
    format!("net/ipv4/conf/{dev}/forwarding")
}

fn rp_filter(dev: &InterfaceName) -> String {
    format!("net/ipv4/conf/{dev}/rp_filter")
}

fn arp_announce(dev: &InterfaceName) -> String {
    format!("net/ipv4/conf/{dev}/arp_announce")
}

fn accept_ra(dev: &InterfaceName) -> String {
    format!("net/ipv6/conf/{dev}/accept_ra")
}

fn addr_gen_mode(dev: &InterfaceName) -> String {
    format!("net/ipv6/conf/{dev}/addr_gen_mode")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_a_link_nor_a_fifo_holds_settings() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        store(outside.path(), &BTreeMap::new()).unwrap();
        let path = dir.path().join(STATE_FILE);
        std::os::unix::fs::symlink(outside.path().join(STATE_FILE), &path).unwrap();
        assert!(matches!(restore(dir.path()), Err(StateError::Io { .. })));
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(restore(dir.path()), Err(StateError::Io { .. })));
    }

    #[test]
    fn only_settings_below_net_are_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        fs::write(&target, "set").unwrap();
        let climbing = format!("net/../../..{}", target.display());
        for key in [target.display().to_string(), climbing, "kernel/hostname".to_owned()] {
            let saved = [(key.clone(), Saved { earlier: "written".to_owned(), set: "set".to_owned() })];
            store(dir.path(), &saved.into_iter().collect()).unwrap();
            assert!(matches!(restore(dir.path()), Err(StateError::Format { .. })), "{key}");
        }
        assert_eq!(fs::read_to_string(&target).unwrap(), "set");
        assert!(is_below_net("net/ipv4/conf/eth0.7/forwarding"));
    }
}
