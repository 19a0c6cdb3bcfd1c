//! What the log says of peers and etcd that go and come back.
//!
//! ```text
//!   east1 ── switch ── router ── switch ── west1
//!                        │
//!                       etcd
//! ```

use std::{fs, os::unix::fs::MetadataExt as _, process::Command};

use integration::{await_ok, binary, ping};

use crate::{SOON, mesh};

/// Waits for a line of the log with all these words.
#[track_caller]
fn await_line(node: &integration::MeshdNode, words: &[&str]) {
    await_ok(&format!("{words:?} in the log"), SOON, || {
        let log = node.log();
        let said = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        if said { Ok(()) } else { Err(log) }
    });
}

#[test]
fn the_log_says_what_becomes_unreachable_and_what_is_back() {
    let mesh = mesh("events", 1);
    let east1 = mesh.node("east1");
    mesh.sites
        .router
        .nft("table inet fault { chain forward { type filter hook forward priority 0; udp dport 51820 drop; }; }");
    // Something must be sent for an answer to be missed.
    let send = || ping(mesh.pod("east1"), mesh.pod("west1").v4());
    await_ok("west1 to be unreachable", SOON * 2, || {
        let _lost = send();
        let peer = east1.peer("west1").ok_or("no peer")?;
        if peer["path"] == "unreachable" { Ok(()) } else { Err(peer.to_string()) }
    });
    await_line(east1, &["WARN peer unreachable", "peer=\"west1\"", "site=\"west\"", "online=true"]);
    mesh.sites.router.nft("delete table inet fault");
    await_ok("west1 to answer", SOON * 2, || {
        let _answered = send();
        let peer = east1.peer("west1").ok_or("no peer")?;
        if peer["path"] == "wireguard" { Ok(()) } else { Err(peer.to_string()) }
    });
    await_line(east1, &["INFO peer reachable", "peer=\"west1\"", "path=wireguard", "after="]);

    mesh.etcd.stop();
    await_line(east1, &["WARN etcd unreachable", "endpoint="]);
    mesh.etcd.start_again();
    await_line(east1, &["INFO etcd reachable", "after="]);
}

#[test]
fn the_journal_gets_priorities_and_no_second_time() {
    let folder = tempfile::tempdir().unwrap();
    let log = fs::File::create(folder.path().join("journal")).unwrap();
    let stream = |number: u64| format!("{}:{number}", log.metadata().unwrap().dev());
    let said = |stream: String, args: &[&str]| {
        log.set_len(0).unwrap();
        let state = folder.path().to_str().unwrap();
        let status = Command::new(binary("meshd"))
            .args(args)
            .args(["--state-dir", state])
            .env("JOURNAL_STREAM", stream)
            .stderr(log.try_clone().unwrap())
            .status()
            .unwrap();
        assert!(!status.success());
        let text = fs::read_to_string(folder.path().join("journal")).unwrap();
        text.trim_start_matches('\0').to_owned()
    };
    let own = || stream(log.metadata().unwrap().ino());
    // It is refused before it touches anything: the run directory cannot be made.
    let run = ["run", "--node", "a", "--run-dir", "/proc/nope", "--interface", "none0"];
    let text = said(own(), &run);
    assert!(text.lines().all(|line| line.starts_with('<') && line.as_bytes()[2] == b'>'), "{text}");
    assert!(text.starts_with("<3>") && text.contains("/proc/nope"), "{text}");
    let text = said(stream(1), &run);
    assert!(text.starts_with("20") && text.contains("ERROR"), "another stream is not the journal: {text}");
    let text = said(own(), &["run", "--node", "a b"]);
    assert!(text.starts_with("<3>meshd: ") && text.lines().all(|line| line.starts_with("<3>")), "{text}");
}
