//! Configurations of container runtimes: the plugin's own, and those of others.

use std::{
    fs,
    io::{self, Read as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow, bail};
use cni::{environment::is_identifier, version::CniVersion};
use serde_json::{Map, Value, json};

use super::{CONFLIST, InstallCniFlags, MAX_CONFIG, PLUGIN, RUN_DIR};

/// A configuration that runtimes prefer to this one, unless it leads to the plugin, as those of Multus do.
pub(super) fn earlier_configuration(own: &Path) -> Option<PathBuf> {
    let (folder, name) = (own.parent()?, own.file_name()?);
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_earlier = |path: &PathBuf| {
        let is_configuration =
            path.extension().is_some_and(|kind| kind == "conflist" || kind == "conf" || kind == "json");
        is_configuration && path.file_name().is_some_and(|other| other < name)
    };
    let first = entries.map(|entry| entry.path()).filter(is_earlier).min()?;
    let text = fs::read_to_string(&first).unwrap_or_default();
    (!text.contains(PLUGIN) && !text.contains(CONFLIST)).then_some(first)
}

/// The plugin, and those that runtimes of Kubernetes expect behind it, as far as they are installed.
pub(super) fn own_conflist(flags: &InstallCniFlags) -> Value {
    let mut own = plugin(&flags.run_dir);
    own.insert("capabilities".to_owned(), json!({"ips": true, "mac": true}));
    let mut plugins = vec![Value::Object(own)];
    for (kind, capability) in [("portmap", "portMappings"), ("bandwidth", "bandwidth")] {
        if flags.bin_dir.join(kind).is_file() {
            plugins.push(json!({"type": kind, "capabilities": {capability: true}}));
        }
    }
    json!({"cniVersion": "1.0.0", "name": "meshd", "plugins": plugins})
}

/// The list with the plugin at its end. One that has it already gets it as it is to be now.
pub(super) fn chained(mut list: Map<String, Value>, run_dir: &Path) -> Value {
    if let Some(plugins) = list.get_mut("plugins").and_then(Value::as_array_mut) {
        match plugins.iter_mut().find(|plugin| is_ours(plugin)) {
            // The operator may have added to it.
            Some(Value::Object(own)) => {
                own.remove("runDir");
                own.extend(plugin(run_dir));
            }
            _ => plugins.push(Value::Object(plugin(run_dir))),
        }
    }
    Value::Object(list)
}

fn plugin(run_dir: &Path) -> Map<String, Value> {
    let mut plugin = Map::from_iter([("type".to_owned(), PLUGIN.into())]);
    if run_dir != Path::new(RUN_DIR) {
        plugin.insert("runDir".to_owned(), run_dir.to_string_lossy().into());
    }
    plugin
}

pub(super) fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").is_some_and(|kind| kind == PLUGIN)
}

pub(super) fn read_conflist(path: &Path) -> anyhow::Result<Map<String, Value>> {
    let mut text = String::new();
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let read = file.and_then(|file| file.take(MAX_CONFIG).read_to_string(&mut text));
    read.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => anyhow!(
            "{}: no such conflist: name an existing one (ls /etc/cni/net.d), or omit --chain to write a separate one",
            path.display()
        ),
        _ => anyhow::Error::from(error).context(path.display().to_string()),
    })?;
    let list: Map<String, Value> =
        serde_json::from_str(&text).with_context(|| format!("{} is not a configuration list", path.display()))?;
    match list.get("plugins").and_then(Value::as_array) {
        Some(plugins) if !plugins.is_empty() => Ok(list),
        _ => bail!("{} has no list of plugins: convert it to a conflist first", path.display()),
    }
}

/// A list that the plugin can be put at the end of. The runtime gives every plugin of a list the version that the list
/// names: with one that this plugin does not speak every container would fail.
pub(super) fn read_chain(path: &Path) -> anyhow::Result<Map<String, Value>> {
    let list = read_conflist(path)?;
    let file = path.display();
    let several = list.get("cniVersions").and_then(Value::as_array).into_iter().flatten();
    let named: Vec<&str> = list.get("cniVersion").into_iter().chain(several).filter_map(Value::as_str).collect();
    if CniVersion::highest_common(named.iter().copied()).is_none() {
        let supported = CniVersion::ALL.map(CniVersion::as_str).join(", ");
        let found =
            if named.is_empty() { "no cniVersion".to_owned() } else { format!("cniVersion {}", named.join(", ")) };
        bail!(
            "{file} has {found}, but {PLUGIN} supports {supported}: set \"cniVersion\" to \"{}\", or to the highest \
             of these that its other plugins support (CNI_COMMAND=VERSION /opt/cni/bin/PLUGIN < /dev/null)",
            CniVersion::V0_3_1
        );
    }
    let name = list.get("name").and_then(Value::as_str).unwrap_or_default();
    if !is_identifier(name) {
        bail!(
            "{file} has the name {name:?}: set \"name\" to letters, digits, '_', '.' and '-', starting with a letter \
             or digit, as the CNI specification requires"
        );
    }
    Ok(list)
}

pub(super) fn write_if_other(path: &Path, config: &Value) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(config)? + "\n";
    if fs::read_to_string(path).is_ok_and(|now| now == text) {
        return Ok(());
    }
    let mode = fs::metadata(path).map_or(0o644, |data| data.permissions().mode() & 0o777);
    atomic_file::write(path, mode, text.as_bytes()).with_context(|| path.display().to_string())?;
    tracing::info!(configuration = %path.display(), "CNI configuration written");
    Ok(())
}

pub(super) fn remove_file(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
        Ok(()) => {
            tracing::info!(file = %path.display(), "CNI file removed");
            Ok(())
        }
    }
}
