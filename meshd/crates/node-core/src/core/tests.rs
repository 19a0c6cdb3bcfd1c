use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use control_core::core::CacheInfo;
use etcd_schema::{Alive, NodeId, SubnetKey};
use mesh::{
    address::Family,
    kernel_state::{OthersRules, PrefixOn, RouteVia},
    path::{DirectState, MacAddress},
    plan::Observed,
    problem::ProblemCode,
    records::{Record, Records},
    topology::PeerId,
};

use super::*;
use crate::mesh_state::fixtures::{alive, joined, local, records, status, subnet};

const SECOND: Duration = Duration::from_secs(1);

/// What a shell did last, in order.
#[derive(Debug, PartialEq, Eq)]
enum Did {
    Reopened,
    AwaitedPolicies(Duration),
    AppliedTable { peers: usize },
    Reconciled { look: bool, others: OthersRules },
    WroteSubnetEnv,
    RemovedSubnetEnv,
    Restarted(PeerId),
    Called(Vec<String>),
    ToldEnforcement,
    ReadUnderlay,
    ReadAttached(usize),
    ReadEarlier(SubnetKey),
}

/// A node with a shell that does as it is asked, or fails as it is set to.
struct Shell {
    now: Instant,
    core: NodeCore,
    agents: PathAgents,
    did: Vec<Did>,
    outcome: PassOutcome,
    tun: bool,
    guarded: bool,
    kernel: fn() -> Reconciled,
    subnet_env: Option<Problem>,
    tunnel: Vec<Problem>,
}

fn kernel_well() -> Reconciled {
    Reconciled { routes: true, others: Some(SeenOthers::Unchanged), ..Reconciled::default() }
}

fn problem(code: ProblemCode) -> Problem {
    Problem::new(code, "cause", "remedy")
}

fn start() -> NodeStart {
    NodeStart {
        id: "n1".parse().unwrap(),
        observed: Observed::default(),
        accepted: Vec::new(),
        talking: Vec::new(),
        cache: None,
        local: local(),
    }
}

impl Shell {
    fn new(start: NodeStart) -> Self {
        let now = Instant::now();
        Self {
            now,
            core: NodeCore::new(now, start),
            agents: PathAgents::default(),
            did: Vec::new(),
            outcome: PassOutcome::default(),
            tun: true,
            guarded: true,
            kernel: kernel_well,
            subnet_env: None,
            tunnel: Vec::new(),
        }
    }

    /// The node n1 in a mesh of three that etcd has told it of, at rest.
    fn at_rest() -> Self {
        let mut shell = Self::new(start());
        shell.hears(records(3), joined());
        shell.pass();
        assert_eq!(shell.problems(), []);
        shell.did.clear();
        shell
    }

    fn hears(&mut self, records: Records, status: ControlStatus) {
        self.step(Input::Records(Arc::new(records)));
        self.step(Input::Status(Box::new(status)));
    }

    fn pass(&mut self) {
        self.step(Input::Pass);
    }

    /// The pass at the node's next deadline, as far from now as said.
    fn pass_after(&mut self, wait: Duration) {
        assert_eq!(self.core.next_deadline(), Some(self.now + wait));
        self.now += wait;
        self.pass();
    }

    /// What was done since the last call.
    fn did(&mut self) -> Vec<Did> {
        std::mem::take(&mut self.did)
    }

    fn problems(&self) -> Vec<ProblemCode> {
        self.outcome.problems.iter().map(|problem| problem.code).collect()
    }

    fn step(&mut self, input: Input) {
        let mut input = Some(input);
        while let Some(happened) = input.take() {
            let Effects { at_once, work } = self.core.step(self.now, happened, &mut self.agents);
            for effect in at_once {
                let did = match effect {
                    Effect::Restarted(owner) => Did::Restarted(owner),
                    Effect::Call(peers) => Did::Called(peers),
                    Effect::TellEnforcement => Did::ToldEnforcement,
                    Effect::ReadUnderlay => Did::ReadUnderlay,
                    Effect::ReadAttached { subnet, earlier } => {
                        self.did.extend(earlier.into_iter().map(Did::ReadEarlier));
                        Did::ReadAttached(subnet.iter().flat_map(prefixes).count())
                    }
                    Effect::Show(outcome) => {
                        self.outcome = *outcome;
                        continue;
                    }
                };
                self.did.push(did);
            }
            let Some(work) = work else { return };
            let (did, done) = self.work(work);
            self.did.push(did);
            input = Some(Input::Done(done));
        }
    }

    fn work(&self, work: Work) -> (Did, Done) {
        match work {
            Work::ReopenTun => (Did::Reopened, Done::TunReopened(self.tun)),
            Work::AwaitPolicies(at_most) => (Did::AwaitedPolicies(at_most), Done::Policies { guarded: self.guarded }),
            Work::ApplyTable(table) => {
                (Did::AppliedTable { peers: table.peers.len() }, Done::TableApplied(self.tunnel.clone()))
            }
            Work::Reconcile { look, others, .. } => {
                (Did::Reconciled { look, others }, Done::Reconciled((self.kernel)()))
            }
            Work::SubnetEnv(change) => {
                let did = match change {
                    SubnetEnvChange::Write { .. } => Did::WroteSubnetEnv,
                    SubnetEnvChange::Remove => Did::RemovedSubnetEnv,
                };
                (did, Done::SubnetEnv(self.subnet_env.clone()))
            }
        }
    }
}

#[test]
fn the_first_pass_guards_the_pods_before_it_makes_peers_and_routes() {
    let mut shell = Shell::new(start());
    shell.hears(records(3), joined());
    shell.pass();
    assert_eq!(
        shell.did(),
        [
            Did::ToldEnforcement,
            Did::AwaitedPolicies(POLICIES_FIRST),
            Did::ToldEnforcement,
            Did::AppliedTable { peers: 2 },
            Did::Reconciled { look: true, others: OthersRules::Read },
            Did::WroteSubnetEnv,
        ]
    );
    let plan = shell.outcome.plan.as_ref().unwrap();
    assert_eq!((plan.paths.len(), shell.core.table()), (2, Some(&plan.tunnel)));
    assert_eq!(shell.agents.due(shell.now).len(), 2, "the kernel has the routes of their probes");
    assert_eq!(shell.core.next_deadline(), None);
    // A pass over what is in force touches nothing.
    shell.pass();
    assert_eq!(shell.did(), [Did::ToldEnforcement, Did::AwaitedPolicies(Duration::ZERO), Did::WroteSubnetEnv]);
}

#[test]
fn without_etcd_and_without_a_usable_cache_the_kernel_stays_as_it_is() {
    let cached = || Records { synced: false, ..records(3) };
    let age = Duration::from_secs(90);
    for cache in [None, Some(CacheInfo { age, usable: false })] {
        let mut shell = Shell::new(NodeStart { cache, ..start() });
        shell.pass();
        assert_eq!(shell.problems(), [ProblemCode::WaitingForEtcd], "before anything is known");
        shell.hears(cached(), joined());
        shell.pass();
        assert_eq!((shell.problems(), shell.did()), (vec![ProblemCode::WaitingForEtcd], Vec::new()));
        assert!(shell.outcome.plan.is_none());
        let cause = &shell.outcome.problems[0].cause;
        assert_eq!(cause.contains("90 s old"), cache.is_some(), "{cause}");
    }
    let mut shell = Shell::new(NodeStart { cache: Some(CacheInfo { age, usable: true }), ..start() });
    shell.hears(cached(), joined());
    shell.pass();
    assert!(shell.outcome.plan.is_some());
}

#[test]
fn an_identity_that_another_daemon_may_have_sends_nothing() {
    let mut shell = Shell::at_rest();
    shell.step(Input::Status(Box::new(ControlStatus { holds_identity: false, ..joined() })));
    shell.pass();
    assert_eq!((shell.problems(), shell.did()), (vec![ProblemCode::IdentityUnconfirmed], Vec::new()));
    let cloned = MembershipState::Cloned { reason: "x".into() };
    shell.step(Input::Status(Box::new(status(cloned, Some(subnet(1))))));
    shell.pass();
    let did = shell.did();
    assert!(did.contains(&Did::AppliedTable { peers: 0 }) && did.contains(&Did::RemovedSubnetEnv), "{did:?}");
    let routes = &shell.outcome.plan.as_ref().unwrap().kernel.routes;
    assert!(routes.values().all(|route| route.via == RouteVia::Unreachable), "{routes:?}");
}

#[test]
fn rules_that_are_refused_keep_routes_away_and_are_tried_again() {
    let mut shell = Shell::new(start());
    shell.guarded = false;
    shell.hears(records(3), joined());
    shell.pass();
    assert_eq!(shell.did(), [Did::ToldEnforcement, Did::AwaitedPolicies(POLICIES_FIRST)]);
    assert_eq!(shell.problems(), [ProblemCode::PodsNotGuarded]);
    // They are waited for once only: nothing else of the node stands still meanwhile.
    shell.pass_after(RETRY);
    assert_eq!(shell.did(), [Did::ToldEnforcement, Did::AwaitedPolicies(Duration::ZERO)]);
    shell.guarded = true;
    shell.pass_after(RETRY);
    assert!(shell.did().contains(&Did::WroteSubnetEnv) && shell.agents.next_timer().is_some());
    assert_eq!((shell.problems(), shell.core.next_deadline()), (vec![], None));
}

#[test]
fn what_the_kernel_refuses_is_a_problem_until_a_later_pass_has_put_it_there() {
    let mut shell = Shell::new(start());
    shell.kernel = || Reconciled {
        problems: vec![problem(ProblemCode::KernelRefused)],
        failed: true,
        others: Some(SeenOthers::Unchanged),
        ..Reconciled::default()
    };
    shell.hears(records(3), joined());
    shell.pass();
    assert_eq!(shell.agents.next_timer(), None, "probes would take another path");
    assert_eq!(shell.problems(), [ProblemCode::KernelRefused]);
    // The same again, because it is tried again: with a look at what the kernel has.
    shell.pass_after(RETRY);
    assert!(shell.did().contains(&Did::Reconciled { look: true, others: OthersRules::Read }));
    shell.kernel = || Reconciled {
        problems: vec![problem(ProblemCode::KernelUnreadable)],
        failed: true,
        others: None,
        ..Reconciled::default()
    };
    shell.pass_after(RETRY);
    assert_eq!(shell.problems(), [ProblemCode::KernelUnreadable]);
    shell.kernel = kernel_well;
    shell.did.clear();
    shell.pass_after(RETRY);
    assert_eq!(
        shell.did(),
        [
            Did::ToldEnforcement,
            Did::AwaitedPolicies(Duration::ZERO),
            Did::Reconciled { look: true, others: OthersRules::Read },
            Did::WroteSubnetEnv
        ]
    );
    assert_eq!((shell.problems(), shell.core.next_deadline()), (vec![], None));
}

#[test]
fn attached_containers_are_looked_for_while_something_is_tried_again() {
    let mut shell = Shell::at_rest();
    shell.kernel = || Reconciled { failed: true, ..kernel_well() };
    shell.step(Input::KernelChanged { addresses: false });
    shell.pass();
    shell.did.clear();
    // An event comes before the retry.
    shell.now += SECOND / 2;
    shell.pass();
    assert_eq!(shell.did()[0], Did::ReadAttached(1));
}

/// Kubernetes gave the node another block, and pods have addresses of the one before.
#[test]
fn an_earlier_subnet_is_asked_about_every_second_and_gives_no_new_addresses() {
    let mut shell = Shell::at_rest();
    let mut both = records(3);
    let own = both.subnets.get(&subnet(1)).unwrap().clone();
    both.subnets.insert(subnet(9), own);
    shell.hears(both, status(MembershipState::Joined { subnet: subnet(9) }, Some(subnet(9))));
    shell.pass();
    assert!(shell.did().contains(&Did::ReadAttached(1)));
    for _ in 0..2 {
        shell.pass_after(RETRY);
        let did = shell.did();
        assert!(did.contains(&Did::ReadEarlier(subnet(1))) && did.contains(&Did::ReadAttached(1)), "{did:?}");
    }
    assert_eq!(shell.core.mesh().topology().own_subnets.len(), 2, "what is attached keeps its addresses");
    shell.hears(records(3), joined());
    shell.pass_after(RETRY);
    shell.did.clear();
    shell.pass();
    assert!(!shell.did().iter().any(|did| matches!(did, Did::ReadEarlier(_))));
    assert_eq!(shell.core.next_deadline(), None);
}

#[test]
fn a_tun_device_that_is_gone_is_made_again_and_its_routes_with_it() {
    let mut shell = Shell::at_rest();
    shell.step(Input::TunGone);
    shell.tun = false;
    shell.pass();
    assert_eq!(shell.did()[0], Did::Reopened);
    shell.pass_after(RETRY);
    assert_eq!(shell.did()[0], Did::Reopened, "tried again");
    shell.tun = true;
    shell.pass_after(RETRY);
    let did = shell.did();
    assert_eq!(did[0], Did::Reopened);
    assert!(did.contains(&Did::Reconciled { look: true, others: OthersRules::Read }), "{did:?}");
    shell.pass();
    assert!(!shell.did().contains(&Did::Reopened));
    // The kernel may be the first to know.
    shell.kernel = || Reconciled { failed: true, no_tun: true, ..kernel_well() };
    shell.step(Input::KernelChanged { addresses: false });
    shell.pass();
    shell.kernel = kernel_well;
    shell.did.clear();
    shell.pass_after(RETRY);
    assert_eq!(shell.did()[0], Did::Reopened);
}

#[test]
fn a_subnet_that_was_lost_takes_its_file_along_and_one_that_comes_back_brings_it() {
    let mut shell = Shell::at_rest();
    let mut without = records(3);
    without.subnets.remove(&subnet(1));
    // Its key is gone, and is being put back.
    shell.hears(without.clone(), status(MembershipState::Joining, Some(subnet(1))));
    shell.pass();
    assert!(shell.did().contains(&Did::WroteSubnetEnv));
    // Without a place in the mesh, which may come back: the file stays.
    shell.hears(without.clone(), status(MembershipState::Joining, None));
    shell.pass();
    let did = shell.did();
    assert!(!did.contains(&Did::WroteSubnetEnv) && !did.contains(&Did::RemovedSubnetEnv), "{did:?}");
    let lost = MembershipState::SubnetLost { subnet: subnet(1), reason: "x".into() };
    shell.hears(without, status(lost, None));
    shell.pass();
    let did = shell.did();
    assert!(did.contains(&Did::RemovedSubnetEnv) && did.contains(&Did::ReadAttached(1)), "{did:?}");
    // The kernel is asked every second whether the last container is gone.
    shell.pass_after(RETRY);
    assert!(shell.did().contains(&Did::ReadAttached(1)));
    shell.hears(records(3), joined());
    shell.pass_after(RETRY);
    assert!(shell.did().contains(&Did::WroteSubnetEnv));
    assert_eq!(shell.core.next_deadline(), None);
}

#[test]
fn a_peer_that_goes_and_comes_back_leaves_and_enters_tunnel_and_routes() {
    let mut shell = Shell::at_rest();
    shell.hears(records(2), joined());
    shell.pass();
    let did = shell.did();
    assert!(did.contains(&Did::AppliedTable { peers: 1 }), "{did:?}");
    assert_eq!(shell.agents.targets().peers.len(), 1);
    assert!(did.contains(&Did::Reconciled { look: false, others: OthersRules::Read }), "{did:?}");
    shell.hears(records(3), joined());
    shell.pass();
    assert!(shell.did().contains(&Did::AppliedTable { peers: 2 }));
    assert_eq!(shell.outcome.plan.as_ref().unwrap().kernel.routes.len(), 2);
}

#[test]
fn a_path_that_changes_changes_routes_and_not_the_targets() {
    let mut shell = Shell::at_rest();
    let path = ("n2".parse().unwrap(), Family::V4);
    let revision = shell.agents.revision();
    shell.now = shell.agents.drive(shell.now, &path, DirectState::Direct);
    shell.pass();
    let did = shell.did();
    assert!(did.contains(&Did::Reconciled { look: false, others: OthersRules::Read }), "{did:?}");
    assert_eq!(shell.agents.revision(), revision);
    let routes = &shell.outcome.plan.as_ref().unwrap().kernel.routes;
    assert_eq!(routes.values().filter(|route| route.via == RouteVia::Tunnel).count(), 1);
}

#[test]
fn an_etcd_that_lost_the_configuration_takes_no_fallback_route_away() {
    let mut shell = Shell::at_rest();
    shell.hears(Records { config: None, ..records(3) }, status(MembershipState::NoConfig, None));
    shell.pass();
    let kernel = &shell.outcome.plan.as_ref().unwrap().kernel;
    assert_eq!((kernel.floor.networks.len(), kernel.firewall.networks.len(), kernel.routes.len()), (1, 1, 0));
}

#[test]
fn peers_of_the_run_before_are_called_once_when_the_tunnel_has_them() {
    let mut shell = Shell::new(NodeStart { talking: vec!["nodes/n2".into()], ..start() });
    shell.hears(records(1), joined());
    shell.pass();
    assert!(!shell.did().iter().any(|did| matches!(did, Did::Called(_))), "it has no peers yet");
    shell.hears(records(2), joined());
    shell.pass();
    assert!(shell.did().contains(&Did::Called(vec!["nodes/n2".into()])));
    shell.hears(records(3), joined());
    shell.pass();
    assert!(!shell.did().iter().any(|did| matches!(did, Did::Called(_))));
}

#[test]
fn a_peer_whose_daemon_restarted_is_called() {
    let mut shell = Shell::at_rest();
    let id: NodeId = "n2".parse().unwrap();
    let with = |start: u64| {
        let mut records = records(3);
        let record: Record<Alive> = alive(start);
        records.alive.insert(id.clone(), record);
        records
    };
    shell.hears(with(1), joined());
    shell.hears(with(2), joined());
    assert_eq!(shell.did(), [Did::Restarted(PeerId::Node(id))]);
}

#[test]
fn paths_of_the_run_before_are_resumed_in_the_first_plan() {
    let via: IpAddr = "192.0.2.2".parse().unwrap();
    let prefix = "10.244.2.0/24".parse().unwrap();
    let accepted = vec![PrefixOn { prefix, dev: "eth0".parse().unwrap() }];
    let mut shell = Shell::new(NodeStart { accepted, ..start() });
    shell.agents = PathAgents::after(vec![(prefix, via)]);
    shell.agents.set_neighbours([((2, via), MacAddress([2; 6]))].into());
    shell.pass();
    assert!(shell.agents.resumes(), "nothing is planned yet");
    shell.hears(records(3), joined());
    shell.pass();
    let routes = &shell.outcome.plan.as_ref().unwrap().kernel.routes;
    assert_eq!(routes.values().filter(|route| matches!(route.via, RouteVia::Neighbour { .. })).count(), 1);
    assert!(!shell.agents.resumes());
}

#[test]
fn events_of_the_kernel_call_for_a_look_and_settings_settle_first() {
    let mut shell = Shell::at_rest();
    shell.step(Input::KernelChanged { addresses: true });
    assert_eq!(shell.did(), [Did::ReadUnderlay, Did::ReadAttached(1)]);
    shell.pass();
    assert!(shell.did().contains(&Did::Reconciled { look: true, others: OthersRules::Read }));
    shell.step(Input::Sweep);
    assert_eq!(shell.did(), [Did::ReadUnderlay, Did::ReadAttached(1)]);
    shell.pass();
    assert!(shell.did().contains(&Did::Reconciled { look: true, others: OthersRules::Read }));
    shell.step(Input::OthersChanged { settings: true });
    shell.pass();
    assert!(!shell.did().iter().any(|did| matches!(did, Did::Reconciled { .. })));
    shell.pass_after(SETTINGS_SETTLE);
    assert!(shell.did().contains(&Did::Reconciled { look: true, others: OthersRules::Read }));
}

#[test]
fn others_rules_are_read_once_a_second_at_most_and_the_last_change_is() {
    let mut shell = Shell::at_rest();
    shell.kernel = || Reconciled { others: Some(SeenOthers::Read), ..kernel_well() };
    shell.step(Input::OthersChanged { settings: false });
    shell.pass();
    assert!(shell.did().contains(&Did::Reconciled { look: true, others: OthersRules::Read }));
    shell.kernel = || Reconciled { others: Some(SeenOthers::Kept), ..kernel_well() };
    shell.step(Input::KernelChanged { addresses: false });
    shell.pass();
    assert!(shell.did().contains(&Did::Reconciled { look: true, others: OthersRules::Keep }));
    shell.pass_after(SECOND);
    assert!(shell.did().contains(&Did::Reconciled { look: true, others: OthersRules::Read }));
}

#[test]
fn a_deadline_that_cannot_be_served_waits_a_second() {
    // What an earlier run accepted lingers for 10 s, after which this node may not act yet.
    let accepted = vec![PrefixOn { prefix: "10.244.2.0/24".parse().unwrap(), dev: "eth0".parse().unwrap() }];
    let mut shell = Shell::new(NodeStart { accepted, ..start() });
    shell.hears(records(3), ControlStatus { holds_identity: false, ..joined() });
    shell.pass();
    shell.pass_after(10 * SECOND);
    shell.pass_after(RETRY);
    shell.step(Input::Status(Box::new(joined())));
    shell.pass();
    assert_eq!(shell.core.next_deadline(), None, "it is served");
}

#[test]
fn problems_of_tunnel_underlay_and_files_are_shown_together() {
    let mut shell = Shell::new(start());
    shell.tunnel = vec![problem(ProblemCode::TunnelRefused)];
    shell.subnet_env = Some(problem(ProblemCode::SubnetEnv));
    shell.step(Input::Local(Box::new(Local { underlay: BTreeMap::new(), ..local() })));
    shell.step(Input::Pods(vec!["veth1".parse().unwrap()]));
    shell.hears(records(3), joined());
    shell.pass();
    assert_eq!(shell.problems(), [ProblemCode::TunnelRefused, ProblemCode::NoUnderlay, ProblemCode::SubnetEnv]);
    assert_eq!(shell.outcome.plan.as_ref().unwrap().kernel.pods, ["veth1".parse().unwrap()]);
}

#[test]
fn only_what_is_below_the_mtu_of_the_device_is_a_peers_own() {
    let mut shell = Shell::new(start());
    let mtus = |mtu: u16| BTreeMap::from([("nodes/n2".to_owned(), mtu)]);
    let n2 = PeerId::Node("n2".parse().unwrap());
    shell.step(Input::PeerMtus(mtus(1280)));
    shell.hears(records(3), joined());
    shell.pass();
    assert_eq!(shell.agents.inner_mtu(&n2), None, "there was no device yet");
    let whole = shell.core.table().unwrap().mtu;
    shell.step(Input::PeerMtus(mtus(whole)));
    assert_eq!(shell.agents.inner_mtu(&n2), None);
    shell.step(Input::PeerMtus(mtus(whole - 1)));
    assert_eq!(shell.agents.inner_mtu(&n2), Some(whole - 1));
}

#[test]
fn an_outcome_that_was_not_asked_for_changes_nothing() {
    let mut core = NodeCore::new(Instant::now(), start());
    let (now, mut agents) = (Instant::now(), PathAgents::default());
    core.step(now, Input::Records(Arc::new(records(3))), &mut agents);
    core.step(now, Input::Status(Box::new(joined())), &mut agents);
    let awaits = core.step(now, Input::Pass, &mut agents);
    assert!(matches!(awaits.work, Some(Work::AwaitPolicies(_))));
    for stray in [Input::Done(Done::TunReopened(true)), Input::Done(Done::SubnetEnv(None)), Input::Pass] {
        let Effects { at_once, work } = core.step(now, stray, &mut agents);
        assert!(at_once.is_empty() && work.is_none());
    }
    let Effects { work, .. } = core.step(now, Input::Done(Done::Policies { guarded: true }), &mut agents);
    assert!(matches!(work, Some(Work::ApplyTable(_))), "{work:?}");
}
