//! Explains the verdicts in force to operators.

use std::net::IpAddr;

use api_types::{Explained, Question, QuestionError};
use policy::{engine::ObjectName, service::Service};

use super::{Enforcement, masqueraded::Suspect};

impl Enforcement {
    /// Whether a flow may begin, and why.
    ///
    /// # Errors
    /// When the question makes no sense, or names a pod that is not known.
    pub fn explain(&self, question: &Question) -> Result<Explained, QuestionError> {
        let service = Service::parse(&question.service).map_err(QuestionError::Invalid)?;
        let in_force = self
            .in_force()
            .ok_or_else(|| QuestionError::NotFound("no policies are in force yet, and nothing reaches a pod".into()))?;
        let (sources, destinations) = (self.addresses(&question.source)?, self.addresses(&question.destination)?);
        // Of pods with addresses of both families one that both have.
        let mut pairs =
            sources.iter().flat_map(|source| destinations.iter().map(move |destination| (*source, *destination)));
        let (source, destination) =
            pairs.find(|(source, destination)| source.is_ipv4() == destination.is_ipv4()).ok_or_else(|| {
                let (source, destination) = (&question.source, &question.destination);
                QuestionError::Invalid(format!("{source} and {destination} have no address of one family"))
            })?;
        let flow = service.flow(&in_force.classifier, source, destination).map_err(QuestionError::Invalid)?;
        let mut explained = Explained::of(&in_force.classifier, &flow, Vec::new());
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
        let Some((namespace, name)) = text.split_once('/') else {
            return Err(QuestionError::Invalid(format!("{text:?} must be NAMESPACE/POD or an address")));
        };
        let name = ObjectName::new(namespace, name);
        let found = self.ask(move |world| world.addresses_of(&name)).unwrap_or_default();
        if found.is_empty() {
            return Err(QuestionError::NotFound(format!("no address of a pod {text} is known")));
        }
        Ok(found)
    }
}
