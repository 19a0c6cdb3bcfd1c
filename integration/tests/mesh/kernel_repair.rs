//! Others change the kernel's state under the daemon: it puts right what is ours and leaves alone what is not.
//!
//! ```text
//!   east1 (pod) ─┐                               ┌─ west1 (pod)
//!   device, route, rule,  ── router ──── switch ─┤
//!   table deleted        sniffs │                └─ west2 (pod)
//!   east2 (pod) ─┘             etcd
//! ```

use std::{
    fs,
    net::UdpSocket,
    time::{Duration, Instant},
};

use integration::{
    MeshdNode, await_ok, await_until, ping,
    topology::{CONFIG, Mesh, TwoSites},
};

use crate::{SOON, problems};

/// How long nothing must happen, and how long until then.
const SILENCE: Duration = Duration::from_secs(20);
const SETTLED: Duration = Duration::from_secs(150);
/// What a firewall that is not ours does to forwarded packets.
const FOREIGN_DROP: &str = "table ip filter {\nchain FORWARD {\ntype filter hook forward priority 0; policy drop\n}\n}";

/// Routes, rules and firewall of the mesh, in an order of its own.
fn ours(node: &MeshdNode) -> Vec<String> {
    let mut lines = Vec::new();
    for command in [
        "ip route show table all proto 158",
        "ip -6 route show table all proto 158",
        "ip rule",
        "ip -6 rule",
        "nft -s list table inet meshd",
    ] {
        // A table that was deleted cannot be listed.
        let words: Vec<&str> = command.split(' ').collect();
        lines.extend(node.host().try_run(&words).stdout.lines().map(|line| line.trim().to_owned()));
    }
    let address = format!("ip -o address show dev {}", node.interface());
    let words: Vec<&str> = address.split(' ').collect();
    // The index in front is a new one when the device is.
    lines.extend(
        node.host().try_run(&words).stdout.lines().filter_map(|line| Some(line.split_once(": ")?.1.to_owned())),
    );
    lines.sort();
    lines
}

/// Breaks something and waits until all is as it was before: a direct path that has lost probes meanwhile proves itself
/// again.
#[track_caller]
fn put_right(node: &MeshdNode, before: &[String], command: &str) {
    node.host().run(command);
    let start = Instant::now();
    await_ok(&format!("{command} to be put right"), SETTLED, || {
        let now = ours(node);
        let missing: Vec<_> = before.iter().filter(|line| !now.contains(line)).collect();
        let new: Vec<_> = now.iter().filter(|line| !before.contains(line)).collect();
        if missing.is_empty() && new.is_empty() { Ok(()) } else { Err(format!("missing {missing:#?}\nnew {new:#?}")) }
    });
    println!("{command}: put right after {:?}", start.elapsed());
}

fn await_settled(mesh: &Mesh) {
    mesh.await_all_reach_each_other();
    for (from, to) in [("east1", "east2"), ("east2", "east1"), ("west1", "west2"), ("west2", "west1")] {
        mesh.node(from).await_path(to, "direct", SOON);
    }
    for node in &mesh.nodes {
        node.await_status("to be well", SOON, |status| status["state"] == "running");
    }
}

#[test]
fn what_others_delete_comes_back_and_what_is_theirs_stays() {
    let mesh = Mesh::start("repair");
    await_settled(&mesh);
    let node = mesh.node("east1");
    node.host()
        .nft("table inet others {\nchain forward {\ntype filter hook forward priority 10; policy accept\nip daddr 198.18.0.1 accept\n}\n}");
    node.host().route("198.18.0.0/15", "via 192.0.2.1 proto static");
    let theirs = |node: &MeshdNode| {
        let routes = node.host().run("ip route show 198.18.0.0/15").stdout;
        routes + &node.host().run("nft -s list table inet others").stdout
    };
    let before = theirs(node);
    let subnet = |name: &str| mesh.node(name).subnets();
    let settled = ours(node);
    let probes = node.host().run("ip rule").stdout;
    let priority = probes.lines().find(|line| line.contains("15858")).unwrap().split(':').next().unwrap().to_owned();
    for command in [
        format!("ip route delete {}", subnet("west1")[0]),
        format!("ip -6 route delete {}", subnet("west1")[1]),
        format!("ip route delete {}", subnet("east2")[0]),
        "ip route delete unreachable 10.244.0.0/16".to_owned(),
        format!("ip rule delete priority {priority}"),
        format!("ip address delete {}/32 dev {}", node.overlay()[0], node.interface()),
        "nft flush table inet meshd".to_owned(),
        "nft delete table inet meshd".to_owned(),
        format!("ip link delete {}", node.interface()),
    ] {
        put_right(node, &settled, &command);
        mesh.await_all_reach_each_other();
    }
    // All at once: a ruleset flush takes the others' table too, which is theirs to bring back.
    assert_eq!(before, theirs(node));
    put_right(node, &settled, "nft flush ruleset");
    mesh.await_all_reach_each_other();
    mesh.sniffer.assert_clean();
}

/// As VPN clients do it: a rule before ours takes the mesh's networks to a table that leads out.
#[test]
fn a_foreign_rule_that_takes_the_mesh_sends_nothing_out_in_the_clear() {
    let mesh = Mesh::start_on(TwoSites::with_hosts("foreign-rule", 1), CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let (node, from, to) = (mesh.node("east1"), mesh.pod("east1"), mesh.pod("west1"));
    for command in [
        "ip route add default via 192.0.2.1 table 77",
        "ip -6 route add default via 2001:db8:1::1 table 77",
        "ip rule add to 10.244.0.0/16 priority 77 lookup 77",
        "ip -6 rule add to fd42:244::/48 priority 77 lookup 77",
    ] {
        node.host().run(command);
    }
    for address in to.addresses() {
        let way = node.host().run(&format!("ip route get {address}")).stdout;
        assert!(way.contains("dev eth0"), "the rule takes it: {way}");
        // A pod's packet, and the node's own.
        ping(from, address).assert_none_answered();
        ping(node.host(), address).assert_none_answered();
        let socket =
            node.host().enter(|| UdpSocket::bind((node.overlay()[usize::from(address.is_ipv6())], 0))).unwrap();
        assert!(socket.send_to(b"in the clear", (*address, 7000)).is_err(), "the guard tells the sender");
    }
    assert!(mesh.sniffer.frames() > 0);
    mesh.sniffer.assert_clean();
    for family in ["-4", "-6"] {
        node.host().run(&format!("ip {family} rule delete priority 77"));
    }
    mesh.await_all_reach_each_other();
    mesh.sniffer.assert_clean();
}

#[test]
fn unchanged_state_is_left_in_peace() {
    let mesh = Mesh::start("silence");
    await_settled(&mesh);
    let monitors: Vec<_> = mesh
        .nodes
        .iter()
        .flat_map(|node| {
            let host = node.host();
            [host.monitor("link address route rule"), host.spawn("nft", &["monitor"])]
        })
        .collect();
    let said = || monitors.iter().map(|monitor| monitor.log().lines().count()).collect::<Vec<_>>();
    let mut last = said();
    let mut since = Instant::now();
    await_ok("nothing to be changed for a while", SETTLED, || {
        let now = said();
        if now != last {
            since = Instant::now();
            last = now;
        }
        if since.elapsed() >= SILENCE {
            Ok(())
        } else {
            Err(monitors.iter().map(|monitor| format!("{}:\n{}\n", monitor.name(), monitor.log())).collect())
        }
    });
    println!("lines before the silence: {last:?}");
    assert!(last.iter().all(|lines| *lines == 0), "a settled mesh changed something: {last:?}");
}

#[test]
fn a_foreign_firewall_that_drops_is_named() {
    let sites = TwoSites::with_hosts("foreign-drop", 1);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let node = mesh.node("east1");
    node.host().nft(FOREIGN_DROP);
    node.await_status("to name the chain and a remedy", SOON, |status| {
        problems(status).any(|problem| {
            problem["code"] == "foreign_forward_drop"
                && problem["cause"].as_str().unwrap().contains("FORWARD")
                && problem["remedy"].as_str().unwrap().contains("--forward-accept")
        })
    });
    ping(mesh.pod("east1"), mesh.pod("west1").v4()).assert_none_answered();
    assert!(node.host().run("nft list table ip filter").stdout.contains("policy drop"), "it is not ours to change");
    node.host().run("nft delete table ip filter");
    node.await_status("to be well", SOON, |status| status["state"] == "running");
    mesh.await_all_reach_each_other();
}

#[test]
fn forward_accept_answers_a_foreign_drop_and_takes_the_answer_back() {
    let sites = TwoSites::with_hosts("forward-accept", 1);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd.args("--forward-accept"));
    mesh.await_all_reach_each_other();
    let node = mesh.node("east1");
    // It stands still, so that what is read has no answer in it yet.
    node.stop();
    node.host().nft(FOREIGN_DROP);
    let theirs = node.host().run("nft -s list table ip filter").stdout;
    node.cont();
    mesh.await_all_reach_each_other();
    await_until("the answer to be there", SOON, || {
        let now = node.host().run("nft -s list table ip filter").stdout;
        (now != theirs && now.contains("policy drop")).then_some(())
    });
    mesh.await_all_reach_each_other();
    node.await_status("to be well", SOON, |status| status["state"] == "running");
    // What the mesh has nothing to do with is dropped still.
    assert_eq!(node.host().run("nft -s list table ip filter").stdout.matches("jump").count(), 1);
    node.term();
    let cleaned = node.cleanup(&["--force"]);
    assert!(cleaned.success(), "{}", cleaned.describe());
    assert_eq!(node.host().run("nft -s list table ip filter").stdout, theirs);
}

#[test]
fn a_node_whose_address_changes_is_followed() {
    let mesh = Mesh::start("renumbered");
    await_settled(&mesh);
    let node = mesh.node("east1");
    let interface = &mesh.sites.east.interfaces[0];
    // A lease of DHCP that was not renewed: the old address goes, another one comes.
    interface.remove_address("192.0.2.11/24");
    interface.add_address("192.0.2.50/24");
    node.host().route("default", "via 192.0.2.1");
    let id = node.status()["id"].as_str().unwrap().to_owned();
    await_until("the record to name the new address", SOON, || {
        let record = mesh.etcd.get(&format!("/meshd/nodes/{id}"))?;
        (record.contains("192.0.2.50") && !record.contains("192.0.2.11")).then_some(())
    });
    mesh.await_all_reach_each_other();
    // A tunnel that carries nothing keeps the endpoint it had; these have carried something.
    for name in ["west1", "west2"] {
        let other = mesh.node(name);
        await_ok(&format!("{name} to follow"), SOON * 2, || {
            let peer = other.peer("east1").ok_or("no peer")?;
            let endpoint = peer["endpoint"].as_str().unwrap_or_default();
            let follows = endpoint.starts_with("192.0.2.50:") || endpoint.starts_with("[2001:db8:1::11]:");
            if follows { Ok(()) } else { Err(peer.to_string()) }
        });
    }
    let neighbour = mesh.node("east2");
    neighbour.await_path("east1", "direct", SETTLED);
    let route = format!("ip route get {}", mesh.pod("east1").v4());
    await_until("the direct route to lead to the new address", SETTLED, || {
        neighbour.host().run(&route).stdout.contains("via 192.0.2.50").then_some(())
    });
    mesh.sniffer.assert_clean();
}

#[test]
fn subnet_env_is_as_flannel_writes_it() {
    let mesh = Mesh::start_on(TwoSites::with_hosts("subnet-env", 1), CONFIG, |meshd| meshd);
    for node in &mesh.nodes {
        let [v4, v6] = node.subnets()[..] else { panic!("one subnet of each family") };
        let text = fs::read_to_string(node.run_dir().join("subnet.env")).unwrap();
        let v4_bridge = text_of_second(&v4);
        let v6_bridge = text_of_second(&v6);
        let expected = format!(
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={v4_bridge}\nFLANNEL_IPV6_NETWORK=fd42:244::/48\n\
             FLANNEL_IPV6_SUBNET={v6_bridge}\nFLANNEL_MTU=1420\nFLANNEL_IPMASQ=true\n"
        );
        assert_eq!(text, expected);
    }
}

/// The address that a bridge takes, with the prefix length.
fn text_of_second(subnet: &ipnet::IpNet) -> String {
    match subnet {
        ipnet::IpNet::V4(net) => {
            format!("{}/{}", std::net::Ipv4Addr::from(u32::from(net.network()) + 1), net.prefix_len())
        }
        ipnet::IpNet::V6(net) => {
            format!("{}/{}", std::net::Ipv6Addr::from(u128::from(net.network()) + 1), net.prefix_len())
        }
    }
}
