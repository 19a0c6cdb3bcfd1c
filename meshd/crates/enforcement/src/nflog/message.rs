//! nfnetlink_log messages (linux/netfilter/nfnetlink_log.h), limited to the fields in use.

use std::io;

use api_types::SampledVerdict;
use netfilter::nfnetlink::{NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, attribute, messages};
use policy::engine::Side;

const NFNL_SUBSYS_ULOG: u16 = 4;
const NFULNL_MSG_PACKET: u16 = 0;
const NFULNL_MSG_CONFIG: u16 = 1;
const NFULA_CFG_CMD: u16 = 1;
const NFULA_CFG_MODE: u16 = 2;
const NFULA_CFG_TIMEOUT: u16 = 4;
const NFULA_CFG_QTHRESH: u16 = 5;
const NFULNL_CFG_CMD_BIND: u8 = 1;
const NFULNL_COPY_PACKET: u8 = 2;
const NFULA_PAYLOAD: u16 = 9;
const NFULA_PREFIX: u16 = 10;
/// The longest packet there is: one that is cut short cannot be parsed.
const WHOLE: u32 = 0xffff;
/// Reports that the kernel collects, and for how many hundredths of a second, before it sends them.
const COLLECTED: (u32, u32) = (16, 10);

/// A packet about which nftables has decided.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NflogPacket<'a> {
    pub(super) side: Side,
    pub(super) verdict: SampledVerdict,
    /// Its source is not its sender's: policies were not asked.
    pub(super) spoofed: bool,
    /// From its IP header on.
    pub(super) packet: &'a [u8],
}

/// Asks for a group.
pub(super) fn bind(group: u16) -> Vec<u8> {
    config(group, &[(NFULA_CFG_CMD, &[NFULNL_CFG_CMD_BIND])])
}

/// Asks for whole packets, soon.
pub(super) fn settings(group: u16) -> Vec<u8> {
    let mut mode = WHOLE.to_be_bytes().to_vec();
    mode.extend([NFULNL_COPY_PACKET, 0]);
    let (count, hundredths) = COLLECTED;
    config(
        group,
        &[
            (NFULA_CFG_MODE, &mode),
            (NFULA_CFG_QTHRESH, &count.to_be_bytes()),
            (NFULA_CFG_TIMEOUT, &hundredths.to_be_bytes()),
        ],
    )
}

/// Whether the kernel has taken a message.
pub(super) fn acknowledged(datagram: &[u8]) -> io::Result<()> {
    let error = messages(datagram).find(|(kind, _)| *kind == NLMSG_ERROR).and_then(|(_, body)| body.first_chunk());
    match error.map(|error| i32::from_ne_bytes(*error)) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The reports in a datagram that are ours.
pub(super) fn reports(datagram: &[u8]) -> impl Iterator<Item = NflogPacket<'_>> {
    messages(datagram).filter_map(|(kind, body)| {
        if kind != (NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET) {
            return None;
        }
        // struct nfgenmsg is 4 bytes.
        let attributes = body.get(4..)?;
        let prefix = std::str::from_utf8(attribute(attributes, NFULA_PREFIX)?).ok()?.trim_end_matches('\0');
        let (verdict, side) = prefix.strip_prefix("meshd ")?.split_once(' ')?;
        let spoofed = verdict == "spoofed";
        let verdict = match verdict {
            "refused" | "spoofed" => SampledVerdict::Denied,
            "audited" => SampledVerdict::Audited,
            "allowed" => SampledVerdict::Allowed,
            _ => return None,
        };
        let side = match side {
            "ingress" => Side::Ingress,
            "egress" => Side::Egress,
            _ => return None,
        };
        Some(NflogPacket { side, verdict, spoofed, packet: attribute(attributes, NFULA_PAYLOAD)? })
    })
}

fn config(group: u16, attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut out = vec![0; 16];
    // struct nfgenmsg: any family, version 0, the group.
    out.extend([0, 0]);
    out.extend(group.to_be_bytes());
    for (kind, value) in attributes {
        let length = u16::try_from(value.len() + 4).unwrap_or_default();
        out.extend(length.to_ne_bytes());
        out.extend(kind.to_ne_bytes());
        out.extend(*value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    let length = u32::try_from(out.len()).unwrap_or_default();
    out[..4].copy_from_slice(&length.to_ne_bytes());
    out[4..6].copy_from_slice(&(NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG).to_ne_bytes());
    out[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(prefix: &str) -> Vec<u8> {
        let payload = [0x45, 0, 0, 20];
        let mut out = config(0, &[(NFULA_PREFIX, format!("{prefix}\0").as_bytes()), (NFULA_PAYLOAD, &payload)]);
        out[4..6].copy_from_slice(&(NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET).to_ne_bytes());
        out
    }

    #[test]
    fn only_our_own_prefixes_are_read() {
        for prefix in
            ["", "other refused ingress", "meshd", "meshd refused", "meshd refused sideways", "meshd x egress"]
        {
            assert_eq!(reports(&report(prefix)).count(), 0, "{prefix}");
        }
        let datagram = [report("meshd refused ingress"), report("meshd audited egress")].concat();
        let packet = &[0x45, 0, 0, 20][..];
        let expected = [
            NflogPacket { side: Side::Ingress, verdict: SampledVerdict::Denied, spoofed: false, packet },
            NflogPacket { side: Side::Egress, verdict: SampledVerdict::Audited, spoofed: false, packet },
        ];
        assert_eq!(reports(&datagram).collect::<Vec<_>>(), expected);
        for end in 0..datagram.len() {
            assert!(reports(&datagram[..end]).count() < 2);
        }
        let spoofed = NflogPacket { side: Side::Egress, verdict: SampledVerdict::Denied, spoofed: true, packet };
        assert_eq!(reports(&report("meshd spoofed egress")).collect::<Vec<_>>(), [spoofed]);
    }
}
