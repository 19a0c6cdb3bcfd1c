//! A monitor of table changes by any process.
//!
//! The kernel reports every transaction to its listeners within the system call that commits it, and ends each with a
//! message of its new generation. It reports elements like chains and tables.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket, sockopt,
    },
};

use crate::nfnetlink::{NFNL_SUBSYS_NFTABLES, NFNLGRP_NFTABLES, NFT_MSG_NEWGEN, NFTA_TABLE, attribute, messages};

/// The last of the kinds of messages about tables, chains and rules.
const NFT_MSG_DELRULE: u16 = 8;
/// Holds any datagram of notifications.
const BUFFER: usize = 64 << 10;
/// Bytes of the socket's receive buffer; the kernel accounts twice as much. It also holds every element of other
/// programs' transactions, half a million of them. A longer transaction is reported as an overrun.
const WAITING: usize = 64 << 20;

/// Changes of the tables since the last read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableChanges {
    /// Nothing about the tables.
    None,
    /// So many transactions had to do with them.
    Transactions(usize),
    /// Messages were lost.
    Overrun,
}

/// Listens for changes of tables.
#[derive(Debug)]
pub struct NftMonitor {
    socket: OwnedFd,
    buffer: Vec<u8>,
    tables: TableFilter,
    /// A transaction has begun that has to do with them.
    touched: bool,
}

/// Which tables, of any family.
#[derive(Debug)]
enum TableFilter {
    Named(String),
    /// All but one, and of others than `own` the chains and rules: some programs change elements of sets all the time.
    AllBut {
        one: String,
        own: String,
    },
}

impl TableFilter {
    /// Whether a message of this kind about the table `name` is of interest.
    fn concern(&self, kind: u16, name: &[u8]) -> bool {
        let name = name.strip_suffix(&[0]).unwrap_or(name);
        match self {
            Self::Named(one) => name == one.as_bytes(),
            Self::AllBut { one, own } => name == own.as_bytes() || (name != one.as_bytes() && is_of_rules(kind)),
        }
    }
}

/// Whether a message is about a table, a chain or a rule, and not about a set, its elements or another object.
#[must_use]
pub const fn is_of_rules(kind: u16) -> bool {
    kind & 0xff <= NFT_MSG_DELRULE
}

impl NftMonitor {
    /// Listens for changes of all tables of this name.
    ///
    /// # Errors
    /// When the kernel gives no socket for it; without nf_tables in it, for instance.
    pub fn open(table: &str) -> io::Result<Self> {
        Self::listen(TableFilter::Named(table.to_owned()))
    }

    /// Listens for changes of all tables but those called `one`, and of elements of sets only in those called `own`.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_others(one: &str, own: &str) -> io::Result<Self> {
        Self::listen(TableFilter::AllBut { one: one.to_owned(), own: own.to_owned() })
    }

    fn listen(tables: TableFilter) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
        // A host may allow less: then overruns come earlier.
        if setsockopt(&socket, sockopt::RcvBufForce, &WAITING).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &WAITING)?;
        }
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1 << (NFNLGRP_NFTABLES - 1)))?;
        Ok(Self { socket, buffer: vec![0; BUFFER], tables, touched: false })
    }

    /// Changes of the tables since the last call.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn changes(&mut self) -> io::Result<TableChanges> {
        let (mut transactions, mut too_much) = (0, false);
        loop {
            match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_TRUNC) {
                Ok(length) if length > self.buffer.len() => too_much = true,
                Ok(length) => transactions += count(&self.buffer[..length], &self.tables, &mut self.touched),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => too_much = true,
                Err(Errno::EAGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(match transactions + usize::from(std::mem::take(&mut self.touched)) {
            _ if too_much => TableChanges::Overrun,
            0 => TableChanges::None,
            transactions => TableChanges::Transactions(transactions),
        })
    }
}

/// How many transactions that touch these tables end in a datagram.
fn count(datagram: &[u8], tables: &TableFilter, touched: &mut bool) -> usize {
    let mut ended = 0;
    for (kind, body) in messages(datagram) {
        if kind >> 8 != NFNL_SUBSYS_NFTABLES {
            continue;
        }
        if kind & 0xff == NFT_MSG_NEWGEN {
            ended += usize::from(std::mem::take(touched));
            continue;
        }
        // struct nfgenmsg is 4 bytes; every kind of message names its table in attribute 1.
        let name = attribute(body.get(4..).unwrap_or_default(), NFTA_TABLE);
        *touched |= name.is_some_and(|name| tables.concern(kind, name));
    }
    ended
}
