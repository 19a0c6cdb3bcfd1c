//! Path kinds: the ways in which packets can travel to a peer, each with what the rest of the node must know of it.
//!
//! A new kind is a variant, a [`Backend`], its place in `choose` of [`crate::path`], its number in the API's counts of peers,
//! and with a form of its own the kernel's or the tunnel's part.

/// How packets travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PathKind {
    /// In clear text, by a route to the peer's interface address on a subnet that both share.
    HostGw,
    /// Encrypted, by the userspace WireGuard tunnel.
    Wireguard,
}

/// A path kind.
#[derive(Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its word in status, `peers`, `routes` and metrics.
    pub word: &'static str,
    /// Bytes that it adds to an inner packet, over IPv6 if that is more.
    pub overhead: u16,
    /// The kernel state that it needs.
    pub form: KernelForm,
    /// What judges its packets by the policies of the pods that they are for.
    pub judged: JudgedBy,
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
    /// A route into the TUN device, with the path MTU that the tunnel has found.
    TunRoute,
}

impl PathKind {
    /// Every kind.
    pub const ALL: [Self; 2] = [Self::HostGw, Self::Wireguard];

    /// Its description.
    #[must_use]
    pub const fn backend(self) -> &'static Backend {
        match self {
            Self::HostGw => {
                &Backend { word: "direct", overhead: 0, form: KernelForm::NeighbourRoute, judged: JudgedBy::Nftables }
            }
            // 40 bytes of IPv6 header, 8 of UDP, 16 of message header, 16 of tag.
            Self::Wireguard => {
                &Backend { word: "wireguard", overhead: 80, form: KernelForm::TunRoute, judged: JudgedBy::Tunnel }
            }
        }
    }
    /// Bytes that the costliest kind adds to an inner packet.
    #[must_use]
    pub fn largest_overhead() -> u16 {
        Self::ALL.iter().map(|kind| kind.backend().overhead).max().unwrap_or(0)
    }
}

/// The devices whose packets the tunnel has judged when the kernel gets them; `tun` is its own. Packets of all other devices
/// are for nftables to judge.
#[must_use]
pub fn judged_by_tunnel(tun: &str) -> Vec<String> {
    let judged = PathKind::ALL.iter().map(|kind| kind.backend()).filter(|backend| backend.judged == JudgedBy::Tunnel);
    let devices = judged.filter_map(|backend| match backend.form {
        KernelForm::TunRoute => Some(tun.to_owned()),
        KernelForm::NeighbourRoute => None,
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
}
