use super::*;

/// A cluster that does what the steps say, as Kubernetes and etcd do.
struct World {
    wanted: Wanted,
    seen: Seen,
    /// The members, whether they run or not.
    etcd: Vec<SeenMember>,
    /// Nodes whose machine is up.
    up: Vec<String>,
    ids: u64,
    /// Members whose data is on a node.
    data: Vec<String>,
    steps: Vec<String>,
}

impl World {
    fn new(members: usize, nodes: &[&str]) -> Self {
        let wanted = Wanted { members, ports: Ports { client: 2391, peer: 2392 }, restore: None };
        let mut world = Self {
            wanted,
            seen: Seen::default(),
            etcd: Vec::new(),
            up: Vec::new(),
            ids: 0,
            data: Vec::new(),
            steps: Vec::new(),
        };
        for name in nodes {
            world.add_node(name);
        }
        world
    }

    fn add_node(&mut self, name: &str) {
        let last = name.bytes().last().unwrap();
        self.seen.nodes.push(SeenNode {
            name: name.to_owned(),
            addresses: vec![IpAddr::from([192, 0, 2, last])],
            is_candidate: true,
            is_labelled: false,
            is_ready: true,
        });
        self.up.push(name.to_owned());
    }

    fn node(&mut self, name: &str) -> &mut SeenNode {
        self.seen.nodes.iter_mut().find(|node| node.name == name).unwrap()
    }

    fn lose_node(&mut self, name: &str) {
        self.seen.nodes.retain(|node| node.name != name);
        self.up.retain(|up| up != name);
    }

    /// What etcd says: nothing without a majority.
    fn look(&mut self) {
        let record = self.seen.record.clone().unwrap_or_default();
        for member in &record.members {
            let runs = self.up.contains(&member.node)
                && self.seen.nodes.iter().any(|node| node.name == member.node && node.is_labelled);
            if runs && member.begins_alone() && !member.joined && self.etcd.is_empty() {
                self.ids += 1;
                self.etcd.push(SeenMember {
                    id: self.ids,
                    name: member.name.clone(),
                    peer_urls: member.peer_urls.clone(),
                    is_learner: false,
                    is_healthy: false,
                });
                self.data.push(member.name.clone());
            }
            if let Some(it) = self.etcd.iter_mut().find(|it| it.peer_urls == member.peer_urls && it.name.is_empty())
                && runs
            {
                it.name = member.name.clone();
                self.data.push(member.name.clone());
            }
            if let Some(it) = self.etcd.iter_mut().find(|it| it.name == member.name) {
                it.is_healthy = runs;
            }
        }
        let voters = self.etcd.iter().filter(|it| !it.is_learner).count();
        let healthy = self.etcd.iter().filter(|it| !it.is_learner && it.is_healthy).count();
        self.seen.etcd = (healthy > voters / 2).then(|| self.etcd.clone());
    }

    fn step(&mut self) -> Step {
        self.look();
        let suffix = self.steps.len().to_string();
        let step = next_step(&self.wanted, &self.seen, &suffix);
        self.steps.push(format!("{step:?}"));
        match step.clone() {
            Step::Record(record) => self.seen.record = Some(record),
            Step::Label(node) => self.node(&node).is_labelled = true,
            Step::Unlabel(node) => self.node(&node).is_labelled = false,
            // The etcd from before the record is gone with its pod.
            Step::Restart(_) => self.etcd.clear(),
            Step::Add { peer_urls } => {
                self.ids += 1;
                let (id, name) = (self.ids, String::new());
                self.etcd.push(SeenMember { id, name, peer_urls, is_learner: true, is_healthy: false });
            }
            Step::Promote { id } => self.etcd.iter_mut().find(|it| it.id == id).unwrap().is_learner = false,
            Step::Remove { id } => {
                self.etcd.retain(|it| it.id != id);
                assert!(!self.etcd.is_empty(), "the last member was removed");
            }
            Step::Update { id, peer_urls } => {
                self.etcd.iter_mut().find(|it| it.id == id).unwrap().peer_urls = peer_urls;
            }
            Step::Await(_) | Step::Done(_) => {}
        }
        step
    }

    /// Steps until there are no more; what is said at the end.
    fn settle(&mut self) -> Step {
        for _ in 0..60 {
            let end = self.step();
            // It may only be the next look that shows a member.
            if matches!(end, Step::Done(_) | Step::Await(_)) && self.step() == end {
                return end;
            }
        }
        panic!("no end: {:#?}", self.steps);
    }

    fn members(&self) -> Vec<&str> {
        let record = self.seen.record.as_ref().unwrap();
        let nodes: Vec<&str> = record.members.iter().map(|member| member.node.as_str()).collect();
        let mut listed: Vec<&str> = self.etcd.iter().map(|it| it.name.as_str()).collect();
        let mut recorded: Vec<&str> = record.members.iter().map(|member| member.name.as_str()).collect();
        listed.sort_unstable();
        recorded.sort_unstable();
        assert_eq!(listed, recorded);
        assert!(record.members.iter().all(|member| member.joined) && self.etcd.iter().all(|it| !it.is_learner));
        let labelled = self.seen.nodes.iter().filter(|node| node.is_labelled).count();
        assert_eq!(labelled, nodes.len());
        nodes
    }
}

#[test]
fn a_new_cluster_gets_its_members_one_after_the_other() {
    let mut world = World::new(3, &["a", "b", "c", "d"]);
    // Nodes are not Ready before the first member lets them have a network.
    for name in ["a", "b", "c"] {
        world.node(name).is_ready = false;
    }
    world.node("d").is_candidate = false;
    assert!(matches!(world.settle(), Step::Done(Some(_))));
    assert_eq!(world.members(), ["a"]);
    world.node("b").is_ready = true;
    world.node("c").is_ready = true;
    assert_eq!(world.settle(), Step::Done(None));
    assert_eq!(world.members(), ["a", "b", "c"]);
}

#[test]
fn no_member_is_added_while_one_does_not_answer() {
    let mut world = World::new(1, &["a", "b", "c"]);
    world.settle();
    world.wanted.members = 3;
    world.up.retain(|name| name != "a");
    assert!(matches!(world.settle(), Step::Await(_)));
    assert_eq!(world.etcd.len(), 1);
}

#[test]
fn a_lost_node_is_replaced_and_a_silent_one_is_not() {
    let mut world = World::new(3, &["a", "b", "c", "d"]);
    world.settle();
    world.up.retain(|name| name != "b");
    assert!(matches!(world.settle(), Step::Done(Some(said)) if said.contains("member b-")));
    assert_eq!(world.members(), ["a", "b", "c"]);
    world.lose_node("b");
    assert_eq!(world.settle(), Step::Done(None));
    assert_eq!(world.members(), ["a", "c", "d"]);
}

#[test]
fn a_node_whose_label_is_taken_off_comes_back_as_another_member() {
    let mut world = World::new(3, &["a", "b", "c"]);
    world.settle();
    let before = world.seen.record.clone().unwrap().on_node("b").unwrap().name.clone();
    world.node("b").is_labelled = false;
    assert_eq!(world.settle(), Step::Done(None));
    assert_eq!(world.members(), ["a", "c", "b"]);
    assert_ne!(world.seen.record.as_ref().unwrap().on_node("b").unwrap().name, before);
}

#[test]
fn the_only_member_is_never_removed() {
    let mut world = World::new(1, &["a", "b"]);
    world.settle();
    world.node("a").is_labelled = false;
    assert!(matches!(world.settle(), Step::Await(said) if said.contains("only")));
    world.node("a").is_labelled = true;
    assert_eq!(world.settle(), Step::Done(None));
    world.lose_node("a");
    assert!(matches!(world.settle(), Step::Await(said) if said.contains("restore")));
    assert_eq!(world.seen.record.as_ref().unwrap().members.len(), 1);
}

#[test]
fn fewer_members_leave_from_the_end() {
    let mut world = World::new(3, &["a", "b", "c"]);
    world.settle();
    world.wanted.members = 1;
    assert_eq!(world.settle(), Step::Done(None));
    assert_eq!(world.members(), ["a"]);
}

#[test]
fn members_follow_the_addresses_of_their_nodes() {
    let mut world = World::new(3, &["a", "b", "c"]);
    world.settle();
    world.node("b").addresses = vec!["198.51.100.9".parse().unwrap()];
    assert_eq!(world.settle(), Step::Done(None));
    let record = world.seen.record.clone().unwrap();
    assert_eq!(record.on_node("b").unwrap().client_urls, ["https://198.51.100.9:2391"]);
    assert!(world.etcd.iter().any(|it| it.peer_urls == ["https://198.51.100.9:2392"]));
}

#[test]
fn a_restore_begins_with_one_member_and_happens_once() {
    let mut world = World::new(3, &["a", "b", "c"]);
    world.settle();
    world.wanted.restore = Some("c/x.db".parse().unwrap());
    assert_eq!(world.settle(), Step::Done(None));
    let members = world.members();
    assert_eq!((members[0], members.len()), ("c", 3));
    let record = world.seen.record.clone().unwrap();
    assert_eq!(record.members[0].snapshot.as_deref(), Some("x.db"));
    assert_eq!(record.restored, ["c/x.db"]);
    let steps = world.steps.len();
    world.settle();
    assert!(world.steps.len() - steps <= 2, "{:?}", &world.steps[steps..]);
    world.wanted.restore = Some("z/x.db".parse().unwrap());
    assert!(matches!(world.settle(), Step::Await(said) if said.contains("no node z")));
}

#[test]
fn after_most_members_are_lost_a_snapshot_brings_a_cluster_back() {
    let mut world = World::new(3, &["a", "b", "c"]);
    world.settle();
    world.lose_node("a");
    world.lose_node("b");
    assert!(matches!(world.settle(), Step::Await(said) if said.contains("restore")));
    world.wanted.restore = Some("c/x.db".parse().unwrap());
    world.etcd.clear();
    world.add_node("d");
    world.settle();
    assert_eq!(world.members(), ["c"], "two bear no more losses than one");
    world.add_node("e");
    world.settle();
    assert_eq!(world.members(), ["c", "d", "e"]);
}

#[test]
fn a_new_cluster_can_begin_with_a_snapshot() {
    let mut world = World::new(1, &["a", "b"]);
    world.wanted.restore = Some("b/x.db".parse().unwrap());
    assert_eq!(world.settle(), Step::Done(None));
    assert_eq!(world.members(), ["b"]);
    assert_eq!(world.seen.record.as_ref().unwrap().members[0].snapshot.as_deref(), Some("x.db"));
}

#[test]
fn a_node_that_goes_before_its_member_has_joined_is_forgotten() {
    let mut world = World::new(3, &["a", "b", "c"]);
    while !world.steps.iter().any(|step| step.starts_with("Add")) {
        world.step();
    }
    world.lose_node("b");
    world.settle();
    assert_eq!(world.members(), ["a"]);
    world.add_node("d");
    world.settle();
    assert_eq!(world.members(), ["a", "c", "d"]);
}

#[test]
fn a_first_node_that_goes_before_its_member_began_is_forgotten() {
    let mut world = World::new(1, &["a", "b"]);
    world.step();
    world.lose_node("a");
    assert_eq!(world.settle(), Step::Done(None));
    assert_eq!(world.members(), ["b"]);
}

#[test]
fn a_member_that_cannot_join_is_given_up_when_fewer_are_wanted() {
    let mut world = World::new(3, &["a", "b", "c"]);
    while !world.steps.iter().any(|step| step.starts_with("Add")) {
        world.step();
    }
    world.up.retain(|name| name != "b");
    assert!(matches!(world.settle(), Step::Await(said) if said.contains("member b-")));
    world.wanted.members = 1;
    assert_eq!(world.settle(), Step::Done(None));
    assert_eq!(world.members(), ["a"]);
}

#[test]
fn no_cluster_takes_the_place_of_members_whose_record_is_lost() {
    let mut world = World::new(3, &["a", "b", "c"]);
    world.settle();
    let record = world.seen.record.take();
    assert!(matches!(world.settle(), Step::Await(said) if said.contains("record of the members is gone")));
    world.wanted.restore = Some("a/x.db".parse().unwrap());
    assert!(matches!(world.settle(), Step::Await(_)));
    world.seen.record = record;
    world.wanted.restore = None;
    assert_eq!(world.settle(), Step::Done(None));
}

#[test]
fn a_snapshot_that_was_restored_before_is_not_restored_again() {
    let mut world = World::new(1, &["a", "b"]);
    world.settle();
    for snapshot in ["a/x.db", "a/y.db"] {
        world.wanted.restore = Some(snapshot.parse().unwrap());
        assert_eq!(world.settle(), Step::Done(None));
    }
    let record = world.seen.record.clone();
    // As a rollback to earlier values.
    world.wanted.restore = Some("a/x.db".parse().unwrap());
    assert_eq!(world.settle(), Step::Done(None));
    assert_eq!(world.seen.record, record);
}
