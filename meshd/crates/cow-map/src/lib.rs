//! An ordered copy-on-write map whose versions share equal chunks. It passes on snapshots of thousands of records, one
//! per change, and finds the differences of two versions quickly.
//!
//! ```text
//! version 1   root ─▶ [ chunk a │ chunk b │ chunk c ]
//!                         ▲                   ▲
//! version 2   root ─▶ [ chunk a │ chunk b' │ chunk c ]        after a change of one key in b
//! ```
//!
//! A clone costs nothing. A change copies the list of chunks and one chunk, of at most `CHUNK` entries. The difference
//! of two versions looks only into chunks that they do not share.

use std::{borrow::Borrow, fmt, ops::Index, sync::Arc};

/// Most entries of a chunk.
const CHUNK: usize = 64;
/// A chunk with fewer is joined with a neighbour, if both fit into half of one.
const SPARSE: usize = CHUNK / 4;

type Chunk<K, V> = Arc<Vec<(K, V)>>;

/// A map in the order of its keys. See the [module](self).
pub struct CowMap<K, V> {
    /// Non-empty chunks in the order of their keys.
    chunks: Arc<Vec<Chunk<K, V>>>,
    len: usize,
}

impl<K, V> Clone for CowMap<K, V> {
    fn clone(&self) -> Self {
        Self { chunks: Arc::clone(&self.chunks), len: self.len }
    }
}

impl<K, V> Default for CowMap<K, V> {
    fn default() -> Self {
        Self { chunks: Arc::default(), len: 0 }
    }
}

impl<K, V> CowMap<K, V> {
    /// Number of entries.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether both are the same version, so that nothing differs. The reverse does not hold.
    #[must_use]
    pub fn ptr_eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.chunks, &other.chunks)
    }

    /// All entries, in the order of their keys.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> + Clone {
        self.chunks.iter().flat_map(|chunk| chunk.iter()).map(|(key, value)| (key, value))
    }

    /// All keys, in order.
    pub fn keys(&self) -> impl DoubleEndedIterator<Item = &K> + Clone {
        self.iter().map(|(key, _)| key)
    }

    /// All values, in the order of their keys.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = &V> + Clone {
        self.iter().map(|(_, value)| value)
    }
}

impl<K: Ord, V> CowMap<K, V> {
    /// The value of `key`.
    #[must_use]
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let chunk = &self.chunks.get(self.chunk_of(key))?;
        let at = position(chunk, key).ok()?;
        Some(&chunk[at].1)
    }

    /// Whether there is a value of `key`.
    #[must_use]
    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// The chunk that holds `key` if any does: the last that begins at or before it, else the first.
    fn chunk_of<Q: Ord + ?Sized>(&self, key: &Q) -> usize
    where
        K: Borrow<Q>,
    {
        self.chunks.partition_point(|chunk| chunk[0].0.borrow() <= key).saturating_sub(1)
    }
}

impl<K: Ord + Clone, V: Clone> CowMap<K, V> {
    /// Puts a value, and returns the one before.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let number = self.chunk_of(&key);
        let chunks = Arc::make_mut(&mut self.chunks);
        let Some(chunk) = chunks.get_mut(number) else {
            chunks.push(Arc::new(vec![(key, value)]));
            self.len = 1;
            return None;
        };
        let chunk = Arc::make_mut(chunk);
        match position(chunk, &key) {
            Ok(at) => Some(std::mem::replace(&mut chunk[at].1, value)),
            Err(at) => {
                chunk.insert(at, (key, value));
                self.len += 1;
                if chunk.len() > CHUNK {
                    // Ordered insertion fills chunks, instead of leaving half of each free.
                    let half = if number + 1 == chunks.len() && at == CHUNK { CHUNK } else { CHUNK / 2 };
                    let rest = Arc::make_mut(&mut chunks[number]).split_off(half);
                    chunks.insert(number + 1, Arc::new(rest));
                }
                None
            }
        }
    }

    /// Takes a value out.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let number = self.chunk_of(key);
        let at = position(self.chunks.get(number)?, key).ok()?;
        let chunks = Arc::make_mut(&mut self.chunks);
        let chunk = Arc::make_mut(&mut chunks[number]);
        let (_, value) = chunk.remove(at);
        self.len -= 1;
        if chunk.is_empty() {
            chunks.remove(number);
        } else if chunk.len() < SPARSE {
            join(chunks, number);
        }
        Some(value)
    }

    /// The value of `key`, to be changed.
    pub fn get_mut<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        let number = self.chunk_of(key);
        let at = position(self.chunks.get(number)?, key).ok()?;
        let chunk = Arc::make_mut(&mut Arc::make_mut(&mut self.chunks)[number]);
        Some(&mut chunk[at].1)
    }

    /// Sets the value of `key`, or removes it (`None`). Returns whether it changed; if not, this stays the same
    /// version.
    pub fn set(&mut self, key: K, value: Option<V>) -> bool
    where
        V: PartialEq,
    {
        if self.get(&key) == value.as_ref() {
            return false;
        }
        match value {
            Some(value) => self.insert(key, value),
            None => self.remove(&key),
        };
        true
    }
}

impl<K: Ord, V: PartialEq> CowMap<K, V> {
    /// The keys whose values differ from `before`, or that only one of both has, in order.
    pub fn changes<'a>(&'a self, before: &'a Self) -> Vec<&'a K> {
        let mut found = Vec::new();
        if self.ptr_eq(before) {
            return found;
        }
        let (mut new, mut old) = (Cursor::new(self), Cursor::new(before));
        loop {
            // Both cursors reach a shared chunk's beginning at the same time: the same keys precede it in both
            // versions.
            while new.at == 0 && old.at == 0 && new.shares_chunk(&old) {
                new.number += 1;
                old.number += 1;
            }
            match (new.entry(), old.entry()) {
                (None, None) => return found,
                (Some((key, _)), None) => {
                    found.push(key);
                    new.step();
                }
                (None, Some((key, _))) => {
                    found.push(key);
                    old.step();
                }
                (Some((key, value)), Some((old_key, old_value))) => match key.cmp(old_key) {
                    std::cmp::Ordering::Less => {
                        found.push(key);
                        new.step();
                    }
                    std::cmp::Ordering::Greater => {
                        found.push(old_key);
                        old.step();
                    }
                    std::cmp::Ordering::Equal => {
                        if value != old_value {
                            found.push(key);
                        }
                        new.step();
                        old.step();
                    }
                },
            }
        }
    }
}

impl<K: Ord, V: PartialEq> PartialEq for CowMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.changes(other).is_empty()
    }
}

impl<K: Ord, V: Eq> Eq for CowMap<K, V> {}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for CowMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Ord + Clone, V: Clone> FromIterator<(K, V)> for CowMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        map.extend(entries);
        map
    }
}

impl<K: Ord + Clone, V: Clone> Extend<(K, V)> for CowMap<K, V> {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, entries: I) {
        for (key, value) in entries {
            self.insert(key, value);
        }
    }
}

impl<K: Ord + Borrow<Q>, Q: Ord + ?Sized, V> Index<&Q> for CowMap<K, V> {
    type Output = V;

    /// The value of `key`.
    ///
    /// # Panics
    /// When there is none.
    #[expect(clippy::expect_used, reason = "what indexing means")]
    fn index(&self, key: &Q) -> &V {
        self.get(key).expect("no entry for this key")
    }
}

/// A place in a version, on the way through it.
struct Cursor<'a, K, V> {
    chunks: &'a [Chunk<K, V>],
    number: usize,
    at: usize,
}

impl<'a, K, V> Cursor<'a, K, V> {
    fn new(map: &'a CowMap<K, V>) -> Self {
        Self { chunks: &map.chunks, number: 0, at: 0 }
    }

    fn entry(&self) -> Option<(&'a K, &'a V)> {
        self.chunks.get(self.number).map(|chunk| (&chunk[self.at].0, &chunk[self.at].1))
    }

    fn step(&mut self) {
        self.at += 1;
        if self.chunks.get(self.number).is_some_and(|chunk| self.at == chunk.len()) {
            (self.number, self.at) = (self.number + 1, 0);
        }
    }

    fn shares_chunk(&self, other: &Self) -> bool {
        match (self.chunks.get(self.number), other.chunks.get(other.number)) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

fn position<K: Ord + Borrow<Q>, Q: Ord + ?Sized, V>(chunk: &[(K, V)], key: &Q) -> Result<usize, usize> {
    chunk.binary_search_by(|(held, _)| held.borrow().cmp(key))
}

/// Joins chunk `number` with a neighbour, if the two leave room for more.
fn join<K: Clone, V: Clone>(chunks: &mut Vec<Chunk<K, V>>, number: usize) {
    let fits = |left: usize| chunks.get(left + 1).is_some_and(|right| chunks[left].len() + right.len() <= CHUNK / 2);
    let Some(left) = [Some(number), number.checked_sub(1)].into_iter().flatten().find(|left| fits(*left)) else {
        return;
    };
    let right = chunks.remove(left + 1);
    Arc::make_mut(&mut chunks[left]).extend(right.iter().cloned());
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn check(map: &CowMap<u16, u8>, model: &BTreeMap<u16, u8>) -> Result<(), TestCaseError> {
        prop_assert!(map.iter().eq(model.iter()));
        prop_assert_eq!(map.len(), model.len());
        prop_assert!(map.chunks.iter().all(|chunk| !chunk.is_empty() && chunk.len() <= CHUNK));
        Ok(())
    }

    proptest! {
        #[test]
        fn agrees_with_the_standard_map_and_tells_what_differs(
            first in proptest::collection::vec((0u16..600, 0u8..3), 0..600),
            then in proptest::collection::vec((0u16..600, proptest::option::of(0u8..3)), 0..400),
        ) {
            let mut map: CowMap<u16, u8> = first.iter().copied().collect();
            let mut model: BTreeMap<u16, u8> = first.into_iter().collect();
            check(&map, &model)?;
            let (before, model_before) = (map.clone(), model.clone());
            for (key, value) in then {
                let old = match value {
                    Some(value) => (map.insert(key, value), model.insert(key, value)),
                    None => (map.remove(&key), model.remove(&key)),
                };
                prop_assert_eq!(old.0, old.1);
                prop_assert_eq!(map.get(&key), model.get(&key));
            }
            check(&map, &model)?;
            check(&before, &model_before)?;
            let differ: Vec<u16> = (0..600).filter(|key| model.get(key) != model_before.get(key)).collect();
            prop_assert!(map.changes(&before).into_iter().eq(&differ));
            prop_assert!(before.changes(&map).into_iter().eq(&differ));
            prop_assert_eq!(map == before, model == model_before);
        }
    }

    #[test]
    fn one_change_copies_one_chunk() {
        let before: CowMap<u32, u32> = (0..5000).map(|number| (number, number)).collect();
        assert!(before.chunks.len() <= 5000 / CHUNK + 1, "what is put in order fills the chunks");
        let mut after = before.clone();
        after.insert(2500, 0);
        let shared = after.chunks.iter().zip(before.chunks.iter()).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
        assert_eq!(shared, before.chunks.len() - 1);
        assert_eq!(after.changes(&before), [&2500]);
        let mut same = after.clone();
        assert!(!same.set(2500, Some(0)) && same.ptr_eq(&after));
        assert!(same.set(2500, None) && !same.contains_key(&2500));
    }

    #[test]
    fn what_is_emptied_keeps_no_sparse_chunks() {
        let mut map: CowMap<u32, u32> = (0..5000).map(|number| (number, number)).collect();
        for number in (0..5000).filter(|number| number % 100 != 0) {
            map.remove(&number);
        }
        assert_eq!(map.len(), 50);
        assert!(map.chunks.len() <= 8, "{}", map.chunks.len());
    }
}
