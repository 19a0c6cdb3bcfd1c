//! Links, addresses, routes, rules, kernel settings and nftables, by desired-state diff.
//!
//! ```text
//! Desired ─┐
//!          ├─▶ plan (pure) ─▶ [Change] ─▶ apply, one by one ─▶ Report
//! Observed ┘
//! ```
//!
//! [`Kernel::reconcile`] reads our own state (routes and rules by protocol number, all of the TUN device, the nftables
//! table by name), compares it and applies only the difference: over unchanged state it makes no change.
//! [`Kernel::apply_changes`] does the same for changes in `Desired`, provided that nothing else has changed the kernel
//! since. State of other programs stays untouched, with two exceptions, which the same diff maintains and
//! [`Kernel::cleanup`] reverts: sysctls, whose earlier values are kept on disk, and with `forward_accept` one tagged
//! rule in each foreign chain that would drop mesh packets.
//!
//! It fails closed: first `nftables`, then the floor, then rules, then routes. A step that lets packets pass waits
//! until the firewall is in place. Withdrawals go in reverse order.
//!
//! All operations apply to the network namespace of the calling thread.

mod attached;
mod change;
mod cleanup;
mod failure;
mod firewall;
mod foreign;
mod netlink;
pub mod nft;
mod observed;
mod plan;
mod reconcile;
mod route;
#[expect(unsafe_code, reason = "system calls")]
mod sys;
mod sysctl;
mod underlay;
mod vxlan;
pub mod watch;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use mesh::interface::InterfaceName;
use thiserror::Error;

pub use attached::AttachedRoutes;
pub use change::KernelChange;
pub use cleanup::{Cleanup, CleanupError};
pub use failure::{Failure, FailureCause};
pub use foreign::{FirewallProgram, ForeignChain, ForeignDrop, ForeignEdit, Met, RuleEffect, has_table, owner};
pub use netlink::{KernelLink, LinkAddress, MainRoute, ObservedTun, OwnPorts, Rtnetlink, RtnetlinkError, VxlanShape};
pub use nft::{
    BaseChain, Chain, Element, Nft, NftBackend, NftRule, NftSet, NftTable, NftTableError, NftTransaction, ObservedSet,
    ObservedTable, SetKind, TableDiff,
};
pub use observed::{ObservedKernel, ObservedVxlan};
pub use plan::{KernelPlan, plan};
pub use reconcile::{PassReport, ReconcileError};
pub use route::{KernelRoute, KernelRule, NextHop};
pub use sysctl::{Saved, Setting, StateError, Sysctls};
pub use underlay::{Neighbour, Underlay, UnderlayError, UnderlayFamily, UnderlaySelection};
pub use vxlan::{VxlanChange, VxlanStep};
pub use watch::{KernelEvents, KernelWatch};

/// Names and numbers that identify our kernel state. Clean up before they change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The TUN device's name.
    pub tun: InterfaceName,
    /// The routing protocol number of our routes and rules: [`ROUTE_PROTOCOL`] unless set. Every route and rule with it
    /// counts as ours, so no other program may use it (see `/etc/iproute2/rt_protos`).
    pub route_protocol: u8,
    /// The name of our nftables table, of family `inet`. It also tags rules in foreign chains.
    pub table_name: String,
    /// The packet mark that probes carry: `PROBE_MARK` unless set.
    pub probe_mark: u32,
    /// The number of the routing table that probes use.
    pub probe_table: u32,
    /// The place of the rule that leads to it: after `local` (0), before `main` (32766).
    pub rule_priority: u32,
    /// Where earlier values of kernel settings are kept.
    pub state_dir: PathBuf,
}

/// [`Options::route_protocol`], unless set.
pub const ROUTE_PROTOCOL: u8 = 158;

/// The mark of probes. By default no other program acts on its bits: `tests/others.rs` lists theirs.
pub(crate) const PROBE_MARK: u32 = 0x1046;

/// [`Options::table_name`], unless set.
pub const TABLE: &str = "meshd";

impl Options {
    /// The defaults, with a device and a state directory.
    pub fn new(tun: InterfaceName, state_dir: PathBuf) -> Self {
        Self {
            tun,
            route_protocol: ROUTE_PROTOCOL,
            table_name: TABLE.to_owned(),
            probe_mark: PROBE_MARK,
            probe_table: 15_858,
            rule_priority: 15_800,
            state_dir,
        }
    }
}

/// Why [`Kernel::new`] refuses.
#[derive(Debug, Error)]
pub enum KernelError {
    /// An option has a value that cannot work.
    #[error("{option} {value}: {why}")]
    Option {
        /// Which.
        option: &'static str,
        /// Its value.
        value: String,
        /// The limit.
        why: &'static str,
    },
    /// There is no way to talk to the kernel.
    #[error(transparent)]
    Netlink(#[from] RtnetlinkError),
}

/// The kernel's network state, as far as it is ours.
#[derive(Debug)]
pub struct Kernel {
    options: Options,
    nft: Nft,
    /// The ruleset at the end of the last pass.
    ruleset: Mutex<Option<reconcile::KnownRuleset>>,
    /// Other programs' rules as they were read last.
    others: Mutex<Option<foreign::Foreign>>,
    others_failure: Mutex<Option<Failure>>,
    /// The state after the last pass, if certain.
    settled: Mutex<Option<reconcile::Settled>>,
    ports: OwnPorts,
    /// Indices of the VXLAN devices at the last pass, whose entries a watch looks at.
    vxlan: Arc<Mutex<BTreeSet<u32>>>,
}

impl Kernel {
    /// Checks the options and that netlink works, inside a tokio runtime. Changes nothing.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn new(options: Options) -> Result<Self, KernelError> {
        let refuse = |option, value: String, why| Err(KernelError::Option { option, value, why });
        if options.route_protocol <= 4 {
            let why = "0 to 4 are reserved for the kernel and the administrator";
            return refuse("route protocol", options.route_protocol.to_string(), why);
        }
        if !netfilter::is_identifier(&options.table_name) || options.table_name.len() > 20 {
            let why = "must be 1 to 20 letters, digits, - or _, starting with a letter";
            return refuse("table name", options.table_name, why);
        }
        if options.probe_mark == 0 {
            let why = "must not be 0: every packet without a mark would match";
            return refuse("probe mark", options.probe_mark.to_string(), why);
        }
        if matches!(options.probe_table, 0 | 253..=255) {
            let why = "is reserved by the kernel";
            return refuse("probe table", options.probe_table.to_string(), why);
        }
        if !(1..32_766).contains(&options.rule_priority) {
            let why = "must lie between the rules for local (0) and main (32766)";
            return refuse("rule priority", options.rule_priority.to_string(), why);
        }
        Rtnetlink::open()?;
        Ok(Self {
            options,
            nft: Nft::default(),
            ruleset: Mutex::default(),
            others: Mutex::default(),
            others_failure: Mutex::default(),
            settled: Mutex::default(),
            ports: OwnPorts::default(),
            vxlan: Arc::default(),
        })
    }

    /// The options it was made with.
    pub fn options(&self) -> &Options {
        &self.options
    }
}

/// The name of the nftables table that holds policies, beside the one called `table_name`.
#[must_use]
pub fn policy_table(table_name: &str) -> String {
    format!("{table_name}_policy")
}

#[cfg(test)]
mod tests;
