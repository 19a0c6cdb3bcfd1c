//! What is printed for people: tables, colours on a terminal, a remedy for each line that is not well.
//!
//! ```text
//!   east1 (pod) ── switch ── router ── switch ── west1 (pod)
//! ```

use integration::{MeshdNode, Output};

use crate::{SOON, mesh};

/// As on a terminal.
fn on_a_terminal(node: &MeshdNode, env: &str, command: &str) -> Output {
    let (program, run) = (integration::binary("meshctl"), node.run_dir());
    let line = format!("{env} {} --run-dir {} {command}", program.display(), run.display());
    node.host().try_run(&["script", "-qec", &line, "/dev/null"])
}

#[test]
fn tables_are_coloured_on_a_terminal_alone() {
    let mesh = mesh("tables", 1);
    let east1 = mesh.node("east1");
    let columns = |text: &str| text.lines().next().unwrap().split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let peers = east1.meshctl(&["peers"]).stdout;
    assert_eq!(
        columns(&peers),
        ["NAME", "SITE", "SUBNETS", "PATH", "ENDPOINT", "HANDSHAKE", "RX", "TX", "MTU", "REASON"]
    );
    let west1 = peers.lines().find(|line| line.starts_with("west1 ")).unwrap();
    assert!(
        west1.contains(" west ") && west1.contains("wireguard") && west1.contains("198.51.100.11:51820"),
        "{peers}"
    );
    let routes = east1.meshctl(&["routes"]).stdout;
    assert_eq!(columns(&routes), ["DESTINATION", "PATH", "PEER", "VIA", "DEV", "MTU", "SRC"]);
    assert!(routes.lines().any(|line| line.starts_with("10.244.0.0/16") && line.contains("(floor)")), "{routes}");
    let status = east1.meshctl(&["status"]).stdout;
    for line in ["node      east1", "peers     0 direct, 1 by WireGuard", "state     running"] {
        assert!(status.lines().any(|found| found.starts_with(line)), "{line}: {status}");
    }

    for command in ["status", "peers", "routes"] {
        let plain = east1.meshctl(&[command]).stdout;
        assert!(!plain.contains('\x1b'), "{plain:?}");
        let coloured = on_a_terminal(east1, "", command).stdout;
        assert!(coloured.contains("\x1b[32m"), "{coloured:?}");
        let refused = on_a_terminal(east1, "NO_COLOR=1", command).stdout;
        assert!(!refused.contains('\x1b'), "{refused:?}");
    }
}

#[test]
fn what_is_not_well_has_cause_and_remedy_and_an_exit_code() {
    let mesh = mesh("check", 1);
    let east1 = mesh.node("east1");
    assert_eq!(east1.meshctl(&["status", "--check"]).code(), Some(0));
    mesh.etcd.stop();
    east1.await_status("etcd to be missed", SOON, |status| status["state"] == "degraded");
    let checked = east1.meshctl(&["status", "--check"]);
    assert_eq!(checked.code(), Some(4), "{}", checked.describe());
    assert_eq!(east1.meshctl(&["status"]).code(), Some(0));
    let lines: Vec<&str> = checked.stdout.lines().collect();
    let at = lines.iter().position(|line| line.starts_with("problem   etcd_unreachable: ")).unwrap();
    assert!(lines[at + 1].starts_with("  remedy  "), "{}", checked.stdout);
    assert!(on_a_terminal(east1, "", "status").stdout.contains("\x1b[31mdegraded"));
    east1.term();
    assert_eq!(east1.meshctl(&["status", "--check"]).code(), Some(3));
}
