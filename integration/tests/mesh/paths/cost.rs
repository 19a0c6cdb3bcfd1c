//! What a mesh at rest costs. Run by hand, on a machine that does nothing else:
//! `cargo test --release -p integration --test mesh -- --ignored --nocapture paths::cost`

use std::{fs, thread, time::Duration};

use integration::{
    Meshd, MeshdNode,
    topology::{CONFIG, TwoSites},
};

use super::{CHANGE, READY};

const NODES: usize = 20;
const SPAN: Duration = Duration::from_secs(30);

/// ```text
///   east1 ─┐
///    …     ├─ switch ──── router ──── store (etcd)
///   east20 ┘
/// ```
#[test]
#[ignore = "measures; not for a busy machine"]
fn twenty_nodes_at_rest() {
    let mut sites = TwoSites::with_hosts("cost", 1);
    for _ in 1..NODES {
        sites.east.add_host(&sites.lab);
    }
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let nodes: Vec<MeshdNode> =
        sites.east.hosts.iter().map(|host| Meshd::on(host, &etcd).site("east").start()).collect();
    for node in &nodes {
        node.await_ready(READY);
    }
    for node in &nodes {
        for other in &nodes {
            if node.name() != other.name() {
                node.await_path(other.name(), "direct", CHANGE);
            }
        }
    }
    // Sessions of the start end within 180 s; the figure is of a mesh where nothing has happened for a while.
    thread::sleep(Duration::from_secs(20));
    let before: Vec<f64> = nodes.iter().map(seconds).collect();
    thread::sleep(SPAN);
    let mut cost: Vec<f64> =
        nodes.iter().zip(before).map(|(node, before)| (seconds(node) - before) / SPAN.as_secs_f64() * 100.0).collect();
    cost.sort_by(f64::total_cmp);
    let mut memory: Vec<u64> = nodes.iter().map(resident).collect();
    memory.sort_unstable();
    println!(
        "{NODES} nodes at rest for {SPAN:?}: median {:.2} % of a core, most {:.2} %; median {} KiB resident, most {} KiB",
        cost[NODES / 2],
        cost[NODES - 1],
        memory[NODES / 2],
        memory[NODES - 1]
    );
}

/// Processor time that the daemon has taken so far.
fn seconds(node: &MeshdNode) -> f64 {
    let text = fs::read_to_string(format!("/proc/{}/stat", pid(node))).expect("it runs");
    let fields: Vec<&str> = text.rsplit_once(')').expect("a stat line").1.split_whitespace().collect();
    // Own and children's, user and system, in ticks of 10 ms.
    fields[11..15].iter().filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// KiB that the daemon holds.
fn resident(node: &MeshdNode) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/status", pid(node))).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    line.split_whitespace().next().and_then(|size| size.parse().ok()).expect("a number")
}

fn pid(node: &MeshdNode) -> u32 {
    node.with_process(|process| process.pid())
}
