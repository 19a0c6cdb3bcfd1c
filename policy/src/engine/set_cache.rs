//! Rendered sets of addresses that stay the same while their sources do.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::rules::PeerRef;
use crate::{object::Protocol, set::Set};

/// Sets made before, by what they are made of; dropped when what they are made of changes.
#[derive(Debug, Default)]
pub(crate) struct SetCache {
    pub(crate) made: HashMap<(Vec<PeerRef>, SetOf), Arc<Made>>,
    /// Sets of the engine whose members changed since.
    pub(crate) changed: HashSet<u32>,
    /// Whether networks or nodes changed since.
    pub(crate) everything: bool,
    /// Whether Node objects or selectors of them changed since.
    pub(crate) nodes: bool,
    /// Whether what nodes' overlay addresses count as changed since.
    pub(crate) sources: bool,
}

/// What a set holds of the peers that it is made of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum SetOf {
    /// Those that surely match; `source`: sources of flows, where nodes also count as their other addresses.
    Sure { v4: bool, source: bool },
    /// Those that may match but are not sure to.
    Unsure { v4: bool, source: bool },
    /// All addresses that are known: of pods and nodes.
    Known { v4: bool },
    /// The mesh's networks.
    Mesh { v4: bool },
    /// Those that surely match, or those that only may, with their ports of this name.
    Named { v4: bool, sure: bool, protocol: Option<Protocol>, name: Arc<str> },
}

#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) name: String,
    pub(crate) set: Set,
}
