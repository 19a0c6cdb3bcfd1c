//! `meshd install-cni`: installs the plugin for container runtimes, and its configuration last.
//!
//! A runtime uses the first configuration of a directory as soon as it exists, and then considers the node ready. So
//! the binary is installed first, by rename; then the command waits for the daemon; then it writes the configuration
//! atomically.

mod configuration;

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use atomic_file::{FileError, Folder};
use clap::Args;
use cni::daemon::{Attached, RECORDS};
use nix::net::if_::if_nametoindex;
use serde_json::Value;
use text::with_causes;
use tokio::signal::unix::{SignalKind, signal};

use self::configuration::{
    chained, earlier_configuration, is_ours, own_conflist, read_chain, read_conflist, remove_file, write_if_other,
};

/// The plugin, and its `type`.
const PLUGIN: &str = "meshd-cni";
/// The configuration of the plugin alone.
const CONFLIST: &str = "10-meshd.conflist";
/// Plugins that Kubernetes runtimes expect and some distributions lack.
const EXPECTED: [&str; 3] = ["loopback", "portmap", "bandwidth"];
/// The daemon's default run directory.
const RUN_DIR: &str = "/run/meshd";
/// Where distributions' packages put plugins.
const PACKAGED: &str = "/usr/lib/cni";
/// With `--keep`: between two looks whether all is still there.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Between two looks whether the daemon is ready.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest configuration of another plugin that is read.
const MAX_CONFIG: u64 = 1 << 20;

/// The command's flags.
#[derive(Debug, Clone, Args)]
pub struct InstallCniFlags {
    /// Directory in which the container runtime searches CNI plugins
    #[arg(long, env = "MESHD_CNI_BIN_DIR", value_name = "DIR", default_value = "/opt/cni/bin")]
    pub bin_dir: PathBuf,
    /// Directory from which the container runtime reads CNI configurations
    #[arg(long, env = "MESHD_CNI_CONF_DIR", value_name = "DIR", default_value = "/etc/cni/net.d")]
    pub conf_dir: PathBuf,
    /// The daemon's --run-dir, as seen from the host of the container runtime
    #[arg(long, env = "MESHD_RUN_DIR", value_name = "DIR", default_value = RUN_DIR)]
    pub run_dir: PathBuf,
    /// Plugin binary to install [default: meshd-cni next to this binary, or in /usr/lib/cni]
    #[arg(long, value_name = "FILE")]
    pub plugin: Option<PathBuf>,
    /// Also install the plugins loopback, portmap and bandwidth of this directory, if --bin-dir lacks them
    #[arg(long, value_name = "DIR")]
    pub plugins: Option<PathBuf>,
    /// Append the plugin to this existing conflist instead of writing its own
    #[arg(long, value_name = "FILE")]
    pub chain: Option<PathBuf>,
    /// Remove the plugin and its configuration, also from other plugins' conflists
    #[arg(long, conflicts_with_all = ["plugin", "plugins", "chain"])]
    pub remove: bool,
    /// With --remove: remove it even if containers are attached; the container runtime cannot delete them afterwards
    #[arg(long, requires = "remove")]
    pub force: bool,
    /// Keep running until SIGTERM and restore missing files, as a sidecar of the daemon
    #[arg(long, conflicts_with = "remove")]
    pub keep: bool,
    /// Change nothing; fail unless the configuration is there and the one that the container runtime uses
    #[arg(long, conflicts_with_all = ["keep", "remove"])]
    pub check: bool,
    /// Seconds to wait for the daemon; after that, no configuration is written
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub timeout: u64,
}

/// How it ended, when it did not fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Installed {
    /// All is in place, or away.
    Done,
    /// The binary is installed, but the daemon was not ready in time, and why.
    NotReady(String),
    /// All is in place, but the runtime uses another configuration: why, and the remedy.
    Unused(String),
}

/// Installs the plugin, or removes it.
///
/// # Errors
/// If a file cannot be read or written, or is no conflist to chain to.
pub fn install_cni(flags: &InstallCniFlags) -> anyhow::Result<Installed> {
    if flags.remove {
        remove(flags)?;
        return Ok(Installed::Done);
    }
    if flags.check {
        return Ok(check(flags));
    }
    let chain = flags.chain.as_deref().map(|file| read_chain(file).map(|list| (file, list))).transpose()?;
    put_binary(&source(flags)?, &flags.bin_dir, PLUGIN)?;
    if let Some(plugins) = &flags.plugins {
        // One that is there is the distribution's own.
        for plugin in EXPECTED.into_iter().filter(|plugin| !flags.bin_dir.join(plugin).exists()) {
            put_binary(&plugins.join(plugin), &flags.bin_dir, plugin)?;
        }
    }
    if let Some(reason) = wait_for_daemon(&flags.run_dir, Duration::from_secs(flags.timeout)) {
        return Ok(Installed::NotReady(reason));
    }
    match chain {
        Some((file, list)) => {
            // Read before the wait, to fail early; later changes are kept.
            let now = read_chain(file).unwrap_or(list);
            write_if_other(file, &chained(now, &flags.run_dir))?;
            // It would come first, and the chain would not be used.
            remove_file(&flags.conf_dir.join(CONFLIST))?;
            Ok(in_use(file))
        }
        None => {
            fs::create_dir_all(&flags.conf_dir).with_context(|| flags.conf_dir.display().to_string())?;
            let own = flags.conf_dir.join(CONFLIST);
            write_if_other(&own, &own_conflist(flags))?;
            Ok(in_use(&own))
        }
    }
}

/// Whether the plugin's configuration is there, and the one that the runtime uses.
fn check(flags: &InstallCniFlags) -> Installed {
    let own = flags.chain.clone().unwrap_or_else(|| flags.conf_dir.join(CONFLIST));
    let names_it = read_conflist(&own)
        .is_ok_and(|list| list.get("plugins").and_then(Value::as_array).is_some_and(|all| all.iter().any(is_ours)));
    if names_it { in_use(&own) } else { Installed::NotReady(format!("{} does not name {PLUGIN} yet", own.display())) }
}

/// Whether the runtime uses this configuration of the plugin.
fn in_use(own: &Path) -> Installed {
    let Some(other) = earlier_configuration(own) else { return Installed::Done };
    let name = own.file_name().unwrap_or_default().display();
    let reason = "the container runtime uses it, and pods get no interface of meshd";
    let remedy = "delete it, or name it with --chain";
    Installed::Unused(format!("{} sorts before {name}: {reason}; {remedy}", other.display()))
}

/// Installs the plugin and restores missing parts until SIGTERM or SIGINT. The plugin stays installed.
///
/// # Errors
/// When the signals cannot be caught. What keeps it from installing is logged, and tried again.
pub async fn keep_cni_installed(flags: InstallCniFlags) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot install the handler for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot install the handler for SIGINT")?;
    // Each check is short, so that signals are handled.
    let flags = InstallCniFlags { timeout: 0, ..flags };
    let mut told = String::new();
    loop {
        let trouble = match install_cni(&flags) {
            Ok(Installed::Done) => String::new(),
            Ok(Installed::NotReady(reason)) => format!("daemon not ready: {reason}"),
            Ok(Installed::Unused(reason)) => reason,
            Err(error) => with_causes(error.as_ref()),
        };
        if !trouble.is_empty() && trouble != told {
            tracing::warn!(error = trouble, "CNI plugin not in use; retrying");
        }
        told = trouble;
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
    }
}

/// The configurations first: a runtime that finds one without its binary fails every container.
fn remove(flags: &InstallCniFlags) -> anyhow::Result<()> {
    if !flags.force {
        refuse_while_attached(flags)?;
    }
    remove_file(&flags.conf_dir.join(CONFLIST))?;
    let entries = match fs::read_dir(&flags.conf_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        entries => Some(entries.with_context(|| flags.conf_dir.display().to_string())?),
    };
    for entry in entries.into_iter().flatten() {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "conflist") {
            continue;
        }
        let Ok(mut list) = read_conflist(&path) else { continue };
        let Some(plugins) = list.get_mut("plugins").and_then(Value::as_array_mut) else { continue };
        let before = plugins.len();
        plugins.retain(|plugin| !is_ours(plugin));
        if plugins.len() < before {
            write_if_other(&path, &Value::Object(list))?;
        }
    }
    remove_file(&flags.bin_dir.join(PLUGIN))
}

/// A runtime without any configuration deletes no container: it does not even try.
fn refuse_while_attached(flags: &InstallCniFlags) -> anyhow::Result<()> {
    let own = flags.conf_dir.join(CONFLIST);
    let entries = fs::read_dir(&flags.conf_dir).into_iter().flatten().flatten();
    let configurations: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "conflist" || kind == "conf" || kind == "json"))
        .collect();
    if configurations != [own] {
        return Ok(());
    }
    let attached = attached(&flags.run_dir);
    let Some(first) = attached.first() else { return Ok(()) };
    bail!(
        "{} still attached, such as {}, and no other CNI configuration is left to delete them with: delete them first \
         (in Kubernetes drain the node and delete the DaemonSets' pods), install another network plugin's \
         configuration, or use --force",
        if attached.len() == 1 { "1 container is".to_owned() } else { format!("{} containers are", attached.len()) },
        first.container_id
    )
}

/// Attachments by this plugin whose interface is there.
fn attached(run_dir: &Path) -> Vec<Attached> {
    let Ok(folder) = Folder::open(run_dir).map_err(FileError::from).and_then(|run| run.folder(RECORDS)) else {
        return Vec::new();
    };
    let files = folder.names().unwrap_or_default();
    let records = files
        .iter()
        .filter_map(|file| serde_json::from_slice::<Attached>(&folder.read(file.to_str()?, MAX_CONFIG).ok()?).ok());
    let is_there = |one: &Attached| one.begin.interface.as_deref().is_some_and(|name| if_nametoindex(name).is_ok());
    records.filter(is_there).collect()
}

fn source(flags: &InstallCniFlags) -> anyhow::Result<PathBuf> {
    if let Some(plugin) = &flags.plugin {
        return Ok(plugin.clone());
    }
    let own = std::env::current_exe().context("cannot resolve the path of this binary")?.with_file_name(PLUGIN);
    let packaged = Path::new(PACKAGED).join(PLUGIN);
    Ok(if !own.exists() && packaged.exists() { packaged } else { own })
}

/// A container may be started at any moment: it finds the old binary or the new one, whole.
fn put_binary(source: &Path, dir: &Path, name: &str) -> anyhow::Result<()> {
    let new = fs::read(source).with_context(|| format!("the plugin {}", source.display()))?;
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let target = dir.join(name);
    let same = fs::read(&target).is_ok_and(|old| old == new)
        && fs::metadata(&target).is_ok_and(|data| data.permissions().mode() & 0o7777 == 0o755);
    if same {
        return Ok(());
    }
    atomic_file::write(&target, 0o755, &new).with_context(|| target.display().to_string())?;
    tracing::info!(plugin = %target.display(), "CNI plugin installed");
    Ok(())
}

/// Why the daemon is not ready in time; `None` once it is.
fn wait_for_daemon(run_dir: &Path, patience: Duration) -> Option<String> {
    let client = cni::daemon::DaemonClient::new(run_dir).impatient();
    let end = Instant::now() + patience;
    loop {
        let reason = client.ready().err()?.to_string();
        if Instant::now() + PAUSE > end {
            return Some(reason);
        }
        tracing::debug!(reason, "the daemon is not ready yet");
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::unix::net::UnixListener,
        thread,
    };

    use serde_json::json;

    use super::*;

    struct Machine {
        dir: tempfile::TempDir,
        flags: InstallCniFlags,
    }

    /// A machine with the plugin's binary and with portmap.
    fn machine() -> Machine {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("bin")).unwrap();
        fs::write(at("bin/portmap"), "").unwrap();
        fs::write(at("plugin"), "the plugin").unwrap();
        let flags = InstallCniFlags {
            bin_dir: at("bin"),
            conf_dir: at("conf"),
            run_dir: at("run"),
            plugin: Some(at("plugin")),
            plugins: None,
            chain: None,
            remove: false,
            force: false,
            keep: false,
            check: false,
            timeout: 0,
        };
        Machine { dir, flags }
    }

    impl Machine {
        /// A daemon that answers this once, however often it is asked.
        fn daemon(&self, answer: &'static str) {
            fs::create_dir_all(&self.flags.run_dir).unwrap();
            let socket = self.flags.run_dir.join(cni::daemon::SOCKET);
            let _ = fs::remove_file(&socket);
            let listener = UnixListener::bind(socket).unwrap();
            thread::spawn(move || {
                while let Ok((mut stream, _)) = listener.accept() {
                    let _ = stream.read(&mut [0; 1024]);
                    let _ = stream.write_all(answer.as_bytes());
                }
            });
        }

        fn ready(&self) {
            self.daemon(
                "HTTP/1.0 200 OK\r\n\r\n{\"networks\":[],\"subnets\":[\"10.0.0.0/24\"],\"overlay\":[],\"mtu\":1420}",
            );
        }

        fn list(&self, name: &str) -> Value {
            serde_json::from_str(&fs::read_to_string(self.dir.path().join(name)).unwrap()).unwrap()
        }
    }

    #[test]
    fn a_configuration_that_comes_first_is_reported() {
        let machine = machine();
        machine.ready();
        fs::create_dir(&machine.flags.conf_dir).unwrap();
        let put = |name: &str, text: &str| fs::write(machine.flags.conf_dir.join(name), text).unwrap();
        put("87-podman.conflist", "{}");
        assert_eq!(install_cni(&machine.flags).unwrap(), Installed::Done);
        put("05-other.conflist", r#"{"plugins": [{"type": "other"}]}"#);
        let Installed::Unused(reason) = install_cni(&machine.flags).unwrap() else { panic!("it is not reported") };
        assert!(reason.contains("05-other.conflist sorts before 10-meshd.conflist"), "{reason}");
        assert!(machine.flags.conf_dir.join(CONFLIST).exists(), "it counts once the other one is gone");
        let flags = InstallCniFlags { check: true, ..machine.flags.clone() };
        assert!(matches!(install_cni(&flags).unwrap(), Installed::Unused(_)));
        put("00-multus.conf", r#"{"type": "multus", "clusterNetwork": "/etc/cni/net.d/10-meshd.conflist"}"#);
        assert_eq!(install_cni(&machine.flags).unwrap(), Installed::Done);
    }

    #[test]
    fn a_chain_that_does_not_come_first_is_reported() {
        let machine = machine();
        machine.ready();
        fs::create_dir(&machine.flags.conf_dir).unwrap();
        let put = |name: &str| {
            let list = json!({"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": "other"}]});
            let file = machine.flags.conf_dir.join(name);
            fs::write(&file, list.to_string()).unwrap();
            file
        };
        let chain = put("10-flannel.conflist");
        let flags = InstallCniFlags { chain: Some(chain), ..machine.flags.clone() };
        let check = InstallCniFlags { check: true, ..flags.clone() };
        assert!(matches!(install_cni(&check).unwrap(), Installed::NotReady(_)), "it names the plugin already");
        assert_eq!(install_cni(&flags).unwrap(), Installed::Done);
        assert_eq!(install_cni(&check).unwrap(), Installed::Done);
        put("05-other.conflist");
        for flags in [&flags, &check] {
            let Installed::Unused(reason) = install_cni(flags).unwrap() else { panic!("it is not reported") };
            assert!(reason.contains("05-other.conflist sorts before 10-flannel.conflist"), "{reason}");
        }
    }

    #[test]
    fn the_configuration_comes_only_once_the_daemon_is_ready() {
        let machine = machine();
        let away = install_cni(&machine.flags).unwrap();
        assert!(matches!(away, Installed::NotReady(_)));
        machine.daemon("HTTP/1.0 503 x\r\n\r\n{\"code\":\"no_subnet\",\"message\":\"no subnet here\"}");
        assert_eq!(install_cni(&machine.flags).unwrap(), Installed::NotReady("no subnet here".to_owned()));
        assert!(!machine.flags.conf_dir.exists());
        let binary = machine.flags.bin_dir.join(PLUGIN);
        assert_eq!(fs::read_to_string(&binary).unwrap(), "the plugin");
        assert_eq!(fs::metadata(&binary).unwrap().permissions().mode() & 0o7777, 0o755);
        machine.ready();
        assert_eq!(install_cni(&machine.flags).unwrap(), Installed::Done);
        let list = machine.list("conf/10-meshd.conflist");
        assert_eq!((&list["cniVersion"], &list["name"]), (&json!("1.0.0"), &json!("meshd")));
        let kinds: Vec<&str> =
            list["plugins"].as_array().unwrap().iter().filter_map(|plugin| plugin["type"].as_str()).collect();
        assert_eq!(kinds, ["meshd-cni", "portmap"]);
        assert_eq!(list["plugins"][0]["runDir"], machine.flags.run_dir.to_string_lossy().as_ref());
        assert_eq!(fs::read_dir(&machine.flags.conf_dir).unwrap().count(), 1);
    }

    #[test]
    fn plugins_that_are_missing_are_installed_before_the_configuration_names_them() {
        let machine = machine();
        machine.ready();
        let theirs = machine.dir.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        for plugin in EXPECTED {
            fs::write(theirs.join(plugin), plugin).unwrap();
        }
        let flags = InstallCniFlags { plugins: Some(theirs.clone()), ..machine.flags.clone() };
        install_cni(&flags).unwrap();
        let installed = |name: &str| fs::read_to_string(machine.flags.bin_dir.join(name)).unwrap();
        assert_eq!(["loopback", "portmap", "bandwidth"].map(installed), ["loopback", "", "bandwidth"]);
        let list = machine.list("conf/10-meshd.conflist");
        assert_eq!(list["plugins"].as_array().unwrap().len(), 3);
        fs::remove_file(theirs.join("loopback")).unwrap();
        install_cni(&flags).unwrap();
        fs::remove_file(machine.flags.bin_dir.join("loopback")).unwrap();
        assert!(install_cni(&flags).is_err());
    }

    #[test]
    fn a_chain_gets_it_once_and_loses_it_again() {
        let machine = machine();
        machine.ready();
        let theirs = json!({"cniVersion": "0.3.1", "name": "cbr0", "x": [1], "plugins": [{"type": "flannel"}]});
        fs::create_dir(&machine.flags.conf_dir).unwrap();
        let file = machine.flags.conf_dir.join("20-flannel.conflist");
        fs::write(&file, theirs.to_string()).unwrap();
        install_cni(&machine.flags).unwrap();
        let flags = InstallCniFlags { chain: Some(file), ..machine.flags.clone() };
        for _ in 0..2 {
            install_cni(&flags).unwrap();
            let list = machine.list("conf/20-flannel.conflist");
            assert_eq!(list["plugins"].as_array().unwrap().len(), 2);
            assert_eq!(list["plugins"][1]["type"], PLUGIN);
            assert_eq!((&list["x"], &list["name"]), (&theirs["x"], &theirs["name"]));
        }
        assert!(!machine.flags.conf_dir.join(CONFLIST).exists(), "it would come first");
        let away = InstallCniFlags { remove: true, ..machine.flags.clone() };
        for _ in 0..2 {
            install_cni(&away).unwrap();
            assert_eq!(machine.list("conf/20-flannel.conflist"), theirs);
            assert!(!machine.flags.bin_dir.join(PLUGIN).exists());
        }
    }

    #[test]
    fn what_is_no_list_is_not_touched() {
        let machine = machine();
        machine.ready();
        fs::create_dir(&machine.flags.conf_dir).unwrap();
        for text in ["", "{}", "[]", r#"{"type": "bridge"}"#, r#"{"plugins": []}"#] {
            let file = machine.flags.conf_dir.join("x.conflist");
            fs::write(&file, text).unwrap();
            let chained = InstallCniFlags { chain: Some(file), ..machine.flags.clone() };
            assert!(install_cni(&chained).is_err(), "{text}");
            let file = machine.flags.conf_dir.join("x.conflist");
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
            install_cni(&InstallCniFlags { remove: true, ..machine.flags.clone() }).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
    }

    #[test]
    fn a_list_of_a_version_that_the_plugin_does_not_speak_is_not_touched() {
        let machine = machine();
        machine.ready();
        fs::create_dir(&machine.flags.conf_dir).unwrap();
        let file = machine.flags.conf_dir.join("20-old.conflist");
        let plugins = json!([{"type": "bridge"}]);
        for (list, says) in [
            (json!({"cniVersion": "0.2.0", "name": "old", "plugins": plugins}), "cniVersion 0.2.0"),
            (json!({"name": "old", "plugins": plugins}), "no cniVersion"),
            (json!({"cniVersion": "9.0.0", "name": "old", "plugins": plugins}), "cniVersion 9.0.0"),
            (json!({"cniVersion": "1.0.0", "plugins": plugins}), "the name \"\""),
            (json!({"cniVersion": "1.0.0", "name": "a b", "plugins": plugins}), "the name \"a b\""),
        ] {
            fs::write(&file, list.to_string()).unwrap();
            let chained = InstallCniFlags { chain: Some(file.clone()), ..machine.flags.clone() };
            let error = install_cni(&chained).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("set \""), "{list}: {error}");
            assert_eq!(fs::read_to_string(&file).unwrap(), list.to_string());
            assert!(!machine.flags.bin_dir.join(PLUGIN).exists(), "nothing else is done either");
        }
        let several =
            json!({"cniVersion": "0.2.0", "cniVersions": ["0.2.0", "0.4.0"], "name": "x", "plugins": plugins});
        fs::write(&file, several.to_string()).unwrap();
        install_cni(&InstallCniFlags { chain: Some(file), ..machine.flags }).unwrap();
    }

    #[test]
    fn is_not_removed_from_under_containers_that_nothing_else_deletes() {
        let machine = machine();
        machine.ready();
        install_cni(&machine.flags).unwrap();
        let record = |container: &str, interface: &str| {
            let file = machine.flags.run_dir.join(RECORDS).join(format!("{container}@eth0"));
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            let json = json!({"containerId": container, "ifname": "eth0", "network": "meshd", "netns": "/x",
                "interface": interface, "bootId": "b"});
            fs::write(file, json.to_string()).unwrap();
        };
        record("gone", "notthere");
        record("there", "lo");
        let away = InstallCniFlags { remove: true, ..machine.flags.clone() };
        let error = install_cni(&away).unwrap_err().to_string();
        assert!(error.contains("1 container") && error.contains("such as there"), "{error}");
        assert!(machine.flags.conf_dir.join(CONFLIST).exists() && machine.flags.bin_dir.join(PLUGIN).exists());
        // Another network's configuration deletes them.
        let other = machine.flags.conf_dir.join("20-other.conflist");
        fs::write(&other, json!({"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": "ptp"}]}).to_string())
            .unwrap();
        install_cni(&away).unwrap();
        assert!(!machine.flags.bin_dir.join(PLUGIN).exists());
        fs::remove_file(other).unwrap();
        install_cni(&machine.flags).unwrap();
        install_cni(&InstallCniFlags { force: true, ..away }).unwrap();
        assert!(!machine.flags.conf_dir.exists() || fs::read_dir(&machine.flags.conf_dir).unwrap().count() == 0);
    }
}
