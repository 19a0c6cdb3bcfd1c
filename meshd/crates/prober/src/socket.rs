//! A UDP socket with a source address per datagram that reports the interface of each received one.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::AsRawFd as _,
};

use mesh::address::Family;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{io::Interest, net::UdpSocket};

/// A marked socket for probes of one family.
#[derive(Debug)]
pub(super) struct ProbeSocket(UdpSocket);

/// A datagram's circumstances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ProbeMeta {
    pub(super) length: usize,
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    /// Index of the interface it came in by.
    pub(super) interface: u32,
}

impl ProbeSocket {
    pub(super) fn bind(family: Family, port: u16, mark: u32) -> io::Result<Self> {
        let (domain, any): (_, IpAddr) = match family {
            Family::V4 => (Domain::IPV4, Ipv4Addr::UNSPECIFIED.into()),
            Family::V6 => (Domain::IPV6, Ipv6Addr::UNSPECIFIED.into()),
        };
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        match family {
            Family::V4 => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
            Family::V6 => {
                socket.set_only_v6(true)?;
                setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
            }
        }
        socket.set_mark(mark)?;
        socket.bind(&SocketAddr::new(any, port).into())?;
        Ok(Self(UdpSocket::from_std(socket.into())?))
    }

    pub(super) async fn readable(&self) {
        // Readiness is cleared by a receive that finds nothing; an error here means that the runtime is going away.
        if self.0.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Sends `message` with the source address `from`.
    pub(super) fn send(&self, message: &[u8], from: IpAddr, to: IpAddr, port: u16) -> io::Result<()> {
        let slices = [IoSlice::new(message)];
        let fd = self.0.as_raw_fd();
        let to = SockaddrStorage::from(SocketAddr::new(to, port));
        match from {
            IpAddr::V4(from) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(from.octets()) },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                sendmsg(fd, &slices, &[ControlMessage::Ipv4PacketInfo(&info)], MsgFlags::MSG_DONTWAIT, Some(&to))?;
            }
            IpAddr::V6(from) => {
                let info = libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: from.octets() }, ipi6_ifindex: 0 };
                sendmsg(fd, &slices, &[ControlMessage::Ipv6PacketInfo(&info)], MsgFlags::MSG_DONTWAIT, Some(&to))?;
            }
        }
        Ok(())
    }

    /// Takes one datagram; a longer one than `buffer` is cut.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<ProbeMeta> {
        let taken = self.0.try_io(Interest::READABLE, || {
            let mut slices = [IoSliceMut::new(buffer)];
            let mut control = nix::cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo);
            let message = recvmsg::<SockaddrStorage>(
                self.0.as_raw_fd(),
                &mut slices,
                Some(&mut control),
                MsgFlags::MSG_DONTWAIT,
            )?;
            let info = message.cmsgs()?.find_map(|message| match message {
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    let to = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
                    Some((to.into(), u32::try_from(info.ipi_ifindex).unwrap_or(0)))
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    Some((Ipv6Addr::from(info.ipi6_addr.s6_addr).into(), info.ipi6_ifindex))
                }
                _ => None,
            });
            let from = message.address.as_ref().and_then(|address| {
                let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).ip().to_owned().into()))
            });
            Ok((message.bytes, from, info))
        });
        match taken? {
            (length, Some(from), Some((to, interface))) => Ok(ProbeMeta { length, from, to, interface }),
            (length, _, _) => Ok(ProbeMeta {
                length,
                from: Ipv4Addr::UNSPECIFIED.into(),
                to: Ipv4Addr::UNSPECIFIED.into(),
                interface: 0,
            }),
        }
    }
}
