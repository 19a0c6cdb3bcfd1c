//! The control plane at scale: one daemon and a real etcd that holds thousands of registered nodes.
//!
//! ```text
//!   host ── router ── store        the other nodes are records: they have no machines
//! ```
//!
//! `BENCH_QUICK=1` takes a tenth of everything. What is looked at is what a node does to its kernel: a route per
//! subnet.

use std::{
    env, fs, thread,
    time::{Duration, Instant},
};

use integration::{
    Etcd, EtcdWriter, Host, LARGE_CONFIG, Meshd, MeshdNode, PaperNode, Process, await_until,
    measure::{Comparison, Machine, Series},
    topology::Star,
};

const SOON: Duration = Duration::from_secs(120);
/// Between two looks at the kernel's routes, of which there are thousands.
const LOOK: Duration = Duration::from_millis(20);
/// Between two changes: ten a second.
const CHANGE: Duration = Duration::from_millis(100);
/// From the moment that a change is sent to etcd; longer counts as never.
const PATIENCE: Duration = Duration::from_secs(5);
const SUBJECT: &str = "meshd";

fn main() {
    let quick = env::var("BENCH_QUICK").is_ok_and(|value| !value.is_empty() && value != "0");
    let (nodes, joins, changes) = if quick { (500, 1, 30) } else { (5000, 5, 300) };
    let machine = Machine::this();
    println!("{}\n", machine.line());
    let mut figures = Comparison::new("control-plane", &format!("a mesh of {nodes} registered nodes in a real etcd"));
    figures.note(
        "The whole picture is a route to every other node's subnet in the kernel, counted from the start of the daemon's \
         process with an empty state directory. A change is a node that appears or goes, counted from the moment that it \
         is sent to etcd until `ip monitor` reports its route; ten come in a second.",
    );

    let mut star = Star::new("control-plane");
    let (store, address) = star.host("store");
    let etcd = Etcd::start(&store, &[&address], 1);
    etcd.put("/meshd/config", LARGE_CONFIG);
    let mut writer = EtcdWriter::connect(&etcd, &store);

    let (host, _) = star.host("empty");
    let empty = Meshd::on(&host, &etcd).site("empty").start();
    empty.await_ready(SOON);
    thread::sleep(Duration::from_secs(2));
    figures.lower(SUBJECT, "RSS of the daemon in an empty mesh, MB", empty.resident_megabytes());
    let entries: Vec<_> = (0..nodes).flat_map(|number| PaperNode::new(number).entries()).collect();
    let start = Instant::now();
    writer.put_all(&entries);
    figures.note(format!("Writing the {} records took etcd {:.1} s.", entries.len(), start.elapsed().as_secs_f64()));
    await_routes(&host, nodes);
    thread::sleep(Duration::from_secs(3));
    figures.lower(SUBJECT, "RSS of that daemon after the others have registered, MB", empty.resident_megabytes());
    empty.term();

    let mut node = None;
    for number in 0..joins {
        let (host, _) = star.host(&format!("new{number}"));
        let start = Instant::now();
        let new = Meshd::on(&host, &etcd).site("new").start();
        await_routes(&host, nodes);
        figures.lower(SUBJECT, "whole picture at a new node, s", start.elapsed().as_secs_f64());
        if let Some((_, earlier)) = node.replace((host, new)) {
            let earlier: MeshdNode = earlier;
            earlier.term();
        }
    }
    let (host, node) = node.expect("one node at least");
    thread::sleep(Duration::from_secs(3));
    figures.lower(SUBJECT, "RSS of a node that found them, MB", node.resident_megabytes());
    let share = node.share_of_a_core(|| thread::sleep(Duration::from_secs(if quick { 2 } else { 10 })));
    figures.lower(SUBJECT, "CPU while nothing changes, % of a core", share);
    let mut times = Series::default();
    let share = node.share_of_a_core(|| times = change(&host, &mut writer, nodes, changes));
    figures.lower(SUBJECT, "CPU while ten nodes a second appear or go, 30 records, % of a core", share);
    let share = node.share_of_a_core(|| move_endpoints(&mut writer, changes));
    figures.lower(SUBJECT, "CPU while ten records a second change, an endpoint in each, % of a core", share);
    figures.lower(SUBJECT, "RSS after that, MB", node.resident_megabytes());
    for (name, part) in [("median", 0.5), ("p99", 0.99), ("worst", 1.0)] {
        figures.lower(SUBJECT, &format!("one change, {name}, ms"), times.quantile(part));
    }
    println!("{figures}");
    match figures.write_json(&machine, &[format!("meshd: {}", env!("CARGO_PKG_VERSION"))]) {
        Ok(path) => println!("All values: {}", path.display()),
        Err(error) => eprintln!("cannot write the values: {error}"),
    }
}

/// Lets nodes appear and go, in turn, and returns how long each took to reach the kernel's routes, in milliseconds.
fn change(host: &Host, writer: &mut EtcdWriter, first: u16, count: u32) -> Series {
    let monitor = host.monitor("route");
    let mut seen = 0;
    let begin = Instant::now();
    let mut times = Series::default();
    for number in 0..count {
        let due = begin + CHANGE * number;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let node = PaperNode::new(first + u16::try_from(number / 2).unwrap_or_default());
        let start = Instant::now();
        if number % 2 == 0 {
            writer.put_all(&node.entries());
        } else {
            writer.delete_all(&node.keys());
        }
        let took = await_line(&monitor, &mut seen, &format!("{}/24", node.subnet()), start);
        times.push(took.as_secs_f64() * 1e3);
    }
    times
}

/// Rewrites one node's record after the other, each time with another port.
fn move_endpoints(writer: &mut EtcdWriter, count: u32) {
    let begin = Instant::now();
    for number in 0..count {
        thread::sleep((begin + CHANGE * number).saturating_duration_since(Instant::now()));
        let [(key, value), ..] = PaperNode::new(u16::try_from(number % 100).unwrap_or_default()).entries();
        let port = 20_000 + number;
        writer.put_all(&[(key, value.replace(":51820\"", &format!(":{port}\"")))]);
    }
}

/// Waits for a line with `text` beyond the first `seen` bytes of what the process has printed.
fn await_line(monitor: &Process, seen: &mut usize, text: &str, start: Instant) -> Duration {
    loop {
        let log = fs::read(monitor.log_path()).unwrap_or_default();
        let new = String::from_utf8_lossy(&log[(*seen).min(log.len())..]).into_owned();
        let took = start.elapsed();
        if new.contains(text) || took > PATIENCE {
            *seen = log.len();
            return took;
        }
        thread::sleep(Duration::from_micros(500));
    }
}

fn await_routes(host: &Host, nodes: u16) {
    await_until(&format!("routes to {nodes} subnets"), SOON, || {
        let text = host.enter(|| fs::read_to_string("/proc/thread-self/net/route")).unwrap_or_default();
        // Those of the nodes are /24s: the eighth field is the mask, in the machine's byte order.
        let there = text.lines().filter(|line| line.split_whitespace().nth(7) == Some("00FFFFFF")).count();
        if there < usize::from(nodes) {
            thread::sleep(LOOK);
            return None;
        }
        Some(())
    });
}
