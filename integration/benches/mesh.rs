//! Figures of a whole mesh: how long a join takes, what an idle node costs, whether it keeps still.
//!
//! ```text
//!   east1 … east20 ── switch ── router ── switch ── west1 … west20
//!                                  │
//!                                etcd
//! ```

use std::{
    thread,
    time::{Duration, Instant},
};

use integration::{
    Etcd, Meshd, MeshdNode, Ping, Process, await_until,
    measure::process_cpu,
    topology::{CONFIG, TwoSites},
};

const JOINS: usize = 20;
const IDLE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(60);

fn main() {
    // `cargo bench` hands its own words on; there is nothing to choose here.
    let sites = TwoSites::with_hosts("bench", 20);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let hosts: Vec<_> = sites.hosts_and_sites().collect();
    // Ten of each site are there before, the others join one after another, east and west in turn.
    let (first, later): (Vec<_>, Vec<_>) = hosts.into_iter().enumerate().partition(|(index, _)| index % 20 < 10);
    let mut nodes: Vec<MeshdNode> =
        first.iter().map(|(_, (host, site))| Meshd::on(host, &etcd).site(site).start()).collect();
    for node in &nodes {
        node.await_ready(SOON);
    }
    println!("| what | figure |\n|---|---|");

    let host = nodes[0].host();
    let monitors = [host.monitor("link address route rule"), host.spawn("nft", &["monitor"])];
    await_direct(&nodes);
    let before: Vec<String> = monitors.iter().map(Process::log).collect();
    let cpu_before: Vec<f64> = nodes.iter().map(cpu_seconds).collect();
    thread::sleep(IDLE);
    let shares: Vec<f64> = nodes
        .iter()
        .zip(cpu_before)
        .map(|(node, before)| (cpu_seconds(node) - before) / IDLE.as_secs_f64() * 100.0)
        .collect();
    let resident: Vec<f64> = nodes.iter().map(MeshdNode::resident_megabytes).collect();
    println!(
        "| idle node among 20, share of a core: median, worst | {:.2} %, {:.2} % |",
        median(&shares),
        worst(&shares)
    );
    println!("| its resident memory: median, worst | {:.1} MB, {:.1} MB |", median(&resident), worst(&resident));
    let said: usize = monitors.iter().zip(before).map(|(monitor, before)| monitor.log().len() - before.len()).sum();
    println!("| bytes that `ip monitor` and `nft monitor` said meanwhile ({} s) | {said} |", IDLE.as_secs());

    repairs(&nodes[0], &nodes[1]);
    own_keys(&nodes[0], &etcd);

    let mut joins = Vec::new();
    for (_, (host, site)) in interleaved(later).into_iter().take(JOINS) {
        joins.push(join(&mut nodes, Meshd::on(host, &etcd).site(site)).as_secs_f64());
    }
    joins.sort_by(f64::total_cmp);
    println!(
        "| join into a mesh of 20 to 39, start to a ping from every other node: median, p90, worst | {:.2} s, {:.2} s, {:.2} s |",
        median(&joins),
        joins[joins.len() * 9 / 10 - 1],
        worst(&joins)
    );
}

/// How long until the daemon has put back what others took from the kernel, and its own record in etcd.
fn repairs(node: &MeshdNode, neighbour: &MeshdNode) {
    let subnet = neighbour.subnet_env("FLANNEL_SUBNET").expect("a running node");
    let subnet: ipnet::Ipv4Net = subnet.parse().expect("a subnet");
    let priority = node.host().run("ip rule").stdout;
    let priority = priority.lines().find(|line| line.contains("15858")).expect("the probes' rule");
    let priority = priority.split(':').next().unwrap_or_default().to_owned();
    let (subnet, interface) = (subnet.trunc().to_string(), node.interface());
    for (what, command, look) in [
        ("a direct route", format!("ip route delete {subnet}"), format!("ip route show {subnet}")),
        (
            "the probes' rule",
            format!("ip rule delete priority {priority}"),
            format!("ip rule show priority {priority}"),
        ),
        ("the nftables table", "nft delete table inet meshd".to_owned(), "nft list chain inet meshd masq".to_owned()),
        ("the TUN device", format!("ip link delete {interface}"), format!("ip route show dev {interface} proto 158")),
    ] {
        repeat(what, || {
            node.host().run(&command);
            let start = Instant::now();
            await_until(what, SOON, || {
                let words: Vec<&str> = look.split(' ').collect();
                let seen = node.host().try_run(&words);
                (seen.success() && !seen.stdout.trim().is_empty()).then_some(())
            });
            start.elapsed()
        });
    }
}

/// The same for what others delete from etcd.
fn own_keys(node: &MeshdNode, etcd: &Etcd) {
    let id = node.status()["id"].as_str().expect("an id").to_owned();
    let subnet = etcd.get_prefix("/meshd/subnets/").into_iter().find(|(_, value)| value.contains(&id));
    let (subnet, _) = subnet.expect("a running node");
    for (what, key) in [("its record in etcd", format!("/meshd/nodes/{id}")), ("its subnet in etcd", subnet)] {
        repeat(what, || {
            etcd.del(&key);
            let start = Instant::now();
            await_until(what, SOON, || etcd.get(&key));
            start.elapsed()
        });
    }
}

/// Eleven times, as a row.
fn repeat(what: &str, mut once: impl FnMut() -> Duration) {
    let times: Vec<f64> = (0..11).map(|_| once().as_secs_f64()).collect();
    println!(
        "| {what} is deleted, until it is back: median, worst of 11 | {:.2} s, {:.2} s |",
        median(&times),
        worst(&times)
    );
}

/// East and west in turn.
fn interleaved<T>(items: Vec<T>) -> Vec<T> {
    let mut west: Vec<T> = items;
    let mut east: Vec<T> = west.drain(..west.len() / 2).collect();
    east.reverse();
    west.reverse();
    let mut turn = Vec::new();
    while let (Some(a), Some(b)) = (east.pop(), west.pop()) {
        turn.extend([a, b]);
    }
    turn
}

/// Starts a node; the time until every other has an answer from its overlay address. The pings' own processes count in.
fn join(nodes: &mut Vec<MeshdNode>, node: Meshd) -> Duration {
    let started = Instant::now();
    let node = node.start();
    let subnet = await_until("subnet.env", SOON, || node.subnet_env("FLANNEL_SUBNET"));
    let subnet: ipnet::Ipv4Net = subnet.parse().expect("a subnet");
    let overlay = subnet.network();
    thread::scope(|scope| {
        for other in nodes.iter() {
            scope.spawn(move || {
                await_until("an answer", SOON, || {
                    let report = Ping::new(overlay).count(1).wait(Duration::from_millis(200)).run(other.host());
                    (!report.answers.is_empty()).then_some(())
                });
            });
        }
    });
    let took = started.elapsed();
    nodes.push(node);
    took
}

/// Waits until nothing is under way any more: every node direct to the others of its site.
fn await_direct(nodes: &[MeshdNode]) {
    for node in nodes {
        await_until(&format!("{} to be direct to its site", node.name()), SOON, || {
            let peers = node.try_json(&["peers"])?;
            let direct = peers.as_array()?.iter().filter(|peer| peer["path"] == "direct").count();
            (direct == nodes.len() / 2 - 1).then_some(())
        });
    }
}

fn cpu_seconds(node: &MeshdNode) -> f64 {
    process_cpu(node.with_process(Process::pid)).as_secs_f64()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

fn worst(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}
