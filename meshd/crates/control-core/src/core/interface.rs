//! Inputs, effects and initial state of the control plane's state machine.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use etcd_schema::{Cluster, SubnetKey};
use mesh::{
    problem::Problem,
    records::{Records, Revision},
};

use crate::{
    endpoints::EndpointRecords,
    guard::Evidence,
    membership::{Call, CallAnswer, CallId, LocalFacts, Membership, MembershipState},
    objects::ObjectChanges,
    store::{Accepted, CopyState, Store},
    types::{CallError, Committed, Entry, EtcdFailure, KeyListing, Transaction, WatchEvent},
};

/// The number of a connection to etcd; later ones have higher numbers.
pub type SessionNumber = u64;

/// An input of the state machine.
#[derive(Debug)]
pub enum Input {
    /// The start, with the cache's content.
    Started,
    /// A session is open; nothing was read yet.
    Connected {
        /// The member of etcd.
        member: String,
        /// Which session.
        session: SessionNumber,
    },
    /// The session is given up, or none came about.
    Disconnected {
        /// The member.
        member: String,
        /// Why.
        error: EtcdFailure,
    },
    /// All keys at one revision.
    Listed(KeyListing),
    /// Changes of whole revisions, in order.
    Changed(Vec<WatchEvent>),
    /// Every key at one revision, read beside the watch, which has had time to bring all of it.
    Audited {
        /// The keys.
        listing: KeyListing,
        /// Keys that the watch reported as deleted since before the list was asked for.
        deleted_since: BTreeSet<String>,
    },
    /// The answer to [`Effect::Call`]; each gets exactly one, from the session that it was made on.
    Answer(CallId, CallAnswer, SessionNumber),
    /// The answer to [`Effect::WriteEndpoints`]; each gets exactly one.
    EndpointsWritten(Result<Committed, CallError>, SessionNumber),
    /// The answer to [`Effect::LookBack`]; each gets exactly one.
    Earlier(Result<Option<Entry>, CallError>),
    /// This node changed.
    Facts(Box<LocalFacts>),
    /// Whether anything has an address of this node's subnet.
    Attached(bool),
    /// Earlier subnets of this node, without an attached address.
    Idle(BTreeSet<SubnetKey>),
    /// This node's `endpoints/` records; `None`: not known yet.
    EndpointsWanted(Option<EndpointRecords>),
    /// The operator accepts this etcd.
    Accept,
    /// The cache was written, or could not be, in this time.
    CacheWritten(Duration),
    /// A deadline has passed.
    Tick,
}

/// An effect to carry out, in order.
#[derive(Debug)]
pub enum Effect {
    /// Records in force.
    Publish(Arc<Records>),
    /// The status of this node.
    Status(Box<ControlStatus>),
    /// Make this call on the session in use.
    Call(CallId, Call),
    /// Run this transaction on the session in use.
    WriteEndpoints(Transaction),
    /// Read a key at a revision on the session in use.
    LookBack {
        /// The key below the prefix.
        key: String,
        /// The revision.
        at: Revision,
    },
    /// A call went without an answer, or is to be taken for lost: this session is given up, if it is the one in use.
    Suspect(SessionNumber),
    /// Request the list that confirms the last one's missing keys.
    ListAgain,
    /// Changed inputs of policies up to this revision. `complete`: with all earlier ones, the inputs are complete.
    HandOn {
        /// The newest state of each key.
        changes: ObjectChanges,
        /// Up to here.
        revision: Revision,
        /// With all earlier changes, the inputs are complete and may be enforced.
        complete: bool,
    },
    /// Write [`ControlCore::cache`](super::ControlCore::cache) to disk.
    WriteCache,
    /// The next start on this machine is to know that this process holds the identity, or that it does not.
    NoteIdentity(bool),
    /// The answer to [`Input::Accept`].
    Accepted(Accepted),
}

/// This node's status with etcd and in the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlStatus {
    /// Whether a session is open and its list was read.
    pub connected: bool,
    /// The member in use, or used last.
    pub endpoint: Option<String>,
    /// Why there is no connection.
    pub error: Option<String>,
    /// The last revision taken in.
    pub revision: Revision,
    /// Until when everything in etcd was known; `None` while connected, and before the first connection.
    pub known_until: Option<Instant>,
    /// This node's place in the mesh.
    pub state: MembershipState,
    /// The subnet in use: also while etcd is away; `None` before the first and when it is lost.
    pub subnet: Option<SubnetKey>,
    /// Whether this daemon may act as the node, see [`Membership::holds_identity`].
    pub holds_identity: bool,
    /// Problems of this node itself, its connection to etcd among them; those of records are in [`Records::problems`].
    pub problems: Vec<Problem>,
    /// Whether etcd was read, and has never had a Kubernetes object since the start.
    pub no_kubernetes_objects: bool,
    /// How far the copies of Kubernetes clusters are.
    pub copies: BTreeMap<Cluster, CopyState>,
    /// Lists read so far.
    pub lists: u64,
    /// Records that an audit found changed and the watch had not brought: a fault of etcd or of this program.
    pub audit_differences: u64,
}

impl ControlStatus {
    /// How long ago everything in etcd was known; `None` when it never was.
    #[must_use]
    pub fn age(&self, now: Instant) -> Option<Duration> {
        if self.connected {
            Some(Duration::ZERO)
        } else {
            self.known_until.map(|until| now.saturating_duration_since(until))
        }
    }
}

/// The cache for the next start, without its time.
#[derive(Debug)]
pub struct CacheContent {
    /// Revision of etcd that it is of.
    pub revision: Revision,
    /// How long subnets stay leased without a sign of life; `None`: there is no configuration.
    pub lease_ttl: Option<Duration>,
    /// This node's subnet.
    pub subnet: Option<SubnetKey>,
    /// The last good value of every key.
    pub entries: Vec<Entry>,
    /// Evidence about etcd.
    pub evidence: Evidence,
}

/// Initial state of a control plane.
pub struct Start {
    /// Empty, or the cache's content.
    pub store: Store,
    /// This node's.
    pub membership: Membership,
    /// The cache may be acted on.
    pub cache_usable: bool,
    /// Inputs of policies are read and handed on.
    pub hands_on: bool,
}

/// The cache that the start found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheInfo {
    /// How old it was then.
    pub age: Duration,
    /// Whether it may be forwarded by: it is not older than `LeaseTTL`. Otherwise wait for `Records::synced`.
    pub usable: bool,
}
