//! UDP offloads that the kernel refuses after it announced them; allocations when sending and receiving.

use super::{
    super::{
        super::{OffloadSettings, OffloadState, batch::Endpoint},
        count_allocations::allocations,
        wait,
    },
    *,
};

const COUNT: usize = 10;
const LEN: usize = 200;

/// A run of datagrams to the IPv4 socket, each with its number for content.
fn push_run(out: &mut Outgoing, to: &UdpSockets) {
    let to = Endpoint { remote: (Ipv4Addr::LOCALHOST, to.port()).into(), source: None };
    for n in 0..COUNT {
        out.room(LEN).unwrap()[..LEN].fill(n as u8);
        out.commit(LEN, to, None, false);
    }
    assert_eq!(out.runs().len(), 1);
}

fn send(sender: &mut Sender, from: &UdpSockets, switches: &Switches, out: &mut Outgoing) {
    sender.send(from, &switches.udp_gso, out, |_, error, count| panic!("{count} not sent: {error:?}"));
}

/// Receives until all of a run are there and looks at each.
fn receive_run(buffers: &mut ReceiveBuffers, at: &UdpSockets, switches: &Switches) {
    let mut seen = 0;
    while seen < COUNT {
        let ready = wait([at.fds()[0]], Some(Duration::from_secs(90))).unwrap();
        assert!(ready[0].readable, "{seen} came");
        let mut received = arrayvec::ArrayVec::<Received<'_>, RECEIVE>::new();
        buffers.receive(at, true, &switches.udp_gro, &mut received, |lost, _| panic!("{lost:?}"));
        for datagram in received.into_iter().flat_map(Received::datagrams) {
            assert!(datagram.len() == LEN && datagram.iter().all(|byte| usize::from(*byte) == seen));
            seen += 1;
        }
    }
}

fn two(switches: &Switches) -> [UdpSockets; 2] {
    [(); 2].map(|()| UdpSockets::bind(0, None, switches).unwrap())
}

#[test]
fn a_run_that_the_kernel_refuses_to_cut_arrives_all_the_same_and_is_the_last_one() {
    let switches = Switches::new(&OffloadSettings::default());
    let [from, to] = two(&switches);
    let (mut sender, mut buffers, mut out) = (Sender::new(), ReceiveBuffers::new(), Outgoing::new());
    push_run(&mut out, &to);
    send(&mut sender, &from, &switches, &mut out);
    receive_run(&mut buffers, &to, &switches);
    assert_eq!(switches.status().udp_gso, OffloadState::On);
    // The kernel cuts nothing for a socket that sends without checksums: EINVAL.
    set_int(from.fds()[0].unwrap(), libc::SOL_SOCKET, libc::SO_NO_CHECK, 1).unwrap();
    for _ in 0..2 {
        push_run(&mut out, &to);
        send(&mut sender, &from, &switches, &mut out);
        receive_run(&mut buffers, &to, &switches);
        assert_eq!(switches.status().udp_gso, OffloadState::Refused);
    }
}

#[test]
fn datagrams_that_go_nowhere_are_no_reason_to_stop_cutting() {
    let switches = Switches::new(&OffloadSettings::default());
    let [from, to] = two(&switches);
    let mut out = Outgoing::new();
    push_run(&mut out, &to);
    // Neither goes what is cut nor what is not: the kernel has no such interface.
    let source =
        Some(super::super::super::batch::SourceAddress { address: Ipv4Addr::new(192, 0, 2, 1).into(), interface: 0 });
    let endpoint = Endpoint { remote: (Ipv4Addr::BROADCAST, to.port()).into(), source };
    for _ in 0..2 {
        out.commit(LEN, endpoint, None, false);
    }
    let mut failed = 0;
    Sender::new().send(&from, &switches.udp_gso, &mut out, |_, _, count| failed += count);
    assert!(failed >= 2, "{failed}");
    assert_eq!(switches.status().udp_gso, OffloadState::On);
    receive_run(&mut ReceiveBuffers::new(), &to, &switches);
}

#[test]
fn a_socket_that_fails_at_receiving_together_is_told_to_do_it_one_by_one() {
    let switches = Switches::new(&OffloadSettings::default());
    // One that is not connected answers EINVAL, as no UDP socket of this kernel can be made to.
    let stream = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    let sockets = UdpSockets { v4: Some(stream), v6: None, port: 0 };
    let mut buffers = ReceiveBuffers::new();
    let mut received = arrayvec::ArrayVec::<Received<'_>, RECEIVE>::new();
    buffers.receive(&sockets, true, &switches.udp_gro, &mut received, |lost, _| panic!("{lost:?}"));
    assert!(received.is_empty());
    assert_eq!(switches.status().udp_gro, OffloadState::Refused);
}

#[test]
fn an_empty_socket_is_no_reason_to_receive_one_by_one() {
    let switches = Switches::new(&OffloadSettings::default());
    let [one, _] = two(&switches);
    let mut buffers = ReceiveBuffers::new();
    let mut received = arrayvec::ArrayVec::<Received<'_>, RECEIVE>::new();
    buffers.receive(&one, true, &switches.udp_gro, &mut received, |lost, _| panic!("{lost:?}"));
    assert_eq!(switches.status().udp_gro, OffloadState::On);
}

#[test]
fn sending_and_receiving_allocate_nothing() {
    let switches = Switches::new(&OffloadSettings::default());
    let [from, to] = two(&switches);
    let (mut sender, mut buffers, mut out) = (Sender::new(), ReceiveBuffers::new(), Outgoing::new());
    for round in 0..3 {
        push_run(&mut out, &to);
        let before = allocations();
        send(&mut sender, &from, &switches, &mut out);
        receive_run(&mut buffers, &to, &switches);
        assert!(round == 0 || allocations() == before, "{} in round {round}", allocations() - before);
    }
}
