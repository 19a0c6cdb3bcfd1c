use std::time::Duration;

use etcd_schema::{Key, SubnetLease};
use ipnet::IpNet;
use mesh::{address::Family, kernel_state::RouteVia, path::DirectState};

use super::{
    fixtures::{alive, joined, local, record, records, status, subnet},
    *,
};

const SECOND: Duration = Duration::from_secs(1);

fn core(now: Instant) -> MeshState {
    MeshState::new(now, "n1".parse().unwrap(), Observed::default(), [])
}

/// The node n1 that acts in a mesh of three.
fn acting(now: Instant) -> MeshState {
    let mut core = core(now);
    core.apply_records(&records(3), false);
    core.act_on(&joined());
    core
}

#[test]
fn nothing_is_done_before_etcd_or_a_usable_cache_was_read_and_the_identity_is_confirmed() {
    let mut core = core(Instant::now());
    let cached = Records { synced: false, ..records(2) };
    core.apply_records(&cached, false);
    assert_eq!(core.stance(&joined()), Stance::Uninformed);
    core.apply_records(&cached, true);
    assert_eq!(core.stance(&joined()), Stance::Acts);
    assert_eq!(core.stance(&ControlStatus { holds_identity: false, ..joined() }), Stance::Unconfirmed);
    let cloned = status(MembershipState::Cloned { reason: "x".into() }, None);
    assert_eq!(core.stance(&ControlStatus { holds_identity: false, ..cloned }), Stance::Cloned);
}

#[test]
fn a_clone_has_no_peers_and_no_subnet_and_keeps_its_fallback_routes() {
    let now = Instant::now();
    let (mut core, mut agents) = (acting(now), PathAgents::default());
    let plan = core.plan(now, &local(), &mut agents);
    assert_eq!((plan.tunnel.peers.len(), plan.tunnel.local.len()), (2, 1));
    core.act_on(&status(MembershipState::Cloned { reason: "x".into() }, Some(subnet(1))));
    let plan = core.plan(now, &local(), &mut agents);
    assert_eq!((plan.tunnel.peers.len(), plan.tunnel.local.len(), plan.kernel.routes.len()), (0, 0, 0));
    assert!(agents.targets().peers.is_empty());
    assert_eq!(plan.kernel.floor.networks, ["10.244.0.0/16".parse::<IpNet>().unwrap()]);
    assert!(plan.kernel.firewall.accepted.is_empty());
}

#[test]
fn an_own_subnet_whose_key_was_deleted_stays_until_another_node_has_it_or_it_is_lost() {
    let mut core = core(Instant::now());
    let mut without = records(3);
    without.subnets.remove(&subnet(1));
    core.apply_records(&without, false);
    for (state, stays) in [
        (MembershipState::Joining, true),
        (MembershipState::Joined { subnet: subnet(1) }, true),
        (MembershipState::Connecting, true),
        (MembershipState::SubnetLost { subnet: subnet(1), reason: "x".into() }, false),
        (MembershipState::Removed, false),
        (MembershipState::NoConfig, false),
    ] {
        core.act_on(&status(state.clone(), Some(subnet(1))));
        assert_eq!(core.topology().own_subnets.len(), usize::from(stays), "{state:?}");
        assert!(core.resolver().topology().own_subnets.is_empty());
    }
    core.act_on(&status(MembershipState::Joining, None));
    assert!(core.topology().own_subnets.is_empty());
    // Another node has half of it.
    let lease = SubnetLease::parse(br#"{"PublicIP": "192.0.2.2", "Node": "n2"}"#).unwrap();
    let Ok(Key::Subnet(half)) = Key::parse("subnets/10.244.1.128-25") else { panic!() };
    without.subnets.insert(half, record(lease, 20));
    core.apply_records(&without, false);
    core.act_on(&joined());
    assert!(core.topology().own_subnets.is_empty());
    let mut unconfigured = Records { config: None, ..without };
    unconfigured.subnets.remove(&half);
    core.apply_records(&unconfigured, false);
    core.act_on(&joined());
    assert!(core.topology().own_subnets.is_empty(), "without a network nothing is this node's");
}

#[test]
fn peers_whose_daemon_restarted_are_named_once() {
    let mut core = core(Instant::now());
    let mut records = records(3);
    let (me, peer): (NodeId, NodeId) = ("n1".parse().unwrap(), "n2".parse().unwrap());
    let see = |core: &mut MeshState, records: &Records| core.apply_records(records, false).len();
    records.alive.insert(peer.clone(), alive(1));
    assert_eq!(see(&mut core, &records), 0, "seen first");
    records.alive.remove(&peer);
    assert_eq!(see(&mut core, &records), 0, "no sign of life");
    records.alive.insert(peer.clone(), alive(1));
    assert_eq!(see(&mut core, &records), 0, "it was cut off");
    records.alive.insert(peer.clone(), alive(2));
    assert_eq!(core.apply_records(&records, false), [PeerId::Node(peer.clone())]);
    assert_eq!(see(&mut core, &records), 0);
    records.alive.insert(me.clone(), alive(1));
    see(&mut core, &records);
    records.alive.insert(me, alive(2));
    assert_eq!(see(&mut core, &records), 0, "it is this node");
    assert_eq!(core.alive().len(), 2);
}

#[test]
fn starts_of_nodes_that_are_gone_are_not_kept_for_ever() {
    let mut core = core(Instant::now());
    let mut records = records(2);
    for n in 0..100 {
        let id: NodeId = format!("gone{n}").parse().unwrap();
        records.alive.insert(id.clone(), alive(1));
        core.apply_records(&records, false);
        records.alive.remove(&id);
    }
    assert!(core.starts.len() <= 18, "{}", core.starts.len());
}

#[test]
fn sources_of_a_direct_peer_are_accepted_for_a_while_after_they_leave_the_plan() {
    let mut now = Instant::now();
    let (mut core, mut agents) = (acting(now), PathAgents::default());
    core.plan(now, &local(), &mut agents);
    for peer in ["n2", "n3"] {
        now = agents.drive(now, &(peer.parse().unwrap(), Family::V4), DirectState::Direct);
    }
    let plan = core.plan(now, &local(), &mut agents);
    let direct = |plan: &Plan| {
        plan.kernel.routes.values().filter(|route| matches!(route.via, RouteVia::Neighbour { .. })).count()
    };
    assert_eq!((direct(&plan), plan.kernel.firewall.accepted.len(), core.next_deadline()), (2, 2, None));
    // The peer n3 moves to another network: its prefix stays its own.
    let mut moved = records(3);
    let id: NodeId = "n3".parse().unwrap();
    let mut record_of = (*moved.nodes.get(&id).unwrap().value).clone();
    record_of.addresses.clear();
    moved.nodes.insert(id, record(record_of, 3));
    core.apply_records(&moved, false);
    core.act_on(&joined());
    let plan = core.plan(now, &local(), &mut agents);
    assert_eq!((direct(&plan), plan.kernel.firewall.accepted.len()), (1, 2));
    assert_eq!(core.next_deadline(), Some(now + 10 * SECOND));
    assert_eq!(core.plan(now + 10 * SECOND, &local(), &mut agents).kernel.firewall.accepted.len(), 1);
    assert_eq!(core.next_deadline(), None);
    // One whose subnet goes to another node is not accepted on.
    let mut gone = records(3);
    gone.subnets.remove(&subnet(2));
    core.apply_records(&gone, false);
    core.act_on(&joined());
    let plan = core.plan(now + 11 * SECOND, &local(), &mut agents);
    let accepted: Vec<IpNet> = plan.kernel.firewall.accepted.iter().map(|on| on.prefix).collect();
    assert!(!accepted.contains(&"10.244.2.0/24".parse().unwrap()), "{accepted:?}");
}

#[test]
fn what_an_earlier_run_sent_direct_is_accepted_for_a_while() {
    let now = Instant::now();
    let accepted = PrefixOn { prefix: "10.244.2.0/24".parse().unwrap(), dev: "eth0".parse().unwrap() };
    let mut core = MeshState::new(now, "n1".parse().unwrap(), Observed::default(), [accepted]);
    assert_eq!(core.next_deadline(), Some(now + 10 * SECOND));
    core.apply_records(&records(2), false);
    core.act_on(&joined());
    core.plan(now, &local(), &mut PathAgents::default());
    assert_eq!(core.observed.programmed.networks.len(), 1);
}

#[test]
fn without_a_configuration_what_was_kept_out_of_the_clear_stays_so() {
    let now = Instant::now();
    let (mut core, mut agents) = (acting(now), PathAgents::default());
    core.plan(now, &local(), &mut agents);
    core.apply_records(&Records { config: None, ..records(3) }, false);
    core.act_on(&status(MembershipState::NoConfig, None));
    let plan = core.plan(now, &local(), &mut agents);
    assert_eq!((plan.kernel.floor.networks.len(), plan.kernel.firewall.networks.len()), (1, 1));
    assert_eq!(plan.kernel.routes.len(), 0);
}
