//! Explains the verdicts in force to operators.

use std::net::IpAddr;

use api_types::{Explained, Question, QuestionError};
use policy::{
    engine::{Cause, End, Explanation, Flow, Verdict},
    service::Service,
};

use super::{ActivePolicy, Enforcement, masqueraded::Suspect};

impl Enforcement {
    /// Whether a flow may begin, and why.
    ///
    /// # Errors
    /// When the question makes no sense, or names a pod that is not known.
    pub fn explain(&self, question: &Question) -> Result<Explained, QuestionError> {
        let service = Service::parse(&question.service).map_err(QuestionError::Invalid)?;
        let in_force = self
            .in_force()
            .ok_or_else(|| QuestionError::NotFound("no policies are in force yet, so pods are unreachable".into()))?;
        let (sources, destinations) = (self.addresses(&question.source)?, self.addresses(&question.destination)?);
        // Of pods with addresses of both families one that both have.
        let mut pairs =
            sources.iter().flat_map(|source| destinations.iter().map(move |destination| (*source, *destination)));
        let (source, destination) =
            pairs.find(|(source, destination)| source.is_ipv4() == destination.is_ipv4()).ok_or_else(|| {
                let (source, destination) = (&question.source, &question.destination);
                QuestionError::Invalid(format!("{source} and {destination} have no common address family"))
            })?;
        let flow = service.flow(&in_force.classifier, source, destination).map_err(QuestionError::Invalid)?;
        let mut explained = Explained::of_ends(in_force.explain(&flow), Vec::new());
        if !explained.ingress.allowed
            && let Some(suspect) = Suspect::of(&in_force, &flow)
        {
            explained.ingress.text += &format!("; {suspect}");
        }
        Ok(explained)
    }

    fn addresses(&self, text: &str) -> Result<Vec<IpAddr>, QuestionError> {
        if let Ok(address) = text.parse() {
            return Ok(vec![address]);
        }
        let name = text.to_owned();
        let unanswered = || Err(QuestionError::NotFound(format!("no known address of pod {text}")));
        self.ask(move |world| world.pod_named(&name)).unwrap_or_else(unanswered)
    }
}

impl ActivePolicy {
    /// Explains a flow at both ends: egress, then ingress. An address of this machine in the node's own subnets, such
    /// as a bridge's, is the node's own, although the policies see an unknown pod: as a source, and as the destination
    /// of packets of this machine. Packets from the tunnel to it are judged as a pod's.
    fn explain(&self, flow: &Flow) -> [Explanation; 2] {
        let [mut egress, mut ingress] = self.classifier.explain_connection(flow);
        let Some(node) = self.mesh.own_node() else { return [egress, ingress] };
        if self.is_own_unnamed(flow.source) {
            egress.end = format!("node {node} ({})", flow.source);
            decide(&mut egress, Cause::NoPod);
            if let End::Pod(pod) = self.classifier.end(flow.destination)
                && pod.node.as_ref() == Some(node)
            {
                decide(&mut ingress, Cause::OwnNode);
            }
        }
        if self.is_own_unnamed(flow.destination) && self.mesh.own.iter().any(|net| net.contains(&flow.source)) {
            ingress.end = format!("node {node} ({})", flow.destination);
            decide(&mut ingress, Cause::NoPod);
        }
        [egress, ingress]
    }

    /// Whether this machine has an address that is no overlay address and no pod's.
    fn is_own_unnamed(&self, address: IpAddr) -> bool {
        self.addresses.contains(&address) && self.classifier.end(address) == End::UnknownPod
    }
}

/// No policy is asked: the flow is allowed, because of this.
fn decide(explanation: &mut Explanation, cause: Cause) {
    explanation.verdict = Verdict { allowed: true, cause };
    (explanation.policy, explanation.rule, explanation.rule_name) = (None, None, None);
    (explanation.nearest, explanation.source) = (None, None);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh::topology::PeerId;
    use policy::{
        engine::{Engine, ObjectName, PolicyState},
        object::{NetworkPolicy, PodObject},
    };

    use super::*;
    use crate::{MeshFacts, mesh_facts::NodeFacts};

    /// The node east1 with 10.244.3.0/24, its bridge's 10.244.3.1 and the pod 10.244.3.7; 10.244.5.7 is a pod of
    /// another one. No pod may begin or take anything.
    fn in_force() -> ActivePolicy {
        let mut engine = Engine::new();
        engine.set_networks(vec!["10.244.0.0/16".parse().unwrap()].into());
        for (name, address, node) in [("near", "10.244.3.7", "east1"), ("far", "10.244.5.7", "west1")] {
            let addresses = vec![address.parse().unwrap()];
            let pod = PodObject { addresses, node: Some(node.into()), ..PodObject::default() };
            engine.put_pod(ObjectName::new("shop", name), pod, 1);
        }
        let spec = serde_json::json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
        let policy = PolicyState::Valid(NetworkPolicy::parse(&spec).unwrap());
        engine.put_policy(ObjectName::new("shop", "closed"), &policy);
        let own: Vec<_> = vec!["10.244.3.0/24".parse().unwrap()];
        let facts = NodeFacts {
            name: "east1".into(),
            addresses: Vec::new(),
            prefixes: own.clone().into(),
            ..NodeFacts::default()
        };
        let mut mesh = MeshFacts { own, ..MeshFacts::default() };
        mesh.nodes.set(PeerId::Node("a1".parse().unwrap()), Some(Arc::new(facts)));
        let addresses = Arc::new(["10.244.3.1".parse().unwrap()].into());
        ActivePolicy::new(engine.commit(1), Arc::new(mesh), addresses)
    }

    fn explained(source: &str, destination: &str) -> [String; 2] {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        in_force().explain(&Flow { source, destination, protocol: 6, port: Some(80) }).map(|end| end.to_string())
    }

    #[test]
    fn the_address_of_a_bridge_is_the_nodes_own() {
        let [egress, ingress] = explained("10.244.3.1", "10.244.3.7");
        assert_eq!(egress, "egress of node east1 (10.244.3.1) allowed: not a pod, so no policy applies");
        assert_eq!(ingress, "ingress of pod shop/near (10.244.3.7) allowed: a pod's own node can always reach it");
        // Another node does not know whose it is.
        let [egress, ingress] = explained("10.244.3.1", "10.244.5.7");
        assert_eq!(egress, "egress of node east1 (10.244.3.1) allowed: not a pod, so no policy applies");
        assert!(ingress.starts_with("ingress of pod shop/far (10.244.5.7) denied: isolated by "), "{ingress}");
    }

    #[test]
    fn what_a_local_pod_sends_to_the_address_of_a_bridge_is_for_the_node() {
        let [egress, ingress] = explained("10.244.3.7", "10.244.3.1");
        assert!(egress.starts_with("egress of pod shop/near (10.244.3.7) denied: isolated by "), "{egress}");
        assert_eq!(ingress, "ingress of node east1 (10.244.3.1) allowed: not a pod, so no policy applies");
        let [egress, ingress] = explained("10.244.3.1", "10.244.3.1");
        assert_eq!(egress, "egress of node east1 (10.244.3.1) allowed: not a pod, so no policy applies");
        assert_eq!(ingress, "ingress of node east1 (10.244.3.1) allowed: not a pod, so no policy applies");
        // The tunnel's end knows no such address.
        let [_, ingress] = explained("10.244.5.7", "10.244.3.1");
        assert!(ingress.starts_with("ingress of unknown pod 10.244.3.1 denied: "), "{ingress}");
    }

    #[test]
    fn other_addresses_stay_what_the_policies_take_them_for() {
        for source in ["10.244.3.9", "10.244.5.1"] {
            let [egress, ingress] = explained(source, "10.244.3.7");
            assert!(egress.starts_with(&format!("egress of unknown pod {source} denied: ")), "{egress}");
            assert!(ingress.starts_with("ingress of pod shop/near (10.244.3.7) denied: "), "{ingress}");
        }
        let [egress, _] = explained("10.244.3.7", "10.244.5.7");
        assert!(egress.starts_with("egress of pod shop/near (10.244.3.7) denied: "), "{egress}");
    }
}
