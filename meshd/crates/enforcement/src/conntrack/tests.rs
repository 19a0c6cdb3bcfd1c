use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    process::{Command, Stdio},
    thread,
};

use nix::sched::{CloneFlags, unshare};
use packet::protocol;

use super::*;

/// Runs `test` in a network namespace of its own, whose loopback is tracked.
fn tracked(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        run("ip", &["link", "set", "lo", "up"]);
        run(
            "nft",
            &["add table inet t; add chain inet t c { type filter hook input priority 0; }; \
            add rule inet t c ct state new accept"],
        );
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn run(program: &str, args: &[&str]) {
    assert!(Command::new(program).args(args).stdin(Stdio::null()).status().unwrap().success(), "{program} {args:?}");
}

fn tuple(from: SocketAddr, to: SocketAddr) -> Tuple {
    Tuple {
        source: from.ip(),
        destination: to.ip(),
        protocol: protocol::UDP,
        source_port: from.port(),
        destination_port: to.port(),
        answer: false,
    }
}

#[test]
fn knows_a_reply_from_a_request_and_from_a_stranger() {
    tracked(|| {
        for address in ["127.0.0.1", "::1"] {
            let address: IpAddr = address.parse().unwrap();
            let (a, b) = (UdpSocket::bind((address, 0)).unwrap(), UdpSocket::bind((address, 0)).unwrap());
            let (at_a, at_b) = (a.local_addr().unwrap(), b.local_addr().unwrap());
            a.send_to(b"x", at_b).unwrap();
            let mut conntrack = Conntrack::open().unwrap();
            assert!(conntrack.is_reply(&tuple(at_b, at_a)).unwrap());
            assert!(!conntrack.is_reply(&tuple(at_a, at_b)).unwrap(), "that is who asks");
            let stranger = SocketAddr::new(address, at_b.port() ^ 1);
            assert!(!conntrack.is_reply(&tuple(stranger, at_a)).unwrap());
            let mut flows = Vec::new();
            conntrack.dump(|flow| flows.push(flow)).unwrap();
            let known = |answered| KnownFlow {
                tuple: tuple(at_a, at_b),
                code: 0,
                answered,
                rewritten: false,
                reply: [address; 2],
            };
            assert!(flows.contains(&known(false)), "{flows:?}");
            b.send_to(b"y", at_a).unwrap();
            flows.clear();
            conntrack.dump(|flow| flows.push(flow)).unwrap();
            assert!(flows.contains(&known(true)), "{flows:?}");
        }
    });
}

#[test]
fn flows_of_an_address_are_forgotten_also_behind_a_rewriting_and_no_others() {
    tracked(|| {
        run("ip", &["address", "add", "127.0.0.2/8", "dev", "lo"]);
        run(
            "nft",
            &["add table ip n; add chain ip n out { type nat hook output priority -100; }; \
             add rule ip n out ip daddr 127.0.0.9 dnat to 127.0.0.2"],
        );
        let socket = |address: &str| UdpSocket::bind((address, 0)).unwrap();
        let [a, b, c] = ["127.0.0.1"; 3].map(socket);
        let gone = socket("127.0.0.2");
        let port = gone.local_addr().unwrap().port();
        a.send_to(b"stays", b.local_addr().unwrap()).unwrap();
        a.send_to(b"to it", gone.local_addr().unwrap()).unwrap();
        b.send_to(b"rewritten to it", ("127.0.0.9", port)).unwrap();
        gone.send_to(b"from it", c.local_addr().unwrap()).unwrap();
        run("ping", &["-c", "1", "-q", "-I", "127.0.0.2", "127.0.0.1"]);
        let mut conntrack = Conntrack::open().unwrap();
        let mut flows = Vec::new();
        conntrack.dump(|flow| flows.push(flow.tuple)).unwrap();
        assert_eq!(flows.len(), 5, "{flows:?}");
        conntrack.forget(&["127.0.0.2".parse().unwrap()].into()).unwrap();
        flows.clear();
        conntrack.dump(|flow| flows.push(flow.tuple)).unwrap();
        assert_eq!(flows, [tuple(a.local_addr().unwrap(), b.local_addr().unwrap())]);
    });
}

#[test]
fn pings_with_a_code_are_forgotten_like_others() {
    tracked(|| {
        run(
            "nft",
            &["add table ip n; add chain ip n out { type filter hook output priority -300; }; \
             add rule ip n out icmp type echo-request icmp code set 3"],
        );
        run("ping", &["-c", "1", "-q", "127.0.0.1"]);
        let mut conntrack = Conntrack::open().unwrap();
        let seen = |conntrack: &mut Conntrack| {
            let mut flows = Vec::new();
            conntrack.dump(|flow| flows.push(flow.code)).unwrap();
            flows
        };
        assert_eq!(seen(&mut conntrack), [3]);
        conntrack.forget(&["127.0.0.1".parse().unwrap()].into()).unwrap();
        assert!(seen(&mut conntrack).is_empty());
    });
}

#[test]
fn pings_are_flows() {
    tracked(|| {
        for (address, protocol, kind, family) in
            [("127.0.0.1", protocol::ICMP, 8, "-4"), ("::1", protocol::ICMPV6, 128, "-6")]
        {
            // The second identifier is the request's type.
            for identifier in [77, kind] {
                run("ping", &[family, "-c", "1", "-q", "-e", &identifier.to_string(), address]);
                let address: IpAddr = address.parse().unwrap();
                let request = Tuple {
                    source: address,
                    destination: address,
                    protocol,
                    source_port: identifier,
                    destination_port: kind,
                    answer: false,
                };
                let mut conntrack = Conntrack::open().unwrap();
                assert!(conntrack.is_reply(&request.reversed()).unwrap());
                assert!(!conntrack.is_reply(&request).unwrap(), "a request of the other end is no reply");
            }
        }
    });
}

#[test]
fn what_is_no_message_is_none() {
    let flow = Tuple {
        source: "10.0.0.1".parse().unwrap(),
        destination: "10.0.0.2".parse().unwrap(),
        protocol: protocol::TCP,
        source_port: 1,
        destination_port: 2,
        answer: false,
    };
    let message = request(Some(&flow), false, 7);
    for end in 0..message.len() {
        assert_eq!(answers(&message[..end], 7).count(), 0);
    }
}
