//! Inputs, effects and initial state of the node's state machine.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use control_core::core::{CacheInfo, ControlStatus};
use etcd_schema::{NodeId, SubnetKey};
use ipnet::IpNet;
use mesh::{
    interface::InterfaceName,
    kernel_state::{Desired, OthersRules, PrefixOn, SeenOthers},
    plan::{Local, Observed, Plan},
    problem::Problem,
    records::Records,
    topology::PeerId,
    tunnel_table::TunnelTable,
};

/// What the node starts with.
#[derive(Debug)]
pub struct NodeStart {
    /// Who it is.
    pub id: NodeId,
    /// What is known from an earlier run.
    pub observed: Observed,
    /// Sources that an earlier run accepted direct.
    pub accepted: Vec<PrefixOn>,
    /// Tunnel peers, by name, that an earlier run had sessions with.
    pub talking: Vec<String>,
    /// The cache that the first records come from.
    pub cache: Option<CacheInfo>,
    /// This machine.
    pub local: Local,
}

/// What happened. All but [`Pass`](Self::Pass) and [`Done`](Self::Done) is only taken note of: what comes together is
/// answered together, by the next pass.
#[derive(Debug)]
pub enum Input {
    /// Records in force.
    Records(Arc<Records>),
    /// How this node stands with etcd.
    Status(Box<ControlStatus>),
    /// This machine: settings, underlay, addresses of etcd.
    Local(Box<Local>),
    /// The host's ends of attached pods' interfaces.
    Pods(Vec<InterfaceName>),
    /// The largest inner packet of tunnel peers, in bytes, by name.
    PeerMtus(BTreeMap<String, u16>),
    /// The TUN device is gone, or has another name.
    TunGone,
    /// State of the kernel that a plan makes may have changed; `addresses`: or links, addresses, routes did.
    KernelChanged {
        /// Underlay and attached containers may be others.
        addresses: bool,
    },
    /// Other programs' nftables rules may have changed; `settings`: or kernel settings did.
    OthersChanged {
        /// Settings come many at once.
        settings: bool,
    },
    /// Everything is looked at although nothing was heard.
    Sweep,
    /// Something came, or a deadline has passed.
    Pass,
    /// The outcome of the work that the last step asked for.
    Done(Done),
}

/// What to do: `at_once` in this order, then `work`, whose outcome is the next input.
#[derive(Debug, Default)]
pub struct Effects {
    /// What has no outcome that matters.
    pub at_once: Vec<Effect>,
    /// What has one.
    pub work: Option<Work>,
}

/// What has no outcome that matters here.
#[derive(Debug)]
pub enum Effect {
    /// The daemon of this peer has restarted: this node's session with it predates that.
    Restarted(PeerId),
    /// Handshakes with these tunnel peers are initiated at once.
    Call(Vec<String>),
    /// Policies learn of the mesh as [`NodeCore::mesh`](crate::NodeCore::mesh) shows it.
    TellEnforcement,
    /// The underlay is read; [`Input::Local`] follows.
    ReadUnderlay,
    /// Whether containers hold addresses of this node's subnets is read, for the control plane.
    ReadAttached {
        /// The one in use, or the one that was lost.
        subnet: Option<SubnetKey>,
        /// Others, which the node keeps for what is attached.
        earlier: Vec<SubnetKey>,
    },
    /// Status and metrics show the outcome of a pass.
    Show(Box<PassOutcome>),
}

/// What a pass came to.
#[derive(Debug, Default)]
pub struct PassOutcome {
    /// What is in force; `None`: this node waits, and the kernel stays as it is.
    pub plan: Option<Plan>,
    /// What is wrong on this machine.
    pub problems: Vec<Problem>,
}

/// What has an outcome.
#[derive(Debug)]
pub enum Work {
    /// Makes the TUN device, under its name.
    ReopenTun,
    /// Waits until policies are in force or refused, at most so long.
    AwaitPolicies(Duration),
    /// Gives the tunnel its table.
    ApplyTable(TunnelTable),
    /// Makes the kernel's state what is desired.
    Reconcile {
        /// The state.
        desired: Box<Desired>,
        /// Something may have changed in the kernel that was not reported.
        look: bool,
        /// Whether other programs' rules may be read.
        others: OthersRules,
    },
    /// Keeps `RUN/subnet.env`.
    SubnetEnv(SubnetEnvChange),
}

/// What becomes of `RUN/subnet.env`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SubnetEnvChange {
    /// It says this.
    Write {
        /// The networks of the mesh.
        networks: Vec<IpNet>,
        /// This node's subnets.
        subnets: Vec<IpNet>,
        /// MTU of pods, in bytes.
        mtu: u16,
    },
    /// Its subnet is another node's: plugins that read it would go on giving out addresses of it.
    Remove,
}

/// What came of a [`Work`] of the same name.
#[derive(Debug)]
pub enum Done {
    /// Whether the TUN device is there.
    TunReopened(bool),
    /// Whether rules stand that no packet passes unjudged.
    Policies {
        /// They do.
        guarded: bool,
    },
    /// What the tunnel refused.
    TableApplied(Vec<Problem>),
    /// What a pass over the kernel's state came to.
    Reconciled(Reconciled),
    /// Why the file is not as it is to be.
    SubnetEnv(Option<Problem>),
}

/// What a pass over the kernel's state came to.
#[derive(Debug, Default)]
pub struct Reconciled {
    /// What the kernel refused, and what was found of other programs.
    pub problems: Vec<Problem>,
    /// Something failed: it is tried again.
    pub failed: bool,
    /// The TUN device is not there.
    pub no_tun: bool,
    /// The routes are what is desired.
    pub routes: bool,
    /// What was seen of other programs' rules; `None`: nothing, the state could not be read.
    pub others: Option<SeenOthers>,
}
