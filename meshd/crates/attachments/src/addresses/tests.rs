use std::net::IpAddr;

use cni::daemon::AddressRange;
use proptest::prelude::*;

use super::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn range(json: serde_json::Value) -> AddressRange {
    serde_json::from_value(json).unwrap()
}

/// The whole of a node's subnets.
fn whole(subnets: &[&str], overlay: &[&str]) -> Vec<RangeSet> {
    let overlay: Vec<IpAddr> = overlay.iter().map(|text| ip(text)).collect();
    range_sets(&[], &nets(subnets), &overlay).unwrap()
}

fn used(addresses: &[&str]) -> InUse {
    addresses.iter().map(|text| (ip(text), None)).collect()
}

const SMALL: [&str; 2] = ["10.0.0.0/29", "fd00::/125"];

#[test]
fn an_address_of_each_family_or_none() {
    let sets = whole(&SMALL, &["10.0.0.0", "fd00::7"]);
    let history = History::default();
    let first = history.choose(&sets, &[], &[], &InUse::new()).unwrap();
    assert_eq!(first, nets(&["10.0.0.2/29", "fd00::2/125"]));
    let full = used(&["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
    let error = history.choose(&sets, &[], &[], &full).unwrap_err();
    assert_eq!(error.to_string(), "no free address in 10.0.0.2 to 10.0.0.6: 5 in use");
    // The node's own address is the last one, and is not given with all others gone.
    let full = used(&["fd00::2", "fd00::3", "fd00::4", "fd00::5", "fd00::6"]);
    assert!(matches!(history.choose(&sets, &[], &[], &full), Err(AddressError::Exhausted { in_use: 5, .. })));
}

#[test]
fn an_address_that_has_just_become_free_comes_last() {
    let sets = whole(&["10.0.0.0/29"], &["10.0.0.0"]);
    let mut history = History::default();
    let mut given = Vec::new();
    for _ in 0..12 {
        let address = history.choose(&sets, &[], &[], &InUse::new()).unwrap()[0].addr();
        history.allocated([address]);
        history.freed([address]);
        given.push(address.to_string());
    }
    let round = ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"];
    assert_eq!(given[..5], round);
    assert_eq!(given[5..10], round);
    // A start keeps the place, though not the order.
    let history = History::after(history.last().collect::<Vec<_>>());
    assert_eq!(history.choose(&sets, &[], &[], &InUse::new()).unwrap(), nets(&["10.0.0.4/29"]));
}

#[test]
fn a_requested_address_is_given_or_the_reason_said() {
    let sets = whole(&SMALL, &["10.0.0.0", "fd00::7"]);
    let history = History::default();
    let choose = |requested: &[&str], held: &[&str], in_use: &InUse| {
        let list = |texts: &[&str]| texts.iter().map(|text| ip(text)).collect::<Vec<_>>();
        history.choose(&sets, &list(requested), &list(held), in_use)
    };
    assert_eq!(choose(&["fd00::5"], &[], &InUse::new()).unwrap(), nets(&["10.0.0.2/29", "fd00::5/125"]));
    // A second attempt of one ADD gets what the first one got, and a requested address goes before that.
    assert_eq!(choose(&[], &["10.0.0.4"], &InUse::new()).unwrap(), nets(&["10.0.0.4/29", "fd00::2/125"]));
    assert_eq!(choose(&["10.0.0.5"], &["10.0.0.4"], &InUse::new()).unwrap()[0], nets(&["10.0.0.5/29"])[0]);
    let holder = AttachmentName { container_id: "c7".to_owned(), ifname: "eth0".to_owned() };
    let taken = choose(&["10.0.0.5"], &[], &InUse::from([(ip("10.0.0.5"), Some(holder))])).unwrap_err();
    assert_eq!(taken.to_string(), "requested address 10.0.0.5 is in use by container c7");
    for other in ["10.0.0.0", "10.0.0.1", "10.0.0.7", "10.0.0.9", "fd00::", "fd00::1", "fd00::7"] {
        let error = choose(&[other], &[], &InUse::new()).unwrap_err();
        assert!(matches!(error, AddressError::OutsideRanges { .. }), "{other}: {error}");
    }
    // Two of one set.
    assert!(choose(&["10.0.0.4", "10.0.0.5"], &[], &InUse::new()).is_err());
}

#[test]
fn named_ranges_are_host_locals() {
    let sets = |ranges: &[&[serde_json::Value]]| {
        let named: Vec<Vec<AddressRange>> = ranges.iter().map(|set| set.iter().cloned().map(range).collect()).collect();
        range_sets(&named, &nets(&["10.244.3.0/24", "fd42::/64"]), &[ip("10.244.3.0"), ip("fd42::ffff:ffff:ffff:ffff")])
    };
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let shown = |text: &str| sets(&[&[json(text)]]).map(|sets| sets[0].to_string());
    assert_eq!(shown(r#"{"subnet": "10.244.3.0/24"}"#).unwrap(), "10.244.3.2 to 10.244.3.254");
    assert_eq!(shown(r#"{"subnet": "10.244.3.128/25"}"#).unwrap(), "10.244.3.129 to 10.244.3.254");
    assert_eq!(shown(r#"{"subnet": "10.244.3.64/26"}"#).unwrap(), "10.244.3.65 to 10.244.3.126");
    // The part of a wider one that is this node's.
    let wide = r#"{"subnet": "10.244.0.0/16", "rangeStart": "10.244.3.20", "rangeEnd": "10.244.9.1"}"#;
    assert_eq!(shown(wide).unwrap(), "10.244.3.20 to 10.244.3.254");
    let address = History::default().choose(&sets(&[&[json(wide)]]).unwrap(), &[], &[], &InUse::new()).unwrap();
    assert_eq!(address, nets(&["10.244.3.20/16"]));
    // A gateway is never given, not by request either.
    let gateway = [json(r#"{"subnet": "10.244.3.128/25", "rangeEnd": "10.244.3.130"}"#)];
    let gateway = sets(&[&gateway]).unwrap();
    let choose = |in_use: &InUse| History::default().choose(&gateway, &[], &[], in_use);
    assert_eq!(choose(&InUse::new()).unwrap(), nets(&["10.244.3.130/25"]));
    assert!(choose(&used(&["10.244.3.130"])).is_err());
    assert!(History::default().choose(&gateway, &[ip("10.244.3.129")], &[], &InUse::new()).is_err());
    // Two ranges in one set give one address, two sets two.
    let low = json(r#"{"subnet": "10.244.3.0/24", "rangeStart": "10.244.3.5", "rangeEnd": "10.244.3.5"}"#);
    let high = json(r#"{"subnet": "10.244.3.0/24", "rangeStart": "10.244.3.9", "rangeEnd": "10.244.3.9"}"#);
    let one = sets(&[&[low.clone(), high.clone()]]).unwrap();
    let of = |sets: &[RangeSet], in_use: &InUse| History::default().choose(sets, &[], &[], in_use);
    assert_eq!(of(&one, &InUse::new()).unwrap(), nets(&["10.244.3.5/24"]));
    assert_eq!(of(&one, &used(&["10.244.3.5"])).unwrap(), nets(&["10.244.3.9/24"]));
    let two = sets(&[&[low], &[high]]).unwrap();
    assert_eq!(of(&two, &InUse::new()).unwrap(), nets(&["10.244.3.5/24", "10.244.3.9/24"]));

    for (bad, says) in [
        (r#"{"subnet": "192.0.2.0/24"}"#, "this node's subnets 10.244.3.0/24 and fd42::/64"),
        (r#"{"subnet": "10.244.3.7/24"}"#, "10.244.3.7/24 has host bits; write 10.244.3.0/24"),
        (
            r#"{"subnet": "10.244.3.0/24", "rangeStart": "10.244.4.1"}"#,
            "rangeStart 10.244.4.1 is outside 10.244.3.0/24",
        ),
        (r#"{"subnet": "10.244.3.0/24", "rangeStart": "10.244.3.9", "rangeEnd": "10.244.3.8"}"#, "is after rangeEnd"),
        (r#"{"subnet": "10.244.3.0/24", "gateway": "fd42::1"}"#, "gateway fd42::1 is outside"),
    ] {
        let error = shown(bad).unwrap_err().to_string();
        assert!(error.contains(says), "{bad}: {error}");
    }
    assert!(sets(&[&[]]).is_err());
    assert!(sets(&[&[json(r#"{"subnet": "10.244.3.0/24"}"#), json(r#"{"subnet": "fd42::/64"}"#)]]).is_err());
    assert!(matches!(range_sets(&[], &nets(&["10.0.0.0/31"]), &[]), Err(AddressError::TooSmall(_))));
}

/// What may happen to a store.
#[derive(Debug, Clone)]
enum Step {
    /// An ADD that takes what comes, or this address.
    Add(Option<u8>),
    /// The DEL of one of those that are there.
    Del(usize),
    /// Another plugin announces this address.
    Announce(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Add(None)),
        1 => any::<u8>().prop_map(|last| Step::Add(Some(last % 20))),
        4 => any::<usize>().prop_map(Step::Del),
        1 => any::<u8>().prop_map(|last| Step::Announce(last % 20)),
    ]
}

/// Each address with the time it became free; of equal ones the next behind the last given comes first.
struct Naive {
    free_since: BTreeMap<u8, u64>,
    last: Option<u8>,
    time: u64,
}

impl Naive {
    fn next(&self) -> Option<u8> {
        let distance = |last: u8| match self.last {
            Some(before) if (2..14).contains(&(before + 1)) => {
                (i16::from(last) - i16::from(before) - 1).rem_euclid(256)
            }
            _ => i16::from(last),
        };
        self.free_since.iter().min_by_key(|(last, since)| (**since, distance(**last))).map(|(last, _)| *last)
    }
}

proptest! {
    #[test]
    fn gives_what_a_naive_store_gives(steps in prop::collection::vec(step(), 1..200)) {
        // Addresses .2 to .13 of a subnet that has .0 to .15; .14 is the node's.
        let sets = whole(&["10.0.0.0/28"], &["10.0.0.14"]);
        let address = |last: u8| IpAddr::from([10, 0, 0, last]);
        let mut history = History::default();
        let mut naive = Naive { free_since: (2..14).map(|last| (last, 0)).collect(), last: None, time: 0 };
        let mut in_use = InUse::new();
        for step in steps {
            match step {
                Step::Add(wanted) => {
                    let requested: Vec<IpAddr> = wanted.map(address).into_iter().collect();
                    let expected = match wanted {
                        Some(last) => naive.free_since.contains_key(&last).then_some(last),
                        None => naive.next(),
                    };
                    let chosen = history.choose(&sets, &requested, &[], &in_use);
                    prop_assert_eq!(chosen.as_ref().ok().map(|chosen| chosen[0].addr()), expected.map(address));
                    if let Some(last) = expected {
                        history.allocated([address(last)]);
                        naive.free_since.remove(&last);
                        naive.last = Some(last);
                        in_use.insert(address(last), None);
                    }
                }
                Step::Del(which) => {
                    let Some(gone) = in_use.keys().nth(which % in_use.len().max(1)).copied() else { continue };
                    in_use.remove(&gone);
                    history.freed([gone]);
                    naive.time += 1;
                    let IpAddr::V4(v4) = gone else { unreachable!() };
                    let last = v4.octets()[3];
                    if (2..14).contains(&last) {
                        naive.free_since.insert(last, naive.time);
                    }
                }
                Step::Announce(last) => {
                    if in_use.insert(address(last), None).is_none() {
                        history.allocated([address(last)]);
                        naive.free_since.remove(&last);
                        naive.last = Some(last);
                    }
                }
            }
        }
    }
}
