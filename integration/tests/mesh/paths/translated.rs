//! Beside programs that rewrite what leaves a host: the rules of kube-proxy, in both of its modes, and of portmap.
//! Probes pass as they are, whether those rules came before the daemon or after it. Rules that take their mark are
//! named.
//!
//! The rules are as these programs write them, with the marks that they write by default.

use std::time::Duration;

use integration::{Host, await_ok, topology::TwoSites};

use super::{CHANGE, Pair, WATCH, watch};

/// kube-proxy's mode iptables, and portmap of the CNI plugins.
const IPTABLES: [&str; 12] = [
    "-N KUBE-POSTROUTING",
    "-A POSTROUTING -m comment --comment kubernetes-postrouting-rules -j KUBE-POSTROUTING",
    "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
    "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000",
    "-A KUBE-POSTROUTING -m comment --comment kubernetes-service-traffic-requiring-SNAT -j MASQUERADE --random-fully",
    "-N KUBE-MARK-MASQ",
    "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
    "-N CNI-HOSTPORT-SETMARK",
    "-A CNI-HOSTPORT-SETMARK -m comment --comment CNI-portfwd-masquerade-mark -j MARK --set-xmark 0x2000/0x2000",
    "-N CNI-HOSTPORT-MASQ",
    "-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE",
    "-A POSTROUTING -m comment --comment CNI-portfwd-requiring-masquerade -j CNI-HOSTPORT-MASQ",
];

/// kube-proxy's mode nftables.
fn nftables(family: &str) -> String {
    format!(
        "table {family} kube-proxy {{
             chain masquerading {{
                 meta mark & 0x00004000 == 0x00000000 return
                 meta mark set meta mark ^ 0x00004000
                 masquerade fully-random
             }}
             chain nat-postrouting {{
                 type nat hook postrouting priority srcnat; policy accept;
                 jump masquerading
             }}
             chain mark-for-masquerade {{
                 meta mark set meta mark | 0x00004000
             }}
         }}"
    )
}

fn by_iptables(host: &Host) {
    for tool in ["iptables-nft", "ip6tables-nft"] {
        for rule in IPTABLES {
            host.run(&format!("{tool} -t nat {rule}"));
        }
        // kubelet drops what is marked so.
        host.run(&format!("{tool} -A OUTPUT -m mark --mark 0x8000/0x8000 -j DROP"));
    }
}

fn by_nftables(host: &Host) {
    for family in ["ip", "ip6"] {
        host.nft(&nftables(family));
    }
}

/// What a router for home use does, and what masquerades whatever is not of the cluster.
fn everything(host: &Host) {
    for family in ["ip", "ip6"] {
        let rule =
            "type nat hook postrouting priority srcnat; policy accept; oifname != \"lo\" udp sport 51821 masquerade";
        host.nft(&format!("table {family} home {{\nchain out {{\n{rule}\n}}\n}}"));
    }
}

/// Connections are forgotten at once: what comes later meets the rules of its time.
fn forget_soon(host: &Host) {
    host.sysctl("net/netfilter/nf_conntrack_udp_timeout", "1");
    host.sysctl("net/netfilter/nf_conntrack_udp_timeout_stream", "1");
}

fn before_the_start(title: &str, rules: fn(&Host)) {
    let sites = TwoSites::new(title);
    sites.east.hosts.iter().for_each(rules);
    let pair = Pair::start_on(sites, |meshd| meshd.site("east"));
    pair.await_direct();
    for (node, other) in pair.ends() {
        let peer = node.await_path(other.name(), "direct", CHANGE);
        assert_eq!(peer["reason"], "", "{peer}");
    }
}

#[test]
fn paths_come_up_beside_kube_proxy_and_portmap_in_iptables() {
    before_the_start("beside-iptables", by_iptables);
}

#[test]
fn paths_come_up_beside_kube_proxy_in_nftables() {
    before_the_start("beside-nftables", by_nftables);
}

#[test]
fn paths_come_up_where_probes_would_be_masqueraded() {
    before_the_start("beside-masquerade", everything);
}

#[test]
fn paths_stay_when_such_rules_come_later() {
    let sites = TwoSites::new("beside-later");
    sites.east.hosts.iter().for_each(forget_soon);
    let pair = Pair::start_on(sites, |meshd| meshd.site("east"));
    pair.await_direct();
    let before = pair.changes();
    for rules in [by_iptables, by_nftables, everything] {
        pair.sites.east.hosts.iter().for_each(rules);
    }
    let traffic = pair.traffic();
    watch(WATCH, || assert_eq!(pair.changes(), before, "the path was left"));
    traffic.finish(Duration::ZERO);
    // And when the daemons start beside all of them.
    for node in &pair.nodes {
        node.restart();
    }
    pair.await_direct();
}

/// As the rules of a router with several uplinks do, which choose one by the packet mark.
#[test]
fn a_rule_that_takes_the_mark_of_probes_is_named_and_its_remedy_brings_the_path_back() {
    let sites = TwoSites::new("mark-taken");
    let host = &sites.east.hosts[0];
    for tool in ["iptables-nft", "ip6tables-nft"] {
        host.run(&format!("{tool} -t mangle -A OUTPUT -p udp -j MARK --set-xmark 0x100/0xff00"));
    }
    let pair = Pair::start_on(sites, |meshd| meshd.site("east"));
    let [node, other] = &pair.nodes;
    let status = node.await_status("both families to be named", CHANGE, |status| {
        status["problems"].as_array().unwrap().iter().filter(|p| p["code"] == "probes_remarked").count() == 2
    });
    let peer = await_ok("the peer to give the cause", CHANGE, || {
        let peer = node.peer(other.name()).unwrap();
        let reason = peer["reason"].as_str().unwrap();
        if reason.contains("rewrites the packet mark of probes") { Ok(peer) } else { Err(peer.to_string()) }
    });
    assert_eq!(peer["path"], "wireguard", "{peer}");
    let doctor = node.meshctl(&["doctor"]);
    assert!(doctor.stdout.contains("chain OUTPUT of table ip mangle"), "{}", doctor.describe());
    for problem in status["problems"].as_array().unwrap().iter().filter(|p| p["code"] == "probes_remarked") {
        pair.sites.east.hosts[0].run_args(&["sh", "-c", problem["remedy"].as_str().unwrap()]);
    }
    pair.await_direct();
    node.await_status("to be well", CHANGE, |status| status["problems"] == serde_json::json!([]));
}
