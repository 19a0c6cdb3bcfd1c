//! A hundred changes a second, and not one packet judged by what was never so.
//!
//! Every packet's verdict has to be one that a naive reading of the specification gives at a revision between the last
//! one that the judging node had reported in force before the packet was sent, and the newest when it arrived. A packet
//! that does not arrive has one sent behind it that is always let through: it was judged before that one came.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use integration::{EtcdWriter, MeshdNode, Pod, await_until, enlarge_receive_buffer};
use policy::engine::{Flow, Side};
use serde_json::{Map, Value, json};

use crate::{
    SOON, await_in_force, mesh,
    worlds::{
        generate::Dice,
        model::{self, World},
    },
};

const CHANGES: u32 = 400;
const EACH: Duration = Duration::from_millis(10);
/// Between two packets of one client.
const PACE: Duration = Duration::from_millis(4);
const PORTS: [u16; 3] = [53, 80, 8080];
/// Where every policy lets everyone.
const WITNESS: u16 = 9;
const APPS: [&str; 3] = ["a", "b", "c"];

/// What the world was at each revision; those that are on their way to etcd have none yet.
#[derive(Default)]
struct History(Mutex<Vec<(u64, World)>>);

impl History {
    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// Writes what `world` is now, by `write`, which returns the revision.
    fn write(&self, world: &World, write: impl FnOnce() -> u64) {
        self.0.lock().unwrap().push((u64::MAX, world.clone()));
        let revision = write();
        self.0.lock().unwrap().last_mut().unwrap().0 = revision;
    }

    /// Which of these verdicts the side gives between what was in force and the `newest` that there was.
    fn verdicts(&self, side: Side, flow: &Flow, in_force: u64, newest: usize) -> [bool; 2] {
        let history = self.0.lock().unwrap();
        // A removal of what is not there has the revision of the change before it, and may have come after the packet.
        let history = &history[..newest];
        let first = history.iter().rposition(|(revision, _)| *revision <= in_force).unwrap_or(0);
        let mut found = [false; 2];
        for (_, world) in &history[first..] {
            found[usize::from(world.allowed(side, flow))] = true;
        }
        found
    }
}

/// A packet, and what was in force at its source's and its destination's node before it was sent.
struct Sent {
    flow: Flow,
    in_force: [u64; 2],
}

fn pod(name: &str, age: u64, app: &str, addresses: &[IpAddr]) -> model::Pod {
    let labels = Map::from_iter([("app".to_owned(), Value::from(app))]);
    let (namespace, ips) = ("shop".to_owned(), addresses.to_vec());
    let (cluster, name, labels) = (String::new(), name.into(), Some(labels));
    model::Pod { cluster, namespace, name, labels, ips, ports: Vec::new(), finished: false, age }
}

fn pod_object(pod: &model::Pod) -> (String, String) {
    let ips: Vec<Value> = pod.ips.iter().map(|ip| json!({"ip": ip})).collect();
    let object = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": pod.namespace, "name": pod.name, "labels": pod.labels},
        "status": {"phase": "Running", "podIPs": ips}});
    (format!("/meshd/pods/{}/{}", pod.namespace, pod.name), object.to_string())
}

fn namespace_object(labels: &Map<String, Value>) -> (String, String) {
    let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": labels}});
    ("/meshd/namespaces/shop".to_owned(), object.to_string())
}

fn policy_key(name: &str) -> String {
    format!("/meshd/networkpolicies/shop/{name}")
}

fn policy_object(name: &str, spec: &Value) -> (String, String) {
    let object = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "shop", "name": name}, "spec": spec});
    (policy_key(name), object.to_string())
}

fn spec(dice: &mut Dice) -> Value {
    let app = |dice: &mut Dice| json!({"matchLabels": {"app": dice.pick(&APPS)}});
    let peer = match dice.roll(3) {
        0 => json!({"podSelector": app(dice)}),
        1 => json!({"namespaceSelector": {"matchLabels": {"team": dice.pick(&APPS)}}}),
        _ => json!({"namespaceSelector": {}, "podSelector": app(dice)}),
    };
    let ports = json!([{"protocol": "UDP", "port": dice.pick(&PORTS)}]);
    let witness = json!({"ports": [{"protocol": "UDP", "port": WITNESS}]});
    let subject = if dice.chance(50) { json!({}) } else { app(dice) };
    if dice.chance(50) {
        json!({"podSelector": subject, "policyTypes": ["Ingress"], "ingress": [witness, {"from": [peer], "ports": ports}]})
    } else {
        json!({"podSelector": subject, "policyTypes": ["Egress"], "egress": [witness, {"to": [peer], "ports": ports}]})
    }
}

/// One change of one object.
fn change(dice: &mut Dice, world: &mut World, history: &History, writer: &mut EtcdWriter) {
    match dice.roll(10) {
        0..=3 => {
            let (name, spec) = (format!("p{}", dice.roll(5)), spec(dice));
            let object = policy_object(&name, &spec);
            world.policies.insert((String::new(), "shop".into(), name), spec);
            history.write(world, || writer.put_all(&[object]));
        }
        4 | 5 => {
            let name = format!("p{}", dice.roll(5));
            world.policies.remove(&(String::new(), "shop".to_owned(), name.clone()));
            history.write(world, || writer.delete_all(&[policy_key(&name)]));
        }
        6 | 7 => {
            let at = dice.roll(world.pods.len());
            let pod = &mut world.pods[at];
            pod.labels = Some(Map::from_iter([("app".to_owned(), Value::from(dice.pick(&APPS)))]));
            let object = pod_object(pod);
            history.write(world, || writer.put_all(&[object]));
        }
        _ => {
            let labels = Map::from_iter([("team".to_owned(), Value::from(dice.pick(&APPS)))]);
            let object = namespace_object(&labels);
            world.namespaces.insert((String::new(), "shop".into()), labels);
            history.write(world, || writer.put_all(&[object]));
        }
    }
}

/// Sends first packets of flows until it is over, each followed by one that passes.
fn send(from: &Pod, to: IpAddr, first: u32, in_force: [&AtomicU64; 2], over: &AtomicBool) -> HashMap<u32, Sent> {
    let mut dice = Dice::of_one_cluster(u64::from(first));
    let mut sent = HashMap::new();
    from.enter(|| {
        for number in first.. {
            if over.load(Ordering::Relaxed) {
                break;
            }
            // Every flow is a new one.
            let own = 20_000 + u16::try_from((number - first) % 40_000).unwrap();
            let socket = UdpSocket::bind((from.v4(), own)).unwrap();
            let port = dice.pick(&PORTS);
            let flow = Flow { source: from.v4(), destination: to, protocol: 17, port: Some(port) };
            let in_force = in_force.map(|revision| revision.load(Ordering::SeqCst));
            // The kernel says so where it drops what this node sends.
            let _ = socket.send_to(&number.to_be_bytes(), (to, port));
            let _ = socket.send_to(&number.to_be_bytes(), (to, WITNESS));
            sent.insert(number, Sent { flow, in_force });
            thread::sleep(PACE);
        }
    });
    sent
}

/// None of what comes is lost: a packet that was let pass and its witness would be told apart.
fn listen(at: &Pod, ports: &[u16]) -> Vec<UdpSocket> {
    let bind = |port: &u16| UdpSocket::bind(SocketAddr::new(at.v4(), *port)).unwrap();
    let sockets: Vec<UdpSocket> = at.enter(|| ports.iter().map(bind).collect());
    sockets.iter().for_each(enlarge_receive_buffer);
    sockets
}

/// Notes how long the history was when each packet came to one of these sockets.
fn receive(sockets: &[UdpSocket], history: &History, over: &AtomicBool) -> HashMap<u32, usize> {
    let mut come = HashMap::new();
    thread::scope(|scope| {
        let threads: Vec<_> = sockets
            .iter()
            .map(|socket| {
                scope.spawn(move || {
                    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                    let (mut come, mut buffer) = (Vec::new(), [0; 4]);
                    // What has come is read to its end, also by a thread that had to wait for a processor.
                    loop {
                        let ends = over.load(Ordering::Relaxed);
                        if socket.recv(&mut buffer).is_ok() {
                            come.push((u32::from_be_bytes(buffer), history.len()));
                        } else if ends {
                            break;
                        }
                    }
                    come
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| come.extend(thread.join().unwrap()));
    });
    come
}

/// Keeps the revision that a node says is in force.
fn look(node: &MeshdNode, in_force: &AtomicU64, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        if let Some(revision) = node.policy_revision() {
            in_force.store(revision, Ordering::SeqCst);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_hundred_changes_a_second_give_no_wrong_verdict() {
    let mesh = mesh("policy-churn", 1);
    let (west, db) = (mesh.node("west1"), mesh.pod("west1"));
    let (neighbour, far) = (west.pod("neighbour"), mesh.pod("east1"));
    let mut writer = EtcdWriter::connect(&mesh.etcd, west.host());
    let (history, mut world) = (History::default(), World::default());
    let pods = [("db", db), ("neighbour", &neighbour), ("far", far)];
    world.pods = (1..).zip(pods).map(|(age, (name, at))| pod(name, age, "a", at.addresses())).collect();
    world.namespaces.insert((String::new(), "shop".into()), Map::new());
    let mut first: Vec<_> = world.pods.iter().map(pod_object).collect();
    first.push(namespace_object(&Map::new()));
    history.write(&world, || writer.put_all(&first));
    await_in_force(&mesh);

    let [east_in_force, west_in_force] = [(); 2].map(|()| AtomicU64::new(0));
    let [no_more, over] = [(); 2].map(|()| AtomicBool::new(false));
    let (judged, unjudged) = (listen(db, &PORTS), listen(db, &[WITNESS]));
    let (sent, come, witnesses) = thread::scope(|scope| {
        scope.spawn(|| look(mesh.node("east1"), &east_in_force, &over));
        scope.spawn(|| look(west, &west_in_force, &over));
        let come = scope.spawn(|| receive(&judged, &history, &over));
        let witnesses = scope.spawn(|| receive(&unjudged, &history, &over));
        let near = scope.spawn(|| send(&neighbour, db.v4(), 0, [&west_in_force; 2], &no_more));
        let far = scope.spawn(|| send(far, db.v4(), 1 << 31, [&east_in_force, &west_in_force], &no_more));
        let mut dice = Dice::of_one_cluster(1);
        let begin = Instant::now();
        for number in 0..CHANGES {
            thread::sleep((begin + EACH * number).saturating_duration_since(Instant::now()));
            change(&mut dice, &mut world, &history, &mut writer);
        }
        no_more.store(true, Ordering::Relaxed);
        let mut sent = near.join().unwrap();
        sent.extend(far.join().unwrap());
        // What is still on its way.
        thread::sleep(Duration::from_secs(1));
        over.store(true, Ordering::Relaxed);
        (sent, come.join().unwrap(), witnesses.join().unwrap())
    });
    let mut counts = [0; 2];
    for (number, Sent { flow, in_force }) in &sent {
        let newest = match (come.get(number), witnesses.get(number)) {
            (Some(newest), _) | (None, Some(newest)) => *newest,
            // Both were lost in front of a way that was not there yet, or are still on it.
            (None, None) => continue,
        };
        let [egress, ingress] = [(Side::Egress, in_force[0]), (Side::Ingress, in_force[1])]
            .map(|(side, in_force)| history.verdicts(side, flow, in_force, newest));
        let passed = come.contains_key(number);
        counts[usize::from(passed)] += 1;
        let right = if passed { egress[1] && ingress[1] } else { egress[0] || ingress[0] };
        assert!(
            right,
            "{flow:?} passed: {passed}, wrongly; in force {in_force:?}, newest {newest} of {}",
            history.len()
        );
    }
    let [refused, passed] = counts;
    assert!(refused > 100 && passed > 100, "{refused} refused and {passed} passed of {}", sent.len());
    assert!(witnesses.len() * 10 > sent.len() * 9, "{} of {} came that nothing refuses", witnesses.len(), sent.len());
    await_until("the last change to be in force", SOON, || {
        let last = history.0.lock().unwrap().last().unwrap().0;
        (west.policy_revision()? >= last).then_some(())
    });
}
