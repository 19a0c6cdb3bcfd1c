//! networking.k8s.io/v1 NetworkPolicy: the `spec`, validated, defaulted, in canonical form.

use std::fmt;

use etcd_schema::{
    Violations,
    reading::{Report, describe, quoted},
};
use serde_json::Value;

use super::{
    block::{self, Block},
    port::{self, PortMatch, Ports, Protocol},
    reader::{At, ObjectFields},
    selector::{self, Selector},
};

/// A NetworkPolicy's spec: the pods that it isolates, and the flows that it allows them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Pods of its namespace that it selects.
    pub subject: Selector,
    /// `Some`: isolates their ingress, and allows flows that one of these rules matches.
    pub ingress: Option<Vec<Rule>>,
    /// `Some`: isolates their egress, and allows flows that one of these rules matches.
    pub egress: Option<Vec<Rule>>,
}

/// An ingress or egress rule: a peer and a port must match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// `None`: any peer, also non-pods.
    pub peers: Option<Vec<PolicyPeer>>,
    /// `None`: every port of every protocol.
    pub ports: Option<Vec<PortMatch>>,
}

/// The other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyPeer {
    /// Pods with these labels, of namespaces with those.
    Pods {
        /// `None`: the policy's own namespace.
        namespaces: Option<Selector>,
        /// Within those namespaces.
        pods: Selector,
    },
    /// Addresses, also those of pods.
    Block(Block),
}

/// Directions of traffic, seen from the pod that a policy selects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Directions {
    /// To the pod.
    pub ingress: bool,
    /// From the pod.
    pub egress: bool,
}

/// A spec that the API server would refuse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidNetworkPolicy {
    /// The violations.
    pub violations: Violations,
    /// Its subject and directions, if both are readable: they apply without an earlier version.
    pub isolates: Option<(Selector, Directions)>,
    /// The literal policy, if the only violation is an `except` outside its block, which has no effect.
    pub literal: Option<NetworkPolicy>,
}

impl std::error::Error for InvalidNetworkPolicy {}

impl fmt::Display for InvalidNetworkPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.violations.fmt(f)
    }
}

impl NetworkPolicy {
    /// The policy whose `spec` this is.
    ///
    /// # Errors
    /// All that the API server would refuse, and fields that are not known.
    pub fn parse(spec: &Value) -> Result<Self, InvalidNetworkPolicy> {
        let mut report = Report::default();
        let root = At { path: "spec".into(), value: spec };
        let Some(fields) = root.object(&mut report) else {
            return Err(InvalidNetworkPolicy::without_remains(report));
        };
        let subject = match fields.get("podSelector") {
            None => Some(Selector::default()),
            Some(at) => selector::read(&at, &mut report),
        };
        let directions = read_directions(&fields, &mut report);
        let readable = subject.zip(directions);

        fields.only(&["podSelector", "policyTypes", "ingress", "egress"], &mut report);
        let mut escaped = 0;
        let ingress = read_rules(&fields, "ingress", "from", &mut report, &mut escaped);
        let egress = read_rules(&fields, "egress", "to", &mut report, &mut escaped);
        let mistakes = report.count();
        let policy = readable.clone().map(|(subject, directions)| Self {
            subject,
            ingress: directions.ingress.then_some(ingress),
            egress: directions.egress.then_some(egress),
        });
        match (report.into_violations(), policy) {
            (None, Some(policy)) => Ok(policy),
            (Some(violations), policy) => {
                let literal = policy.filter(|_| mistakes == escaped);
                Err(InvalidNetworkPolicy { violations, isolates: readable, literal })
            }
            (None, None) => Err(InvalidNetworkPolicy {
                violations: Violations::one("spec", "unreadable", "rewrite it"),
                isolates: None,
                literal: None,
            }),
        }
    }
}

impl InvalidNetworkPolicy {
    fn without_remains(report: Report) -> Self {
        let violations =
            report.into_violations().unwrap_or_else(|| Violations::one("spec", "unreadable", "rewrite it"));
        Self { violations, isolates: None, literal: None }
    }
}

/// The policy's types. Default: ingress, and egress if there are egress rules.
fn read_directions(fields: &ObjectFields<'_>, report: &mut Report) -> Option<Directions> {
    let before = report.count();
    let types = fields.get("policyTypes");
    let listed = types.as_ref().and_then(|at| at.list(report)).unwrap_or_default();
    let mut directions = Directions::default();
    for at in &listed {
        match at.text(report) {
            Some("Ingress") => directions.ingress = true,
            Some("Egress") => directions.egress = true,
            Some(other) => report.add(&at.path, quoted(other), "must be Ingress or Egress"),
            None => {}
        }
    }
    if let Some(types) = types
        && listed.len() > 2
    {
        report.add(types.path, format!("a list of {}", listed.len()), "at most two types");
    }
    if listed.is_empty() {
        directions.ingress = true;
        let rules = fields.get("egress");
        // A value that is no list is reported by the rules' reader; here it only makes the types unknown.
        directions.egress = match rules.as_ref().map(|at| at.value) {
            None => false,
            Some(Value::Array(rules)) => !rules.is_empty(),
            Some(_) => return None,
        };
    }
    (report.count() == before).then_some(directions)
}

fn read_rules(
    fields: &ObjectFields<'_>,
    name: &str,
    peers: &str,
    report: &mut Report,
    escaped: &mut usize,
) -> Vec<Rule> {
    let mut rules = Vec::new();
    for at in fields.list(name, report) {
        let Some(fields) = at.object(report) else { continue };
        fields.only(&[peers, "ports"], report);
        let listed = fields.list(peers, report);
        let peers =
            (!listed.is_empty()).then(|| listed.iter().filter_map(|at| read_peer(at, report, escaped)).collect());
        let listed = fields.list("ports", report);
        let ports = (!listed.is_empty()).then(|| listed.iter().filter_map(|at| read_port(at, report)).collect());
        rules.push(Rule { peers, ports });
    }
    rules
}

fn read_peer(at: &At<'_>, report: &mut Report, escaped: &mut usize) -> Option<PolicyPeer> {
    let fields = at.object(report)?;
    fields.only(&["podSelector", "namespaceSelector", "ipBlock"], report);
    let (pods, namespaces, block) = (fields.get("podSelector"), fields.get("namespaceSelector"), fields.get("ipBlock"));
    if let Some(block) = block {
        if pods.is_some() || namespaces.is_some() {
            report.add(
                fields.own_path(),
                "an ipBlock with a selector",
                "an ipBlock cannot be combined with a \
                 selector: split it into two peers",
            );
        }
        let block = block.object(report).and_then(|fields| block::read(&fields, report, escaped));
        return block.map(PolicyPeer::Block);
    }
    if pods.is_none() && namespaces.is_none() {
        report.add(
            fields.own_path(),
            "without a peer",
            "must have a podSelector, a namespaceSelector or an ipBlock; the selector {} selects everything",
        );
        return None;
    }
    let namespaces = match namespaces {
        None => None,
        Some(at) => Some(selector::read(&at, report)?),
    };
    let pods = match pods {
        None => Selector::default(),
        Some(at) => selector::read(&at, report)?,
    };
    Some(PolicyPeer::Pods { namespaces, pods })
}

fn read_port(at: &At<'_>, report: &mut Report) -> Option<PortMatch> {
    let before = report.count();
    let fields = at.object(report)?;
    fields.only(&["protocol", "port", "endPort"], report);
    let protocol = match fields.get("protocol") {
        None => Some(Protocol::Tcp),
        Some(at) => at.text(report).and_then(|text| {
            let protocol = Protocol::from_name(text);
            if protocol.is_none() {
                report.add(&at.path, quoted(text), "must be TCP, UDP or SCTP");
            }
            protocol
        }),
    };
    let end = fields.get("endPort");
    let ports = match fields.get("port") {
        None => {
            if let Some(end) = &end {
                report.add(&end.path, describe(end.value), "requires port");
            }
            Some(Ports::All)
        }
        Some(at) => match at.value {
            Value::String(text) => {
                if let Some(end) = &end {
                    report.add(&end.path, describe(end.value), "requires a numeric port");
                }
                port::name(&at.path, text, report).map(Ports::Named)
            }
            _ => {
                let first = port::number(&at, report);
                let last = end.map_or(first, |end| {
                    let last = port::number(&end, report);
                    if let (Some(first), Some(last)) = (first, last)
                        && last < first
                    {
                        report.add(&end.path, last.to_string(), format!("must not be below port {first}"));
                    }
                    last
                });
                first.zip(last).map(|(first, last)| Ports::Range(first, last))
            }
        },
    };
    let (Some(_), Some(ports)) = (protocol, ports) else { return None };
    (report.count() == before).then_some(PortMatch { protocol, ports })
}
