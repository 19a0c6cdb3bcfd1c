//! The protocol state of a flow, and its idle timeout.

use std::time::Duration;

use packet::{Packet, Transport, protocol, tcp_flags};

use super::icmp::IcmpKind;

/// State of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum FlowState {
    /// Packets of one direction were seen.
    Asked,
    /// Both directions were seen; of TCP also something behind the SYN-ACK.
    Answered,
    /// TCP: taken up in its middle, the other direction not seen yet.
    TakenUp,
    /// TCP: one end has sent FIN, or both have. SCTP: shutting down.
    Closing,
    /// Reset or aborted.
    Closed,
    /// The first answer was seen, and nothing behind it: a TCP handshake that is not done.
    HalfOpen,
}

/// The effect of a packet on a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// May begin a flow, in its own direction only.
    Open,
    /// May only be part of a flow: proves that it is not the first packet.
    Within,
    /// TCP without SYN, FIN or RST: part of a flow, perhaps of one that began before this table.
    Middle,
    /// Ends one end's sending.
    Finish,
    /// Ends the flow.
    Abort,
    /// Begins a flow or goes on with it: protocols that do not tell.
    Any,
}

/// The effect of `packet`; `None` for a packet that no host sends.
pub(super) fn step(packet: &Packet, bytes: &[u8]) -> Option<Step> {
    match packet.transport {
        Transport::Tcp { flags, .. } => tcp(flags),
        Transport::Sctp { .. } => {
            let chunk = bytes.get(usize::from(packet.payload_offset) + 12).copied();
            Some(sctp(chunk))
        }
        Transport::Icmp { kind, .. } => match IcmpKind::of(packet.source.is_ipv4(), kind)? {
            IcmpKind::Request => Some(Step::Open),
            IcmpKind::Reply => Some(Step::Within),
            IcmpKind::Error => None,
        },
        Transport::Udp { .. } | Transport::Unknown => Some(Step::Any),
    }
}

fn tcp(flags: u8) -> Option<Step> {
    use tcp_flags::{ACK, FIN, RST, SYN};
    // PSH, URG and the ECN bits say nothing about the connection's state.
    match flags & (SYN | ACK | FIN | RST) {
        SYN => Some(Step::Open),
        f if f == SYN | ACK => Some(Step::Within),
        ACK => Some(Step::Middle),
        f if f == FIN | ACK => Some(Step::Finish),
        RST => Some(Step::Abort),
        f if f == RST | ACK => Some(Step::Abort),
        _ => None,
    }
}

fn sctp(chunk: Option<u8>) -> Step {
    match chunk {
        // INIT
        Some(1) => Step::Open,
        // SHUTDOWN, SHUTDOWN ACK
        Some(7 | 8) => Step::Finish,
        // ABORT, SHUTDOWN COMPLETE
        Some(6 | 14) => Step::Abort,
        _ => Step::Within,
    }
}

impl FlowState {
    /// The state after one more packet.
    pub(super) const fn after(self, step: Step, reply: bool) -> Self {
        match (self, step) {
            (_, Step::Abort) => Self::Closed,
            (_, Step::Finish) => Self::Closing,
            (Self::Asked, Step::Within) if reply => Self::HalfOpen,
            (Self::Asked | Self::TakenUp, _) if reply => Self::Answered,
            (Self::HalfOpen, Step::Middle) => Self::Answered,
            (state, _) => state,
        }
    }

    /// How long a flow in this state may be silent.
    pub(super) const fn timeout(self, number: u8) -> Duration {
        const DAY: u64 = 24 * 60 * 60;
        Duration::from_secs(match (number, self) {
            (protocol::TCP, Self::Asked | Self::HalfOpen | Self::Closing) => 120,
            (protocol::TCP, Self::Answered) => 5 * DAY,
            (protocol::TCP, Self::TakenUp) => 300,
            (protocol::TCP, Self::Closed) => 10,
            (protocol::UDP, Self::Answered) => 120,
            (protocol::UDP, _) => 30,
            (protocol::ICMP | protocol::ICMPV6, _) => 30,
            (protocol::SCTP, Self::Closed) => 10,
            (protocol::SCTP, _) => 210,
            _ => 600,
        })
    }

    /// How long a refused flow is remembered after its last packet: longer than an end waits between two tries.
    pub(super) const fn tombstone(self, number: u8) -> Duration {
        const TRIES: Duration = Duration::from_secs(300);
        let own = self.timeout(number);
        // Refused flows need not be remembered for days.
        if number == protocol::TCP || own.as_secs() < TRIES.as_secs() { TRIES } else { own }
    }

    pub(super) const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::Asked,
            1 => Self::Answered,
            2 => Self::TakenUp,
            3 => Self::Closing,
            5 => Self::HalfOpen,
            _ => Self::Closed,
        }
    }
}
