//! Two probers on the loopback interface, each with an address of 127.0.0.0/8 as its overlay address.

use std::{
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use etcd_schema::PublicKey;
use ipnet::IpNet;
use mesh::path::{DirectState, Target};

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
        Self::after(n, tunnel, PathAgents::default())
    }

    fn after(n: u8, tunnel: bool, agents: PathAgents) -> Self {
        let free = UdpSocket::bind("0.0.0.0:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let world = Arc::new(Node { tunnel, ..Node::default() });
        let mut end = Self { n, port, world, prober: None };
        end.start(agents);
        end
    }

    fn start(&mut self, agents: PathAgents) {
        let options = Options { port: self.port, mark: 7, own_id: id(self.n), private_key: key(self.n) };
        self.prober = Some(Prober::start(options, agents, Arc::clone(&self.world)).unwrap());
    }

    fn prober(&self) -> &Prober {
        self.prober.as_ref().unwrap()
    }

    /// Probes `other`, whose key, interface and next hop are these. Returns the state of the path to it.
    fn set(&self, other: &Self, key: PublicKey, interface: u32, next_hop: u8) -> Option<DirectState> {
        let target = Target {
            overlay: address(other.n),
            next_hop: address(next_hop),
            port: other.port,
            keys: vec![key],
            interface: (interface, "lo".to_owned()),
        };
        let (now, id) = (Instant::now(), (id(other.n), Family::V4));
        self.prober().with_agents(|agents| {
            agents.aim(now, address(self.n), &id, target, prefix(other.n));
            agents.routes_applied(now);
            agents.state(&id)
        })
    }

    fn aim(&self, other: &Self) -> Option<DirectState> {
        self.set(other, key(other.n).public(), LOOPBACK, other.n)
    }

    /// The state of the path to `other`.
    fn state(&self, other: &Self) -> Option<DirectState> {
        self.prober().with_agents(|agents| agents.state(&(id(other.n), Family::V4)))
    }

    /// Waits for a state of the path to `other`.
    async fn until(&self, other: &Self, wanted: DirectState) {
        let reached = async {
            loop {
                self.prober().with_agents(PathAgents::planned);
                if self.state(other) == Some(wanted) {
                    return;
                }
                self.prober().path_changed().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), reached).await.expect("the state comes");
    }
}

/// What is reached by the node `n`.
fn prefix(n: u8) -> IpNet {
    IpNet::new(IpAddr::from([10, 244, n, 0]), 24).unwrap()
}

const UNPROVEN: DirectState = DirectState::Tunnel(mesh::path::NotDirect::Unproven);
const FAILED: DirectState = DirectState::Tunnel(mesh::path::NotDirect::Failed);

#[tokio::test]
async fn two_ends_prove_their_path_and_leave_it_when_only_the_tunnel_answers() {
    let (a, mut b) = (End::new(1, true), End::new(2, true));
    assert_eq!(a.aim(&b), Some(UNPROVEN));
    b.aim(&a);
    a.until(&b, DirectState::Direct).await;
    b.until(&a, DirectState::Direct).await;
    b.prober = None;
    a.until(&b, FAILED).await;
    assert!(a.world.calls.load(Ordering::Relaxed) > 0);
}

#[tokio::test]
async fn a_path_whose_other_end_is_silent_is_kept_by_its_neighbour() {
    let (a, mut b) = (End::new(3, false), End::new(4, false));
    a.aim(&b);
    b.aim(&a);
    a.until(&b, DirectState::Direct).await;
    b.prober = None;
    let calls = || a.world.calls.load(Ordering::Relaxed);
    while calls() < 5 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(a.state(&b), Some(DirectState::Direct));
    b.start(PathAgents::default());
    b.aim(&a);
    b.until(&a, DirectState::Direct).await;
    let called = calls();
    // Another key is another node: what it echoes is not believed, and the path that stood for the old one falls.
    assert_eq!(a.set(&b, key(9).public(), LOOPBACK, 9), Some(UNPROVEN), "another next hop must prove itself");
    while calls() == called {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(a.state(&b), Some(UNPROVEN));
}

#[tokio::test]
async fn an_echo_that_arrives_on_another_interface_proves_nothing() {
    let (a, b) = (End::new(5, true), End::new(6, true));
    a.set(&b, key(6).public(), LOOPBACK + 1, 6);
    b.aim(&a);
    while a.world.calls.load(Ordering::Relaxed) == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!((a.state(&b), b.state(&a)), (Some(UNPROVEN), Some(UNPROVEN)));
}

#[tokio::test]
async fn what_was_direct_before_a_restart_is_direct_at_once() {
    let mut agents = PathAgents::after(vec![(prefix(8), address(8))]);
    agents.set_neighbours([((LOOPBACK, address(8)), MAC)].into());
    let (a, b) = (End::after(7, true, agents), End::new(8, true));
    assert_eq!(a.aim(&b), Some(DirectState::Direct));
    assert_eq!(a.aim(&b), Some(DirectState::Direct), "it keeps its state");
    assert_eq!(a.aim(&End::new(9, true)), Some(UNPROVEN));
}

#[test]
fn echoes_are_counted_by_the_second() {
    let start = Instant::now();
    let mut budget = EchoBudget::default();
    let taken = (0..1000).filter(|ms| budget.take(start + Duration::from_millis(*ms))).count();
    assert_eq!(taken, ECHOES_PER_SECOND as usize);
    assert!(budget.take(start + Duration::from_secs(1)));
}
