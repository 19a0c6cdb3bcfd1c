//! One pass: read, compare, apply.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{MutexGuard, PoisonError},
};

use mesh::{
    interface::InterfaceName,
    kernel_state::{Desired, Floor, OthersRules, SeenOthers},
};
use netfilter::{Counter, NftMonitor, TableChanges};
use thiserror::Error;
use tracing::{debug, info};

use super::{
    Kernel,
    change::KernelChange,
    failure::{Failure, FailureCause},
    firewall,
    foreign::{self, Foreign, ForeignDrop, Met},
    netlink::{self, Rtnetlink, RtnetlinkError},
    nft::{NftBackend as _, NftTableError, NftTransaction, ObservedTable},
    observed::ObservedKernel,
    plan::{self, differing, plan, routes_after},
    policy_table, sysctl, vxlan,
};

/// The result of a pass.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PassReport {
    /// The changes made, in order; empty if nothing differed.
    pub changes: Vec<KernelChange>,
    /// Changes that failed.
    pub failures: Vec<Failure>,
    /// Foreign chains that drop forwarded mesh packets.
    pub foreign_drops: Vec<ForeignDrop>,
    /// The underlay's interface, where its own setting keeps the kernel from forwarding IPv4 packets that arrive on it.
    pub not_forwarding: Option<InterfaceName>,
    /// Foreign chains that give pods' packets another source, or drop probes.
    pub met: Vec<Met>,
    /// The reading that the last three fields come from.
    pub others: SeenOthers,
}

/// Why a pass could not even read the state. Nothing was changed.
#[derive(Debug, Error)]
pub enum ReconcileError {
    /// Reading links, addresses, routes or rules failed.
    #[error(transparent)]
    Netlink(#[from] RtnetlinkError),
}

/// The ruleset without policies, valid until another change is reported: our table, and the others as last read.
#[derive(Debug)]
pub(super) struct KnownRuleset {
    monitor: NftMonitor,
    table: Option<ObservedTable>,
}

/// The kernel state after a pass without failures, except routes and our table, which are as desired.
#[derive(Debug)]
pub(super) struct Settled {
    desired: Desired,
    observed: ObservedKernel,
    foreign_drops: Vec<ForeignDrop>,
    not_forwarding: Option<InterfaceName>,
    met: Vec<Met>,
}

/// How certain a pass is of the ruleset.
#[derive(Debug)]
enum ReadRuleset {
    /// Our own table could not be read.
    Unreadable,
    /// Read, but possibly changed by others since.
    Sometime,
    /// All of it is so unless this hears of something.
    While(NftMonitor),
}

impl ReadRuleset {
    fn is_known(&self) -> bool {
        !matches!(self, Self::Unreadable)
    }
}

impl Kernel {
    /// Brings the kernel's state to `desired`. A failed step does not stop the others, except that steps that let
    /// packets pass wait for the firewall.
    ///
    /// # Errors
    /// [`ReconcileError`], when the state could not be read.
    pub async fn reconcile(&self, desired: &Desired, others: OthersRules) -> Result<PassReport, ReconcileError> {
        *self.settled() = None;
        let netlink = Rtnetlink::open_known(&self.ports)?;
        let mut report = PassReport::default();
        let (observed, ruleset) = self.observe(&netlink, desired, others, &mut report).await?;
        let plan = plan(&self.options, desired, &observed);
        report.failures.extend(plan.failures);
        let firewall_changes = plan.changes.iter().filter(|change| change.is_firewall()).count();
        let known = ruleset.is_known();
        self.apply(&netlink, plan.changes, known, &mut report).await;
        self.cache_ruleset(desired, &observed, ruleset, firewall_changes, &report);
        report.foreign_drops = self.foreign_drops(desired, &observed, &report).await;
        report.met = foreign::met(&self.options, desired, &observed.met);
        report.not_forwarding = sysctl::not_forwarding(desired, &observed.sysctls);
        Self::log_changes(&report);
        // Changes other than routes and our table must be read back once.
        if known && report.changes.iter().all(is_followed) {
            self.save_pass(desired, observed, &report);
        }
        Ok(report)
    }

    /// Adds the missing fallback routes of `floor`, removes those of external peers' prefixes that contain a
    /// `protected` address, and changes nothing else. For starts, when only the prefixes of the mesh are known.
    ///
    /// # Errors
    /// [`ReconcileError`], when the routes could not be read.
    pub async fn lay_floor(&self, floor: &Floor, protected: &[IpAddr]) -> Result<PassReport, ReconcileError> {
        *self.settled() = None;
        let netlink = Rtnetlink::open_known(&self.ports)?;
        let routes = netlink.routes(self.options.route_protocol).await?;
        let mut report = PassReport::default();
        // Of these steps none lets a packet pass, so none waits for the firewall.
        self.apply(&netlink, plan::floor(floor, protected, &routes), true, &mut report).await;
        Self::log_changes(&report);
        Ok(report)
    }

    /// Applies the difference between `desired` and the last applied state without reading the kernel: only valid if no
    /// other change was reported since. Falls back to a full pass if more than routes and our nftables table must
    /// change, or if the last pass had failures.
    ///
    /// # Errors
    /// [`ReconcileError`], when the state had to be read and could not be.
    pub async fn apply_changes(&self, desired: &Desired, others: OthersRules) -> Result<PassReport, ReconcileError> {
        let Some(Settled { desired: last, mut observed, foreign_drops, not_forwarding, met }) = self.settled().take()
        else {
            return self.reconcile(desired, others).await;
        };
        if last.vxlan != desired.vxlan {
            // What cannot be changed in a device only a full pass compares.
            return self.reconcile(desired, others).await;
        }
        let (before, after) = differing(&last, desired);
        observed.routes = routes_after(&self.options, &before, &observed);
        observed.table = Some(firewall::render(&self.options, &before).as_observed());
        let plan = plan(&self.options, &after, &observed);
        if !plan.failures.is_empty() || !plan.changes.iter().all(is_followed) {
            return self.reconcile(desired, others).await;
        }
        let mut report = PassReport { foreign_drops, not_forwarding, met, ..PassReport::default() };
        if !plan.changes.is_empty() {
            let firewall_changes = plan.changes.iter().filter(|change| change.is_firewall()).count();
            let known = if firewall_changes > 0 { self.cached_ruleset() } else { None };
            let netlink = Rtnetlink::open_known(&self.ports)?;
            self.apply(&netlink, plan.changes, true, &mut report).await;
            if let Some(known) = known {
                self.cache_ruleset(desired, &observed, ReadRuleset::While(known.monitor), firewall_changes, &report);
            }
        }
        Self::log_changes(&report);
        self.save_pass(desired, observed, &report);
        Ok(report)
    }

    /// Saves the state after a pass without failures.
    fn save_pass(&self, desired: &Desired, observed: ObservedKernel, report: &PassReport) {
        if report.failures.is_empty() {
            let observed = ObservedKernel { routes: Vec::new(), table: None, ..observed };
            let (desired, foreign_drops) = (desired.clone(), report.foreign_drops.clone());
            let (not_forwarding, met) = (report.not_forwarding.clone(), report.met.clone());
            *self.settled() = Some(Settled { desired, observed, foreign_drops, not_forwarding, met });
        }
    }

    fn settled(&self) -> MutexGuard<'_, Option<Settled>> {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs the changes. Failures are the caller's problems, which it logs.
    fn log_changes(report: &PassReport) {
        for change in &report.changes {
            info!(%change, "kernel changed");
        }
    }

    /// The drop counters: `source4`, `source6` (a mesh source on a wrong interface) and `guard4`, `guard6` (a mesh
    /// destination that would have left in clear text). Empty without a table.
    ///
    /// # Errors
    /// [`NftTableError`].
    pub async fn drops(&self) -> Result<BTreeMap<String, Counter>, NftTableError> {
        // To list counters alone, nft reads every element of every table of the machine.
        let table = self.nft.table(&self.options.table_name).await?;
        Ok(table.map(|table| table.counters).unwrap_or_default())
    }

    /// Caches the ruleset after a pass, if it is certain: it was `observed`, all `planned` changes were made, and no
    /// other transaction came since. Policies change with every pod, in tables that no pass reads.
    fn cache_ruleset(
        &self,
        desired: &Desired,
        observed: &ObservedKernel,
        read: ReadRuleset,
        planned: usize,
        report: &PassReport,
    ) {
        let made = report.changes.iter().filter(|change| change.is_firewall()).count();
        let foreign = report.changes.iter().any(|change| matches!(change, KernelChange::Foreign(_)));
        let known = match read {
            ReadRuleset::While(mut monitor) if made == planned && !foreign => {
                let ours = if made == 0 { TableChanges::None } else { TableChanges::Transactions(made) };
                monitor.changes().is_ok_and(|changes| changes == ours).then(|| KnownRuleset {
                    monitor,
                    table: match made {
                        0 => observed.table.clone(),
                        _ => Some(firewall::render(&self.options, desired).as_observed()),
                    },
                })
            }
            _ => None,
        };
        *self.ruleset.lock().unwrap_or_else(PoisonError::into_inner) = known;
        if foreign {
            *self.others_rules() = None;
        }
    }

    /// Why other programs' rules could not be read, the last time.
    fn others_failure(&self) -> MutexGuard<'_, Option<Failure>> {
        self.others_failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other programs' rules as last read; `None`: never, or changed by us since.
    fn others_rules(&self) -> MutexGuard<'_, Option<Foreign>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ruleset as of the last pass, if only policies were committed since.
    fn cached_ruleset(&self) -> Option<KnownRuleset> {
        let mut known = self.ruleset.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        (known.monitor.changes().ok()? == TableChanges::None).then_some(known)
    }

    /// Reads all state that a plan compares. Unreadable parts of nftables or of saved settings become failures.
    async fn observe(
        &self,
        netlink: &Rtnetlink,
        desired: &Desired,
        others: OthersRules,
        report: &mut PassReport,
    ) -> Result<(ObservedKernel, ReadRuleset), ReconcileError> {
        let options = &self.options;
        let mut observed = ObservedKernel::default();
        let mut links = netlink.links().await?;
        let mut made = Vec::new();
        if vxlan::make_devices(options, netlink, desired, &links, &mut made, &mut report.failures).await {
            links = netlink.links().await?;
        }
        report.changes.extend(made.into_iter().map(KernelChange::Vxlan));
        observed.vxlan = vxlan::observe(options, netlink, desired, &links).await?;
        *self.vxlan.lock().unwrap_or_else(PoisonError::into_inner) =
            observed.vxlan.values().map(|device| device.index).collect();
        observed.tun = netlink::tun_among(&links, &options.tun);
        observed.links =
            links.iter().filter(|l| InterfaceName::new(&l.name).is_ok()).map(|l| (l.name.clone(), l.index)).collect();
        if let Some(tun) = &observed.tun {
            observed.addresses = netlink.addresses(Some(tun.index)).await?.into_iter().map(|a| a.address).collect();
        }
        observed.routes = netlink.routes(options.route_protocol).await?;
        observed.rules = netlink.rules(options.route_protocol).await?;
        let advertised = netlink::advertised(netlink, &observed.links).await?;
        observed.sysctls = sysctl::observe(options, desired, &links, advertised, &mut report.failures);
        let read = self.observe_ruleset(&mut observed, others, report).await;
        Ok((observed, read))
    }

    /// Listing a ruleset takes a process: it is done only when there is something new to see.
    async fn observe_ruleset(
        &self,
        observed: &mut ObservedKernel,
        others: OthersRules,
        report: &mut PassReport,
    ) -> ReadRuleset {
        let known = self.cached_ruleset();
        let last = self.others_rules().clone();
        if let (Some(known), Some(last)) = (known, &last) {
            observed.table = known.table;
            Foreign { chains: observed.foreign, met: observed.met } = last.clone();
            return ReadRuleset::While(known.monitor);
        }
        let monitor = NftMonitor::open_others(&policy_table(&self.options.table_name), &self.options.table_name).ok();
        match self.nft.table(&self.options.table_name).await {
            Ok(table) => observed.table = table,
            Err(e) => {
                report.failures.push(firewall_failure(self.table(), &e));
                return ReadRuleset::Unreadable;
            }
        }
        if others == OthersRules::Keep {
            Foreign { chains: observed.foreign, met: observed.met } = last.unwrap_or_default();
            report.others = SeenOthers::Kept;
            report.failures.extend(self.others_failure().clone());
            return ReadRuleset::Sometime;
        }
        report.others = SeenOthers::Read;
        let read = foreign::observe(&self.options, &self.nft).await;
        let failure = read.as_ref().err().map(|e| firewall_failure("other nftables tables".to_owned(), e));
        self.others_failure().clone_from(&failure);
        report.failures.extend(failure);
        let Ok(foreign) = read else {
            Foreign { chains: observed.foreign, met: observed.met } = last.unwrap_or_default();
            return ReadRuleset::Sometime;
        };
        *self.others_rules() = Some(foreign.clone());
        Foreign { chains: observed.foreign, met: observed.met } = foreign;
        match monitor.map(|mut monitor| (monitor.changes(), monitor)) {
            Some((Ok(TableChanges::None), monitor)) => ReadRuleset::While(monitor),
            _ => ReadRuleset::Sometime,
        }
    }

    async fn apply(
        &self,
        netlink: &Rtnetlink,
        changes: Vec<KernelChange>,
        firewall_known: bool,
        report: &mut PassReport,
    ) {
        let mut firewall = firewall_known;
        let mut held = 0usize;
        let mut untried = 0usize;
        for change in changes {
            if change.is_firewall() && !firewall_known {
                continue;
            }
            if !firewall && change.needs_firewall() {
                held += 1;
                continue;
            }
            if netlink.has_ended() && is_netlink(&change) {
                untried += 1;
                continue;
            }
            debug!(%change, "applying");
            match self.apply_one(netlink, &change).await {
                Ok(()) => report.changes.push(change),
                Err(problem) => {
                    firewall &= !matches!(change, KernelChange::FirewallBefore(_));
                    report.failures.push(Failure::new(change.to_string(), problem));
                }
            }
        }
        if held > 0 {
            let changes = if held == 1 { "change" } else { "changes" };
            report
                .failures
                .push(Failure::new(format!("{held} {changes} that would admit packets"), FailureCause::NoFirewall));
        }
        if untried > 0 {
            report.failures.push(Failure::new(
                format!("{untried} changes"),
                FailureCause::Netlink { message: "the connection ended first".to_owned() },
            ));
        }
    }

    async fn apply_one(&self, netlink: &Rtnetlink, change: &KernelChange) -> Result<(), FailureCause> {
        let protocol = self.options.route_protocol;
        match change {
            KernelChange::FirewallBefore(t) | KernelChange::FirewallAfter(t) => self.apply_ruleset(t).await,
            KernelChange::Foreign(edit) => self.apply_ruleset(&edit.transaction).await,
            KernelChange::Mtu { index, mtu } => netlink.set_mtu(*index, *mtu).await,
            KernelChange::TxQueueLen { index, packets } => netlink.set_txqueuelen(*index, *packets).await,
            KernelChange::Up { index, up } => netlink.set_up(*index, *up).await,
            KernelChange::AddressAdd { index, address } => netlink.add_address(*index, *address).await,
            KernelChange::AddressRemove { index, address } => netlink.remove_address(*index, *address).await,
            KernelChange::RouteAdd(route) => netlink.set_route(route, protocol, false).await,
            KernelChange::RouteReplace(route) => netlink.set_route(route, protocol, true).await,
            KernelChange::RouteRemove(route) => netlink.remove_route(route, protocol).await,
            KernelChange::RuleAdd(rule) => netlink.add_rule(rule, protocol).await,
            KernelChange::RuleRemove(rule) => netlink.remove_rule(rule, protocol).await,
            KernelChange::Vxlan(change) => vxlan::apply(&self.options, netlink, change).await,
            KernelChange::Sysctl(setting) => sysctl::apply(&self.options.state_dir, setting),
        }
    }

    async fn apply_ruleset(&self, transaction: &NftTransaction) -> Result<(), FailureCause> {
        self.nft
            .apply(transaction)
            .await
            .map_err(|e| FailureCause::Firewall { remedy: e.remedy(), message: e.to_string() })
    }

    async fn foreign_drops(
        &self,
        desired: &Desired,
        observed: &ObservedKernel,
        report: &PassReport,
    ) -> Vec<ForeignDrop> {
        let answered = |drop: &ForeignDrop| {
            report.changes.iter().any(|change| {
                matches!(change, KernelChange::Foreign(e)
                    if e.accept && e.family == drop.family && e.table == drop.table)
            })
        };
        let mut drops = foreign::unanswered(desired, &observed.foreign);
        drops.retain(|drop| !answered(drop));
        drops.extend(foreign::legacy(desired).await);
        drops
    }

    fn table(&self) -> String {
        format!("nftables table inet {}", self.options.table_name)
    }
}

fn firewall_failure(what: String, error: &NftTableError) -> Failure {
    Failure::new(what, FailureCause::Firewall { message: error.to_string(), remedy: error.remedy() })
}

/// Whether a pass that does not read the kernel's state may make this change.
fn is_followed(change: &KernelChange) -> bool {
    change.is_firewall()
        || matches!(change, KernelChange::RouteAdd(_) | KernelChange::RouteReplace(_) | KernelChange::RouteRemove(_))
}

fn is_netlink(change: &KernelChange) -> bool {
    !change.is_firewall() && !matches!(change, KernelChange::Foreign(_) | KernelChange::Sysctl(_))
}
