//! A service as operators write it: `tcp/80`, `tcp/http`, `icmp`, `47`.

use std::{collections::BTreeSet, net::IpAddr};

use packet::protocol;

use crate::{
    engine::{Classifier, End, Flow},
    object::Protocol,
};

/// A protocol, and the port where it has ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    protocol: u8,
    port: Port,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Port {
    None,
    Number(u16),
    /// As the destination's pod names it.
    Named(String),
}

/// Protocols that go by their bare number. Any other number is rather a port whose protocol was left out.
const BARE_NUMBERS: [u8; 13] = [1, 2, 4, 41, 47, 50, 51, 58, 89, 97, 103, 112, 115];

impl Service {
    /// What `text` says.
    ///
    /// # Errors
    /// When it says nothing: how to write it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let invalid = || {
            format!("{text:?} must be tcp/PORT, udp/PORT, sctp/PORT (a number or a named port), icmp or proto/NUMBER")
        };
        let (name, port) = match text.split_once('/') {
            Some((name, port)) => (name.to_ascii_lowercase(), Some(port)),
            None => (text.to_ascii_lowercase(), None),
        };
        let with_port = match name.as_str() {
            "tcp" => Some(protocol::TCP),
            "udp" => Some(protocol::UDP),
            "sctp" => Some(protocol::SCTP),
            _ => None,
        };
        if let Some(protocol) = with_port {
            let port = port.ok_or_else(|| format!("{text:?} needs a port: {name}/80"))?;
            let port = match port.parse::<u16>() {
                Ok(0) => return Err(invalid()),
                Ok(number) => Port::Number(number),
                Err(_) if is_port_name(port) => Port::Named(port.to_owned()),
                Err(_) => return Err(invalid()),
            };
            return Ok(Self { protocol, port });
        }
        let alone = |protocol| Ok(Self { protocol, port: Port::None });
        match (name.as_str(), port) {
            ("icmp", None) => alone(protocol::ICMP),
            ("icmpv6", None) => alone(protocol::ICMPV6),
            ("proto", Some(number)) => match number.parse() {
                Ok(number) if Protocol::from_number(number).is_none() => alone(number),
                _ => Err(invalid()),
            },
            (number, None) => match (number.parse::<u8>(), number.parse::<u16>()) {
                (Ok(number), _) if BARE_NUMBERS.contains(&number) => alone(number),
                (_, Ok(number @ 1..)) => Err(format!(
                    "{number}: use tcp/{number} for a port, proto/NUMBER for an IP \
                     protocol"
                )),
                _ => Err(invalid()),
            },
            _ => Err(invalid()),
        }
    }

    /// The flow for this service; a port's name is looked up in the pod that has the destination.
    ///
    /// # Errors
    /// When that pod has no such port, or several.
    pub fn flow(&self, classifier: &Classifier, source: IpAddr, destination: IpAddr) -> Result<Flow, String> {
        let protocol = match self.protocol {
            protocol::ICMP if destination.is_ipv6() => protocol::ICMPV6,
            number => number,
        };
        let port = match &self.port {
            Port::None => None,
            Port::Number(number) => Some(*number),
            Port::Named(name) => Some(self.named(name, &classifier.end(destination), destination)?),
        };
        Ok(Flow { source, destination, protocol, port })
    }

    fn named(&self, name: &str, end: &End, destination: IpAddr) -> Result<u16, String> {
        let protocol = Protocol::from_number(self.protocol);
        let word = protocol.map_or("", Protocol::as_str).to_ascii_lowercase();
        let End::Pod(pod) = end else {
            return Err(format!("{destination} is not a known pod and has no named ports: use {word}/NUMBER"));
        };
        let of_protocol = || pod.ports.iter().filter(|port| Some(port.protocol) == protocol);
        let found: BTreeSet<u16> = of_protocol().filter(|port| &*port.name == name).map(|port| port.port).collect();
        let list = |words: BTreeSet<String>| words.into_iter().collect::<Vec<_>>().join(", ");
        match (found.len(), found.first()) {
            (1, Some(port)) => Ok(*port),
            (0, _) => {
                let known = list(of_protocol().map(|port| format!("{} ({})", port.name, port.port)).collect());
                let known = if known.is_empty() { "none" } else { &known };
                Err(format!(
                    "pod {} has no {word} port named {name:?}; its named {word} ports: {known}. Use {word}/NUMBER",
                    pod.name
                ))
            }
            _ => Err(format!(
                "pod {} has several {word} ports named {name:?}: use one of {}",
                pod.name,
                list(found.iter().map(|port| format!("{word}/{port}")).collect())
            )),
        }
    }
}

/// As the API server has it: letters, digits and `-`, at least one letter, at most 15.
fn is_port_name(text: &str) -> bool {
    text.len() <= 15
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && text.bytes().any(|b| b.is_ascii_alphabetic())
}

#[cfg(test)]
mod tests {
    use crate::{
        engine::{Engine, ObjectName},
        object::pod_from,
    };

    use super::*;

    fn parsed(text: &str) -> Result<(u8, Port), String> {
        Service::parse(text).map(|service| (service.protocol, service.port))
    }

    #[test]
    fn services_are_read_strictly() {
        assert_eq!(parsed("tcp/80"), Ok((6, Port::Number(80))));
        assert_eq!(parsed("UDP/53"), Ok((17, Port::Number(53))));
        assert_eq!(parsed("tcp/http"), Ok((6, Port::Named("http".to_owned()))));
        assert_eq!(parsed("icmp"), Ok((1, Port::None)));
        assert_eq!(parsed("47"), Ok((47, Port::None)));
        assert_eq!(parsed("proto/80"), Ok((80, Port::None)));
        for wrong in ["tcp", "tcp/0", "tcp/65536", "tcp/", "tcp/a_b", "icmp/8", "frob", "70000", "0", "proto/6", ""] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_port_without_its_protocol_is_asked_for() {
        for port in ["80", "443", "8080", "53"] {
            let error = parsed(port).unwrap_err();
            assert!(error.contains(&format!("use tcp/{port} ")), "{error}");
        }
    }

    #[test]
    fn a_ports_name_is_looked_up_in_the_destinations_pod() {
        let mut engine = Engine::new();
        let pod = serde_json::json!({
            "ns": "shop", "name": "db", "ip": "10.244.1.11",
            "ports": [{"name": "pg", "containerPort": 5432}, {"name": "web", "containerPort": 80},
                {"name": "web", "containerPort": 81}, {"name": "dns", "containerPort": 53, "protocol": "UDP"}],
        });
        engine.put_pod(ObjectName::new("shop", "db"), pod_from(&pod).unwrap().2, 1);
        let classifier = engine.commit(1);
        let port = |service: &str, destination: &str| {
            let service = Service::parse(service).unwrap();
            let (source, destination) = ("10.244.1.10".parse().unwrap(), destination.parse().unwrap());
            service.flow(&classifier, source, destination).map(|flow| flow.port)
        };
        assert_eq!(port("tcp/pg", "10.244.1.11"), Ok(Some(5432)));
        assert_eq!(port("udp/dns", "10.244.1.11"), Ok(Some(53)));
        for (service, destination, words) in [
            ("tcp/dns", "10.244.1.11", "its named tcp ports: pg (5432), web (80), web (81). Use tcp/NUMBER"),
            ("tcp/web", "10.244.1.11", "has several tcp ports named \"web\": use one of tcp/80, tcp/81"),
            ("tcp/pg", "10.244.1.12", "10.244.1.12 is not a known pod"),
        ] {
            let error = port(service, destination).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
