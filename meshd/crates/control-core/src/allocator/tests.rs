use std::collections::BTreeMap;

use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::StdRng};

use etcd_schema::Allocate;

use super::*;

const fn networks(ipv4: Option<Pool<Ipv4Net>>, ipv6: Option<Pool<Ipv6Net>>) -> ClusterNetworks {
    ClusterNetworks { ipv4, ipv6, allocate: Allocate::Mesh }
}

fn pool4(network: &str, len: u8, min: &str, max: &str) -> Pool<Ipv4Net> {
    Pool { network: network.parse().unwrap(), subnet_len: len, min: min.parse().unwrap(), max: max.parse().unwrap() }
}

fn pool6(network: &str, len: u8, min: &str, max: &str) -> Pool<Ipv6Net> {
    Pool { network: network.parse().unwrap(), subnet_len: len, min: min.parse().unwrap(), max: max.parse().unwrap() }
}

fn key(v4: &str, v6: &str) -> SubnetKey {
    SubnetKey { v4: v4.parse().ok(), v6: v6.parse().ok() }
}

#[test]
fn every_free_subnet_is_drawn_about_equally_often() {
    let networks = networks(Some(pool4("10.0.0.0/24", 28, "10.0.0.16/28", "10.0.0.240/28")), None);
    let taken = [key("10.0.0.32/27", ""), key("10.0.0.130/32", ""), key("192.168.0.0/16", "")];
    let mut rng = StdRng::seed_from_u64(7);
    let mut drawn = BTreeMap::<_, u32>::new();
    for _ in 0..12_000 {
        *drawn.entry(choose(&networks, &taken, &mut rng).unwrap()).or_default() += 1;
    }
    // 15 in the pool; the /27 covers two of them, the single address one.
    assert_eq!(drawn.len(), 12);
    assert!(drawn.values().all(|&times| (800..1200).contains(&times)), "{drawn:?}");
}

#[test]
fn a_family_without_room_is_named_with_the_size_of_its_pool() {
    let networks = networks(
        Some(pool4("10.0.0.0/16", 24, "10.0.1.0/24", "10.0.255.0/24")),
        Some(pool6("fd00::/62", 64, "fd00:0:0:1::/64", "fd00:0:0:3::/64")),
    );
    let taken = [key("", "fd00::/62")];
    assert_eq!(
        choose(&networks, &taken, &mut StdRng::seed_from_u64(1)),
        Err(PoolExhausted { family: PoolFamily::V6, total: 3 })
    );
    assert_eq!(usage(&networks, &taken), Usage { total: 3, used: 3 });
    assert_eq!(
        choose(&networks, &[key("0.0.0.0/0", "")], &mut StdRng::seed_from_u64(1)),
        Err(PoolExhausted { family: PoolFamily::V4, total: 255 })
    );
}

#[test]
fn an_enormous_pool_costs_no_more_than_a_small_one() {
    let networks =
        networks(None, Some(pool6("fd00::/8", 126, "fd00::4/126", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:fffc/126")));
    let taken: Vec<_> = (0..5000u32).map(|i| key("", &format!("fd00:{:x}:{:x}::/48", i >> 8, i & 0xff))).collect();
    let mut rng = StdRng::seed_from_u64(3);
    for _ in 0..20 {
        let chosen = choose(&networks, &taken, &mut rng).unwrap();
        assert!(chosen.v4.is_none() && is_free(&networks, &chosen, &taken));
    }
}

#[test]
fn what_fits_has_the_families_the_length_and_the_place_of_the_pool() {
    let dual = networks(
        Some(pool4("10.0.0.0/16", 24, "10.0.1.0/24", "10.0.9.0/24")),
        Some(pool6("fd00::/48", 64, "fd00:0:0:1::/64", "fd00:0:0:9::/64")),
    );
    assert!(fits(&dual, &key("10.0.9.0/24", "fd00:0:0:1::/64")));
    for other in [
        key("10.0.10.0/24", "fd00:0:0:1::/64"),
        key("10.0.0.0/24", "fd00:0:0:1::/64"),
        key("10.0.4.0/25", "fd00:0:0:1::/64"),
        key("10.0.4.0/24", ""),
        key("", "fd00:0:0:1::/64"),
    ] {
        assert!(!fits(&dual, &other), "{other:?}");
    }
}

proptest! {
    /// Against a model that lists the pool and asks each subnet in turn.
    #[test]
    fn the_free_subnets_are_those_of_a_naive_model(
        len in 24u8..=28,
        bounds in (0u32..16, 0u32..16),
        taken in prop::collection::vec((0u32..600, 20u8..=32), 0..12),
        seed: u64,
    ) {
        let size = 1u32 << (32 - len);
        let base = u32::from(std::net::Ipv4Addr::new(10, 0, 0, 0));
        let (low, high) = (bounds.0.min(bounds.1), bounds.0.max(bounds.1));
        let net = |index: u32| Ipv4Net::new((base + index * size).into(), len).unwrap();
        let pool = Pool { network: Ipv4Net::new(base.into(), 20).unwrap(), subnet_len: len, min: net(low), max: net(high) };
        let networks = networks(Some(pool), None);
        // Offsets from 300 below the pool's network to beyond its end.
        let taken: Vec<_> = taken.into_iter()
            .map(|(offset, len)| SubnetKey { v4: Some(Ipv4Net::new((base - 300 + offset).into(), len).unwrap().trunc()), v6: None })
            .collect();

        let free: Vec<_> = (low..=high).map(net)
            .filter(|subnet| !taken.iter().any(|key| {
                let (a, b) = (*subnet, key.v4.unwrap());
                u32::from(a.network()) <= u32::from(b.broadcast()) && u32::from(b.network()) <= u32::from(a.broadcast())
            }))
            .collect();

        let total = u128::from(high - low + 1);
        prop_assert_eq!(usage(&networks, &taken), Usage { total, used: total - free.len() as u128 });
        let mut rng = StdRng::seed_from_u64(seed);
        match choose(&networks, &taken, &mut rng) {
            Ok(chosen) => {
                prop_assert!(free.contains(&chosen.v4.unwrap()));
                prop_assert!(is_free(&networks, &chosen, &taken));
            }
            Err(exhausted) => prop_assert!(free.is_empty() && exhausted.total == total),
        }
        for index in low..=high {
            let key = SubnetKey { v4: Some(net(index)), v6: None };
            prop_assert_eq!(is_free(&networks, &key, &taken), free.contains(&net(index)));
        }
    }
}
