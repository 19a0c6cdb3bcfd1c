use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt as _, path::Path};

use cni::{
    daemon::{Attach, Begin, Pod},
    environment::AttachmentName,
};
use tokio::time::{Duration, timeout};

use super::{AttachError, Attachments, Progress, endpoints, sweep::look};

const BOOT: &str = "boot-1";

fn name(id: &str) -> AttachmentName {
    AttachmentName { container_id: id.to_owned(), ifname: "eth0".to_owned() }
}

/// In a namespace that is there: this process' own.
fn begin() -> Begin {
    let data = fs::metadata("/proc/self/ns/net").unwrap();
    Begin {
        network: "mesh".to_owned(),
        netns: "/proc/self/ns/net".to_owned(),
        netns_inode: Some((data.dev(), data.ino())),
        interface: Some("meshnotthere".to_owned()),
    }
}

fn attach(address: &str) -> Attach {
    Attach {
        pod: Pod { namespace: "default".to_owned(), name: "c".to_owned(), ..Pod::default() },
        addresses: vec![address.parse().unwrap()],
        interface: "meshnotthere".to_owned(),
    }
}

fn reserve(run: &Path, address: &str, id: &str) {
    let dir = run.join("ipam/mesh");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join(address), format!("{id}\r\neth0")).unwrap();
}

fn open(run: &Path) -> Attachments {
    Attachments::open(run, BOOT).unwrap()
}

#[test]
fn are_the_same_after_a_restart() {
    let run = tempfile::tempdir().unwrap();
    let first = open(run.path());
    first.begin(&name("a"), begin()).unwrap();
    first.attach(&name("a"), attach("10.244.3.2")).unwrap();
    first.begin(&name("b"), begin()).unwrap();
    first.begin(&name("c"), begin()).unwrap();
    assert!(first.detach(&name("c")).unwrap());
    assert!(!first.detach(&name("c")).unwrap());
    let second = open(run.path());
    assert_eq!(second.table().borrow().attachments, first.table().borrow().attachments);
    assert_eq!(second.table().borrow().attachments.len(), 2);
}

#[test]
fn those_of_an_earlier_boot_are_gone_with_their_addresses() {
    let run = tempfile::tempdir().unwrap();
    let first = open(run.path());
    first.begin(&name("a"), begin()).unwrap();
    reserve(run.path(), "10.244.3.2", "a");
    drop(open(run.path()));
    assert!(run.path().join("ipam/mesh/10.244.3.2").exists(), "a restart frees nothing");
    let second = Attachments::open(run.path(), "boot-2").unwrap();
    assert!(second.table().borrow().attachments.is_empty());
    assert!(!run.path().join("ipam/mesh/10.244.3.2").exists());
}

#[test]
fn half_a_file_is_no_attachment() {
    let run = tempfile::tempdir().unwrap();
    let first = open(run.path());
    first.begin(&name("a"), begin()).unwrap();
    let dir = run.path().join("attachments");
    let whole = fs::read(dir.join("a@eth0")).unwrap();
    fs::write(dir.join("b@eth0.new"), &whole[..whole.len() / 2]).unwrap();
    // A copy under another name would be a second owner of the same.
    fs::write(dir.join("b@eth0"), &whole).unwrap();
    assert_eq!(open(run.path()).table().borrow().attachments.keys().cloned().collect::<Vec<_>>(), [name("a")]);
}

#[test]
fn one_address_has_one_owner() {
    let run = tempfile::tempdir().unwrap();
    let attachments = open(run.path());
    for id in ["a", "b"] {
        attachments.begin(&name(id), begin()).unwrap();
    }
    attachments.attach(&name("a"), attach("10.244.3.2")).unwrap();
    let error = attachments.attach(&name("b"), attach("10.244.3.2")).unwrap_err();
    assert!(matches!(&error, AttachError::Taken { holder, .. } if *holder == name("a")), "{error}");
    // Said twice it is the same.
    attachments.attach(&name("a"), attach("10.244.3.2")).unwrap();
    attachments.detach(&name("a")).unwrap();
    attachments.attach(&name("b"), attach("10.244.3.2")).unwrap();
}

#[test]
fn what_does_not_hold_is_not_taken() {
    let run = tempfile::tempdir().unwrap();
    let attachments = open(run.path());
    assert!(matches!(attachments.attach(&name("a"), attach("10.244.3.2")), Err(AttachError::Unknown(_))));
    for id in ["", "../a", "a/b", &"a".repeat(201)] {
        assert!(matches!(attachments.begin(&name(id), begin()), Err(AttachError::BadName(_))), "{id}");
        assert!(matches!(attachments.detach(&name(id)), Err(AttachError::BadName(_))), "{id}");
    }
    attachments.begin(&name("a"), begin()).unwrap();
    let bad = Attach { pod: Pod { namespace: "Not a name".to_owned(), ..Pod::default() }, ..attach("10.244.3.2") };
    assert!(matches!(attachments.attach(&name("a"), bad), Err(AttachError::Invalid(_))));
    assert!(matches!(attachments.attach(&name("a"), attach("127.0.0.1")), Err(AttachError::Invalid(_))));
}

#[test]
fn what_is_gone_at_two_looks_is_freed_and_what_is_there_is_not() {
    let run = tempfile::tempdir().unwrap();
    let attachments = open(run.path());
    let nowhere = Begin { netns: run.path().join("gone").display().to_string(), ..begin() };
    let replaced = Begin { netns_inode: Some((0, 1)), ..begin() };
    let with_interface = Begin { interface: Some("lo".to_owned()), ..nowhere.clone() };
    for (id, begin, address) in [
        ("there", begin(), "10.244.3.2"),
        ("nowhere", nowhere, "10.244.3.3"),
        ("replaced", replaced, "10.244.3.4"),
        ("interface", with_interface, "10.244.3.5"),
    ] {
        attachments.begin(&name(id), begin).unwrap();
        reserve(run.path(), address, id);
    }
    reserve(run.path(), "10.244.3.6", "orphan");
    let first = look(&attachments, &BTreeSet::new());
    assert_eq!(first, ["nowhere", "orphan", "replaced"].map(name).into());
    assert_eq!(attachments.table().borrow().attachments.len(), 4, "nothing is freed at the first look");
    assert_eq!(look(&attachments, &first), BTreeSet::new());
    assert_eq!(
        attachments.table().borrow().attachments.keys().cloned().collect::<Vec<_>>(),
        [name("interface"), name("there")]
    );
    let left = cni::ipam::reserved(attachments.address_dir(), "mesh").unwrap();
    let left: BTreeSet<String> = left.into_iter().map(|(address, _)| address.to_string()).collect();
    assert_eq!(left, ["10.244.3.2", "10.244.3.5"].map(str::to_owned).into());
}

#[test]
fn the_mesh_sees_those_with_an_address_of_this_node() {
    let run = tempfile::tempdir().unwrap();
    let attachments = open(run.path());
    for (id, address) in [("own", "10.244.3.2"), ("foreign", "192.0.2.9")] {
        attachments.begin(&name(id), begin()).unwrap();
        attachments.attach(&name(id), attach(address)).unwrap();
    }
    attachments.begin(&name("pending"), begin()).unwrap();
    let subnets = ["10.244.3.0/24".parse().unwrap()];
    let records = endpoints(&attachments.table().borrow(), &"n1".parse().unwrap(), &subnets);
    assert_eq!(records.keys().collect::<Vec<_>>(), ["endpoints/n1/own/eth0"]);
    let value = String::from_utf8(records["endpoints/n1/own/eth0"].clone()).unwrap();
    assert!(value.contains("\"10.244.3.2\"") && value.contains("\"namespace\":\"default\""), "{value}");
}

#[tokio::test]
async fn an_add_waits_for_whoever_enforces_policy_and_for_nobody_else() {
    let run = tempfile::tempdir().unwrap();
    let attachments = open(run.path());
    attachments.begin(&name("a"), begin()).unwrap();
    let generation = attachments.attach(&name("a"), attach("10.244.3.2")).unwrap();
    attachments.in_force(generation).await;
    assert!(!attachments.awaits_policy());
    let enforcement = attachments.enforcement();
    enforcement.progress(Progress::default());
    assert!(attachments.awaits_policy());
    let waits = timeout(Duration::from_millis(20), attachments.in_force(generation)).await;
    assert!(waits.is_err(), "nothing is in force yet");
    let generation_now = enforcement.table.borrow().generation;
    enforcement.progress(Progress { generation: generation_now, refused: false });
    attachments.in_force(generation).await;
    assert!(!attachments.awaits_policy());
    enforcement.progress(Progress { generation: generation_now, refused: true });
    assert!(attachments.awaits_policy(), "the next one would wait in vain");
    attachments.in_force(generation).await;
}
