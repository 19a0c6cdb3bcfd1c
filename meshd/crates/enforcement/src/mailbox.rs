//! Pending input of the policy thread: only the newest state of each key.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use attachments::Table;
use control_core::objects::{ObjectChanges, ObjectReader, ObjectSink, ReadObject, RefusedObject};
use etcd_schema::Key;
use mesh::records::Revision;

use super::{MeshFacts, input, world::World};

/// Something to look up in the world, in the policy thread.
pub(super) struct Question(pub(super) Box<dyn FnOnce(&World) + Send>);

impl std::fmt::Debug for Question {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Question")
    }
}

/// Most questions that wait.
const MAX_QUESTIONS: usize = 64;

/// What came since it was last emptied.
#[derive(Debug, Default)]
pub(super) struct Letter {
    pub(super) changes: ObjectChanges,
    /// Everything up to here is in this letter and those before.
    pub(super) revision: Option<Revision>,
    /// With those before, this is a whole picture.
    pub(super) complete: bool,
    pub(super) mesh: Option<Arc<MeshFacts>>,
    /// All attachments of this node.
    pub(super) attachments: Option<Arc<Table>>,
    /// Somebody may have changed the kernel's ruleset.
    pub(super) look: bool,
    pub(super) questions: Vec<Question>,
}

#[derive(Debug, Default)]
struct State {
    letter: Letter,
    /// The facts that were handed over last.
    mesh: Option<Arc<MeshFacts>>,
    stopped: bool,
}

/// Many write, one reads.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    state: Mutex<State>,
    arrived: Condvar,
}

impl Mailbox {
    /// Waits until there is something, or until `deadline`; `None`: it is over.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> Option<Letter> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return None;
            }
            if !state.letter.is_empty() {
                return Some(std::mem::take(&mut state.letter));
            }
            match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return Some(Letter::default()),
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
            state.letter.mesh = Some(facts);
            self.arrived.notify_one();
        }
    }

    pub(super) fn attachments(&self, table: Arc<Table>) {
        self.lock().letter.attachments = Some(table);
        self.arrived.notify_one();
    }

    /// Somebody has committed something to nftables.
    pub(super) fn look(&self) {
        self.lock().letter.look = true;
        self.arrived.notify_one();
    }

    /// Has `question` answered. One too many is dropped, and whoever waits for it sees that.
    pub(super) fn ask(&self, question: Question) {
        let mut state = self.lock();
        if state.letter.questions.len() < MAX_QUESTIONS {
            state.letter.questions.push(question);
            self.arrived.notify_one();
        }
    }

    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.arrived.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads in the control plane's task: the policy thread gets what was read.
impl ObjectReader for Mailbox {
    fn read(&self, key: &Key, bytes: &[u8], rewritten: bool) -> Result<ReadObject, RefusedObject> {
        input::read(key, bytes, rewritten)
    }
}

impl ObjectSink for Mailbox {
    fn changed(&self, changes: ObjectChanges, revision: Revision, complete: bool) {
        let mut state = self.lock();
        let letter = &mut state.letter;
        if letter.changes.is_empty() {
            letter.changes = changes;
        } else {
            letter.changes.extend(changes);
        }
        letter.revision = Some(revision);
        letter.complete |= complete;
        self.arrived.notify_one();
    }
}

impl Letter {
    fn is_empty(&self) -> bool {
        self.revision.is_none()
            && self.mesh.is_none()
            && self.attachments.is_none()
            && !self.look
            && self.questions.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use control_core::objects::{Item, ObjectRecord};
    use policy::{object::Labels, objects::Object};

    use super::*;
    use crate::input::Input;

    #[test]
    fn what_waits_is_the_newest_of_each_key() {
        let mailbox = Mailbox::default();
        let key = Key::parse("namespaces/a").unwrap();
        let record = |create_revision| {
            let item = Item::new(Input::Object(Object::Namespace(Labels::default())));
            Some(ObjectRecord { item, create_revision, held: false })
        };
        for revision in 1..=1000 {
            mailbox.changed(ObjectChanges::from([(key.clone(), record(revision))]), revision, revision == 7);
        }
        let letter = mailbox.wait(None).unwrap();
        let newest: Vec<_> =
            letter.changes.into_iter().map(|(key, record)| (key, record.unwrap().create_revision)).collect();
        assert_eq!(newest, [(key.clone(), 1000)]);
        assert_eq!((letter.revision, letter.complete), (Some(1000), true));
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
