//! Containers whose chunks a classifier shares with the engine.
//!
//! A classifier is immutable, and each change creates a new one. Tables are divided into chunks behind `Arc`s: a copy
//! of a table copies the pointers, and a change copies the one affected chunk.

use std::{net::IpAddr, sync::Arc};

/// Entries per piece of a [`Chunked`].
const CHUNK: usize = 64;
/// Slots that the pieces of an [`AddressTable`] have on average when they are split.
const SHARD_SLOTS: usize = 64;

/// A growable array in shared pieces.
#[derive(Debug, Clone)]
pub(crate) struct Chunked<T> {
    chunks: Vec<Arc<[T]>>,
}

impl<T> Default for Chunked<T> {
    fn default() -> Self {
        Self { chunks: Vec::new() }
    }
}

impl<T: Clone + Default> Chunked<T> {
    pub(crate) fn get(&self, index: u32) -> Option<&T> {
        self.chunks.get(index as usize / CHUNK)?.get(index as usize % CHUNK)
    }

    pub(crate) fn set(&mut self, index: u32, value: T) {
        let chunk = index as usize / CHUNK;
        while self.chunks.len() <= chunk {
            self.chunks.push((0..CHUNK).map(|_| T::default()).collect());
        }
        Arc::make_mut(&mut self.chunks[chunk])[index as usize % CHUNK] = value;
    }
}

/// The owner of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Owner {
    /// The class of pods.
    pub(crate) class: u32,
    /// The pod.
    pub(crate) pod: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct AddressSlot {
    /// 0: free.
    key: u128,
    owner: Owner,
}

/// Addresses of pods. One look-up touches one piece at one place.
#[derive(Debug, Clone)]
pub(crate) struct AddressTable {
    shards: Vec<Arc<[AddressSlot]>>,
    len: usize,
}

impl Default for AddressTable {
    fn default() -> Self {
        Self { shards: vec![empty_shard(8)], len: 0 }
    }
}

impl AddressTable {
    pub(crate) fn get(&self, address: IpAddr) -> Option<Owner> {
        let key = key(address);
        let hash = hash(key);
        let shard = &self.shards[hash as usize & (self.shards.len() - 1)];
        let mask = shard.len() - 1;
        let mut at = (hash >> 32) as usize & mask;
        loop {
            let slot = &shard[at];
            if slot.key == key {
                return Some(slot.owner);
            }
            if slot.key == 0 {
                return None;
            }
            at = (at + 1) & mask;
        }
    }

    pub(crate) fn insert(&mut self, address: IpAddr, owner: Owner) {
        let key = key(address);
        if key == 0 {
            return;
        }
        if self.len >= self.shards.len() * SHARD_SLOTS / 2 {
            self.split();
        }
        let at = hash(key) as usize & (self.shards.len() - 1);
        if put(Arc::make_mut(&mut self.shards[at]), key, owner) {
            self.len += 1;
            let used = self.shards[at].iter().filter(|slot| slot.key != 0).count();
            if used * 4 > self.shards[at].len() * 3 {
                let larger = rebuilt(&self.shards[at], self.shards[at].len() * 2, |_| true);
                self.shards[at] = larger;
            }
        }
    }

    pub(crate) fn remove(&mut self, address: IpAddr) {
        let key = key(address);
        let at = hash(key) as usize & (self.shards.len() - 1);
        if self.get(address).is_some() {
            let slots = self.shards[at].len();
            self.shards[at] = rebuilt(&self.shards[at], slots, |slot| slot.key != key);
            self.len -= 1;
        }
    }

    /// Twice as many pieces.
    fn split(&mut self) {
        let count = self.shards.len() * 2;
        let mut shards: Vec<_> = (0..count).map(|_| Vec::new()).collect();
        for slot in self.shards.iter().flat_map(|shard| shard.iter()).filter(|slot| slot.key != 0) {
            shards[hash(slot.key) as usize & (count - 1)].push(*slot);
        }
        self.shards = shards
            .into_iter()
            .map(|slots| {
                let room = (slots.len() * 2).next_power_of_two().max(8);
                rebuilt(&slots, room, |_| true)
            })
            .collect();
    }
}

fn empty_shard(slots: usize) -> Arc<[AddressSlot]> {
    vec![AddressSlot::default(); slots].into()
}

fn rebuilt(from: &[AddressSlot], slots: usize, keep: impl Fn(&AddressSlot) -> bool) -> Arc<[AddressSlot]> {
    let mut shard = vec![AddressSlot::default(); slots];
    for slot in from.iter().filter(|slot| slot.key != 0 && keep(slot)) {
        put(&mut shard, slot.key, slot.owner);
    }
    shard.into()
}

/// Whether the key is new there. There is always a free slot.
fn put(shard: &mut [AddressSlot], key: u128, owner: Owner) -> bool {
    let mask = shard.len() - 1;
    let mut at = (hash(key) >> 32) as usize & mask;
    loop {
        let slot = &mut shard[at];
        if slot.key == key || slot.key == 0 {
            let new = slot.key == 0;
            *slot = AddressSlot { key, owner };
            return new;
        }
        at = (at + 1) & mask;
    }
}

/// IPv4 as IPv4-mapped IPv6; `::` means no address.
fn key(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_ipv6_mapped()),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn hash(key: u128) -> u64 {
    let folded = (key as u64 ^ 0x9e37_79b9_7f4a_7c15) as u128 * ((key >> 64) as u64 ^ 0xd6e8_feb8_6659_fd93) as u128;
    let mixed = (folded as u64) ^ (folded >> 64) as u64;
    let again = u128::from(mixed) * 0xa076_1d64_78bd_642f;
    (again as u64) ^ (again >> 64) as u64
}

/// Values under small numbers that are given out again when they are free.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { items: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub(crate) fn insert(&mut self, value: T) -> u32 {
        if let Some(index) = self.free.pop() {
            self.items[index as usize] = Some(value);
            return index;
        }
        self.items.push(Some(value));
        self.items.len() as u32 - 1
    }

    pub(crate) fn remove(&mut self, index: u32) -> Option<T> {
        let value = self.items.get_mut(index as usize)?.take();
        if value.is_some() {
            self.free.push(index);
        }
        value
    }

    pub(crate) fn get(&self, index: u32) -> Option<&T> {
        self.items.get(index as usize)?.as_ref()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.items.iter().enumerate().filter_map(|(i, item)| Some((i as u32, item.as_ref()?)))
    }

    pub(crate) fn len(&self) -> usize {
        self.items.len() - self.free.len()
    }
}

impl<T> std::ops::Index<u32> for Slab<T> {
    type Output = T;

    /// # Panics
    /// When nothing is there: indexes are held only by what keeps the value alive.
    fn index(&self, index: u32) -> &T {
        self.items[index as usize].as_ref().expect("what holds an index keeps its value")
    }
}

impl<T> std::ops::IndexMut<u32> for Slab<T> {
    fn index_mut(&mut self, index: u32) -> &mut T {
        self.items[index as usize].as_mut().expect("what holds an index keeps its value")
    }
}

/// A number with a flag: members that are sure, and members that may be.
pub(crate) fn mark(index: u32, unknown: bool) -> u32 {
    (index << 1) | u32::from(unknown)
}

pub(crate) const fn marked(mark: u32) -> (u32, bool) {
    (mark >> 1, mark & 1 != 0)
}

/// Adds or changes a mark in a list sorted by number.
pub(crate) fn add_mark(list: &mut Vec<u32>, new: u32) {
    match list.binary_search_by_key(&(new >> 1), |mark| mark >> 1) {
        Ok(at) => list[at] = new,
        Err(at) => list.insert(at, new),
    }
}

pub(crate) fn remove_mark(list: &mut Vec<u32>, index: u32) {
    if let Ok(at) = list.binary_search_by_key(&index, |mark| mark >> 1) {
        list.remove(at);
    }
}

/// Looks up `index` in a sorted list of marks: whether it is in it, and whether only possibly.
pub(crate) fn find_mark(list: &[u32], index: u32) -> Option<bool> {
    // Short lists are searched from the front: no branch is mispredicted more than once.
    if list.len() <= 8 {
        return list.iter().find(|mark| *mark >> 1 == index).map(|mark| mark & 1 != 0);
    }
    list.binary_search_by_key(&index, |mark| mark >> 1).ok().map(|at| list[at] & 1 != 0)
}
