use super::*;
use crate::Violations;

fn parse(value: &str) -> Result<NetworkConfig, Violations> {
    NetworkConfig::parse(value.as_bytes())
}

fn refusal(value: &str) -> String {
    parse(value).expect_err("must be refused").to_string()
}

fn cluster(name: &str) -> Cluster {
    name.parse().unwrap()
}

const TWO: &str = r#"{"Networks": [
    {"cidr": "10.244.0.0/16"},
    {"cidr": "10.42.0.0/16", "cluster": "west", "SubnetLen": 25, "SubnetMin": "10.42.8.0"},
    {"cidr": "fd42:42::/48", "cluster": "west"}]}"#;

#[test]
fn each_cluster_has_networks_of_its_own() {
    let config = parse(TWO).unwrap();
    let networks: Vec<String> = config.networks().map(|net| net.to_string()).collect();
    assert_eq!(networks, ["10.244.0.0/16", "10.42.0.0/16", "fd42:42::/48"]);
    let flat = config.of_cluster(&Cluster::default()).unwrap();
    assert_eq!((flat.ipv4.unwrap().subnet_len, flat.ipv6), (24, None));
    let west = config.of_cluster(&cluster("west")).unwrap();
    let pool = west.ipv4.unwrap();
    assert_eq!((pool.subnet_len, pool.min.to_string()), (25, "10.42.8.0/25".to_owned()));
    assert_eq!(west.ipv6.unwrap().subnet_len, 64);
    assert_eq!(config.of_cluster(&cluster("east")), None);
    assert_eq!(NetworkConfig::parse(&config.to_json()).unwrap(), config);
}

#[test]
fn a_subnet_is_of_one_cluster() {
    let config = parse(TWO).unwrap();
    let of = |key: &str| {
        let key: SubnetKey = key.parse().unwrap();
        (config.cluster_around(&key).map(|cluster| cluster.as_str().to_owned()), config.covers(&key))
    };
    assert_eq!(of("10.244.3.0-24"), (Some(String::new()), true));
    assert_eq!(of("10.42.3.0-25&fd42:42:0:3::-64"), (Some("west".into()), true));
    assert_eq!(of("10.42.3.0-24"), (Some("west".into()), false));
    assert_eq!(of("10.244.3.0-24&fd42:42:0:3::-64"), (None, false));
    assert_eq!(of("10.99.3.0-24"), (None, false));
}

/// Every version reads `Network` unless IPv4 is off: without it, and without `EnableIPv4`, one that does not know
/// `Networks` refuses the value. Nothing that such a version would take part of is accepted.
#[test]
fn flannels_fields_have_no_place_beside_it() {
    for field in [
        r#""EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd42:244::/48""#,
        r#""Network": "10.244.0.0/16""#,
        r#""EnableIPv4": true"#,
        r#""SubnetLen": 24"#,
        r#""Allocate": "kubernetes""#,
    ] {
        let value = format!(r#"{{{field}, "Networks": [{{"cidr": "10.42.0.0/16", "cluster": "west"}}]}}"#);
        let said = refusal(&value);
        assert!(said.contains("must not stand beside Networks"), "{said}");
    }
    assert_eq!(
        refusal(r#"{"Network": "10.244.0.0/16", "Networks": [{"cidr": "10.42.0.0/16", "cluster": "west"}]}"#),
        "Network is \"10.244.0.0/16\": must not stand beside Networks: make that network an entry of Networks, \
         {\"cidr\": \"10.244.0.0/16\", \"SubnetLen\": 24} (daemons that do not know Networks then refuse the whole value)"
    );
    let written: Value = serde_json::from_slice(&parse(TWO).unwrap().to_json()).unwrap();
    assert!(super::super::KNOWN.iter().take_while(|name| **name != NETWORKS).all(|name| written.get(name).is_none()));
}

#[test]
fn an_overlap_is_refused_with_field_value_and_remedy() {
    let with = |cidr: &str, cluster: &str| {
        format!(
            r#"{{"Networks": [{{"cidr": "10.42.0.0/16", "cluster": "west"}}, {{"cidr": "{cidr}", "cluster": "{cluster}"}}]}}"#
        )
    };
    assert!(parse(&with("10.43.0.0/16", "east")).is_ok());
    for cidr in ["10.42.0.0/16", "10.42.128.0/20", "10.40.0.0/13"] {
        for other in ["east", "west", ""] {
            assert_eq!(
                refusal(&with(cidr, other)),
                format!(
                    "Networks[1].cidr is \"{cidr}\": must not overlap 10.42.0.0/16 of cluster west (Networks[0]): give \
                     each cluster addresses of its own"
                )
            );
        }
    }
    assert_eq!(
        refusal(&with("10.43.0.0/16", "west")),
        "Networks[1].cidr is \"10.43.0.0/16\": must be the only IPv4 network of cluster west"
    );
}

#[test]
fn an_entry_is_judged_by_its_path() {
    for (entry, field) in [
        (r#"{"cluster": "west"}"#, "Networks[0].cidr is missing"),
        (r#"{"cidr": "10.42.0.0/29"}"#, "Networks[0].cidr is"),
        (r#"{"cidr": "fd42::/125"}"#, "Networks[0].cidr is"),
        (r#"{"cidr": "10.42.0.0/16", "cluster": "West"}"#, "Networks[0].cluster is"),
        (r#"{"cidr": "10.42.0.0/16", "SubnetLen": 17}"#, "Networks[0].SubnetLen is"),
        (r#"{"cidr": "10.42.0.0/16", "SubnetMin": "10.41.0.0"}"#, "Networks[0].SubnetMin is"),
        (r#"{"cidr": "10.42.0.0/16", "Cluster": "west"}"#, "Networks[0].Cluster is"),
        (r#"{"cidr": "10.42.0.0/16", "later": 1}"#, "Networks[0].later is an unknown field"),
        (r#""10.42.0.0/16""#, "Networks[0] is"),
    ] {
        let said = refusal(&format!(r#"{{"Networks": [{entry}]}}"#));
        assert!(said.starts_with(field), "{entry}: {said}");
    }
    assert!(refusal(r#"{"Networks": []}"#).starts_with("Networks is without a network"));
    assert!(refusal(r#"{"networks": [{"cidr": "10.42.0.0/16"}]}"#).contains("write it \"Networks\""));
}

#[test]
fn networks_of_no_cluster_alone_are_written_as_flannel_has_them() {
    let config = parse(r#"{"Networks": [{"cidr": "10.244.0.0/16"}, {"cidr": "fd42:244::/48"}]}"#).unwrap();
    let flannel = parse(r#"{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd42:244::/48"}"#).unwrap();
    assert_eq!(config, flannel);
}

#[test]
fn a_cluster_has_one_way_of_allocation() {
    let with = |more: &str| {
        format!(
            r#"{{"Networks": [{{"cidr": "10.42.0.0/16", "cluster": "west", "Allocate": "kubernetes"}},
                {{"cidr": "fd42:42::/48", "cluster": "west"{more}}}, {{"cidr": "10.244.0.0/16"}}]}}"#
        )
    };
    assert_eq!(
        refusal(&with("")),
        "Networks[1].Allocate is \"mesh\": must be \"kubernetes\", as in the other entry of cluster west"
    );
    let config = parse(&with(r#", "Allocate": "kubernetes""#)).unwrap();
    let by_kubernetes: Vec<bool> = config.clusters.values().map(|of| of.allocate == Allocate::Kubernetes).collect();
    assert_eq!(by_kubernetes, [false, true]);
    assert_eq!(NetworkConfig::parse(&config.to_json()).unwrap(), config);
    // A podCIDR may have any length, and one family of two; elsewhere SubnetLen holds.
    for (key, may) in [
        ("10.42.3.0-24", true),
        ("10.42.3.0-27", true),
        ("fd42:42:0:3::-80", true),
        ("10.42.3.0-25&fd42:42:0:3::-64", true),
        ("10.43.3.0-24", false),
        ("10.244.3.0-24", true),
        ("10.244.3.0-25", false),
    ] {
        assert_eq!(config.covers(&key.parse().unwrap()), may, "{key}");
    }
    let flat = parse(r#"{"Network": "10.42.0.0/16", "Allocate": "kubernetes"}"#).unwrap();
    assert!(flat.covers(&"10.42.3.0-27".parse().unwrap()));
    assert_eq!(NetworkConfig::parse(&flat.to_json()).unwrap(), flat);
    assert!(refusal(r#"{"Network": "10.42.0.0/16", "Allocate": "Kubernetes"}"#).starts_with("Allocate is"));
}
