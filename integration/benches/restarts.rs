//! How long packets do not get through when a daemon is killed, or stopped as an upgrade does, and started again.
//!
//! ```text
//!   east1 (pod) ── switch ── router ── switch ── west1 (pod)
//!    restarts                  │
//!                            etcd
//! ```
//!
//! UDP goes every 5 ms, first only from the far pod to the one behind the daemon that restarts, then both ways beside a
//! TCP connection, which must live. An interruption is the longest time between two packets that arrived, so it
//! includes the daemon's own start. `BENCH_QUICK=1` restarts a few times only.

use std::{
    env,
    net::{IpAddr, UdpSocket},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use integration::{
    MeshdNode, Pod, TcpCheck, await_until,
    measure::Series,
    topology::{CONFIG, Mesh, TwoSites},
};

const PACE: Duration = Duration::from_millis(5);
/// How many packets in a row say that a direction works again.
const STEADY: usize = 40;
const SOON: Duration = Duration::from_secs(60);
/// Bytes a second of the TCP connection, each way.
const TCP: u64 = 100_000;

/// When packets of one direction arrived.
#[derive(Default)]
struct Arrivals(Mutex<Vec<Instant>>);

impl Arrivals {
    /// Waits until packets arrive steadily that were sent after `since`, and returns the longest pause in between.
    fn longest_pause(&self, since: Instant) -> Duration {
        await_until("packets to arrive again", SOON, || {
            let times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let last = times.iter().rev().take(STEADY);
            let first_of_last = last.clone().next_back()?;
            let steady = last.clone().zip(last.clone().skip(1)).all(|(later, sooner)| *later - *sooner < PACE * 20);
            (times.len() > STEADY && *first_of_last > since && steady).then_some(())
        });
        let times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let window: Vec<&Instant> = times.iter().skip_while(|time| **time + PACE * 20 < since).collect();
        window.windows(2).map(|pair| *pair[1] - *pair[0]).max().unwrap_or_default()
    }
}

/// Ends the streams, also when something fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends and receives until `stop`.
fn stream<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    [from, to]: [&'scope Pod; 2],
    address: IpAddr,
    arrivals: &'scope Arrivals,
    stop: &'scope AtomicBool,
) {
    let socket = |pod: &Pod, address: IpAddr| {
        let socket = pod.enter(|| UdpSocket::bind((address, 0))).expect("a UDP socket");
        socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a time limit");
        socket
    };
    let receiver = socket(to, address);
    let target = receiver.local_addr().expect("a bound socket");
    let sender = socket(from, from.v4());
    scope.spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            // What its own kernel refuses is lost, too.
            let _ = sender.send_to(&[0; 64], target);
            thread::sleep(PACE);
        }
    });
    scope.spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            if receiver.recv(&mut [0; 128]).is_ok() {
                arrivals.0.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
            }
        }
    });
}

fn restart(node: &MeshdNode, kill: bool) {
    if kill {
        node.kill9();
    } else {
        assert!(node.term().success(), "it stops when it is told to");
    }
    node.start();
}

fn print(what: &str, pauses: &Series) {
    let [median, p90, p99] = [0.5, 0.9, 0.99].map(|part| pauses.quantile(part));
    println!(
        "| {what}, {} times | {median:.2} s, {p90:.2} s, {p99:.2} s, {:.2} s |",
        pauses.values().len(),
        pauses.greatest()
    );
}

/// Restarts the node this often, and prints the pauses of each direction.
fn measure(node: &MeshdNode, how: &str, kill: bool, times: usize, directions: &[(&str, &Arrivals)]) {
    let mut pauses = vec![Series::default(); directions.len()];
    for _ in 0..times {
        let since = Instant::now();
        restart(node, kill);
        for ((_, arrivals), pauses) in directions.iter().zip(&mut pauses) {
            pauses.push(arrivals.longest_pause(since).as_secs_f64());
        }
        node.await_ready(SOON);
    }
    for ((direction, _), pauses) in directions.iter().zip(&pauses) {
        print(&format!("{how}: {direction}"), pauses);
    }
}

fn main() {
    // `cargo bench` hands its own words on; there is nothing to choose here.
    let quick = env::var("BENCH_QUICK").is_ok_and(|value| !value.is_empty() && value != "0");
    let [kills, stops, one_sided] = if quick { [3, 2, 2] } else { [100, 25, 25] };
    let mesh = Mesh::start_on(TwoSites::with_hosts("restarts", 1), CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let (node, near, far) = (mesh.node("east1"), mesh.pod("east1"), mesh.pod("west1"));
    println!("| what, until packets arrive again | median, p90, p99, worst |\n|---|---|");
    let (toward, from, stop) = (Arrivals::default(), Arrivals::default(), AtomicBool::new(false));
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        stream(scope, [far, near], near.v4(), &toward, &stop);
        let toward = ("toward the node", &toward);
        measure(node, "killed, only the far end sends", true, one_sided, &[toward]);
        stream(scope, [near, far], far.v4(), &from, &stop);
        let both = [toward, ("from the node", &from)];
        let tcp = TcpCheck::start(near, far, far.v4(), TCP);
        measure(node, "killed, both send", true, kills, &both);
        measure(node, "stopped, both send", false, stops, &both);
        tcp.finish().assert_intact();
    });
    println!("| the TCP connection beside it | lived through {} restarts |", kills + stops);
}
