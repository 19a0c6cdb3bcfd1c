//! The main loop: hands inputs to [`NodeCore`], and carries out its effects.

mod carry_out;
mod found;
mod reads;
mod start;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use api_types::DropCount;
use control::Control;
use enforcement::{Enforcement, FactsOfMesh};
use etcd_schema::{NodeId, PublicKey};
use kernel::{Kernel, KernelEvents, Underlay};
use mesh::{path::PathAgents, topology::PeerId};
use node_core::{Effects, Input, NodeCore};
use prober::Prober;
use tokio::{
    sync::broadcast,
    time::{MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tunnel::{Tunnel, TunnelEvent};

pub(super) use self::start::NodeParts;
use self::start::watch_kernel;
use super::{RunOutcome, SharedState, etcd_names::EtcdNames, peer_memory::PeerMemory, underlay};
use crate::settings::Settings;

/// How often everything is looked over although nothing was heard.
const SWEEP: Duration = Duration::from_secs(30);
/// Events that come together are answered together.
const COALESCE: Duration = Duration::from_millis(20);
/// Mean time between two lists of etcd that prove that the watch loses nothing.
const AUDIT_INTERVAL: Duration = Duration::from_secs(600);
/// How long a start with a cache waits for etcd.
const ETCD_FIRST: Duration = Duration::from_millis(500);

pub(super) struct NodeLoop {
    settings: Settings,
    id: NodeId,
    kernel: Arc<Kernel>,
    tunnel: Tunnel,
    enforcement: Arc<Enforcement>,
    prober: Prober,
    control: Control,
    published: SharedState,
    core: NodeCore,
    underlay: Underlay,
    endpoints: Vec<SocketAddr>,
    facts_of_mesh: FactsOfMesh,
    public_key: PublicKey,
    memory: PeerMemory,
    firewall_drops: Vec<DropCount>,
    etcd_names: EtcdNames,
    /// The thread of the tunnel that is gone.
    failed: Option<&'static str>,
}

impl NodeLoop {
    /// Runs until `stop`, or until this node must not run.
    pub(super) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<RunOutcome> {
        let mut records = self.control.records.clone();
        let mut status = self.control.status.clone();
        let mut tunnel_events = self.tunnel.subscribe();
        let mut kernel_events = watch_kernel(&self.kernel, Arc::clone(&self.enforcement), stop.clone())?;
        let mut sweep = interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // What etcd says now goes before what the cache says, which may lack the last second before a crash: what is in
        // the kernel is not taken back for it. An error only means that nothing will come.
        let known = async {
            // What these return locks the value: it must not live on, or the control plane waits for it.
            drop(records.wait_for(|records| records.synced).await);
            drop(status.wait_for(|status| status.holds_identity).await);
        };
        let _ = timeout(ETCD_FIRST, known).await;
        let mut seen = records.borrow_and_update().clone();
        self.step(Input::Records(Arc::clone(&seen))).await;
        self.etcd_names.look_up(&self.settings.etcd.reread().endpoints).await;
        let mut told_ready = false;
        loop {
            self.pass().await;
            self.published.watchdog.loop_alive(Instant::now());
            if !std::mem::replace(&mut told_ready, true) {
                // Whether the node forwards yet is for /readyz to say: etcd may run in a pod that starts after this.
                // Without systemd there is no listener.
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
            }
            self.save_memory();
            if let Some(thread) = self.failed {
                anyhow::bail!("the tunnel thread {thread} ended unexpectedly; this is a bug, the daemon restarts");
            }
            let deadlines = [self.core.next_deadline(), self.memory.next_deadline()];
            let wake_at = deadlines.into_iter().flatten().min().unwrap_or_else(|| Instant::now() + SWEEP);
            tokio::select! {
                // In this order: what ends because of `stop` is no failure, and the clock is not drowned by events.
                biased;
                () = stop.cancelled() => {
                    self.control.stop().await;
                    return Ok(RunOutcome::Done);
                }
                _ = sweep.tick() => self.sweep().await,
                changed = records.changed() => changed.context("control plane ended unexpectedly")?,
                changed = status.changed() => changed.context("control plane ended unexpectedly")?,
                () = self.prober.path_changed() => {}
                event = tunnel_events.recv() => self.tunnel_event(event).await,
                events = kernel_events.recv() => {
                    self.kernel_events(events.context("kernel watch ended unexpectedly")?).await;
                }
                () = sleep_until(wake_at.into()) => {}
            }
            // What comes together is answered together.
            tokio::time::sleep(COALESCE).await;
            while let Ok(event) = tunnel_events.try_recv() {
                self.tunnel_event(Ok(event)).await;
            }
            while let Ok(events) = kernel_events.try_recv() {
                self.kernel_events(events).await;
            }
            let newest = records.borrow_and_update().clone();
            if !Arc::ptr_eq(&newest, &seen) {
                self.step(Input::Records(Arc::clone(&newest))).await;
                seen = newest;
            }
        }
    }

    /// A pass, over what is the case now.
    async fn pass(&mut self) {
        self.read_earlier_neighbours().await;
        let names = self.etcd_names.addresses();
        let local = underlay::local(&self.id, &self.settings, &self.underlay, names, !self.endpoints.is_empty());
        self.step(Input::Local(Box::new(local))).await;
        self.step(Input::Pods(self.pod_interfaces())).await;
        // Once: what is acted on may not be another state than what it was judged by.
        let status = self.control.status.borrow().clone();
        self.step(Input::Status(Box::new(status))).await;
        self.step(Input::Pass).await;
    }

    /// Steps until no work has an outcome any more.
    async fn step(&mut self, input: Input) {
        let mut input = Some(input);
        while let Some(happened) = input.take() {
            let core = &mut self.core;
            let step = |agents: &mut PathAgents| core.step(Instant::now(), happened, agents);
            let Effects { at_once, work } = self.prober.with_agents(step);
            for effect in at_once {
                self.perform(effect).await;
            }
            if let Some(work) = work {
                input = Some(Input::Done(self.work(work).await));
            }
        }
    }

    async fn tunnel_event(&mut self, event: Result<TunnelEvent, broadcast::error::RecvError>) {
        let now = Instant::now();
        match event {
            Ok(TunnelEvent::TunGone) => self.step(Input::TunGone).await,
            Ok(TunnelEvent::Failed { thread }) => self.failed = Some(thread),
            Ok(TunnelEvent::Handshake { peer }) => {
                tracing::debug!(peer = self.name_of(&peer), "handshake completed");
                self.memory.handshake(now);
            }
            Ok(TunnelEvent::Endpoint { peer, endpoint }) => {
                tracing::info!(peer = self.name_of(&peer), %endpoint, "endpoint moved");
                self.memory.endpoint(now, &peer, endpoint);
            }
            Ok(TunnelEvent::PeerMtu { .. }) => self.read_mtus().await,
            Err(broadcast::error::RecvError::Lagged(_)) => {
                self.read_mtus().await;
                self.memory.resync(now, &self.tunnel);
            }
            Err(broadcast::error::RecvError::Closed) => {}
        }
    }

    async fn kernel_events(&mut self, events: KernelEvents) {
        let addresses = events.links || events.addresses || events.routes || events.resync;
        let input = match events.can_wait() {
            true => Input::OthersChanged { settings: events.settings },
            false => Input::KernelChanged { addresses },
        };
        self.step(input).await;
    }

    /// What is looked at although nothing was heard.
    async fn sweep(&mut self) {
        self.enforcement.ruleset_changed();
        self.step(Input::Sweep).await;
        self.etcd_names.look_up(&self.settings.etcd.reread().endpoints).await;
        self.read_mtus().await;
        self.memory.resync(Instant::now(), &self.tunnel);
        self.keep_handshakes();
        self.read_drops().await;
    }

    /// Keeps for the next start what is due of the memory of peers.
    fn save_memory(&mut self) {
        let now = Instant::now();
        if self.memory.handshakes_due(now) {
            self.keep_handshakes();
        }
        self.memory.save_endpoints(now, self.core.table().map(|table| &table.peers));
    }

    fn keep_handshakes(&mut self) {
        let mesh = self.core.mesh();
        self.memory.keep_handshakes(Instant::now(), &self.tunnel, |peer| name_of(mesh, peer));
    }

    /// The name of a peer of the tunnel, for people.
    fn name_of(&self, peer: &str) -> String {
        name_of(self.core.mesh(), peer)
    }
}

fn name_of(mesh: &node_core::MeshState, peer: &str) -> String {
    let member = PeerId::named(peer).and_then(|owner| mesh.topology().members.get(&owner));
    member.map_or_else(|| peer.to_owned(), |member| member.name.clone())
}
