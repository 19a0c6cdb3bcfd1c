//! Requests and responses between plugin and node daemon.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use netlink::Mac;
use serde::{Deserialize, Serialize};

use crate::environment::AttachmentName;

/// The beginning of an ADD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Begin {
    /// Name of the network in the plugin's configuration.
    pub network: String,
    /// Path of the container's network namespace.
    pub netns: String,
    /// Device and inode number of that namespace: a path may later lead to another one.
    #[serde(default)]
    pub netns_inode: Option<(u64, u64)>,
    /// Name of the interface's end on the host; `None` when another plugin has made it.
    #[serde(default)]
    pub interface: Option<String>,
}

/// The beginning of an ADD, with the addresses that it needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeginAdd {
    /// The attachment to record.
    #[serde(flatten)]
    pub begin: Begin,
    /// The addresses to allocate; `None` if they come from elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<AddressRequest>,
}

/// The answer to [`BeginAdd`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// This node's place in the mesh.
    #[serde(flatten)]
    pub network: Network,
    /// The allocated addresses, each with the prefix length of its subnet; `None` if none were requested, or by a
    /// daemon that allocates none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Vec<IpNet>>,
}

/// Which addresses an attachment needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressRequest {
    /// One address is allocated from each set; without any set, one from each of the node's subnets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<Vec<AddressRange>>,
    /// Addresses that must be among them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<IpAddr>,
}

/// A range of addresses, with the fields of host-local's `ranges`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddressRange {
    /// The subnet that the range lies in.
    pub subnet: IpNet,
    /// The first address; by default the first one of the subnet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range_start: Option<IpAddr>,
    /// The last address; by default the last one of the subnet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range_end: Option<IpAddr>,
    /// An address that is never allocated; by default the first one of the subnet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
}

/// The node's place in the mesh: networks, subnets, MTU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// The networks of the whole mesh, of all clusters.
    pub networks: Vec<IpNet>,
    /// This node's subnets, at most one of each family.
    pub subnets: Vec<IpNet>,
    /// This node's overlay addresses, which lie in its subnets and are not for containers.
    pub overlay: Vec<IpAddr>,
    /// The largest packet that goes everywhere in the mesh.
    pub mtu: u16,
}

/// The end of an ADD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attach {
    /// The pod of the interface.
    pub pod: PodReference,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Name of the interface's end on the host.
    pub interface: String,
    /// The hardware address of the interface inside; `None`: a plugin of an earlier version made it.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_mac")]
    pub mac: Option<Mac>,
    /// Additional source prefixes from the network's configuration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_sources: Vec<IpNet>,
}

/// A hardware address as people write it.
mod optional_mac {
    use netlink::Mac;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer, de::Error as _};

    use crate::{config::parse_mac, link::mac_text};

    pub(super) fn serialize<S: Serializer>(mac: &Option<Mac>, serializer: S) -> Result<S::Ok, S::Error> {
        mac.as_ref().map(mac_text).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Mac>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| parse_mac(&text).ok_or_else(|| D::Error::custom("not a hardware address"))).transpose()
    }
}

/// The pod behind an attachment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodReference {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid, when the runtime gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// Labels from the plugin's configuration.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// An attachment as the daemon knows it, and as it keeps it in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attached {
    /// The container.
    pub container_id: String,
    /// The interface inside.
    pub ifname: String,
    /// How its ADD began.
    #[serde(flatten)]
    pub begin: Begin,
    /// The addresses that the daemon has allocated to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allocated: Vec<IpAddr>,
    /// How it ended; `None` while it is under way, or when it broke off.
    #[serde(default)]
    pub attach: Option<Attach>,
    /// The boot of the machine that it was made in.
    pub boot_id: String,
}

impl Attached {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> AttachmentName {
        AttachmentName { container_id: self.container_id.clone(), ifname: self.ifname.clone() }
    }

    /// The addresses that no other attachment may have: those allocated to it, and those that it was announced with.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let announced = self.attach.iter().flat_map(|attach| &attach.addresses);
        self.allocated.iter().chain(announced.filter(|address| !self.allocated.contains(address))).copied()
    }
}

/// Why the daemon refused a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The kind.
    pub code: RefusalReason,
    /// For people.
    pub message: String,
}

/// Kinds of [`Refusal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalReason {
    /// The request does not hold.
    Invalid,
    /// The client lacks permission.
    Denied,
    /// There is no such attachment.
    NotFound,
    /// The address belongs to another attachment.
    Conflict,
    /// The node has no subnet, or does not know it.
    NoSubnet,
    /// No address is left, or the requested one belongs to another attachment.
    NoAddress,
    /// Policy is not in force in time.
    NotInForce,
    /// The daemon could not do it.
    Failed,
    /// A kind of another version.
    #[serde(other)]
    Other,
}
