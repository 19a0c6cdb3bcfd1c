//! Whatever happens on the way, in the end etcd holds what the API server does, and nothing is deleted without
//! evidence.

use control_core::types::{CallError, Transaction, Write};
use proptest::prelude::*;

use super::model::{Api, Etcd, Term};
use crate::{Effect, Input, ObjectKind};

#[derive(Debug, Clone)]
enum Step {
    Put(ObjectKind, u8, u8),
    Delete(ObjectKind, u8),
    /// Begins a list of the kind.
    Begin(ObjectKind),
    /// The next page of it, or its end.
    Page(ObjectKind),
    /// The next event of the kind.
    Event(ObjectKind),
    Interrupt(ObjectKind),
    /// etcd takes the transaction and answers.
    Answer,
    /// The answer is lost; the transaction may come later.
    Lose,
    /// A transaction of an earlier term comes.
    Late,
    /// Another leader takes over.
    TakeOver,
    /// Someone changes a key by hand.
    Foreign(ObjectKind, u8),
    Tick,
}

fn kind() -> impl Strategy<Value = ObjectKind> {
    prop_oneof![Just(ObjectKind::Namespace), Just(ObjectKind::NetworkPolicy), Just(ObjectKind::Pod)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (kind(), 0..40u8, 0..3u8).prop_map(|(kind, path, value)| Step::Put(kind, path, value)),
        3 => (kind(), 0..40u8).prop_map(|(kind, path)| Step::Delete(kind, path)),
        3 => kind().prop_map(Step::Begin),
        12 => kind().prop_map(Step::Page),
        8 => kind().prop_map(Step::Event),
        1 => kind().prop_map(Step::Interrupt),
        8 => Just(Step::Answer),
        1 => Just(Step::Lose),
        2 => Just(Step::Late),
        1 => Just(Step::TakeOver),
        1 => (kind(), 0..40u8).prop_map(|(kind, path)| Step::Foreign(kind, path)),
        2 => Just(Step::Tick),
    ]
}

fn path(kind: ObjectKind, number: u8) -> String {
    if kind.is_namespaced() { format!("shop/n{number}") } else { format!("n{number}") }
}

/// A list under way: the API server as it was when it began.
struct List {
    of: Api,
    left: Vec<Vec<String>>,
}

struct Fixture {
    api: Api,
    etcd: Etcd,
    term: Term,
    lists: std::collections::BTreeMap<ObjectKind, List>,
    waiting: Option<Transaction>,
    late: Vec<Transaction>,
    resigned: bool,
}

impl Fixture {
    fn take(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Write(transaction) => {
                    self.check(&transaction);
                    assert!(self.waiting.replace(transaction).is_none(), "one at a time");
                }
                Effect::List { kind, .. } => {
                    self.lists.remove(&kind);
                    self.term.read.remove(&kind);
                }
                Effect::Resign(_) => self.resigned = true,
                Effect::ReadConfirm | Effect::Notice(_) => {}
            }
        }
    }

    /// What is deleted is gone from the API server, or was when it was last heard.
    fn check(&self, transaction: &Transaction) {
        for write in &transaction.writes {
            let Write::Delete { key } = write else { continue };
            let (plural, path) = key.strip_prefix("k8s/east/").unwrap().split_once('/').unwrap();
            let kind = ObjectKind::ALL.into_iter().find(|kind| kind.plural() == plural).unwrap();
            assert!(self.term.listed.contains(&kind), "{key} is deleted without a complete list");
            let there = self.api.objects.get(&(kind, path.to_owned()));
            // Made again since: that was not heard yet.
            let heard = self.term.read.get(&kind).copied().unwrap_or_default();
            assert!(there.is_none_or(|(_, version)| *version > heard), "{key} is deleted and there");
        }
    }

    fn begin_term(&mut self) {
        self.late.extend(self.waiting.take());
        self.lists.clear();
        self.resigned = false;
        self.term = Term::begin_beside(&mut self.etcd, "x");
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Put(kind, number, value) => self.api.put(kind, &path(kind, number), &value.to_string()),
            Step::Delete(kind, number) => self.api.delete(kind, &path(kind, number)),
            Step::Begin(kind) => {
                self.term.read.remove(&kind);
                let left = self.api.paths(kind).chunks(5).rev().map(<[String]>::to_vec).collect();
                self.lists.insert(kind, List { of: self.api.clone(), left });
                let effects = self.term.step(Input::ListBegun { kind, uid: self.api.uid() });
                self.take(effects);
            }
            Step::Page(kind) => self.page(kind),
            Step::Event(kind) => {
                let Some(read) = self.term.read.get(&kind).copied() else { return };
                if let Some((version, event)) = self.api.events(kind, read).into_iter().next() {
                    self.term.read.insert(kind, version);
                    let effects = self.term.step(event);
                    self.take(effects);
                }
            }
            Step::Interrupt(kind) => {
                self.lists.remove(&kind);
                self.term.read.remove(&kind);
                let effects = self.term.step(Input::Interrupted { kind });
                self.take(effects);
            }
            Step::Answer => {
                if let Some(transaction) = self.waiting.take() {
                    let committed = self.etcd.commit(&transaction);
                    let effects = self.term.answer(committed);
                    self.take(effects);
                }
            }
            Step::Lose => {
                if let Some(transaction) = self.waiting.take() {
                    self.late.push(transaction);
                    let effects = self.term.answer(Err(CallError::Indeterminate("".into())));
                    self.take(effects);
                }
            }
            Step::Late => {
                if let Some(transaction) = self.late.pop() {
                    // It may come before the next term begins, and then it happens.
                    let _ = self.etcd.commit(&transaction);
                }
            }
            Step::TakeOver => self.begin_term(),
            Step::Foreign(kind, number) => {
                self.etcd.put(&format!("k8s/east/{}/{}", kind.plural(), path(kind, number)), "foreign");
            }
            Step::Tick => {
                self.term.advance(0, &mut self.etcd);
                let effects = self.term.step(Input::Tick);
                self.take(effects);
            }
        }
        if self.resigned {
            self.begin_term();
        }
    }

    fn page(&mut self, kind: ObjectKind) {
        let Some(list) = self.lists.get_mut(&kind) else { return };
        let effects = match list.left.pop() {
            Some(paths) => self.term.step(list.of.page(kind, &paths)),
            None => {
                // A list without a single object still says its version.
                let mut effects = self.term.step(list.of.page(kind, &[]));
                let version = list.of.version;
                self.lists.remove(&kind);
                self.term.read.insert(kind, version);
                effects.extend(self.term.step(Input::ListEnded { kind, uid: self.api.uid() }));
                effects.extend(self.term.step(Input::Watching { kind, uid: self.api.uid() }));
                effects
            }
        };
        self.take(effects);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn etcd_ends_as_the_api_server_is(steps in proptest::collection::vec(step(), 1..300)) {
        let api = Api::new("uid-1");
        let mut etcd = Etcd::default();
        let mut term = Term::begin(&mut etcd, "x");
        term.list_all(&api, &mut etcd);
        let mut world = Fixture {
            api, etcd, term, lists: Default::default(), waiting: None, late: Vec::new(), resigned: false,
        };
        for step in steps {
            world.step(step);
        }
        // Quiet: whatever was lost is over, one more term begins, and time goes by.
        for _ in 0..world.late.len() {
            world.step(Step::Late);
        }
        world.begin_term();
        let Fixture { api, mut etcd, mut term, late, .. } = world;
        for _ in 0..2 {
            term.list_all(&api, &mut etcd);
        }
        for transaction in late {
            prop_assert!(!etcd.commit(&transaction).unwrap().succeeded, "of an earlier term");
        }
        term.advance(70, &mut etcd);
        term.bookmark_all(&api, &mut etcd);
        term.advance(1, &mut etcd);
        prop_assert_eq!(etcd.objects(), api.canonical());
    }
}
