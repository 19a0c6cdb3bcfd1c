//! `Backend`: how packets reach other nodes, with each type's options.

use std::{fmt, num::NonZeroU16};

use serde_json::{Map, Value};

use crate::{
    fields::{Fields, Writer},
    spelling::nearest,
    violation::{Report, join},
};

/// How packets reach other nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendConfig {
    /// `Type`
    pub kind: BackendKind,
    /// `DirectRouting` (default true with wireguard): plain routes to nodes on the own subnet.
    pub direct_routing: bool,
    /// `MTU` of pods and of the TUN device; `None`: min(interface, 1500) less what the backend adds to a packet.
    pub mtu: Option<NonZeroU16>,
    /// `PersistentKeepalive` in seconds; `None`: 0, none is sent.
    pub persistent_keepalive: Option<NonZeroU16>,
    /// The options of vxlan; the defaults with another type.
    pub vxlan: VxlanOptions,
}

/// The options of `"Type": "vxlan"`, as Flannel has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanOptions {
    /// `VNI` (default 1): VXLAN network identifier (RFC 7348), 24 bits.
    pub vni: u32,
    /// `Port` (default 8472, which is Linux'): UDP port of all nodes.
    pub port: u16,
    /// `GBP` (default false): Linux' group policy extension.
    pub gbp: bool,
    /// `Learning` (default false): the kernel learns where hardware addresses are from what arrives.
    pub learning: bool,
}

/// `Backend.Type`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackendKind {
    /// WireGuard between sites (the default).
    Wireguard,
    /// Plain routes only.
    HostGw,
    /// Kernel VXLAN.
    Vxlan,
    /// Plain UDP.
    Udp,
}

/// The options that are read.
pub(crate) const KNOWN_BACKEND: &[&str] =
    &["Type", "DirectRouting", "MTU", "PersistentKeepalive", FLANNEL_KEEPALIVE, "VNI", "Port", "GBP", "Learning"];

/// Flannel's name for `PersistentKeepalive`; read, not written.
const FLANNEL_KEEPALIVE: &str = "PersistentKeepaliveInterval";

/// Flannel's options without meaning here, and why: they are kept, and `meshctl check` names them.
pub(crate) const WITHOUT_MEANING: &[(&str, &str)] = &[
    ("PSK", "each pair of nodes has keys of its own"),
    ("ListenPort", "each node has its own --listen-port"),
    ("ListenPortV6", "each node has its own --listen-port"),
    ("Mode", "each node uses the endpoint that answers, of either family"),
    ("MacPrefix", "it is for Windows nodes"),
    ("Name", "it is for Windows nodes"),
];

/// Largest VXLAN network identifier: it has 24 bits (RFC 7348, 5).
const MAX_VNI: u32 = (1 << 24) - 1;

impl Default for BackendConfig {
    /// The default if `Backend` is absent: wireguard with direct routing.
    fn default() -> Self {
        Self {
            kind: BackendKind::Wireguard,
            direct_routing: true,
            mtu: None,
            persistent_keepalive: None,
            vxlan: VxlanOptions::default(),
        }
    }
}

impl Default for VxlanOptions {
    fn default() -> Self {
        Self { vni: 1, port: Self::DEFAULT_PORT, gbp: false, learning: false }
    }
}

impl VxlanOptions {
    /// Linux' default port, which predates the assigned one (4789).
    const DEFAULT_PORT: u16 = 8472;
}

impl BackendConfig {
    /// Smallest `MTU`: IPv6 needs links of 1280 (RFC 8200); IPv4 alone only 576, which every host must reassemble.
    #[must_use]
    pub const fn least_mtu(ipv6: bool) -> u16 {
        if ipv6 { 1280 } else { 576 }
    }

    pub(super) fn to_object(&self, extra: &Map<String, Value>) -> Map<String, Value> {
        let mut out = Writer::default();
        out.put("Type", self.kind.as_str())
            .put("DirectRouting", self.direct_routing)
            .put("MTU", self.mtu.map_or(0, NonZeroU16::get))
            .put("PersistentKeepalive", self.persistent_keepalive.map_or(0, NonZeroU16::get));
        if self.kind == BackendKind::Vxlan {
            out.put("VNI", self.vxlan.vni)
                .put("Port", self.vxlan.port)
                .put("GBP", self.vxlan.gbp)
                .put("Learning", self.vxlan.learning);
        }
        out.finish(extra)
    }

    /// The type with what is not its default, for a summary.
    pub(super) fn summary(&self) -> String {
        let direct = if self.direct_routing { ", direct routing within a site" } else { "" };
        match self.kind {
            BackendKind::Vxlan => format!("vxlan (VNI {}, UDP port {}){direct}", self.vxlan.vni, self.vxlan.port),
            BackendKind::HostGw => "host-gw".to_owned(),
            kind => format!("{kind}{direct}"),
        }
    }
}

impl BackendKind {
    const ALL: [Self; 4] = [Self::Wireguard, Self::HostGw, Self::Vxlan, Self::Udp];

    /// The name as in `Backend.Type` and in flannel's `BackendType`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Wireguard => "wireguard",
            Self::HostGw => "host-gw",
            Self::Vxlan => "vxlan",
            Self::Udp => "udp",
        }
    }

    /// The type of this name.
    #[must_use]
    pub fn named(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Reads `Backend`; what is kept of it without being read comes second.
pub(super) fn read_backend(
    fields: &mut Fields,
    report: &mut Report,
    ipv6: bool,
) -> (BackendConfig, Map<String, Value>) {
    let Some(mut fields) = fields.object(report, "Backend") else {
        return (BackendConfig::default(), Map::new());
    };
    let kind = fields
        .parsed(report, "Type", |text| {
            BackendKind::named(text).ok_or_else(|| "must be wireguard, host-gw, vxlan or udp".into())
        })
        .unwrap_or(BackendKind::Wireguard);
    let direct_routing = fields.boolean(report, "DirectRouting").unwrap_or(kind == BackendKind::Wireguard);
    let mtu = read_mtu(&mut fields, report, ipv6);
    let persistent_keepalive = read_keepalive(&mut fields, report);
    let vxlan = read_vxlan(&mut fields, report, kind);
    let backend = BackendConfig { kind, direct_routing, mtu, persistent_keepalive, vxlan };
    let path = fields.path("");
    let rest = fields.rest(report, KNOWN_BACKEND);
    let is_flannels = |name: &str| WITHOUT_MEANING.iter().any(|(known, _)| *known == name);
    for name in rest.keys().filter(|name| !is_flannels(name)) {
        if !KNOWN_BACKEND.iter().any(|known| known.eq_ignore_ascii_case(name)) {
            let meant = nearest(KNOWN_BACKEND, name).map(|meant| format!("did you mean {meant}? "));
            let rule = format!("{}the options are {}", meant.unwrap_or_default(), KNOWN_BACKEND.join(", "));
            report.add(join(&path, name), "an unknown option", rule);
        }
    }
    (backend, rest)
}

fn read_keepalive(fields: &mut Fields, report: &mut Report) -> Option<NonZeroU16> {
    let range = 0..=u16::MAX;
    let own = fields.integer(report, "PersistentKeepalive", range.clone(), " seconds; 0 sends none");
    let flannel = fields.integer(report, FLANNEL_KEEPALIVE, range, " seconds; 0 sends none");
    if let (Some(own), Some(flannel)) = (own, flannel)
        && own != flannel
    {
        report.add(
            fields.path(FLANNEL_KEEPALIVE),
            flannel.to_string(),
            format!("PersistentKeepalive is {own}: keep one of the two"),
        );
    }
    own.or(flannel).and_then(NonZeroU16::new)
}

/// The options are checked with every type; they count with vxlan only.
fn read_vxlan(fields: &mut Fields, report: &mut Report, kind: BackendKind) -> VxlanOptions {
    let default = VxlanOptions::default();
    let vni = fields.integer(report, "VNI", 1..=MAX_VNI, "");
    let port = fields.integer(report, "Port", 0..=u16::MAX, ": 0 is the default").filter(|port| *port != 0);
    let gbp = fields.boolean(report, "GBP");
    let learning = fields.boolean(report, "Learning");
    if kind != BackendKind::Vxlan {
        return default;
    }
    VxlanOptions {
        vni: vni.unwrap_or(default.vni),
        port: port.unwrap_or(default.port),
        gbp: gbp.unwrap_or(default.gbp),
        learning: learning.unwrap_or(default.learning),
    }
}

fn read_mtu(fields: &mut Fields, report: &mut Report, ipv6: bool) -> Option<NonZeroU16> {
    let least = BackendConfig::least_mtu(ipv6);
    let mtu = fields.integer(report, "MTU", 0..=u16::MAX, &format!(": 0 (measured), or {least} and more"))?;
    if (1..least).contains(&mtu) {
        let why = if ipv6 { " (IPv6 needs it)" } else { "" };
        report.add(fields.path("MTU"), mtu.to_string(), format!("must be 0 (measured) or {least} to 65535{why}"));
    }
    NonZeroU16::new(mtu)
}
