//! Start of the node: the main loop and the tasks beside it.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex},
    time::Instant,
};

use anyhow::Context as _;
use api;
use attachments::{AttachmentTable, Attachments, endpoints, sweep};
use control::{Control, state_dir::StateDir};
use control_core::core::ControlStatus;
use enforcement::{Enforcement, FactsOfMesh};
use etcd_schema::NodeId;
use ipnet::IpNet;
use kernel::{Kernel, KernelEvents, Underlay};
use keys::PrivateKey;
use mesh::{
    address::{Family, prefixes},
    kernel_state::PrefixOn,
    path::PathAgents,
    plan::Observed,
    problem::{Problem, ProblemCode},
    topology::PeerId,
};
use node_core::{NodeCore, NodeStart};
use prober::{self, Neighbours, Prober};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tunnel::Tunnel;

use super::{
    AUDIT_INTERVAL, NodeLoop,
    reads::{facts, read_neighbours, selection},
};
use crate::{
    daemon::{
        SharedState,
        attachment_sync::enforce,
        cached_subnets,
        change_log::log_changes,
        etcd_names::EtcdNames,
        handshakes::Handshakes,
        peer_memory::PeerMemory,
        published::{ApiState, NodeIdentity, NodeState},
        readiness::tell_readiness,
        underlay,
        watchdog::Watchdog,
    },
    settings::Settings,
};

/// What the daemon sets up before the node.
pub(in crate::daemon) struct NodeParts {
    pub(in crate::daemon) settings: Settings,
    pub(in crate::daemon) state: StateDir,
    pub(in crate::daemon) id: NodeId,
    pub(in crate::daemon) private_key: PrivateKey,
    pub(in crate::daemon) kernel: Kernel,
    pub(in crate::daemon) tunnel: Tunnel,
    pub(in crate::daemon) handshakes: Handshakes,
    pub(in crate::daemon) enforcement: Arc<Enforcement>,
    pub(in crate::daemon) attachments: Arc<Attachments>,
}

impl NodeLoop {
    /// Starts everything that runs beside the loop.
    pub(in crate::daemon) async fn start(parts: NodeParts, stop: &CancellationToken) -> anyhow::Result<Self> {
        let NodeParts { settings, state, id, private_key, kernel, tunnel, handshakes, enforcement, attachments } =
            parts;
        let kernel = Arc::new(kernel);
        // An unplugged cable at boot must not prevent the start: the kernel reports the underlay later.
        let underlay = kernel.underlay(&selection(&settings)).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "no underlay yet");
            Underlay::default()
        });
        let (endpoints, public_key) = (underlay::endpoints(&settings, &underlay), private_key.public());
        let facts = facts(&id, &settings, public_key, &underlay, &endpoints);
        let world = NodeProbeEnv { kernel: Arc::clone(&kernel), tunnel: tunnel.clone() };
        let memory = PeerMemory::load(&settings.state_dir, handshakes);
        let direct_at_start = kernel.direct_routes().await.context("cannot read routes")?;
        let accepted: Vec<PrefixOn> = accepted_earlier(&direct_at_start, &underlay).collect();
        let agents = PathAgents::after(direct_at_start);
        let prober = start_prober(settings.listen_port, &id, &private_key, agents, world)?;
        let observed = Observed { roamed: Arc::new(memory.roamed().clone()), ..Observed::default() };
        let attached = kernel.foreign_routes_within(&cached_subnets(&state)).await.context("cannot read routes")?;
        enforce(&attachments, Arc::clone(&enforcement));
        let control = control::start(control::Options {
            etcd: settings.etcd.clone(),
            state,
            run_dir: settings.run_dir.clone(),
            facts,
            attached: !attached.is_empty(),
            objects: Some(enforcement.sink()),
            audit_interval: AUDIT_INTERVAL,
        })
        .map_err(|errors| anyhow::anyhow!(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")))?;
        let published = Arc::new(published(
            &settings,
            &id,
            private_key,
            tunnel.clone(),
            Arc::clone(&enforcement),
            Arc::clone(&attachments),
            &control,
        ));
        start_tasks(&settings, &id, &published, attachments, &control, stop)?;
        let local = underlay::local(&id, &settings, &underlay, &[], !endpoints.is_empty());
        let start =
            NodeStart { id: id.clone(), observed, accepted, talking: memory.talking(), cache: control.cached, local };
        Ok(Self {
            settings,
            core: NodeCore::new(Instant::now(), start),
            facts_of_mesh: FactsOfMesh::default(),
            id,
            kernel,
            tunnel,
            enforcement,
            prober,
            control,
            published,
            underlay,
            endpoints,
            public_key,
            memory,
            firewall_drops: Vec::new(),
            etcd_names: EtcdNames::default(),
            failed: None,
        })
    }
}

/// Starts the API and the tasks that the loop needs no answer of.
fn start_tasks(
    settings: &Settings,
    id: &NodeId,
    published: &SharedState,
    attachments: Arc<Attachments>,
    control: &Control,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let source: Arc<dyn api::Source> = Arc::clone(published) as _;
    Arc::clone(&published.watchdog).spawn(published.tunnel.clone(), stop.clone());
    start_listeners(settings, published, &source, stop);
    tokio::spawn(announce(id.clone(), attachments.table(), control.status.clone(), control.endpoints.clone()));
    tokio::spawn(log_changes(Arc::clone(published), stop.clone()));
    tokio::spawn(tell_readiness(Arc::clone(published), control.facts.clone(), stop.clone()));
    let socket = settings.run_dir.join(api::SOCKET);
    api::serve(&socket, source, Arc::clone(&attachments), settings.pod_wait, stop.clone())?;
    // Its first pass removes attachments that were withdrawn since their files were read.
    tokio::spawn(sweep(attachments, stop.clone()));
    Ok(())
}

/// Probes use the port after the tunnel's.
fn start_prober(
    listen_port: u16,
    id: &NodeId,
    private_key: &PrivateKey,
    agents: PathAgents,
    world: NodeProbeEnv,
) -> anyhow::Result<Prober> {
    let port = listen_port + 1;
    let (mark, own_id) = (world.kernel.options().probe_mark, id.clone());
    let options = prober::Options { port, mark, own_id, private_key: private_key.clone() };
    Prober::start(options, agents, Arc::new(world))
        .with_context(|| format!("cannot bind UDP port {port}: probes use the port after --listen-port"))
}

/// Sources to accept: the prefixes of direct paths of an earlier run over links that still exist.
fn accepted_earlier(direct: &[(IpNet, IpAddr)], underlay: &Underlay) -> impl Iterator<Item = PrefixOn> {
    let links = [&underlay.ipv4, &underlay.ipv6].into_iter().flatten();
    links.flat_map(|link| {
        let here = move |(_, via): &&(IpNet, IpAddr)| link.addresses.iter().any(|own| own.contains(via));
        direct.iter().filter(here).map(|(prefix, _)| PrefixOn { prefix: *prefix, dev: link.name.clone() })
    })
}

/// The state that the API answers from.
fn published(
    settings: &Settings,
    id: &NodeId,
    private_key: PrivateKey,
    tunnel: Tunnel,
    enforcement: Arc<Enforcement>,
    attachments: Arc<Attachments>,
    control: &Control,
) -> ApiState {
    ApiState {
        identity: NodeIdentity {
            name: settings.node.to_string(),
            id: id.to_string(),
            site: settings.site.as_ref().map(ToString::to_string),
            cluster: settings.cluster.clone(),
            public_key: private_key.public(),
            interface: settings.interface.to_string(),
        },
        started: Instant::now(),
        tunnel,
        enforcement,
        control: control.status.clone(),
        etcd_acceptor: control.etcd_acceptor.clone(),
        in_force: Mutex::new(NodeState::default()),
        attachments,
        watchdog: Arc::new(Watchdog::new(Instant::now())),
        etcd: settings.etcd.clone(),
        state_dir: settings.state_dir.clone(),
        private_key,
        warnings: Mutex::default(),
    }
}

/// Publishes the attachments that other nodes need, until either end is gone.
async fn announce(
    id: NodeId,
    mut table: watch::Receiver<Arc<AttachmentTable>>,
    mut status: watch::Receiver<ControlStatus>,
    records: watch::Sender<Option<control_core::endpoints::EndpointRecords>>,
) {
    loop {
        let subnets: Vec<IpNet> = status.borrow_and_update().subnet.iter().flat_map(prefixes).collect();
        let wanted = Arc::new(endpoints(&table.borrow_and_update(), &id, &subnets));
        records.send_if_modified(|known| {
            let other = known.as_ref() != Some(&wanted);
            *known = Some(wanted);
            other
        });
        tokio::select! {
            changed = table.changed() => if changed.is_err() { return },
            changed = status.changed() => if changed.is_err() { return },
        }
    }
}

/// Forwards the kernel's notifications. Each names only kinds of objects, so the queue is small.
pub(super) fn watch_kernel(
    kernel: &Kernel,
    enforcement: Arc<Enforcement>,
    stop: CancellationToken,
) -> anyhow::Result<mpsc::Receiver<KernelEvents>> {
    let mut watch = kernel.watch().context("cannot subscribe to kernel notifications")?;
    let (events_in, events) = mpsc::channel(16);
    tokio::spawn(async move {
        let hand_on = async {
            loop {
                let events = watch.next().await;
                let ruleset = events.ruleset || events.policy_ruleset || events.foreign_ruleset;
                if ruleset || events.ruleset_volume || events.links || events.addresses || events.resync {
                    enforcement.ruleset_changed();
                }
                if events.calls_for_reconcile() && events_in.send(events).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = hand_on => {}
            () = stop.cancelled() => {}
        }
    });
    Ok(events)
}

/// Starts the listeners on TCP and for WireGuard's tools. A listener that cannot start is a problem in status only.
fn start_listeners(
    settings: &Settings,
    published: &SharedState,
    source: &Arc<dyn api::Source>,
    stop: &CancellationToken,
) {
    if let Some(address) = settings.metrics.address {
        let shown = Arc::clone(published);
        let tell = move |error: Option<std::io::Error>| {
            let problem = |error| {
                let cause = format!("cannot serve metrics and health checks on {address}: {error}");
                Problem::new(
                    ProblemCode::MetricsAddress,
                    cause,
                    "free that address, or choose another one with --metrics-addr",
                )
            };
            shown.set_warning(ProblemCode::MetricsAddress, error.map(problem));
        };
        api::monitor(address, settings.metrics.per_peer, Arc::clone(source), stop.clone(), tell);
    }
    if let Some(address) = settings.ui {
        let shown = Arc::clone(published);
        let tell = move |error: Option<std::io::Error>| {
            let problem = |error| {
                let cause = format!("cannot serve the browser page on {address}: {error}");
                Problem::new(ProblemCode::UiAddress, cause, "free that address, or choose another one with --ui-addr")
            };
            shown.set_warning(ProblemCode::UiAddress, error.map(problem));
        };
        api::page(address, Arc::clone(source), stop.clone(), tell);
    }
    let shown = Arc::clone(published);
    let tell = move |error: Option<std::io::Error>| {
        let problem = |error| {
            let cause = format!("`wg show` does not work: {error}");
            Problem::new(
                ProblemCode::WgSocket,
                cause,
                "free this name in /var/run/wireguard, or choose another one with --interface",
            )
        };
        shown.set_warning(ProblemCode::WgSocket, error.map(problem));
    };
    api::wireguard(settings.interface.as_str(), Arc::clone(source), stop.clone(), tell);
}

/// The node's answers to the prober.
struct NodeProbeEnv {
    kernel: Arc<Kernel>,
    tunnel: Tunnel,
}

impl prober::ProbeEnv for NodeProbeEnv {
    async fn neighbours(&self, interface: u32, family: Family) -> Neighbours {
        read_neighbours(&self.kernel, interface, family).await
    }

    fn heard_in_tunnel(&self, peer: &NodeId) -> Option<Instant> {
        self.tunnel.heard(&PeerId::Node(peer.clone()).to_string())
    }

    fn call_in_tunnel(&self, peer: &NodeId) {
        self.tunnel.initiate(&PeerId::Node(peer.clone()).to_string());
    }
}
