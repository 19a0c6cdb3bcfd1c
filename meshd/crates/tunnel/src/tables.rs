//! Who is who: the peers with their keys and prefixes.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use etcd_schema::PublicKey;
use ipnet::IpNet;
use mesh::tunnel_table::PeerConfig;

use super::{peer::TunnelPeer, peer_index::PeerIndex, prefix::PrefixTable, table::AcceptedClaims};

/// An immutable snapshot of peers and indexes. Snapshots share unchanged parts, and the peers themselves.
#[derive(Default, Clone)]
pub(super) struct Tables {
    /// Owner of each prefix, as a position in `peers`.
    pub(super) prefixes: Arc<PrefixTable<u32>>,
    /// A peer keeps its position; one that went has left a gap, in which a new one takes its place.
    slots: Arc<Vec<Option<PeerSlot>>>,
    gaps: Arc<Vec<u32>>,
    /// Upper 24 bits of our receiver indices to positions in `peers`.
    pub(super) by_index: Arc<HashMap<u32, u32>>,
    pub(super) by_key: Arc<HashMap<PublicKey, (u32, u32)>>,
    by_id: Arc<HashMap<PeerIndex, u32>>,
    by_name: Arc<HashMap<Arc<str>, u32>>,
    pub(super) local: Vec<IpNet>,
    pub(super) overlay: Vec<IpAddr>,
}

/// A peer, with its accepted configuration.
#[derive(Clone)]
struct PeerSlot {
    peer: Arc<TunnelPeer>,
    keys: Arc<[PublicKey]>,
    prefixes: Arc<[IpNet]>,
}

impl Tables {
    /// Whether an inner packet may come out of the tunnel to this address.
    pub(super) fn is_local(&self, address: IpAddr) -> bool {
        self.overlay.contains(&address) || self.local.iter().any(|net| net.contains(&address))
    }

    /// All peers.
    pub(super) fn peers(&self) -> impl Iterator<Item = &Arc<TunnelPeer>> {
        self.with_keys().map(|(peer, _)| peer)
    }

    /// Each peer with its position.
    pub(super) fn positions(&self) -> impl Iterator<Item = (u32, &Arc<TunnelPeer>)> {
        let peers = self.slots.iter().enumerate();
        peers.filter_map(|(position, slot)| Some((position as u32, &slot.as_ref()?.peer)))
    }

    /// The peer at a position.
    pub(super) fn at(&self, position: u32) -> Option<&Arc<TunnelPeer>> {
        self.slot(position).map(|slot| &slot.peer)
    }

    /// The peer called `name`.
    pub(super) fn named(&self, name: &str) -> Option<&Arc<TunnelPeer>> {
        self.by_name.get(name).and_then(|at| self.at(*at))
    }

    /// Each peer with its keys as applied.
    pub(super) fn with_keys(&self) -> impl Iterator<Item = (&Arc<TunnelPeer>, &[PublicKey])> {
        self.slots.iter().flatten().map(|slot| (&slot.peer, &*slot.keys))
    }

    pub(super) fn with_id(&self, id: PeerIndex) -> Option<&Arc<TunnelPeer>> {
        self.by_id.get(&id).and_then(|at| self.at(*at))
    }

    fn slot(&self, position: u32) -> Option<&PeerSlot> {
        self.slots.get(position as usize)?.as_ref()
    }

    pub(super) fn name_at(&self, position: u32) -> Option<String> {
        self.slot(position).map(|slot| slot.peer.name.to_string())
    }

    /// Removes the claims of the peer `name`; the peer stays.
    pub(super) fn unclaim(&mut self, name: &str) {
        let Some(slot) = self.by_name.get(name).and_then(|at| self.slot(*at)).cloned() else { return };
        if !slot.prefixes.is_empty() {
            let prefixes = Arc::make_mut(&mut self.prefixes);
            slot.prefixes.iter().for_each(|prefix| prefixes.remove(prefix));
        }
        let by_key = Arc::make_mut(&mut self.by_key);
        for key in slot.keys.iter() {
            by_key.remove(key);
        }
    }

    /// Takes a peer out whose keys and prefixes were released.
    pub(super) fn remove(&mut self, name: &str) -> Option<Arc<TunnelPeer>> {
        let position = Arc::make_mut(&mut self.by_name).remove(name)?;
        let slot = Arc::make_mut(&mut self.slots).get_mut(position as usize)?.take()?;
        Arc::make_mut(&mut self.gaps).push(position);
        Arc::make_mut(&mut self.by_id).remove(&slot.peer.id);
        let by_index = Arc::make_mut(&mut self.by_index);
        for (index, _) in slot.peer.lock().indices() {
            by_index.remove(&index);
        }
        Some(slot.peer)
    }

    /// The claims of the peer `name`.
    pub(super) fn held(&self, name: &str) -> AcceptedClaims {
        let slot = self.by_name.get(name).and_then(|at| self.slot(*at));
        AcceptedClaims {
            keys: slot.map(|slot| slot.keys.to_vec()).unwrap_or_default(),
            prefixes: slot.map(|slot| slot.prefixes.to_vec()).unwrap_or_default(),
            refused: Vec::new(),
        }
    }

    /// Gives a peer the claims of `config`, and its new `indices`. Unchanged claims cost nothing.
    pub(super) fn claim(
        &mut self,
        peer: &Arc<TunnelPeer>,
        config: &PeerConfig,
        before: &[u32],
        indices: &[(u32, PublicKey)],
    ) {
        let position = match self.by_id.get(&peer.id) {
            Some(position) => *position,
            None => self.insert(peer),
        };
        let keys_held = |(index, key): &(u32, PublicKey)| self.by_key.get(key) == Some(&(position, *index));
        if !indices.iter().all(keys_held) {
            let by_key = Arc::make_mut(&mut self.by_key);
            by_key.extend(indices.iter().map(|(index, key)| (*key, (position, *index))));
        }
        if !indices.iter().map(|(index, _)| index).eq(before) {
            let by_index = Arc::make_mut(&mut self.by_index);
            for index in before {
                by_index.remove(index);
            }
            by_index.extend(indices.iter().map(|(index, _)| (*index, position)));
        }
        if !config.allowed.iter().all(|prefix| self.prefixes.owner(prefix) == Some(position)) {
            let prefixes = Arc::make_mut(&mut self.prefixes);
            for prefix in &config.allowed {
                prefixes.insert(*prefix, position);
            }
        }
        let same = |slot: &PeerSlot| *slot.keys == *config.keys && *slot.prefixes == *config.allowed;
        if !self.slot(position).is_some_and(same)
            && let Some(slot) = &mut Arc::make_mut(&mut self.slots)[position as usize]
        {
            (slot.keys, slot.prefixes) = (config.keys.as_slice().into(), config.allowed.as_slice().into());
        }
    }

    fn insert(&mut self, peer: &Arc<TunnelPeer>) -> u32 {
        let slots = Arc::make_mut(&mut self.slots);
        let gap = if self.gaps.is_empty() { None } else { Arc::make_mut(&mut self.gaps).pop() };
        let position = gap.unwrap_or_else(|| {
            slots.push(None);
            slots.len() as u32 - 1
        });
        let (keys, prefixes) = (Arc::default(), Arc::default());
        slots[position as usize] = Some(PeerSlot { peer: Arc::clone(peer), keys, prefixes });
        Arc::make_mut(&mut self.by_id).insert(peer.id, position);
        Arc::make_mut(&mut self.by_name).insert(Arc::clone(&peer.name), position);
        position
    }
}
