//! `subnets/…` and `nodes/ID`: selects, allocates, restores and rewrites, by compare-and-swap only.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use etcd_schema::{
    BackendKind, ClusterNetworks, Key, LeaseData, NetworkConfig, NodeRecord, SubnetKey, SubnetLease, VxlanData,
    WireguardData,
};
use mesh::records::{LeaseId, Revision};
use rand::rngs::StdRng;

use super::{Call, CallAnswer, CallId, Context, Flight, LocalFacts, MembershipState};
use crate::{
    allocator::{self, PoolExhausted},
    store::Store,
    types::{CallError, Compare, EtcdFailure, Transaction, Write},
};

/// How long the store may take to show the outcome of a transaction, before it is listed again.
const CATCH_UP: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct RecordsLane {
    flight: Flight,
    /// The subnet in use; etcd decides whether it is ours.
    own: Option<SubnetKey>,
    /// Why `own` is no longer ours.
    lost: Option<String>,
    exhausted: Option<PoolExhausted>,
    /// The subnet that the transaction in flight claims.
    claims: Option<SubnetKey>,
    uses: Option<LeaseId>,
    wait: Option<Wait>,
    /// The subnet that etcd granted, until the store shows it.
    granted: Option<SubnetKey>,
    relist: bool,
    /// The subnet in use is ours, but no longer matches the configuration.
    outdated: bool,
    /// The changes under `subnets/`, and the subnet in use, at which no [`surplus`] was found: thousands of keys are
    /// not looked through for every change of another one.
    without_surplus: Option<(u64, Option<SubnetKey>)>,
    /// The block that Kubernetes gives this node, as of that many changes under `subnets/`.
    block: Option<(u64, Option<SubnetKey>)>,
}

/// The state that the store must reach before the next transaction.
#[derive(Debug, Clone, Copy)]
enum Wait {
    /// Everything up to this revision; it is overdue at `until`.
    Revision { revision: Revision, until: Instant },
    /// A whole list read after the answer to a transaction was lost: this many in all.
    Lists(u64),
}

/// The state of our subnet's key in etcd.
enum Standing {
    Ours,
    /// The key is not there; nothing is in its way.
    Free,
    Lost(String),
}

impl RecordsLane {
    pub(super) const fn new(previous: Option<SubnetKey>) -> Self {
        Self {
            flight: Flight::new(Duration::from_millis(20), Duration::from_secs(5)),
            own: previous,
            lost: None,
            exhausted: None,
            claims: None,
            uses: None,
            wait: None,
            granted: None,
            relist: false,
            outdated: false,
            without_surplus: None,
            block: None,
        }
    }

    /// The subnet in use, unless it is lost.
    pub(super) const fn subnet(&self) -> Option<SubnetKey> {
        if self.lost.is_some() { None } else { self.own }
    }

    /// Looks whether the subnet in use still is ours; makes no call.
    pub(super) fn observe(&mut self, context: &mut Context<'_>) {
        if self.flight.call.is_some() || self.waits(context) {
            return;
        }
        // New pods get addresses of the new block at once; attached ones keep theirs.
        if let Some(block) = self.kubernetes_block(context)
            && self.own != Some(block)
        {
            self.own = Some(block);
        }
        if let Some(own) = self.own {
            self.lost = match standing(context, &own) {
                Standing::Lost(reason) => Some(reason),
                Standing::Ours | Standing::Free => None,
            };
            let free = self.lost.is_none() && !is_ours(context, &own);
            // One that was drawn before Kubernetes allocated may be another node's podCIDR, and both would wait for
            // ever.
            let moves = self.lost.is_some()
                || free && (reservation(context).is_some() || is_outdated(context, &own))
                || is_by_kubernetes(context) && is_outdated(context, &own);
            if moves && !context.attached {
                self.own = None;
                self.lost = None;
            }
        }
        if self.own.is_none() {
            // A restart without cache: our keys name this node. A reservation has precedence.
            self.own = context
                .store
                .subnets()
                .filter(|(_, _, lease)| lease.node.as_ref() == Some(&context.identity.id))
                .filter(|(key, ..)| context.attached || !(is_by_kubernetes(context) && is_outdated(context, key)))
                .min_by_key(|(key, kept, _)| (kept.lease.is_some(), kept.create_revision, **key))
                .map(|(key, _, _)| *key);
        }
    }

    /// The newest block that a `meshd-sync` reserves for this node, if the configuration wants it to: that of its
    /// cluster, or any for a node that names none.
    fn kubernetes_block(&mut self, context: &Context<'_>) -> Option<SubnetKey> {
        let networks = own_networks(context).filter(ClusterNetworks::is_allocated_by_kubernetes)?;
        let own_cluster = &context.facts.cluster;
        let changes = context.store.subnet_changes();
        if self.block.is_none_or(|(at, _)| at != changes) {
            let blocks = context.store.subnets().filter(|(key, _, lease)| {
                lease.node.as_ref() == Some(&context.identity.id)
                    && lease.kubernetes_node.as_ref().is_some_and(|(of, _)| own_cluster.is_flat() || of == own_cluster)
                    && networks.contain(key)
            });
            // A block that the Node gets again keeps its key: sync writes it again.
            let newest = blocks.max_by_key(|(key, kept, _)| (kept.mod_revision, **key)).map(|(key, ..)| *key);
            self.block = Some((changes, newest));
        }
        self.block.and_then(|(_, block)| block)
    }

    /// Other subnets than before are without attachments.
    pub(super) const fn idle_changed(&mut self) {
        self.without_surplus = None;
    }

    /// The next transaction, if something in etcd is not as it should be.
    pub(super) fn act(&mut self, context: &mut Context<'_>, lease: Option<LeaseId>) {
        if !self.flight.is_free(context.now) || self.waits(context) {
            return;
        }
        let Some(lease) = lease else { return };
        self.exhausted = None;
        let records = context.store.records();
        let Some(config) = records.config.as_ref().map(|record| &*record.value) else { return };
        self.outdated = self.own.is_some_and(|own| is_outdated(context, &own));
        let transaction = match self.own {
            Some(own) => match standing(context, &own) {
                Standing::Ours => rewrite(context, config, Some(&own), lease, &mut self.without_surplus),
                Standing::Free => Some(take(context, config, &own, lease)),
                Standing::Lost(_) => rewrite(context, config, None, lease, &mut self.without_surplus),
            },
            None => match choose(context, config) {
                Ok(Choice::None) => rewrite(context, config, None, lease, &mut self.without_surplus),
                Ok(Choice::Reserved(subnet)) => {
                    self.claims = Some(subnet);
                    rewrite(context, config, Some(&subnet), lease, &mut self.without_surplus)
                }
                Ok(Choice::Free(subnet)) => {
                    self.claims = Some(subnet);
                    Some(take(context, config, &subnet, lease))
                }
                Err(exhausted) => {
                    self.exhausted = Some(exhausted);
                    None
                }
            },
        };
        if let Some(transaction) = transaction {
            self.uses = Some(lease);
            self.wait = Some(Wait::Revision { revision: context.store.revision() + 1, until: context.now + CATCH_UP });
            self.flight.call = Some(context.call(Call::Transact(transaction)));
        }
    }

    pub(super) fn answered(
        &mut self,
        now: Instant,
        call: CallId,
        answer: &CallAnswer,
        store: &Store,
        rng: &mut StdRng,
    ) -> bool {
        if !self.flight.landed(call) {
            return false;
        }
        let claims = self.claims.take();
        match answer {
            CallAnswer::Committed(Ok(committed)) => {
                self.flight.refusal = None;
                if committed.succeeded {
                    if claims.is_some() {
                        self.own = claims;
                        self.lost = None;
                    }
                    // With a lost one only `nodes/ID` was written.
                    self.granted = self.own.filter(|_| self.lost.is_none());
                    self.flight.succeeded();
                    self.wait = Some(Wait::Revision { revision: committed.revision, until: now + CATCH_UP });
                } else {
                    // Another node wrote after our revision (`wait` has the newer one): spread the retries.
                    self.flight.wait(now, rng);
                }
            }
            CallAnswer::Committed(Err(error)) => {
                self.wait = None;
                match error {
                    CallError::Indeterminate(_) => {
                        self.wait = Some(Wait::Lists(store.lists() + 1));
                        self.relist = true;
                        self.flight.wait(now, rng);
                    }
                    CallError::LeaseNotFound => self.flight.wait(now, rng),
                    CallError::Refused(_) => self.flight.failed(now, error, rng),
                }
            }
            CallAnswer::Granted(_) | CallAnswer::KeptAlive(_) => {}
        }
        true
    }

    /// Earlier calls and answers are void for the etcd that is there now.
    pub(super) fn lineage_changed(&mut self) {
        self.flight.abandon();
        (self.claims, self.uses, self.wait, self.granted, self.relist) = (None, None, None, None, false);
    }

    /// A list of a new session was read, up to `revision`: answered transactions of later revisions may be lost.
    pub(super) const fn listed(&mut self, revision: Revision) {
        if let Some(Wait::Revision { revision: awaited, .. }) = self.wait
            && self.flight.call.is_none()
            && awaited > revision
        {
            (self.wait, self.granted) = (None, None);
        }
    }

    /// The lease that the last transaction used.
    pub(super) const fn lease_used(&self) -> Option<LeaseId> {
        self.uses
    }

    /// Whether the store has to be listed again; true once.
    pub(super) fn wants_relist(&mut self, now: Instant) -> bool {
        if let Some(Wait::Revision { until, .. }) = &mut self.wait
            && self.flight.call.is_none()
            && *until <= now
        {
            *until = now + CATCH_UP;
            self.relist = true;
        }
        std::mem::take(&mut self.relist)
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        match self.wait {
            _ if self.flight.call.is_some() => None,
            Some(Wait::Revision { until, .. }) => Some(until),
            Some(Wait::Lists(_)) => None,
            None => self.flight.next_deadline(),
        }
    }

    pub(super) const fn is_outdated(&self) -> bool {
        self.outdated
    }

    pub(super) fn refusal(&self) -> Option<&EtcdFailure> {
        self.flight.refusal.as_ref()
    }

    pub(super) fn state(&self, context: &Context<'_>) -> MembershipState {
        match (self.own, &self.lost, self.exhausted) {
            (Some(subnet), Some(reason), _) => MembershipState::SubnetLost { subnet, reason: reason.clone() },
            // It is in etcd, or its transaction was answered and the watch will deliver it.
            (Some(subnet), None, _) if self.granted == Some(subnet) || is_ours(context, &subnet) => {
                MembershipState::Joined { subnet }
            }
            (_, _, _) if context.store.records().config.is_none() => MembershipState::NoConfig,
            (None, _, _) if own_networks(context).is_none() => {
                MembershipState::NoNetwork { cluster: context.facts.cluster.clone() }
            }
            (None, _, _) if is_by_kubernetes(context) => {
                MembershipState::AwaitingBlock { cluster: context.facts.cluster.clone() }
            }
            (None, _, Some(PoolExhausted { family, total })) => MembershipState::PoolExhausted { family, total },
            _ => MembershipState::Joining,
        }
    }

    fn waits(&mut self, context: &Context<'_>) -> bool {
        let over = match self.wait {
            None => true,
            Some(Wait::Revision { revision, .. }) => context.store.revision() >= revision,
            Some(Wait::Lists(lists)) => context.store.lists() >= lists,
        };
        if over {
            self.wait = None;
            self.granted = None;
        }
        !over
    }
}

enum Choice {
    /// A key that waits for this node.
    Reserved(SubnetKey),
    /// A free subnet.
    Free(SubnetKey),
    /// This node's cluster has no network, or Kubernetes has not allocated a block. Its record is written all the same:
    /// `meshd-sync` needs it to reserve one.
    None,
}

/// The subnet to take: a reservation, else one of the free ones.
fn choose(context: &mut Context<'_>, config: &NetworkConfig) -> Result<Choice, PoolExhausted> {
    match reservation(context) {
        Some(subnet) => Ok(Choice::Reserved(subnet)),
        None => match config.of_cluster(&context.facts.cluster) {
            Some(networks) if !networks.is_allocated_by_kubernetes() => draw(context, networks).map(Choice::Free),
            _ => Ok(Choice::None),
        },
    }
}

/// A free subnet; one that a node gave up a short time ago only if no other is left.
fn draw(context: &mut Context<'_>, networks: &ClusterNetworks) -> Result<SubnetKey, PoolExhausted> {
    let store = context.store;
    allocator::choose(networks, store.taken(), context.rng).or_else(|exhausted| {
        let freed: BTreeSet<SubnetKey> = freed(store).map(|(key, _)| *key).collect();
        if freed.is_empty() {
            return Err(exhausted);
        }
        allocator::choose(networks, store.taken().filter(|key| !freed.contains(key)), context.rng)
    })
}

/// Blocks that nodes gave up, with their keys' mod_revision.
fn freed(store: &Store) -> impl Iterator<Item = (&SubnetKey, Revision)> {
    store.subnets().filter(|(_, _, lease)| lease.freed.is_some()).map(|(key, kept, _)| (key, kept.mod_revision))
}

/// Whether Kubernetes allocates this node's subnet.
fn is_by_kubernetes(context: &Context<'_>) -> bool {
    own_networks(context).is_some_and(|networks| networks.is_allocated_by_kubernetes())
}

/// The networks of this node's cluster in the configuration in force.
fn own_networks(context: &Context<'_>) -> Option<ClusterNetworks> {
    context.store.records().config.as_ref()?.value.of_cluster(&context.facts.cluster).copied()
}

/// A key without lease that names this node, or else no node and its public address: that may be a node's of another
/// cluster, too, so it counts in this one's networks only.
fn reservation(context: &Context<'_>) -> Option<SubnetKey> {
    let facts = context.facts;
    let networks = own_networks(context);
    let is_own = |key: &SubnetKey| networks.is_some_and(|networks| networks.cover(key));
    let by_address = |lease: &SubnetLease| {
        lease.node.is_none()
            && (lease.public_ip.is_some() && lease.public_ip == facts.public_ipv4
                || lease.public_ip.is_none() && lease.public_ipv6.is_some() && lease.public_ipv6 == facts.public_ipv6)
    };
    let by_node = |lease: &SubnetLease| lease.node.as_ref() == Some(&context.identity.id);
    context
        .store
        .subnets()
        .filter(|(key, kept, lease)| kept.lease.is_none() && (by_node(lease) || (by_address(lease) && is_own(key))))
        .min_by_key(|(key, kept, lease)| (!by_node(lease), kept.create_revision, **key))
        .map(|(key, _, _)| *key)
}

fn is_ours(context: &Context<'_>, subnet: &SubnetKey) -> bool {
    matches!(standing(context, subnet), Standing::Ours)
}

/// Whether the configuration in force deals out other subnets to this node than this one: of other families, lengths,
/// networks.
fn is_outdated(context: &Context<'_>, own: &SubnetKey) -> bool {
    let is_block = || {
        let kept = context.store.get(&Key::Subnet(*own).to_string());
        kept.and_then(|kept| kept.get::<SubnetLease>()).is_some_and(|lease| lease.kubernetes_node.is_some())
    };
    let fits = |networks: ClusterNetworks| {
        let by_kubernetes = networks.is_allocated_by_kubernetes();
        networks.cover(own) && if by_kubernetes { is_block() } else { networks.has_families_of(own) }
    };
    context.store.records().config.is_some() && !own_networks(context).is_some_and(fits)
}

fn standing(context: &Context<'_>, own: &SubnetKey) -> Standing {
    let store = context.store;
    let lease = |key: &SubnetKey| store.get(&Key::Subnet(*key).to_string()).and_then(|kept| kept.get::<SubnetLease>());
    let is_freed = |key: &SubnetKey| lease(key).is_some_and(|lease| lease.freed.is_some());
    // One that was given up for this node is as if it were not there.
    let Some(kept) = store.get(&Key::Subnet(*own).to_string()).filter(|_| !is_freed(own)) else {
        if let Some(other) = store.present_subnets().find(|other| own.overlaps(other) && !is_freed(other)) {
            return Standing::Lost(format!("`{}` overlaps it", Key::Subnet(*other)));
        }
        let outside = store.records().config.as_ref().is_some_and(|config| !config.value.covers(own));
        if outside {
            return Standing::Lost("it is outside the networks of `config`".into());
        }
        return Standing::Free;
    };
    // The last good value of an unreadable record names its owner, who corrects it.
    match kept.get::<SubnetLease>().and_then(|lease| lease.node.as_ref()) {
        Some(node) if *node == context.identity.id => Standing::Ours,
        Some(node) => Standing::Lost(format!("it belongs to node {node}")),
        None => Standing::Lost("its key no longer names this node".into()),
    }
}

/// Puts a subnet that is free, and `nodes/ID`: nothing under `subnets/` may have changed since the store's revision.
/// In an etcd that went back and was not listed yet, everything is older than that: the key itself must be absent too.
fn take(context: &Context<'_>, config: &NetworkConfig, subnet: &SubnetKey, lease: LeaseId) -> Transaction {
    let store = context.store;
    let key = Key::Subnet(*subnet).to_string();
    let mut transaction = unchanged(context);
    let mut present = 0;
    for (freed, mod_revision) in freed(store).filter(|(freed, _)| freed.overlaps(subnet)).take(64) {
        if freed == subnet {
            present = mod_revision;
        } else {
            let key = Key::Subnet(*freed).to_string();
            transaction.compares.push(Compare::ModRevision { key: key.clone(), equals: mod_revision });
            transaction.writes.push(Write::Delete { key });
        }
    }
    transaction.compares.push(Compare::ModRevision { key: key.clone(), equals: present });
    transaction.compares.push(Compare::AllModifiedBefore { prefix: "subnets/".into(), revision: store.revision() + 1 });
    transaction.compares.push(Compare::ModRevision {
        key: Key::Config.to_string(),
        equals: store.mod_revision(&Key::Config.to_string()),
    });
    let value = lease_value(context, config, None).to_json();
    transaction.writes.push(Write::Put { key, value, lease: Some(lease) });
    transaction.writes.push(put_node(context, lease));
    transaction
}

/// The transaction that corrects `nodes/ID` and our subnet's key; `None` if they are correct.
fn rewrite(
    context: &Context<'_>,
    config: &NetworkConfig,
    subnet: Option<&SubnetKey>,
    lease: LeaseId,
    without_surplus: &mut Option<(u64, Option<SubnetKey>)>,
) -> Option<Transaction> {
    let store = context.store;
    let mut transaction = unchanged(context);
    if let Some(subnet) = subnet {
        let key = Key::Subnet(*subnet).to_string();
        let kept = store.get(&key)?;
        let value = lease_value(context, config, kept.get());
        transaction.compares.push(Compare::ModRevision { key: key.clone(), equals: kept.mod_revision });
        if kept.unreadable() || kept.get() != Some(&value) {
            // A reservation stays one: without lease.
            transaction.writes.push(Write::Put { key, value: value.to_json(), lease: kept.lease });
        }
    }
    let seen = (store.subnet_changes(), subnet.copied());
    let kubernetes = is_by_kubernetes(context);
    if (kubernetes || !context.attached) && *without_surplus != Some(seen) {
        let surplus = surplus(context, subnet);
        *without_surplus = surplus.is_empty().then_some(seen);
        for (key, kept) in surplus {
            transaction.compares.push(Compare::ModRevision { key: key.clone(), equals: kept });
            transaction.writes.push(Write::Delete { key });
        }
    }
    let node = store.get(&Key::Node(context.identity.id.clone()).to_string());
    let as_it_should = node.is_some_and(|kept| {
        !kept.unreadable() && kept.lease == Some(lease) && kept.get() == Some(&node_value(context, kept.get()))
    });
    if !as_it_should {
        transaction.writes.push(put_node(context, lease));
    }
    (!transaction.writes.is_empty()).then_some(transaction)
}

/// Keys that are this node's beside the one in use: leased ones, and where Kubernetes allocates, earlier blocks without
/// attachments; with their mod_revision, few at a time. They come from a state directory that was lost, or a
/// reservation made for a node that had a lease.
fn surplus(context: &Context<'_>, in_use: Option<&SubnetKey>) -> Vec<(String, Revision)> {
    let kubernetes = is_by_kubernetes(context);
    context
        .store
        .subnets()
        .filter(|(key, kept, lease)| {
            let is_surplus = match kubernetes {
                true => (kept.lease.is_some() || lease.kubernetes_node.is_some()) && context.idle.contains(*key),
                false => kept.lease.is_some(),
            };
            let is_other = in_use.map_or(kubernetes, |own| own != *key);
            is_other && is_surplus && lease.node.as_ref() == Some(&context.identity.id)
        })
        .map(|(key, kept, _)| (Key::Subnet(*key).to_string(), kept.mod_revision))
        .take(16)
        .collect()
}

/// The conditions of every write: `nodes/ID` is as the store has it, and this node was not removed.
fn unchanged(context: &Context<'_>) -> Transaction {
    let id = &context.identity.id;
    let node = Key::Node(id.clone()).to_string();
    Transaction {
        compares: vec![
            Compare::ModRevision { equals: context.store.mod_revision(&node), key: node },
            Compare::CreateRevision { key: Key::Removed(id.clone()).to_string(), equals: 0 },
        ],
        writes: Vec::new(),
    }
}

fn put_node(context: &Context<'_>, lease: LeaseId) -> Write {
    let key = Key::Node(context.identity.id.clone()).to_string();
    let present = context.store.get(&key).and_then(|kept| kept.get());
    Write::Put { value: node_value(context, present).to_json(), key, lease: Some(lease) }
}

/// The violation in this node's facts, if any.
pub(super) fn violations(facts: &LocalFacts) -> Option<String> {
    NodeRecord::parse(&node_record(facts).to_json()).err().map(|violations| violations.to_string())
}

/// The desired value of `nodes/ID`; unknown fields of `present` stay.
fn node_value(context: &Context<'_>, present: Option<&NodeRecord>) -> NodeRecord {
    let mut record = node_record(context.facts);
    if let Some(present) = present {
        record.extra = present.extra.clone();
    }
    record
}

fn node_record(facts: &LocalFacts) -> NodeRecord {
    NodeRecord {
        name: facts.name.clone(),
        site: facts.site.clone(),
        cluster: facts.cluster.clone(),
        public_key: facts.public_key,
        next_public_key: facts.next_public_key,
        listen_port: facts.listen_port,
        endpoints: facts.endpoints.clone(),
        addresses: facts.addresses.clone(),
        vteps: facts.vteps.clone(),
        version: facts.version.clone(),
        extra: serde_json::Map::new(),
    }
}

/// The desired value of our key under `subnets/`; unknown fields of `present` stay.
fn lease_value(context: &Context<'_>, config: &NetworkConfig, present: Option<&SubnetLease>) -> SubnetLease {
    let facts = context.facts;
    let data = match config.backend.kind {
        BackendKind::Wireguard => {
            LeaseData::Wireguard(WireguardData { public_key: facts.public_key, port: facts.listen_port })
        }
        BackendKind::Vxlan => LeaseData::Vxlan([true, false].map(|ipv4| {
            let vtep = facts.vteps.iter().find(|vtep| vtep.address.is_ipv4() == ipv4)?;
            Some(VxlanData { vni: config.backend.vxlan.vni, mac: vtep.mac })
        })),
        kind => LeaseData::Bare(kind),
    };
    let mut lease = SubnetLease::for_node(context.identity.id.clone(), facts.public_ipv4, facts.public_ipv6, data);
    if let Some(present) = present {
        lease.kubernetes_node.clone_from(&present.kubernetes_node);
        lease.extra = present.extra.clone();
    }
    lease
}
