//! policy.networking.k8s.io ClusterNetworkPolicy: the `spec`, validated, in canonical form. All its versions,
//! [`CLUSTER_POLICY_VERSIONS`], share one schema.
//!
//! A rule with an invalid peer or protocol fails closed: with Accept it matches nothing, with Deny or Pass it denies
//! all traffic in its direction.

use std::fmt;

use etcd_schema::{
    Violations,
    reading::{Report, describe, quoted},
};
use serde_json::Value;

use super::{
    block,
    block::Block,
    port::{self, PortMatch, Ports, Protocol},
    reader::{At, ObjectFields},
    selector::{self, Selector},
};

/// The versions that are read.
pub(crate) const CLUSTER_POLICY_VERSIONS: [&str; 2] =
    ["policy.networking.k8s.io/v1alpha2", "policy.networking.k8s.io/v1beta1"];
/// Most rules of a direction, peers of a rule, networks of a peer, protocols of a rule.
const MAX_ENTRIES: usize = 25;
/// Largest priority.
const MAX_PRIORITY: u64 = 1000;
/// Longest text of a network, in characters.
const MAX_NETWORK: usize = 43;
/// Longest name of a rule, in characters.
const MAX_NAME: usize = 100;

/// A ClusterNetworkPolicy's spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterPolicy {
    /// Before or behind the NetworkPolicies.
    pub tier: Tier,
    /// Lower ones come first within a tier; of equal ones the one with the lower name.
    pub priority: u16,
    /// To whose traffic it applies.
    pub subject: ClusterSubject,
    /// In order; the first match decides.
    pub ingress: Vec<ClusterRule>,
    /// In order; the first match decides.
    pub egress: Vec<ClusterRule>,
}

/// Where a policy stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Before the NetworkPolicies.
    Admin,
    /// Behind them, for what they leave undecided.
    Baseline,
}

/// Pods of namespaces; never pods in their node's network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClusterSubject {
    /// The namespaces.
    pub namespaces: Selector,
    /// The pods within them.
    pub pods: Selector,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterRule {
    /// Its name, where it has one.
    pub name: Option<Box<str>>,
    /// What it does with what it matches.
    pub action: Action,
    /// `None`: anyone. An empty list matches nobody.
    pub peers: Option<Vec<ClusterPeer>>,
    /// `None`: every protocol.
    pub ports: Option<Vec<PortMatch>>,
}

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Lets pass; nothing behind it is asked.
    Accept,
    /// Refuses; nothing behind it is asked.
    Deny,
    /// Leaves it to what comes behind this tier.
    Pass,
}

/// Who is at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterPeer {
    /// Pods of namespaces.
    Pods {
        /// The namespaces.
        namespaces: Selector,
        /// The pods within them.
        pods: Selector,
    },
    /// Nodes by their labels, as destinations only.
    Nodes(Selector),
    /// Addresses, also those of pods.
    Network(Block),
}

/// A spec that the API server would refuse, or that has fields which are not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidClusterPolicy {
    /// What is wrong.
    pub violations: Violations,
    /// A reading that allows nothing that the policy might mean to refuse: what is left of it without an earlier version
    /// to keep. `None` where not even its subject could be read.
    pub fail_closed: Option<ClusterPolicy>,
}

impl std::error::Error for InvalidClusterPolicy {}

impl fmt::Display for InvalidClusterPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.violations.fmt(f)
    }
}

impl ClusterPolicy {
    /// The policy whose `spec` this is.
    ///
    /// # Errors
    /// All that the API server would refuse, and what is not known.
    pub fn parse(spec: &Value) -> Result<Self, InvalidClusterPolicy> {
        let mut report = Report::default();
        let root = At { path: "spec".into(), value: spec };
        let policy = root.object(&mut report).and_then(|fields| read_policy(&fields, &mut report));
        match (report.into_violations(), policy) {
            (None, Some(policy)) => Ok(policy),
            (Some(violations), fail_closed) => Err(InvalidClusterPolicy { violations, fail_closed }),
            (None, None) => Err(InvalidClusterPolicy {
                violations: Violations::one("spec", "unreadable", "rewrite it"),
                fail_closed: None,
            }),
        }
    }

    /// Whether it denies its subject everything, and says nothing else.
    pub(crate) fn denies_all(&self) -> bool {
        self.ingress == deny_all() && self.egress == deny_all()
    }

    /// A policy of the same subject that denies it everything.
    #[must_use]
    pub(crate) fn denying_all(self) -> Self {
        Self { ingress: deny_all(), egress: deny_all(), ..self }
    }
}

/// The policy as far as it can be read, what cannot read fail-closed.
fn read_policy(fields: &ObjectFields<'_>, report: &mut Report) -> Option<ClusterPolicy> {
    let before = report.count();
    fields.only(&["tier", "priority", "subject", "ingress", "egress"], report);
    let strange = report.count() > before;
    let tier = match fields.text("tier", report) {
        Some("Admin") => Some(Tier::Admin),
        Some("Baseline") => Some(Tier::Baseline),
        Some(other) => {
            report.add(fields.path("tier"), quoted(other), "must be Admin or Baseline");
            None
        }
        None => {
            report.add(fields.path("tier"), "missing", "must be Admin or Baseline");
            None
        }
    };
    let priority = fields.get("priority");
    let number = priority.as_ref().and_then(|at| at.value.as_u64()).filter(|number| *number <= MAX_PRIORITY);
    if number.is_none() {
        report.add(
            fields.path("priority"),
            selector::found(priority.as_ref()),
            format!("must be a whole number from 0 to {MAX_PRIORITY}"),
        );
    }
    let subject = match fields.get("subject") {
        Some(at) => at.object(report).and_then(|fields| read_subject(&fields, report)),
        None => {
            report.add(fields.path("subject"), "missing", "must have namespaces or pods");
            None
        }
    };
    let mut ingress = read_rules(fields, "ingress", false, report);
    let mut egress = read_rules(fields, "egress", true, report);
    let subject = subject?;
    if strange {
        // A field beside the rules may narrow or widen any of them.
        (ingress, egress) = (deny_all(), deny_all());
    }
    Some(ClusterPolicy {
        tier: tier.unwrap_or(Tier::Admin),
        priority: number.and_then(|number| u16::try_from(number).ok()).unwrap_or(0),
        subject,
        ingress,
        egress,
    })
}

fn deny_all() -> Vec<ClusterRule> {
    vec![ClusterRule { name: None, action: Action::Deny, peers: None, ports: None }]
}

fn read_subject(fields: &ObjectFields<'_>, report: &mut Report) -> Option<ClusterSubject> {
    let before = report.count();
    fields.only(&["namespaces", "pods"], report);
    let subject = match (fields.get("namespaces"), fields.get("pods")) {
        (Some(namespaces), None) => {
            selector::read(&namespaces, report).map(|namespaces| ClusterSubject { namespaces, ..Default::default() })
        }
        (None, Some(pods)) => read_pods(&pods, report).map(|(namespaces, pods)| ClusterSubject { namespaces, pods }),
        _ => {
            report.add(fields.own_path(), "not one subject", "must have either namespaces or pods");
            None
        }
    };
    subject.filter(|_| report.count() == before)
}

/// `{namespaceSelector, podSelector}`: without the former, pods of all namespaces; the latter is required, and may be `{}`.
fn read_pods(at: &At<'_>, report: &mut Report) -> Option<(Selector, Selector)> {
    let before = report.count();
    let fields = at.object(report)?;
    fields.only(&["namespaceSelector", "podSelector"], report);
    let namespaces = match fields.get("namespaceSelector") {
        Some(at) => selector::read(&at, report),
        None => Some(Selector::default()),
    };
    let pods = match fields.get("podSelector") {
        Some(at) => selector::read(&at, report),
        None => {
            report.add(fields.path("podSelector"), "missing", "write {} for all");
            None
        }
    };
    namespaces.zip(pods).filter(|_| report.count() == before)
}

fn read_rules(fields: &ObjectFields<'_>, name: &str, egress: bool, report: &mut Report) -> Vec<ClusterRule> {
    let Some(at) = fields.get(name) else { return Vec::new() };
    let before = report.count();
    let listed = at.list(report).unwrap_or_default();
    if report.count() > before {
        return deny_all();
    }
    limited(&at.path, listed.len(), report);
    listed.iter().filter_map(|at| read_rule(at, egress, report)).collect()
}

/// One rule, fail-closed where it cannot be read; `None`: it matches nothing.
fn read_rule(at: &At<'_>, egress: bool, report: &mut Report) -> Option<ClusterRule> {
    let before = report.count();
    let peers = if egress { "to" } else { "from" };
    let denied = ClusterRule { name: None, action: Action::Deny, peers: None, ports: None };
    let Some(fields) = at.object(report) else { return Some(denied) };
    fields.only(&["name", "action", peers, "protocols"], report);
    let name = fields.text("name", report);
    if let Some(name) = name
        && name.chars().count() > MAX_NAME
    {
        report.add(fields.path("name"), quoted(name), format!("at most {MAX_NAME} characters"));
    }
    let action = match fields.text("action", report) {
        Some("Accept") => Some(Action::Accept),
        Some("Deny") => Some(Action::Deny),
        Some("Pass") => Some(Action::Pass),
        other => {
            report.add(
                fields.path("action"),
                other.map_or_else(|| "missing".to_owned(), quoted),
                "must be Accept, Deny or Pass",
            );
            None
        }
    };
    let mut read_peers = Vec::new();
    let listed = fields.list(peers, report);
    if listed.is_empty() {
        report.add(fields.path(peers), "missing or empty", "write at least one peer");
    }
    limited(&fields.path(peers), listed.len(), report);
    for at in &listed {
        read_peer(at, egress, &mut read_peers, report);
    }
    let listed = fields.list("protocols", report);
    if listed.is_empty()
        && let Some(at) = fields.get("protocols")
    {
        report.add(&at.path, "an empty list", "leave it out for every protocol");
    }
    limited(&fields.path("protocols"), listed.len(), report);
    let addresses = read_peers.iter().any(|peer| matches!(peer, ClusterPeer::Network(_) | ClusterPeer::Nodes(_)));
    let ports =
        (!listed.is_empty()).then(|| listed.iter().filter_map(|at| read_protocol(at, addresses, report)).collect());
    if report.count() == before {
        let action = action?;
        return Some(ClusterRule { name: name.map(Into::into), action, peers: Some(read_peers), ports });
    }
    match action {
        Some(Action::Accept) => None,
        _ => Some(ClusterRule { name: name.map(Into::into), ..denied }),
    }
}

fn read_peer(at: &At<'_>, egress: bool, peers: &mut Vec<ClusterPeer>, report: &mut Report) {
    let Some(fields) = at.object(report) else { return };
    let known: &[&str] = if egress { &["namespaces", "pods", "nodes", "networks"] } else { &["namespaces", "pods"] };
    if egress && let Some(at) = fields.get("domainNames") {
        let reason = "the addresses of a name are each resolver's own, and change: write networks";
        report.add(at.path, "not supported", reason);
        return;
    }
    fields.only(known, report);
    let found: Vec<_> = known.iter().filter_map(|name| Some((*name, fields.get(name)?))).collect();
    let [(name, at)] = found.as_slice() else {
        report.add(fields.own_path(), "not one peer", format!("must have one of {}", known.join(", ")));
        return;
    };
    match *name {
        "namespaces" => {
            let namespaces = selector::read(at, report);
            peers.extend(namespaces.map(|namespaces| ClusterPeer::Pods { namespaces, pods: Selector::default() }));
        }
        "pods" => peers.extend(read_pods(at, report).map(|(namespaces, pods)| ClusterPeer::Pods { namespaces, pods })),
        "nodes" => peers.extend(selector::read(at, report).map(ClusterPeer::Nodes)),
        _ => {
            let networks = at.list(report).unwrap_or_default();
            if networks.is_empty() {
                report.add(&at.path, "empty", "write at least one block of addresses");
            }
            limited(&at.path, networks.len(), report);
            for (i, network) in networks.iter().enumerate() {
                if networks[..i].iter().any(|before| before.value == network.value) {
                    report.add(&network.path, describe(network.value), "is listed twice: write it once");
                }
                let text = network.text(report).inspect(|text| {
                    if text.len() > MAX_NETWORK {
                        report.add(&network.path, quoted(text), format!("at most {MAX_NETWORK} characters"));
                    }
                });
                let block = text.and_then(|text| block::cidr(&network.path, text, report));
                peers.extend(block.map(|cidr| ClusterPeer::Network(Block::new(cidr, []))));
            }
        }
    }
}

fn read_protocol(at: &At<'_>, addresses: bool, report: &mut Report) -> Option<PortMatch> {
    const KNOWN: [&str; 4] = ["tcp", "udp", "sctp", "destinationNamedPort"];
    let fields = at.object(report)?;
    fields.only(&KNOWN, report);
    let found: Vec<_> = KNOWN.iter().filter_map(|name| Some((*name, fields.get(name)?))).collect();
    let [(name, at)] = found.as_slice() else {
        report.add(fields.own_path(), "not one protocol", format!("must have one of {}", KNOWN.join(", ")));
        return None;
    };
    let protocol = match *name {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => {
            if addresses {
                report.add(&at.path, describe(at.value), "networks and nodes have no named ports: write port numbers");
            }
            // The API server takes any text; a name that no container has matches nothing.
            return Some(PortMatch { protocol: None, ports: Ports::Named(at.text(report)?.into()) });
        }
    };
    let fields = at.object(report)?;
    fields.only(&["destinationPort"], report);
    let Some(at) = fields.get("destinationPort") else {
        report.add(fields.own_path(), "empty", "must have a destinationPort: for every port the range 1 to 65535");
        return None;
    };
    let ports = at.object(report).and_then(|fields| read_ports(&fields, report))?;
    Some(PortMatch { protocol: Some(protocol), ports })
}

fn read_ports(fields: &ObjectFields<'_>, report: &mut Report) -> Option<Ports> {
    fields.only(&["number", "range"], report);
    match (fields.get("number"), fields.get("range")) {
        (Some(at), None) => port::number(&at, report).map(|number| Ports::Range(number, number)),
        (None, Some(at)) => {
            let fields = at.object(report)?;
            fields.only(&["start", "end"], report);
            let mut bound = |name: &str| match fields.get(name) {
                Some(at) => port::number(&at, report),
                None => {
                    report.add(fields.path(name), "missing", "must be a whole number from 1 to 65535");
                    None
                }
            };
            let (start, end) = (bound("start")?, bound("end")?);
            if start >= end {
                report.add(fields.own_path(), format!("{start} to {end}"), "start must be below end");
                return None;
            }
            Some(Ports::Range(start, end))
        }
        _ => {
            report.add(fields.own_path(), "not one port", "must have either a number or a range");
            None
        }
    }
}

fn limited(path: &str, count: usize, report: &mut Report) {
    if count > MAX_ENTRIES {
        report.add(path, format!("a list of {count}"), format!("at most {MAX_ENTRIES} entries"));
    }
}
