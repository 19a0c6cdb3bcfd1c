//! One leader per cluster: the process that creates the leased key. Its create_revision fences the writes of the term.

use std::time::Duration;

use control::session::{Dialer, Session};
use control_core::types::{CallError, Compare, Entry, Transaction, Write};
use mesh::records::{LeaseId, Revision};
use serde_json::json;
use sync_core::ClusterKeys;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep},
};

/// How long etcd keeps the key of a leader that is gone.
const LEASE: Duration = Duration::from_secs(15);
const KEEP_ALIVE_PERIOD: Duration = Duration::from_secs(5);
/// How often a leader that is gone is looked for.
const LOOK_PERIOD: Duration = Duration::from_secs(2);

/// Leadership, as long as its lease is kept. Dropped, the lease is kept no longer.
pub(crate) struct Leadership {
    /// create_revision of the leader key.
    pub(crate) fence: Revision,
    /// Until when etcd holds the key for certain.
    deadline: watch::Receiver<Instant>,
    keeper: JoinHandle<()>,
}

/// A candidate.
pub(crate) struct LeaderCandidate<'a> {
    pub(crate) keys: &'a ClusterKeys,
    /// This process; no other has this name.
    pub(crate) holder: &'a str,
    /// When it was last said who leads.
    pub(crate) told: Option<String>,
}

impl LeaderCandidate<'_> {
    /// Waits until this process leads.
    pub(crate) async fn campaign(&mut self, session: &Session) -> Result<Leadership, CallError> {
        loop {
            match self.leader(session).await? {
                Some(entry) if holder_of(&entry) == Some(self.holder.to_owned()) => {
                    // A term of this process that ended in doubt: the next one has another fence.
                    let compare = Compare::CreateRevision { key: self.keys.leader(), equals: entry.create_revision };
                    let delete = Write::Delete { key: self.keys.leader() };
                    session.transact(&Transaction { compares: vec![compare], writes: vec![delete] }).await?;
                }
                Some(entry) => {
                    let leader = holder_of(&entry).unwrap_or_default();
                    if self.told.as_ref() != Some(&leader) {
                        tracing::info!(leader, "standing by: another process copies this cluster");
                        self.told = Some(leader);
                    }
                    sleep(LOOK_PERIOD).await;
                }
                None => {
                    if let Some(leadership) = self.try_to_lead(session).await? {
                        self.told = None;
                        return Ok(leadership);
                    }
                }
            }
        }
    }

    async fn leader(&self, session: &Session) -> Result<Option<Entry>, CallError> {
        let key = self.keys.leader();
        Ok(session.list_below(&key).await?.entries.into_iter().find(|entry| entry.key == key))
    }

    async fn try_to_lead(&self, session: &Session) -> Result<Option<Leadership>, CallError> {
        let asked = Instant::now();
        let granted = session.grant(LEASE).await?;
        let value = json!({"holder": self.holder}).to_string().into_bytes();
        let transaction = Transaction {
            compares: vec![Compare::CreateRevision { key: self.keys.leader(), equals: 0 }],
            writes: vec![Write::Put { key: self.keys.leader(), value, lease: Some(granted.lease) }],
        };
        let committed = session.transact(&transaction).await?;
        if !committed.succeeded {
            return Ok(None);
        }
        let (sender, deadline) = watch::channel(asked + granted.ttl);
        let keeper = tokio::spawn(keep(session.clone(), granted.lease, sender));
        Ok(Some(Leadership { fence: committed.revision, deadline, keeper }))
    }
}

impl Leadership {
    /// Whether etcd holds the key for certain.
    pub(crate) fn holds(&self) -> bool {
        Instant::now() < *self.deadline.borrow()
    }

    /// For how long etcd holds the key for certain.
    pub(crate) fn remaining(&self) -> Duration {
        self.deadline.borrow().saturating_duration_since(Instant::now())
    }

    /// Waits until it may be lost.
    pub(crate) async fn lost(&mut self) {
        loop {
            let deadline = *self.deadline.borrow_and_update();
            tokio::select! {
                () = tokio::time::sleep_until(deadline) => return,
                changed = self.deadline.changed() => if changed.is_err() {
                    return tokio::time::sleep_until(deadline).await;
                },
            }
        }
    }
}

impl Drop for Leadership {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// Keeps a lease until it is gone.
async fn keep(session: Session, lease: LeaseId, deadline: watch::Sender<Instant>) {
    loop {
        sleep(KEEP_ALIVE_PERIOD).await;
        let asked = Instant::now();
        match session.keep_alive(lease).await {
            Ok(granted) => {
                deadline.send_replace(asked + granted.ttl);
            }
            Err(CallError::LeaseNotFound) => {
                deadline.send_replace(Instant::now());
                return;
            }
            // The deadline stands, and says when it is too late.
            Err(error) => tracing::debug!(%error, "lease not renewed"),
        }
    }
}

/// Gives the leader key up, so that the next one need not wait for its lease.
pub(crate) async fn give_up(session: &Session, keys: &ClusterKeys, fence: Revision) {
    let transaction = Transaction {
        compares: vec![Compare::CreateRevision { key: keys.leader(), equals: fence }],
        writes: vec![Write::Delete { key: keys.leader() }],
    };
    if let Err(error) = session.transact(&transaction).await {
        tracing::debug!(%error, "leader key not given up");
    }
}

/// A session with the next member that answers, beginning with number `next`.
pub(crate) async fn open(dialer: &mut Dialer, keys: &ClusterKeys, next: &mut usize) -> Result<Session, String> {
    let mut last = String::new();
    dialer.reread_members();
    for _ in dialer.members() {
        let member = &dialer.members()[*next % dialer.members().len()];
        *next += 1;
        let opened = async {
            let session = dialer.open(member, 0).await.map_err(|error| text::with_causes(&error))?;
            session.list_below(&keys.leader()).await.map_err(|error| error.to_string())?;
            Ok::<_, String>(session)
        };
        match opened.await {
            Ok(session) => return Ok(session),
            Err(error) => last = format!("{member}: {error}"),
        }
    }
    Err(last)
}

fn holder_of(entry: &Entry) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(&entry.value).ok()?;
    Some(value["holder"].as_str()?.to_owned())
}
