//! Faults of a machine.
//!
//! ```text
//!   east1 (pod) ── switch ── router ── switch ── west1 (pod)
//! ```

use std::{
    collections::BTreeSet,
    net::{Ipv6Addr, SocketAddrV6},
    process::Command,
};

use integration::{
    CniRuntime, MeshdNode, Router, await_ok,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

use super::{await_gone, await_named, await_well, findings, mends};
use crate::{SOON, mesh};

/// Makes a setting bad until it is named, since the daemon puts it back by itself before long, and does what is said.
#[track_caller]
fn setting_mends(node: &MeshdNode, key: &str, bad: &str, code: &str) {
    let remedy = await_ok(&format!("{code} to be named"), SOON, || {
        node.host().sysctl(key, bad);
        let all = findings(node);
        let found = all.iter().find(|finding| finding["code"] == code);
        found.map(|finding| finding["remedy"].as_str().unwrap().to_owned()).ok_or_else(|| format!("{all:?}"))
    });
    node.host().run_args(&["sh", "-c", &remedy]);
    await_gone(node, code);
}

#[test]
fn firewalls_routes_and_settings() {
    let mesh = mesh("doctor", 1);
    let east1 = mesh.node("east1");
    let host = east1.host();
    await_well(east1);

    host.nft(
        "table inet strict { chain in { type filter hook input priority 0; policy drop; \
         ct state established,related accept; meta l4proto { icmp, icmpv6 } accept; }; }",
    );
    mends(east1, "udp_port_may_be_closed");
    host.nft("delete table inet strict");
    host.run("iptables-nft -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
    host.run("iptables-nft -A INPUT -p tcp --dport 22 -j ACCEPT");
    host.run("iptables-nft -A INPUT -j REJECT");
    mends(east1, "udp_port_may_be_closed");
    assert!(host.run("iptables-nft -S INPUT").stdout.contains("--dport 51820:51821"), "as iptables keeps it");
    host.run("iptables-nft -F INPUT");

    // Outside of every node's subnet.
    let subnets: Vec<_> = mesh.nodes.iter().flat_map(MeshdNode::subnets).map(|subnet| subnet.to_string()).collect();
    let elsewhere = (200..=255).map(|third| format!("10.244.{third}.0/24")).find(|net| !subnets.contains(net));
    let elsewhere = elsewhere.expect("a free subnet");
    host.ip(&[&format!("route add {elsewhere} dev eth0")]);
    mends(east1, "foreign_route");

    // Chains that forward no packet: one without a known owner, and Docker's.
    host.nft("table inet strict { chain forward { type filter hook forward priority 0; policy drop; }; }");
    mends(east1, "foreign_forward_drop");
    mesh.await_all_reach_each_other();
    host.nft("delete table inet strict");
    for line in ["-P FORWARD DROP", "-N DOCKER-USER", "-A FORWARD -j DOCKER-USER"] {
        host.run(&format!("iptables-nft {line}"));
    }
    mends(east1, "foreign_forward_drop");
    mesh.await_all_reach_each_other();
    // Rules that drop the mesh's packets, in chains that do not drop all.
    host.run("iptables-nft -P FORWARD ACCEPT");
    host.run("iptables-nft -F FORWARD");
    for rules in
        [&["-A FORWARD -s 10.244.0.0/16 -j DROP"][..], &["-A FORWARD -j SITE", "-A SITE -i meshd+ -j DROP"][..]]
    {
        host.run("iptables-nft -N SITE");
        for rule in rules {
            host.run(&format!("iptables-nft {}", rule.replace("meshd+", east1.interface())));
        }
        mends(east1, "foreign_forward_drop");
        mesh.await_all_reach_each_other();
        for line in ["-F FORWARD", "-F SITE", "-X SITE"] {
            host.run(&format!("iptables-nft {line}"));
        }
    }

    setting_mends(east1, "net/ipv4/ip_forward", "0", "forwarding_off");
    setting_mends(east1, "net/ipv4/conf/eth0/rp_filter", "1", "rp_filter_strict");
    advertise(&mesh.sites.router, "2001:db8:1::1");
    await_ok("a default route by advertisement", SOON, || {
        let routes = host.run("ip -6 route show default").stdout;
        if routes.contains("proto ra") { Ok(()) } else { Err(routes) }
    });
    setting_mends(east1, "net/ipv6/conf/eth0/accept_ra", "1", "default_route_will_go");

    let file = east1.state_dir().join("cache/store.json");
    let touch = |when: &str| assert!(Command::new("touch").args(["-d", when]).arg(&file).status().unwrap().success());
    await_ok("clock_went_back to be named", SOON, || {
        // The daemon writes there, too.
        touch("+2 hours");
        let all = findings(east1);
        all.iter().any(|finding| finding["code"] == "clock_went_back").then_some(()).ok_or_else(|| format!("{all:?}"))
    });
    touch("now");
    await_well(east1);

    east1.term();
    let (examined, code) = crate::json(east1, &["doctor"]);
    assert_eq!((code, &examined["daemon"]), (3, &false.into()), "{examined}");
    let codes: BTreeSet<&str> =
        examined["findings"].as_array().unwrap().iter().filter_map(|finding| finding["code"].as_str()).collect();
    assert!(codes.contains("daemon_not_reachable"), "{codes:?}");
}

/// Sends a router advertisement from the interface with this address, for an hour of being the default router.
fn advertise(router: &Router, address: &str) {
    let shown = router.run(&format!("ip -o -6 addr show to {address}")).stdout;
    let index: u32 = shown.split(':').next().unwrap().trim().parse().unwrap();
    router.enter(|| {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).unwrap();
        socket.set_multicast_hops_v6(255).unwrap();
        socket.set_multicast_if_v6(index).unwrap();
        // Type 134; hop limit 64, no flags, 3600 s; no timers (RFC 4861, 4.2). The kernel fills in the checksum.
        let message = [134, 0, 0, 0, 64, 0, 0x0e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0];
        let all_nodes = SocketAddrV6::new(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 0, 0, index);
        socket.send_to(&message, &all_nodes.into()).unwrap();
    });
}

#[test]
fn pods_on_a_bridge_that_is_not_filtered() {
    let mesh = mesh("doctor-bridge", 1);
    let east1 = mesh.node("east1");
    let bridge = json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": east1.host_local()});
    let _pod = CniRuntime::new(east1.host(), "1.0.0", &[bridge, east1.cni_plugin(&json!({}))]).pod("bridged");
    await_well(east1);
    east1.host().sysctl("net/bridge/bridge-nf-call-iptables", "0");
    mends(east1, "bridge_not_filtered");
}

#[test]
fn what_the_kernel_or_the_image_lacks() {
    let sites = TwoSites::with_hosts("doctor-lacks", 1);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd.args("--udp-gro off"));
    let east1 = mesh.node("east1");
    let off = await_named(east1, "offload_off");
    assert_eq!(off["severity"], "note");
    assert!(off["cause"].as_str().unwrap().contains("udp_gro"), "{off}");
    await_well(east1);
    let lacking = |how: &str| -> Value {
        let (program, run) = (integration::binary("meshctl"), east1.run_dir());
        let line = format!("{how} {} --run-dir {} -o json doctor", program.display(), run.display());
        let output = east1.host().try_run(&["unshare", "-m", "sh", "-c", &line]);
        serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output.describe()))
    };
    let codes = |examined: &Value| -> BTreeSet<String> {
        let all = examined["findings"].as_array().unwrap();
        all.iter().map(|finding| finding["code"].as_str().unwrap().to_owned()).collect()
    };
    let hidden = "mount -t tmpfs none /usr/sbin && PATH=/usr/bin";
    assert!(codes(&lacking(hidden)).contains("nft_missing"));
    assert!(!codes(&lacking("PATH=/nowhere")).contains("nft_missing"), "it is not the caller's PATH that counts");
    assert!(codes(&lacking("mount -t tmpfs none /dev/net &&")).contains("tun_missing"));
}
