//! Ports of a rule.

use std::{fmt, sync::Arc};

use etcd_schema::reading::{Report, describe, quoted};
use packet::protocol;

use super::reader::At;

/// Protocols whose ports Kubernetes names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// `TCP`
    Tcp,
    /// `UDP`
    Udp,
    /// `SCTP`
    Sctp,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// IANA's number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => protocol::TCP,
            Self::Udp => protocol::UDP,
            Self::Sctp => protocol::SCTP,
        }
    }

    /// The protocol with IANA's `number`, if it has ports that policies name.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            protocol::TCP => Some(Self::Tcp),
            protocol::UDP => Some(Self::Udp),
            protocol::SCTP => Some(Self::Sctp),
            _ => None,
        }
    }

    /// The protocol that Kubernetes calls `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|protocol| protocol.as_str() == name)
    }

    /// The name as Kubernetes writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An entry of a rule's list of ports.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortMatch {
    /// The protocol; `None` only with a named port that brings its own.
    pub protocol: Option<Protocol>,
    /// Its ports.
    pub ports: Ports,
}

/// Destination ports of one protocol.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ports {
    /// Each.
    All,
    /// From the first to the last, both included.
    Range(u16, u16),
    /// Ports with this name in the destination pod's containers.
    Named(Arc<str>),
}

impl fmt::Display for PortMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            Some(protocol) => write!(f, "{protocol}/")?,
            None => f.write_str("*/")?,
        }
        match &self.ports {
            Ports::All => f.write_str("*"),
            Ports::Range(first, last) if first == last => write!(f, "{first}"),
            Ports::Range(first, last) => write!(f, "{first}-{last}"),
            Ports::Named(name) => f.write_str(name),
        }
    }
}

/// A port number, 1 to 65535.
pub(super) fn number(at: &At<'_>, report: &mut Report) -> Option<u16> {
    let found = at.value.as_u64().and_then(|number| u16::try_from(number).ok()).filter(|number| *number != 0);
    if found.is_none() {
        report.add(&at.path, describe(at.value), "must be a whole number from 1 to 65535");
    }
    found
}

/// A port's name (RFC 6335, section 5.1, in lower case).
pub(super) fn name(path: &str, text: &str, report: &mut Report) -> Option<Arc<str>> {
    if is_port_name(text) {
        return Some(text.into());
    }
    report.add(
        path,
        quoted(text),
        "a port name is 1 to 15 of a-z, 0-9 and single \"-\" between them, with at least one letter",
    );
    None
}

fn is_port_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    let word = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=15).contains(&bytes.len())
        && bytes.iter().all(|b| word(b) || *b == b'-')
        && bytes.first().is_some_and(word)
        && bytes.last().is_some_and(word)
        && bytes.iter().any(u8::is_ascii_lowercase)
        && !text.contains("--")
}
