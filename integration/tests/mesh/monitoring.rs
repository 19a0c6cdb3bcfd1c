//! What others see of a daemon: a real Prometheus (alerts, the dashboard), health checks, `wg`, systemd.
//!
//! ```text
//!   east1 (pod) ─┐                               ┌─ west1 (pod)
//!    Prometheus    ├─ switch ──── router ──── switch ┤
//!   east2 (pod) ─┘         sniffs │              └─ west2 (pod)
//!                               etcd
//! ```

use std::{
    fs,
    io::ErrorKind,
    os::unix::{fs::PermissionsExt as _, net::UnixDatagram},
    path::Path,
    time::Duration,
};

use integration::{
    Meshd, MeshdNode, Process, await_ok, await_until, binary, ping,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::Value;

use crate::{SOON, problems};

/// The answer's status code and body.
fn get(node: &MeshdNode, path: &str) -> Option<(u16, String)> {
    let url = format!("http://127.0.0.1:9473{path}");
    let output = node.host().try_run(&["curl", "-s", "-m", "5", "-w", "\n%{http_code}", &url]);
    let (body, code) = output.stdout.rsplit_once('\n')?;
    Some((code.parse().ok().filter(|code| *code != 0)?, body.to_owned()))
}

/// Waits for an answer with this code.
#[track_caller]
pub(crate) fn await_code(node: &MeshdNode, path: &str, code: u16) -> String {
    await_ok(&format!("{code} from {path}"), SOON, || {
        let answer = get(node, path);
        match answer {
            Some((is, body)) if is == code => Ok(body),
            other => Err(format!("{other:?}")),
        }
    })
}

fn deployed(file: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file).to_string_lossy().into_owned()
}

#[test]
fn a_prometheus_scrapes_it_and_knows_the_alerts() {
    let mesh = Mesh::start_on(TwoSites::new("metrics"), CONFIG, |node| node.args("--metrics-per-peer"));
    mesh.await_all_reach_each_other();
    let node = mesh.node("east1");

    let folder = mesh.sites.lab.folder().join("prometheus");
    fs::create_dir_all(&folder).unwrap();
    let config = folder.join("prometheus.yml");
    let rules = deployed("prometheus/alerts.yaml");
    let text = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{rules}']\n\
         scrape_configs: [{{job_name: meshd, static_configs: [{{targets: ['127.0.0.1:9473']}}]}}]\n"
    );
    fs::write(&config, text).unwrap();
    node.host().run_args(&["promtool", "check", "config", &config.to_string_lossy()]);
    let _prometheus = node.host().spawn(
        "prometheus",
        &[
            &format!("--config.file={}", config.display()),
            &format!("--storage.tsdb.path={}", folder.join("data").display()),
            "--web.listen-address=127.0.0.1:9090",
        ],
    );
    // The value of an expression that has one series.
    let ask = |expression: &str| -> Option<f64> {
        let query = format!("query={expression}");
        let url = "http://127.0.0.1:9090/api/v1/query";
        let output = node.host().try_run(&["curl", "-s", "-m", "5", "--data-urlencode", &query, url]);
        let answer: Value = serde_json::from_str(&output.stdout).ok()?;
        answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    };
    let is = |expression: &str, wanted: f64| {
        await_ok(&format!("{expression} to be {wanted}"), SOON, || {
            let value = ask(expression);
            if value == Some(wanted) { Ok(()) } else { Err(format!("{value:?}")) }
        });
    };
    is("up", 1.0);
    is(r#"meshd_peers{path="wireguard"}"#, 2.0);
    is(r#"meshd_peers{path="direct"}"#, 1.0);
    is(r#"meshd_state{state="running"}"#, 1.0);
    is(r#"count(meshd_node_info{node="east1",site="east"})"#, 1.0);
    is(r#"sum(meshd_unreachable_peers{state=~"online|offline|unknown"})"#, 0.0);
    is("meshd_etcd_connected", 1.0);
    is(r#"meshd_policy_mode{mode="enforce"}"#, 1.0);
    is("meshd_policy_revision > bool 0", 1.0);
    is("process_resident_memory_bytes > bool 1000000", 1.0);
    is("count(wireguard_latest_handshake_seconds)", 3.0);

    // Both directions of a ping to the other site, in the tunnel's counters and in the peer's own.
    let before = await_until("the counter", SOON, || ask("meshd_tunnel_sent_bytes_total"));
    ping(mesh.pod("east1"), mesh.pod("west1").v4()).assert_all_answered();
    await_until("the counter to rise", SOON, || (ask("meshd_tunnel_sent_bytes_total")? > before).then_some(()));
    is("meshd_tunnel_received_bytes_total > bool 0", 1.0);
    is(r#"wireguard_sent_bytes_total{friendly_name="west1"} > bool 0"#, 1.0);

    // Every query of the dashboard is one that this Prometheus answers with series that are there.
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(deployed("grafana/meshd.json")).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row");
    let mut queries = 0;
    for target in panels.flat_map(|panel| panel["targets"].as_array().unwrap()) {
        let expression = target["expr"].as_str().unwrap();
        let asked = expression.replace("$instance", ".*").replace("$job", "meshd").replace("$__rate_interval", "5s");
        assert!(!asked.contains('$'), "{expression}");
        // A mesh that is well has no problem to count.
        let well = if asked.contains("meshd_problems") { " or vector(0)" } else { "" };
        let asked = format!("{}{well}", asked.trim_end_matches(" > 0"));
        await_until(expression, SOON, || ask(&asked).filter(|value| value.is_finite()));
        queries += 1;
    }
    assert!(queries > 15, "{queries} queries");

    // A rule that fires names what is wrong.
    mesh.etcd.stop();
    is("meshd_etcd_connected", 0.0);
    await_until("the alert to be pending or firing", SOON, || ask(r#"ALERTS{alertname="MeshdEtcdUnreachable"}"#));
    mesh.etcd.start_again();
    is("meshd_etcd_connected", 1.0);
}

#[test]
fn health_tells_what_is_missing_and_etcd_is_not() {
    let sites = TwoSites::new("health");
    let etcd = sites.start_etcd(1);
    etcd.stop();
    let host = sites.hosts().next().unwrap().clone();
    let node = Meshd::on(&host, &etcd).site("east").start();
    assert_eq!(await_code(&node, "/livez", 200), "ok");
    let missing = await_code(&node, "/readyz", 503);
    assert!(missing.contains("[-]subnet failed: the mesh has not been read yet"), "{missing}");
    assert!(missing.contains("[-]policy failed"), "{missing}");
    etcd.start_again();
    etcd.put("/meshd/config", CONFIG);
    assert_eq!(await_code(&node, "/readyz", 200), "ok");
    let verbose = await_code(&node, "/readyz?verbose", 200);
    assert_eq!(verbose, "[+]identity ok\n[+]subnet ok\n[+]data_plane ok\n[+]policy ok\nreadyz check passed\n");
    etcd.stop();
    node.await_status("etcd to be missed", SOON, |status| status["etcd"]["connected"] == false);
    assert_eq!(await_code(&node, "/readyz", 200), "ok");
    assert_eq!(await_code(&node, "/livez", 200), "ok");
}

#[test]
fn an_address_that_is_taken_is_a_warning_and_taken_up_later() {
    let sites = TwoSites::new("taken");
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let host = sites.hosts().next().unwrap().clone();
    let data = sites.lab.folder().join("data");
    let other = host.spawn(
        "prometheus",
        &[
            "--config.file=/dev/null",
            &format!("--storage.tsdb.path={}", data.display()),
            "--web.listen-address=127.0.0.1:9473",
        ],
    );
    other.await_log("Server is ready to receive web requests", SOON);
    let node = Meshd::on(&host, &etcd).site("east").start();
    node.await_ready(SOON);
    let warned = |status: &Value| problems(status).any(|problem| problem["code"] == "metrics_address");
    // It keeps no packet from its way, so the node is as well as without it.
    node.await_status("a warning, and to be well", SOON, |status| warned(status) && status["state"] == "running");
    other.kill9();
    node.await_status("no warning", SOON, |status| !warned(status));
    assert_eq!(await_code(&node, "/livez", 200), "ok");
}

#[test]
fn wg_shows_the_tunnel_and_cannot_change_it() {
    let mesh = Mesh::start("wgshow");
    mesh.await_all_reach_each_other();
    let node = mesh.node("east1");
    let device = node.interface();
    let wg = |args: &[&str]| node.host().try_run(&[&["wg"], args].concat());
    let shown = wg(&["show", device]);
    assert!(shown.success(), "{}", shown.describe());
    assert!(shown.stdout.contains("listening port: 51820"), "{}", shown.describe());
    for name in ["west1", "west2"] {
        let peer = node.peer(name).unwrap();
        let key = peer["publicKey"].as_str().unwrap();
        assert!(shown.stdout.contains(&format!("peer: {key}")), "{name}: {}", shown.describe());
        for subnet in peer["subnets"].as_array().unwrap() {
            assert!(shown.stdout.contains(subnet.as_str().unwrap()), "{subnet}: {}", shown.describe());
        }
        let endpoints = wg(&["show", device, "endpoints"]).stdout;
        let at = peer["endpoint"].as_str().unwrap();
        assert!(endpoints.lines().any(|line| line == format!("{key}\t{at}")), "{at}: {endpoints}");
        let handshakes = wg(&["show", device, "latest-handshakes"]).stdout;
        let line = handshakes.lines().find(|line| line.starts_with(key)).unwrap();
        assert_ne!(line.split_whitespace().nth(1), Some("0"), "{handshakes}");
        let transfer = wg(&["show", device, "transfer"]).stdout;
        assert!(transfer.lines().any(|line| line.starts_with(key) && !line.ends_with("\t0")), "{transfer}");
    }
    // Root has the private key, as with any WireGuard device; it is the one in the state directory.
    let private = fs::read_to_string(node.state_dir().join("key")).unwrap();
    assert_eq!(wg(&["show", device, "private-key"]).stdout.trim(), private.trim());
    assert!(wg(&["showconf", device]).stdout.contains(&format!("PrivateKey = {}", private.trim())));
    let all = wg(&["show", "all", "dump"]).stdout;
    assert!(all.lines().any(|line| line.starts_with(&format!("{device}\t{}", private.trim()))), "{all}");
    // To others who may open the socket it gives all but that.
    let socket = format!("/var/run/wireguard/{device}.sock");
    for (path, mode) in [("/var/run/wireguard", 0o711), (socket.as_str(), 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let ask = "my $s = IO::Socket::UNIX->new($ARGV[0]) or die $!; print $s \"get=1\\n\\n\"; \
               while (<$s>) { last if /^$/; print }";
    let program =
        ["setpriv", "--reuid", "4711", "--regid", "4711", "--clear-groups", "perl", "-MIO::Socket::UNIX", "-e"];
    let told = node.host().run_args(&[&program[..], &[ask, &socket]].concat()).stdout;
    assert!(told.contains("public_key=") && told.contains("errno=0") && !told.contains("private_key="), "{told}");
    let before = wg(&["show", device, "peers"]).stdout;
    let set = wg(&["set", device, "listen-port", "1234"]);
    assert!(!set.success() && set.stderr.contains("Operation not permitted"), "{}", set.describe());
    assert_eq!(wg(&["show", device, "peers"]).stdout, before);
    // `wg` removes a socket without a listener; it comes back.
    fs::remove_file(format!("/var/run/wireguard/{device}.sock")).unwrap();
    await_until("wg to be answered again", SOON, || wg(&["show", device]).success().then_some(()));
    node.term();
    assert!(!Path::new(&format!("/var/run/wireguard/{device}.sock")).exists());
}

/// As systemd starts it: another user, two capabilities, a device file that everyone may open. Arguments: the folder
/// for these, the daemon, its command line.
const AS_SERVICE: &str = r#"
folder=$1; shift
before=
for word in "$@"; do
    case $before in --state-dir | --run-dir) install -d -o 4711 -g 4711 "$word" ;; esac
    before=$word
done
mknod -m 666 "$folder/tun" c 10 200
mount --bind "$folder/tun" /dev/net/tun
caps=-all,+net_admin,+net_raw
exec setpriv --reuid 4711 --regid 4711 --clear-groups --no-new-privs \
    --inh-caps=$caps --ambient-caps=$caps --bounding-set=$caps "$@"
"#;

#[test]
fn as_a_user_of_its_own_with_two_capabilities_it_does_all_of_its_work() {
    let sites = TwoSites::new("ownuser");
    let folder = sites.lab.folder().to_owned();
    let daemon = folder.join("meshd");
    // By another process: a file that is open for writing in a child that another scenario begins now cannot be run.
    let copy = |from: &Path, to: &Path| sites.store.run_args(&["cp", &from.to_string_lossy(), &to.to_string_lossy()]);
    copy(&binary("meshd"), &daemon);
    let script = folder.join("as-service");
    fs::write(&script, AS_SERVICE).unwrap();
    let (written, program) = (folder.join("service.text"), folder.join("service"));
    let text = format!(
        "#!/bin/bash\nown=$(mktemp -d {0}/service.XXXXXX)\nchmod 755 {0} $own\n\
         exec unshare -m bash -e {1} $own {2} \"$@\"\n",
        folder.display(),
        script.display(),
        daemon.display()
    );
    fs::write(&written, text).unwrap();
    fs::set_permissions(&written, fs::Permissions::from_mode(0o755)).unwrap();
    copy(&written, &program);
    let mesh = Mesh::start_on(sites, CONFIG, |node| node.program(&program));
    mesh.await_all_reach_each_other();
    let node = mesh.node("east1");
    let status = fs::read_to_string(format!("/proc/{}/status", node.with_process(Process::pid))).unwrap();
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert!(line("Uid:").starts_with("4711"), "{status}");
    assert_eq!(line("CapEff:"), "0000000000003000", "CAP_NET_ADMIN and CAP_NET_RAW");
    // What others break it still mends.
    node.host().run("nft flush ruleset");
    await_until("the rules to be back", SOON, || {
        let rules = node.host().run("nft list tables").stdout;
        (rules.contains("table inet meshd\n") && rules.contains("table inet meshd_policy")).then_some(())
    });
    node.await_path("east2", "direct", SOON);
    mesh.sniffer.assert_clean();
}

#[test]
fn systemd_hears_that_it_is_ready_without_etcd_and_that_it_lives() {
    let sites = TwoSites::new("systemd");
    let etcd = sites.start_etcd(1);
    etcd.stop();
    let path = sites.lab.folder().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let host = sites.hosts().next().unwrap().clone();
    let node =
        Meshd::on(&host, &etcd).env("NOTIFY_SOCKET", &path.to_string_lossy()).env("WATCHDOG_USEC", "900000").start();
    let hear = |what: &str| {
        await_until(what, SOON, || {
            let mut buffer = [0; 256];
            match socket.recv(&mut buffer) {
                Ok(len) => (&buffer[..len] == format!("{what}\n").as_bytes()).then_some(()),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
                Err(error) => panic!("{error}"),
            }
        });
    };
    hear("READY=1");
    hear("WATCHDOG=1");
    hear("WATCHDOG=1");
    node.term();
}
