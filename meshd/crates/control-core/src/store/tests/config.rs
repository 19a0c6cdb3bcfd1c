//! Configurations that wait, and those that are refused.

use super::*;

#[test]
fn a_config_that_leaves_leased_subnets_outside_waits_for_them() {
    let now = Instant::now();
    let mut source = mesh(1);
    let mut store = listed(&source, now);
    let old = store.records().config.clone().unwrap();
    for worse in [
        r#"{"Network": "10.9.0.0/16", "LeaseTTL": 60}"#,
        r#"{"Network": "10.0.0.0/16", "SubnetLen": 26, "LeaseTTL": 60}"#,
        r#"{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00::/48", "LeaseTTL": 60}"#,
    ] {
        store.changed(now, vec![source.put("config", worse)]);
        let records = store.records();
        assert!(Arc::ptr_eq(&records.config.as_ref().unwrap().value, &old.value), "{worse}");
        assert_eq!(codes(&records), [ProblemCode::ConfigRefused], "{worse}");
        // A node that comes now, with or without memory, does not take it either.
        assert_eq!(listed(&source, now).records().config, None);
        let mut again = restarted(&store, now);
        again.on_list(now, source.list());
        assert_eq!(again.records().config.as_ref().unwrap().value, old.value);
    }
    store.changed(now, vec![source.delete("config")]);
    assert_eq!(codes(&store.records()), [ProblemCode::ConfigRefused]);
    store.changed(now, vec![source.put("config", r#"{"Network": "10.0.0.0/15", "LeaseTTL": 90}"#)]);
    assert_eq!(store.records().config.as_ref().unwrap().value.lease_ttl, Duration::from_secs(90));
    assert!(store.records().problems.is_empty());

    store.changed(now, vec![source.put("config", r#"{"Network": "10.9.0.0/16"}"#)]);
    store.changed(now, vec![source.delete("subnets/10.0.0.0-24")]);
    let network = ipv4(&store.records()).unwrap();
    assert_eq!(network, "10.9.0.0/16".parse().unwrap());
    assert!(store.records().problems.is_empty());
}

/// Whatever else the cache holds, the configuration in it was in force: without it a start would have no fallback
/// routes.
#[test]
fn a_config_in_force_stays_in_force_after_a_restart_beside_a_subnet_outside_of_it() {
    let now = Instant::now();
    let mut source = mesh(2);
    let mut store = listed(&source, now);
    store.changed(now, vec![source.put("subnets/10.200.0.0-24", &lease("b"))]);
    let before = store.records().config.clone().expect("a configuration");
    let after = restarted(&store, now).records().config.clone().expect("a configuration");
    assert_eq!(after.value, before.value);
}

#[test]
fn a_config_that_would_cut_off_a_node_waits_for_it() {
    let now = Instant::now();
    let mut source = mesh(1);
    let record = node("z").replace(r#""endpoints": []"#, r#""endpoints": ["10.42.0.7:51820"]"#);
    source.put("nodes/z", &record);
    let mut store = listed(&source, now);
    let config = |cidr: &str| {
        format!(
            r#"{{"Networks": [{{"cidr": "10.0.0.0/16"}}, {{"cidr": "{cidr}", "cluster": "west"}}], "LeaseTTL": 60}}"#
        )
    };
    store.changed(now, vec![source.put("config", &config("10.42.0.0/16"))]);
    let records = store.records();
    assert_eq!(codes(&records), [ProblemCode::ConfigRefused]);
    assert!(records.problems[0].cause.contains("cut off node") && records.problems[0].cause.contains("10.42.0.7"));
    assert_eq!(records.config.as_ref().unwrap().value.networks().count(), 1, "the previous one stays");
    store.changed(now, vec![source.put("config", &config("10.43.0.0/16"))]);
    assert!(store.records().problems.is_empty());
    // One that was written after it yields to it.
    source.put("config", &config("10.44.0.0/16"));
    source.put("nodes/z", &record.replace("10.42.0.7", "10.44.0.7"));
    store.on_list(now, source.list());
    assert_eq!(store.records().config.as_ref().unwrap().value.networks().nth(1), "10.44.0.0/16".parse().ok());
}

#[test]
fn a_config_that_covers_an_accepted_outside_peer_waits_for_it() {
    let now = Instant::now();
    let mut source = mesh(1);
    source.put("peers/p", &value("peers/p", 0));
    let mut store = listed(&source, now);
    let old = store.records().config.clone().unwrap();
    let wide = r#"{"Network": "10.0.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48", "LeaseTTL": 60}"#;
    // A peer that never was accepted is no reason against anything.
    store.changed(now, vec![source.put("peers/refused", &value("peers/p", 1).replace("198.18.0.0/24", "10.0.9.0/24"))]);
    store.changed(now, vec![source.put("config", wide)]);
    assert!(store.records().problems.is_empty());
    let covering = r#"{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00::/48"}"#;
    store.changed(now, vec![source.delete("subnets/10.0.0.0-24"), source.put("config", covering)]);
    assert!(ipv4(&store.records()).is_none());
    let covering = r#"{"Network": "198.18.0.0/16", "LeaseTTL": 60}"#;
    store.changed(now, vec![source.put("config", covering)]);
    let records = store.records();
    assert_ne!(records.config, Some(old));
    assert!(ipv4(&records).is_none(), "the previous one stays");
    assert_eq!(codes(&records), [ProblemCode::ConfigRefused]);
    assert!(records.problems[0].cause.contains("external peer p"), "{:?}", records.problems[0]);
    // A node that saw all of it at once, with the same configuration before, says the same.
    let mut again = from_cache(store.revision() - 1, store.cached().collect(), now);
    again.on_list(now, source.list());
    assert_eq!(again.records().config, records.config);
    // A first start takes it: there it is the peer that is refused.
    assert!(listed(&source, now).records().config.is_some());
    // The peer goes, and the configuration that waits is taken.
    let records = store.changed(now, vec![source.delete("peers/p")]).unwrap();
    assert!(records.problems.is_empty());
    assert_eq!(ipv4(&records).unwrap(), "198.18.0.0/16".parse().unwrap());
    // A peer that was written after it yields to it.
    source.put("config", r#"{"Network": "172.20.0.0/16", "LeaseTTL": 60}"#);
    source.put("peers/late", &value("peers/p", 0).replace("198.18.0.0/24", "172.20.1.0/24"));
    let records = store.on_list(now, source.list()).unwrap();
    assert_eq!(ipv4(&records).unwrap(), "172.20.0.0/16".parse().unwrap());
}

/// With leased subnets, a network goes to a cluster and none goes away.
#[test]
fn networks_of_clusters_come_beside_those_that_are_leased() {
    let (mut source, now) = (Source::default(), Instant::now());
    source.put("config", r#"{"Network": "10.0.0.0/16"}"#);
    source.put("subnets/10.0.1.0-24", &value("subnets/x", 1));
    let mut store = listed(&source, now);
    let two = r#"{"Networks": [{"cidr": "10.0.0.0/16"}, {"cidr": "10.42.0.0/16", "cluster": "west"}]}"#;
    store.changed(now, vec![source.put("config", two)]);
    assert!(store.records().problems.is_empty());
    store.changed(now, vec![source.put("subnets/10.42.7.0-24", &value("subnets/x", 1))]);
    let east = two.replace(r#""10.0.0.0/16""#, r#""10.0.0.0/16", "cluster": "east""#);
    store.changed(now, vec![source.put("config", &east)]);
    assert!(store.records().problems.is_empty());
    for without in [
        r#"{"Network": "10.0.0.0/16"}"#,
        r#"{"Networks": [{"cidr": "10.0.0.0/16"}, {"cidr": "10.42.128.0/17", "cluster": "west"}]}"#,
        r#"{"Networks": [{"cidr": "10.0.0.0/16"}, {"cidr": "10.42.0.0/15", "cluster": "a"}, {"cidr": "10.43.0.0/16"}]}"#,
    ] {
        store.changed(now, vec![source.put("config", without)]);
        assert_eq!(store.records().config.as_ref().unwrap().value.networks().count(), 2, "{without}");
        assert!(!store.records().problems.is_empty(), "{without}");
    }
}

#[test]
fn a_block_that_was_given_up_is_no_reason_against_a_config() {
    let (mut source, now) = (Source::default(), Instant::now());
    source.put("config", r#"{"Network": "10.0.0.0/16"}"#);
    source.put("subnets/10.0.1.0-24", &value("subnets/x", 1));
    source.put("subnets/10.0.2.0-24", r#"{"Freed": {"cluster": "east", "at": 7}}"#);
    let mut store = listed(&source, now);
    store.changed(now, vec![source.put("config", r#"{"Network": "10.1.0.0/16"}"#)]);
    let cause = store.records().problems[0].cause.clone();
    assert!(cause.contains("10.0.1.0/24") && !cause.contains("10.0.2.0/24"), "{cause}");
}

#[test]
fn a_backend_that_is_not_there_is_refused() {
    let now = Instant::now();
    let udp = r#"{"Network": "10.0.0.0/16", "Backend": {"Type": "udp"}, "LeaseTTL": 60}"#;
    let mut source = mesh(1);
    let mut store = listed(&source, now);
    let old = store.records().config.clone();
    let records = store.changed(now, vec![source.put("config", udp)]).unwrap();
    assert_eq!(records.config, old);
    assert_eq!(codes(&records), [ProblemCode::ConfigRefused]);
    let first = listed(&source, now).records();
    assert_eq!(first.config, None);
    let problem = &first.problems[0];
    assert!(problem.cause.contains("udp") && problem.cause.contains("there is no earlier one"), "{problem:?}");
    assert!(problem.remedy.contains("wireguard"), "{problem:?}");
}
