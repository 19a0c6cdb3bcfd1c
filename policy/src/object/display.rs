//! Policies as parsed, for people: defaults filled in, every rule with its number.

use std::fmt::{self, Display, Formatter};

use super::{Action, ClusterPeer, ClusterPolicy, ClusterRule, NetworkPolicy, PolicyPeer, PortMatch, Rule, Tier};

impl Display for NetworkPolicy {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "pods {}", self.subject)?;
        for (direction, rules) in [("ingress", &self.ingress), ("egress", &self.egress)] {
            match rules {
                None => writeln!(f, "{direction}: not restricted by this policy")?,
                Some(rules) if rules.is_empty() => writeln!(f, "{direction}: denied")?,
                Some(rules) => {
                    writeln!(f, "{direction}: denied except")?;
                    for (number, rule) in rules.iter().enumerate() {
                        writeln!(f, "  [{number}] {rule}")?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        ends(f, self.peers.as_deref())?;
        ports(f, self.ports.as_deref())
    }
}

impl Display for PolicyPeer {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pods { namespaces: None, pods } => write!(f, "pods {pods} in the policy's namespace"),
            Self::Pods { namespaces: Some(namespaces), pods } => write!(f, "pods {pods} in namespaces {namespaces}"),
            Self::Block(block) => write!(f, "{block}"),
        }
    }
}

impl Display for ClusterPolicy {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let tier = match self.tier {
            Tier::Admin => "Admin, evaluated before NetworkPolicies",
            Tier::Baseline => "Baseline, evaluated after NetworkPolicies",
        };
        writeln!(f, "tier {tier}; priority {}", self.priority)?;
        writeln!(f, "pods {} in namespaces {}", self.subject.pods, self.subject.namespaces)?;
        for (direction, rules) in [("ingress", &self.ingress), ("egress", &self.egress)] {
            if rules.is_empty() {
                writeln!(f, "{direction}: not restricted by this policy")?;
                continue;
            }
            writeln!(f, "{direction}: first matching rule decides")?;
            for (number, rule) in rules.iter().enumerate() {
                writeln!(f, "  [{number}] {rule}")?;
            }
        }
        Ok(())
    }
}

impl Display for ClusterRule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let action = match self.action {
            Action::Accept => "Accept",
            Action::Deny => "Deny",
            Action::Pass => "Pass",
        };
        write!(f, "{action} ")?;
        if let Some(name) = &self.name {
            write!(f, "{name:?} ")?;
        }
        ends(f, self.peers.as_deref())?;
        ports(f, self.ports.as_deref())
    }
}

impl Display for ClusterPeer {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pods { namespaces, pods } => write!(f, "pods {pods} in namespaces {namespaces}"),
            Self::Nodes(nodes) => write!(f, "nodes {nodes}"),
            Self::Network(block) => write!(f, "{block}"),
        }
    }
}

fn ends<P: Display>(f: &mut Formatter<'_>, peers: Option<&[P]>) -> fmt::Result {
    match peers {
        None => f.write_str("any peer"),
        Some([]) => f.write_str("no peer"),
        Some(peers) => list(f, peers, "; "),
    }
}

fn ports(f: &mut Formatter<'_>, ports: Option<&[PortMatch]>) -> fmt::Result {
    match ports {
        None => f.write_str(", any port and protocol"),
        Some([]) => f.write_str(", no port"),
        Some(ports) => {
            f.write_str(", ")?;
            list(f, ports, " ")
        }
    }
}

fn list<T: Display>(f: &mut Formatter<'_>, items: &[T], between: &str) -> fmt::Result {
    for (nth, item) in items.iter().enumerate() {
        write!(f, "{}{item}", if nth > 0 { between } else { "" })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_network_policy_says_all_that_it_was_understood_as() {
        let spec = json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [
            {"from": [{"podSelector": {}}, {"namespaceSelector": {"matchLabels": {"team": "a"}}},
                      {"ipBlock": {"cidr": "10.0.0.7/8", "except": ["10.1.0.0/16"]}}],
             "ports": [{"port": 80}, {"protocol": "UDP", "port": 53, "endPort": 60}, {"port": "pg"}]},
            {}]});
        let expected = "pods {app=db}\ningress: denied except\n  \
            [0] pods {} in the policy's namespace; pods {} in namespaces {team=a}; 10.0.0.0/8 except 10.1.0.0/16, \
            TCP/80 UDP/53-60 TCP/pg\n  [1] any peer, any port and protocol\negress: not restricted by this policy\n";
        assert_eq!(NetworkPolicy::parse(&spec).unwrap().to_string(), expected);
        let closed = NetworkPolicy::parse(&json!({"policyTypes": ["Egress"]})).unwrap().to_string();
        assert_eq!(closed, "pods {}\ningress: not restricted by this policy\negress: denied\n");
    }

    #[test]
    fn a_cluster_policy_says_it_in_order() {
        let spec = json!({"tier": "Admin", "priority": 7, "subject": {"namespaces": {}}, "ingress": [
            {"name": "ours", "action": "Accept", "from": [{"namespaces": {"matchLabels": {"team": "a"}}}],
             "protocols": [{"tcp": {"destinationPort": {"number": 80}}}]},
            {"action": "Deny", "from": [{"namespaces": {}}]}]});
        let expected = "tier Admin, evaluated before NetworkPolicies; priority 7\npods {} in namespaces {}\n\
            ingress: first matching rule decides\n  \
            [0] Accept \"ours\" pods {} in namespaces {team=a}, TCP/80\n  \
            [1] Deny pods {} in namespaces {}, any port and protocol\negress: not restricted by this policy\n";
        assert_eq!(ClusterPolicy::parse(&spec).unwrap().to_string(), expected);
    }
}
