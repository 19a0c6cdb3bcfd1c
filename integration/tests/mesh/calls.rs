//! After a restart of the near end, three things bring the session back before the far end misses it: each by itself,
//! while the router drops what the other two need.
//!
//! ```text
//!   east1 (pod) ── switch ──── router ──── switch ── west1 (pod)
//!     near, killed           drops initiations          far
//!                             etcd
//! ```

use std::{
    fs,
    net::{IpAddr, UdpSocket},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use integration::{
    MeshdNode, await_ok, await_until,
    topology::{CONFIG, Mesh, Site, TwoSites},
};
use serde_json::Value;

use crate::SOON;

/// A handshake this old is no reason any more to take a peer's restart for one that the session came after.
const OLD: Duration = Duration::from_secs(11);

/// Both ends have a session, and what the near end needs to start without etcd and to call is on its disk.
#[track_caller]
fn mesh(title: &str) -> Mesh {
    let mesh = Mesh::start_on(TwoSites::with_hosts(title, 1), CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let (near, far) = (mesh.node("east1"), mesh.node("west1"));
    let far_id = far.status()["id"].as_str().unwrap().to_owned();
    await_ok("the session and the nodes to be on disk", SOON, || {
        let [handshakes, store] = ["handshakes.json", "store.json"].map(|name| {
            let text = fs::read(near.state_dir().join("cache").join(name)).map_err(|error| error.to_string())?;
            serde_json::from_slice::<Value>(&text).map_err(|error| error.to_string())
        });
        let (talking, entries) = (handshakes?["talking"].clone(), store?["entries"].to_string());
        let is_kept = talking.to_string().contains(&far_id) && entries.contains(&format!("nodes/{far_id}"));
        if is_kept { Ok(()) } else { Err(talking.to_string()) }
    });
    mesh
}

/// Drops the initiations that come from a site: it can only answer.
fn mute(mesh: &Mesh, site: &Site) {
    let (v4, v6) = (site.v4(0), site.v6(0));
    mesh.sites.router.nft(&format!(
        "table inet calls {{\nchain between {{\ntype filter hook forward priority filter\n\
         ip saddr {v4} udp length 156 drop\nip6 saddr {v6} udp length 156 drop\n}}\n}}"
    ));
}

/// Forgets with whom the near end talked. The daemon must not run.
fn forget(near: &MeshdNode) {
    fs::remove_file(near.state_dir().join("cache").join("handshakes.json")).unwrap();
}

fn handshake(node: &MeshdNode, peer: &MeshdNode) -> Option<Duration> {
    node.peer(peer.name())?["latestHandshake"].as_u64().map(Duration::from_secs)
}

/// Waits until the near end has a session again: its daemon started without one.
#[track_caller]
fn await_session(near: &MeshdNode, far: &MeshdNode) {
    await_until("a handshake after the restart", SOON, || handshake(near, far));
}

/// The near end calls on its start, though it has nothing to send, gets nothing, and etcd tells the far end nothing.
#[test]
fn a_start_calls_those_that_were_talked_to() {
    let mesh = mesh("call-start");
    let (near, far) = (mesh.node("east1"), mesh.node("west1"));
    mesh.etcd.stop();
    mute(&mesh, &mesh.sites.west);
    near.kill9();
    near.start();
    await_session(near, far);
}

/// The far end sends in a session that the near end has lost. The near end does not know that they talked, and etcd
/// tells the far end nothing.
#[test]
fn a_datagram_of_a_lost_session_is_followed_by_a_call() {
    let mesh = mesh("call-stranger");
    let (near, far) = (mesh.node("east1"), mesh.node("west1"));
    let to = mesh.pod("east1").v4();
    let receiver = mesh.pod("east1").enter(|| UdpSocket::bind((to, 7000))).unwrap();
    receiver.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let sender = mesh.pod("west1").enter(|| UdpSocket::bind((IpAddr::from([0; 4]), 0))).unwrap();
    let arrives = || {
        let _ = sender.send_to(b"one way", (to, 7000));
        receiver.recv(&mut [0; 8]).is_ok().then_some(())
    };
    await_until("the datagrams to arrive", SOON, arrives);
    mesh.etcd.stop();
    mute(&mesh, &mesh.sites.west);
    near.kill9();
    while receiver.recv(&mut [0; 8]).is_ok() {}
    forget(near);
    near.start();
    await_until("the datagrams to arrive again", SOON, arrives);
    await_session(near, far);
}

/// Nothing is sent, and the near end does not know that they talked. The far end sees in etcd that it has restarted.
#[test]
fn a_start_count_that_changed_is_followed_by_a_call() {
    let mesh = mesh("call-alive");
    let (near, far) = (mesh.node("east1"), mesh.node("west1"));
    await_ok("the session to be an old one", SOON, || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let age = now.saturating_sub(handshake(far, near).ok_or("no handshake")?);
        if age > OLD { Ok(()) } else { Err(format!("{age:?}")) }
    });
    near.kill9();
    forget(near);
    mute(&mesh, &mesh.sites.east);
    near.start();
    await_session(near, far);
}
