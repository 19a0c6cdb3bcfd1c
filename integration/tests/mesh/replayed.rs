//! A recorded handshake initiation, sent again from elsewhere after its receiver was killed.
//!
//! ```text
//!   east1 (pod) ── switch ──── router ──── switch ── west1 (pod)
//!                 records, sniffs │                     killed
//!                              abroad
//!                                └── outside1: sends west1 what east1 has sent
//! ```

use std::{
    fs,
    net::UdpSocket,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use integration::{
    Flow, MeshdNode, await_ok, await_until, ping,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::Value;

use crate::{
    SOON, await_well,
    outside_peer::{add_abroad, drops, node_key},
};

const INITIATION: usize = 148;
/// In front of an initiation from port 51820 to port 51820 in UDP: ports and length. A checksum follows.
const HEADER: [u8; 6] = [0xca, 0x6c, 0xca, 0x6c, 0, 156];
/// First byte of a handshake response.
const RESPONSE: u8 = 2;
/// TAI64N's seconds at 1970-01-01, as WireGuard has them.
const EPOCH: u64 = (1 << 62) + 37;

/// A recorded initiation says that its sender was there once, not that it is there now. Whether the receiver knows that
/// it saw it, or lost that in the kill and answers, the sender's endpoint stays where packets came from.
#[test]
fn a_recorded_initiation_moves_no_endpoint_after_the_receiver_was_killed() {
    let sites = TwoSites::with_hosts("replayed", 1);
    let elsewhere = add_abroad(&sites, 1).hosts.remove(0);
    let to = format!("{}:51820", sites.west.v4(0));
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let (sender, receiver) = (mesh.node("east1"), mesh.node("west1"));
    let (there, back) = (mesh.pod("east1"), mesh.pod("west1"));
    let interval = Duration::from_millis(20);
    let flows = [Flow::icmp(there, back.v4(), interval), Flow::icmp(back, there.v6(), interval)];
    let recorded = record(&mesh, sender, receiver);
    flows.iter().for_each(|flow| flow.await_answer(SOON));
    let genuine = endpoint_of(sender, receiver).expect("an endpoint");

    for is_lost in [false, true] {
        let socket = elsewhere.enter(|| UdpSocket::bind(("0.0.0.0", 0))).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        await_well(receiver);
        // What the sender itself says comes after the replayed message.
        sender.stop();
        receiver.kill9();
        if is_lost {
            fs::remove_file(handshakes(receiver)).unwrap();
        }
        receiver.start();
        await_until("the receiver to know the sender", SOON, || endpoint_of(sender, receiver));
        let mut is_answered = false;
        let mut replay = || {
            socket.send_to(&recorded, &to).unwrap();
            let mut answer = [0; 256];
            is_answered |= socket.recv(&mut answer).is_ok_and(|_| answer[0] == RESPONSE);
            // A daemon that has just started may not answer yet.
            if let Some(endpoint) = endpoint_of(sender, receiver) {
                assert_eq!(endpoint, genuine, "it was lost that the initiation was seen: {is_lost}");
            }
            is_answered
        };
        await_ok("the receiver to work on the replayed initiation", SOON, || {
            let is_answered = replay();
            let refused = drops(&receiver.status(), "handshake_refused");
            if is_answered || refused > 0 { Ok(()) } else { Err(format!("{refused} refused")) }
        });
        sender.cont();
        await_until("the pods to reach each other during the replay", SOON, || {
            replay();
            (ping(there, back.v4()).lost() == 0 && ping(back, there.v6()).lost() == 0).then_some(())
        });
        flows.iter().for_each(|flow| flow.await_answer(SOON));
        assert_eq!(replay(), is_lost, "the receiver answers only what it cannot know to be old");
    }
    for flow in flows {
        println!("{}", flow.finish());
    }
    mesh.sniffer.assert_clean();
}

/// An initiation of `sender` that `receiver` saw, and whose time stamp is in its STATE.
fn record(mesh: &Mesh, sender: &MeshdNode, receiver: &MeshdNode) -> Vec<u8> {
    let source = format!("(src host {} or src host {})", mesh.sites.east.v4(0), mesh.sites.east.v6(0));
    let (_tcpdump, file) = mesh.sites.router.capture(&format!("{source} and udp dst port 51820"));
    let key = node_key(mesh, sender.name());
    sender.kill9();
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    sender.start();
    let recorded = await_until("an initiation to be recorded", SOON, || {
        let bytes = fs::read(&file).ok()?;
        let at = |message: &[u8]| message.starts_with(&HEADER) && message[8..12] == [1, 0, 0, 0];
        let datagram = bytes.windows(8 + INITIATION).find(|bytes| at(bytes))?;
        Some(datagram[8..].to_vec())
    });
    await_ok("its time stamp to be on disk", SOON, || {
        let text = fs::read(handshakes(receiver)).map_err(|error| error.to_string())?;
        let kept: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
        let stamp = kept["seen"][&key].as_str().ok_or("no time stamp")?;
        let number = |digits: &str| u64::from_str_radix(digits, 16).unwrap();
        let at = Duration::new(number(&stamp[..16]) - EPOCH, u32::try_from(number(&stamp[16..])).unwrap());
        if at >= since { Ok(()) } else { Err(format!("{at:?} is before {since:?}")) }
    });
    recorded
}

fn handshakes(node: &MeshdNode) -> PathBuf {
    node.state_dir().join("cache").join("handshakes.json")
}

/// The endpoint of `peer` that `node` names.
fn endpoint_of(peer: &MeshdNode, node: &MeshdNode) -> Option<String> {
    node.peer(peer.name())?["endpoint"].as_str().map(str::to_owned)
}
