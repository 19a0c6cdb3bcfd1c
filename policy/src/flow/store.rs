//! A flow table of fixed capacity, indexed by key.

use super::tuple::{Key, Seeds};

/// A flow's entry: one cache line.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct FlowEntry {
    pub(super) key: Key,
    /// Of the rules that judged it.
    pub(super) generation: u64,
    /// The owners of its source and destination addresses.
    pub(super) owners: (u32, u32),
    /// Ticks since the table was made; from then on it is as if it were not there. 0: the place is free.
    pub(super) expires: u32,
    /// See the constants.
    pub(super) flags: u16,
}

const _: () = assert!(size_of::<FlowEntry>() == 64);

/// The state's bits.
pub(super) const STATE: u16 = 7;
/// Its source is the key's lower end.
pub(super) const FORWARD: u16 = 1 << 3;
/// A pod of this node began it.
pub(super) const LOCAL: u16 = 1 << 4;
/// Refused: nothing of it passes in either direction.
pub(super) const TOMBSTONE: u16 = 1 << 5;

/// Bits of a slot of the index that say where the entry is. Small slots keep the index in the caches.
const PLACE_BITS: u32 = 24;
const PLACE: u32 = (1 << PLACE_BITS) - 1;

/// Most keys that are fetched at once.
pub(super) const FETCHED: usize = 64;

/// Open addressing with linear probing. Room is reserved at once and used as flows come.
#[derive(Debug)]
pub(super) struct FlowStore {
    /// Upper bits: of the hash. Lower [`PLACE_BITS`]: place of the entry plus one; 0: free.
    index: Vec<u32>,
    entries: Vec<FlowEntry>,
    free: Vec<u32>,
    room: usize,
    seeds: Seeds,
    hand: usize,
    /// Flows by a hash of who began them.
    begun: Box<[u32]>,
    per_source: u32,
}

/// Sources that are counted apart, unless their hashes are the same.
const SOURCES: usize = 16_384;

impl FlowStore {
    pub(super) fn new(room: usize, per_source: u32, seed: u64) -> Self {
        let room = room.clamp(1, PLACE as usize);
        Self {
            index: vec![0; (room * 2).next_power_of_two()],
            entries: Vec::with_capacity(room),
            free: Vec::new(),
            room,
            seeds: Seeds::new(seed),
            hand: 0,
            begun: vec![0; SOURCES].into(),
            per_source,
        }
    }

    pub(super) const fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    #[inline]
    pub(super) fn find(&self, key: &Key) -> Option<u32> {
        let hash = key.hash(&self.seeds);
        let mask = self.index.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = self.index[at];
            if slot == 0 {
                return None;
            }
            let place = (slot & PLACE) - 1;
            if slot & !PLACE == tag(hash) && self.entries[place as usize].key == *key {
                return Some(place);
            }
            at = (at + 1) & mask;
        }
    }

    /// Prefetches the entries that [`find`](Self::find) will read for these keys: their cache misses overlap.
    pub(super) fn fetch(&self, keys: impl Iterator<Item = Key>) {
        let mask = self.index.len() - 1;
        let mut places = [0; FETCHED];
        let mut count = 0;
        for (slot, key) in places.iter_mut().zip(keys) {
            *slot = self.index[key.hash(&self.seeds) as usize & mask] & PLACE;
            count += 1;
        }
        let read = places[..count]
            .iter()
            .map(|slot| self.entries.get((*slot as usize).wrapping_sub(1)).map_or(0, |entry| entry.expires));
        std::hint::black_box(read.fold(0, u32::wrapping_add));
    }

    pub(super) fn get(&self, place: u32) -> &FlowEntry {
        &self.entries[place as usize]
    }

    pub(super) fn get_mut(&mut self, place: u32) -> &mut FlowEntry {
        &mut self.entries[place as usize]
    }

    /// `None`: there is no room, even after a look for expired flows, or its source has begun too many. The key must
    /// not be there yet.
    pub(super) fn insert(&mut self, entry: FlowEntry, now: u32) -> Option<u32> {
        /// Flows that are looked at for one that has expired when a new one finds no room.
        const LOOK: usize = 16;
        if self.len() >= self.room && self.sweep(now, LOOK) == 0 {
            return None;
        }
        let source = self.source(&entry);
        if self.begun[source] >= self.per_source {
            // Some of them may have expired.
            self.sweep(now, LOOK);
            if self.begun[source] >= self.per_source {
                return None;
            }
        }
        self.begun[source] += 1;
        let place = match self.free.pop() {
            Some(place) => {
                self.entries[place as usize] = entry;
                place
            }
            None => {
                self.entries.push(entry);
                self.entries.len() as u32 - 1
            }
        };
        let hash = entry.key.hash(&self.seeds);
        let mask = self.index.len() - 1;
        let mut at = hash as usize & mask;
        while self.index[at] != 0 {
            at = (at + 1) & mask;
        }
        self.index[at] = tag(hash) | (place + 1);
        Some(place)
    }

    pub(super) fn remove(&mut self, place: u32) {
        let mask = self.index.len() - 1;
        let hash = self.entries[place as usize].key.hash(&self.seeds);
        let mut at = hash as usize & mask;
        while self.index[at] & PLACE != place + 1 {
            if self.index[at] == 0 {
                return;
            }
            at = (at + 1) & mask;
        }
        // Whatever was pushed past the gap moves up to it.
        let mut gap = at;
        loop {
            at = (at + 1) & mask;
            let slot = self.index[at];
            if slot == 0 {
                break;
            }
            let home = self.entries[((slot & PLACE) - 1) as usize].key.hash(&self.seeds) as usize & mask;
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(gap) & mask) {
                self.index[gap] = slot;
                gap = at;
            }
        }
        self.index[gap] = 0;
        let source = self.source(&self.entries[place as usize]);
        self.begun[source] = self.begun[source].saturating_sub(1);
        // A free place has expiry 0.
        self.entries[place as usize].expires = 0;
        self.free.push(place);
    }

    /// Removes expired entries among the next `count` places; returns their number.
    pub(super) fn sweep(&mut self, now: u32, count: usize) -> usize {
        let mut removed = 0;
        for _ in 0..count.min(self.entries.len()) {
            self.hand = (self.hand + 1) % self.entries.len();
            let entry = &self.entries[self.hand];
            if entry.expires != 0 && entry.expires <= now {
                self.remove(self.hand as u32);
                removed += 1;
            }
        }
        removed
    }

    /// The place of the flow count of this entry's initiator.
    fn source(&self, entry: &FlowEntry) -> usize {
        entry.key.hash_of_end(entry.flags & FORWARD != 0, &self.seeds) as usize % SOURCES
    }
}

/// The bits of a hash that a slot of the index holds: not those that chose the slot.
const fn tag(hash: u64) -> u32 {
    (hash >> 32) as u32 & !PLACE
}
