//! Verdict samples: a bounded number, at a bounded rate.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use api_types::{FlowSample, SampledVerdict};
use mesh::problem::Problem;
use packet::{Packet, Transport};
use policy::engine::{End, Flow, Side};

use super::{
    ActivePolicy,
    masqueraded::{Suspect, Suspects},
};

/// Samples that are kept.
const KEPT: usize = 1024;
/// Most samples taken of one verdict in one second.
const PER_SECOND: u32 = 50;

#[derive(Debug, Default)]
struct SampleState {
    ring: VecDeque<FlowSample>,
    number: u64,
    second: Option<Instant>,
    taken: [u32; 3],
    suspects: Suspects,
}

#[derive(Debug, Default)]
pub(super) struct Samples(Mutex<SampleState>);

/// A packet that was decided about.
pub(super) struct JudgedPacket<'a> {
    /// Where.
    pub(super) at: &'static str,
    pub(super) side: Side,
    pub(super) packet: &'a Packet,
    pub(super) why: Why,
}

/// The cause of a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// Policies had a say in it.
    Policies,
    /// The source is not one of the pod that it came from.
    Spoofed,
    /// The state of its flow.
    Flow,
}

impl Samples {
    pub(super) fn take(&self, in_force: &ActivePolicy, seen: &JudgedPacket<'_>, sampled: SampledVerdict, now: Instant) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.second.is_none_or(|second| now.saturating_duration_since(second) >= Duration::from_secs(1)) {
            state.second = Some(now);
            state.taken = [0; 3];
        }
        let taken = &mut state.taken[sampled as usize];
        if *taken >= PER_SECOND {
            return;
        }
        *taken += 1;
        state.number += 1;
        let pod = |address| match in_force.classifier.end(address) {
            End::Pod(pod) => Some(pod.name.to_string()),
            _ => None,
        };
        let Packet { source, destination, protocol, .. } = *seen.packet;
        let port = destination_port(seen.packet);
        let flow = protocol.map(|protocol| Flow { source, destination, protocol, port });
        let why = match seen.why {
            Why::Policies => flow.map(|flow| in_force.classifier.explain(seen.side, &flow).to_string()),
            Why::Spoofed => Some("the source is not an address of the sending pod".to_owned()),
            Why::Flow => None,
        };
        let refused = seen.why == Why::Policies && seen.side == Side::Ingress && sampled != SampledVerdict::Allowed;
        let suspect = flow.filter(|_| refused).and_then(|flow| Suspect::of(in_force, &flow));
        let sample = FlowSample {
            number: state.number,
            time: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
            verdict: sampled,
            at: seen.at.to_owned(),
            direction: seen.side.as_str().to_owned(),
            source,
            source_pod: pod(source),
            destination,
            destination_pod: pod(destination),
            protocol,
            port,
            why,
            hint: suspect.as_ref().map(Suspect::to_string),
        };
        if let Some(suspect) = suspect {
            state.suspects.note(&suspect, sample.destination(), now);
        }
        if state.ring.len() >= KEPT {
            state.ring.pop_front();
        }
        state.ring.push_back(sample);
    }

    /// Nodes that may masquerade their pods' packets.
    pub(super) fn hints(&self, now: Instant) -> Vec<Problem> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).suspects.hints(now)
    }

    pub(super) fn after(&self, number: u64) -> Vec<FlowSample> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.ring.iter().filter(|sample| sample.number > number).cloned().collect()
    }
}

const fn destination_port(packet: &Packet) -> Option<u16> {
    match packet.transport {
        Transport::Tcp { destination, .. }
        | Transport::Udp { destination, .. }
        | Transport::Sctp { destination, .. } => Some(destination),
        Transport::Icmp { .. } | Transport::Unknown => None,
    }
}
