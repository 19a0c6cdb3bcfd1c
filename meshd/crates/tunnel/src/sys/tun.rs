//! The TUN device.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice, Read as _, Write as _},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd},
        unix::fs::OpenOptionsExt as _,
    },
};

use socket2::{Domain, Socket, Type};

use crate::{offload::Switches, vnet::VNET_HEADER};

/// A queue of a TUN device. The device is persistent: it stays, with its addresses and routes, when this is closed.
#[derive(Debug)]
pub(in super::super) struct TunDevice(File);

/// Length of the device's queue in packets. A burst of one TCP stream overflows the kernel's default of 500.
const QUEUE: i32 = 4096;

// `linux/if_tun.h`: offloads that the reader of the device supports.
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;
const TCP_OFFLOAD: libc::c_ulong = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
const UDP_OFFLOAD: libc::c_ulong = TUN_F_USO4 | TUN_F_USO6;

mod ioctls {
    nix::ioctl_write_int!(tun_set_iff, b'T', 202);
    nix::ioctl_write_int!(tun_set_persist, b'T', 203);
    nix::ioctl_write_int!(tun_set_offload, b'T', 208);
    nix::ioctl_write_ptr_bad!(set_queue_len, libc::SIOCSIFTXQLEN, libc::ifreq);
    nix::ioctl_write_ptr!(tun_set_vnet_hdr_size, b'T', 216, libc::c_int);
}

impl TunDevice {
    /// Opens the device called `name`, which is made if there is none, with the offloads that are switched on and
    /// that this kernel has; the others are switched off.
    ///
    /// # Errors
    /// `EINVAL` when a device of this name exists with other flags, `EBUSY` when it is no TUN device, `EPERM`
    /// without CAP_NET_ADMIN.
    pub(in super::super) fn open(name: &str, switches: &Switches) -> io::Result<Self> {
        let bytes = name.as_bytes();
        // SAFETY: all-zero bytes are a valid ifreq: arrays and integers.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if bytes.is_empty() || bytes.len() >= request.ifr_name.len() || bytes.contains(&0) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an interface name has 1 to 15 bytes"));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        // A persistent device keeps the flags it was made with, so these were chosen for good: the header in front of
        // packets carries offload requests, and several queues may be attached.
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE) as i16;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        let fd = file.as_raw_fd();
        // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one ifreq, which lives through the call.
        unsafe { ioctls::tun_set_iff(fd, (&raw mut request) as libc::c_ulong)? };
        // SAFETY: the descriptor is open, and the argument is a number.
        unsafe { ioctls::tun_set_persist(fd, 1)? };
        let size = VNET_HEADER as libc::c_int;
        // SAFETY: the descriptor is open, and the argument points to an int that lives through the call.
        unsafe { ioctls::tun_set_vnet_hdr_size(fd, &raw const size)? };
        request.ifr_ifru.ifru_metric = QUEUE;
        // Any socket will do for this request, and every host has this kind.
        let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
        // SAFETY: the descriptor is open, and the argument points to an ifreq with name and length.
        unsafe { ioctls::set_queue_len(socket.as_raw_fd(), &raw const request)? };
        let device = Self(file);
        device.offload(switches)?;
        Ok(device)
    }

    /// Wraps another descriptor that reads and writes messages like a TUN device.
    #[cfg(test)]
    pub(in super::super) fn stand_in(fd: std::os::fd::OwnedFd) -> Self {
        Self(fd.into())
    }

    /// Announces our offloads to the kernel.
    pub(in super::super) fn offload(&self, switches: &Switches) -> io::Result<()> {
        // SAFETY: the descriptor is open, and the argument is a number.
        let set = |flags| unsafe { ioctls::tun_set_offload(self.0.as_raw_fd(), flags) };
        if switches.tun_tcp.is_on() && switches.tun_udp.is_on() {
            if set(TCP_OFFLOAD | UDP_OFFLOAD).is_ok() {
                return Ok(());
            }
            switches.tun_udp.missing();
        }
        if switches.tun_tcp.is_on() {
            if set(TCP_OFFLOAD).is_ok() {
                return Ok(());
            }
            switches.tun_tcp.missing();
        }
        // Every packet comes whole and with its checksum.
        set(0)?;
        Ok(())
    }

    /// Reads one packet, its [`VNET_HEADER`] in front. `WouldBlock` when there is none.
    pub(in super::super) fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(into)
    }

    /// Writes one packet with its [`VNET_HEADER`] in front.
    pub(in super::super) fn write(&self, packet: &[u8]) -> io::Result<()> {
        (&self.0).write(packet).map(drop)
    }

    /// Writes one packet that lies in pieces, its [`VNET_HEADER`] in the first one.
    pub(in super::super) fn write_pieces(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.0).write_vectored(pieces).map(drop)
    }
}

impl AsFd for TunDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
