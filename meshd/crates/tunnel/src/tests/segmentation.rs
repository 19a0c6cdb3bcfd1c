//! Compares our segmentation with the kernel's: super-packets are written to one TUN device and forwarded to another
//! without offloads, so the kernel must segment them.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};
use packet::Packet;
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};

use super::super::{
    OffloadSetting, OffloadSettings,
    batch::PADDING,
    offload::{
        Segments, Switches,
        packets::{Like, any_packet, checksum},
    },
    sys::{TunDevice, wait},
    vnet::{GsoKind, VNET_HEADER, Vnet},
};

fn ip(args: &str) {
    let output = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

fn device(name: &str, tun_offload: OffloadSetting) -> TunDevice {
    let switches = Switches::new(&OffloadSettings { tun_offload, ..OffloadSettings::default() });
    let device = TunDevice::open(name, &switches).unwrap();
    if tun_offload == OffloadSetting::Auto {
        assert!(switches.tun_tcp.is_on() && switches.tun_udp.is_on(), "this kernel lacks an offload");
    }
    fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_ra"), "0").unwrap();
    ip(&format!("link set {name} up"));
    device
}

/// The next packet of the test's own that the device gives out.
fn read(device: &TunDevice) -> Vec<u8> {
    use std::os::fd::AsFd as _;
    let mut bytes = vec![0; 70_000];
    let end = Instant::now() + Duration::from_secs(90);
    loop {
        assert!(Instant::now() < end, "nothing came");
        let Ok(len) = device.read(&mut bytes) else {
            wait([Some(device.as_fd())], Some(Duration::from_secs(1))).unwrap();
            continue;
        };
        let packet = &bytes[VNET_HEADER..len];
        let parsed = Packet::parse(packet).unwrap();
        // The kernel's own: router solicitations and the like.
        if ["10.2.0.1", "fd00:2::1"].contains(&parsed.destination.to_string().as_str()) {
            let vnet = Vnet::read(bytes.first_chunk().unwrap());
            assert_eq!(vnet.kind(), Ok(None), "the kernel left it to us");
            return packet.to_vec();
        }
    }
}

fn kind(like: &Like) -> GsoKind {
    match (like.tcp, like.v4) {
        (true, true) => GsoKind::Tcp4,
        (true, false) => GsoKind::Tcp6,
        (false, _) => GsoKind::Udp,
    }
}

/// What we make of it, as it looks one hop later.
fn cut(like: &Like, vnet: &Vnet, packet: &[u8]) -> Vec<Vec<u8>> {
    let parsed = Packet::parse(packet).unwrap();
    let mut segments = Segments::new(packet, &parsed, vnet, kind(like)).unwrap();
    let mut bytes = packet.to_vec();
    bytes.extend([0; PADDING]);
    let mut cut = Vec::new();
    while let Some(mut segment) = segments.next(&mut bytes, |s| s.packet().to_vec()) {
        if like.v4 {
            segment[8] -= 1;
            segment[10..12].fill(0);
            let checksum = checksum(&segment[..20]);
            segment[10..12].copy_from_slice(&checksum);
        } else {
            segment[7] -= 1;
        }
        cut.push(segment);
    }
    cut
}

#[test]
fn cuts_as_the_kernel_does() {
    let in_a_namespace = || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let (from, to) = (device("gso0", OffloadSetting::Auto), device("plain0", OffloadSetting::Off));
        for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{key}"), "1").unwrap();
        }
        for route in
            ["10.1.0.0/24 dev gso0", "10.2.0.0/24 dev plain0", "fd00:1::/64 dev gso0", "fd00:2::/64 dev plain0"]
        {
            ip(&format!("route add {route}"));
        }
        let mut runner = TestRunner::deterministic();
        for _ in 0..300 {
            let like = (any_packet(1..20_000), 400usize..1380);
            let (mut like, size) = like.new_tree(&mut runner).unwrap().current();
            like.payload.resize(like.payload.len().max(size + 1), 7);
            // Urgent data is another matter, and resets are never cut.
            like.flags &= !0x24;
            like.dont_fragment = true;
            let packet = like.build();
            let transport = like.network_len() as u16;
            let vnet = Vnet::gso(kind(&like), like.header_len() as u16, size as u16, transport);
            // The kernel wants the partial sum that the sender's stack would have left.
            let mut written = vec![0; VNET_HEADER];
            vnet.write(written.first_chunk_mut().unwrap());
            written.extend(with_partial_checksum(&like, &packet));
            from.write(&written).unwrap();
            let ours = cut(&like, &vnet, &written[VNET_HEADER..]);
            for (nth, segment) in ours.iter().enumerate() {
                assert_eq!(*segment, read(&to), "segment {nth} of {} of {like:?} in {size}", ours.len());
            }
        }
    };
    std::thread::spawn(in_a_namespace).join().unwrap();
}

fn with_partial_checksum(like: &Like, packet: &[u8]) -> Vec<u8> {
    let transport = like.network_len();
    let mut pseudo = if like.v4 { packet[12..20].to_vec() } else { packet[8..40].to_vec() };
    pseudo.extend([0, if like.tcp { 6 } else { 17 }]);
    pseudo.extend(((packet.len() - transport) as u16).to_be_bytes());
    let partial = checksum(&pseudo).map(|byte| !byte);
    let mut packet = packet.to_vec();
    let field = transport + if like.tcp { 16 } else { 6 };
    packet[field..field + 2].copy_from_slice(&partial);
    packet
}
