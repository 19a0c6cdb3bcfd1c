//! Pending input of the policy thread: only the newest state of each key.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use attachments::AttachmentTable;
use control_core::objects::{ObjectChanges, ObjectReader, ObjectSink, ReadObject, RefusedObject};
use etcd_schema::Key;
use mesh::records::Revision;

use super::{
    MeshFacts, input,
    policy_inputs::{PendingInput, Query},
};

/// Most questions that wait.
const MAX_QUESTIONS: usize = 64;

#[derive(Debug, Default)]
struct MailboxState {
    pending: PendingInput,
    /// The facts that were handed over last.
    mesh: Option<Arc<MeshFacts>>,
    stopped: bool,
}

/// Many write, one reads.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    state: Mutex<MailboxState>,
    arrived: Condvar,
}

impl Mailbox {
    /// Waits until there is something, or until `deadline`; `None`: it is over.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> Option<PendingInput> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return None;
            }
            if !state.pending.is_empty() {
                return Some(std::mem::take(&mut state.pending));
            }
            match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return Some(PendingInput::default()),
                Some(left) => {
                    state = self.arrived.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                }
                None => state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    pub(super) fn mesh(&self, facts: MeshFacts) {
        let mut state = self.lock();
        if state.mesh.as_deref() != Some(&facts) {
            let facts = Arc::new(facts);
            state.mesh = Some(Arc::clone(&facts));
            state.pending.mesh = Some(facts);
            self.arrived.notify_one();
        }
    }

    pub(super) fn attachments(&self, table: Arc<AttachmentTable>) {
        self.lock().pending.attachments = Some(table);
        self.arrived.notify_one();
    }

    /// Somebody has committed something to nftables.
    pub(super) fn ruleset_changed(&self) {
        self.lock().pending.look = true;
        self.arrived.notify_one();
    }

    /// Has `question` answered. If too many wait, it is dropped, and its sender sees that.
    pub(super) fn ask(&self, question: Query) {
        let mut state = self.lock();
        if state.pending.questions.len() < MAX_QUESTIONS {
            state.pending.questions.push(question);
            self.arrived.notify_one();
        }
    }

    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.arrived.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, MailboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Parses in the control plane's task: the policy thread gets parsed values.
impl ObjectReader for Mailbox {
    fn read(&self, key: &Key, bytes: &[u8], rewritten: bool) -> Result<ReadObject, RefusedObject> {
        input::read(key, bytes, rewritten)
    }
}

impl ObjectSink for Mailbox {
    fn changed(&self, changes: ObjectChanges, revision: Revision, complete: bool) {
        let mut state = self.lock();
        let pending = &mut state.pending;
        if pending.changes.is_empty() {
            pending.changes = changes;
        } else {
            pending.changes.extend(changes);
        }
        pending.revision = Some(revision);
        pending.complete |= complete;
        self.arrived.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use control_core::objects::{Item, ObjectRecord};
    use policy::{object::Labels, objects::Object};

    use super::*;
    use crate::input::PolicyRecord;

    #[test]
    fn what_waits_is_the_newest_of_each_key() {
        let mailbox = Mailbox::default();
        let key = Key::parse("namespaces/a").unwrap();
        let record = |create_revision| {
            let item = Item::new(PolicyRecord::Object(Object::Namespace(Labels::default())));
            Some(ObjectRecord { item, create_revision, held: false })
        };
        for revision in 1..=1000 {
            mailbox.changed(ObjectChanges::from([(key.clone(), record(revision))]), revision, revision == 7);
        }
        let pending = mailbox.wait(None).unwrap();
        let newest: Vec<_> =
            pending.changes.into_iter().map(|(key, record)| (key, record.unwrap().create_revision)).collect();
        assert_eq!(newest, [(key.clone(), 1000)]);
        assert_eq!((pending.revision, pending.complete), (Some(1000), true));
        mailbox.changed(ObjectChanges::from([(key.clone(), None)]), 1001, false);
        assert!(mailbox.wait(None).unwrap().changes[&key].is_none());
        assert!(mailbox.wait(Some(Instant::now())).unwrap().is_empty(), "a deadline that has passed");
        mailbox.stop();
        assert!(mailbox.wait(None).is_none());
    }

    #[test]
    fn the_same_facts_again_are_no_change() {
        let mailbox = Mailbox::default();
        mailbox.mesh(MeshFacts::default());
        assert!(mailbox.wait(None).unwrap().mesh.is_some());
        mailbox.mesh(MeshFacts::default());
        assert!(mailbox.wait(Some(Instant::now())).unwrap().mesh.is_none());
        mailbox.mesh(MeshFacts { audit: true, ..MeshFacts::default() });
        assert!(mailbox.wait(None).unwrap().mesh.is_some_and(|mesh| mesh.audit));
    }
}
