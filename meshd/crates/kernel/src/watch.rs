//! Kernel events that trigger a pass, so that it restores deleted state.
//!
//! Only the kind of each message is read, and no content beyond a few bytes, so an unknown message cannot end the
//! watch. The kernel's socket buffer is the bound: if it overruns, or the socket fails, the reader gets an event to
//! check all state.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use netfilter::{
    is_of_rules,
    nfnetlink::{
        NFNL_SUBSYS_NFTABLES, NFNLGRP_NFTABLES, NFT_MSG_NEWGEN, NFTA_TABLE, attribute, messages, messages_from,
    },
};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket, sockopt,
    },
};
use tokio::io::unix::AsyncFd;
use tracing::warn;

use super::{Kernel, netlink::OwnPorts, sys::readable};

/// Kinds of changes since the last read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KernelEvents {
    /// A link came, went or changed.
    pub links: bool,
    /// An address came or went.
    pub addresses: bool,
    /// A route of ours, a default route or a connected route.
    pub routes: bool,
    /// A routing rule.
    pub rules: bool,
    /// A neighbour or forwarding entry of a VXLAN device of ours.
    pub vteps: bool,
    /// A neighbour entry. Frequent: no reason for a pass.
    pub neighbours: bool,
    /// A setting of an interface: forwarding, the reverse path filter.
    pub settings: bool,
    /// Our nftables table.
    pub ruleset: bool,
    /// The table that holds policies. Changes with them: no reason for a pass.
    pub policy_ruleset: bool,
    /// Another nftables table: its chains or rules, not elements of its sets. May be frequent where another program
    /// rewrites its own.
    pub foreign_ruleset: bool,
    /// So many nftables events arrived, of any table, that other listeners should read theirs before their buffers
    /// overrun. No reason for a pass.
    pub ruleset_volume: bool,
    /// Messages were lost, or the watch was interrupted: anything may have changed.
    pub resync: bool,
}

impl KernelEvents {
    /// Nothing has changed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Nothing has changed but other programs' nftables rules and settings, which need not be looked at each time.
    pub fn can_wait(&self) -> bool {
        let rest = Self { foreign_ruleset: false, settings: false, ..*self };
        self.calls_for_reconcile() && !rest.calls_for_reconcile()
    }

    /// Something that [`Kernel::reconcile`] looks at has changed.
    pub fn calls_for_reconcile(&self) -> bool {
        !Self { neighbours: false, policy_ruleset: false, ruleset_volume: false, ..*self }.is_empty()
    }
}

/// A watch on the network namespace it was opened in. See [`Kernel::watch`].
#[derive(Debug)]
pub struct KernelWatch {
    protocol: u8,
    own: OwnPorts,
    vxlan: Arc<Mutex<BTreeSet<u32>>>,
    table: String,
    sockets: Option<Sockets>,
    buffer: Vec<u8>,
    volume: VolumeCounter,
}

/// Bytes of nftables messages since the last volume event.
#[derive(Debug, Default)]
struct VolumeCounter(usize);

/// The threshold of a volume event: a small part of the buffer of [`NftMonitor`](netfilter::NftMonitor).
const VOLUME: usize = 4 << 20;
/// The kernel's overhead per queued datagram in bytes.
const DATAGRAM: usize = 1 << 10;

impl VolumeCounter {
    fn add(&mut self, datagrams: usize, bytes: usize) {
        self.0 += datagrams * DATAGRAM + bytes;
    }

    /// Whether an event is due; resets the counter.
    fn take(&mut self) -> bool {
        let much = self.0 >= VOLUME;
        if much {
            self.0 = 0;
        }
        much
    }
}

#[derive(Debug)]
struct Sockets {
    route: AsyncFd<OwnedFd>,
    netfilter: AsyncFd<OwnedFd>,
}

/// Holds the longest batch of messages that the kernel sends at once.
const BUFFER: usize = 64 * 1024;
/// The receive buffer in bytes.
const SOCKET_BUFFER: usize = 1024 * 1024;
/// Delay between attempts to reopen the sockets.
const REOPEN_AFTER: Duration = Duration::from_millis(500);
/// Datagrams read before the events so far are handed out: a flood is news, not a reason to wait for its end.
const DATAGRAMS_PER_LOOK: usize = 512;
/// Datagrams read to empty an overrun socket: several times its buffer.
const DATAGRAMS_PER_FLOOD: usize = 64 * 1024;

/// LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE, IPV4_NETCONF, IPV6_NETCONF.
const RTNLGRP: [u32; 10] = [1, 3, 5, 7, 8, 9, 11, 19, 24, 25];
/// A setting of an interface was changed, by whatever way.
const RTM_NEWNETCONF: u16 = 80;

impl Kernel {
    /// Begins to watch links, addresses, routes, rules, neighbours and nftables. Routes that this one changes itself
    /// are no news.
    ///
    /// # Errors
    /// When the sockets cannot be opened.
    pub fn watch(&self) -> io::Result<KernelWatch> {
        Ok(KernelWatch {
            protocol: self.options.route_protocol,
            own: self.ports.clone(),
            vxlan: Arc::clone(&self.vxlan),
            table: self.options.table_name.clone(),
            sockets: Some(Sockets::open()?),
            buffer: vec![0; BUFFER],
            volume: VolumeCounter::default(),
        })
    }
}

impl KernelWatch {
    /// Waits for changes, and returns all that have come so far as one. Never empty, never ends. The future may be
    /// dropped: nothing that was read is lost.
    pub async fn next(&mut self) -> KernelEvents {
        let mut events = KernelEvents::default();
        loop {
            let Some(sockets) = &self.sockets else {
                tokio::time::sleep(REOPEN_AFTER).await;
                match Sockets::open() {
                    Ok(sockets) => {
                        self.sockets = Some(sockets);
                        return KernelEvents { resync: true, ..events };
                    }
                    Err(error) => warn!(%error, "cannot watch the kernel; retrying"),
                }
                continue;
            };
            let (ready, is_route) = tokio::select! {
                ready = sockets.route.readable() => (ready, true),
                ready = sockets.netfilter.readable() => (ready, false),
            };
            let read = match ready {
                Ok(mut guard) => {
                    let fd = guard.get_inner().as_raw_fd();
                    let read = drain(fd, &mut self.buffer, |datagram| {
                        if is_route {
                            let vxlan = self.vxlan.lock().unwrap_or_else(PoisonError::into_inner);
                            route_events(datagram, self.protocol, &self.own, &vxlan, &mut events);
                        } else {
                            netfilter_events(datagram, &self.table, &mut events);
                            self.volume.add(1, datagram.len());
                        }
                    });
                    if matches!(read, Ok(Drained::Empty | Drained::Lost)) {
                        guard.clear_ready();
                    }
                    read
                }
                Err(e) => Err(e),
            };
            match read {
                Ok(Drained::Lost) => events.resync = true,
                Ok(_) => {}
                Err(error) => {
                    warn!(%error, "kernel watch ended; reopening it");
                    self.sockets = None;
                    continue;
                }
            }
            events.ruleset_volume |= self.volume.take();
            if !events.is_empty() {
                return events;
            }
        }
    }
}

impl Sockets {
    fn open() -> io::Result<Self> {
        let route_groups = RTNLGRP.iter().fold(0, |mask, group| mask | 1 << (group - 1));
        Ok(Self {
            route: listen(SockProtocol::NetlinkRoute, route_groups)?,
            netfilter: listen(SockProtocol::NetlinkNetFilter, 1 << (NFNLGRP_NFTABLES - 1))?,
        })
    }
}

fn listen(protocol: SockProtocol, groups: u32) -> io::Result<AsyncFd<OwnedFd>> {
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, protocol)?;
    // A host may allow less: then overruns come earlier, and are answered.
    if setsockopt(&fd, sockopt::RcvBufForce, &SOCKET_BUFFER).is_err() {
        setsockopt(&fd, sockopt::RcvBuf, &SOCKET_BUFFER)?;
    }
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    readable(fd)
}

enum Drained {
    /// All was read.
    Empty,
    /// There may be more.
    More,
    /// All was read, and the kernel had dropped messages before.
    Lost,
}

/// Reads all messages. After an overrun, the kernel silently drops messages until the socket is empty: so it is emptied
/// before the overrun is reported, and a later change is reported again.
fn drain(fd: i32, buffer: &mut [u8], mut each: impl FnMut(&[u8])) -> io::Result<Drained> {
    let mut lost = false;
    for read in 0..DATAGRAMS_PER_FLOOD {
        if read >= DATAGRAMS_PER_LOOK && !lost {
            return Ok(Drained::More);
        }
        match recv(fd, buffer, MsgFlags::MSG_TRUNC) {
            Ok(len) if len > buffer.len() => lost = true,
            Ok(len) => each(&buffer[..len]),
            Err(Errno::EAGAIN) if lost => return Ok(Drained::Lost),
            Err(Errno::EAGAIN) => return Ok(Drained::Empty),
            Err(Errno::EINTR) => {}
            Err(Errno::ENOBUFS) => lost = true,
            Err(e) => return Err(e.into()),
        }
    }
    // The flood outruns the reader: a new socket begins with nothing.
    Err(Errno::ENOBUFS.into())
}

fn route_events(datagram: &[u8], protocol: u8, own: &OwnPorts, vxlan: &BTreeSet<u32>, events: &mut KernelEvents) {
    for (kind, port, body) in messages_from(datagram) {
        match kind {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => events.links = true,
            libc::RTM_NEWADDR | libc::RTM_DELADDR => events.addresses = true,
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
                // struct rtmsg: family, dst_len, src_len, tos, table, protocol, …
                let (dst_len, of) = (body.get(1), body.get(5));
                if of == Some(&protocol) && own.contains(port) {
                    continue;
                }
                events.routes |= dst_len == Some(&0) || of == Some(&protocol) || of == Some(&libc::RTPROT_KERNEL);
            }
            libc::RTM_NEWRULE | libc::RTM_DELRULE => events.rules = true,
            libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => {
                // struct ndmsg: family, 3 bytes of padding, index, …; a device that learns makes entries all the time.
                let index = body.get(4..8).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()).map(u32::from_ne_bytes);
                let learned = kind == libc::RTM_NEWNEIGH && body.first() == Some(&(libc::AF_BRIDGE as u8));
                let of_vxlan = index.is_some_and(|index| vxlan.contains(&index));
                events.vteps |= of_vxlan && !learned && !own.contains(port);
                events.neighbours = true;
            }
            RTM_NEWNETCONF => events.settings = true,
            _ => {}
        }
    }
}

fn netfilter_events(datagram: &[u8], table: &str, events: &mut KernelEvents) {
    for (kind, body) in messages(datagram) {
        if kind >> 8 != NFNL_SUBSYS_NFTABLES || kind & 0xff == NFT_MSG_NEWGEN {
            continue;
        }
        // struct nfgenmsg is 4 bytes; every kind of message names its table in attribute 1.
        match attribute(body.get(4..).unwrap_or_default(), NFTA_TABLE) {
            Some(name) if name.strip_suffix(&[0]).unwrap_or(name) == table.as_bytes() => {
                events.ruleset = true;
            }
            Some(name) if name.strip_suffix(&[0]).unwrap_or(name) == super::policy_table(table).as_bytes() => {
                events.policy_ruleset = true;
            }
            // Elements of other programs' sets may change all the time, and are irrelevant here.
            _ => events.foreign_ruleset |= is_of_rules(kind),
        }
    }
}

#[cfg(test)]
mod tests;
