//! The Lab itself: links carry packets, and nothing outlives a Lab, however it ends.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    net::IpAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use integration::{Lab, Ping, await_ok, await_until, ping};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

const DEADLINE: Duration = Duration::from_secs(60);

/// ```text
///   a ───┤ lan ├─── b
/// ```
#[test]
fn the_folder_of_namespaces_is_a_mount_that_nobody_mounts_over() {
    let lab = Lab::new("mount");
    let _host = lab.host("a");
    let name = format!("{}-stranger", lab.id());
    let ip = |word: &str| Command::new("ip").args(["netns", word, &name]).status().unwrap();
    assert!(ip("add").success());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(mounts.lines().filter(|line| line.split(' ').nth(4) == Some("/run/netns")).count(), 1, "{mounts}");
    assert!(ip("delete").success());
}

#[test]
fn hosts_on_a_switch_reach_each_other() {
    let lab = Lab::new("hosts_on_a_switch");
    let switch = lab.switch("lan");
    let (a, b) = (lab.host("a"), lab.host("b"));
    let cable = a.connect(&switch, &["192.0.2.1/24", "2001:db8::1/64"]);
    b.connect(&switch, &["192.0.2.2/24", "2001:db8::2/64"]);
    ping(&a, "192.0.2.2").assert_all_answered();
    ping(&b, "2001:db8::1").assert_all_answered();

    cable.down();
    Ping::new("192.0.2.1").count(1).wait(Duration::from_millis(200)).run(&b).assert_none_answered();
    cable.up();
    ping(&b, "192.0.2.1").assert_all_answered();
}

/// Answers echo requests to 192.0.2.2 in the host's place, the last one late.
fn answer_the_third_late(socket: &Socket, to: &SockAddr) {
    loop {
        let mut request = [0; 128];
        let length = (&mut &*socket).read(&mut request).unwrap();
        let answer = &mut request[20..length];
        let number = answer[7];
        // Type 8 becomes 0, and the checksum says so.
        if answer[0] != 8 {
            continue;
        }
        answer[0] = 0;
        let sum = u32::from(u16::from_be_bytes([answer[2], answer[3]])) + 0x0800;
        answer[2..4].copy_from_slice(&((sum & 0xffff) as u16 + (sum >> 16) as u16).to_be_bytes());
        if number == 3 {
            // More than twice what the others took.
            thread::sleep(Duration::from_millis(100));
        }
        socket.send_to(answer, to).unwrap();
        if number == 3 {
            return;
        }
    }
}

#[test]
fn an_answer_that_comes_after_ping_has_ended_is_one() {
    let lab = Lab::new("late_answer");
    let switch = lab.switch("lan");
    let (a, b) = (lab.host("a"), lab.host("b"));
    a.connect(&switch, &["192.0.2.1/24"]);
    b.connect(&switch, &["192.0.2.2/24"]);
    ping(&a, "192.0.2.2").assert_all_answered();
    b.sysctl("net/ipv4/icmp_echo_ignore_all", "1");
    let socket = b.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).unwrap());
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let to = SockAddr::from("192.0.2.1:0".parse::<std::net::SocketAddr>().unwrap());
    // Where the first answers have taken long, `ping` waits for the last one too.
    await_ok("an answer after ping has ended", DEADLINE, || {
        let report = thread::scope(|scope| {
            let answering = scope.spawn(|| answer_the_third_late(&socket, &to));
            let report = ping(&a, "192.0.2.2");
            answering.join().unwrap();
            report
        });
        let is_late = report.text.contains("icmp_seq=3 was answered after ping had ended");
        if report.lost() == 0 && is_late { Ok(()) } else { Err(report.text) }
    });
    ping(&a, "192.0.2.2").assert_none_answered();
}

/// ```text
///   pod p ── a ───┤ lan ├─── b ── pod q      a, b forward and know each other's pods
/// ```
#[test]
fn pods_are_reached_over_their_hosts() {
    let lab = Lab::new("pods");
    let switch = lab.switch("lan");
    let (a, b) = (lab.host("a"), lab.host("b"));
    a.connect(&switch, &["192.0.2.1/24", "2001:db8::1/64"]);
    b.connect(&switch, &["192.0.2.2/24", "2001:db8::2/64"]);
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    let p = a.pod("p", &[address("10.1.0.9"), address("fd00:1::9")]);
    let q = b.pod("q", &[address("10.2.0.9"), address("fd00:2::9")]);
    let second = b.pod("second", &[address("10.2.0.10")]);
    ping(&b, q.v4()).assert_all_answered();
    ping(&q, second.v4()).assert_none_answered();

    for host in [&a, &b] {
        host.enable_forwarding();
    }
    a.route("10.2.0.0/24", "via 192.0.2.2");
    a.route("fd00:2::/64", "via 2001:db8::2");
    b.route("10.1.0.0/24", "via 192.0.2.1");
    b.route("fd00:1::/64", "via 2001:db8::1");
    ping(&p, q.v4()).assert_all_answered();
    ping(&p, q.v6()).assert_all_answered();
    ping(&q, p.v4()).assert_all_answered();
    ping(&q, p.v6()).assert_all_answered();
    ping(&q, second.v4()).assert_all_answered();

    q.set_mtu(1400);
    Ping::new(q.v4()).size(1400 - 28).option("-M do").run(&b).assert_all_answered();
    let too_big = Ping::new(q.v4()).size(1400 - 27).option("-M do").run(&b);
    too_big.assert_none_answered();
}

#[test]
fn a_failed_command_names_host_command_and_output() {
    let lab = Lab::new("failed_command");
    let host = lab.host("a");
    let panic = catch_unwind(AssertUnwindSafe(|| host.run("ip link show nothing"))).unwrap_err();
    let text = panic.downcast_ref::<String>().unwrap();
    for part in ["a: ", "ip link show nothing", "does not exist", "exit status: 1"] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn a_process_is_stopped_watched_and_logged() {
    let lab = Lab::new("process");
    let host = lab.host("a");
    let process = host.spawn("bash", &["-c", "trap 'exit 7' TERM; echo started; while :; do sleep 0.01; done"]);
    process.await_log("started", DEADLINE);
    assert!(process.running());
    assert_eq!(process.term(DEADLINE).code(), Some(7));
    assert!(!process.running());
}

#[test]
fn a_lab_that_ends_leaves_nothing() {
    let lab = Lab::new("ends");
    let id = lab.id().to_owned();
    let host = lab.host("a");
    let _sleeper = host.spawn("sleep", &["1000"]);
    host.run_args(&["bash", "-c", "setsid sleep 1000 >/dev/null 2>&1 &"]);
    assert!(!traces(&id).is_empty());
    drop(lab);
    assert_eq!(traces(&id), Vec::<String>::new());
}

#[test]
fn a_panic_leaves_nothing() {
    let mut id = String::new();
    let result = catch_unwind(AssertUnwindSafe(|| {
        let lab = Lab::new("panic");
        id = lab.id().to_owned();
        let host = lab.host("a");
        let _sleeper = host.spawn("sleep", &["1000"]);
        panic!("on purpose");
    }));
    assert!(result.is_err());
    assert_eq!(traces(&id), Vec::<String>::new());
}

#[test]
fn a_killed_process_leaves_nothing() {
    let (mut victim, id) = start_victim();
    assert!(traces(&id).iter().any(|trace| trace.contains("process")));
    victim.kill().unwrap();
    victim.wait().unwrap();
    await_until("the reaper to clean up", DEADLINE, || traces_without_lock(&id).is_empty().then_some(()));
}

#[test]
fn what_a_killed_process_and_its_reaper_left_is_swept_by_the_next_lab() {
    let (mut victim, id) = start_victim();
    let reaper = await_until("the reaper", DEADLINE, || child_called_bash(victim.id()));
    let status = Command::new("kill").args(["-9", &reaper.to_string()]).status().unwrap();
    assert!(status.success());
    victim.kill().unwrap();
    victim.wait().unwrap();
    // Nothing else takes it away now. Where that of another test has begun to, this one need not.
    let _next = Lab::new("sweeper");
    await_until("the Lab to be swept", DEADLINE, || traces(&id).is_empty().then_some(()));
}

/// A process of its own with a Lab in it, and that Lab's id.
fn start_victim() -> (std::process::Child, String) {
    let mut victim = Command::new(env!("CARGO_BIN_EXE_lab-tool"))
        .arg("pair")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .env_remove("KEEP")
        .spawn()
        .unwrap();
    let mut id = String::new();
    BufReader::new(victim.stdout.take().unwrap()).read_line(&mut id).unwrap();
    (victim, id.trim().to_owned())
}

fn child_called_bash(parent: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_whitespace().find_map(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (name.trim() == "bash").then(|| pid.parse().ok())?
    })
}

/// Namespaces, files and processes of a Lab that are still there.
fn traces(id: &str) -> Vec<String> {
    let mut traces = traces_without_lock(id);
    let lock = format!("/run/meshd-lab/{id}.lock");
    if Path::new(&lock).exists() {
        traces.push(lock);
    }
    traces
}

fn traces_without_lock(id: &str) -> Vec<String> {
    let prefix = format!("{id}-");
    let mut traces = Vec::new();
    let mut inodes = Vec::new();
    for entry in fs::read_dir("/run/netns").unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            traces.push(format!("namespace {}", entry.path().display()));
            if let Ok(data) = fs::metadata(entry.path()) {
                inodes.push(std::os::unix::fs::MetadataExt::ino(&data));
            }
        }
    }
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        if let Ok(data) = fs::metadata(entry.path().join("ns/net"))
            && inodes.contains(&std::os::unix::fs::MetadataExt::ino(&data))
        {
            traces.push(format!("process {}", entry.path().display()));
        }
    }
    let folder = format!("/run/meshd-lab/{id}");
    if Path::new(&folder).exists() {
        traces.push(folder);
    }
    traces
}
