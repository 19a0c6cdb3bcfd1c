//! The control plane of one node in virtual time, on a model of etcd.

use std::collections::VecDeque;

use etcd_schema::Violations;
use serde_json::{Map, Value};

use super::*;
use crate::{
    membership::{Call, Identity},
    model::EtcdModel,
    objects::{Item, ObjectReader, ReadObject, RefusedObject},
    store::Accepted,
    types::{Transaction, Write},
};

const CONFIG: &str = r#"{"Network": "10.0.0.0/24", "SubnetLen": 28, "LeaseTTL": 20}"#;
const SECOND: Duration = Duration::from_secs(1);

/// Reads JSON objects.
struct JsonReader;

impl ObjectReader for JsonReader {
    fn read(&self, key: &Key, bytes: &[u8], _rewritten: bool) -> Result<ReadObject, RefusedObject> {
        match serde_json::from_slice::<Map<String, Value>>(bytes) {
            Ok(read) => Ok(ReadObject { item: Item::new(read), canonical: bytes.into() }),
            Err(error) => Err(RefusedObject {
                violations: Violations::one("", key.to_string(), error.to_string()),
                stand_in: None,
                effect: "it has no effect".to_owned(),
            }),
        }
    }
}

/// A node with an etcd to itself, which answers at once.
struct Node {
    core: ControlCore,
    now: Instant,
    etcd: EtcdModel,
    /// The session that stands, and what its watch has brought.
    session: Option<SessionNumber>,
    sessions: SessionNumber,
    delivered: Revision,
    inputs: VecDeque<Input>,
    /// Calls go without an answer.
    is_silent: bool,
    /// etcd refuses writes of `endpoints/`, and does not read its history.
    refuses: bool,
    records: Arc<Records>,
    status: ControlStatus,
    handed_on: Vec<(Vec<String>, Revision, bool)>,
    accepted: Option<Accepted>,
    noted: Vec<bool>,
    cached: Option<CacheContent>,
    writes: usize,
    suspected: Vec<SessionNumber>,
    lists_wanted: usize,
    looked_back: Vec<(String, Revision)>,
}

impl Node {
    fn new() -> Self {
        Self::with(Instant::now(), EtcdModel::new(), None, 1)
    }

    /// One that starts from a cache, as the process of this number.
    fn with(now: Instant, etcd: EtcdModel, cached: Option<CacheContent>, start_count: u64) -> Self {
        let identity = Identity {
            id: "n1".parse().unwrap(),
            boot_id: "b".into(),
            start_count,
            incarnation: start_count + 100,
            predecessor: None,
        };
        let previous = cached.as_ref().and_then(|cached| cached.subnet);
        let mut store = Store::new("/meshd/").with_reader(Arc::new(JsonReader));
        let cache_usable = cached.is_some();
        if let Some(cached) = cached {
            store = store.with_cache(cached.revision, cached.entries, now).recall(cached.evidence);
        }
        let membership = Membership::new(now, identity, membership::tests::facts(1), previous, false, 7);
        let core = ControlCore::new(now, Start { store, membership, cache_usable, hands_on: true });
        let (records, status) = (core.records(), core.status().clone());
        Self {
            core,
            now,
            etcd,
            session: None,
            sessions: 0,
            delivered: 0,
            inputs: VecDeque::new(),
            is_silent: false,
            refuses: false,
            records,
            status,
            handed_on: Vec::new(),
            accepted: None,
            noted: Vec::new(),
            cached: None,
            writes: 0,
            suspected: Vec::new(),
            lists_wanted: 0,
            looked_back: Vec::new(),
        }
    }

    /// One whose subnet is leased.
    fn joined() -> Self {
        let mut node = Self::new();
        node.operator_puts("config", CONFIG);
        node.take(Input::Started);
        node.connect();
        node.pass(2 * SECOND);
        assert!(matches!(node.status.state, MembershipState::Joined { .. }), "{:?}", node.status);
        node
    }

    fn take(&mut self, input: Input) {
        self.inputs.push_back(input);
        while let Some(input) = self.inputs.pop_front() {
            for effect in self.core.step(self.now, input) {
                self.perform(effect);
            }
            self.deliver();
        }
    }

    /// The watch brings what is new.
    fn deliver(&mut self) {
        if self.session.is_some() && self.delivered < self.etcd.revision {
            let events = self.etcd.events(self.delivered, self.etcd.revision);
            self.delivered = self.etcd.revision;
            self.inputs.push_back(Input::Changed(events));
        }
    }

    fn perform(&mut self, effect: Effect) {
        let session = self.session.unwrap_or_default();
        let lost = || CallError::Indeterminate("lost".into());
        match effect {
            Effect::Publish(records) => self.records = records,
            Effect::Status(status) => {
                assert_ne!(*status, self.status, "the same again");
                self.status = *status;
            }
            Effect::Call(id, call) => {
                let answer = match call {
                    Call::Grant { .. } if self.is_silent => CallAnswer::Granted(Err(lost())),
                    Call::KeepAlive { .. } if self.is_silent => CallAnswer::KeptAlive(Err(lost())),
                    Call::Transact(_) if self.is_silent => CallAnswer::Committed(Err(lost())),
                    Call::Grant { ttl } => CallAnswer::Granted(Ok(self.etcd.grant(self.now, ttl))),
                    Call::KeepAlive { lease } => CallAnswer::KeptAlive(self.etcd.keep_alive(self.now, lease)),
                    Call::Transact(transaction) => CallAnswer::Committed(self.etcd.transact(&transaction)),
                };
                self.inputs.push_back(Input::Answer(id, answer, session));
            }
            Effect::WriteEndpoints(transaction) => {
                let answer = match (self.is_silent, self.refuses) {
                    (true, _) => Err(lost()),
                    (_, true) => Err(CallError::Refused("etcdserver: permission denied".into())),
                    _ => self.etcd.transact(&transaction),
                };
                self.inputs.push_back(Input::EndpointsWritten(answer, session));
            }
            Effect::LookBack { key, at } => {
                let found = if self.refuses { Err(lost()) } else { Ok(self.etcd.value_at(&key, at)) };
                self.looked_back.push((key, at));
                self.inputs.push_back(Input::Earlier(found));
            }
            Effect::Suspect(session) => self.suspected.push(session),
            Effect::ListAgain => self.lists_wanted += 1,
            Effect::HandOn { changes, revision, complete } => {
                let mut keys: Vec<String> = changes
                    .iter()
                    .map(|(key, record)| format!("{}{key}", if record.is_some() { '+' } else { '-' }))
                    .collect();
                keys.sort();
                self.handed_on.push((keys, revision, complete));
            }
            Effect::WriteCache => {
                self.cached = Some(self.core.cache());
                self.writes += 1;
                self.inputs.push_back(Input::CacheWritten(Duration::from_millis(1)));
            }
            Effect::NoteIdentity(holds) => self.noted.push(holds),
            Effect::Accepted(accepted) => self.accepted = Some(accepted),
        }
    }

    fn connect(&mut self) {
        self.sessions += 1;
        self.session = Some(self.sessions);
        self.delivered = self.etcd.revision;
        let listing = self.etcd.list();
        self.take(Input::Connected { member: "http://e1:2379".into(), session: self.sessions });
        self.take(Input::Listed(listing));
    }

    fn disconnect(&mut self) {
        self.session = None;
        self.take(Input::Disconnected { member: "http://e1:2379".into(), error: "no answer within 5s".into() });
    }

    fn operator(&mut self, write: Write) {
        self.etcd.transact(&Transaction { compares: Vec::new(), writes: vec![write] }).unwrap();
        self.deliver();
        if let Some(input) = self.inputs.pop_front() {
            self.take(input);
        }
    }

    fn operator_puts(&mut self, key: &str, value: &str) {
        self.operator(Write::Put { key: key.into(), value: value.into(), lease: None });
    }

    fn operator_deletes(&mut self, key: &str) {
        self.operator(Write::Delete { key: key.into() });
    }

    /// Time passes: deadlines are kept, leases run out.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        for turn in 0.. {
            assert!(turn < 10_000, "never comes to rest");
            let next =
                [self.core.next_deadline(), self.etcd.next_expiry(), Some(end)].into_iter().flatten().min().unwrap();
            self.now = self.now.max(next);
            if self.now >= end {
                return;
            }
            self.etcd.expire(self.now);
            self.take(Input::Tick);
        }
    }

    fn problems(&self) -> Vec<ProblemCode> {
        self.status.problems.iter().map(|problem| problem.code).collect()
    }

    fn subnet(&self) -> String {
        Key::Subnet(self.status.subnet.unwrap()).to_string()
    }
}

#[test]
fn a_node_joins_says_so_and_writes_its_cache() {
    let mut node = Node::new();
    node.take(Input::Started);
    assert_eq!((node.handed_on.len(), node.status.connected), (0, false), "nothing is known");
    node.connect();
    assert_eq!(node.status.state, MembershipState::NoConfig);
    assert_eq!(node.problems(), [ProblemCode::NoConfig]);
    assert!(node.status.no_kubernetes_objects);
    assert_eq!(node.handed_on.first(), Some(&(vec![], 1, true)), "a picture without objects is a whole one");
    node.operator_puts("config", CONFIG);
    node.pass(2 * SECOND);
    assert!(matches!(node.status.state, MembershipState::Joined { .. }), "{:?}", node.status);
    assert_eq!((node.status.connected, node.problems(), &node.noted[..]), (true, vec![], &[true][..]));
    assert_eq!(node.status.revision, node.etcd.revision);
    assert_eq!(node.handed_on.last().map(|handed_on| handed_on.1), Some(node.etcd.revision));
    assert!(node.etcd.keys.contains_key(&node.subnet()) && node.etcd.keys.contains_key("nodes/n1"));
    assert_eq!(node.records.nodes.len(), 1);
    let cached = node.cached.as_ref().unwrap();
    assert_eq!((cached.subnet, cached.lease_ttl), (node.status.subnet, Some(20 * SECOND)));
    assert!(!node.core.is_unsaved());
    // What etcd confirms stays young on disk.
    let before = node.writes;
    node.pass(60 * SECOND);
    assert!((10..14).contains(&(node.writes - before)), "{}", node.writes - before);
}

#[test]
fn an_invalid_config_is_one_problem() {
    let mut node = Node::new();
    node.take(Input::Started);
    node.operator_puts("config", "{");
    node.connect();
    assert_eq!(node.status.state, MembershipState::NoConfig);
    assert_eq!(node.problems(), []);
    assert_eq!(node.records.problems.len(), 1);
}

#[test]
fn without_etcd_all_stays_as_it_was_and_status_says_since_when() {
    let mut node = Node::joined();
    let (left, subnet) = (node.now, node.status.subnet);
    node.disconnect();
    assert_eq!((node.status.connected, node.status.known_until), (false, Some(left)));
    assert_eq!(node.status.error.as_deref(), Some("http://e1:2379: no answer within 5s"));
    assert_eq!(node.problems(), [ProblemCode::EtcdUnreachable]);
    node.pass(10 * SECOND);
    node.disconnect();
    assert_eq!(node.status.age(node.now), Some(10 * SECOND), "since the first failure");
    assert_eq!(node.status.subnet, subnet);
    // A session alone is not enough: its list tells.
    node.take(Input::Connected { member: "http://e2:2379".into(), session: 9 });
    assert!(!node.status.connected && node.status.error.is_none());
    node.connect();
    assert_eq!((node.status.connected, node.status.known_until, node.problems()), (true, None, vec![]));
    assert_eq!(node.status.age(node.now), Some(Duration::ZERO));
}

#[test]
fn a_call_without_an_answer_makes_its_session_suspect() {
    let mut node = Node::joined();
    node.is_silent = true;
    node.pass(20 * SECOND);
    assert!(node.suspected.iter().all(|session| *session == 1) && !node.suspected.is_empty());
    node.suspected.clear();
    node.is_silent = false;
    node.pass(20 * SECOND);
    assert_eq!(node.suspected, [0; 0]);
    let lost = CallError::Indeterminate("lost".into());
    node.take(Input::EndpointsWritten(Err(lost), 1));
    assert_eq!(node.suspected, [1]);
}

#[test]
fn a_subnet_that_another_node_took_is_lost_and_comes_back_when_it_is_free() {
    let mut node = Node::joined();
    let (subnet, key) = (node.status.subnet.unwrap(), node.subnet());
    node.take(Input::Attached(true));
    node.disconnect();
    node.pass(60 * SECOND);
    assert!(!node.etcd.keys.contains_key(&key), "its lease ran out");
    node.operator_puts(&key, r#"{"Node": "other"}"#);
    let writes = node.writes;
    node.connect();
    node.pass(5 * SECOND);
    assert!(matches!(node.status.state, MembershipState::SubnetLost { .. }), "{:?}", node.status.state);
    assert_eq!((node.status.subnet, node.problems()), (None, vec![ProblemCode::SubnetLost]));
    assert!(node.writes > writes && node.cached.as_ref().unwrap().subnet.is_none(), "no start goes on with it");
    node.operator_deletes(&key);
    node.pass(5 * SECOND);
    assert_eq!(node.status.state, MembershipState::Joined { subnet });
    // Lost again, and this time the last container goes.
    node.operator_puts(&key, r#"{"Node": "other"}"#);
    node.pass(5 * SECOND);
    node.take(Input::Attached(false));
    node.pass(5 * SECOND);
    assert!(matches!(node.status.state, MembershipState::Joined { subnet: drawn } if drawn != subnet));
}

#[test]
fn an_etcd_that_went_back_withdraws_nothing_until_the_operator_accepts_it() {
    let mut node = Node::joined();
    let backup = node.etcd.clone();
    node.operator_puts("networkpolicies/shop/p", "{}");
    node.operator_puts(
        "peers/laptop",
        r#"{"publicKey": "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=", "allowedIPs": ["192.0.2.7/32"]}"#,
    );
    assert_eq!(node.records.peers.len(), 1, "{:?}", node.records.problems);
    node.disconnect();
    let now = node.now;
    node.etcd.restore(&backup, now);
    node.handed_on.clear();
    node.connect();
    node.pass(300 * SECOND);
    assert_eq!(node.records.peers.len(), 1, "what the older etcd lacks stays in force");
    assert!(node.handed_on.iter().all(|(keys, ..)| !keys.contains(&"-networkpolicies/shop/p".to_owned())));
    assert!(matches!(node.status.state, MembershipState::Joined { .. }), "{:?}", node.status.state);
    node.take(Input::Accept);
    assert_eq!(node.accepted, Some(Accepted { withdrawn: 2, changed: 0 }));
    assert_eq!(node.records.peers.len(), 0);
    assert_eq!(node.handed_on.last().unwrap().0, ["-networkpolicies/shop/p"]);
}

#[test]
fn what_a_list_lacks_is_asked_for_again() {
    let mut node = Node::joined();
    node.operator_puts("networkpolicies/shop/p", "{}");
    node.disconnect();
    node.operator_deletes("networkpolicies/shop/p");
    node.handed_on.clear();
    node.connect();
    assert!(node.lists_wanted > 0);
    let gone = |node: &Node| node.handed_on.iter().any(|(keys, ..)| keys.iter().any(|key| key.starts_with('-')));
    assert!(!gone(&node));
    let listing = node.etcd.list();
    node.take(Input::Audited { listing, deleted_since: BTreeSet::new() });
    assert!(gone(&node));
}

#[test]
fn changes_that_the_watch_lost_are_a_problem_for_a_day() {
    let mut node = Node::joined();
    let listing = node.etcd.list();
    node.take(Input::Audited { listing, deleted_since: BTreeSet::new() });
    assert_eq!(node.problems(), []);
    node.etcd
        .transact(&Transaction {
            compares: Vec::new(),
            writes: vec![Write::Put { key: "pods/shop/a".into(), value: "{}".into(), lease: None }],
        })
        .unwrap();
    node.delivered = node.etcd.revision;
    let listing = node.etcd.list();
    node.take(Input::Audited { listing, deleted_since: BTreeSet::new() });
    assert_eq!((node.problems(), node.status.audit_differences), (vec![ProblemCode::WatchLostChanges], 1));
    assert!(!node.status.no_kubernetes_objects);
    node.now += LOST_CHANGES_SHOWN;
    node.take(Input::Tick);
    assert!(!node.problems().contains(&ProblemCode::WatchLostChanges));
}

#[test]
fn records_of_containers_are_written_by_a_node_that_has_its_place() {
    let wanted = |names: &[&str]| {
        let record = |name: &&str| (format!("endpoints/n1/{name}/eth0"), b"{}".to_vec());
        Input::EndpointsWanted(Some(Arc::new(names.iter().map(record).collect())))
    };
    let mut node = Node::new();
    node.operator_puts("config", CONFIG);
    node.take(Input::Started);
    node.take(wanted(&["a"]));
    assert!(!node.etcd.keys.contains_key("endpoints/n1/a/eth0"));
    node.connect();
    node.pass(2 * SECOND);
    assert!(node.etcd.keys.contains_key("endpoints/n1/a/eth0"));
    node.refuses = true;
    node.take(wanted(&["b"]));
    assert_eq!(node.problems(), [ProblemCode::EtcdRefuses]);
    assert!(node.core.next_deadline() <= Some(node.now + SECOND), "it is tried again");
    node.disconnect();
    assert!(node.core.next_deadline().is_none_or(|at| at > node.now + SECOND), "not while etcd is away");
    node.refuses = false;
    node.connect();
    node.pass(2 * SECOND);
    assert!(node.etcd.keys.contains_key("endpoints/n1/b/eth0") && !node.etcd.keys.contains_key("endpoints/n1/a/eth0"));
    assert_eq!(node.problems(), []);
}

#[test]
fn the_newest_earlier_value_that_can_be_read_stays_in_force() {
    let key = "networkpolicies/shop/p";
    for (values, found) in [(&["{}", "x", "y"][..], true), (&["x", "y"][..], false), (&["{}"; 1][..], false)] {
        let mut node = Node::new();
        node.operator_puts("config", CONFIG);
        for value in values {
            node.operator_puts(key, value);
        }
        node.operator_puts(key, "unreadable");
        node.take(Input::Started);
        node.connect();
        let in_force = node.handed_on.iter().any(|(keys, ..)| keys.contains(&format!("+{key}")));
        assert_eq!(in_force, found || values == ["{}"], "{values:?}");
        assert_eq!(node.looked_back.len(), values.len() + usize::from(!in_force), "{values:?}: {:?}", node.looked_back);
    }
}

#[test]
fn no_more_than_eight_earlier_values_are_read() {
    let mut node = Node::new();
    node.operator_puts("networkpolicies/shop/p", "{}");
    for value in 0..20 {
        node.operator_puts("networkpolicies/shop/p", &format!("x{value}"));
    }
    node.take(Input::Started);
    node.connect();
    assert_eq!(node.looked_back.len(), 8);
}

#[test]
fn a_history_that_cannot_be_read_is_asked_for_again_in_a_second() {
    let mut node = Node::new();
    node.operator_puts("networkpolicies/shop/p", "{}");
    node.operator_puts("networkpolicies/shop/p", "x");
    node.refuses = true;
    node.take(Input::Started);
    node.connect();
    assert_eq!(node.looked_back.len(), 1);
    node.pass(SECOND / 2);
    assert_eq!(node.looked_back.len(), 1);
    node.refuses = false;
    node.pass(SECOND);
    assert_eq!(node.looked_back.len(), 2);
    assert!(node.handed_on.iter().any(|(keys, ..)| !keys.is_empty()));
    // An answer that is not waited for changes nothing.
    let before = node.handed_on.len();
    node.take(Input::Earlier(Ok(None)));
    assert_eq!(node.handed_on.len(), before);
}

#[test]
fn a_start_from_a_usable_cache_hands_on_what_it_holds_and_takes_its_subnet_up() {
    let mut first = Node::joined();
    first.operator_puts("networkpolicies/shop/p", "{}");
    first.pass(5 * SECOND);
    let subnet = first.status.subnet;
    let mut node = Node::with(first.now, first.etcd.clone(), first.cached.take(), 2);
    node.take(Input::Started);
    assert_eq!(node.handed_on.len(), 1);
    assert_eq!((&node.handed_on[0].0[..], node.handed_on[0].2), (&["+networkpolicies/shop/p".to_owned()][..], true));
    node.pass(6 * SECOND);
    assert!(node.status.holds_identity && node.status.subnet == subnet && node.writes == 0, "{:?}", node.status);
    node.connect();
    node.pass(5 * SECOND);
    assert!(matches!(node.status.state, MembershipState::Joined { .. }) && node.status.subnet == subnet);
}

#[test]
fn a_clone_takes_the_note_of_its_identity_back() {
    let mut node = Node::joined();
    let foreign = r#"{"bootId": "x", "startCount": 1, "startRevision": 1, "incarnation": 7}"#;
    for _ in 0..2 {
        node.operator_puts("alive/n1", foreign);
        node.pass(5 * SECOND);
    }
    assert!(matches!(node.status.state, MembershipState::Cloned { .. }), "{:?}", node.status.state);
    assert_eq!(node.noted, [true, false]);
    assert_eq!(node.problems(), [ProblemCode::Cloned]);
    node.operator_puts("removed/n1", "{}");
    node.take(Input::Facts(Box::new(membership::tests::facts(2))));
}

#[test]
fn a_config_that_changes_is_in_force_at_once() {
    let mut node = Node::joined();
    node.operator_puts("config", &CONFIG.replace("20", "40"));
    assert_eq!(node.records.config.as_ref().unwrap().value.lease_ttl, 40 * SECOND);
    let dual = CONFIG.replace('}', r#", "EnableIPv6": true, "IPv6Network": "fd00::/56"}"#);
    node.operator_puts("config", &dual);
    assert_eq!(node.records.config.as_ref().unwrap().value.networks().count(), 2);
    assert!(matches!(node.status.state, MembershipState::Joined { .. }));
    // One that excludes its subnet is refused.
    node.operator_puts("config", &CONFIG.replace("10.0.0.0", "10.9.0.0"));
    assert_eq!(node.records.config.as_ref().unwrap().value.networks().count(), 2);
    assert_eq!(node.records.problems.len(), 1);
}
