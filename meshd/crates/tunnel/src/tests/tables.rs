//! Successive tables.

use std::{collections::BTreeMap, net::IpAddr, sync::LazyLock, time::Instant};

use etcd_schema::PublicKey;
use keys::PrivateKey;
use mesh::tunnel_table::{PeerConfig, TunnelTable};
use proptest::prelude::*;

use super::harness::{Node, peer, table};
use crate::table::RefusedClaim;

static KEYS: LazyLock<Vec<PrivateKey>> =
    LazyLock::new(|| (1..8).map(|seed| PrivateKey::from_bytes([seed; 32])).collect());

/// Who may be a peer, with which of the keys, with which prefixes, and where.
fn config() -> impl Strategy<Value = PeerConfig> {
    let keys = prop::collection::vec(0usize..7, 1..4);
    let allowed = prop::collection::vec((0u8..6, 23u8..=25), 0..3);
    (0u8..6, keys, allowed, 1u16..3).prop_map(|(name, keys, allowed, port)| PeerConfig {
        keys: keys.iter().map(|key| KEYS[*key].public()).collect(),
        allowed: allowed.iter().map(|(third, len)| format!("10.9.{third}.0/{len}").parse().unwrap()).collect(),
        ..peer(&format!("p{name}"), &KEYS[0], &[], &[&format!("192.0.2.9:{port}")])
    })
}

type Seen = (Vec<RefusedClaim>, BTreeMap<String, Vec<PublicKey>>, Vec<Option<String>>);

/// What a node makes of a table: what it refuses, each peer's keys, and who has which address.
fn seen(node: &mut Node, now: Instant, table: TunnelTable) -> Seen {
    let refused = node.apply(now, table);
    let tables = node.core.tables.get();
    let keys = tables.with_keys().map(|(peer, keys)| (peer.name.to_string(), keys.to_vec())).collect();
    let owner = |third: u8| {
        let at = tables.prefixes.get(IpAddr::from([10, 9, third, 200]))?;
        tables.at(at).map(|peer| peer.name.to_string())
    };
    (refused, keys, (0..8).map(owner).collect())
}

proptest! {
    /// What came before a table makes no difference to who has what under it, and a peer that stays is the same one.
    #[test]
    fn what_came_before_makes_no_difference(
        rounds in prop::collection::vec(prop::collection::vec((config(), any::<bool>()), 1..4), 1..10),
    ) {
        let now = Instant::now();
        let mut node = Node::new(now, "192.0.2.1:1");
        let mut wanted = table(1, Vec::new());
        for changes in rounds {
            for (config, there) in changes {
                if there {
                    wanted.put(config);
                } else {
                    wanted.peers.remove(&config.name);
                }
            }
            let before = node.core.tables.get();
            let kept = seen(&mut node, now, wanted.clone());
            let fresh = seen(&mut Node::new(now, "192.0.2.1:1"), now, wanted.clone());
            prop_assert_eq!(&kept, &fresh);
            for name in kept.1.keys() {
                let (was, is) = (before.named(name).map(|peer| peer.id), node.core.tables.get().named(name).map(|peer| peer.id));
                prop_assert!(was.is_none() || was == is);
            }
            // Every index leads to the peer whose it is, and no other does.
            let tables = node.core.tables.get();
            let mut indices = 0;
            for (peer, _) in tables.with_keys() {
                for (index, _) in peer.lock().indices() {
                    indices += 1;
                    prop_assert_eq!(tables.by_index.get(&index).and_then(|at| tables.at(*at)).map(|peer| peer.id), Some(peer.id));
                }
            }
            prop_assert_eq!(tables.by_index.len(), indices);
        }
    }
}
