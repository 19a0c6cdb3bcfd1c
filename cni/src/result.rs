//! Results of ADD, in the form of each version of the specification.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::version::CniVersion;

/// The result of ADD, or of an IPAM plugin. Unknown fields are dropped; a result that is only passed on stays JSON.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AddResult {
    /// Interfaces, the host's end first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// Addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<Ip>,
    /// Routes inside the container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<ResultRoute>,
    /// Name servers and so on, as the IPAM plugin gave them.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub dns: Map<String, Value>,
}

/// An interface of a result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Its MTU; from 1.1.0 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The network namespace that it is in; empty on the host.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
}

/// An address of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ip {
    /// `4` or `6`; before 1.0.0 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The address with the length of its prefix.
    pub address: IpNet,
    /// Next hop of the default route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Index into [`AddResult::interfaces`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
}

/// A route of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultRoute {
    /// Destination.
    pub dst: IpNet,
    /// Next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
}

impl AddResult {
    /// The JSON for a configuration of this version.
    #[must_use]
    pub fn to_json(&self, version: CniVersion) -> Value {
        let mut shaped = self.clone();
        for ip in &mut shaped.ips {
            let family = if ip.address.addr().is_ipv4() { "4" } else { "6" };
            ip.version = (version < CniVersion::V1_0_0).then(|| family.to_owned());
        }
        if version < CniVersion::V1_1_0 {
            for interface in &mut shaped.interfaces {
                interface.mtu = None;
            }
        }
        let mut json = Map::new();
        json.insert("cniVersion".to_owned(), version.as_str().into());
        // These types have no maps with other keys than strings and no numbers that JSON lacks.
        if let Ok(Value::Object(fields)) = serde_json::to_value(&shaped) {
            json.extend(fields);
        }
        // Readers of 0.3.1 expect it to be there.
        json.entry("dns").or_insert_with(|| Value::Object(Map::new()));
        Value::Object(json)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn example() -> AddResult {
        let interface = |name: &str, sandbox: &str| Interface {
            name: name.to_owned(),
            mac: "02:00:00:00:00:01".to_owned(),
            mtu: Some(1420),
            sandbox: sandbox.to_owned(),
        };
        AddResult {
            interfaces: vec![interface("veth1", ""), interface("eth0", "/run/netns/x")],
            ips: vec![Ip {
                version: None,
                address: "10.244.3.2/32".parse().unwrap(),
                gateway: Some("169.254.1.1".parse().unwrap()),
                interface: Some(1),
            }],
            routes: vec![ResultRoute { dst: "0.0.0.0/0".parse().unwrap(), gw: None }],
            dns: Map::new(),
        }
    }

    #[test]
    fn each_version_gets_its_own_shape() {
        for version in CniVersion::ALL {
            let json = example().to_json(version);
            assert_eq!(json["cniVersion"], version.as_str());
            assert_eq!(json["ips"][0].get("version"), (version < CniVersion::V1_0_0).then_some(&json!("4")));
            assert_eq!(json["interfaces"][1].get("mtu"), (version == CniVersion::V1_1_0).then_some(&json!(1420)));
            assert_eq!(json["interfaces"][0].get("sandbox"), None);
            assert_eq!(json["ips"][0]["address"], "10.244.3.2/32");
            assert_eq!(json["dns"], json!({}));
            let back: AddResult = serde_json::from_value(json).unwrap();
            assert_eq!(back.ips[0].address, example().ips[0].address);
        }
    }

    #[test]
    fn an_ipam_answer_is_read() {
        let debian = r#"{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.244.3.2/24","gateway":"10.244.3.1"}],"dns":{}}"#;
        let read: AddResult = serde_json::from_str(debian).unwrap();
        assert_eq!(read.ips[0].address, "10.244.3.2/24".parse::<IpNet>().unwrap());
        assert!(read.interfaces.is_empty() && read.routes.is_empty());
    }
}
