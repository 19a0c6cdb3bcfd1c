//! The network configuration from the runtime, on standard input.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    environment::{Environment, check_interface, is_identifier},
    error::{CniError, Code},
    version::CniVersion,
};

/// Longest configuration that is read, in bytes. A `prevResult` and a list of attachments for GC are part of it.
pub const MAX_BYTES: usize = 4 << 20;
/// Where the daemon is when the configuration does not say.
const RUN_DIR: &str = "/run/meshd";
/// Most entries of `allowedSources`.
const MAX_ALLOWED_SOURCES: usize = 64;
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
    /// `runtimeConfig.mac`, else `args.cni.mac`, as it was given: only an ADD needs it to be valid.
    mac: Option<String>,
    /// `allowedSources`: prefixes that containers of this network may send from besides their addresses. From the
    /// configuration alone: a container could choose its own arguments.
    pub allowed_sources: Vec<IpNet>,
    /// `ipam` verbatim; empty if missing.
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
struct ConfigFields {
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
    #[serde(rename = "allowedSources", default)]
    allowed_sources: Vec<String>,
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
    labels: Option<LabelsArgument>,
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
enum LabelsArgument {
    Pairs(Vec<LabelPair>),
    Object(BTreeMap<String, String>),
}

#[derive(Deserialize)]
struct LabelPair {
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
        let fields: ConfigFields = serde_json::from_value(Value::Object(raw.clone())).map_err(malformed)?;
        if !is_identifier(&fields.name) {
            let message = format!(
                "name {:?} must be letters, digits, '_', '.' and '-', starting with a letter or digit",
                fields.name
            );
            return Err(CniError::new(Code::InvalidConfig, message));
        }
        let args = fields.args.and_then(|args| args.cni);
        let (labels, args_mac) = args.map_or((None, None), |args| (args.labels, args.mac));
        let labels = match labels {
            None => BTreeMap::new(),
            Some(LabelsArgument::Object(labels)) => labels,
            Some(LabelsArgument::Pairs(pairs)) => pairs.into_iter().map(|pair| (pair.key, pair.value)).collect(),
        };
        let mac = fields.runtime.and_then(|runtime| runtime.mac).or(args_mac).filter(|mac| !mac.is_empty());
        Ok(Self {
            version,
            name: fields.name,
            run_dir: fields.run_dir.unwrap_or_else(|| RUN_DIR.into()),
            mode: mode(fields.mode.as_deref(), fields.bridge)?,
            pod: fields.pod,
            labels,
            mac,
            allowed_sources: allowed_sources(&fields.allowed_sources)?,
            ipam: fields.ipam,
            prev_result: fields.prev_result.filter(|result| !result.is_null()),
            valid_attachments: fields.valid_attachments,
            raw,
        })
    }

    /// Whether other plugins have made the interface, for an ADD.
    #[must_use]
    pub(crate) const fn is_chained(&self) -> bool {
        self.prev_result.is_some()
    }

    /// The hardware address that the runtime asks for: by the capability `mac`, else `args.cni.mac`, else `MAC` in
    /// `CNI_ARGS`.
    ///
    /// # Errors
    /// [`Code::InvalidConfig`] or [`Code::InvalidEnvironment`] when no interface can have it.
    pub(crate) fn hardware_address(&self, environment: &Environment) -> Result<Option<[u8; 6]>, CniError> {
        let expected = "must be the six bytes of one interface, such as 02:00:00:00:00:01";
        let refuse = |code, what, text: &str| {
            let shown: String = text.chars().take(32).collect();
            CniError::new(code, format!("{what} is {shown:?}: {expected}"))
        };
        if let Some(text) = &self.mac {
            return parse_mac(text).map(Some).ok_or_else(|| refuse(Code::InvalidConfig, "mac", text));
        }
        let Some(text) = environment.arg("MAC") else { return Ok(None) };
        parse_mac(text).map(Some).ok_or_else(|| refuse(Code::InvalidEnvironment, "MAC in CNI_ARGS", text))
    }
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

/// Whether they are free to be used, only the daemon knows.
fn allowed_sources(texts: &[String]) -> Result<Vec<IpNet>, CniError> {
    if texts.len() > MAX_ALLOWED_SOURCES {
        let message = format!("allowedSources has {} entries, at most {MAX_ALLOWED_SOURCES} are allowed", texts.len());
        return Err(CniError::new(Code::InvalidConfig, message));
    }
    let read = |(at, text): (usize, &String)| {
        let bad = |expected: &str| {
            let shown: String = text.chars().take(64).collect();
            CniError::new(Code::InvalidConfig, format!("allowedSources[{at}] {shown:?} must {expected}"))
        };
        let prefix: IpNet = text.parse().map_err(|_| bad("be a prefix such as 192.168.7.0/24 or fd07::/64"))?;
        if prefix != prefix.trunc() {
            return Err(bad(&format!("have no bits beyond its prefix length: write {}", prefix.trunc())));
        }
        Ok(prefix)
    };
    texts.iter().enumerate().map(read).collect()
}

/// A hardware address that an interface can have: not that of a group, and not zero.
pub(crate) fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part =
            parts.next().filter(|part| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

/// The addresses that the runtime asks for by `runtimeConfig.ips` or `args.cni.ips`, which IPAM plugins read
/// themselves.
///
/// # Errors
/// [`Code::InvalidConfig`] when one of them is no address.
pub(crate) fn wanted_addresses(raw: &Map<String, Value>) -> Result<Vec<IpAddr>, CniError> {
    let at = |path: &[&str]| {
        let mut value = raw.get(*path.first()?)?;
        for key in &path[1..] {
            value = value.get(key)?;
        }
        value.as_array()
    };
    let lists = [at(&["runtimeConfig", "ips"]), at(&["args", "cni", "ips"])];
    let wanted = lists.into_iter().flatten().flatten().map(|value| {
        value.as_str().and_then(parse_address).ok_or_else(|| {
            CniError::new(Code::InvalidConfig, format!("ips has {value}: must be an address such as \"10.244.3.7\""))
        })
    });
    wanted.collect()
}

/// An address, with or without the length of a prefix behind it.
#[must_use]
pub(crate) fn parse_address(text: &str) -> Option<IpAddr> {
    text.split('/').next()?.trim().parse().ok()
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
            assert_eq!(config.run_dir, PathBuf::from("/run/meshd"));
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
        assert_eq!(modes, [Mode::Routed, Mode::Bridge("shop0".to_owned()), Mode::Routed, Mode::Routed]);
    }

    #[test]
    fn all_fields_are_read() {
        let config = parse(&json!({
            "cniVersion": "1.1.0", "name": "mesh", "type": "meshd-cni", "runDir": "/r", "mode": "bridge",
            "pod": {"namespace": "db", "labels": {"a": "b"}},
            "args": {"cni": {"labels": [{"key": "app", "value": "web"}], "mac": "02:00:00:00:00:01"}},
            "runtimeConfig": {"mac": "02:00:00:00:00:02"}, "prevResult": {"ips": []},
            "allowedSources": ["192.168.7.0/24", "fd07::/64"],
            "cni.dev/valid-attachments": [{"containerID": "c", "ifname": "eth0"}],
        }))
        .unwrap();
        assert_eq!(config.mode, Mode::Bridge("meshbr0".to_owned()));
        assert_eq!(config.hardware_address(&Environment::default()).unwrap(), Some([2, 0, 0, 0, 0, 2]));
        assert_eq!(config.labels, BTreeMap::from([("app".to_owned(), "web".to_owned())]));
        assert_eq!(config.pod.clone().unwrap().namespace.as_deref(), Some("db"));
        assert!(config.is_chained());
        assert_eq!(config.allowed_sources, ["192.168.7.0/24", "fd07::/64"].map(|net| net.parse::<IpNet>().unwrap()));
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
        for prefix in ["192.168.7.1/24", "192.168.7.0", "all", ""] {
            assert_eq!(with("allowedSources", json!([prefix])), Code::InvalidConfig, "{prefix}");
        }
        assert_eq!(with("allowedSources", json!("192.168.7.0/24")), Code::Decode);
        assert_eq!(with("allowedSources", json!(vec!["192.168.7.0/24"; 65])), Code::InvalidConfig);
        assert_eq!(Config::parse(b"[]").unwrap_err().code, Code::Decode);
        assert_eq!(Config::parse(&vec![b' '; MAX_BYTES + 1]).unwrap_err().code, Code::Decode);
    }

    #[test]
    fn the_hardware_address_is_the_capabilitys_then_the_arguments() {
        let of = |more: Value, args: &str| {
            let mut config = json!({"cniVersion": "1.0.0", "name": "mesh", "type": "meshd-cni"});
            config["runtimeConfig"] = more;
            let environment = Environment { args: args.to_owned(), ..Environment::default() };
            // DEL of a container with a malformed one goes through.
            parse(&config).unwrap().hardware_address(&environment).map_err(|error| error.code)
        };
        assert_eq!(of(json!({}), ""), Ok(None));
        assert_eq!(of(json!({}), "IgnoreUnknown=1;MAC=02-00-00-00-00-0A"), Ok(Some([2, 0, 0, 0, 0, 10])));
        assert_eq!(of(json!({"mac": "02:00:00:00:00:02"}), "MAC=02:00:00:00:00:01"), Ok(Some([2, 0, 0, 0, 0, 2])));
        for mac in [
            "1",
            "01:00:00:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "02:00:00:00:00:01:02",
            "02:00:00:00:00:zz",
            "02:00:00:00:00:+1",
        ] {
            assert_eq!(of(json!({"mac": mac}), ""), Err(Code::InvalidConfig), "{mac}");
            assert_eq!(of(json!({}), &format!("MAC={mac}")), Err(Code::InvalidEnvironment), "{mac}");
        }
    }

    #[test]
    fn a_container_cannot_allow_itself_sources() {
        let config = parse(&json!({
            "cniVersion": "1.0.0", "name": "mesh", "type": "meshd-cni",
            "args": {"cni": {"allowedSources": ["192.168.7.0/24"]}},
            "runtimeConfig": {"allowedSources": ["192.168.7.0/24"]},
        }));
        assert_eq!(config.unwrap().allowed_sources, []);
    }
}
