//! Questions of operators about what is in force.

use std::net::IpAddr;

use policy::{
    engine::{Flow, ObjectName},
    packet::protocol,
};

use super::Enforcement;
use crate::api::{Explained, Question, QuestionError};

impl Enforcement {
    /// Whether a flow may begin, and why.
    ///
    /// # Errors
    /// When the question makes no sense, or names a pod that is not known.
    pub fn explain(&self, question: &Question) -> Result<Explained, QuestionError> {
        let (protocol, port) = service(&question.service)?;
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
        let flow = Flow { source, destination, protocol, port };
        Ok(Explained::of(&in_force.classifier, &flow, Vec::new()))
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

/// `tcp/80`, `icmp`, `47`.
fn service(text: &str) -> Result<(u8, Option<u16>), QuestionError> {
    let invalid = || {
        QuestionError::Invalid(format!(
            "{text:?} must be tcp/PORT, udp/PORT, sctp/PORT, icmp, icmpv6 or a protocol's number"
        ))
    };
    let (name, port) = match text.split_once('/') {
        Some((name, port)) => (name, Some(port.parse().ok().filter(|port| *port > 0).ok_or_else(invalid)?)),
        None => (text, None),
    };
    let protocol = match name.to_ascii_lowercase().as_str() {
        "tcp" => protocol::TCP,
        "udp" => protocol::UDP,
        "sctp" => protocol::SCTP,
        "icmp" => protocol::ICMP,
        "icmpv6" => protocol::ICMPV6,
        number => number.parse().map_err(|_| invalid())?,
    };
    let with_ports = matches!(protocol, protocol::TCP | protocol::UDP | protocol::SCTP);
    if with_ports == port.is_some() { Ok((protocol, port)) } else { Err(invalid()) }
}

#[cfg(test)]
mod tests {
    use super::service;

    #[test]
    fn services_are_read_strictly() {
        assert_eq!(service("tcp/80"), Ok((6, Some(80))));
        assert_eq!(service("UDP/53"), Ok((17, Some(53))));
        assert_eq!(service("icmp"), Ok((1, None)));
        assert_eq!(service("47"), Ok((47, None)));
        for wrong in ["tcp", "tcp/0", "tcp/65536", "tcp/x", "icmp/8", "frob", "300", ""] {
            assert!(service(wrong).is_err(), "{wrong}");
        }
    }
}
