//! Two probers on the loopback interface, each with an address of 127.0.0.0/8 as its overlay address.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use etcd_schema::PublicKey;
use mesh::path::DirectState;

use super::*;

const LOOPBACK: u32 = 1;
/// The loopback interface has a MAC of zeros in every neighbour table that knows it.
const MAC: MacAddress = MacAddress([0; 6]);

/// A node around a prober: its tunnel answers or not, and it counts what it is asked.
#[derive(Debug, Default)]
struct Node {
    tunnel: bool,
    heard: Mutex<Option<Instant>>,
    calls: AtomicU32,
}

impl ProbeEnv for Node {
    async fn neighbours(&self, _: u32, _: Family) -> Neighbours {
        (1..=9).map(|last| (IpAddr::from([127, 0, 0, last]), MAC)).collect()
    }

    fn heard_in_tunnel(&self, _: &NodeId) -> Option<Instant> {
        *self.heard.lock().unwrap()
    }

    fn call_in_tunnel(&self, _: &NodeId) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.tunnel {
            *self.heard.lock().unwrap() = Some(Instant::now());
        }
    }
}

/// One end: node `n` has the id `nn`, the address 127.0.0.n and a port of its own.
struct End {
    n: u8,
    port: u16,
    world: Arc<Node>,
    prober: Option<Prober>,
}

fn id(n: u8) -> NodeId {
    format!("n{n}").parse().unwrap()
}

fn key(n: u8) -> PrivateKey {
    PrivateKey::from_bytes([n; 32])
}

fn address(n: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 0, n).into()
}

impl End {
    fn new(n: u8, tunnel: bool) -> Self {
        let free = UdpSocket::bind("0.0.0.0:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let world = Arc::new(Node { tunnel, ..Node::default() });
        let mut end = Self { n, port, world, prober: None };
        end.start();
        end
    }

    fn start(&mut self) {
        let options = Options { port: self.port, mark: 7, own_id: id(self.n), private_key: key(self.n) };
        self.prober = Some(Prober::start(options, Arc::clone(&self.world)).unwrap());
    }

    fn prober(&self) -> &Prober {
        self.prober.as_ref().unwrap()
    }

    /// What probes `other`, whose key and interface are these.
    fn targets(&self, other: &Self, key: PublicKey, interface: u32, was_direct: bool) -> Targets {
        let target = Target {
            overlay: address(other.n),
            next_hop: address(other.n),
            port: other.port,
            keys: vec![key],
            interface: (interface, "lo".to_owned()),
            was_direct,
        };
        Targets {
            own: BTreeMap::from([(Family::V4, address(self.n))]),
            peers: BTreeMap::from([((id(other.n), Family::V4), target)]),
        }
    }

    fn aim(&self, other: &Self) -> PathStates {
        self.set(self.targets(other, key(other.n).public(), LOOPBACK, false))
    }

    fn set(&self, targets: Targets) -> PathStates {
        let neighbours = (1..=9).map(|last| (IpAddr::from([127, 0, 0, last]), MAC)).collect();
        let states = self.prober().set_targets(targets, &HashMap::from([(LOOPBACK, neighbours)]));
        self.prober().routes_applied();
        states
    }

    /// Waits for a state of the one path.
    async fn until(&self, wanted: DirectState) {
        let mut states = self.prober().states();
        let reached = states.wait_for(|states| states.values().eq([&wanted]));
        tokio::time::timeout(Duration::from_secs(60), reached).await.expect("the state comes").expect("it runs");
    }
}

const UNPROVEN: DirectState = DirectState::Tunnel(mesh::path::NotDirect::Unproven);
const FAILED: DirectState = DirectState::Tunnel(mesh::path::NotDirect::Failed);

#[tokio::test]
async fn two_ends_prove_their_path_and_leave_it_when_only_the_tunnel_answers() {
    let (a, mut b) = (End::new(1, true), End::new(2, true));
    let first = a.aim(&b);
    assert!(first.values().eq([&UNPROVEN]), "it answers with the states of the new targets");
    b.aim(&a);
    a.until(DirectState::Direct).await;
    b.until(DirectState::Direct).await;
    b.prober = None;
    a.until(FAILED).await;
    assert!(a.world.calls.load(Ordering::Relaxed) > 0);
}

#[tokio::test]
async fn a_path_whose_other_end_is_silent_is_kept_by_its_neighbour() {
    let (a, mut b) = (End::new(3, false), End::new(4, false));
    a.aim(&b);
    b.aim(&a);
    a.until(DirectState::Direct).await;
    b.prober = None;
    let calls = || a.world.calls.load(Ordering::Relaxed);
    while calls() < 5 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(a.prober().states().borrow().values().eq([&DirectState::Direct]));
    b.start();
    b.aim(&a);
    b.until(DirectState::Direct).await;
    let called = calls();
    // Another key is another node: what it echoes is not believed, and the path that stood for the old one falls.
    let mut targets = a.targets(&b, key(9).public(), LOOPBACK, false);
    targets.peers.values_mut().for_each(|target| target.next_hop = address(9));
    assert!(a.set(targets).values().eq([&UNPROVEN]), "another next hop must prove itself");
    while calls() == called {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(a.prober().states().borrow().values().eq([&UNPROVEN]));
}

#[tokio::test]
async fn an_echo_that_arrives_on_another_interface_proves_nothing() {
    let (a, b) = (End::new(5, true), End::new(6, true));
    a.set(a.targets(&b, key(6).public(), LOOPBACK + 1, false));
    b.aim(&a);
    while a.world.calls.load(Ordering::Relaxed) == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for end in [&a, &b] {
        assert!(end.prober().states().borrow().values().eq([&UNPROVEN]));
    }
}

#[tokio::test]
async fn what_was_direct_before_a_restart_is_direct_at_once() {
    let (a, b) = (End::new(7, true), End::new(8, true));
    let targets = a.targets(&b, key(8).public(), LOOPBACK, true);
    assert!(a.set(targets.clone()).values().eq([&DirectState::Direct]));
    // The same targets again, and those of the next plan, which knows of no restart: the path stays.
    assert!(a.set(targets).values().eq([&DirectState::Direct]));
    assert!(a.aim(&b).values().eq([&DirectState::Direct]));
}

#[test]
fn echoes_are_counted_by_the_second() {
    let start = Instant::now();
    let mut budget = EchoBudget::default();
    let taken = (0..1000).filter(|ms| budget.take(start + Duration::from_millis(*ms))).count();
    assert_eq!(taken, ECHOES_PER_SECOND as usize);
    assert!(budget.take(start + Duration::from_secs(1)));
}
