use std::num::NonZeroU16;

use ipnet::Ipv4Net;

use super::*;
use crate::Pool;

fn parse(value: &str) -> NetworkConfig {
    NetworkConfig::parse(value.as_bytes()).unwrap()
}

fn refusal(value: &str) -> String {
    NetworkConfig::parse(value.as_bytes()).expect_err("must be refused").to_string()
}

/// The networks of a configuration without clusters.
fn flat(config: &NetworkConfig) -> ClusterNetworks {
    *config.of_cluster(&Cluster::default()).unwrap()
}

fn v4(value: &str) -> Pool<Ipv4Net> {
    flat(&parse(value)).ipv4.unwrap()
}

#[test]
fn defaults_are_flannels_where_it_has_some() {
    let config = parse(r#"{"Network": "10.244.0.0/16"}"#);
    assert_eq!(flat(&config).ipv6, None);
    assert_eq!(config.backend, BackendConfig::default());
    assert_eq!(config.lease_ttl, Duration::from_secs(604_800));
    let pool = flat(&config).ipv4.unwrap();
    assert_eq!(pool.subnet_len, 24);
    assert_eq!(pool.min.to_string(), "10.244.1.0/24");
    assert_eq!(pool.max.to_string(), "10.244.255.0/24");
    assert_eq!(pool.subnet_count(), 255);
}

#[test]
fn subnet_len_follows_a_small_network() {
    for (network, len, count) in
        [("10.0.0.0/8", 24, 65535), ("10.244.0.0/22", 24, 3), ("10.244.0.0/23", 25, 3), ("10.244.0.0/28", 30, 3)]
    {
        let pool = v4(&format!("{{\"Network\": \"{network}\"}}"));
        assert_eq!((pool.subnet_len, pool.subnet_count()), (len, count), "{network}");
    }
    for (network, len) in [("fd00::/8", 64), ("fd42::/62", 64), ("fd42::/63", 65), ("fd42::/124", 126)] {
        let value = format!("{{\"EnableIPv4\": false, \"EnableIPv6\": true, \"IPv6Network\": \"{network}\"}}");
        assert_eq!(flat(&parse(&value)).ipv6.unwrap().subnet_len, len, "{network}");
    }
}

#[test]
fn the_widest_pool_is_counted() {
    let config = parse(r#"{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "8000::/2", "IPv6SubnetLen": 126}"#);
    let pool = flat(&config).ipv6.unwrap();
    assert_eq!(pool.subnet_count(), (1 << 124) - 1);
    assert_eq!(pool.subnet(pool.subnet_count() - 1), Some(pool.max));
}

#[test]
fn direct_routing_is_on_with_wireguard_only() {
    for (backend, direct) in [
        (r#"{"Type": "wireguard"}"#, true),
        (r#"{}"#, true),
        (r#"null"#, true),
        (r#"{"Type": "wireguard", "DirectRouting": false}"#, false),
        (r#"{"Type": "vxlan"}"#, false),
        (r#"{"Type": "host-gw", "DirectRouting": true}"#, true),
    ] {
        let config = parse(&format!("{{\"Network\": \"10.244.0.0/16\", \"Backend\": {backend}}}"));
        assert_eq!(config.backend.direct_routing, direct, "{backend}");
    }
}

#[test]
fn mtu_has_a_limit_by_family() {
    let value = |mtu: u32, ipv6: bool| {
        format!(
            "{{\"Network\": \"10.244.0.0/16\", \"EnableIPv6\": {ipv6}, \"IPv6Network\": \"fd42::/48\", \"Backend\": {{\"MTU\": {mtu}}}}}"
        )
    };
    for (mtu, ipv6, good) in [
        (0, false, true),
        (575, false, false),
        (576, false, true),
        (1279, true, false),
        (1280, true, true),
        (65535, true, true),
        (65536, true, false),
    ] {
        assert_eq!(NetworkConfig::parse(value(mtu, ipv6).as_bytes()).is_ok(), good, "{mtu} {ipv6}");
    }
    assert_eq!(parse(&value(0, true)).backend.mtu, None);
}

#[test]
fn flannels_name_of_the_keepalive_is_read() {
    let config = parse(r#"{"Network": "10.244.0.0/16", "Backend": {"PersistentKeepaliveInterval": 25}}"#);
    assert_eq!(config.backend.persistent_keepalive, NonZeroU16::new(25));
    assert!(!String::from_utf8(config.to_json()).unwrap().contains("Interval"));
}

#[test]
fn unknown_fields_stay_where_they_were() {
    let config = parse(
        r#"{"Network": "10.244.0.0/16", "IPv6Network": "as it was", "EnableNFTables": true, "Backend": {"Type": "vxlan", "VNI": 7, "MTU": 1400}}"#,
    );
    let written: Value = serde_json::from_slice(&config.to_json()).unwrap();
    assert_eq!(written["EnableNFTables"], true);
    assert_eq!(written["IPv6Network"], "as it was");
    assert_eq!(written["Backend"]["VNI"], 7);
    assert_eq!(written["Backend"]["MTU"], 1400);
}

#[test]
fn options_of_vxlan_are_read_and_checked() {
    let vxlan = |options: &str| format!(r#"{{"Network": "10.244.0.0/16", "Backend": {{"Type": "vxlan"{options}}}}}"#);
    assert_eq!(parse(&vxlan("")).backend.vxlan, VxlanOptions { vni: 1, port: 8472, gbp: false, learning: false });
    let all = parse(&vxlan(r#", "VNI": 16777215, "Port": 4789, "GBP": true, "Learning": true"#));
    assert_eq!(all.backend.vxlan, VxlanOptions { vni: 0xff_ffff, port: 4789, gbp: true, learning: true });
    assert_eq!(NetworkConfig::parse(&all.to_json()).unwrap().backend, all.backend);
    assert_eq!(parse(&vxlan(r#", "Port": 0"#)).backend.vxlan.port, 8472, "as Flannel reads it");
    for (options, field) in [
        (r#", "VNI": 0"#, "Backend.VNI"),
        (r#", "VNI": 16777216"#, "Backend.VNI"),
        (r#", "Port": 65536"#, "Backend.Port"),
        (r#", "Learning": 1"#, "Backend.Learning"),
    ] {
        assert!(refusal(&vxlan(options)).starts_with(field), "{options}");
    }
}

#[test]
fn an_unknown_option_is_refused_with_the_one_that_it_is_near_to() {
    let refused = refusal(r#"{"Network": "10.244.0.0/16", "Backend": {"DirectRoutin": true}}"#);
    assert!(refused.starts_with("Backend.DirectRoutin is an unknown option: did you mean DirectRouting?"), "{refused}");
    assert!(refusal(r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec"}}"#).starts_with("Backend.Type"));
}

#[test]
fn an_unknown_field_may_be_secret() {
    let config = parse(r#"{"Network": "10.244.0.0/16", "Backend": {"PSK": "c2VjcmV0"}}"#);
    assert!(!format!("{config:?}").contains("c2VjcmV0"));
}

#[test]
fn networks_that_mean_something_else_are_refused() {
    for network in [
        "0.0.0.0/0",
        "0.0.0.0/1",
        "0.0.0.0/8",
        "126.0.0.0/7",
        "127.0.0.0/16",
        "169.254.0.0/16",
        "169.0.0.0/8",
        "224.0.0.0/8",
        "240.0.0.0/8",
        "128.0.0.0/1",
        "10.244.0.0/29",
        "10.244.0.1/16",
        "10.244.0.0",
        "fd42::/48",
        "10.244.0.0/33",
        "",
    ] {
        assert!(refusal(&format!("{{\"Network\": \"{network}\"}}")).starts_with("Network is"), "{network}");
    }
    for network in [
        "::/0",
        "::/8",
        "fe80::/64",
        "fe00::/7",
        "ff00::/8",
        "::ffff:0:0/96",
        "::ffff:10.0.0.0/104",
        "fd42::/125",
        "fd42::1/48",
        "10.0.0.0/8",
    ] {
        let value = format!("{{\"EnableIPv4\": false, \"EnableIPv6\": true, \"IPv6Network\": \"{network}\"}}");
        assert!(refusal(&value).starts_with("IPv6Network is"), "{network}");
    }
}

#[test]
fn lease_ttl_has_limits() {
    for (ttl, good) in
        [("4", false), ("5", true), ("31536000", true), ("31536001", false), ("5.5", false), ("\"5\"", false)]
    {
        let value = format!("{{\"Network\": \"10.244.0.0/16\", \"LeaseTTL\": {ttl}}}");
        assert_eq!(NetworkConfig::parse(value.as_bytes()).is_ok(), good, "{ttl}");
    }
}
