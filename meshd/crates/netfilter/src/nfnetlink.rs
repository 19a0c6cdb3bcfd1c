//! Messages of nfnetlink, and of netlink in general: headers and attributes, without copies.

/// The type of a message that answers a request, well or not.
pub const NLMSG_ERROR: u16 = 2;
/// The flag of a request.
pub const NLM_F_REQUEST: u16 = 1;
/// The flag of a request that wants an answer.
pub const NLM_F_ACK: u16 = 4;

/// The subsystem of nf_tables; the upper byte of a message's type.
pub const NFNL_SUBSYS_NFTABLES: u16 = 10;
/// The multicast group of nf_tables' changes.
pub const NFNLGRP_NFTABLES: u32 = 7;
/// Ends a transaction: the new generation.
pub const NFT_MSG_NEWGEN: u16 = 15;
/// The attribute that names the table in every message about one.
pub const NFTA_TABLE: u16 = 1;

/// Bytes of a netlink header.
const HEADER: usize = 16;

/// The messages of a datagram: type and payload.
pub fn messages(datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    messages_from(datagram).map(|(kind, _, body)| (kind, body))
}

/// As [`messages`], with the port of the socket whose request caused each.
pub fn messages_from(mut datagram: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::try_from(u32::from_ne_bytes(datagram.get(..4)?.try_into().ok()?)).ok()?;
        let kind = u16::from_ne_bytes(datagram.get(4..6)?.try_into().ok()?);
        let port = u32::from_ne_bytes(datagram.get(12..16)?.try_into().ok()?);
        let body = datagram.get(HEADER..len)?;
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, port, body))
    })
}

/// The value of the first attribute of type `wanted`, flags aside.
#[must_use]
pub fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?) & 0x3fff;
        let value = attributes.get(4..len)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
}
