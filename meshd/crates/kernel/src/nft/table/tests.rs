use super::*;

fn net(s: &str) -> IpNet {
    s.parse().unwrap()
}

fn on(prefix: &str, dev: &str) -> PrefixOn {
    PrefixOn { prefix: net(prefix), dev: InterfaceName::new(dev).unwrap() }
}

fn seen(set: &NftSet) -> ObservedSet {
    ObservedSet { kind: Some(set.kind), elements: Some(set.elements.clone()) }
}

fn diff_of(from: &NftSet, to: &NftSet) -> TableDiff {
    let table = NftTable { sets: BTreeMap::from([("s".into(), to.clone())]), ..NftTable::default() };
    let observed = ObservedTable { sets: BTreeMap::from([("s".to_owned(), seen(from))]), ..ObservedTable::default() };
    table.diff("t", Some(&observed))
}

#[test]
fn nested_prefixes_leave_the_outermost_and_neighbours_stay_apart() {
    let nets = ["10.1.0.0/16", "10.0.0.0/24", "10.0.1.0/24", "10.1.2.0/24", "10.0.0.7/24", "fd00::/8"];
    let set = NftSet::prefixes(true, &nets.map(net));
    let texts: Vec<_> = set.elements.iter().map(Element::text).collect();
    assert_eq!(texts, ["10.0.0.0/24", "10.0.1.0/24", "10.1.0.0/16"]);
    let entries = [on("10.0.0.0/16", "a"), on("10.0.1.0/24", "b"), on("10.0.2.0/24", "a")];
    let set = NftSet::prefixes_on(true, &entries);
    let texts: BTreeSet<_> = set.elements.iter().map(Element::text).collect();
    assert_eq!(texts, BTreeSet::from(["10.0.0.0/16 . \"a\"".to_owned(), "10.0.1.0/24 . \"b\"".to_owned()]));
}

#[test]
fn elements_come_before_the_routes_and_go_after_them() {
    let from = NftSet::prefixes_on(true, &[on("10.0.1.0/24", "a")]);
    let to = NftSet::prefixes_on(true, &[on("10.0.2.0/24", "a")]);
    let diff = diff_of(&from, &to);
    assert_eq!(diff.before.text(), "add element inet t s { 10.0.2.0/24 . \"a\" }\n");
    assert_eq!(diff.after.text(), "delete element inet t s { 10.0.1.0/24 . \"a\" }\n");
    assert_eq!(diff_of(&to, &to), TableDiff::default());
}

/// What lies in the way of a new element goes in the same transaction, so that no packet sees neither.
#[test]
fn an_overlapping_element_is_exchanged_at_once() {
    let from = NftSet::prefixes_on(true, &[on("10.0.1.0/24", "a"), on("10.9.0.0/24", "a")]);
    let to = NftSet::prefixes_on(true, &[on("10.0.0.0/16", "a")]);
    let diff = diff_of(&from, &to);
    assert_eq!(
        diff.before.text(),
        "delete element inet t s { 10.0.1.0/24 . \"a\" }\nadd element inet t s { 10.0.0.0/16 . \"a\" }\n"
    );
    assert_eq!(diff.after.text(), "delete element inet t s { 10.9.0.0/24 . \"a\" }\n");
    let diff = diff_of(&NftSet::prefixes(true, &[net("10.0.1.0/24")]), &NftSet::prefixes(true, &[net("10.0.0.0/16")]));
    assert_eq!(diff.before.text(), "flush set inet t s\nadd element inet t s { 10.0.0.0/16 }\n");
}

#[test]
fn a_base_chain_is_rewritten_where_it_stands() {
    let chain = |texts: &[&str]| Chain {
        base: Some(BaseChain { kind: "filter", hook: "forward", priority: 0 }),
        rules: texts.iter().map(|t| NftRule::new((*t).to_owned(), "why")).collect(),
    };
    let observed = |rules: &Chain| ObservedTable {
        chains: BTreeMap::from([(
            "c".to_owned(),
            ListedChain {
                base: Some(("filter".to_owned(), "forward".to_owned(), 0)),
                policy_drop: false,
                comments: rules.rules.iter().map(|r| Some(r.comment())).collect(),
            },
        )]),
        ..ObservedTable::default()
    };
    let table = |chain: Chain| NftTable { chains: BTreeMap::from([("c".into(), chain)]), ..NftTable::default() };
    let old = observed(&chain(&["accept"]));
    assert_eq!(table(chain(&["accept"])).diff("t", Some(&old)), TableDiff::default());
    let text = table(chain(&["drop"])).diff("t", Some(&old)).before.text();
    assert!(text.starts_with("flush chain inet t c\nadd rule inet t c drop comment \"why #"), "{text}");
    assert!(!text.contains("delete"), "{text}");
    let mut other = chain(&["accept"]);
    other.base.as_mut().unwrap().priority = 5;
    let text = table(other).diff("t", Some(&old)).before.text();
    assert!(text.starts_with("add table inet t\ndelete table inet t\nadd table inet t\n"), "{text}");
}

/// A name from a listing that could mean something else in a command is left alone.
#[test]
fn strange_names_are_never_written() {
    let observed = ObservedTable {
        chains: BTreeMap::from([
            ("x; flush ruleset".to_owned(), ListedChain::default()),
            ("old".to_owned(), ListedChain::default()),
        ]),
        ..ObservedTable::default()
    };
    let diff = NftTable::default().diff("t", Some(&observed));
    assert_eq!(diff.after.text(), "flush chain inet t old\ndelete chain inet t old\n");
}
