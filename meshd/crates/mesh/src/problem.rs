//! Problems and their codes, causes and remedies, as `meshctl status`, metrics and the log show them.

use std::{collections::BTreeSet, fmt};

use etcd_schema::PublicKey;
use ipnet::IpNet;

/// Lines that one change may write to the log; the rest are counted.
const MOST_LINES: usize = 20;

/// A problem.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The kind of problem.
    pub code: ProblemCode,
    /// The key below etcd's prefix that it is about, if it is about one.
    pub key: Option<String>,
    /// The cause, with the value; no secrets.
    pub cause: String,
    /// The remedy.
    pub remedy: String,
}

impl Problem {
    /// A problem of this node.
    #[must_use]
    pub fn new(code: ProblemCode, cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code, key: None, cause: cause.into(), remedy: remedy.into() }
    }

    /// The same, about a key below etcd's prefix.
    #[must_use]
    pub fn about(self, key: impl Into<String>) -> Self {
        Self { key: Some(key.into()), ..self }
    }
}

/// The problem of a node that was removed from the mesh.
pub fn node_removed(cause: impl Into<String>, remedy: impl Into<String>) -> Problem {
    Problem::new(ProblemCode::NodeRemoved, cause, remedy)
}

/// The problem of a `record` whose public key is `holder`'s.
pub(crate) fn key_conflict(record: &str, key: &PublicKey, holder: &str, remedy: impl Into<String>) -> Problem {
    let cause = format!("{record} is invalid: its public key {key} belongs to {holder}");
    Problem::new(ProblemCode::KeyConflict, cause, remedy)
}

/// The problem of a `record` whose prefixes are others'.
pub(crate) fn prefix_conflict(record: &str, conflict: impl fmt::Display, remedy: impl Into<String>) -> Problem {
    Problem::new(ProblemCode::PrefixConflict, format!("{record} is invalid: {conflict}"), remedy)
}

/// The problem of a prefix around an address of the underlay. `claim`: the record that has it.
pub(crate) fn covers_underlay(
    claim: &str,
    net: IpNet,
    address: impl fmt::Display,
    remedy: impl Into<String>,
) -> Problem {
    Problem::new(ProblemCode::CoversUnderlay, format!("{claim} {net} covers {address}"), remedy)
}

impl fmt::Display for Problem {
    /// The cause, after the key that it is about.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.key {
            Some(key) => write!(f, "{key}: {}", self.cause),
            None => f.write_str(&self.cause),
        }
    }
}

macro_rules! codes {
    ($($variant:ident $word:literal $meaning:literal,)*) => {
        /// The kinds of [`Problem`]: stable words in snake case, for scripts and alerts.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum ProblemCode {
            $(#[doc = $meaning] $variant,)*
        }

        impl ProblemCode {
            /// Every code, by its word.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The word for it in `meshctl status -o json`.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }

            /// Its meaning: a sentence without the full stop.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)* }
            }
        }
    };
}

codes! {
    AddressConflict "address_conflict" "Two nodes publish the same address of the underlay; it proves neither of them",
    AliveOverwritten "alive_overwritten" "Something else wrote this node's `alive/ID`; the node put it back",
    AllowedSourceRefused "allowed_source_refused" "A pod's `allowedSources` belong to another node or pod; packets from them are dropped",
    AttachmentOnOtherNode "attachment_on_other_node" "A container is attached here, but etcd has its Pod on another node; its labels do not count",
    AttachmentsUnreadable "attachments_unreadable" "Files below RUN/attachments cannot be read",
    AttachmentWithoutPod "attachment_without_pod" "A container is attached, but no Pod in etcd has its UID; its labels are unknown",
    AwaitingBlock "awaiting_block" "Kubernetes allocates subnets, and this node waits for its podCIDRs",
    BackendNotSupported "backend_not_supported" "`config` names a backend that this version does not have; nothing is programmed",
    BadFacts "bad_facts" "This node's own record would be invalid, so it is not written",
    BadKey "bad_key" "A key below the prefix is not one of meshd's; it has no effect",
    BadValue "bad_value" "A value cannot be read; the last good one, if any, stays in force",
    BridgeLearnsLinkLocal "bridge_learns_link_local" "A bridge of pods learns link-local addresses, so that a pod on it can attract other pods' frames",
    BridgeNotFiltered "bridge_not_filtered" "Packets between the ports of a bridge of pods bypass nftables; they are dropped",
    BridgePortUnknown "bridge_port_unknown" "A bridge of pods has a port without attachment, whose host can spoof pods' addresses",
    ClockWentBack "clock_went_back" "The clock is behind the time of this node's last saved state: peers refuse its handshakes",
    Cloned "cloned" "Another daemon runs with this node's identity; this one forwards nothing",
    ClusterLabelIgnored "cluster_label_ignored" "A Namespace object has the label `meshd.io/cluster`; every namespace has it by its key, so this one does not count",
    ClusterMismatch "cluster_mismatch" "A node's `--cluster` is not the cluster of its Node object, which decides for policies",
    ConfigRefused "config_refused" "What stands under `config` is not accepted, or was deleted too early; the one before stays in force",
    CoversUnderlay "covers_underlay" "A network or external prefix covers an address of the underlay; it is not programmed",
    DaemonNotReachable "daemon_not_reachable" "`meshctl doctor` cannot ask the daemon",
    DefaultRouteWillGo "default_route_will_go" "An IPv6 default route was learned by router advertisement; with forwarding the kernel drops it when it expires",
    EtcdMemberUnreachable "etcd_member_unreachable" "One member of etcd cannot be reached",
    EtcdRefuses "etcd_refuses" "etcd refuses what this node asks or writes",
    EtcdReplaced "etcd_replaced" "etcd is another cluster than before; what it lacks stays in force",
    EtcdTooOld "etcd_too_old" "A member of etcd is older than the oldest version that meshd works with",
    EtcdUnreachable "etcd_unreachable" "No member of etcd can be reached; the mesh continues with what is known",
    FlowsNotReported "flows_not_reported" "The verdicts that nftables reports cannot be read; policies are enforced all the same",
    ForeignForwardDrop "foreign_forward_drop" "Another program's nftables chain drops forwarded pod packets",
    ForeignRoute "foreign_route" "A foreign route or rule sends packets for the mesh elsewhere",
    ForwardingOff "forwarding_off" "A kernel setting keeps an interface from forwarding",
    HandshakeClock "handshake_clock" "The clock is behind its time before the last start: peers refuse handshakes until it has caught up",
    IdentityUnconfirmed "identity_unconfirmed" "The node waits until etcd rules out another daemon with its identity",
    InsideNetwork "inside_network" "A record's address or prefix lies inside the mesh's networks",
    Ipvs "ipvs" "kube-proxy runs in IPVS mode: policies do not see the final destination of its packets",
    KernelRefused "kernel_refused" "The kernel refuses a route, address, setting or rule",
    KernelUnreadable "kernel_unreadable" "The kernel's state cannot be read",
    KeyConflict "key_conflict" "Two records claim the same public key; the older one has it",
    KubernetesNotCopied "kubernetes_not_copied" "Kubernetes pods are attached, but etcd has no Kubernetes objects: no NetworkPolicy is in force",
    MetricsAddress "metrics_address" "Metrics and health checks cannot be served on their address",
    MtuBeyondInterface "mtu_beyond_interface" "The mesh's MTU does not fit the MTU of an underlay interface",
    NameConflict "name_conflict" "Two nodes have the same name; it means the older one",
    NatInTheWay "nat_in_the_way" "A peer's packets come from another endpoint than it publishes",
    NetworksOverlap "networks_overlap" "Prefixes of external peers overlap the mesh's networks or each other",
    NftablesRefused "nftables_refused" "nftables does not take the rules of the firewall, nor, if the cause names them, those of policies",
    NftMissing "nft_missing" "`nft` is not installed or does not work",
    NoConfig "no_config" "There is no valid `config`",
    NodeInSeveralClusters "node_in_several_clusters" "Node objects of several clusters are the same node: it is in no cluster, and its Kubernetes pods are unknown pods",
    NodeObjectAmbiguous "node_object_ambiguous" "Several nodes of the mesh have the name and an address of one Node object: they are in no cluster, and their Kubernetes pods are unknown pods",
    NodeRemoved "node_removed" "This node was removed from the mesh",
    NoNetwork "no_network" "`config` has no network of this node's cluster",
    NotForwarded "not_forwarded" "This machine does not forward pods' packets",
    NoUnderlay "no_underlay" "No interface leads to other nodes",
    ObjectStoredTwice "object_stored_twice" "A Kubernetes object has a flat key and one below `k8s/`; flat policies apply to the pods of all clusters",
    OffloadOff "offload_off" "The tunnel runs without an offload: it is slower",
    OffloadRefused "offload_refused" "The kernel refuses an offload: the tunnel is slower",
    PathMtu "path_mtu" "The path to a peer carries smaller packets than the mesh's MTU",
    PeerClockAhead "peer_clock_ahead" "A peer's clock was ahead: its handshakes are refused until its time has come",
    PeerMasquerades "peer_masquerades" "Packets arrive from another node's own address: that node rewrites its pods' sources",
    PeerNotReached "peer_not_reached" "A peer cannot be reached; the cause names the layer that fails",
    PeersUnreachable "peers_unreachable" "Peers that are online do not answer",
    PodsMasqueraded "pods_masqueraded" "A foreign rule rewrites the source of packets between pods: policies match the wrong sender",
    PodsNotGuarded "pods_not_guarded" "nftables refuses the rules that protect this node's pods: no routes are installed",
    PoliciesNotInForce "policies_not_in_force" "Policies are not in force; pods are closed until they are",
    PolicyAudit "policy_audit" "`policyMode` is audit: policies are evaluated, but nothing is denied",
    PolicyRulesRefused "policy_rules_refused" "The kernel refuses the policies' rules; the previous ones stay in force",
    PolicyWithdrawalsHeld "policy_withdrawals_held" "Many policies were deleted at once; they stay in force for a while",
    PoolExhausted "pool_exhausted" "No subnet is free",
    PrefixConflict "prefix_conflict" "Two records claim overlapping prefixes; the older one has them",
    ProbesDropped "probes_dropped" "A foreign rule drops the probes of direct paths: they cannot be used",
    ProbesRemarked "probes_remarked" "A foreign rule rewrites the packet mark of the probes of direct paths: they cannot be used",
    RevisionWentBack "etcd_revision_went_back" "etcd was restored from a backup, or lost writes; what it lacks stays in force",
    RpFilterStrict "rp_filter_strict" "Strict reverse path filtering drops packets of the mesh",
    SubnetEnv "subnet_env" "RUN/subnet.env cannot be written or removed",
    SubnetLost "subnet_lost" "This node's subnet belongs to another node now",
    SubnetOutdated "subnet_outdated" "This node's subnet does not match `config`; it stays in use",
    SubnetOutsideNetwork "subnet_outside_network" "A key below `subnets/` does not lie in the mesh's networks",
    TunMissing "tun_missing" "The TUN device does not exist",
    TunnelRefused "tunnel_refused" "The tunnel refuses a peer's key or prefix",
    UdpNotThrough "udp_not_through" "UDP packets to a peer's port do not arrive",
    UdpPortMayBeClosed "udp_port_may_be_closed" "A firewall rule of this machine drops packets to the tunnel's port",
    UiAddress "ui_address" "The browser page cannot be served on its address",
    WaitingForEtcd "waiting_for_etcd" "Nothing is known of the mesh yet, because etcd has not been read",
    WatchLostChanges "watch_lost_changes" "An audit found changes that etcd's watch had not brought",
    WgSocket "wg_socket" "WireGuard's socket cannot be opened: `wg show` does not work",
    WithdrawalsHeld "withdrawals_held" "Many records were deleted at once; they stay in force for a while",
}

impl ProblemCode {
    /// Whether packets go as they should all the same.
    #[must_use]
    pub const fn is_harmless(self) -> bool {
        matches!(
            self,
            Self::EtcdUnreachable
                | Self::FlowsNotReported
                | Self::MetricsAddress
                | Self::OffloadRefused
                | Self::UiAddress
                | Self::WgSocket
        )
    }
}

impl fmt::Display for ProblemCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Which problems the log knows: each is logged when it appears and when it is gone.
#[derive(Debug, Default)]
pub struct ProblemLog(BTreeSet<Problem>);

/// A line to log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogLine {
    /// The problem appeared, or has another cause.
    Appeared(Problem),
    /// The problem is gone.
    Gone(Problem),
    /// As many lines were left out.
    More(usize),
}

impl ProblemLog {
    /// The lines to log, given the current problems.
    pub fn update(&mut self, now: impl IntoIterator<Item = Problem>) -> Vec<LogLine> {
        let now: BTreeSet<Problem> = now.into_iter().collect();
        let before = std::mem::take(&mut self.0);
        // The same key with another cause: the problem stays. Without a key, the cause identifies it.
        let stays = |old: &Problem| {
            now.contains(old) || old.key.is_some() && now.iter().any(|new| (new.code, &new.key) == (old.code, &old.key))
        };
        let appeared = now.difference(&before).cloned().map(LogLine::Appeared);
        let gone = before.iter().filter(|old| !stays(old)).cloned().map(LogLine::Gone);
        let mut lines: Vec<LogLine> = appeared.chain(gone).collect();
        if lines.len() > MOST_LINES {
            let left_out = lines.len() - MOST_LINES;
            lines.truncate(MOST_LINES);
            lines.push(LogLine::More(left_out));
        }
        self.0 = now;
        lines
    }
}

#[cfg(test)]
mod tests;
