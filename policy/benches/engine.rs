//! Figures of the policy engine: compile, verdict, change, memory, flows. Run with `cargo bench -p policy`.
//!
//! Prints one line each. Memory is what the process has resident more than before, inputs included.

#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on has no figures")]

use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use packet::Packet;
use policy::{
    engine::{Classifier, Engine, Flow, ObjectName, PolicyState, Side},
    flow::{FlowTable, Limits},
    object::{Labels, NamedPort, NetworkPolicy, PodObject, Protocol},
};
use serde_json::{Value, json};

/// Numbers from a seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below as u64) as usize
    }
}

struct World {
    namespaces: Vec<(Arc<str>, Labels)>,
    pods: Vec<(ObjectName, PodObject)>,
    /// Their specs as text.
    policies: Vec<(ObjectName, String)>,
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().copied().collect()
}

fn address(index: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + index as u32 + 1))
}

fn pod(index: usize, labels: Labels) -> PodObject {
    let ports = vec![NamedPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }];
    PodObject { labels, ports, addresses: vec![address(index)], node: Some("n".into()), ..Default::default() }
}

/// 500 namespaces with 100 pods of ten applications each, and 20 policies of every kind in each.
fn mixed() -> World {
    let mut dice = Dice(1);
    let mut world = World { namespaces: Vec::new(), pods: Vec::new(), policies: Vec::new() };
    for n in 0..500 {
        let name: Arc<str> = format!("ns-{n}").into();
        world.namespaces.push((Arc::clone(&name), labels(&[("team", &format!("t{}", n % 50))])));
        for p in 0..100 {
            let own = labels(&[
                ("app", &format!("app-{}", p % 10)),
                ("tier", ["web", "api", "db"][p % 3]),
                ("instance", &format!("i{p}")),
            ]);
            world.pods.push((ObjectName::new(Arc::clone(&name), format!("pod-{p}")), pod(n * 100 + p, own)));
        }
        for p in 0..20 {
            world.policies.push((ObjectName::new(Arc::clone(&name), format!("np-{p}")), spec(&mut dice, p)));
        }
    }
    world
}

fn spec(dice: &mut Dice, kind: usize) -> String {
    let app = |dice: &mut Dice| json!({"matchLabels": {"app": format!("app-{}", dice.roll(10))}});
    let team = |dice: &mut Dice| json!({"matchLabels": {"team": format!("t{}", dice.roll(50))}});
    let port = |dice: &mut Dice| json!({"port": ([80, 443, 5432, 6379, 8080][dice.roll(5)])});
    let third = dice.roll(256);
    let subject = app(dice);
    let spec: Value = match kind % 5 {
        0 if kind == 0 => json!({"podSelector": {}, "policyTypes": ["Ingress"]}),
        0 | 1 => {
            json!({"podSelector": subject, "ingress": [{"from": [{"podSelector": app(dice)}], "ports": [port(dice)]}]})
        }
        2 => json!({"podSelector": subject, "ingress": [
            {"from": [{"namespaceSelector": team(dice), "podSelector": app(dice)}], "ports": [port(dice), {"port": "http"}]}]}),
        3 => json!({"podSelector": subject, "policyTypes": ["Egress"], "egress": [
            {"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": [format!("10.0.{third}.0/24")]}}], "ports": [port(dice)]},
            {"to": [{"namespaceSelector": team(dice)}], "ports": [{"port": "http"}, {"protocol": "UDP", "port": 53}]}]}),
        _ => json!({"podSelector": subject, "policyTypes": ["Ingress", "Egress"], "ingress": [
            {"from": [{"ipBlock": {"cidr": format!("203.0.{third}.0/24")}}, {"podSelector": app(dice)}],
             "ports": [{"port": 8000, "endPort": 9000}]}], "egress": [{"ports": [port(dice)]}]}),
    };
    spec.to_string()
}

/// Antrea's: a default deny and two policies for four pods in each of 25,000 namespaces.
fn small_namespaces() -> World {
    let mut world = World { namespaces: Vec::new(), pods: Vec::new(), policies: Vec::new() };
    for n in 0..25_000 {
        let name: Arc<str> = format!("ns-{n}").into();
        world.namespaces.push((Arc::clone(&name), labels(&[("app", &name)])));
        let both = ["Ingress", "Egress"];
        let deny = json!({"podSelector": {}, "policyTypes": both}).to_string();
        world.policies.push((ObjectName::new(Arc::clone(&name), "default-deny-all"), deny));
        for k in 1..=2 {
            let selector = json!({"matchLabels": {(format!("app-{k}")): format!("scale-{k}")}});
            let spec = json!({"podSelector": selector, "policyTypes": both, "ingress": [{"from": [{"podSelector": selector}]}]});
            world.policies.push((ObjectName::new(Arc::clone(&name), format!("np-{k}")), spec.to_string()));
            for p in 0..2 {
                let own = labels(&[(&format!("app-{k}"), &format!("scale-{k}"))]);
                let index = n * 4 + (k - 1) * 2 + p;
                world.pods.push((ObjectName::new(Arc::clone(&name), format!("pod{index}")), pod(index, own)));
            }
        }
    }
    world
}

/// Antrea's: 10,000 policies in one namespace each of which selects each of 10,000 pods, as subject and as peer.
fn one_namespace() -> World {
    let name: Arc<str> = "ns".into();
    let selector = json!({"matchLabels": {"app-1": "scale-1"}});
    let spec = json!({"podSelector": selector, "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [{"podSelector": selector}]}]})
    .to_string();
    World {
        namespaces: vec![(Arc::clone(&name), labels(&[("app", "ns")]))],
        pods: (0..10_000)
            .map(|p| (ObjectName::new(Arc::clone(&name), format!("pod-{p}")), pod(p, labels(&[("app-1", "scale-1")]))))
            .collect(),
        policies: (0..10_000).map(|p| (ObjectName::new(Arc::clone(&name), format!("np-{p}")), spec.clone())).collect(),
    }
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Builds it all; prints what it took.
fn compile(name: &str, world: &World) -> (Engine, Arc<Classifier>) {
    let before = resident();
    let start = Instant::now();
    let parsed: Vec<_> = world
        .policies
        .iter()
        .map(|(name, text)| {
            let policy = NetworkPolicy::parse(&serde_json::from_str(text).unwrap()).unwrap();
            (name.clone(), PolicyState::Valid(policy))
        })
        .collect();
    let parsing = start.elapsed();
    let start = Instant::now();
    let mut engine = Engine::new();
    for (name, labels) in &world.namespaces {
        engine.put_namespace(&etcd_schema::Cluster::default(), name, labels.clone());
    }
    for (age, (name, pod)) in world.pods.iter().enumerate() {
        engine.put_pod(name.clone(), pod.clone(), age as u64);
    }
    for (name, policy) in &parsed {
        engine.put_policy(name.clone(), policy);
    }
    let classifier = engine.commit(1);
    let took = start.elapsed();
    println!(
        "{name}: {} namespaces, {} pods, {} policies: compiled in {:.0} ms (policies parsed in {:.0} ms), {} MB more",
        world.namespaces.len(),
        world.pods.len(),
        world.policies.len(),
        ms(took),
        ms(parsing),
        resident().saturating_sub(before) >> 20
    );
    (engine, classifier)
}

fn percentiles(name: &str, unit: &str, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!(
        "{name}: median {:.3} {unit}, p99 {:.3} {unit}, worst {:.3} {unit} ({} times)",
        at(0.5),
        at(0.99),
        at(1.0),
        times.len()
    );
}

fn verdicts(world: &World, classifier: &Classifier) {
    let mut dice = Dice(7);
    let count = world.pods.len();
    let mut flow = || Flow {
        source: address(dice.roll(count)),
        destination: address(dice.roll(count)),
        protocol: 6,
        port: Some([80, 443, 5432, 8080][dice.roll(4)]),
    };
    let timed = |flow: Flow| {
        let start = Instant::now();
        black_box(classifier.verdict(Side::Ingress, black_box(&flow)));
        start.elapsed().as_nanos() as f64 / 1000.0
    };
    let flows: Vec<Flow> = (0..200_000).map(|_| flow()).collect();
    percentiles("verdict on a new flow, random pairs", "us", flows.iter().copied().map(timed).collect());
    // Not even the code is in a cache then, nor the clock's.
    let mut sink = vec![0u8; 64 << 20];
    let mut emptied = |round: u8| {
        sink.iter_mut().step_by(64).for_each(|byte| *byte = byte.wrapping_add(round));
        black_box(&sink);
    };
    let times = flows.iter().take(400).enumerate().map(|(round, flow)| {
        emptied(round as u8);
        timed(*flow)
    });
    percentiles("the same, every cache of the processor emptied before each", "us", times.collect());
}

fn changes(world: &World, engine: &mut Engine) {
    let mut dice = Dice(9);
    let mut times = Vec::new();
    for round in 0..2000 {
        let (ns, p) = (dice.roll(world.namespaces.len()), dice.roll(20));
        let policy = NetworkPolicy::parse(&serde_json::from_str(&spec(&mut dice, p)).unwrap()).unwrap();
        let (name, pod) = &world.pods[dice.roll(world.pods.len())];
        let mut pod = pod.clone();
        if round % 4 == 0 {
            pod.labels = pod.labels.with("app", &format!("app-{}", dice.roll(10)));
        }
        let policy_name = ObjectName::new(format!("ns-{ns}"), format!("np-{p}"));
        let start = Instant::now();
        match round % 4 {
            0 => engine.put_pod(name.clone(), pod, 1_000_000 + round),
            1 => engine.delete_pod(name),
            2 => engine.put_policy(policy_name, &PolicyState::Valid(policy)),
            _ => engine.delete_policy(&policy_name),
        }
        let classifier = engine.commit(2 + round);
        times.push(ms(start.elapsed()));
        drop(classifier);
    }
    percentiles("one pod or policy changed, to a new classifier", "ms", times);
}

fn udp(flow: u32) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 60, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(Ipv4Addr::from(0x0a00_0001 + flow / 40_000).octets());
    packet.extend(Ipv4Addr::from(0x0a00_8001).octets());
    packet.extend((1024 + (flow % 40_000) as u16).to_be_bytes());
    packet.extend([0, 53, 0, 40, 0, 0]);
    packet.resize(60, 0);
    packet
}

fn flows(count: u32) {
    let classifier = Engine::new().commit(1);
    let now = Instant::now();
    let mut table = FlowTable::new(
        Limits { flows: count as usize, per_source: u32::MAX, ..Limits::default() },
        0x5eed_5eed_5eed_5eed,
        now,
    );
    let packets: Vec<(Packet, Vec<u8>)> = (0..count)
        .map(|flow| {
            let bytes = udp(flow);
            (Packet::parse(&bytes).unwrap(), bytes)
        })
        .collect();
    let mut dice = Dice(3);
    let mut order: Vec<usize> = (0..count as usize).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, dice.roll(i + 1));
    }
    for (packet, bytes) in &packets {
        assert!(table.inbound(&*classifier, packet, bytes, 0, now).passes());
    }
    // Only what a judge touches is to be missed in the caches: packets come in hot from their decryption.
    let order: Vec<(Packet, [u8; 28])> =
        order.iter().take(200_000).map(|i| (packets[*i].0, packets[*i].1[..28].try_into().unwrap())).collect();
    let rounds = (400_000 / order.len()).max(1);
    several(&format!("later packet, {count} live flows in random order, in batches of 64"), || {
        let start = Instant::now();
        for _ in 0..rounds {
            for batch in order.chunks(64) {
                table.fetch(batch.iter().map(|(packet, _)| packet));
                for (packet, bytes) in batch {
                    black_box(table.inbound(&*classifier, packet, bytes, 0, now));
                }
            }
        }
        start.elapsed().as_nanos() as f64 / (rounds * order.len()) as f64
    });
    let (packet, bytes) = &packets[0];
    several("later packet, of the same flow as the one before", || {
        let start = Instant::now();
        for _ in 0..1_000_000 {
            black_box(table.inbound(&*classifier, black_box(packet), bytes, 0, now));
        }
        start.elapsed().as_nanos() as f64 / 1e6
    });
}

/// The table behind one lock that both directions take once per batch: what a packet costs with the other direction at
/// rest, and at work. A direction works twenty times as long on a batch as it holds the lock.
fn shared() {
    let classifier = Engine::new().commit(1);
    let now = Instant::now();
    let table = Mutex::new(FlowTable::new(Limits::default(), 0x5eed_5eed_5eed_5eed, now));
    let packets = |first: u32| -> Vec<(Packet, Vec<u8>)> {
        let bytes = (first..first + 64).map(udp);
        bytes.map(|bytes| (Packet::parse(&bytes).unwrap(), bytes)).collect()
    };
    // Returns how long it took to get the lock and to hold it.
    let batch = |packets: &[(Packet, Vec<u8>)]| {
        let start = Instant::now();
        let mut table = table.lock().unwrap();
        table.fetch(packets.iter().map(|(packet, _)| packet));
        for (packet, bytes) in packets {
            black_box(table.inbound(&*classifier, packet, bytes, 0, now));
        }
        start.elapsed()
    };
    let work = |took: Duration| {
        let start = Instant::now();
        while start.elapsed() < took * 20 {
            std::hint::spin_loop();
        }
    };
    let (own, others) = (packets(0), packets(1000));
    let alone = batch(&own).min(batch(&own)).min(batch(&own));
    let round = || {
        let took = (0..2000).map(|_| {
            let took = batch(&own);
            work(alone);
            took
        });
        took.sum::<Duration>().as_nanos() as f64 / (2000.0 * own.len() as f64)
    };
    several("later packet in batches of 64 under the shared lock, the other direction at rest", round);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                batch(&others);
                work(alone);
            }
        });
        several("the same, the other direction at work", round);
        stop.store(true, Ordering::Relaxed);
    });
}

/// Prints the mean time in nanoseconds that `round` says, of many rounds: what else the machine does shows in the
/// median, and in the least it does not.
fn several(what: &str, mut round: impl FnMut() -> f64) {
    let mut means: Vec<f64> = (0..15).map(|_| round()).collect();
    means.sort_by(f64::total_cmp);
    println!("{what}: median of 15 rounds {:.1} ns, least {:.1} ns", means[7], means[0]);
}

fn main() {
    // `cargo test --benches` runs it too; then one small round is enough.
    if std::env::args().any(|argument| argument == "--test") {
        return flows(100);
    }
    // Each part in a process of its own: what one leaves behind would be the other's memory.
    match std::env::var("POLICY_BENCH_PART").as_deref() {
        Ok("flows") => {
            flows(1000);
            flows(1_000_000);
        }
        Ok("shared") => shared(),
        Ok("mixed") => {
            let world = mixed();
            let (mut engine, classifier) = compile("mixed", &world);
            verdicts(&world, &classifier);
            drop(classifier);
            changes(&world, &mut engine);
        }
        Ok("small namespaces") => drop(compile("small namespaces", &small_namespaces())),
        Ok("one namespace") => drop(compile("one namespace", &one_namespace())),
        _ => {
            for part in ["flows", "shared", "mixed", "small namespaces", "one namespace"] {
                let own = std::env::current_exe().unwrap();
                assert!(Command::new(own).env("POLICY_BENCH_PART", part).status().unwrap().success());
            }
        }
    }
}
