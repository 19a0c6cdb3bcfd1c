//! A node behind a NAT with a short memory (N13): only the node itself can bring its tunnels up.
//!
//! ```text
//!   east1 (pod) ── switch ──── router ──── switch ── west1 (pod)
//!                         sniffs │ └── store: etcd
//!                             uplink
//!                                └── nat ── home ── home1 (pod), --endpoint none
//! ```

use std::{fs, time::Duration};

use integration::{
    Flow, Meshd, Nat, Ping, await_ok, await_until,
    topology::{CONFIG, Mesh, TwoSites},
};

use crate::{SOON, outside_peer::await_reaches};

fn with_home(title: &str, config: &str) -> (Mesh, Nat) {
    let sites = TwoSites::with_hosts(title, 1);
    let (nat, home) = sites.add_home(1);
    // Nothing translates IPv6, so that a tunnel over it would go around what is to be shown.
    nat.nft("table ip6 none { chain forward { type filter hook forward priority filter; policy drop; }; }");
    let mut mesh = Mesh::start_on(sites, config, |meshd| meshd);
    let node = Meshd::on(&home.hosts[0], &mesh.etcd).site("home").args("--endpoint none").start();
    node.await_ready(SOON);
    mesh.pods.push(node.pod("pod"));
    mesh.nodes.push(node);
    (mesh, nat)
}

/// After a silence longer than the NAT remembers, the first packet from outside gets in: keepalives kept the mapping.
#[test]
fn a_node_behind_a_nat_is_reached_after_a_long_silence() {
    let config = CONFIG.replace(r#""Type": "wireguard""#, r#""Type": "wireguard", "PersistentKeepalive": 1"#);
    let (mesh, nat) = with_home("nat-silence", &config);
    nat.set_udp_timeout(Duration::from_secs(2));
    mesh.await_all_reach_each_other();
    for from in ["east1", "west1"] {
        let node = mesh.node(from);
        let home = || node.peer("home1").unwrap();
        assert!(home()["endpoint"].as_str().is_some_and(|at| at.starts_with("100.64.0.2:")), "{}", home());
        for address in mesh.pod("home1").addresses() {
            // A daemon that waits for a processor for longer than the NAT remembers is forgotten all the same: once
            // more.
            await_ok(&format!("the first packet to {address} to get in"), SOON, || {
                // Keepalives, one a second, are all that is heard.
                let before = home()["rx"].as_u64().unwrap();
                await_until("seconds of silence", SOON, || {
                    (home()["rx"].as_u64() >= Some(before + 5 * 32)).then_some(())
                });
                let report = Ping::new(address).count(1).wait(Duration::from_secs(5)).run(mesh.pod(from));
                if report.lost() == 0 { Ok(()) } else { Err(report.text) }
            });
        }
    }
}

/// The way is cut, the other end loses its session by a restart, and only that end has something to say when the way is
/// open again: the node behind the NAT brings the tunnel up by itself.
#[test]
fn a_dead_tunnel_comes_back_by_itself() {
    let (mesh, _nat) = with_home("nat-revival", CONFIG);
    mesh.await_all_reach_each_other();
    let (east, home) = (mesh.node("east1"), mesh.pod("home1"));
    mesh.sites.router.nft(
        "table inet cut {
             chain forward {
                 type filter hook forward priority filter
                 udp dport 51820 drop
                 udp sport 51820 drop
             }
         }",
    );
    east.kill9();
    east.start();
    east.await_ready(SOON);
    let unanswered = Flow::icmp(home, mesh.pod("east1").v4(), Duration::from_millis(100));
    await_until("seconds without an answer", SOON, || (unanswered.so_far().sent >= 100).then_some(()));
    assert_eq!(unanswered.finish().answered, 0);
    mesh.sites.router.nft("delete table inet cut");
    await_reaches(mesh.pod("east1"), home.v4());
    await_reaches(mesh.pod("east1"), home.v6());
}

/// A restarted daemon has no session, and a node behind a NAT has no endpoint to call: what is sent to that node's pods
/// gets through all the same.
#[test]
fn a_restarted_node_reaches_one_behind_a_nat() {
    let (mesh, _nat) = with_home("nat-restart", CONFIG);
    mesh.await_all_reach_each_other();
    let (east, home) = (mesh.node("east1"), mesh.pod("home1"));
    await_until("the endpoint to be kept", SOON, || {
        let kept = fs::read_to_string(east.state_dir().join("cache/endpoints.json")).unwrap_or_default();
        kept.contains("100.64.0.2:").then_some(())
    });
    east.kill9();
    east.start();
    east.await_ready(SOON);
    await_reaches(mesh.pod("east1"), home.v4());
    await_reaches(mesh.pod("east1"), home.v6());
}
