//! Path kinds: the ways in which packets can travel to a peer, each with what the rest of the node must know of it.
//!
//! A new kind is a variant, a [`Backend`], its place in `choose` of [`crate::path`], its number in the API's counts of peers,
//! and with a form of its own the kernel's or the tunnel's part.

use etcd_schema::{BackendConfig, BackendKind};

/// How packets travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PathKind {
    /// In clear text, by a route to the peer's interface address on a subnet that both share.
    HostGw,
    /// In clear text, in UDP between any two nodes, by the kernel's VXLAN device.
    Vxlan,
    /// Encrypted, by the userspace WireGuard tunnel.
    Wireguard,
}

/// A path kind.
#[derive(Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its word in status, `peers`, `routes` and metrics.
    pub word: &'static str,
    /// What it adds to an inner packet.
    pub overhead: Overhead,
    /// The kernel state that it needs.
    pub form: KernelForm,
    /// What judges its packets by the policies of the pods that they are for.
    pub judged: JudgedBy,
}

/// Bytes that a path kind adds to an inner packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overhead {
    /// In a mesh that has IPv4 networks only.
    pub ipv4: u16,
    /// In a mesh with an IPv6 network.
    pub ipv6: u16,
}

/// What judges packets that come by a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JudgedBy {
    /// The tunnel, in user space, before the kernel sees them.
    Tunnel,
    /// The policies' rules in nftables, as the kernel forwards them.
    Nftables,
}

/// The kernel state that a path needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelForm {
    /// A route to a next hop on the underlay. Every packet that takes it is as large as the mesh's MTU allows.
    NeighbourRoute,
    /// A route into a VXLAN device, which has the peer's end as neighbour and forwarding entry.
    VtepRoute,
    /// A route into the TUN device, with the path MTU that the tunnel has found.
    TunRoute,
}

impl PathKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::HostGw, Self::Vxlan, Self::Wireguard];

    /// Its description.
    #[must_use]
    pub const fn backend(self) -> &'static Backend {
        match self {
            Self::HostGw => &Backend {
                word: "direct",
                overhead: Overhead { ipv4: 0, ipv6: 0 },
                form: KernelForm::NeighbourRoute,
                judged: JudgedBy::Nftables,
            },
            // 14 bytes of inner Ethernet header, 8 of VXLAN, 8 of UDP, 20 of IPv4 or 40 of IPv6 header: an inner packet's
            // family is that of its outer one.
            Self::Vxlan => &Backend {
                word: "vxlan",
                overhead: Overhead { ipv4: 50, ipv6: 70 },
                form: KernelForm::VtepRoute,
                judged: JudgedBy::Nftables,
            },
            // 40 bytes of IPv6 header, 8 of UDP, 16 of message header, 16 of tag: outer packets are of either family.
            Self::Wireguard => &Backend {
                word: "wireguard",
                overhead: Overhead { ipv4: 80, ipv6: 80 },
                form: KernelForm::TunRoute,
                judged: JudgedBy::Tunnel,
            },
        }
    }

    /// Bytes that it adds to an inner packet in a mesh with or without an IPv6 network.
    #[must_use]
    pub const fn overhead(self, ipv6: bool) -> u16 {
        let Overhead { ipv4, ipv6: with_ipv6 } = self.backend().overhead;
        if ipv6 { with_ipv6 } else { ipv4 }
    }

    /// The kinds by which nodes reach each other under this configuration, best first.
    pub fn permitted(config: &BackendConfig) -> impl Iterator<Item = Self> + use<> {
        let carrier = Self::carrier(config.kind);
        let direct = config.direct_routing || carrier.is_none();
        direct.then_some(Self::HostGw).into_iter().chain(carrier)
    }

    /// The kind that carries packets between nodes that share no subnet, if any does.
    #[must_use]
    pub const fn carrier(kind: BackendKind) -> Option<Self> {
        match kind {
            BackendKind::Vxlan => Some(Self::Vxlan),
            BackendKind::HostGw => None,
            _ => Some(Self::Wireguard),
        }
    }

    /// Bytes that the costliest kind adds to an inner packet between nodes under this configuration.
    #[must_use]
    pub fn largest_overhead(config: &BackendConfig, ipv6: bool) -> u16 {
        Self::permitted(config).map(|kind| kind.overhead(ipv6)).max().unwrap_or(0)
    }
}

/// Whether this version carries packets for such a network.
#[must_use]
pub const fn is_supported(kind: BackendKind) -> bool {
    matches!(kind, BackendKind::Wireguard | BackendKind::Vxlan | BackendKind::HostGw)
}

/// The devices whose packets the tunnel has judged when the kernel gets them; `tun` is its own. Packets of all other devices
/// are for nftables to judge.
#[must_use]
pub fn judged_by_tunnel(tun: &str) -> Vec<String> {
    let judged = PathKind::ALL.iter().map(|kind| kind.backend()).filter(|backend| backend.judged == JudgedBy::Tunnel);
    let devices = judged.filter_map(|backend| match backend.form {
        KernelForm::TunRoute => Some(tun.to_owned()),
        KernelForm::NeighbourRoute | KernelForm::VtepRoute => None,
    });
    devices.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_forwards_is_judged_by_its_rules() {
        for kind in PathKind::ALL {
            let backend = kind.backend();
            let in_user_space = backend.form == KernelForm::TunRoute;
            assert_eq!(backend.judged == JudgedBy::Tunnel, in_user_space, "{kind:?}");
        }
        assert_eq!(judged_by_tunnel("meshd0"), ["meshd0"]);
    }

    #[test]
    fn the_configuration_says_which_kinds_there_are() {
        let kinds = |kind, direct_routing| {
            let config = BackendConfig { kind, direct_routing, ..BackendConfig::default() };
            let kinds: Vec<_> = PathKind::permitted(&config).map(|kind| kind.backend().word).collect();
            (kinds.join(" "), PathKind::largest_overhead(&config, false), PathKind::largest_overhead(&config, true))
        };
        let said = |words: &str, ipv4, ipv6| (words.to_owned(), ipv4, ipv6);
        assert_eq!(kinds(BackendKind::Wireguard, true), said("direct wireguard", 80, 80));
        assert_eq!(kinds(BackendKind::Vxlan, true), said("direct vxlan", 50, 70));
        assert_eq!(kinds(BackendKind::Vxlan, false), said("vxlan", 50, 70));
        assert_eq!(kinds(BackendKind::HostGw, false), said("direct", 0, 0));
    }
}
