//! Verdicts that `meshctl flows` shows.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SampledVerdict {
    /// The flow is allowed.
    Allowed,
    /// The flow was refused, or cut.
    Denied,
    /// The flow passed in audit mode only.
    Audited,
}

/// A verdict, in names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowSample {
    /// Grows by one with each sample of this run.
    pub number: u64,
    /// Unix time in milliseconds.
    pub time: u64,
    /// The verdict.
    pub verdict: SampledVerdict,
    /// Where: `tunnel` or `nftables`.
    pub at: String,
    /// `ingress` or `egress`.
    pub direction: String,
    /// The source address.
    pub source: IpAddr,
    /// The source pod, `NS/NAME` or `CLUSTER:NS/NAME`, if known.
    pub source_pod: Option<String>,
    /// The destination address.
    pub destination: IpAddr,
    /// The destination pod, if known.
    pub destination_pod: Option<String>,
    /// Protocol number.
    pub protocol: Option<u8>,
    /// Destination port.
    pub port: Option<u16>,
    /// Why: policy and rule.
    pub why: Option<String>,
    /// A possible cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl FlowSample {
    /// The destination and its port, for people.
    #[must_use]
    pub fn destination(&self) -> String {
        let service = match (self.protocol.and_then(policy::object::Protocol::from_number), self.port) {
            (Some(protocol), Some(port)) => format!("{}/{port}", protocol.as_str().to_ascii_lowercase()),
            _ => self.protocol.map_or_else(|| "?".to_owned(), |number| format!("protocol {number}")),
        };
        format!("{} {service}", end(self.destination_pod.as_deref(), self.destination))
    }
}

/// A flow's end, for people.
fn end(pod: Option<&str>, address: IpAddr) -> String {
    match pod {
        Some(pod) => format!("{pod} ({address})"),
        None => address.to_string(),
    }
}

impl std::fmt::Display for FlowSample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = match self.verdict {
            SampledVerdict::Allowed => "allowed",
            SampledVerdict::Denied => "denied",
            SampledVerdict::Audited => "would be denied",
        };
        let source = end(self.source_pod.as_deref(), self.source);
        write!(f, "{verdict}  {source} -> {} at {}", self.destination(), self.at)?;
        if let Some(why) = &self.why {
            write!(f, ": {why}")?;
        }
        match &self.hint {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}
