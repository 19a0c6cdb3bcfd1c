use std::{collections::BTreeSet, net::IpAddr};

use etcd_schema::NodeId;
use proptest::prelude::*;

use super::*;
use crate::address::Family;

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 7]);

fn id(n: u8) -> PathId {
    (format!("n{n}").parse::<NodeId>().unwrap(), Family::V4)
}

fn target(n: u8, interface: u32, was_direct: bool) -> Target {
    let at = IpAddr::from([10, 0, 0, n]);
    Target {
        overlay: at,
        next_hop: at,
        port: 51821,
        keys: Vec::new(),
        interface: (interface, "eth0".to_owned()),
        was_direct,
    }
}

fn targets(all: impl IntoIterator<Item = (PathId, Target)>) -> Targets {
    Targets { peers: all.into_iter().collect(), ..Targets::default() }
}

#[test]
fn a_path_keeps_its_state_while_its_link_stays() {
    let now = Instant::now();
    let mut agents = PathAgents::default();
    agents.set_targets(now, targets([(id(1), target(1, 7, false))]), |_| None);
    assert!(agents.due(now).is_empty() && agents.next_timer().is_none(), "the kernel has no route for its probes yet");
    let now = now + Duration::from_secs(5);
    assert!(agents.routes_applied(now) && !PathAgents::default().routes_applied(now));
    assert_eq!(agents.due(now), [(id(1), now)], "a new path is probed at once");
    let nonce = agents.poll(now, &id(1), Surroundings { heard_in_tunnel: None, neighbour: None }, 5).probe.unwrap();
    assert!(agents.on_echo(now, &id(1), nonce, Some(MAC)));
    assert_eq!(agents.state(&id(1)), Some(DirectState::Direct));
    agents.set_targets(now, targets([(id(1), target(1, 7, false)), (id(2), target(2, 7, false))]), |_| None);
    assert_eq!(agents.state(&id(1)), Some(DirectState::Direct));
    assert!(agents.due(now).iter().all(|(due, _)| *due != id(2)), "its route is not there yet");
    agents.set_targets(now, targets([(id(1), target(1, 8, false))]), |_| None);
    assert_ne!(agents.state(&id(1)), Some(DirectState::Direct), "another interface must prove itself");
    assert_eq!(agents.state(&id(2)), None);
}

#[test]
fn a_path_resumes_only_with_a_neighbour_and_only_if_it_was_direct() {
    let now = Instant::now();
    let direct = |was_direct, neighbour: Option<MacAddress>| {
        let mut agents = PathAgents::default();
        agents.set_targets(now, targets([(id(1), target(1, 7, was_direct))]), |_| neighbour);
        agents.state(&id(1)) == Some(DirectState::Direct)
    };
    assert!(direct(true, Some(MAC)));
    assert!(!direct(true, None) && !direct(false, Some(MAC)));
}

/// What may happen to the agents.
#[derive(Debug, Clone)]
enum Input {
    /// These peers, on interface 7 or 8; the kernel takes their routes or not.
    Targets(Vec<(u8, bool)>, bool),
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
            .prop_map(|(peers, routed)| Input::Targets(peers, routed)),
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
                Input::Targets(peers, routed) => {
                    let peers = peers.into_iter().map(|(n, other)| (id(n), target(n, if other { 8 } else { 7 }, false)));
                    agents.set_targets(now, targets(peers), |_| Some(MAC));
                    if routed {
                        agents.routes_applied(now);
                    }
                }
                Input::Removed => agents.set_targets(now, Targets::default(), |_| None),
                Input::Pass { milliseconds, tunnel, neighbour } => {
                    now += Duration::from_millis(milliseconds.into());
                    let around = Surroundings {
                        heard_in_tunnel: tunnel.then_some(now),
                        neighbour: neighbour.then_some(MAC),
                    };
                    for (id, at) in agents.due(now) {
                        nonce += 1;
                        let due = agents.poll(at, &id, around, nonce);
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
            let states = agents.states();
            prop_assert!(states.keys().eq(agents.targets().peers.keys()));
            let is: BTreeSet<PathId> =
                states.into_iter().filter(|(_, state)| *state == DirectState::Direct).map(|(id, _)| id).collect();
            for id in is.difference(&direct) {
                prop_assert_eq!(Some(id), proven.as_ref(), "direct without an echo");
            }
            direct = is;
        }
    }
}
