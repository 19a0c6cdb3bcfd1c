//! Later fragments follow the verdict of their first one.

use std::{collections::HashMap, collections::VecDeque, net::IpAddr};

use super::{SECOND, tuple::Tuple};

/// Ticks for which later fragments may follow.
const LIFETIME: u32 = 30 * SECOND;

/// The key of a packet's fragments. For IPv6, only addresses and identification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Id {
    source: IpAddr,
    destination: IpAddr,
    protocol: Option<u8>,
    identification: u32,
}

/// First fragments that passed, in a bounded number; the oldest goes first.
#[derive(Debug)]
pub(super) struct Fragments {
    room: usize,
    by_id: HashMap<Id, (First, u64)>,
    order: VecDeque<(Id, u64)>,
    counter: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct First {
    /// The flow that it was a packet of, as that packet went. For an ICMP error: that of the packet it quotes.
    pub(super) tuple: Tuple,
    expires: u32,
}

impl Fragments {
    pub(super) fn new(room: usize) -> Self {
        Self { room: room.max(1), by_id: HashMap::new(), order: VecDeque::new(), counter: 0 }
    }

    pub(super) fn passed(
        &mut self,
        (source, destination, protocol): (IpAddr, IpAddr, Option<u8>),
        identification: u32,
        tuple: Tuple,
        now: u32,
    ) {
        let id = id(source, destination, protocol, identification);
        while self.by_id.len() >= self.room || self.order.len() >= 2 * self.room {
            let Some((oldest, stamp)) = self.order.pop_front() else { break };
            // One that came again since has a later place in the order.
            if self.by_id.get(&oldest).is_some_and(|(_, own)| *own == stamp) {
                self.by_id.remove(&oldest);
            }
        }
        self.counter += 1;
        self.by_id.insert(id, (First { tuple, expires: now + LIFETIME }, self.counter));
        self.order.push_back((id, self.counter));
    }

    /// The first fragment was refused, after another one with the same identification had passed.
    pub(super) fn refused(
        &mut self,
        (source, destination, protocol): (IpAddr, IpAddr, Option<u8>),
        identification: u32,
    ) {
        self.by_id.remove(&id(source, destination, protocol, identification));
    }

    pub(super) fn first(
        &self,
        (source, destination, protocol): (IpAddr, IpAddr, Option<u8>),
        identification: u32,
        now: u32,
    ) -> Option<First> {
        let (first, _) = self.by_id.get(&id(source, destination, protocol, identification))?;
        (first.expires > now).then_some(*first)
    }
}

fn id(source: IpAddr, destination: IpAddr, protocol: Option<u8>, identification: u32) -> Id {
    Id { source, destination, protocol: protocol.filter(|_| source.is_ipv4()), identification }
}
