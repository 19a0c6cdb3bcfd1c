//! Explains the verdict on a flow, with names.

use std::{fmt, net::IpAddr, sync::Arc};

use super::{
    Classifier, Compiled, End,
    classifier::{Cause, Flow, Located, Side, Verdict, port},
    policy_name::{PolicyId, PolicyName},
    rules::{FlowTarget, blocks},
};
use crate::object::Action;

/// The verdict of one end of a flow, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// Which end.
    pub side: Side,
    /// The end: a pod, a node or an address.
    pub end: String,
    /// The verdict.
    pub verdict: Verdict,
    /// The policy that decided.
    pub policy: Option<PolicyName>,
    /// The rule of it that decided, from 0.
    pub rule: Option<u16>,
    /// The name of that rule.
    pub rule_name: Option<String>,
    /// Where it is refused for want of a rule: the rule that came nearest.
    pub nearest: Option<NearMiss>,
    /// The node that sends, where the source is its overlay address and a policy decided.
    pub source: Option<SourceNode>,
    /// Policies that have a say about this pod and direction.
    pub selecting: Vec<PolicyName>,
}

/// A node as the source of a flow, and the addresses that it counted as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceNode {
    /// Its name.
    pub name: String,
    /// Its proven addresses: allowing rules match by them and by its overlay address.
    pub proven: Vec<IpAddr>,
    /// The address by which it is in a block of the rule that decided.
    pub matched: Option<IpAddr>,
    /// Where it was refused although one of its addresses is in the block of an allowing rule: an address of it that
    /// the block excepts, and the block.
    pub excepted: Option<(IpAddr, String)>,
}

/// An allowing rule that matched in one respect of two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NearMiss {
    /// Its policy.
    pub policy: PolicyName,
    /// Its place among the policy's rules in that direction, from 0.
    pub rule: u16,
    /// Whether its peers match the other end; else its ports match.
    pub peer_matches: bool,
    /// Whether the other end would match if its labels were known.
    pub peer_unknown: bool,
    /// The ports that it names.
    pub ports: Vec<String>,
}

impl Classifier {
    /// Explains [`verdict`](Self::verdict).
    #[must_use]
    pub fn explain(&self, side: Side, flow: &Flow) -> Explanation {
        self.explained(side, flow, self.verdict(side, flow))
    }

    /// Explains [`connection`](Self::connection): egress, then ingress.
    #[must_use]
    pub fn explain_connection(&self, flow: &Flow) -> [Explanation; 2] {
        let connection = self.connection(flow);
        [self.explained(Side::Egress, flow, connection.egress), self.explained(Side::Ingress, flow, connection.ingress)]
    }

    fn explained(&self, side: Side, flow: &Flow, verdict: Verdict) -> Explanation {
        let (subject, peer) = match side {
            Side::Ingress => (flow.destination, flow.source),
            Side::Egress => (flow.source, flow.destination),
        };
        let (policy, rule) = match verdict.cause {
            Cause::Rule { policy, rule, .. } => (Some(policy), Some(rule)),
            Cause::Isolated { policy, .. } => (Some(policy), None),
            _ => (None, None),
        };
        let selecting = self.selecting(side, subject);
        let nearest = match verdict.cause {
            Cause::Isolated { .. } => self.nearest(side, flow, peer, &selecting),
            _ => None,
        };
        let source = policy.filter(|_| side == Side::Ingress).and_then(|decided| {
            let decided = self.compiled(decided).zip(rule);
            self.source_node(flow.source, decided, &selecting)
        });
        let name = |id: PolicyId| self.policy(id).cloned();
        Explanation {
            side,
            end: self.end_text(subject),
            verdict,
            policy: policy.and_then(name),
            rule,
            rule_name: policy.zip(rule).and_then(|(id, rule)| self.rule_name(id, side, rule)).map(ToOwned::to_owned),
            nearest,
            source,
            selecting: selecting.into_iter().filter_map(|(id, _)| name(id)).collect(),
        }
    }

    fn end_text(&self, address: IpAddr) -> String {
        match self.end(address) {
            End::Pod(pod) => format!("pod {} ({address})", pod.name),
            End::UnknownPod => format!("unknown pod {address}"),
            End::Node(node) => format!("node {node} ({address})"),
            End::Outside => address.to_string(),
        }
    }

    /// The source of a flow, if it is a node's overlay address. `decided`: the deciding rule, if any.
    fn source_node(
        &self,
        source: IpAddr,
        decided: Option<(&Arc<Compiled>, u16)>,
        selecting: &[(PolicyId, bool)],
    ) -> Option<SourceNode> {
        let aliases = self.sources.get(&source)?;
        let End::Node(name) = self.end(source) else { return None };
        let of_rule = decided.and_then(|(policy, rule)| {
            policy.sides[Side::Ingress as usize].as_ref().and_then(|rules| rules.get(usize::from(rule)))
        });
        let mut deciding = of_rule.iter().flat_map(|rule| blocks(&rule.peers));
        let matched = deciding.find_map(|block| {
            aliases.in_block(source, block)?;
            aliases.all(source).find(|address| block.contains(*address))
        });
        let policies = selecting.iter().filter_map(|(id, _)| self.compiled(*id));
        let rules = policies.flat_map(|policy| policy.sides[Side::Ingress as usize].iter().flatten());
        let mut allowing = rules.filter(|rule| rule.action == Action::Accept).flat_map(|rule| blocks(&rule.peers));
        let excepted = allowing.find_map(|block| {
            aliases.accepting(source).find(|address| block.cidr.contains(address))?;
            let hole = aliases.all(source).find(|address| block.is_excepted(*address))?;
            Some((hole, block.to_string()))
        });
        Some(SourceNode {
            name: name.to_string(),
            proven: aliases.proven.clone(),
            matched,
            excepted: excepted.filter(|_| decided.is_none()),
        })
    }

    /// Policies of all tiers, in the order in which they are asked.
    fn selecting(&self, side: Side, subject: IpAddr) -> Vec<(PolicyId, bool)> {
        let Located::Pod(owner) = self.locate(subject) else { return Vec::new() };
        let Some((class, namespace)) = self.rules(owner) else { return Vec::new() };
        let side = side as usize;
        let tiers = class.tiers[side].as_ref().map(|tiers| &*tiers.policies).unwrap_or_default();
        let unions = [&class.unions[side], &namespace.unions[side]];
        let unions = unions.into_iter().flatten().flat_map(|union| union.policies.iter());
        tiers.iter().chain(unions).copied().collect()
    }

    /// Of the rules that would allow it: one whose peers match but not its ports, else one whose ports match.
    fn nearest(&self, side: Side, flow: &Flow, peer: IpAddr, selecting: &[(PolicyId, bool)]) -> Option<NearMiss> {
        let located = self.locate(peer);
        let view = self.view(side, peer, located);
        let named = self.named_ports(match side {
            Side::Ingress => self.locate(flow.destination),
            Side::Egress => located,
        });
        let to = FlowTarget { port: port(flow), named };
        let mut best: Option<(u8, NearMiss)> = None;
        for (id, _) in selecting {
            let Some(policy) = self.compiled(*id) else { continue };
            for (position, rule) in policy.sides[side as usize].iter().flatten().enumerate() {
                if rule.action != Action::Accept {
                    continue;
                }
                let matches = rule.peers.iter().filter_map(|peer| view.is(peer));
                // A node that only may be in a block is not: no label is missing that could tell.
                let matches = matches.filter(|unsure| !unsure || view.aliases.is_none()).min();
                let ports = rule.ports.admits(&to);
                let score = match (matches, ports) {
                    (Some(true), true) => 3,
                    (Some(_), false) => 2,
                    (None, true) => 1,
                    _ => continue,
                };
                if best.as_ref().is_none_or(|(other, _)| score > *other) {
                    let miss = NearMiss {
                        policy: policy.name.clone(),
                        rule: position as u16,
                        peer_matches: matches.is_some(),
                        peer_unknown: matches == Some(true),
                        ports: rule.ports.as_slice().into_iter().flatten().map(ToString::to_string).collect(),
                    };
                    best = Some((score, miss));
                }
            }
        }
        best.map(|(_, miss)| miss)
    }
}

impl Side {
    /// `ingress` or `egress`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.verdict.allowed { "allowed" } else { "denied" };
        write!(f, "{} of {} {verb}: ", self.side.as_str(), self.end)?;
        match self.verdict.cause {
            Cause::NoPod => f.write_str("not a pod, so no policy applies"),
            Cause::Itself => f.write_str("a pod can always reach itself"),
            Cause::OwnNode => f.write_str("a pod's own node can always reach it"),
            Cause::NoPolicy => f.write_str("no policy denies it"),
            Cause::UnknownPod => f.write_str("this pod is unknown, and policies exist in this direction"),
            Cause::Rule { action, .. } => {
                let policy = self.policy.as_ref().map_or_else(String::new, ToString::to_string);
                write!(f, "{policy}, {} rule {}", self.side.as_str(), self.rule.unwrap_or_default())?;
                if let Some(name) = &self.rule_name {
                    write!(f, " \"{name}\"")?;
                }
                write!(f, " ({action:?})")
            }
            Cause::Isolated { unknown, .. } => {
                let policy = self.policy.as_ref().map_or_else(String::new, ToString::to_string);
                write!(f, "isolated by {policy}")?;
                if unknown {
                    f.write_str(", which could select it: its labels are unknown")?;
                }
                let others = self.selecting.len().saturating_sub(1);
                if others > 0 {
                    write!(f, " and {others} more")?;
                }
                match &self.nearest {
                    None => f.write_str("; no rule matches"),
                    Some(miss) => write!(f, "; closest rule: {miss}"),
                }
            }
        }?;
        self.source.as_ref().map_or(Ok(()), |source| write!(f, "; {source}"))
    }
}

impl fmt::Display for SourceNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the source is node {}", self.name)?;
        if let Some(matched) = self.matched {
            return write!(f, ", matched by its address {matched}");
        }
        if let Some((address, block)) = &self.excepted {
            return write!(f, ": its address {address} is excepted by ipBlock {block}");
        }
        match self.proven.as_slice() {
            [] => f.write_str(", none of whose underlay addresses is accepted as a source"),
            proven => {
                f.write_str(", also matched by its addresses ")?;
                for (i, address) in proven.iter().enumerate() {
                    write!(f, "{}{address}", if i == 0 { "" } else { " and " })?;
                }
                Ok(())
            }
        }
    }
}

impl fmt::Display for NearMiss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, rule {}: ", self.policy, self.rule)?;
        if self.peer_unknown {
            return f.write_str("its port matches, its peer might: the other end's labels are unknown");
        }
        if self.peer_matches {
            write!(f, "its peer matches, its ports ({}) do not", self.ports.join(", "))
        } else {
            f.write_str("its port matches, its peers do not")
        }
    }
}
