//! Sequences of packets: built as bytes, parsed, and judged by a flow table at both ends.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use packet::{Packet, protocol, tcp_flags};
use serde_json::Value;

use super::{Problem, list, probe::protocol_number, problem, store::WorldObjects};
use crate::{
    engine::{Classifier, Flow, Verdict},
    flow::{FlowTable, Judgement, Limits, Origin, Rules},
};

/// A sequence on its way.
pub(super) struct Sequence {
    table: FlowTable,
    begin: Instant,
    now: Instant,
}

/// Both ends' policies at one place.
struct BothEnds<'c>(&'c Classifier);

impl Rules for BothEnds<'_> {
    fn generation(&self) -> u64 {
        self.0.generation()
    }

    fn judge(&self, _: Origin, flow: &Flow) -> Verdict {
        let connection = self.0.connection(flow);
        if connection.egress.allowed { connection.ingress } else { connection.egress }
    }

    fn owners(&self, flow: &Flow) -> (u32, u32) {
        Rules::owners(self.0, flow)
    }

    fn unchanged_since(&self, _: Origin, _: &Flow) -> u64 {
        self.0.generation()
    }
}

/// The expected and actual outcome of a packet.
pub(super) struct CheckedPacket {
    pub(super) expect_pass: bool,
    pub(super) passes: bool,
    pub(super) reason: String,
}

impl Sequence {
    /// `begin` is any time: only differences count.
    pub(super) fn new(begin: Instant) -> Self {
        let limits = Limits { flows: 4096, ..Limits::default() };
        Self { table: FlowTable::new(limits, 0, begin), begin, now: begin }
    }

    pub(super) fn packet(
        &mut self,
        value: &Value,
        store: &WorldObjects,
        classifier: &Classifier,
    ) -> Result<CheckedPacket, Problem> {
        let expect_pass = match value.get("expect").and_then(Value::as_str) {
            Some("pass" | "allow") => true,
            Some("drop" | "deny") => false,
            other => return Err(problem("expect", format!("{other:?}: must be pass or drop"))),
        };
        if let Some(t) = value.get("t").and_then(Value::as_f64) {
            let at = Duration::try_from_secs_f64(t).ok().and_then(|t| self.begin.checked_add(t));
            self.now = at.ok_or_else(|| problem("t", "must be seconds since the start"))?.max(self.now);
        }
        let bytes = bytes(value, store)?;
        let packet = match Packet::parse(&bytes) {
            Ok(packet) => packet,
            Err(error) => return Ok(CheckedPacket { expect_pass, passes: false, reason: error.to_string() }),
        };
        let rules = BothEnds(classifier);
        let mut judgement = self.table.inbound(&rules, &packet, &bytes, 0, self.now);
        if let Judgement::Ask(_) = judgement {
            // Nothing was before the sequence, so there is nothing else to know of.
            judgement = self.table.answered(&rules, &packet, &bytes, false, self.now);
        }
        let reason = match judgement {
            Judgement::Drop(crate::flow::Dropped::Policy(_)) => {
                let flow = crate::flow::Tuple::of(&packet).flow();
                let ends = classifier.explain_connection(&flow);
                let refusing = ends.iter().filter(|end| !end.verdict.allowed).map(ToString::to_string);
                refusing.collect::<Vec<_>>().join("; ")
            }
            other => format!("{other:?}"),
        };
        Ok(CheckedPacket { expect_pass, passes: judgement.passes(), reason })
    }
}

fn bytes(value: &Value, store: &WorldObjects) -> Result<Vec<u8>, Problem> {
    let end = |name: &str| -> Result<IpAddr, Problem> {
        let text = value.get(name).and_then(Value::as_str).ok_or_else(|| problem(name, "missing"))?;
        let named = || store.addresses_of(text).first().copied();
        text.parse().ok().or_else(named).ok_or_else(|| problem(name, format!("{text}: no address")))
    };
    let (source, destination) = (end("src")?, end("dst")?);
    let name = value.get("proto").or_else(|| value.get("protocol")).and_then(Value::as_str).unwrap_or("TCP");
    let number = protocol_number(name, source).ok_or_else(|| problem("proto", format!("{name}: no such protocol")))?;
    let fragment = match value.get("frag") {
        None | Some(Value::Null) => None,
        Some(fragment) => {
            let number = |name: &str| fragment.get(name).and_then(Value::as_u64).unwrap_or(0);
            Some((number("id") as u32, number("off") as u16, fragment.get("more") == Some(&Value::Bool(true))))
        }
    };
    let later = fragment.is_some_and(|(_, offset, _)| offset > 0);
    let payload = if later { vec![0; 64] } else { transport(value, number, source.is_ipv4(), store)? };
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut packet = vec![0x45, 0];
            packet.extend((20 + payload.len() as u16).to_be_bytes());
            let (id, offset, more) = fragment.unwrap_or((0, 0, false));
            packet.extend((id as u16).to_be_bytes());
            packet.extend(((offset / 8) | if more { 0x2000 } else { 0 }).to_be_bytes());
            packet.extend([64, number, 0, 0]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            packet.extend(payload);
            Ok(packet)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let extra = if fragment.is_some() { 8 } else { 0 };
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend((extra + payload.len() as u16).to_be_bytes());
            packet.extend([if fragment.is_some() { 44 } else { number }, 64]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            if let Some((id, offset, more)) = fragment {
                packet.extend([number, 0]);
                packet.extend(((offset & 0xfff8) | u16::from(more)).to_be_bytes());
                packet.extend(id.to_be_bytes());
            }
            packet.extend(payload);
            Ok(packet)
        }
        _ => Err(problem("dst", "another family than the source")),
    }
}

/// Header and some payload, a multiple of eight bytes.
fn transport(value: &Value, number: u8, v4: bool, store: &WorldObjects) -> Result<Vec<u8>, Problem> {
    let port = |name: &str| -> Result<[u8; 2], Problem> {
        let port = value.get(name).and_then(Value::as_u64).unwrap_or(0);
        Ok(u16::try_from(port).map_err(|_| problem(name, "must be a number up to 65535"))?.to_be_bytes())
    };
    let text = |name: &str| value.get(name).and_then(Value::as_str);
    let mut out = Vec::new();
    match number {
        protocol::TCP | protocol::UDP | protocol::SCTP => {
            out.extend(port("sport")?);
            out.extend(port("dport")?);
        }
        _ => {}
    }
    match number {
        protocol::TCP => {
            out.extend([0; 8]);
            out.extend([0x50, flags(text("flags").unwrap_or("S"))?]);
            out.extend([0xff, 0xff, 0, 0, 0, 0]);
        }
        protocol::UDP => out.extend([0, 24, 0, 0]),
        protocol::SCTP => {
            out.extend([0; 8]);
            out.push(chunk(value.get("chunk").unwrap_or(&Value::Null))?);
            out.extend([0, 0, 4]);
        }
        protocol::ICMP | protocol::ICMPV6 if v4 == (number == protocol::ICMP) => {
            let (kind, code) = icmp(value.get("type").unwrap_or(&Value::Null), v4)?;
            let code = value.get("code").and_then(Value::as_u64).map_or(code, |code| code as u8);
            out.extend([kind, code, 0, 0]);
            match value.get("inner").filter(|inner| !inner.is_null()) {
                Some(inner) => {
                    out.extend([0; 4]);
                    out.extend(bytes(inner, store).map_err(|(at, what)| (format!("inner.{at}"), what))?);
                }
                None => {
                    out.extend(port("id")?);
                    out.extend([0; 2]);
                }
            }
        }
        _ => {}
    }
    out.resize((out.len() + 16).next_multiple_of(8), 0);
    if number == protocol::UDP {
        let len = (out.len() as u16).to_be_bytes();
        out[4..6].copy_from_slice(&len);
    }
    Ok(out)
}

fn flags(text: &str) -> Result<u8, Problem> {
    const PSH: u8 = 0x08;
    const URG: u8 = 0x20;
    text.chars().filter(|c| !matches!(c, '.' | '-' | ' ')).try_fold(0, |flags, c| {
        Ok(flags
            | match c.to_ascii_uppercase() {
                'S' => tcp_flags::SYN,
                'A' => tcp_flags::ACK,
                'F' => tcp_flags::FIN,
                'R' => tcp_flags::RST,
                'P' => PSH,
                'U' => URG,
                other => return Err(problem("flags", format!("{other}: must be of S A F R P U"))),
            })
    })
}

/// Words as they are written in different places: case and separators do not count.
fn word(text: &str) -> String {
    text.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

fn chunk(value: &Value) -> Result<u8, Problem> {
    let text = match value {
        Value::Null => return Ok(1),
        Value::Number(number) => return Ok(number.as_u64().unwrap_or(0) as u8),
        other => other.as_str().unwrap_or_default(),
    };
    Ok(match word(text).as_str() {
        "data" => 0,
        "init" => 1,
        "initack" => 2,
        "sack" => 3,
        "heartbeat" => 4,
        "heartbeatack" => 5,
        "abort" => 6,
        "shutdown" => 7,
        "shutdownack" => 8,
        "error" => 9,
        "cookieecho" => 10,
        "cookieack" => 11,
        "ecne" => 12,
        "cwr" => 13,
        "shutdowncomplete" => 14,
        "auth" => 15,
        "idata" => 64,
        "asconfack" => 128,
        "reconfig" => 130,
        "pad" => 132,
        "forwardtsn" => 192,
        "asconf" => 193,
        "iforwardtsn" => 194,
        _ => return Err(problem("chunk", format!("{text}: no such chunk"))),
    })
}

/// Type and usual code.
fn icmp(value: &Value, v4: bool) -> Result<(u8, u8), Problem> {
    let text = match value {
        Value::Null => "echo-request",
        Value::Number(number) => return Ok((number.as_u64().unwrap_or(0) as u8, 0)),
        other => other.as_str().unwrap_or_default(),
    };
    let (four, six) = match word(text).as_str() {
        "echo" | "echorequest" | "ping" | "request" => ((8, 0), (128, 0)),
        "echoreply" | "pong" | "reply" => ((0, 0), (129, 0)),
        "destinationunreachable" | "destunreachable" | "unreachable" => ((3, 0), (1, 0)),
        "networkunreachable" | "netunreachable" => ((3, 0), (1, 0)),
        "hostunreachable" | "addressunreachable" => ((3, 1), (1, 3)),
        "portunreachable" => ((3, 3), (1, 4)),
        "fragmentationneeded" | "fragneeded" | "packettoobig" | "toobig" => ((3, 4), (2, 0)),
        "administrativelyprohibited" | "adminprohibited" => ((3, 13), (1, 1)),
        "timeexceeded" | "ttlexceeded" => ((11, 0), (3, 0)),
        "parameterproblem" | "paramproblem" => ((12, 0), (4, 0)),
        "sourcequench" => ((4, 0), (1, 0)),
        "redirect" => ((5, 1), (137, 0)),
        "routeradvertisement" => ((9, 0), (134, 0)),
        "routersolicitation" => ((10, 0), (133, 0)),
        "neighborsolicitation" | "neighboursolicitation" => ((255, 0), (135, 0)),
        "neighboradvertisement" | "neighbouradvertisement" => ((255, 0), (136, 0)),
        "timestamp" | "timestamprequest" => ((13, 0), (128, 0)),
        "timestampreply" => ((14, 0), (129, 0)),
        "addressmask" | "addressmaskrequest" => ((17, 0), (128, 0)),
        "addressmaskreply" => ((18, 0), (129, 0)),
        number => {
            let number = number.parse().map_err(|_| problem("type", format!("{text}: no such type")))?;
            ((number, 0), (number, 0))
        }
    };
    Ok(if v4 { four } else { six })
}

/// Runs all packets and changes of a world; `checked` is called for each packet.
pub(super) fn run(
    world: &Value,
    store: &mut WorldObjects,
    begin: Instant,
    mut checked: impl FnMut(usize, &Value, CheckedPacket),
) -> Result<(), Problem> {
    let packets = list(world, "packets")?;
    if packets.is_empty() {
        return Ok(());
    }
    let mut sequence = Sequence::new(begin);
    let mut classifier = store.classifier();
    for (i, value) in packets.iter().enumerate() {
        let below = |(at, what): Problem| (format!("packets[{i}].{at}"), what);
        if value.get("apply").is_some() {
            for change in list(value, "apply")? {
                store.apply(change).map_err(below)?;
            }
            classifier = store.classifier();
        }
        if value.get("src").is_some() || value.get("expect").is_some() {
            checked(i, value, sequence.packet(value, store, &classifier).map_err(below)?);
        }
    }
    Ok(())
}
