//! Policy enforcement: from records in etcd to verdicts on packets.
//!
//! ```text
//! control ─▶ ObjectChanges ───────┐                             ┌─▶ ActivePolicy ─▶ Ingress, Egress: tunnel hooks
//! node loop ─▶ MeshFacts ─────────┼▶ Mailbox ─▶ policy thread ──┤
//! attachments ─▶ AttachmentTable ─┘        worker ⇄ PolicyCore  └─▶ Applied: progress, for status and CNI plugin
//! ```
//!
//! This node's own attachments come from their table and never from etcd: policies apply before their first packet, and
//! also during an etcd outage.
//!
//! One thread owns the engine. Its pending input is the newest state of each key, so it is bounded by the number of
//! keys, regardless of the rate of changes. Until it has a complete set of inputs, nothing passes the hooks, not even
//! in audit mode.
//!
//! The kernel's conntrack is the authority on flows; `gate::PolicyGate` holds the tunnel's cache of it. Lock order:
//! either direction's thread takes the gate's table once per batch, and waits for nothing while it holds it.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may begin at any instant"))]

mod conntrack;
mod core;
mod explain;
#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "a shell reads the clock"))]
mod gate;
mod host;
mod input;
#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "a shell reads the clock"))]
mod mailbox;
mod masqueraded;
mod mesh_facts;
#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "a shell reads the clock"))]
mod nflog;
mod policy_inputs;
#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "a shell reads the clock"))]
mod problems;
mod ruleset;
#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "a shell reads the clock"))]
mod samples;
mod sources;
#[expect(unsafe_code, reason = "a call of the C library")]
mod sys;
mod unmatched;
#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "a shell reads the clock"))]
mod worker;

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use attachments::AttachmentTable;
use cni::environment::AttachmentName;
use control_core::objects::ObjectSink;
use etcd_schema::NodeId;
use ipnet::IpNet;
use policy::engine::Classifier;
use tokio::sync::watch;
use tunnel::{Judge, Track};

use self::{
    gate::PolicyGate,
    host::Host,
    mailbox::Mailbox,
    nflog::Reports,
    policy_inputs::{PolicyInputs, Query},
    unmatched::Unmatched,
    worker::{Shown, Worker},
};
pub use self::{
    gate::{GateCounts, GateReason},
    mesh_facts::{FactsOfMesh, MeshFacts, NodeFacts, Published},
    problems::bridge_not_filtered,
    sources::{NodeSource, ProvenAddresses},
};

/// How long a question waits for the policy thread, which may be compiling.
const PATIENCE: Duration = Duration::from_secs(5);

/// Options that are fixed from the start.
#[derive(Debug, Clone)]
pub struct Options {
    /// This node.
    pub node: NodeId,
    /// Devices whose packets the tunnel has judged; nftables lets them pass.
    pub judged_by_tunnel: Vec<String>,
    /// The nftables table, of family `inet`, that holds policies and nothing else.
    pub table: String,
    /// Subnets and single addresses of this node's pods in the last run. They are closed until policies are in force,
    /// unless the kernel still has the rules of that run.
    pub last_subnets: Vec<IpNet>,
    /// The group of nfnetlink_log that nftables reports verdicts to.
    pub log_group: u16,
}

/// The policies in force.
#[derive(Debug, Clone)]
pub struct ActivePolicy {
    /// The classifier in force.
    pub classifier: Arc<Classifier>,
    /// The mesh that it was made for.
    pub mesh: Arc<MeshFacts>,
    /// Addresses of this machine in the node's own subnets.
    pub addresses: Arc<BTreeSet<IpAddr>>,
    /// The first generation with this mode and these addresses, which the gate keeps.
    since: u64,
}

/// Progress of enforcement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Applied {
    /// etcd's revision that is in force everywhere on this node; 0: none yet.
    pub revision: i64,
    /// Grows with every change that was put in force.
    pub generation: u64,
    /// Number of known pods.
    pub pods: usize,
    /// Number of policies in force.
    pub policies: usize,
    /// Time from the arrival of the last change until it was in force.
    pub took: Duration,
    /// Generation of this node's attachments that is in force for the tunnel and in the kernel; 0: none yet.
    pub attachments: u64,
    /// The kernel refuses the rules; the previous ones stay in force.
    pub refused: bool,
    /// No packet to or from a pod passes unjudged in the kernel: it has the rules of this run, those of an earlier one,
    /// or ones that deny everything.
    pub guarded: bool,
}

/// The enforcement of policies on this node, running. Stops with [`stop`](Self::stop), or when dropped.
#[derive(Debug)]
pub struct Enforcement {
    mailbox: Arc<Mailbox>,
    gate: Arc<PolicyGate>,
    applied: watch::Receiver<Applied>,
    thread: Mutex<Option<JoinHandle<()>>>,
    host: watch::Receiver<Host>,
    unmatched: watch::Receiver<Unmatched>,
    /// Verdicts that nftables reports, or why it reports none.
    reports: Result<Reports, String>,
}

impl Enforcement {
    /// Starts the policy thread. Nothing passes the hooks before the first complete inputs, and nothing to or from the
    /// pods of its last subnets in the kernel, unless the rules of an earlier run stand there.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(options: Options) -> io::Result<Arc<Self>> {
        let mailbox = Arc::new(Mailbox::default());
        let gate = Arc::new(PolicyGate::new());
        let (applied_in, applied) = watch::channel(Applied::default());
        let group = options.log_group;
        let reports = Reports::start(group, Arc::clone(&gate)).map_err(|error| {
            tracing::warn!(%error, group, "cannot read verdicts of nftables; `meshctl flows` does not show them");
            error.to_string()
        });
        let (host_in, host) = watch::channel(Host::default());
        let (unmatched_in, unmatched) = watch::channel(Unmatched::default());
        let shown = Shown { applied: applied_in, host: host_in, unmatched: unmatched_in };
        let worker = Worker::start(options, Arc::clone(&mailbox), Arc::clone(&gate), shown);
        let thread = std::thread::Builder::new().name("policy".into()).spawn(move || worker.run())?;
        Ok(Arc::new(Self { mailbox, gate, applied, thread: Mutex::new(Some(thread)), host, unmatched, reports }))
    }

    /// The hook for packets that local pods send into the tunnel.
    #[must_use]
    pub fn track(&self) -> Box<dyn Track> {
        Box::new(gate::Egress::new(Arc::clone(&self.gate)))
    }

    /// The hook for packets that come out of the tunnel.
    #[must_use]
    pub fn judge(&self) -> Box<dyn Judge> {
        Box::new(gate::Ingress::new(Arc::clone(&self.gate)))
    }

    /// The mailbox of changed objects, for the control plane.
    #[must_use]
    pub fn sink(&self) -> Arc<dyn ObjectSink> {
        Arc::clone(&self.mailbox) as _
    }

    /// Updates the facts about the mesh. Equal facts are no change.
    pub fn mesh(&self, facts: MeshFacts) {
        self.mailbox.mesh(facts);
    }

    /// Updates the attachments of this node. Nothing is in force before the first call.
    pub fn attachments(&self, table: Arc<AttachmentTable>) {
        self.mailbox.attachments(table);
    }

    /// The policies in force; `None` while the policy thread does not answer.
    #[must_use]
    pub fn policies(&self) -> Option<Vec<api_types::Policy>> {
        self.ask(PolicyInputs::list)
    }

    /// The policy `NAMESPACE/NAME`, or the ClusterNetworkPolicy `NAME`, if it is in force.
    #[must_use]
    pub fn policy(&self, name: &str) -> Option<api_types::ShownPolicy> {
        let name = name.to_owned();
        self.ask(move |world| world.shown(&name))?
    }

    /// Runs a query in the policy thread and waits for its answer, at most [`PATIENCE`].
    fn ask<T: Send + 'static>(&self, look_up: impl FnOnce(&PolicyInputs) -> T + Send + 'static) -> Option<T> {
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        self.mailbox.ask(Query(Box::new(move |world: &PolicyInputs| {
            // The caller may have given up.
            let _gone = answer.send(look_up(world));
        })));
        answered.recv_timeout(PATIENCE).ok()
    }

    /// Notes a transaction of nftables or a changed interface: the policy thread verifies its rules.
    pub fn ruleset_changed(&self) {
        self.mailbox.ruleset_changed();
    }

    /// Attachments of this node whose expected Pod object is not in force, with the value of
    /// [`applied`](Self::applied).
    #[must_use]
    pub fn awaited(&self) -> Arc<BTreeSet<AttachmentName>> {
        Arc::clone(&self.unmatched.borrow().awaited)
    }

    /// Progress of enforcement, now and later.
    #[must_use]
    pub fn applied(&self) -> watch::Receiver<Applied> {
        self.applied.clone()
    }

    /// The policies in force; `None` before the first complete set of inputs.
    #[must_use]
    pub fn in_force(&self) -> Option<ActivePolicy> {
        ActivePolicy::clone_of(&self.gate)
    }

    /// Packet counters of the tunnel's end, by reason.
    #[must_use]
    pub fn counts(&self) -> GateCounts {
        self.gate.counts()
    }

    /// Latest sampled verdicts after number `after`, oldest first.
    #[must_use]
    pub fn samples(&self, after: u64) -> Vec<api_types::FlowSample> {
        self.gate.samples().after(after)
    }

    /// Stops the thread; the policies stay in force.
    pub fn stop(&self) {
        self.mailbox.stop();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("policy thread panicked");
        }
    }
}

impl Drop for Enforcement {
    fn drop(&mut self) {
        self.stop();
    }
}

impl ActivePolicy {
    fn new(classifier: Arc<Classifier>, mesh: Arc<MeshFacts>, addresses: Arc<BTreeSet<IpAddr>>) -> Self {
        let since = classifier.generation();
        Self { classifier, mesh, addresses, since }
    }

    fn clone_of(gate: &PolicyGate) -> Option<Self> {
        gate.in_force().as_ref().clone()
    }
}
