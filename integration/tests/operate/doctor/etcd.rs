//! Faults of etcd.
//!
//! ```text
//!   east1 ── switch ── router ── store: etcd, behind what changes its version
//! ```

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
};

use integration::{
    Host, Meshd, await_until,
    topology::{CONFIG, TwoSites},
};

use super::{await_gone, await_named};
use crate::SOON;

/// Takes connections at `listener` on `host` and passes them on to etcd there; what comes back says that it is of an
/// older release. Debian has one release alone, and others do not run beside it.
fn older(host: &Host, address: &'static str) {
    let listener = host.enter(|| TcpListener::bind((address, 2378))).unwrap();
    let host = host.clone();
    thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(mut client) = client else { return };
            let mut server = host.enter(|| TcpStream::connect((address, 2379))).unwrap();
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut from, &mut to));
            thread::spawn(move || {
                let mut buffer = vec![0; 1 << 16];
                while let Ok(read @ 1..) = server.read(&mut buffer) {
                    let bytes = &mut buffer[..read];
                    for at in 0..read.saturating_sub(3) {
                        if bytes[at..].starts_with(b"3.4.") {
                            bytes[at + 2] = b'3';
                        }
                    }
                    if client.write_all(bytes).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

#[test]
fn an_old_release_and_a_member_that_is_away() {
    let sites = TwoSites::with_hosts("doctor-etcd", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    older(&sites.store, "203.0.113.10");
    let node = Meshd::on(&sites.east.hosts[0], &etcd)
        .endpoints(format!("{},http://203.0.113.10:2378,http://203.0.113.10:9", etcd.endpoints()))
        .site("east")
        .start();
    node.await_ready(SOON);
    let away = await_named(&node, "etcd_member_unreachable");
    assert!(away["cause"].as_str().unwrap().contains("http://203.0.113.10:9 "), "{away}");
    let old = await_named(&node, "etcd_too_old");
    assert!(old["cause"].as_str().unwrap().contains("http://203.0.113.10:2378 is 3.3."), "{old}");
    await_until("the release of the member that is well", SOON, || {
        let examined = crate::json(&node, &["doctor"]).0;
        let mut versions = examined["etcd"].as_array()?.iter().filter_map(|line| line.as_str());
        versions.any(|line| line.contains(":2379 3.4.")).then_some(())
    });

    etcd.stop();
    await_until("nothing of etcd to answer", SOON, || {
        let all = super::findings(&node);
        (all.iter().filter(|finding| finding["code"] == "etcd_member_unreachable").count() == 3).then_some(())
    });
    etcd.start_again();
    await_gone(&node, "etcd_unreachable");
}
