//! The main loop: every change takes the same path. View, underlay and paths make a plan, and its differences are
//! applied.

mod reconcile;
mod start;

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use api_types::DropCount;
use control::Control;
use control_core::membership::{LocalFacts, MembershipState};
use enforcement::{Enforcement, FactsOfMesh};
use etcd_schema::{NodeId, PublicKey};
use kernel::{Kernel, Underlay, UnderlaySelection};
use mesh::{
    address::Family,
    kernel_state,
    path::MacAddress,
    plan::Local,
    problem::{Problem, ProblemCode},
    records::View,
    snapshot::Owner,
    target::Targets,
    tunnel_table,
};
use node_core::{NodeCore, Stance};
use prober::{self, Neighbours, Prober};
use tokio::{
    sync::broadcast,
    time::{MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tunnel::{self, Tunnel, TunnelEvent};

use self::start::watch_kernel;
use super::{
    Outcome, SharedState,
    etcd_names::EtcdNames,
    handshakes::{self, Handshakes},
    pace::Pace,
    proven::Proven,
    published::{Carrier, InForce},
    roamed::Roamed,
    underlay,
    wake::{RETRY, wake_at},
};
use crate::settings::Settings;

/// How often everything is looked over although nothing was heard.
const SWEEP: Duration = Duration::from_secs(30);
/// Events that come together are answered together.
const COALESCE: Duration = Duration::from_millis(20);
/// Mean time between two lists of etcd that prove that the watch loses nothing.
const AUDIT_INTERVAL: Duration = Duration::from_secs(600);
/// How long a start with a cache waits for etcd.
const ETCD_FIRST: Duration = Duration::from_millis(500);
/// How long the first routes wait for policies to be in force.
const POLICIES_FIRST: Duration = Duration::from_secs(5);
/// Settings come many at once, at boot or by `sysctl --system`: they are looked at when all are made.
const SETTINGS_SETTLE: Duration = Duration::from_secs(5);

pub(super) struct Node {
    settings: Settings,
    id: NodeId,
    kernel: Arc<Kernel>,
    tunnel: Tunnel,
    enforcement: Arc<Enforcement>,
    prober: Prober,
    control: Control,
    published: SharedState,
    underlay: Underlay,
    endpoints: Vec<SocketAddr>,
    core: NodeCore,
    facts_of_mesh: FactsOfMesh,
    record_problems: Arc<Vec<Problem>>,
    public_key: PublicKey,
    proven: Proven,
    roamed: Roamed,
    handshakes: Handshakes,
    /// Clocks that make handshakes fail.
    clock_problems: Vec<Problem>,
    /// Peers to call as soon as the tunnel has them.
    to_call: Vec<String>,
    /// What the kernel was last made to be, and what of that it refused.
    desired: Option<kernel_state::Desired>,
    kernel_problems: Vec<Problem>,
    /// Others may have changed the kernel's state since.
    look_at_kernel: bool,
    /// What the tunnel has.
    table: Option<tunnel_table::Table>,
    tunnel_problems: Vec<Problem>,
    /// What the prober has.
    targets: Targets,
    firewall_drops: Vec<DropCount>,
    retry_at: Option<Instant>,
    /// When other programs' rules, and settings, are looked at.
    others: Pace,
    /// The TUN device is gone, or has another name.
    tun_missing: bool,
    etcd_names: EtcdNames,
    /// The thread of the tunnel that is gone.
    failed: Option<&'static str>,
    /// The first routes have waited for the policies.
    policies_awaited: bool,
}

impl Node {
    /// Runs until `stop`, or until this node must not run.
    pub(super) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<Outcome> {
        let mut view = self.control.view.clone();
        let mut status = self.control.status.clone();
        let mut paths = self.prober.states();
        let mut tunnel_events = self.tunnel.subscribe();
        let mut kernel_events = watch_kernel(&self.kernel, Arc::clone(&self.enforcement), stop.clone())?;
        let mut sweep = interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // What etcd says now goes before what the cache says, which may lack the last second before a crash: what is in
        // the kernel is not taken back for it. An error only means that nothing will come.
        let known = async {
            // What these return locks the value: it must not live on, or the control plane waits for it.
            drop(view.wait_for(|view| view.synced).await);
            drop(status.wait_for(|status| status.holds_identity).await);
        };
        let _ = timeout(ETCD_FIRST, known).await;
        let mut seen = view.borrow_and_update().clone();
        self.see(&seen);
        self.etcd_names.look_up(&self.settings.etcd.endpoints).await;
        let mut told_ready = false;
        loop {
            let began = Instant::now();
            self.apply(began).await;
            self.published.pulse.loop_came_round(Instant::now());
            if !std::mem::replace(&mut told_ready, true) {
                // Whether the node forwards yet is for /readyz to say: etcd may run in a pod that starts after this.
                // Without systemd nobody hears it.
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
            }
            self.keep_endpoints();
            if let Some(thread) = self.failed {
                anyhow::bail!("the tunnel thread {thread} ended unexpectedly; this is a bug, the daemon restarts");
            }
            let wake_at = self.wake_at(began);
            tokio::select! {
                // In this order: what ends because of `stop` is no failure, and the clock is not drowned by events.
                biased;
                () = stop.cancelled() => {
                    self.control.stop().await;
                    return Ok(Outcome::Done);
                }
                _ = sweep.tick() => self.sweep().await,
                changed = view.changed() => changed.context("control plane ended unexpectedly")?,
                changed = status.changed() => changed.context("control plane ended unexpectedly")?,
                changed = paths.changed() => changed.context("prober ended unexpectedly")?,
                event = tunnel_events.recv() => self.tunnel_event(event),
                events = kernel_events.recv() => self.kernel_events(events.context("kernel watch ended unexpectedly")?).await,
                () = sleep_until(wake_at.into()) => {}
            }
            // What comes together is answered together.
            tokio::time::sleep(COALESCE).await;
            while let Ok(event) = tunnel_events.try_recv() {
                self.tunnel_event(Ok(event));
            }
            while let Ok(events) = kernel_events.try_recv() {
                self.kernel_events(events).await;
            }
            let newest = view.borrow_and_update().clone();
            if !Arc::ptr_eq(&newest, &seen) {
                self.see(&newest);
                seen = newest;
            }
            self.core.observed.paths = paths.borrow_and_update().clone();
        }
    }

    /// Takes in what etcd says, as far as it may be acted on.
    fn see(&mut self, view: &View) {
        let usable = self.control.cached.is_some_and(|cached| cached.usable);
        for peer in self.core.see(view, usable) {
            self.tunnel.restarted(&peer.to_string());
        }
        if view.synced || usable {
            self.record_problems = Arc::clone(&view.problems);
        }
    }

    /// When the loop makes its next pass although it hears nothing; the last one began at `began`.
    fn wake_at(&self, began: Instant) -> Instant {
        let (lingering, saves) = (self.core.next_deadline(), [self.roamed.save_at(), self.handshakes.save_at()]);
        let deadlines = [lingering, self.retry_at, self.others.due()].into_iter().chain(saves);
        let now = Instant::now();
        wake_at(deadlines, began, now).unwrap_or(now + SWEEP)
    }

    /// Makes the plan and applies what differs.
    async fn apply(&mut self, now: Instant) {
        let due = self.retry_at.is_some_and(|at| at <= now);
        if due {
            self.retry_at = None;
        }
        self.look_at_kernel |= self.others.take_due(now);
        if self.tun_missing {
            self.reopen_tun(now);
        }
        if matches!(self.control.status.borrow().state, MembershipState::SubnetLost { .. }) {
            // The kernel tells nothing of others' routes: it is asked until the last container is gone.
            self.retry_at = Some(now + RETRY);
        }
        if self.retry_at.is_some() {
            self.read_attached().await;
        }
        // Once: what it is acted on may not be another state than what it was judged by.
        let status = self.control.status.borrow().clone();
        let stance = self.core.stance(&status);
        // What an earlier run left stands: its floor keeps pods' packets from leaving in the clear.
        let waits = match stance {
            Stance::Uninformed => Some(self.uninformed()),
            Stance::Unconfirmed => Some(unconfirmed_identity()),
            Stance::Cloned | Stance::Acts => None,
        };
        if let Some(problem) = waits {
            self.published.set(InForce { problems: vec![problem], ..InForce::default() });
            return;
        }
        self.core.act_on(&status);
        self.tell_enforcement(now);
        if !self.await_policies().await {
            self.retry_at = Some(now + RETRY);
            self.published.set(InForce { problems: vec![unguarded()], ..InForce::default() });
            return;
        }
        let local =
            underlay::local(&self.settings, &self.underlay, self.etcd_names.addresses(), !self.endpoints.is_empty());
        let targets = self.core.targets(&local);
        if targets != self.targets {
            // A path that was in use before a restart stays in use: its state must be known before routes are made.
            let neighbours = self.neighbours_at_start(&local).await;
            self.core.observed.paths = self.prober.set_targets(targets.clone(), &neighbours);
            self.targets = targets;
            self.tell_enforcement(now);
        }
        let mut planned = self.core.plan(now, &local);
        planned.kernel.pods = self.pod_interfaces();
        self.apply_tunnel(&planned.tunnel);
        if !self.to_call.is_empty() && !planned.tunnel.peers.is_empty() {
            self.tunnel.call(&std::mem::take(&mut self.to_call));
        }
        let look = std::mem::take(&mut self.look_at_kernel) || due;
        if look || self.desired.as_ref() != Some(&planned.kernel) {
            self.reconcile(&planned.kernel, look, now).await;
            self.desired = Some(planned.kernel.clone());
        }
        let mut problems: Vec<Problem> = self.tunnel_problems.iter().chain(&self.kernel_problems).cloned().collect();
        if self.underlay == Underlay::default() {
            let cause = "no underlay interface: there is no default route, or the interface of --iface does not exist";
            problems.push(Problem::new(
                ProblemCode::NoUnderlay,
                cause,
                "bring the interface up, or select another one with --iface",
            ));
        }
        problems.extend(self.clock_problems.iter().cloned());
        self.write_subnet_env(&planned, &mut problems);
        self.published.set(InForce {
            snapshot: self.core.snapshot().clone(),
            subnet_holds: !self.core.picture().snapshot().own_subnets.is_empty(),
            alive: self.core.alive().clone(),
            plan: Some(planned),
            own_endpoints: self.endpoints.clone(),
            record_problems: Arc::clone(&self.record_problems),
            problems,
            firewall_drops: self.firewall_drops.clone(),
            underlay: self.carriers(),
        });
    }

    /// The neighbours on the underlay, by interface, as long as there are paths to resume.
    async fn neighbours_at_start(&self, local: &Local) -> HashMap<u32, Neighbours> {
        let mut all: HashMap<u32, Neighbours> = HashMap::new();
        if !self.core.observed.direct_at_start.is_empty() {
            for (family, link) in &local.underlay {
                all.entry(link.index).or_default().extend(read_neighbours(&self.kernel, link.index, *family).await);
            }
        }
        all
    }

    /// Tells enforcement what the mesh looks like, and where its nodes are proven to be.
    fn tell_enforcement(&mut self, now: Instant) {
        self.proven.follow(now, &self.core.observed.paths, &self.targets);
        let addresses: Vec<IpAddr> = underlay::own_addresses(&self.underlay).collect();
        let (mesh, me) = ((self.core.picture().view(), self.core.snapshot()), (&self.id, &self.settings.node));
        self.enforcement.mesh(self.facts_of_mesh.of(mesh, self.proven.addresses(), me, &addresses));
    }

    /// The interfaces that carry the outer packets.
    fn carriers(&self) -> Vec<Carrier> {
        let links = Family::BOTH.into_iter().filter_map(|family| underlay::of(&self.underlay, family));
        let carriers: BTreeSet<Carrier> =
            links.map(|link| Carrier { name: link.name.to_string(), mtu: link.mtu }).collect();
        carriers.into_iter().collect()
    }

    /// Before the first routes are made, rules must be there that no packet on them passes unjudged. Returns whether they
    /// are. They are waited for once: what they say may be no more yet than that nothing passes.
    async fn await_policies(&mut self) -> bool {
        let mut applied = self.enforcement.applied();
        if !std::mem::replace(&mut self.policies_awaited, true) {
            let first = applied.wait_for(|applied| applied.generation > 0 || applied.refused);
            if timeout(POLICIES_FIRST, first).await.is_err() {
                tracing::warn!("policies are not in force yet; this node's pods are unreachable until then");
            }
        }
        applied.borrow().guarded
    }

    /// Why there is no picture to act on yet.
    fn uninformed(&self) -> Problem {
        let cause = match self.control.cached {
            None => "nothing has been read from etcd yet, and there is no cache of an earlier run".to_owned(),
            Some(cached) => format!(
                "nothing has been read from etcd yet, and the cache is {} s old, more than LeaseTTL: its subnets may \
                 belong to other nodes by now",
                cached.age.as_secs()
            ),
        };
        Problem::new(
            ProblemCode::WaitingForEtcd,
            cause,
            "start etcd; this node forwards packets as soon as it has read etcd",
        )
    }

    /// Gives the tunnel its table, if it is another one.
    fn apply_tunnel(&mut self, table: &tunnel_table::Table) {
        if self.table.as_ref() == Some(table) {
            return;
        }
        let refused = self.tunnel.apply(table.clone());
        self.tunnel_problems = refused
            .iter()
            .map(|refused| {
                let cause = format!("{}: {}", refused.peer, refused.reason);
                Problem::new(
                    ProblemCode::TunnelRefused,
                    cause,
                    "a key or prefix may belong to one record only: remove it from \
                     the wrong record below nodes/ or peers/",
                )
            })
            .collect();
        self.table = Some(table.clone());
    }

    fn tunnel_event(&mut self, event: Result<TunnelEvent, broadcast::error::RecvError>) {
        match event {
            Ok(TunnelEvent::TunGone) => self.tun_missing = true,
            Ok(TunnelEvent::Failed { thread }) => self.failed = Some(thread),
            Ok(TunnelEvent::Handshake { peer }) => {
                tracing::debug!(peer = self.name_of(&peer), "handshake completed");
                self.handshakes.changed(Instant::now());
            }
            Ok(TunnelEvent::Endpoint { peer, endpoint }) => {
                tracing::info!(peer = self.name_of(&peer), %endpoint, "endpoint moved");
                self.roamed.note(Instant::now(), &peer, endpoint);
                self.proven.heard(Instant::now(), &peer, endpoint);
            }
            Ok(TunnelEvent::PeerMtu { .. }) => self.read_mtus(),
            Err(broadcast::error::RecvError::Lagged(_)) => {
                self.read_mtus();
                self.proven.resync(Instant::now(), self.tunnel.heard_from());
            }
            Err(broadcast::error::RecvError::Closed) => {}
        }
    }

    /// The name of a peer of the tunnel, for people.
    fn name_of(&self, owner: &str) -> String {
        let member = Owner::named(owner).and_then(|owner| self.core.snapshot().members.get(&owner));
        member.map_or_else(|| owner.to_owned(), |member| member.name.clone())
    }

    /// Only what is below the device's MTU: else a larger one that comes with a new config would not reach the routes.
    fn read_mtus(&mut self) {
        let Some(table) = &self.table else { return };
        let peers = self.tunnel.peers().into_iter().filter(|peer| peer.inner_mtu < table.mtu);
        self.core.observed.inner_mtu = peers.map(|peer| (peer.name, peer.inner_mtu)).collect();
    }

    /// Keeps for the next start which peers there are sessions with, and what was seen of their handshakes.
    fn keep_handshakes(&mut self) {
        let (peers, seen, clock) = (self.tunnel.peers(), self.tunnel.seen_stamps(), SystemTime::now());
        self.clock_problems = handshakes::ahead(&peers, &seen, clock, |peer| self.name_of(peer));
        self.clock_problems.extend(self.handshakes.behind(clock));
        self.handshakes.keep(Instant::now(), &peers, &seen, clock);
    }

    /// Keeps where peers are for the next start.
    fn keep_endpoints(&mut self) {
        let now = Instant::now();
        if self.handshakes.save_at().is_some_and(|at| at <= now) {
            self.keep_handshakes();
        }
        self.roamed.save_if_due(now, self.table.as_ref().map(|table| &table.peers));
    }

    /// Makes the TUN device again, when it is gone or has another name.
    fn reopen_tun(&mut self, now: Instant) {
        match self.tunnel.reopen_tun() {
            Ok(()) => {
                tracing::warn!(interface = %self.settings.interface, "TUN device was removed; recreated");
                self.tun_missing = false;
            }
            Err(error) => {
                tracing::error!(%error, interface = %self.settings.interface, "cannot create the TUN device; retrying");
                self.retry_at = Some(now + RETRY);
            }
        }
        self.look_at_kernel = true;
    }

    /// What is looked at although nothing was heard.
    async fn sweep(&mut self) {
        self.look_at_kernel = true;
        self.enforcement.look();
        self.read_underlay().await;
        self.read_attached().await;
        self.etcd_names.look_up(&self.settings.etcd.endpoints).await;
        self.read_mtus();
        self.proven.resync(Instant::now(), self.tunnel.heard_from());
        self.keep_handshakes();
        if let Ok(drops) = self.kernel.drops().await {
            self.firewall_drops = drops
                .into_iter()
                .map(|(rule, counter)| DropCount { reason: format!("firewall_{rule}"), packets: counter.packets })
                .collect();
        }
    }
}

/// Why there are no routes although the mesh is known.
fn unguarded() -> Problem {
    Problem::new(
        ProblemCode::PodsNotGuarded,
        "nftables refuses the rules that protect this node's pods, so no routes are installed; see the log",
        "install nftables, and check that the kernel supports nf_tables; the daemon retries",
    )
}

/// Why there are no routes and no peers although the mesh is known.
fn unconfirmed_identity() -> Problem {
    Problem::new(
        ProblemCode::IdentityUnconfirmed,
        "another daemon may be running with this node's identity: no handshakes are initiated until etcd rules that \
         out, for at most 5 s",
        "none needed: if another daemon is running, the problem `cloned` follows",
    )
}

fn selection(settings: &Settings) -> UnderlaySelection {
    settings.iface.clone().map_or(UnderlaySelection::Auto, UnderlaySelection::Named)
}

fn facts(settings: &Settings, public_key: PublicKey, underlay: &Underlay, endpoints: &[SocketAddr]) -> LocalFacts {
    let public = |family| endpoints.iter().map(SocketAddr::ip).find(|ip| Family::of(*ip) == family);
    LocalFacts {
        name: settings.node.clone(),
        site: settings.site.clone(),
        cluster: settings.cluster.clone(),
        public_key,
        next_public_key: None,
        listen_port: settings.listen_port,
        endpoints: endpoints.to_vec(),
        addresses: underlay::addresses(underlay),
        public_ipv4: public(Family::V4).and_then(|ip| if let IpAddr::V4(ip) = ip { Some(ip) } else { None }),
        public_ipv6: public(Family::V6).and_then(|ip| if let IpAddr::V6(ip) = ip { Some(ip) } else { None }),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        readiness: None,
    }
}

/// The neighbours of one family on an interface. What cannot be read is not known: a path in doubt is left then.
async fn read_neighbours(kernel: &Kernel, interface: u32, family: Family) -> Neighbours {
    let known = kernel.neighbours(interface, family == Family::V4).await.unwrap_or_default();
    known.into_iter().map(|(address, neighbour)| (address, MacAddress(neighbour.mac))).collect()
}
