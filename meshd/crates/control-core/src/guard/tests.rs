use super::*;

fn guard() -> Guard<()> {
    let mut guard = Guard::default();
    guard.list_begins(None, 1, false);
    guard
}

fn deleted(guard: &mut Guard<()>, at: Instant, class: RecordClass, keys: &[&str], left: usize) -> Judged {
    for key in keys {
        guard.absent(at, (*key).to_owned(), (class, 1), (), Absence::Deleted);
    }
    guard.judge(at, false, |_| left)
}

#[test]
fn holds_more_than_a_third_and_at_least_as_many_as_the_class_says() {
    let now = Instant::now();
    let names: Vec<String> = (0..10).map(|number| number.to_string()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for (class, least, left) in [(RecordClass::Node, 3, 5), (RecordClass::Policy, 10, 19)] {
        assert_eq!(deleted(&mut guard(), now, class, &names[..least - 1], 0).held.len(), 0);
        assert_eq!(deleted(&mut guard(), now, class, &names[..least], left + 1).held.len(), 0);
        let judged = deleted(&mut guard(), now, class, &names[..least], left);
        assert_eq!((judged.held.len(), judged.withdrawn.len()), (least, 0));
    }
    assert_eq!(deleted(&mut guard(), now, RecordClass::Object, &names, 0).withdrawn.len(), 10);
}

#[test]
fn adds_up_what_goes_within_the_window_and_forgets_what_came_back() {
    let mut held = guard();
    let now = Instant::now();
    assert_eq!(deleted(&mut held, now, RecordClass::Node, &["a", "b"], 5).withdrawn, ["a", "b"]);
    // With the third the first two are in force again.
    let judged = deleted(&mut held, now + Duration::from_secs(4), RecordClass::Node, &["c"], 4);
    assert_eq!(judged, Judged { withdrawn: Vec::new(), held: ["a", "b", "c"].map(str::to_owned).into() });
    // Already over the line: the next one is held as well, and only that one is new.
    assert_eq!(deleted(&mut held, now + Duration::from_secs(5), RecordClass::Node, &["d"], 3).held, ["d"]);
    assert_eq!(deleted(&mut held, now + Duration::from_secs(20), RecordClass::Node, &["e"], 2).withdrawn, ["e"]);
    assert_eq!(held.next_deadline(), Some(now + Duration::from_secs(34)));
    assert_eq!(held.tick(now + Duration::from_secs(33)), [""; 0]);
    assert_eq!(held.tick(now + Duration::from_secs(34)), ["a", "b", "c"]);
    assert_eq!(held.tick(now + Duration::from_secs(35)), ["d"]);

    // What went within the window is held as well once all has to be.
    let mut held = guard();
    assert_eq!(deleted(&mut held, now, RecordClass::Node, &["a"], 5).held, [""; 0]);
    assert_eq!(held.judge(now, true, |_| 5).held, ["a"]);

    let mut held = guard();
    assert_eq!(deleted(&mut held, now, RecordClass::Node, &["a", "b"], 5).held, [""; 0]);
    held.returned("a");
    assert_eq!(deleted(&mut held, now, RecordClass::Node, &["c"], 5).held, [""; 0]);
}

#[test]
fn what_policies_select_by_is_held_with_them() {
    let now = Instant::now();
    let mut held = guard();
    let names: Vec<String> = (0..10).map(|number| number.to_string()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    assert_eq!(deleted(&mut held, now, RecordClass::Object, &["pod"], 5).withdrawn, ["pod"]);
    assert_eq!(deleted(&mut held, now, RecordClass::Policy, &names, 0).held.len(), 11);
    // Also what goes while they are held.
    let later = now + Duration::from_secs(20);
    assert_eq!(deleted(&mut held, later, RecordClass::Object, &["namespace"], 5).held, ["namespace"]);
    assert_eq!(held.tick(later + HOLD).len(), 12);
    assert_eq!(deleted(&mut held, later + HOLD, RecordClass::Object, &["another"], 5).withdrawn, ["another"]);
}

fn cluster(id: u64) -> Option<ClusterId> {
    ClusterId::new(id)
}

#[test]
fn tells_another_etcd_by_its_cluster_its_revision_and_its_keys() {
    for (list, sign) in [
        ((cluster(1), 20, false), None),
        ((None, 20, false), None),
        ((cluster(2), 20, false), Some(Sign::Cluster)),
        ((cluster(1), 9, false), Some(Sign::Revision)),
        ((None, 9, false), Some(Sign::Revision)),
        ((cluster(1), 20, true), Some(Sign::Key)),
    ] {
        let mut guard: Guard<()> = Guard::default();
        guard.list_begins(cluster(1), 5, false);
        guard.reached(10);
        guard.list_begins(list.0, list.1, list.2);
        assert_eq!(guard.doubt().map(|doubt| doubt.sign), sign, "{list:?}");
        assert!(!guard.absent(Instant::now(), "a".into(), (RecordClass::Policy, 100), (), Absence::Deleted));
        assert_eq!(
            guard.absent(Instant::now(), "b".into(), (RecordClass::Policy, 1), (), Absence::Deleted),
            sign.is_some(),
            "only an etcd in doubt deletes nothing that it did not bring"
        );
        assert!(guard.absent(Instant::now(), "b".into(), (RecordClass::Policy, 1), (), Absence::Listed));
        assert_eq!(guard.awaits_list(), sign.is_none());
        assert_eq!(guard.settle(), None, "something is held");
        guard.returned("b");
        assert_eq!(guard.settle(), sign);
        assert_eq!(guard.lineage().unwrap().revision, list.1);
    }
}

#[test]
fn in_doubt_only_what_is_in_force_or_was_written_since_counts() {
    let mut guard: Guard<()> = Guard::default();
    guard.list_begins(cluster(1), 50, false);
    assert!(guard.counts(RecordClass::Policy, 3, false));
    guard.list_begins(cluster(2), 7, false);
    for class in [RecordClass::Policy, RecordClass::Object, RecordClass::Setting] {
        assert!(!guard.counts(class, 7, false) && guard.counts(class, 7, true) && guard.counts(class, 8, false));
    }
    // Their owners put these right.
    assert!(guard.counts(RecordClass::Node, 7, false) && guard.counts(RecordClass::Attachment, 7, false));
    guard.keep("p".into(), RecordClass::Policy, Some(()));
    // The same one again, later: what was written since then counts still.
    guard.reached(12);
    guard.list_begins(cluster(2), 12, false);
    assert!(guard.counts(RecordClass::Policy, 8, false));
    // Yet another: nothing of that counts.
    guard.list_begins(cluster(3), 30, false);
    assert!(!guard.counts(RecordClass::Policy, 30, false));
    // The first one is back, further than it was.
    guard.list_begins(cluster(1), 60, false);
    assert!(guard.doubt().is_none() && guard.awaits_list(), "what it lacks is shown by one list only");
    guard.list_begins(cluster(1), 60, false);
    guard.confirm(Instant::now());
    assert_eq!(guard.judge(Instant::now(), false, |_| 1).withdrawn, ["p"]);
}

#[test]
fn a_second_list_confirms_what_the_first_lacked() {
    let now = Instant::now();
    let mut guard = guard();
    guard.list_begins(None, 2, false);
    assert!(guard.absent(now, "a".into(), (RecordClass::Policy, 1), (), Absence::Listed));
    guard.confirm(now);
    assert_eq!(guard.judge(now, false, |_| 5), Judged::default());
    guard.list_begins(None, 2, false);
    assert!(guard.absent(now, "b".into(), (RecordClass::Policy, 1), (), Absence::Listed));
    guard.confirm(now);
    assert_eq!(guard.judge(now, false, |_| 5).withdrawn, ["a"]);
    assert!(guard.awaits_list(), "for b");
    guard.returned("b");
    assert!(!guard.awaits_list());
}
