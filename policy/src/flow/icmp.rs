//! ICMP types by their role in a flow table.

/// The role of an ICMP message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IcmpKind {
    /// Asks for an answer: may begin a flow.
    Request,
    /// Answers: never begins one.
    Reply,
    /// Quotes a packet that could not be delivered.
    Error,
}

impl IcmpKind {
    /// `None`: not a message that crosses routers between pods (redirects, neighbour discovery and the like).
    pub(super) const fn of(v4: bool, kind: u8) -> Option<Self> {
        Some(match (v4, kind) {
            // Echo, timestamp, information, address mask.
            (true, 8 | 13 | 15 | 17) | (false, 128 | 139) => Self::Request,
            (true, 0 | 14 | 16 | 18) | (false, 129 | 140) => Self::Reply,
            // Unreachable, (packet too big,) time exceeded, parameter problem.
            (true, 3 | 11 | 12) | (false, 1..=4) => Self::Error,
            _ => return None,
        })
    }

    pub(super) const fn is_query(self) -> bool {
        matches!(self, Self::Request | Self::Reply)
    }
}

/// The type of the request that a reply of type `kind` answers.
pub(super) const fn request_of(v4: bool, kind: u8) -> u8 {
    match (v4, kind) {
        (true, 0) => 8,
        // Timestamp, information, address mask: the answer is one more.
        (true, _) => kind.saturating_sub(1),
        (false, 129) => 128,
        (false, _) => 139,
    }
}
