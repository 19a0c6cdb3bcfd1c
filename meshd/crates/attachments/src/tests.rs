use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt as _, path::Path};

use cni::{
    daemon::{AddressRequest, Attach, Begin, BeginAdd, DaemonClient, Network, PodReference},
    environment::AttachmentName,
};
use tokio::time::{Duration, timeout};

use super::{AckProgress, Arrival, AttachError, Attachments, endpoints, sweep::look};
use crate::addresses::AddressError;

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

fn network() -> Network {
    Network {
        networks: vec!["10.244.0.0/16".parse().unwrap()],
        subnets: vec!["10.244.3.0/29".parse().unwrap()],
        overlay: vec!["10.244.3.0".parse().unwrap()],
        mtu: 1420,
    }
}

/// An ADD whose addresses come from elsewhere.
fn begin_add(attachments: &Attachments, name: &AttachmentName, begin: Begin) -> Result<(), AttachError> {
    attachments
        .begin(name, BeginAdd { begin, addresses: None }, &network(), Arrival(0))
        .map(|allocated| assert_eq!(allocated, None))
}

/// An ADD that asks for an address, or for this one.
fn allocate(attachments: &Attachments, id: &str, wanted: Option<&str>) -> Result<String, AttachError> {
    let ips = wanted.into_iter().map(|address| address.parse().unwrap()).collect();
    let addresses = Some(AddressRequest { ips, ..AddressRequest::default() });
    let allocated = attachments.begin(&name(id), BeginAdd { begin: begin(), addresses }, &network(), Arrival(0))?;
    Ok(allocated.unwrap().iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
}

fn attach(address: &str) -> Attach {
    Attach {
        pod: PodReference { namespace: "default".to_owned(), name: "c".to_owned(), ..PodReference::default() },
        addresses: vec![address.parse().unwrap()],
        interface: "meshnotthere".to_owned(),
        mac: None,
        allowed_sources: Vec::new(),
    }
}

#[test]
fn a_deletion_refuses_an_add_that_arrived_before_it() {
    let run = tempfile::tempdir().unwrap();
    let attachments = open(run.path());
    let begin_at = |arrival| {
        let addresses = Some(AddressRequest::default());
        attachments.begin(&name("a"), BeginAdd { begin: begin(), addresses }, &network(), Arrival(arrival))
    };
    assert!(!attachments.delete(&name("a"), Arrival(8)).unwrap());
    assert!(matches!(begin_at(7), Err(AttachError::Deleted(_))));
    assert!(attachments.table().borrow().attachments.is_empty());
    begin_at(9).unwrap();
    assert!(attachments.delete(&name("a"), Arrival(10)).unwrap());
    assert!(matches!(begin_at(9), Err(AttachError::Deleted(_))));
    // The deletions that it remembers are bounded, the oldest goes first.
    for later in 0..super::MAX_DELETED as u64 {
        attachments.delete(&name(&format!("c{later}")), Arrival(11 + later)).unwrap();
    }
    assert_eq!(attachments.lock().deleted.len(), super::MAX_DELETED);
    assert!(!attachments.lock().deleted.contains_key(&name("a")));
}

#[test]
fn nobody_may_send_from_anothers_address() {
    let run = tempfile::tempdir().unwrap();
    let attachments = open(run.path());
    for id in ["a", "b", "c"] {
        begin_add(&attachments, &name(id), begin()).unwrap();
    }
    let router = Attach { allowed_sources: vec!["10.42.7.0/24".parse().unwrap()], ..attach("10.244.3.2") };
    attachments.attach(&name("a"), router.clone()).unwrap();
    let refused = |outcome: Result<u64, AttachError>| match outcome {
        Err(AttachError::SourceTaken { router, holder, .. }) => (router, holder),
        other => panic!("{other:?}"),
    };
    let inside = attach("10.42.7.9");
    assert_eq!(refused(attachments.attach(&name("b"), inside.clone())), ("a".to_owned(), "b".to_owned()));
    assert!(attachments.detach(&name("a")).unwrap());
    attachments.attach(&name("b"), inside).unwrap();
    begin_add(&attachments, &name("a"), begin()).unwrap();
    assert_eq!(refused(attachments.attach(&name("a"), router.clone())), ("a".to_owned(), "b".to_owned()));
    // Prefixes that no pod may claim.
    for prefix in ["0.0.0.0/0", "fe80::/64", "224.0.0.0/4", "127.0.0.0/8"] {
        let attach = Attach { allowed_sources: vec![prefix.parse().unwrap()], ..attach("10.244.3.2") };
        assert!(matches!(attachments.attach(&name("a"), attach), Err(AttachError::Invalid(_))), "{prefix}");
    }
    // Two routers of one network.
    assert!(attachments.detach(&name("b")).unwrap());
    attachments.attach(&name("a"), router.clone()).unwrap();
    let second = Attach { addresses: vec!["10.244.3.3".parse().unwrap()], ..router };
    attachments.attach(&name("c"), second).unwrap();
    let bad = Attach { interface: "veth*".to_owned(), ..attach("10.244.3.4") };
    assert!(matches!(attachments.attach(&name("c"), bad), Err(AttachError::BadInterface(_))));
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
    begin_add(&first, &name("a"), begin()).unwrap();
    first.attach(&name("a"), attach("10.244.3.2")).unwrap();
    begin_add(&first, &name("b"), begin()).unwrap();
    begin_add(&first, &name("c"), begin()).unwrap();
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
    assert_eq!(allocate(&first, "a", None).unwrap(), "10.244.3.2/29");
    let again = open(run.path());
    assert_eq!(again.table().borrow().attachments.len(), 1, "a restart frees nothing");
    let second = Attachments::open(run.path(), "boot-2").unwrap();
    assert!(second.table().borrow().attachments.is_empty());
    assert_eq!(allocate(&second, "b", Some("10.244.3.2")).unwrap(), "10.244.3.2/29");
}

#[test]
fn every_address_of_an_attachment_is_its_own_until_its_del() {
    let run = tempfile::tempdir().unwrap();
    let attachments = open(run.path());
    assert_eq!(allocate(&attachments, "a", None).unwrap(), "10.244.3.2/29");
    assert_eq!(allocate(&attachments, "a", None).unwrap(), "10.244.3.2/29", "the same ADD made again");
    assert_eq!(allocate(&attachments, "b", None).unwrap(), "10.244.3.3/29");
    // An earlier version of the plugin, and chained ones, announce theirs.
    begin_add(&attachments, &name("c"), begin()).unwrap();
    let taken = attachments.attach(&name("c"), attach("10.244.3.3")).unwrap_err();
    assert!(matches!(&taken, AttachError::Taken { holder, .. } if *holder == name("b")), "{taken}");
    attachments.attach(&name("c"), attach("10.244.3.4")).unwrap();
    for restarted in [false, true] {
        let attachments = if restarted { open(run.path()) } else { Attachments::open(run.path(), BOOT).unwrap() };
        let taken = allocate(&attachments, "d", Some("10.244.3.4")).unwrap_err();
        assert!(matches!(taken, AttachError::NoAddress(AddressError::Taken { .. })), "{taken}");
    }
    assert_eq!(allocate(&attachments, "d", None).unwrap(), "10.244.3.5/29");
    assert_eq!(allocate(&attachments, "e", None).unwrap(), "10.244.3.6/29");
    let full = allocate(&attachments, "f", None).unwrap_err();
    assert!(full.to_string().contains("5 in use"), "{full}");
    assert!(attachments.has_addresses(&AddressRequest::default(), &network()).is_err());
    assert!(!attachments.table().borrow().attachments.contains_key(&name("f")), "nothing of it stays");
    for id in ["d", "a"] {
        attachments.detach(&name(id)).unwrap();
    }
    attachments.has_addresses(&AddressRequest::default(), &network()).unwrap();
    assert_eq!(allocate(&attachments, "f", None).unwrap(), "10.244.3.5/29", "the longest-free one");
    assert_eq!(allocate(&attachments, "g", None).unwrap(), "10.244.3.2/29");
}

#[test]
fn an_address_freed_before_a_restart_is_not_the_next_one() {
    let run = tempfile::tempdir().unwrap();
    let first = open(run.path());
    allocate(&first, "a", None).unwrap();
    first.detach(&name("a")).unwrap();
    assert_eq!(allocate(&open(run.path()), "b", None).unwrap(), "10.244.3.3/29");
}

#[test]
fn a_del_without_the_daemon_leaves_a_tombstone_that_it_honours() {
    let run = tempfile::tempdir().unwrap();
    let client = DaemonClient::new(run.path()).impatient();
    client.forget(&name("a")).unwrap();
    assert!(!run.path().join("attachments").exists(), "there is nothing to withdraw");
    // One that has read the file already, and stands still meanwhile.
    let first = open(run.path());
    for id in ["a", "b"] {
        allocate(&first, id, None).unwrap();
    }
    client.forget(&name("a")).unwrap();
    look(&first, &BTreeSet::new());
    assert_eq!(first.table().borrow().attachments.keys().cloned().collect::<Vec<_>>(), [name("b")]);
    // One that was away.
    client.forget(&name("b")).unwrap();
    let second = open(run.path());
    assert!(second.table().borrow().attachments.is_empty());
    assert_eq!(allocate(&second, "c", Some("10.244.3.2")).unwrap(), "10.244.3.2/29");
    // A tombstone is of the container before.
    client.forget(&name("d")).unwrap();
    allocate(&second, "d", None).unwrap();
    look(&second, &BTreeSet::new());
    assert!(second.table().borrow().attachments.contains_key(&name("d")));
    let left = fs::read_dir(run.path().join("attachments")).unwrap().flatten().map(|entry| entry.file_name());
    let left: Vec<String> =
        left.filter_map(|name| name.into_string().ok()).filter(|name| name.contains("deleted")).collect();
    assert_eq!(left, [""; 0]);
}

#[test]
fn what_host_local_has_given_out_stays_reserved_until_its_container_is_gone() {
    let run = tempfile::tempdir().unwrap();
    reserve(run.path(), "10.244.3.2", "attached");
    reserve(run.path(), "10.244.3.3", "gone");
    fs::write(run.path().join("ipam/mesh/lock"), "").unwrap();
    fs::write(run.path().join("ipam/mesh/10.244.3.4"), "").unwrap();
    let attachments = open(run.path());
    begin_add(&attachments, &name("attached"), begin()).unwrap();
    attachments.attach(&name("attached"), attach("10.244.3.2")).unwrap();
    assert_eq!(allocate(&attachments, "new", None).unwrap(), "10.244.3.5/29");
    let taken = allocate(&attachments, "x", Some("10.244.3.3")).unwrap_err();
    assert!(taken.to_string().contains("in use by container gone"), "{taken}");
    // A daemon that may read these files and not remove them.
    let may_not = |refused: bool| {
        let path = run.path().join("ipam/mesh").display().to_string();
        let flag = if refused { "+i" } else { "-i" };
        std::process::Command::new("chattr").args([flag, &path]).status().is_ok_and(|status| status.success())
    };
    let kept = may_not(true);
    let first = look(&attachments, &BTreeSet::new());
    assert_eq!(first, [name("gone")].into());
    assert!(allocate(&attachments, "x", Some("10.244.3.3")).is_err(), "one look is none");
    let second = look(&attachments, &first);
    assert_eq!(run.path().join("ipam/mesh/10.244.3.3").exists(), kept);
    assert_eq!(allocate(&attachments, "x", Some("10.244.3.3")).unwrap(), "10.244.3.3/29");
    attachments.detach(&name("x")).unwrap();
    look(&attachments, &second);
    assert_eq!(allocate(&attachments, "x", Some("10.244.3.3")).unwrap(), "10.244.3.3/29");
    assert!(allocate(&attachments, "y", Some("10.244.3.4")).is_err(), "its owner is unknown");
    may_not(false);
}

#[test]
fn half_a_file_is_no_attachment() {
    let run = tempfile::tempdir().unwrap();
    let first = open(run.path());
    begin_add(&first, &name("a"), begin()).unwrap();
    let dir = run.path().join("attachments");
    let whole = fs::read(dir.join("a@eth0")).unwrap();
    fs::write(dir.join("b@eth0.new"), &whole[..whole.len() / 2]).unwrap();
    // A copy under another name would be a second owner of the same.
    fs::write(dir.join("b@eth0"), &whole).unwrap();
    assert_eq!(open(run.path()).table().borrow().attachments.keys().cloned().collect::<Vec<_>>(), [name("a")]);
}

#[test]
fn what_is_no_file_and_what_cannot_be_read_stays_and_is_named() {
    let run = tempfile::tempdir().unwrap();
    let first = open(run.path());
    for id in ["a", "b"] {
        begin_add(&first, &name(id), begin()).unwrap();
    }
    let dir = run.path().join("attachments");
    let outside = tempfile::NamedTempFile::new().unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap();
    nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::create_dir(dir.join("folder")).unwrap();
    std::os::unix::fs::symlink(outside.path(), dir.join("link")).unwrap();
    // A record that is there and is no file that could be read now.
    fs::rename(dir.join("b@eth0"), run.path().join("kept")).unwrap();
    fs::create_dir(dir.join("b@eth0")).unwrap();
    let second = open(run.path());
    let attached = |of: &Attachments| of.table().borrow().attachments.keys().cloned().collect::<Vec<_>>();
    assert_eq!(attached(&second), [name("a")]);
    let problem = second.problem().unwrap();
    assert_eq!(problem.code.as_str(), "attachments_unreadable");
    assert!(problem.cause.starts_with("5 of the entries"), "{}", problem.cause);
    assert!(["socket", "fifo", "folder", "link"].iter().all(|entry| dir.join(entry).symlink_metadata().is_ok()));
    // It can be read again.
    fs::remove_dir(dir.join("b@eth0")).unwrap();
    fs::rename(run.path().join("kept"), dir.join("b@eth0")).unwrap();
    look(&second, &BTreeSet::new());
    assert_eq!(attached(&second), [name("a"), name("b")]);
    assert!(second.problem().unwrap().cause.starts_with("4 of the entries"));
}

#[test]
fn a_record_that_cannot_be_read_keeps_its_address() {
    let run = tempfile::tempdir().unwrap();
    let first = open(run.path());
    assert_eq!(allocate(&first, "a", None).unwrap(), "10.244.3.2/29");
    let second = open(run.path());
    // As when the process has no descriptor left, or the disk fails.
    second.lock().unread.insert("b@eth0".to_owned(), std::io::Error::from_raw_os_error(libc::EMFILE).into());
    let error = allocate(&second, "c", None).unwrap_err();
    assert!(matches!(&error, AttachError::File { path, .. } if path.ends_with("attachments/b@eth0")), "{error}");
    // It is gone.
    look(&second, &BTreeSet::new());
    assert_eq!(allocate(&second, "c", None).unwrap(), "10.244.3.3/29");
}

#[test]
fn a_file_that_can_be_no_record_stops_no_add() {
    let run = tempfile::tempdir().unwrap();
    let attachments = open(run.path());
    let unreadable = || std::io::Error::from_raw_os_error(libc::EACCES).into();
    for file in ["X.bak", "a@", "@eth0", "-a@eth0", "a@eth\u{fffd}", "a@longer-than-any-interface", ".new.7.a@eth0"] {
        attachments.lock().unread.insert(file.to_owned(), unreadable());
    }
    assert_eq!(allocate(&attachments, "c", None).unwrap(), "10.244.3.2/29");
    assert!(attachments.problem().unwrap().cause.starts_with("7 of the entries"));
    attachments.lock().unread.insert("a@eth0.7".to_owned(), unreadable());
    assert!(matches!(allocate(&attachments, "d", None), Err(AttachError::File { .. })));
}

#[test]
fn a_link_in_the_place_of_a_network_of_host_local_stops_adds() {
    let (run, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    reserve(elsewhere.path(), "10.244.3.2", "running");
    fs::create_dir(run.path().join("ipam")).unwrap();
    let link = run.path().join("ipam/mesh");
    std::os::unix::fs::symlink(elsewhere.path().join("ipam/mesh"), &link).unwrap();
    let attachments = open(run.path());
    let error = allocate(&attachments, "new", None).unwrap_err().to_string();
    assert!(error.contains("mesh is a symbolic link"), "{error}");
    fs::remove_file(&link).unwrap();
    fs::rename(elsewhere.path().join("ipam/mesh"), &link).unwrap();
    assert_eq!(allocate(&attachments, "new", None).unwrap(), "10.244.3.3/29");
}

#[test]
fn one_address_has_one_owner() {
    let run = tempfile::tempdir().unwrap();
    let attachments = open(run.path());
    for id in ["a", "b"] {
        begin_add(&attachments, &name(id), begin()).unwrap();
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
        assert!(matches!(begin_add(&attachments, &name(id), begin()), Err(AttachError::BadName(_))), "{id}");
        assert!(matches!(attachments.detach(&name(id)), Err(AttachError::BadName(_))), "{id}");
    }
    begin_add(&attachments, &name("a"), begin()).unwrap();
    let bad = Attach {
        pod: PodReference { namespace: "Not a name".to_owned(), ..PodReference::default() },
        ..attach("10.244.3.2")
    };
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
        begin_add(&attachments, &name(id), begin).unwrap();
        reserve(run.path(), address, id);
    }
    reserve(run.path(), "10.244.3.6", "orphan");
    let first = look(&attachments, &BTreeSet::new());
    assert_eq!(first, ["nowhere", "orphan", "replaced"].map(name).into());
    assert_eq!(attachments.table().borrow().attachments.len(), 4, "nothing is freed at the first look");
    look(&attachments, &first);
    assert_eq!(
        attachments.table().borrow().attachments.keys().cloned().collect::<Vec<_>>(),
        [name("interface"), name("there")]
    );
    let left = cni::host_local::reserved(run.path()).unwrap();
    let left: BTreeSet<String> = left.into_iter().map(|one| one.address.to_string()).collect();
    assert_eq!(left, ["10.244.3.2", "10.244.3.5"].map(str::to_owned).into());
}

#[test]
fn the_mesh_sees_those_with_an_address_of_this_node() {
    let run = tempfile::tempdir().unwrap();
    let attachments = open(run.path());
    for (id, address) in [("own", "10.244.3.2"), ("foreign", "192.0.2.9")] {
        begin_add(&attachments, &name(id), begin()).unwrap();
        attachments.attach(&name(id), attach(address)).unwrap();
    }
    begin_add(&attachments, &name("pending"), begin()).unwrap();
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
    begin_add(&attachments, &name("a"), begin()).unwrap();
    let generation = attachments.attach(&name("a"), attach("10.244.3.2")).unwrap();
    attachments.in_force(generation).await;
    assert!(!attachments.awaits_policy());
    let enforcement = attachments.enforcement();
    enforcement.progress(AckProgress::default());
    assert!(attachments.awaits_policy());
    let waits = timeout(Duration::from_millis(20), attachments.in_force(generation)).await;
    assert!(waits.is_err(), "nothing is in force yet");
    let generation_now = enforcement.table.borrow().generation;
    enforcement.progress(AckProgress { generation: generation_now, ..AckProgress::default() });
    attachments.in_force(generation).await;
    assert!(!attachments.awaits_policy());
    enforcement.progress(AckProgress { generation: generation_now, refused: true, ..AckProgress::default() });
    assert!(attachments.awaits_policy(), "the next one would wait without an answer");
    attachments.in_force(generation).await;
}

#[tokio::test]
async fn an_add_may_wait_for_its_pod_object() {
    let run = tempfile::tempdir().unwrap();
    let attachments = open(run.path());
    let (enforcement, waits) = (attachments.enforcement(), Duration::from_millis(50));
    attachments.pod_in_force(&name("a")).await;
    let without = |ids: &[&str]| AckProgress {
        generation: 1,
        without_pod: std::sync::Arc::new(ids.iter().map(|id| name(id)).collect()),
        ..AckProgress::default()
    };
    enforcement.progress(without(&["a", "b"]));
    attachments.pod_in_force(&name("c")).await;
    assert!(timeout(waits, attachments.pod_in_force(&name("a"))).await.is_err());
    enforcement.progress(without(&["b"]));
    attachments.pod_in_force(&name("a")).await;
}
