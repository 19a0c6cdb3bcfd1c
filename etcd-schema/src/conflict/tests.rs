use super::*;

const KEY: &str = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";

fn config(value: &str) -> NetworkConfig {
    NetworkConfig::parse(value.as_bytes()).unwrap()
}

fn dual() -> NetworkConfig {
    config(r#"{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd42:244::/48"}"#)
}

fn peer(allowed_ips: &[&str], endpoint: Option<&str>) -> OutsidePeer {
    let value = serde_json::json!({"publicKey": KEY, "allowedIPs": allowed_ips, "endpoint": endpoint});
    OutsidePeer::parse(value.to_string().as_bytes()).unwrap()
}

fn node(key: &str, next: Option<&str>, endpoints: &[&str], addresses: &[&str]) -> NodeRecord {
    let value = serde_json::json!({
        "name": "n", "publicKey": key, "nextPublicKey": next, "listenPort": 51820,
        "endpoints": endpoints, "addresses": addresses,
    });
    NodeRecord::parse(value.to_string().as_bytes()).unwrap()
}

/// The fields that were named, in order.
fn fields(result: Result<impl Sized, Violations>) -> Vec<String> {
    match result {
        Ok(_) => Vec::new(),
        Err(violations) => violations.as_slice().iter().map(|v| v.field.clone()).collect(),
    }
}

#[test]
fn a_peer_keeps_out_of_the_cluster_networks() {
    let judged = |allowed: &[&str], endpoint| fields(peer_conflicts(&peer(allowed, endpoint), &dual()));
    assert!(judged(&["10.245.0.0/16", "192.168.7.0/24", "fd42:245::/48"], Some("192.0.2.1:1")).is_empty());
    assert_eq!(judged(&["192.168.7.0/24", "10.244.3.0/24"], None), ["allowedIPs[1]"]);
    assert_eq!(judged(&["10.0.0.0/8"], None), ["allowedIPs[0]"]);
    assert_eq!(judged(&["fd42:244:0:9::/64", "fd00::/8"][..1], None), ["allowedIPs[0]"]);
    assert_eq!(judged(&["192.168.7.0/24"], Some("10.244.3.5:51820")), ["endpoint"]);
    assert_eq!(judged(&["192.168.7.0/24"], Some("[fd42:244::5]:51820")), ["endpoint"]);
    assert_eq!(judged(&["192.168.7.0/24"], Some("192.168.7.1:51820")), ["endpoint"]);
}

#[test]
fn a_node_is_not_reached_inside_the_mesh() {
    let judged = |endpoints: &[&str], addresses: &[&str]| {
        fields(node_conflicts(&node(KEY, None, endpoints, addresses), &dual()))
    };
    assert!(judged(&["192.0.2.7:51820"], &["192.0.2.7/24"]).is_empty());
    assert_eq!(
        judged(&["192.0.2.7:1", "10.244.3.0:1"], &["10.1.0.1/24", "fd42:244:0:3::1/64"]),
        ["endpoints[1]", "addresses[1]"]
    );
}

#[test]
fn a_config_covers_nothing_that_is_there() {
    let name: PeerName = "laptop".parse().unwrap();
    let laptop = peer(&["192.168.7.0/24", "10.9.0.0/24"], Some("203.0.113.5:51820"));
    let judged =
        |network: &str| config_conflicts(&config(&format!("{{\"Network\": \"{network}\"}}")), [(&name, &laptop)]);
    assert!(judged("10.244.0.0/16").is_ok());
    for (network, thing) in [
        ("10.0.0.0/8", "10.9.0.0/24 of external peer laptop"),
        ("192.168.0.0/16", "192.168.7.0/24 of external peer laptop"),
        ("203.0.113.0/24", "the endpoint 203.0.113.5:51820 of external peer laptop"),
    ] {
        let said = judged(network).unwrap_err().to_string();
        assert_eq!(said, format!("Network is \"{network}\": must not cover {thing}"));
    }
}

#[test]
fn what_may_change_while_subnets_are_leased() {
    let old = dual();
    let leased = ["10.244.3.0-24&fd42:244:0:3::-64", "10.244.9.0-24", "10.99.0.0-24", "10.244.128.0-20"]
        .map(|k| k.parse::<SubnetKey>().unwrap());
    let change = |value: &str| config_change(&old, &config(value), &leased);
    let with = |v4: &str, v6: &str, more: &str| {
        format!("{{\"Network\": \"{v4}\", \"EnableIPv6\": true, \"IPv6Network\": \"{v6}\"{more}}}")
    };

    assert!(change(&with("10.244.0.0/16", "fd42:244::/48", "")).unwrap().is_empty());
    assert_eq!(
        change(&with(
            "10.244.0.0/16",
            "fd42:244::/48",
            r#", "LeaseTTL": 60, "Backend": {"MTU": 1400, "DirectRouting": false, "PersistentKeepalive": 25}"#
        )),
        Ok(ConfigChange {
            live: vec!["Backend.DirectRouting", "Backend.MTU", "Backend.PersistentKeepalive", "LeaseTTL"],
            with_next_subnet: vec![],
        })
    );
    assert_eq!(
        change(&with("10.244.0.0/16", "fd42:244::/48", r#", "Backend": {"Type": "vxlan", "DirectRouting": true}"#)),
        Ok(ConfigChange { live: vec!["Backend.Type"], with_next_subnet: vec![] })
    );
    // Wider is fine, and so is another range to draw from: leased subnets stay.
    let wider = change(&with("10.240.0.0/12", "fd42:244::/47", "")).unwrap();
    assert_eq!(wider.live, ["Network", "SubnetMin", "SubnetMax", "IPv6Network", "IPv6SubnetMax"]);
    let bounds = change(&with("10.244.0.0/16", "fd42:244::/48", r#", "SubnetMin": "10.244.100.0""#)).unwrap();
    assert_eq!(bounds.live, ["SubnetMin"]);

    assert_eq!(fields(change(&with("10.244.0.0/21", "fd42:244::/48", ""))), ["Network"]);
    assert_eq!(fields(change(&with("10.245.0.0/16", "fd43::/48", ""))), ["Network", "Network", "IPv6Network"]);
    assert_eq!(
        fields(change(&with("10.244.0.0/16", "fd42:244::/48", r#", "SubnetLen": 26"#))),
        ["SubnetLen", "SubnetLen"]
    );
    assert_eq!(fields(change(r#"{"Network": "10.244.0.0/16"}"#)), ["EnableIPv6"]);
    // Nobody has a subnet of the family: it goes at once. One that comes waits for the nodes' next subnets.
    let one = config(r#"{"Network": "10.244.0.0/16"}"#);
    let (off, on) = (config_change(&old, &one, &[]).unwrap(), config_change(&one, &old, &leased).unwrap());
    assert_eq!((&off.live[..], &off.with_next_subnet[..]), (&["EnableIPv6"][..], &[][..]));
    assert_eq!((&on.live[..], &on.with_next_subnet[..]), (&[][..], &["EnableIPv6"][..]));
}

const TWO: &str = r#"{"Networks": [{"cidr": "10.244.0.0/16"}, {"cidr": "10.42.0.0/16", "cluster": "west"},
    {"cidr": "fd42:42::/48", "cluster": "west"}]}"#;

#[test]
fn the_networks_of_every_cluster_count() {
    let two = config(TWO);
    let said = |result: Result<(), Violations>| result.unwrap_err().to_string();
    assert_eq!(
        said(peer_conflicts(&peer(&["10.42.3.0/24"], None), &two)),
        "allowedIPs[0] is \"10.42.3.0/24\": must not overlap the network 10.42.0.0/16 of cluster west of config"
    );
    assert_eq!(
        said(peer_conflicts(&peer(&["192.168.7.0/24"], Some("10.42.3.5:51820")), &two)),
        "endpoint is \"10.42.3.5:51820\": must not be inside the network 10.42.0.0/16 of cluster west of config: write \
         an address outside the mesh"
    );
    assert_eq!(
        fields(node_conflicts(&node(KEY, None, &["10.42.3.0:1", "10.244.3.0:1"], &["fd42:42:0:3::1/64"]), &two)),
        ["endpoints[1]", "endpoints[0]", "addresses[0]"]
    );
    let name: PeerName = "laptop".parse().unwrap();
    let laptop = peer(&["10.42.9.0/24"], None);
    assert_eq!(
        said(config_conflicts(&two, [(&name, &laptop)])),
        "Networks is \"10.42.0.0/16\": must not cover 10.42.9.0/24 of external peer laptop"
    );
}

#[test]
fn a_leased_subnet_may_change_its_cluster_and_not_its_network() {
    let two = config(TWO);
    let leased = ["10.244.3.0-24", "10.42.3.0-24&fd42:42:0:3::-64"].map(|k| k.parse::<SubnetKey>().unwrap());
    let from = |old: &NetworkConfig, value: &str| config_change(old, &config(value), &leased);
    let flat = config(r#"{"Network": "10.244.0.0/16"}"#);

    assert_eq!(from(&flat, TWO).unwrap().live, ["Networks"]);
    assert!(from(&two, TWO).unwrap().is_empty());
    let east = TWO.replace(r#"{"cidr": "10.244.0.0/16"}"#, r#"{"cidr": "10.244.0.0/16", "cluster": "east"}"#);
    assert_eq!(from(&two, &east).unwrap().live, ["Networks"]);

    let said = |value: &str| from(&two, value).unwrap_err().to_string();
    assert_eq!(
        said(r#"{"Network": "10.244.0.0/16"}"#),
        "Network is \"10.244.0.0/16\": must cover the leased subnet 10.42.3.0/24; to move the network, remove its nodes \
         first; EnableIPv6 is false: the subnet fd42:42:0:3::/64 is leased: wait until no subnet of this family is leased"
    );
    assert_eq!(
        said(r#"{"Networks": [{"cidr": "10.244.0.0/16"}, {"cidr": "10.43.0.0/16", "cluster": "west"}]}"#),
        "Networks is \"10.244.0.0/16, 10.43.0.0/16\": must cover the leased subnet 10.42.3.0/24; to move the network, \
         remove its nodes first; Networks is without a network of this family: the subnet fd42:42:0:3::/64 is leased: \
         wait until no subnet of this family is leased"
    );
    let shorter = TWO.replace(r#""cidr": "10.42.0.0/16""#, r#""cidr": "10.42.0.0/16", "SubnetLen": 26"#);
    assert_eq!(said(&shorter), "Networks is 26: must stay 24 while the subnet 10.42.3.0/24 is leased");
}
