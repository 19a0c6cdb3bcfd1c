use super::*;

/// Bytes of a netlink header.
const HEADER: usize = 16;

fn message(kind: u16, body: &[u8]) -> Vec<u8> {
    let len = HEADER + body.len();
    let mut m = Vec::new();
    m.extend(u32::try_from(len).unwrap().to_ne_bytes());
    m.extend(kind.to_ne_bytes());
    m.extend([0; 10]);
    m.extend(body);
    m.resize(len.next_multiple_of(4), 0);
    m
}

fn routes(body: &[u8]) -> KernelEvents {
    let mut events = KernelEvents::default();
    route_events(&message(libc::RTM_NEWROUTE, body), 158, &OwnPorts::default(), &BTreeSet::new(), &mut events);
    events
}

#[test]
fn foreign_routes_are_no_news_unless_default_or_connected() {
    assert!(routes(&[2, 24, 0, 0, 254, 186, 0, 1]).is_empty());
    assert!(routes(&[2, 0, 0, 0, 254, 186, 0, 1]).routes);
    assert!(routes(&[2, 24, 0, 0, 254, 158, 0, 1]).routes);
    assert!(routes(&[2, 24, 0, 0, 254, libc::RTPROT_KERNEL, 0, 1]).routes);
}

#[test]
fn what_this_process_changed_itself_is_no_news_unless_it_is_not_ours() {
    let of_port = |port: u32, protocol: u8| {
        let mut datagram = message(libc::RTM_DELROUTE, &[2, 24, 0, 0, 254, protocol, 0, 1]);
        datagram[12..16].copy_from_slice(&port.to_ne_bytes());
        let mut events = KernelEvents::default();
        route_events(&datagram, 158, &OwnPorts::of(7), &BTreeSet::new(), &mut events);
        events.routes
    };
    assert!(!of_port(7, 158));
    assert!(of_port(8, 158) && of_port(0, 158) && of_port(7, libc::RTPROT_KERNEL));
}

#[test]
fn entries_of_vxlan_devices_are_news_unless_this_process_or_the_device_made_them() {
    let told = |kind: u16, family: u8, index: u32, port: u32| {
        let mut body = vec![family, 0, 0, 0];
        body.extend(index.to_ne_bytes());
        let mut datagram = message(kind, &body);
        datagram[12..16].copy_from_slice(&port.to_ne_bytes());
        let mut events = KernelEvents::default();
        route_events(&datagram, 158, &OwnPorts::of(7), &BTreeSet::from([9]), &mut events);
        events.vteps
    };
    let (inet, bridge) = (2, 7);
    assert!(told(libc::RTM_DELNEIGH, inet, 9, 0) && told(libc::RTM_NEWNEIGH, inet, 9, 0));
    assert!(told(libc::RTM_DELNEIGH, bridge, 9, 0));
    assert!(!told(libc::RTM_NEWNEIGH, bridge, 9, 0), "learned");
    assert!(!told(libc::RTM_DELNEIGH, inet, 9, 7), "our own");
    assert!(!told(libc::RTM_DELNEIGH, inet, 8, 0), "of another device");
}

#[test]
fn several_messages_of_one_datagram_are_all_read() {
    let mut datagram = message(libc::RTM_NEWLINK, &[1, 2, 3]);
    datagram.extend(message(libc::RTM_DELRULE, &[]));
    let mut events = KernelEvents::default();
    route_events(&datagram, 158, &OwnPorts::default(), &BTreeSet::new(), &mut events);
    assert!(events.links && events.rules && !events.routes);
}

#[test]
fn tables_are_told_apart_by_name() {
    let of = |name: &[u8], kind: u16| {
        let mut body = vec![1, 0, 0, 0];
        body.extend(u16::try_from(4 + name.len()).unwrap().to_ne_bytes());
        body.extend(NFTA_TABLE.to_ne_bytes());
        body.extend(name);
        let mut events = KernelEvents::default();
        netfilter_events(&message(NFNL_SUBSYS_NFTABLES << 8 | kind, &body), "meshd", &mut events);
        events
    };
    assert!(of(b"meshd\0", 6).ruleset);
    assert!(of(b"meshd2\0", 6).foreign_ruleset);
    assert!(of(b"meshd\0", NFT_MSG_NEWGEN).is_empty());
}

/// Elements of other programs' sets need no pass, but their events fill the buffer of every listener.
#[test]
fn what_fills_the_buffers_of_others_is_said_in_time() {
    let mut told = VolumeCounter::default();
    let mut said = 0;
    for _ in 0..100_000 {
        told.add(1, 100);
        said += usize::from(told.take());
    }
    assert_eq!(said, 100_000 * (DATAGRAM + 100) / VOLUME);
    let volume = KernelEvents { ruleset_volume: true, ..KernelEvents::default() };
    assert!(!volume.is_empty() && !volume.calls_for_reconcile() && !volume.can_wait());
}

#[test]
fn damaged_datagrams_end_quietly() {
    for len in 0..40 {
        for fill in [0u8, 1, 0xff] {
            let datagram = vec![fill; len];
            let mut events = KernelEvents::default();
            route_events(&datagram, 158, &OwnPorts::default(), &BTreeSet::new(), &mut events);
            netfilter_events(&datagram, "meshd", &mut events);
            let mut damaged = message(NFNL_SUBSYS_NFTABLES << 8, &datagram);
            netfilter_events(&damaged, "meshd", &mut events);
            damaged.truncate(len);
            route_events(&damaged, 158, &OwnPorts::default(), &BTreeSet::new(), &mut events);
        }
    }
}
