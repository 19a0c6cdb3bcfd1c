//! The generation of the ruleset: a number that the kernel increments with every transaction of any process.

use std::{io, os::fd::AsRawFd as _};

use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};

use crate::nfnetlink::{NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN, NLM_F_REQUEST, attribute, messages};

/// The number of the ruleset's state in this network namespace; each transaction increments it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Generation(u32);

const NFT_MSG_GETGEN: u16 = 16;
const NFTA_GEN_ID: u16 = 1;
/// Holds the answer with the name of the process that made the generation.
const ANSWER: usize = 512;

impl Generation {
    /// The generation now. Counters, and elements that packets add, do not change it.
    ///
    /// # Errors
    /// When the kernel does not say; without nf_tables in it, for instance.
    pub fn now() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
        let fd = socket.as_raw_fd();
        sendto(fd, &request(), &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        // The kernel answers within the send: nothing to wait for.
        let mut answer = [0; ANSWER];
        let length = recv(fd, &mut answer, MsgFlags::empty())?;
        let datagram = answer.get(..length).unwrap_or_default();
        parse(datagram).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "the answer contains no ruleset \
                 generation",
            )
        })
    }

    /// The generation after `transactions` more.
    #[must_use]
    pub fn after(self, transactions: u32) -> Self {
        Self(self.0.wrapping_add(transactions))
    }
}

/// A netlink header and a `struct nfgenmsg` of zeros.
fn request() -> [u8; 20] {
    let mut message = [0; 20];
    let (kind, flags) = (NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN, NLM_F_REQUEST);
    message[..4].copy_from_slice(&20u32.to_ne_bytes());
    message[4..6].copy_from_slice(&kind.to_ne_bytes());
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
    message
}

fn parse(datagram: &[u8]) -> Option<Generation> {
    let (_, body) = messages(datagram).find(|(kind, _)| *kind == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN)?;
    let id = attribute(body.get(4..)?, NFTA_GEN_ID)?;
    Some(Generation(u32::from_be_bytes(id.try_into().ok()?)))
}
