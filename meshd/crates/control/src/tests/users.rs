//! etcd's users: by certificate, renewed while the daemon runs, and by tokens that expire.

use std::{fs, time::Duration};

use control_core::types::{CallError, FailureKind};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, Permission, TlsOptions, UserAddOptions};

use super::{
    authority::Authority,
    connection::{peer, sees_peer},
    etcd::{Etcd, eventually},
    join::{CONFIG, Node, joined},
};
use crate::{
    etcd_options::{Credentials, EtcdOptions, TlsFiles},
    session::Dialer,
};

/// etcd's own client, by root's certificate.
async fn administrator(etcd: &Etcd, authority: &Authority) -> Client {
    let read = |name: &str| fs::read(authority.file(name)).unwrap();
    let identity = Identity::from_pem(read("root.pem"), read("root.key"));
    let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read("ca.pem"))).identity(identity);
    Client::connect([etcd.url(0)], Some(ConnectOptions::new().with_tls(tls))).await.unwrap()
}

#[tokio::test]
async fn a_certificate_names_the_user_and_a_renewed_one_is_taken_up() {
    let authority = Authority::new();
    for (file, user) in [
        ("server", "etcd"),
        ("client", "root"),
        ("root", "root"),
        ("first", "a"),
        ("second", "a2"),
        ("third", "nobody"),
    ] {
        authority.issue(file, user);
    }
    let tls = |name: &str| TlsFiles {
        ca: Some(authority.file("ca.pem")),
        cert: Some(authority.file(&format!("{name}.pem"))),
        key: Some(authority.file(&format!("{name}.key"))),
    };
    let etcd = Etcd::start_tls(authority.folder().to_str().unwrap(), true).await.by(tls("root"));
    etcd.put("config", CONFIG).await;
    let mut root = administrator(&etcd, &authority).await;
    root.role_add("node").await.unwrap();
    root.role_grant_permission("node", Permission::read_write("/meshd/").with_prefix()).await.unwrap();
    for (user, role) in [("root", "root"), ("a", "node"), ("a2", "node"), ("nobody", "")] {
        root.user_add(user, "", Some(UserAddOptions::new().with_no_pwd())).await.unwrap();
        if !role.is_empty() {
            root.user_grant_role(user, role).await.unwrap();
        }
    }
    root.auth_enable().await.unwrap();

    let options = |name: &str| EtcdOptions { tls: tls(name), ..etcd.options() };
    let dialer = Dialer::new(&options("third")).unwrap();
    let refused = dialer.open(&dialer.members()[0], 0).await.unwrap().list().await.unwrap_err();
    assert!(matches!(&refused, CallError::Refused(why) if why.kind == FailureKind::Rights), "{refused:?}");

    let renew = |from: &str, ending: &str| {
        let beside = authority.file("beside");
        fs::copy(authority.file(&format!("{from}.{ending}")), &beside).unwrap();
        fs::rename(beside, authority.file(&format!("node.{ending}"))).unwrap();
    };
    renew("first", "pem");
    renew("first", "key");
    let node = Node::new("a");
    let mut control = node.start_with(options("node"), false);
    joined(&mut control).await;
    // One after the other: a pair that does not fit together takes nothing from the daemon.
    let lists = control.status.borrow().lists;
    renew("second", "pem");
    etcd.put("peers/one", &peer(11)).await;
    sees_peer(&mut control, "one").await;
    renew("second", "key");
    let renewed = control.status.wait_for(|status| status.lists > lists);
    tokio::time::timeout(Duration::from_secs(60), renewed).await.expect("a new connection").unwrap();
    // The first one's user is gone: what the daemon writes from now on, it writes as the second.
    root.user_delete("a").await.unwrap();
    let record = format!("nodes/{}", node.id());
    etcd.delete(&[&record]).await;
    eventually("its record again", async || etcd.dump().await.contains_key(&record).then_some(())).await;
    etcd.put("peers/two", &peer(12)).await;
    sees_peer(&mut control, "two").await;
}

#[tokio::test]
async fn a_token_that_has_expired_is_asked_for_again() {
    let etcd = Etcd::start_with_tokens_of(1).await;
    etcd.put("config", CONFIG).await;
    let mut raw = Client::connect([etcd.url(0)], None).await.unwrap();
    raw.user_add("root", "word", None).await.unwrap();
    raw.user_grant_role("root", "root").await.unwrap();
    raw.auth_enable().await.unwrap();
    let user = Some(Credentials::new("root", "word"));
    let dialer = Dialer::new(&EtcdOptions { user, ..etcd.options() }).unwrap();
    let session = dialer.open(&dialer.members()[0], 0).await.unwrap();
    session.list().await.unwrap();
    // etcd looks for expired ones once a second.
    tokio::time::sleep(Duration::from_secs(4)).await;
    session.list().await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(session.grant(Duration::from_secs(10)).await.is_ok());
}
