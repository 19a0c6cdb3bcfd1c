//! Networks of clusters, blocks of Kubernetes, subnets that are given up.

use super::*;

/// Two nodes may have one address, behind NATs of two sites.
#[test]
fn a_reservation_by_address_is_for_nodes_of_that_networks_cluster() {
    let mut sim = Sim::new(3, 2);
    sim.operator_puts("config", CLUSTERS);
    sim.nodes[1].facts.cluster = "west".parse().unwrap();
    sim.nodes[1].facts.public_ipv4 = sim.nodes[0].facts.public_ipv4;
    sim.operator_puts("subnets/10.0.0.48-28", r#"{"PublicIP": "192.0.2.1"}"#);
    sim.start(1);
    sim.run(Duration::from_secs(20));
    let MembershipState::Joined { subnet } = state_of(&sim, 1) else { panic!("{:?}", state_of(&sim, 1)) };
    assert!(Key::Subnet(*subnet).to_string().starts_with("subnets/10.42.0."), "{subnet:?}");
}

#[test]
fn each_node_draws_from_the_networks_of_its_cluster_and_waits_for_them() {
    let mut sim = Sim::new(7, 3);
    sim.nodes[1].facts.cluster = "west".parse().unwrap();
    sim.nodes[2].facts.cluster = "north".parse().unwrap();
    sim.operator_puts("config", CONFIG);
    (0..3).for_each(|node| sim.start(node));
    sim.run(Duration::from_secs(5));
    assert!(joined(&sim, 0));
    let cluster = "west".parse().unwrap();
    assert_eq!(*state_of(&sim, 1), MembershipState::NoNetwork { cluster });
    assert!(has_problem(&sim, 1, ProblemCode::NoNetwork));

    sim.operator_puts("config", CLUSTERS);
    sim.run(Duration::from_secs(10));
    let network = "10.42.0.0/24".parse::<ipnet::Ipv4Net>().unwrap();
    let MembershipState::Joined { subnet } = state_of(&sim, 1) else { panic!("{:?}", state_of(&sim, 1)) };
    assert!(subnet.v6.is_none() && network.contains(&subnet.v4.unwrap()), "{subnet:?}");
    assert!(has_problem(&sim, 2, ProblemCode::NoNetwork));
    // A node that changes its cluster moves once nothing is attached.
    sim.nodes[0].attached = true;
    let before = sim.nodes[0].cached.unwrap();
    sim.step(0, Input::Attached(true));
    sim.nodes[0].facts.cluster = "west".parse().unwrap();
    let facts = Box::new(sim.nodes[0].facts.clone());
    sim.step(0, Input::Facts(facts));
    sim.run(Duration::from_secs(20));
    assert_eq!(*state_of(&sim, 0), MembershipState::Joined { subnet: before });
    assert!(has_problem(&sim, 0, ProblemCode::SubnetOutdated));
}

/// As sync reserves it for the node with this number.
fn reserve(sim: &mut Sim, block: &str, number: usize) {
    let value = format!(r#"{{"Node": "n{number}", "KubernetesNode": "west/node-{number}"}}"#);
    sim.operator_puts(&format!("subnets/{block}"), &value);
}

#[test]
fn a_node_waits_for_its_block_and_never_draws() {
    let mut sim = Sim::new(11, 2);
    sim.nodes[1].facts.cluster = "west".parse().unwrap();
    sim.operator_puts("config", BY_KUBERNETES);
    (0..2).for_each(|node| sim.start(node));
    sim.run(Duration::from_secs(60));
    assert!(joined(&sim, 0), "a node of no cluster draws");
    let cluster = "west".parse().unwrap();
    assert_eq!(*state_of(&sim, 1), MembershipState::AwaitingBlock { cluster });
    assert!(has_problem(&sim, 1, ProblemCode::AwaitingBlock));
    assert!(sim.subnets_of(1).is_empty());
    assert!(sim.etcd.keys.contains_key("nodes/n1"), "sync finds it by its record");
    // Another node's block, and one of another cluster's sync, are not this node's.
    reserve(&mut sim, "10.42.0.32-28", 0);
    sim.operator_puts("subnets/10.0.0.64-28", r#"{"KubernetesNode": "west/node-1"}"#);
    sim.run(Duration::from_secs(70));
    assert!(!joined(&sim, 1));
    // Of any length.
    reserve(&mut sim, "10.42.0.128-26", 1);
    sim.run(Duration::from_secs(80));
    let subnet = "10.42.0.128-26".parse().unwrap();
    assert_eq!(*state_of(&sim, 1), MembershipState::Joined { subnet });
    assert!(!has_problem(&sim, 1, ProblemCode::SubnetOutdated));
    let entry = &sim.etcd.keys["subnets/10.42.0.128-26"];
    assert!(entry.lease.is_none() && String::from_utf8_lossy(&entry.value).contains("west/node-1"), "{entry:?}");
}

/// The key of a block that the Node gets again is as old as it was.
#[test]
fn a_block_that_is_reserved_again_is_the_newest() {
    let mut sim = Sim::new(13, 1);
    sim.nodes[0].facts.cluster = "west".parse().unwrap();
    sim.nodes[0].attached = true;
    sim.operator_puts("config", BY_KUBERNETES);
    sim.start(0);
    for block in ["10.42.0.32-28", "10.42.0.64-28", "10.42.0.32-28"] {
        reserve(&mut sim, block, 0);
        sim.run(sim.elapsed() + Duration::from_secs(10));
        assert_eq!(*state_of(&sim, 0), MembershipState::Joined { subnet: block.parse().unwrap() });
    }
}

#[test]
fn a_changed_block_is_used_at_once_and_the_old_one_goes_with_its_last_attachment() {
    let mut sim = Sim::new(12, 1);
    sim.nodes[0].facts.cluster = "west".parse().unwrap();
    sim.nodes[0].attached = true;
    // It drew one before Kubernetes was to say.
    sim.operator_puts("config", CLUSTERS);
    sim.start(0);
    sim.run(Duration::from_secs(10));
    let drawn = Key::Subnet(sim.nodes[0].cached.unwrap()).to_string();
    sim.operator_puts("config", BY_KUBERNETES);
    sim.run(Duration::from_secs(20));
    assert!(joined(&sim, 0) && has_problem(&sim, 0, ProblemCode::SubnetOutdated), "it lives on what it has");
    let mut before = drawn;
    let mut free = (1..16).map(|n| format!("10.42.0.{}-28", n * 16)).filter(|block| !before.ends_with(&**block));
    for block in [free.next().unwrap(), free.next().unwrap()] {
        reserve(&mut sim, &block, 0);
        sim.run(sim.elapsed() + Duration::from_secs(10));
        let subnet: SubnetKey = block.parse().unwrap();
        assert_eq!(*state_of(&sim, 0), MembershipState::Joined { subnet });
        assert!(sim.etcd.keys.contains_key(&before), "pods have addresses of {before}");
        let idle = BTreeSet::from([before.strip_prefix("subnets/").unwrap().parse().unwrap()]);
        sim.step(0, Input::Idle(idle));
        sim.run(sim.elapsed() + Duration::from_secs(10));
        assert!(!sim.etcd.keys.contains_key(&before), "{before} is without attachments");
        assert_eq!(sim.subnets_of(0), [format!("subnets/{block}")]);
        sim.step(0, Input::Idle(BTreeSet::new()));
        before = format!("subnets/{block}");
    }
}

/// Each node's podCIDR is what the other one drew before: a node without pods gives way.
#[test]
fn drawn_subnets_give_way_to_podcidrs_that_are_the_others() {
    let mut sim = Sim::new(14, 2);
    sim.operator_puts("config", CLUSTERS);
    for node in 0..2 {
        sim.nodes[node].facts.cluster = "west".parse().unwrap();
        sim.start(node);
    }
    sim.run(Duration::from_secs(20));
    let drawn: Vec<String> = (0..2).map(|node| Key::Subnet(sim.nodes[node].cached.unwrap()).to_string()).collect();
    sim.nodes[0].attached = true;
    sim.step(0, Input::Attached(true));
    sim.operator_puts("config", BY_KUBERNETES);
    sim.run(Duration::from_secs(30));
    assert_eq!(sim.subnets_of(0), [&*drawn[0]], "pods have addresses of it");
    assert!(joined(&sim, 0) && !joined(&sim, 1));
    let idle = |key: &str| Input::Idle(BTreeSet::from([key.strip_prefix("subnets/").unwrap().parse().unwrap()]));
    sim.step(1, idle(&drawn[1]));
    sim.run(Duration::from_secs(40));
    assert!(sim.subnets_of(1).is_empty() && !sim.etcd.keys.contains_key(&drawn[1]));
    // The podCIDR of node 0 is free now; its drawn one goes with its last pod.
    reserve(&mut sim, drawn[1].strip_prefix("subnets/").unwrap(), 0);
    sim.run(Duration::from_secs(50));
    sim.step(0, idle(&drawn[0]));
    sim.run(Duration::from_secs(60));
    assert_eq!(sim.subnets_of(0), [&*drawn[1]]);
    reserve(&mut sim, drawn[0].strip_prefix("subnets/").unwrap(), 1);
    sim.run(Duration::from_secs(70));
    assert!((0..2).all(|node| joined(&sim, node)));
    assert_eq!(sim.subnets_of(1), [&*drawn[0]]);
}

#[test]
fn what_a_node_gave_up_is_drawn_last_and_goes_back_to_it_if_it_returns() {
    let mut sim = Sim::new(13, 3);
    sim.operator_puts("config", r#"{"Network": "10.0.0.0/24", "SubnetLen": 28}"#);
    for n in 4..16 {
        sim.operator_puts(&format!("subnets/10.0.0.{}-28", n * 16), "{}");
    }
    let freed = r#"{"Freed": {"cluster": "west", "at": 1}}"#;
    sim.operator_puts("subnets/10.0.0.16-28", freed);
    sim.operator_puts("subnets/10.0.0.32-29", freed);
    sim.start(0);
    sim.run(Duration::from_secs(10));
    assert_eq!(sim.subnets_of(0), ["subnets/10.0.0.48-28"], "the only one that is free");
    sim.start(1);
    sim.run(Duration::from_secs(20));
    sim.start(2);
    sim.run(Duration::from_secs(30));
    let mut owned = [sim.subnets_of(1), sim.subnets_of(2)].concat();
    owned.sort_unstable();
    assert_eq!(owned, ["subnets/10.0.0.16-28", "subnets/10.0.0.32-28"]);
    assert!(!sim.etcd.keys.contains_key("subnets/10.0.0.32-29"));
    // Its block was given up while it was cut off, and nothing has it: it is its own again.
    let own = sim.nodes[0].cached.unwrap();
    sim.operator_puts("subnets/10.0.0.48-28", freed);
    sim.run(Duration::from_secs(50));
    assert_eq!(*state_of(&sim, 0), MembershipState::Joined { subnet: own });
    assert_eq!(sim.subnets_of(0), ["subnets/10.0.0.48-28"]);
}

#[test]
fn a_lost_subnet_is_not_taken_back_by_force_and_a_new_one_waits_for_the_pods() {
    let mut sim = Sim::new(3, 1);
    sim.operator_puts("config", CONFIG);
    sim.nodes[0].attached = true;
    sim.start(0);
    sim.run(Duration::from_secs(10));
    let own = sim.nodes[0].cached.unwrap();
    sim.nodes[0].reachable = false;
    sim.disconnect(0);
    sim.run(Duration::from_secs(60));
    assert!(!sim.etcd.keys.contains_key(&Key::Subnet(own).to_string()));
    // While it is cut off it goes on as before.
    assert_eq!(sim.nodes[0].membership.as_ref().unwrap().subnet(), Some(own));
    let half = format!("subnets/{}-29", own.v4.unwrap().network());
    sim.operator_puts(&half, r#"{"Node": "other"}"#);
    sim.nodes[0].reachable = true;
    sim.run(Duration::from_secs(120));
    assert!(matches!(state_of(&sim, 0), MembershipState::SubnetLost { .. }));
    // It is free again before the pods are gone: then it is this node's again.
    sim.operator_deletes(&half);
    sim.run(Duration::from_secs(130));
    assert_eq!(*state_of(&sim, 0), MembershipState::Joined { subnet: own });
}

#[test]
fn nodes_put_everything_back_but_config_when_all_of_it_was_deleted() {
    for nodes in [1, 4] {
        let mut sim = Sim::new(4, nodes);
        sim.operator_puts("config", CONFIG);
        for node in 0..sim.nodes.len() {
            sim.nodes[node].attached = true;
            sim.start(node);
        }
        sim.run(Duration::from_secs(10));
        let subnets: Vec<_> = sim.nodes.iter().map(|node| node.cached.unwrap()).collect();
        sim.operator_deletes_all();
        // Longer than withdrawals wait.
        sim.run(Duration::from_secs(60));
        for (node, subnet) in subnets.into_iter().enumerate() {
            assert_eq!(*state_of(&sim, node), MembershipState::Joined { subnet });
            assert_eq!(sim.subnets_of(node), [Key::Subnet(subnet).to_string()]);
            assert_eq!(sim.nodes[node].store.records().nodes.len(), usize::from(nodes));
        }
        assert!(!sim.etcd.keys.contains_key("config"), "that one is the operator's");
    }
}
