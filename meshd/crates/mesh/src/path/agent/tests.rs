use proptest::prelude::*;

use super::*;

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 7]);

fn id(n: u8) -> PathId {
    (format!("n{n}").parse().unwrap(), Family::V4)
}

fn peer(n: u8) -> PeerId {
    PeerId::Node(id(n).0)
}

fn at(n: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, n])
}

fn prefix(n: u8) -> IpNet {
    IpNet::new(IpAddr::from([10, 244, n, 0]), 24).unwrap()
}

/// A peer that shares the network of this interface with this node.
fn candidates(n: u8, interface: u32) -> Candidates {
    let target = Target {
        overlay: at(n),
        next_hop: at(n),
        port: 51821,
        keys: Vec::new(),
        interface: (interface, "eth0".to_owned()),
    };
    let link = DirectLink { own: "10.0.0.99/24".parse().unwrap(), next_hop: at(n) };
    let candidate = LinkCandidate { link, prefixes: vec![prefix(n)], target: Some(target) };
    Candidates {
        unusable: None,
        unproven: false,
        carrier: Carrier::Tunnel { callable: true },
        links: [(Family::V4, candidate)].into(),
    }
}

#[test]
fn a_path_keeps_its_state_while_its_link_stays() {
    let now = Instant::now();
    let mut agents = PathAgents::default();
    agents.set_candidates(now, &peer(1), candidates(1, 7));
    assert!(agents.due(now).is_empty() && agents.next_timer().is_none(), "the kernel has no route for its probes yet");
    let now = now + Duration::from_secs(5);
    agents.routes_applied(now);
    assert_eq!(agents.due(now), [(id(1), now)], "a new path is probed at once");
    let nonce = agents.poll(now, &id(1), 5).probe.unwrap();
    agents.take_changed();
    assert!(agents.on_echo(now, &id(1), nonce, Some(MAC)));
    assert_eq!(agents.state(&id(1)), Some(DirectState::Direct));
    assert_eq!(agents.take_changed(), [peer(1)].into());
    let revision = agents.revision();
    agents.set_candidates(
        now,
        &peer(1),
        Candidates { carrier: Carrier::Tunnel { callable: false }, ..candidates(1, 7) },
    );
    assert_eq!((agents.state(&id(1)), agents.revision()), (Some(DirectState::Direct), revision));
    agents.set_candidates(now, &peer(2), candidates(2, 7));
    assert!(agents.due(now).iter().all(|(due, _)| *due != id(2)), "its route is not there yet");
    assert_ne!(agents.revision(), revision);
    agents.set_candidates(now, &peer(1), candidates(1, 8));
    assert_ne!(agents.state(&id(1)), Some(DirectState::Direct), "another interface must prove itself");
    agents.on_removed(&peer(2));
    assert_eq!((agents.state(&id(2)), agents.path(&peer(2), Family::V4)), (None, None));
    assert_eq!(agents.targets().peers.len(), 1);
}

#[test]
fn a_path_resumes_only_with_a_neighbour_and_only_if_it_was_direct() {
    let now = Instant::now();
    let direct = |earlier: Option<IpNet>, neighbour: Option<MacAddress>| {
        let mut agents = PathAgents::after(earlier.map(|prefix| (prefix, at(1))).into_iter().collect());
        agents.set_neighbours(neighbour.map(|mac| ((7, at(1)), mac)).into_iter().collect());
        agents.set_candidates(now, &peer(1), candidates(1, 7));
        agents.state(&id(1)) == Some(DirectState::Direct)
    };
    assert!(direct(Some(prefix(1)), Some(MAC)));
    assert!(!direct(Some(prefix(1)), None) && !direct(None, Some(MAC)));
    assert!(!direct(Some(prefix(2)), Some(MAC)), "other prefixes went there");
    let mut agents = PathAgents::after(vec![(prefix(1), at(1))]);
    agents.set_neighbours([((7, at(1)), MAC)].into());
    agents.forget_earlier();
    agents.set_candidates(now, &peer(1), candidates(1, 7));
    assert_ne!(agents.state(&id(1)), Some(DirectState::Direct), "what was in use long ago proves nothing");
}

#[test]
fn a_peer_has_one_path_a_family_and_is_reached_by_the_tunnel_where_it_shares_no_link() {
    let now = Instant::now();
    let mut agents = PathAgents::default();
    agents.set_candidates(now, &peer(1), candidates(1, 7));
    let now = agents.drive(now, &id(1), DirectState::Direct);
    let path = |agents: &PathAgents, family| agents.path(&peer(1), family).unwrap();
    assert!(matches!(path(&agents, Family::V4).via, crate::path::Via::Link(..)));
    assert!(matches!(path(&agents, Family::V6).via, crate::path::Via::Tun(_)));
    agents.drive(now, &id(1), DirectState::Silent);
    assert_eq!(path(&agents, Family::V4).reason, crate::path::Reason::NoAnswer);
    agents.on_mtu(|at| (*at == peer(1)).then_some(1300));
    assert_eq!((agents.inner_mtu(&peer(1)), agents.inner_mtu(&peer(2))), (Some(1300), None));
    agents.take_changed();
    agents.on_mtu(|_| Some(1300));
    assert!(!agents.has_changed());
}

#[test]
fn what_came_through_the_tunnel_before_the_loss_is_no_sign_of_life_after_it() {
    let now = Instant::now();
    let mut agents = PathAgents::default();
    agents.set_candidates(now, &peer(1), candidates(1, 7));
    let now = agents.drive(now, &id(1), DirectState::Direct);
    agents.on_authenticated(&id(1), now);
    agents.on_authenticated(&id(1), now - Duration::from_secs(60));
    agents.drive(now + Duration::from_secs(1), &id(1), DirectState::Silent);
}

/// What may happen to the agents.
#[derive(Debug, Clone)]
enum Input {
    /// These peers, on interface 7 or 8; the kernel takes their routes or not.
    Candidates(Vec<(u8, bool)>, bool),
    Removed,
    /// Time passes; calls in the tunnel are answered or not, the neighbour is known or not.
    Pass {
        milliseconds: u16,
        tunnel: bool,
        neighbour: bool,
    },
    /// The echo of one of the newest probes, or of none that was sent.
    Echo {
        back: u8,
        forged: bool,
    },
}

fn input() -> impl Strategy<Value = Input> {
    prop_oneof![
        1 => (proptest::collection::vec((1u8..4, any::<bool>()), 0..4), any::<bool>())
            .prop_map(|(peers, routed)| Input::Candidates(peers, routed)),
        1 => Just(Input::Removed),
        8 => (1u16..20_000, any::<bool>(), any::<bool>())
            .prop_map(|(milliseconds, tunnel, neighbour)| Input::Pass { milliseconds, tunnel, neighbour }),
        6 => (0u8..4, any::<bool>()).prop_map(|(back, forged)| Input::Echo { back, forged }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever happens, in whatever order: nothing but the echo of a probe that was sent over a path makes it direct, at
    /// most one probe of a path is under way, timers lie ahead, and what has no target has no path.
    #[test]
    fn only_an_echo_makes_a_path_direct(inputs in proptest::collection::vec(input(), 1..60)) {
        let mut now = Instant::now();
        let mut agents = PathAgents::default();
        let mut nonce = 0;
        let mut sent: Vec<(PathId, u128)> = Vec::new();
        let mut direct: BTreeSet<PathId> = BTreeSet::new();
        for input in inputs {
            let mut proven = None;
            match input {
                Input::Candidates(peers, routed) => {
                    agents.set_neighbours([((7, at(1)), MAC), ((8, at(1)), MAC)].into());
                    let stays: BTreeSet<PeerId> = peers.iter().map(|(n, _)| peer(*n)).collect();
                    agents.retain(|peer| stays.contains(peer));
                    for (n, other) in peers {
                        agents.set_candidates(now, &peer(n), candidates(n, if other { 8 } else { 7 }));
                    }
                    if routed {
                        agents.routes_applied(now);
                    }
                }
                Input::Removed => agents.retain(|_| false),
                Input::Pass { milliseconds, tunnel, neighbour } => {
                    now += Duration::from_millis(milliseconds.into());
                    for (id, at) in agents.due(now) {
                        nonce += 1;
                        agents.on_neighbour(&id, neighbour.then_some(MAC));
                        if tunnel {
                            agents.on_authenticated(&id, now);
                        }
                        let due = agents.poll(at, &id, nonce);
                        sent.extend(due.probe.map(|nonce| (id, nonce)));
                    }
                    agents.polled(now);
                    prop_assert!(agents.next_timer().is_none_or(|next| next > now), "no timer lies behind");
                }
                Input::Echo { back, forged } => {
                    let Some((id, nonce)) = sent.iter().rev().nth(back.into()).cloned() else { continue };
                    let nonce = if forged { nonce + 1_000_000 } else { nonce };
                    let awaited = agents.awaits(&id, nonce);
                    prop_assert_eq!(agents.on_echo(now, &id, nonce, Some(MAC)), awaited);
                    prop_assert!(!(awaited && forged), "an echo that was not asked for proves nothing");
                    proven = awaited.then_some(id);
                }
            }
            let targets = agents.targets();
            prop_assert!(targets.peers.keys().all(|id| agents.state(id).is_some()));
            let is: BTreeSet<PathId> = agents.next_hops().into_keys().collect();
            prop_assert!(is.iter().all(|id| targets.peers.contains_key(id)));
            for id in is.difference(&direct) {
                prop_assert_eq!(Some(id), proven.as_ref(), "direct without an echo");
            }
            direct = is;
        }
    }
}
