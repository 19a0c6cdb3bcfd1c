//! One connection to one etcd member, and the few calls that meshd makes on it.
//!
//! The client crate's own balancer is not used: it considers a dead endpoint idle and prefers it. A session has exactly
//! one member. If a call gets no answer, its owner replaces it by a session with another member (see `watcher`). Every
//! call has a deadline of `CALL_DEADLINE`.

mod dialer;
mod failure;

use std::{fmt, future::Future, sync::Arc, time::Duration};

use control_core::types::{
    CallError, ClusterId, Committed, Compare, Entry, Granted, KeyListing, Transaction, WatchEvent, Write,
};
use etcd_client::{
    Client, Compare as EtcdCompare, CompareOp, DeleteOptions, Error, EventType, GetOptions, PutOptions, Txn, TxnOp,
    WatchOptions, WatchResponse, WatchStream,
};
use mesh::records::{LeaseId, Revision};

pub(crate) use self::dialer::ConnectionFiles;
pub use self::dialer::{Dialer, NoMember, OpenError};
use self::failure::{CallFailure, bounded, classify, within_deadline};
use super::etcd_options::EtcdMember;

/// How long a call may take before the member counts as gone.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// Keys asked for at once in a list.
const PAGE: i64 = 500;

/// Longest message taken from etcd. A page of values that is longer is asked for again in halves; a batch of
/// watch events that is longer ends the watch, and the list that follows starts behind it.
const MAX_MESSAGE: usize = 32 << 20;

/// A connection to one member. Cheap to clone; clones share the connection.
#[derive(Clone)]
pub struct Session {
    client: Client,
    member: EtcdMember,
    prefix: Arc<str>,
    generation: u64,
}

/// A watch on every key below the prefix.
pub struct Watch {
    stream: WatchStream,
    prefix: Arc<str>,
    /// The cluster that the list before it came from.
    cluster: Option<ClusterId>,
}

/// What a watch brings.
#[derive(Debug)]
pub(crate) enum WatchMessage {
    /// Events of one or more whole revisions, in order.
    Events(Vec<WatchEvent>),
    /// A sign of life without events.
    Progress,
    /// The history that was asked for is compacted: list again.
    Compacted,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("member", &self.member)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// The member it speaks to.
    #[must_use]
    pub const fn member(&self) -> &EtcdMember {
        &self.member
    }

    /// The number given when it was opened.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// Every key below the prefix. Linearizable.
    ///
    /// # Errors
    /// When etcd does not answer or refuses.
    pub async fn list(&self) -> Result<KeyListing, CallError> {
        self.list_below("").await
    }

    /// The keys that start with `prefix` (below the session's own). Linearizable; as long as it takes, in pages.
    ///
    /// # Errors
    /// When etcd does not answer or refuses.
    pub async fn list_below(&self, prefix: &str) -> Result<KeyListing, CallError> {
        let range = range_of(self.full(prefix));
        loop {
            match self.list_at_one_revision(range.clone()).await? {
                Some(listed) => return Ok(listed),
                // The revision was compacted between two pages.
                None => continue,
            }
        }
    }

    /// What `key` held at `revision`; `None` when it was not there, or when etcd no longer keeps that revision.
    ///
    /// # Errors
    /// When etcd does not answer or refuses.
    pub(crate) async fn get_at(&self, key: &str, revision: Revision) -> Result<Option<Entry>, CallError> {
        let full = self.full(key);
        let answer = self
            .authenticated(|client| {
                let full = full.clone();
                async move {
                    let options = GetOptions::new().with_revision(revision);
                    client.kv_client().max_decoding_message_size(MAX_MESSAGE).get(full, Some(options)).await
                }
            })
            .await;
        match answer {
            Ok(mut answer) => Ok(answer.take_kvs().into_iter().next().map(|kv| entry(&self.prefix, kv))),
            Err(failure) if failure.is_compacted() => Ok(None),
            Err(failure) => Err(classify(failure)),
        }
    }

    /// Runs a transaction.
    ///
    /// # Errors
    /// [`CallError::Indeterminate`] when it may have happened all the same.
    pub async fn transact(&self, transaction: &Transaction) -> Result<Committed, CallError> {
        let txn = self.txn(transaction);
        let answer = self
            .authenticated(|mut client| {
                let txn = txn.clone();
                async move { client.txn(txn).await }
            })
            .await
            .map_err(classify)?;
        Ok(Committed {
            succeeded: answer.succeeded(),
            revision: answer.header().map_or(0, etcd_client::ResponseHeader::revision),
        })
    }

    /// A new lease of at least `ttl`, in whole seconds.
    ///
    /// # Errors
    /// When etcd does not answer or refuses.
    pub async fn grant(&self, ttl: Duration) -> Result<Granted, CallError> {
        let seconds = i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX);
        let answer = self
            .authenticated(|mut client| async move { client.lease_grant(seconds, None).await })
            .await
            .map_err(classify)?;
        LeaseId::new(answer.id())
            .map(|lease| Granted { lease, ttl: whole_seconds(answer.ttl()) })
            .ok_or_else(|| CallError::Refused("etcd granted a lease without an id".into()))
    }

    /// Renews a lease, and tells its full time to live.
    ///
    /// # Errors
    /// [`CallError::LeaseNotFound`] when it has run out.
    pub async fn keep_alive(&self, lease: LeaseId) -> Result<Granted, CallError> {
        let renewed = self
            .authenticated(|mut client| async move {
                let (mut keeper, mut stream) = client.lease_keep_alive(lease.get()).await?;
                // The client crate keeps the first answer to itself; the second one tells the TTL.
                keeper.keep_alive().await?;
                stream.message().await
            })
            .await;
        match renewed {
            Ok(Some(answer)) if answer.ttl() > 0 => Ok(Granted { lease, ttl: whole_seconds(answer.ttl()) }),
            Ok(Some(_)) => Err(CallError::LeaseNotFound),
            Ok(None) => Err(CallError::Indeterminate("the keepalive stream ended".into())),
            Err(CallFailure::Etcd(Error::LeaseKeepAliveError(reason))) if reason.contains("not found") => {
                Err(CallError::LeaseNotFound)
            }
            Err(failure) => Err(classify(failure)),
        }
    }

    /// The version of the member's etcd.
    ///
    /// # Errors
    /// When etcd does not answer or refuses.
    pub async fn version(&self) -> Result<String, CallError> {
        let answered = self.authenticated(|mut client| async move { client.status().await }).await.map_err(classify)?;
        Ok(answered.version().to_owned())
    }

    /// A watch on every key below the prefix, from `from` on, of the `cluster` that was listed.
    ///
    /// Fragments are not asked for: the client crate does not tell which message is the last of a revision, and a
    /// transaction must not be made on half of one.
    ///
    /// # Errors
    /// When etcd does not answer or refuses.
    pub async fn watch(&self, from: Revision, cluster: Option<ClusterId>) -> Result<Watch, CallError> {
        let (start, end) = range_of(self.full(""));
        let stream = self
            .authenticated(|client| {
                let (start, end) = (start.clone(), end.clone());
                async move {
                    let options = WatchOptions::new().with_range(end).with_start_revision(from).with_progress_notify();
                    client.watch_client().max_decoding_message_size(MAX_MESSAGE).watch(start, Some(options)).await
                }
            })
            .await
            .map_err(classify)?;
        Ok(Watch { stream, prefix: Arc::clone(&self.prefix), cluster })
    }

    async fn list_at_one_revision(
        &self,
        (mut start, end): (Vec<u8>, Vec<u8>),
    ) -> Result<Option<KeyListing>, CallError> {
        let mut listing = KeyListing::default();
        let mut limit = PAGE;
        loop {
            let revision = listing.revision;
            let page = self
                .authenticated(|client| {
                    let (start, end) = (start.clone(), end.clone());
                    async move {
                        let options = GetOptions::new().with_range(end).with_limit(limit).with_revision(revision);
                        client.kv_client().max_decoding_message_size(MAX_MESSAGE).get(start, Some(options)).await
                    }
                })
                .await;
            let mut page = match page {
                Ok(page) => page,
                Err(failure) if failure.is_too_long() && limit > 1 => {
                    limit /= 2;
                    continue;
                }
                Err(failure) if failure.is_compacted() && revision > 0 => return Ok(None),
                Err(failure) => return Err(classify(failure)),
            };
            let cluster = page.header().and_then(|header| ClusterId::new(header.cluster_id()));
            if revision == 0 {
                listing.revision = page.header().map_or(0, etcd_client::ResponseHeader::revision);
                listing.cluster = cluster;
            }
            same_cluster(listing.cluster, cluster)?;
            let more = page.more();
            let kvs = page.take_kvs();
            if let Some(last) = kvs.last() {
                start = last.key().to_vec();
                start.push(0);
            }
            let empty = kvs.is_empty();
            listing.entries.extend(kvs.into_iter().map(|kv| entry(&self.prefix, kv)));
            if !more || empty {
                return Ok(Some(listing));
            }
        }
    }

    /// Runs a call within its deadline; when etcd no longer knows the token, once more with a new one. A call that
    /// is refused for its token has done nothing, so repeating it is safe for writes too.
    async fn authenticated<T, F>(&self, call: impl Fn(Client) -> F) -> Result<T, CallFailure>
    where
        F: Future<Output = Result<T, Error>>,
    {
        match bounded(call(self.client.clone())).await {
            Err(failure) if failure.is_stale_token() => {
                bounded(self.client.refresh_token()).await?;
                bounded(call(self.client.clone())).await
            }
            result => result,
        }
    }

    fn txn(&self, transaction: &Transaction) -> Txn {
        let compares: Vec<_> = transaction
            .compares
            .iter()
            .map(|compare| match compare {
                Compare::ModRevision { key, equals } => {
                    EtcdCompare::mod_revision(self.full(key), CompareOp::Equal, *equals)
                }
                Compare::CreateRevision { key, equals } => {
                    EtcdCompare::create_revision(self.full(key), CompareOp::Equal, *equals)
                }
                Compare::AllModifiedBefore { prefix, revision } => {
                    EtcdCompare::mod_revision(self.full(prefix), CompareOp::Less, *revision).with_prefix()
                }
            })
            .collect();
        let writes: Vec<_> = transaction
            .writes
            .iter()
            .map(|write| match write {
                Write::Put { key, value, lease } => {
                    let options = PutOptions::new().with_lease(lease.map_or(0, LeaseId::get));
                    TxnOp::put(self.full(key), value.clone(), Some(options))
                }
                Write::Delete { key } => TxnOp::delete(self.full(key), None::<DeleteOptions>),
            })
            .collect();
        Txn::new().when(compares).and_then(writes)
    }

    fn full(&self, key: &str) -> String {
        format!("{}/{key}", self.prefix)
    }
}

impl Watch {
    /// Waits for the next message.
    pub(crate) async fn message(&mut self) -> Result<WatchMessage, CallError> {
        let message = self.stream.message().await.map_err(|error| classify(error.into()))?;
        let Some(message) = message else {
            return Err(CallError::Indeterminate("the watch ended".into()));
        };
        same_cluster(self.cluster, message.header().and_then(|header| ClusterId::new(header.cluster_id())))?;
        if message.compact_revision() > 0 {
            return Ok(WatchMessage::Compacted);
        }
        if message.canceled() {
            let reason = format!("the watch was cancelled: {}", message.cancel_reason());
            return Err(CallError::Refused(reason.as_str().into()));
        }
        let events = self.events(&message)?;
        Ok(if events.is_empty() { WatchMessage::Progress } else { WatchMessage::Events(events) })
    }

    /// Asks for a sign of life; it comes as [`WatchMessage::Progress`].
    pub(crate) async fn request_progress(&mut self) -> Result<(), CallError> {
        within_deadline(self.stream.request_progress()).await
    }

    fn events(&self, message: &WatchResponse) -> Result<Vec<WatchEvent>, CallError> {
        message
            .events()
            .iter()
            .map(|event| {
                let kv = event.kv().ok_or_else(|| CallError::Refused("watch event without a key".into()))?;
                Ok(match event.event_type() {
                    EventType::Put => WatchEvent::Put(entry(&self.prefix, kv.clone())),
                    EventType::Delete => {
                        WatchEvent::Delete { key: relative(&self.prefix, kv.key()), revision: kv.mod_revision() }
                    }
                })
            })
            .collect()
    }
}

/// What one session brings must come from one cluster: behind a proxy there may be several.
pub(super) fn same_cluster(first: Option<ClusterId>, now: Option<ClusterId>) -> Result<(), CallError> {
    match (first, now) {
        (Some(first), Some(now)) if first != now => {
            let other = format!("etcd cluster {now} answered instead of {first}");
            Err(CallError::Indeterminate(other.as_str().into()))
        }
        _ => Ok(()),
    }
}

/// From the first key that starts with `prefix` to the first that no longer does.
fn range_of(prefix: String) -> (Vec<u8>, Vec<u8>) {
    let start = prefix.into_bytes();
    let mut end = start.clone();
    // Ours are ASCII, whose last byte has a successor.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    (start, end)
}

fn whole_seconds(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

fn entry(prefix: &str, kv: etcd_client::KeyValue) -> Entry {
    let (create_revision, mod_revision, lease) = (kv.create_revision(), kv.mod_revision(), kv.lease());
    let (key, value) = kv.into_key_value();
    Entry {
        key: relative(prefix, &key),
        value: value.into(),
        create_revision,
        mod_revision,
        lease: LeaseId::new(lease),
    }
}

fn relative(prefix: &str, key: &[u8]) -> String {
    let key = key.get(prefix.len() + 1..).unwrap_or_default();
    match std::str::from_utf8(key) {
        Ok(key) => key.to_owned(),
        Err(_) => key.escape_ascii().to_string(),
    }
}
