//! A TUN device that refuses super-packets after the kernel announced support.

use std::{
    io::Read as _,
    os::fd::OwnedFd,
    sync::{Arc, atomic::AtomicBool, atomic::AtomicU64},
};

use rand::{SeedableRng as _, rngs::StdRng};
use socket2::{Domain, Socket, Type};

use super::{
    super::{
        batch::{Batch, HEADROOM},
        core::Core,
        offload::{Merger, Switches},
        shared::Shared,
        sys::{TunDevice, UdpSockets, Waker},
        threads::{ThreadContext, write_merged},
        vnet::VNET_HEADER,
        *,
    },
    superpackets::stream,
};

const SIZE: usize = 1340;

fn shell() -> ThreadContext {
    let switches = Switches::new(&OffloadSettings::default());
    ThreadContext {
        core: Arc::new(Core::new(PrivateKey::generate().unwrap().secret().clone(), StdRng::from_os_rng())),
        sockets: UdpSockets::bind(0, None, &switches).unwrap(),
        tun: Shared::new(None),
        switches,
        stop: AtomicBool::new(false),
        turns: std::array::from_fn(|_| AtomicU64::new(0)),
        wake: [Waker::new().unwrap(), Waker::new().unwrap()],
    }
}

/// What the tunnel writes to, and its other end. The system takes no message there that is larger than the buffer:
/// EMSGSIZE.
fn device() -> (Arc<Option<TunDevice>>, std::fs::File) {
    let (ours, other) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    ours.set_send_buffer_size(8192).unwrap();
    (Arc::new(Some(TunDevice::stand_in(OwnedFd::from(ours)))), OwnedFd::from(other).into())
}

fn batch_of(packets: &[Vec<u8>]) -> Batch {
    let mut batch = Batch::new();
    for packet in packets {
        batch.spare()[HEADROOM..][..packet.len()].copy_from_slice(packet);
        batch.push(packet.len(), 0);
    }
    for (slot, bytes) in batch.iter_mut() {
        slot.packet = packet::Packet::parse(bytes).ok();
    }
    batch
}

#[test]
fn super_packets_that_the_device_refuses_are_written_in_pieces_and_no_more_are_made() {
    for v4 in [true, false] {
        let shell = shell();
        let drops = shell.core.drops.register();
        let (device, mut other) = device();
        let read_all = std::thread::spawn(move || {
            let mut read = Vec::new();
            let mut message = vec![0; 70_000];
            loop {
                match other.read(&mut message).unwrap() {
                    0 => return read,
                    len => read.push(message[..len].to_vec()),
                }
            }
        });
        let packets = stream(v4, 60_000).cut(SIZE);
        let mut merger = Merger::new();
        for _ in 0..2 {
            write_merged(&shell, &device, &mut batch_of(&packets), &mut merger, &drops);
            assert_eq!(shell.switches.status().tun_tcp, OffloadState::Refused);
        }
        assert_eq!(merger.groups().len(), packets.len());
        assert_eq!(shell.switches.status().tun_udp, OffloadState::On);
        drop(device);
        let expected: Vec<Vec<u8>> =
            packets.iter().map(|packet| [&[0; VNET_HEADER], packet.as_slice()].concat()).collect();
        assert_eq!(read_all.join().unwrap(), [expected.clone(), expected].concat());
        assert!(shell.core.drops.sum().iter().all(|(_, count)| count == 0));
    }
}

#[test]
fn a_device_that_takes_nothing_is_no_reason_to_write_in_pieces() {
    let shell = shell();
    let drops = shell.core.drops.register();
    let (device, other) = device();
    drop(other);
    let packets = stream(true, 60_000).cut(SIZE);
    write_merged(&shell, &device, &mut batch_of(&packets), &mut Merger::new(), &drops);
    write_merged(&shell, &Arc::new(None), &mut batch_of(&packets), &mut Merger::new(), &drops);
    assert_eq!(shell.switches.status().tun_tcp, OffloadState::On);
    let count = |reason| shell.core.drops.sum().get(reason);
    let each = packets.len() as u64;
    assert_eq!((count(DropReason::TunWriteFailed), count(DropReason::TunGone)), (each, each));
}
