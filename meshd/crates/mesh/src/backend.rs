//! Path kinds: the ways in which packets can travel to a peer, each with what the rest of the node must know of it.
//!
//! A new kind is a variant, a [`Backend`], its place in [`crate::path::choose`], its number in the API's counts of peers, and
//! with a form of its own the kernel's or the tunnel's part.

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
            Self::HostGw => &Backend { word: "direct", overhead: 0, form: KernelForm::NeighbourRoute },
            // 40 bytes of IPv6 header, 8 of UDP, 16 of message header, 16 of tag.
            Self::Wireguard => &Backend { word: "wireguard", overhead: 80, form: KernelForm::TunRoute },
        }
    }
}
