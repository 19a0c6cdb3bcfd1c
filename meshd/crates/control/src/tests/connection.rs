//! Members that die, hang or lose data; gaps in the watch; TLS and users.

use std::{sync::Arc, time::Duration};

use control_core::types::{CallError, EtcdFailure, FailureKind, KeyListing};
use etcd_client::{Client, ConnectOptions};
use mesh::problem::ProblemCode;
use nix::sys::signal::Signal;

use super::{
    etcd::{Etcd, PREFIX, eventually},
    join::{CONFIG, Node, joined},
    proxy::{Mode, Proxy},
};
use crate::{
    Control,
    etcd_options::{Credentials, EtcdOptions, TlsFiles},
    session::{Dialer, WatchMessage},
};

async fn connected(control: &mut Control, wanted: impl Fn(&str) -> bool) -> String {
    let mut status = control.status.clone();
    let found = status.wait_for(|status| status.connected && status.endpoint.as_deref().is_some_and(&wanted));
    let found = tokio::time::timeout(Duration::from_secs(60), found).await;
    found.expect("a connection").unwrap().endpoint.clone().unwrap()
}

pub(super) async fn sees_peer(control: &mut Control, name: &str) {
    let name = name.parse().unwrap();
    let found = control.records.wait_for(|records| records.peers.contains_key(&name));
    tokio::time::timeout(Duration::from_secs(60), found).await.expect("the peer in the view").unwrap();
}

pub(super) fn peer(last: u8) -> String {
    let key = etcd_schema::PublicKey::from_bytes([last.max(9); 32]);
    format!(r#"{{"publicKey": "{key}", "allowedIPs": ["198.18.{last}.0/24"]}}"#)
}

#[tokio::test]
async fn a_hung_or_dead_member_is_left_for_a_live_one() {
    let etcd = Etcd::start_cluster(3).await;
    etcd.put("config", CONFIG).await;
    let node = Node::new("a");
    let mut control = node.start(&etcd);
    joined(&mut control).await;
    let first = connected(&mut control, |_| true).await;
    etcd.signal(etcd.member(&first), Signal::SIGSTOP);
    let second = connected(&mut control, |endpoint| endpoint != first).await;
    etcd.write_through(etcd.member(&second));
    etcd.put("peers/one", &peer(11)).await;
    sees_peer(&mut control, "one").await;
    etcd.signal(etcd.member(&first), Signal::SIGCONT);
    etcd.signal(etcd.member(&second), Signal::SIGKILL);
    let third = connected(&mut control, |endpoint| endpoint != second).await;
    etcd.write_through(etcd.member(&third));
    eventually("a leader again", async || etcd.try_put("peers/two", &peer(12)).await.ok()).await;
    sees_peer(&mut control, "two").await;
    joined(&mut control).await;
}

#[tokio::test]
async fn members_that_a_file_names_later_are_tried_too() {
    let etcd = Etcd::start_cluster(3).await;
    etcd.put("config", CONFIG).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), etcd.url(0)).unwrap();
    let node = Node::new("a");
    let mut control = node.start_by_file(&etcd, file.path());
    connected(&mut control, |endpoint| endpoint == etcd.url(0)).await;
    std::fs::write(file.path(), format!("{}\n{}\n", etcd.url(1), etcd.url(2))).unwrap();
    etcd.signal(0, Signal::SIGKILL);
    let second = connected(&mut control, |endpoint| endpoint != etcd.url(0)).await;
    etcd.write_through(etcd.member(&second));
    eventually("a leader again", async || etcd.try_put("peers/one", &peer(11)).await.ok()).await;
    sees_peer(&mut control, "one").await;
}

#[tokio::test]
async fn nothing_is_lost_in_a_gap_and_nothing_unchanged_comes_again() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    for last in 1..4u8 {
        etcd.put(&format!("peers/p{last}"), &peer(last + 10)).await;
    }
    let proxy = Proxy::to(etcd.url(0)).await;
    let node = Node::new("a");
    let mut control = node.start_through(&etcd, &proxy.url, false);
    joined(&mut control).await;
    sees_peer(&mut control, "p3").await;
    // Its own records come by the watch, behind what it joined by.
    let own = control.records.wait_for(|records| !records.nodes.is_empty() && !records.subnets.is_empty());
    let before = own.await.unwrap().clone();

    proxy.mode.send_replace(Mode::Cut);
    control.status.wait_for(|status| !status.connected).await.unwrap();
    etcd.put("peers/p2", &peer(22)).await;
    etcd.delete(&["peers/p3"]).await;
    let mut raw = Client::connect([etcd.url(0)], None).await.unwrap();
    for _ in 0..3 {
        let revision = raw.put("/elsewhere", "x", None).await.unwrap().header().unwrap().revision();
        raw.compact(revision, None).await.unwrap();
    }
    proxy.mode.send_replace(Mode::Pass);
    let [p1, p2, p3] = ["p1", "p2", "p3"].map(|name| name.parse().unwrap());
    let after = control.records.wait_for(|records| !records.peers.contains_key(&p3)).await.unwrap().clone();
    assert!(Arc::ptr_eq(&before.peers[&p1].value, &after.peers[&p1].value));
    assert_eq!(after.peers[&p2].value.allowed_ips, ["198.18.22.0/24".parse().unwrap()]);
    assert!(before.subnets.ptr_eq(&after.subnets));
    assert!(before.nodes.ptr_eq(&after.nodes));
}

#[tokio::test]
async fn a_watch_from_before_a_compaction_says_so() {
    let etcd = Etcd::start().await;
    for last in 0..3u8 {
        etcd.put("peers/p", &peer(last + 10)).await;
    }
    let session = etcd.session().await;
    let KeyListing { revision, entries, .. } = session.list().await.unwrap();
    assert_eq!(entries.len(), 1);
    let mut raw = Client::connect([etcd.url(0)], None).await.unwrap();
    raw.compact(revision, None).await.unwrap();
    let mut watch = session.watch(2, None).await.unwrap();
    eventually("compacted", async || match watch.message().await.unwrap() {
        WatchMessage::Compacted => Some(()),
        _ => None,
    })
    .await;
}

#[tokio::test]
async fn a_silent_watch_is_noticed() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    let proxy = Proxy::to(etcd.url(0)).await;
    let node = Node::new("a");
    let mut control = node.start_through(&etcd, &proxy.url, false);
    let subnet = joined(&mut control).await;
    proxy.mode.send_replace(Mode::Hang);
    let status = control.status.wait_for(|status| !status.connected).await.unwrap().clone();
    assert_eq!(status.subnet, Some(subnet));
    let problem = status.problems.iter().find(|problem| problem.code == ProblemCode::EtcdUnreachable).unwrap();
    assert!(problem.cause.contains(&proxy.url) && problem.remedy.contains("firewall"), "{problem:?}");
    proxy.mode.send_replace(Mode::Pass);
    connected(&mut control, |_| true).await;
    assert!(control.status.borrow().problems.is_empty());
    assert_eq!(joined(&mut control).await, subnet);
}

#[tokio::test]
async fn a_member_that_is_not_there_is_said_to_be_so() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let options = EtcdOptions {
        endpoints_file: None,
        endpoints: vec![format!("http://{free}")],
        prefix: PREFIX.into(),
        tls: TlsFiles::default(),
        user: None,
        allow_plaintext: false,
    };
    let dialer = Dialer::new(&options).unwrap();
    let error: EtcdFailure = match dialer.open(&dialer.members()[0], 0).await {
        Ok(session) => (&session.list().await.unwrap_err()).into(),
        Err(error) => (&error).into(),
    };
    assert_eq!(error.kind, FailureKind::Refused, "{error}");
}

#[tokio::test]
async fn a_long_list_comes_whole_from_pages_of_one_revision() {
    let etcd = Etcd::start().await;
    for chunk in (0..1203u32).collect::<Vec<_>>().chunks(100) {
        etcd.put_all(chunk.iter().map(|i| (format!("pods/ns/p{i}"), "{}".to_owned()))).await;
    }
    // Values whose page is longer than one message may be: asked for again in smaller pages.
    for i in 0..40u32 {
        etcd.put(&format!("pods/big/p{i:02}"), &"x".repeat(1_000_000)).await;
    }
    etcd.put("nodes/a", "{}").await;
    etcd.put("podsmore", "{}").await;
    let session = etcd.session().await;
    let entries = session.list().await.unwrap().entries;
    assert_eq!(entries.len(), 1245);
    assert!(entries.is_sorted_by(|a, b| a.key < b.key));
    // And so does a part of it.
    let KeyListing { revision, entries: part, .. } = session.list_below("pods/").await.unwrap();
    assert_eq!(part.len(), 1243);
    assert!(revision > 0 && part.iter().all(|entry| entry.key.starts_with("pods/")));
    assert_eq!(session.list_below("nodes/").await.unwrap().entries.len(), 1);
    assert_eq!(session.list_below("peers/").await.unwrap().entries.len(), 0);
}

#[tokio::test]
async fn an_expired_token_is_renewed_once_per_call() {
    let etcd = Etcd::start().await;
    let mut raw = Client::connect([etcd.url(0)], None).await.unwrap();
    raw.user_add("root", "first", None).await.unwrap();
    raw.user_grant_role("root", "root").await.unwrap();
    raw.auth_enable().await.unwrap();

    let without = etcd.session().await.list().await.unwrap_err();
    assert!(matches!(&without, CallError::Refused(failure) if failure.kind == FailureKind::User), "{without:?}");
    let options = EtcdOptions { user: Some(Credentials::new("root", "wrong")), ..etcd.options() };
    let dialer = Dialer::new(&options).unwrap();
    let wrong = dialer.open(&dialer.members()[0], 0).await.unwrap_err();
    assert_eq!(EtcdFailure::from(&wrong).kind, FailureKind::User, "{wrong}");
    let options = EtcdOptions { user: Some(Credentials::new("root", "first")), ..etcd.options() };
    let dialer = Dialer::new(&options).unwrap();
    let session = dialer.open(&dialer.members()[0], 0).await.unwrap();
    session.list().await.unwrap();
    // The same password once more: every token of the user is void.
    let admin = ConnectOptions::new().with_user("root", "first");
    let mut raw = Client::connect([etcd.url(0)], Some(admin)).await.unwrap();
    raw.user_change_password("root", "first").await.unwrap();
    session.list().await.unwrap();
    assert!(session.grant(Duration::from_secs(10)).await.is_ok());
}

/// The files in `tests/tls` were made with `openssl` for 127.0.0.1, valid for a hundred years; the authority's key is
/// thrown away.
#[tokio::test]
async fn tls_with_and_without_a_client_certificate() {
    let files = concat!(env!("CARGO_MANIFEST_DIR"), "/src/tests/tls");
    let path = |name: &str| Some(format!("{files}/{name}").into());
    for with_client in [false, true] {
        let etcd = Etcd::start_tls(files, with_client).await;
        let mut options = etcd.options();
        options.prefix = PREFIX.into();
        assert!(options.endpoints[0].starts_with("https://"));
        if with_client {
            let dialer = Dialer::new(&options).unwrap();
            let session = dialer.open(&dialer.members()[0], 0).await;
            let refused = match session {
                Ok(session) => session.list().await.is_err(),
                Err(_) => true,
            };
            assert!(refused, "a client certificate is asked for");
            options.tls = TlsFiles { ca: path("ca.pem"), cert: path("client.pem"), key: path("client.key") };
        }
        let dialer = Dialer::new(&options).unwrap();
        dialer.open(&dialer.members()[0], 0).await.unwrap().list().await.unwrap();
        // Another authority is not believed.
        options.tls.ca = path("client.pem");
        let dialer = Dialer::new(&options).unwrap();
        let refused: EtcdFailure = match dialer.open(&dialer.members()[0], 0).await {
            Ok(session) => (&session.list().await.unwrap_err()).into(),
            Err(error) => (&error).into(),
        };
        assert_eq!(refused.kind, FailureKind::Tls, "{refused}");
    }
}

/// A running daemon takes up renewed files, and ones that do not serve take nothing from it.
#[tokio::test]
async fn renewed_files_are_taken_up_and_bad_ones_leave_the_connection_alone() {
    let files = concat!(env!("CARGO_MANIFEST_DIR"), "/src/tests/tls");
    let etcd = Etcd::start_tls(files, false).await;
    etcd.put("config", CONFIG).await;
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    let put = |name: &str| {
        let beside = dir.path().join("new");
        std::fs::copy(format!("{files}/{name}"), &beside).unwrap();
        std::fs::rename(&beside, &ca).unwrap();
    };
    put("ca.pem");
    let mut options = etcd.options();
    options.tls.ca = Some(ca.clone());
    let node = Node::new("a");
    let mut control = node.start_with(options, false);
    joined(&mut control).await;
    let mut status = control.status.clone();
    let lost = tokio::spawn(async move { status.wait_for(|status| !status.connected).await.is_ok() });
    // Another authority's certificate: nobody would be believed with it.
    put("client.pem");
    let lists = control.status.borrow().lists;
    etcd.put("peers/one", &peer(11)).await;
    sees_peer(&mut control, "one").await;
    put("ca.pem");
    let renewed = control.status.wait_for(|status| status.lists > lists);
    tokio::time::timeout(Duration::from_secs(60), renewed).await.expect("a new connection").unwrap();
    etcd.put("peers/two", &peer(12)).await;
    sees_peer(&mut control, "two").await;
    assert!(!lost.is_finished(), "the connection was never said to be lost");
    lost.abort();
}

#[tokio::test]
async fn a_new_password_in_the_file_is_read_for_the_next_connection() {
    let etcd = Etcd::start().await;
    let mut raw = Client::connect([etcd.url(0)], None).await.unwrap();
    raw.user_add("root", "first", None).await.unwrap();
    raw.user_grant_role("root", "root").await.unwrap();
    raw.auth_enable().await.unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "first\n").unwrap();
    let user = Credentials::in_file("root", file.path().to_owned()).unwrap();
    let dialer = Dialer::new(&EtcdOptions { user: Some(user), ..etcd.options() }).unwrap();
    dialer.open(&dialer.members()[0], 0).await.unwrap().list().await.unwrap();
    let before = dialer.files();
    let admin = ConnectOptions::new().with_user("root", "first");
    let mut raw = Client::connect([etcd.url(0)], Some(admin)).await.unwrap();
    raw.user_change_password("root", "second and last").await.unwrap();
    assert!(dialer.open(&dialer.members()[0], 0).await.is_err(), "the old one is refused");
    std::fs::write(file.path(), "second and last\n").unwrap();
    assert_ne!(before, dialer.files());
    dialer.open(&dialer.members()[0], 0).await.unwrap().list().await.unwrap();
}
