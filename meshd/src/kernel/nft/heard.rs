//! What is done to tables, by whomever.
//!
//! The kernel tells every transaction to whoever listens, within the system call that makes it, and closes each with a
//! message of its new generation. Elements are told as chains and tables are.

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

use crate::kernel::watch::{NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN, attribute, messages};

const NFNLGRP_NFTABLES: u32 = 7;
const NFTA_TABLE: u16 = 1;
/// Holds any datagram of notifications.
const BUFFER: usize = 64 << 10;
/// What may wait to be read. One of our own transactions that is longer overruns it, which is told.
const WAITING: usize = 8 << 20;

/// What was heard since the last time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Nothing about the tables.
    Nothing,
    /// So many transactions had to do with them.
    Transactions(usize),
    /// There was more than could be heard.
    TooMuch,
}

/// Listens for changes of tables.
#[derive(Debug)]
pub(crate) struct Watch {
    socket: OwnedFd,
    buffer: Vec<u8>,
    tables: Tables,
    /// A transaction has begun that has to do with them.
    touched: bool,
}

/// Which tables, of any family.
#[derive(Debug)]
enum Tables {
    Named(String),
    AllBut(String),
}

impl Tables {
    fn contain(&self, name: &[u8]) -> bool {
        let name = name.strip_suffix(&[0]).unwrap_or(name);
        match self {
            Self::Named(one) => name == one.as_bytes(),
            Self::AllBut(one) => name != one.as_bytes(),
        }
    }
}

impl Watch {
    /// Listens for changes of all tables of this name.
    ///
    /// # Errors
    /// When the kernel gives no socket for it; without nf_tables in it, for instance.
    pub(crate) fn open(table: &str) -> io::Result<Self> {
        Self::listen(Tables::Named(table.to_owned()))
    }

    /// Listens for changes of all tables but those of this name.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub(crate) fn open_others(table: &str) -> io::Result<Self> {
        Self::listen(Tables::AllBut(table.to_owned()))
    }

    fn listen(tables: Tables) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
        // A host may allow less: then overruns come earlier.
        if setsockopt(&socket, sockopt::RcvBufForce, &WAITING).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &WAITING)?;
        }
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1 << (NFNLGRP_NFTABLES - 1)))?;
        Ok(Self { socket, buffer: vec![0; BUFFER], tables, touched: false })
    }

    /// What was heard since the last call.
    ///
    /// # Errors
    /// When the socket fails.
    pub(crate) fn heard(&mut self) -> io::Result<Heard> {
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
            _ if too_much => Heard::TooMuch,
            0 => Heard::Nothing,
            transactions => Heard::Transactions(transactions),
        })
    }
}

/// How many transactions that touch these tables end in a datagram.
fn count(datagram: &[u8], tables: &Tables, touched: &mut bool) -> usize {
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
        *touched |= name.is_some_and(|name| tables.contain(name));
    }
    ended
}
