//! The network configuration that the runtime gives on standard input.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    environment::{check_interface, is_identifier},
    error::{CniError, Code},
    ipam,
    version::CniVersion,
};

/// Longest configuration that is read, in bytes. A `prevResult` and a list of attachments for GC are part of it.
pub const MAX_BYTES: usize = 4 << 20;
/// Where the daemon is when the configuration does not say.
const RUN_DIR: &str = "/run/meshd";
/// The bridge of `"mode": "bridge"` when the configuration does not say.
const BRIDGE: &str = "meshbr0";

/// A configuration that holds.
#[derive(Debug, Clone)]
pub struct Config {
    /// `cniVersion`
    pub version: CniVersion,
    /// `name`, of the network.
    pub name: String,
    /// `runDir`, the daemon's.
    pub run_dir: PathBuf,
    /// `mode`
    pub mode: Mode,
    /// `pod`, who the containers are where the runtime does not say.
    pub pod: Option<PodConfig>,
    /// `args.cni.labels`
    pub labels: BTreeMap<String, String>,
    /// The hardware address that is asked for: `runtimeConfig.mac`, else `args.cni.mac`.
    pub mac: Option<[u8; 6]>,
    /// `ipam` as it stands, empty when it is missing.
    pub ipam: Map<String, Value>,
    /// `prevResult`: this plugin is chained behind others.
    pub prev_result: Option<Value>,
    /// `cni.dev/valid-attachments` for GC.
    pub valid_attachments: Option<Vec<ValidAttachment>>,
    /// All of it, for plugins that this one calls.
    pub raw: Map<String, Value>,
}

/// How containers are joined to the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// A veth pair each, and a route to each address. The default.
    Routed,
    /// A bridge of this name.
    Bridge(String),
}

/// `pod` of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct PodConfig {
    /// Namespace of the pods of this network.
    #[serde(default)]
    pub namespace: Option<String>,
    /// Name, for a network with a single container.
    #[serde(default)]
    pub name: Option<String>,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// An element of `cni.dev/valid-attachments`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct ValidAttachment {
    /// The container's id.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// Name of the interface inside.
    pub ifname: String,
}

#[derive(Deserialize)]
struct Fields {
    #[serde(default)]
    name: String,
    #[serde(rename = "runDir", default)]
    run_dir: Option<PathBuf>,
    #[serde(default)]
    mode: Option<String>,
    #[serde(default)]
    bridge: Option<String>,
    #[serde(default)]
    pod: Option<PodConfig>,
    #[serde(default)]
    args: Option<Args>,
    #[serde(rename = "runtimeConfig", default)]
    runtime: Option<RuntimeConfig>,
    #[serde(default)]
    ipam: Map<String, Value>,
    #[serde(rename = "prevResult", default)]
    prev_result: Option<Value>,
    #[serde(rename = "cni.dev/valid-attachments", default)]
    valid_attachments: Option<Vec<ValidAttachment>>,
}

#[derive(Deserialize)]
struct Args {
    #[serde(default)]
    cni: Option<CniArgs>,
}

#[derive(Deserialize)]
struct CniArgs {
    #[serde(default)]
    labels: Option<Labels>,
    #[serde(default)]
    mac: Option<String>,
}

#[derive(Deserialize)]
struct RuntimeConfig {
    #[serde(default)]
    mac: Option<String>,
}

/// The specification's conventions have a list of pairs; some runtimes write an object.
#[derive(Deserialize)]
#[serde(untagged)]
enum Labels {
    Pairs(Vec<Pair>),
    Object(BTreeMap<String, String>),
}

#[derive(Deserialize)]
struct Pair {
    key: String,
    value: String,
}

impl Config {
    /// Reads a configuration.
    ///
    /// # Errors
    /// [`Code::Decode`] when it is not JSON of the right shape, [`Code::IncompatibleVersion`],
    /// [`Code::UnsupportedField`], [`Code::InvalidConfig`].
    pub fn parse(stdin: &[u8]) -> Result<Self, CniError> {
        let malformed = |error: serde_json::Error| {
            CniError::new(Code::Decode, "the network configuration cannot be read").details(error.to_string())
        };
        if stdin.len() > MAX_BYTES {
            return Err(CniError::new(
                Code::Decode,
                format!("the network configuration is longer than {MAX_BYTES} bytes"),
            ));
        }
        let raw: Map<String, Value> = serde_json::from_slice(stdin).map_err(malformed)?;
        let version = version(&raw)?;
        let fields: Fields = serde_json::from_value(Value::Object(raw.clone())).map_err(malformed)?;
        if !is_identifier(&fields.name) {
            let message =
                format!("name {:?} must be letters, digits, '_', '.' and '-', a letter or digit first", fields.name);
            return Err(CniError::new(Code::InvalidConfig, message));
        }
        let args = fields.args.and_then(|args| args.cni);
        let (labels, args_mac) = args.map_or((None, None), |args| (args.labels, args.mac));
        let labels = match labels {
            None => BTreeMap::new(),
            Some(Labels::Object(labels)) => labels,
            Some(Labels::Pairs(pairs)) => pairs.into_iter().map(|pair| (pair.key, pair.value)).collect(),
        };
        let mac = fields.runtime.and_then(|runtime| runtime.mac).or(args_mac).filter(|mac| !mac.is_empty());
        Ok(Self {
            version,
            name: fields.name,
            run_dir: fields.run_dir.unwrap_or_else(|| RUN_DIR.into()),
            mode: mode(fields.mode.as_deref(), fields.bridge)?,
            pod: fields.pod,
            labels,
            mac: mac.map(|mac| parse_mac(&mac)).transpose()?,
            ipam: fields.ipam,
            prev_result: fields.prev_result.filter(|result| !result.is_null()),
            valid_attachments: fields.valid_attachments,
            raw,
        })
    }

    /// Whether other plugins have made the interface, for an ADD.
    #[must_use]
    pub const fn is_chained(&self) -> bool {
        self.prev_result.is_some()
    }

    /// Whether addresses come from host-local's folder below the run directory.
    #[must_use]
    pub fn uses_own_addresses(&self) -> bool {
        ipam::kind(self) == ipam::HOST_LOCAL && !self.ipam.contains_key("dataDir")
    }

    /// The folder of addresses that host-local has given out, unless the configuration names another one. It lies in
    /// the run directory, whose content a boot ends: so do the addresses of an earlier boot.
    #[must_use]
    pub fn address_dir(&self) -> PathBuf {
        address_dir(&self.run_dir)
    }
}

/// [`Config::address_dir`] of this run directory.
#[must_use]
pub fn address_dir(run_dir: &Path) -> PathBuf {
    run_dir.join("ipam")
}

/// The version that the configuration names, for the shape of an error about the rest of it.
///
/// # Errors
/// [`Code::IncompatibleVersion`].
pub fn version(raw: &Map<String, Value>) -> Result<CniVersion, CniError> {
    let named = raw.get("cniVersion").and_then(Value::as_str).unwrap_or("0.1.0");
    named.parse().map_err(|error| {
        let supported = CniVersion::ALL.map(CniVersion::as_str).join(", ");
        CniError::new(Code::IncompatibleVersion, format!("{error}")).details(format!("supported: {supported}"))
    })
}

fn mode(mode: Option<&str>, bridge: Option<String>) -> Result<Mode, CniError> {
    match mode {
        None | Some("routed") => Ok(Mode::Routed),
        Some("bridge") => {
            let name = bridge.unwrap_or_else(|| BRIDGE.to_owned());
            check_interface(&name)
                .map_err(|reason| CniError::new(Code::InvalidConfig, format!("bridge {name:?}: {reason}")))?;
            Ok(Mode::Bridge(name))
        }
        Some(other) => {
            Err(CniError::new(Code::UnsupportedField, format!("mode {other:?} must be \"routed\" or \"bridge\"")))
        }
    }
}

/// Reads a hardware address of six bytes.
///
/// # Errors
/// [`Code::InvalidConfig`].
pub fn parse_mac(text: &str) -> Result<[u8; 6], CniError> {
    let bad = || {
        let shown: String = text.chars().take(32).collect();
        CniError::new(Code::InvalidConfig, format!("mac {shown:?} must be six bytes such as 02:00:00:00:00:01"))
    };
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(bad)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
    }
    // The first bit marks groups: no interface has such an address.
    if parts.next().is_some() || mac[0] & 1 == 1 || mac == [0; 6] {
        return Err(bad());
    }
    Ok(mac)
}

/// The addresses that the runtime asks for by `runtimeConfig.ips` or `args.cni.ips`, which IPAM plugins read themselves.
#[must_use]
pub fn wanted_addresses(raw: &Map<String, Value>) -> Vec<IpAddr> {
    let at = |path: &[&str]| {
        let mut value = raw.get(*path.first()?)?;
        for key in &path[1..] {
            value = value.get(key)?;
        }
        value.as_array()
    };
    let lists = [at(&["runtimeConfig", "ips"]), at(&["args", "cni", "ips"])];
    let texts = lists.into_iter().flatten().flatten().filter_map(Value::as_str);
    texts.filter_map(|text| text.split('/').next()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(json: &Value) -> Result<Config, CniError> {
        Config::parse(json.to_string().as_bytes())
    }

    #[test]
    fn type_and_name_are_enough() {
        for version in CniVersion::ALL {
            let config = parse(&json!({"cniVersion": version.as_str(), "name": "mesh", "type": "meshd-cni"})).unwrap();
            assert_eq!((config.version, config.mode.clone()), (version, Mode::Routed));
            assert_eq!(config.run_dir, Path::new("/run/meshd"));
            assert!(!config.is_chained() && config.ipam.is_empty());
        }
    }

    #[test]
    fn what_the_documentation_shows_is_read() {
        let page = include_str!("../../docs/cni.md");
        let blocks = page.split("```json\n").skip(1).filter_map(|rest| rest.split("```").next());
        let mut modes = Vec::new();
        for block in blocks {
            let list: Value = serde_json::from_str(block).unwrap();
            for plugin in list["plugins"].as_array().unwrap().iter().filter(|plugin| plugin["type"] == "meshd-cni") {
                let mut config = plugin.clone();
                (config["cniVersion"], config["name"]) = (list["cniVersion"].clone(), list["name"].clone());
                modes.push(parse(&config).unwrap().mode);
            }
        }
        assert_eq!(modes, [Mode::Routed, Mode::Bridge("shop0".to_owned()), Mode::Routed]);
    }

    #[test]
    fn all_fields_are_read() {
        let config = parse(&json!({
            "cniVersion": "1.1.0", "name": "mesh", "type": "meshd-cni", "runDir": "/r", "mode": "bridge",
            "pod": {"namespace": "db", "labels": {"a": "b"}},
            "args": {"cni": {"labels": [{"key": "app", "value": "web"}], "mac": "02:00:00:00:00:01"}},
            "runtimeConfig": {"mac": "02:00:00:00:00:02"}, "prevResult": {"ips": []},
            "cni.dev/valid-attachments": [{"containerID": "c", "ifname": "eth0"}],
        }))
        .unwrap();
        assert_eq!(config.mode, Mode::Bridge("meshbr0".to_owned()));
        assert_eq!(config.mac, Some([2, 0, 0, 0, 0, 2]));
        assert_eq!(config.labels, BTreeMap::from([("app".to_owned(), "web".to_owned())]));
        assert_eq!(config.pod.clone().unwrap().namespace.as_deref(), Some("db"));
        assert!(config.is_chained());
        assert_eq!(config.valid_attachments.unwrap()[0].ifname, "eth0");
    }

    #[test]
    fn what_does_not_hold_is_refused_with_its_code() {
        let with = |key: &str, value: Value| {
            let mut config = json!({"cniVersion": "1.0.0", "name": "mesh", "type": "meshd-cni"});
            config[key] = value;
            parse(&config).unwrap_err().code
        };
        assert_eq!(with("cniVersion", json!("0.2.0")), Code::IncompatibleVersion);
        assert_eq!(with("cniVersion", json!("1.2.0")), Code::IncompatibleVersion);
        assert_eq!(with("mode", json!("vlan")), Code::UnsupportedField);
        assert_eq!(with("runDir", json!(7)), Code::Decode);
        for name in ["", "../x", "a b", "-a"] {
            assert_eq!(with("name", json!(name)), Code::InvalidConfig, "{name}");
        }
        for mac in ["1", "01:00:00:00:00:01", "00:00:00:00:00:00", "02:00:00:00:00:01:02", "02:00:00:00:00:zz"] {
            assert_eq!(with("runtimeConfig", json!({"mac": mac})), Code::InvalidConfig, "{mac}");
        }
        assert_eq!(Config::parse(b"[]").unwrap_err().code, Code::Decode);
        assert_eq!(Config::parse(&vec![b' '; MAX_BYTES + 1]).unwrap_err().code, Code::Decode);
    }
}
