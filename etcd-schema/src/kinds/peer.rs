//! `peers/NAME`: an external WireGuard peer.

use std::{fmt, net::SocketAddr};

use ipnet::IpNet;
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use super::{KindInfo, KindRules, RecordClass};
use crate::{
    PeerName, PresharedKey, PublicKey, SiteName, Violations,
    address::{endpoint, routed_prefix},
    document::{DocumentLimits, read},
    fields::{Fields, NamesOf, Writer},
    summary::list,
    violation::Report,
};

/// Where an external peer is reached.
pub type Endpoint = SocketAddr;

/// Value of `peers/NAME`: `{"publicKey","allowedIPs","endpoint","presharedKey","persistentKeepalive","site"}`.
#[derive(Clone, PartialEq)]
pub struct OutsidePeer {
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// Prefixes that are its own: 1 to `MAX_ALLOWED_IPS`, without host bits, none inside another, no default
    /// route; in the order they were written, repetitions left out.
    pub allowed_ips: Vec<IpNet>,
    /// Where to call it; without one it calls us.
    pub endpoint: Option<Endpoint>,
    /// WireGuard's optional symmetric key.
    pub preshared_key: Option<PresharedKey>,
    /// Seconds between keepalives; `None` sends none.
    pub persistent_keepalive: Option<u16>,
    /// Its site.
    pub site: Option<SiteName>,
    /// Fields we do not know, kept over a rewrite.
    pub extra: Map<String, Value>,
}

pub(super) const KIND: KindInfo =
    KindInfo { place: "peers/", is_flat: true, rules: KindRules::mesh(RecordClass::Setting), fields: KNOWN };

const KNOWN: &[&str] = &["publicKey", "allowedIPs", "endpoint", PRESHARED_KEY, "persistentKeepalive", "site"];

const PRESHARED_KEY: &str = "presharedKey";

impl OutsidePeer {
    /// Most entries of `allowedIPs`: enough for the office networks behind one gateway, and a table of every node.
    pub(crate) const MAX_ALLOWED_IPS: usize = 4096;

    /// The peer that `value` holds, in JSON or YAML.
    ///
    /// # Errors
    /// All that is wrong with it; the pre-shared key is never repeated.
    pub fn parse(value: &[u8]) -> Result<Self, Violations> {
        let mut fields = Fields::root(read(value, DocumentLimits::RECORD)?);
        let mut report = Report::default();
        let public_key =
            fields.required(&mut report, "publicKey", "write the peer's WireGuard public key", PublicKey::read);
        let allowed_ips = read_allowed_ips(&mut fields, &mut report);
        let endpoint = fields.parsed(&mut report, "endpoint", endpoint);
        let preshared_key = read_preshared_key(&mut fields, &mut report);
        let persistent_keepalive = fields
            .integer(&mut report, "persistentKeepalive", 0..=u16::MAX, " seconds; 0 sends none")
            .filter(|seconds| *seconds != 0);
        let site = fields.parsed(&mut report, "site", SiteName::read);
        let extra = fields.rest(&mut report, KNOWN);
        let peer = public_key.map(|public_key| Self {
            public_key,
            allowed_ips,
            endpoint,
            preshared_key,
            persistent_keepalive,
            site,
            extra,
        });
        report.finish(peer)
    }

    /// The value as JSON, fields without a value left out. It holds the pre-shared key.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.put("publicKey", self.public_key.to_string())
            .texts("allowedIPs", &self.allowed_ips)
            .maybe("endpoint", self.endpoint.map(|e| e.to_string()))
            .maybe(PRESHARED_KEY, self.preshared_key.as_ref().map(|k| k.secret_base64().as_str().to_owned()))
            .maybe("persistentKeepalive", self.persistent_keepalive)
            .maybe("site", self.site.as_ref().map(SiteName::as_str));
        out.json(&self.extra)
    }

    /// A one-line summary for operators.
    pub(super) fn summary(&self, name: &PeerName) -> String {
        let reached = self.endpoint.map_or_else(|| "initiates connections".to_owned(), |e| format!("endpoint {e}"));
        let secret = if self.preshared_key.is_some() { ", with a pre-shared key" } else { "" };
        format!(
            "external peer {name}, key {}{secret}, {reached}, allowed IPs {}",
            self.public_key,
            list(&self.allowed_ips)
        )
    }
}

impl fmt::Debug for OutsidePeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutsidePeer")
            .field("public_key", &self.public_key)
            .field("allowed_ips", &self.allowed_ips)
            .field("endpoint", &self.endpoint)
            .field("preshared_key", &self.preshared_key)
            .field("persistent_keepalive", &self.persistent_keepalive)
            .field("site", &self.site)
            .field("extra", &NamesOf(&self.extra))
            .finish()
    }
}

fn read_allowed_ips(fields: &mut Fields, report: &mut Report) -> Vec<IpNet> {
    const NAME: &str = "allowedIPs";
    let prefixes =
        fields.some_texts(report, NAME, OutsidePeer::MAX_ALLOWED_IPS, "list the peer's prefixes", routed_prefix);
    without_overlap(prefixes, report)
}

/// `prefixes`, each with its place, in their order without repetitions; one inside another is noted.
fn without_overlap(mut prefixes: Vec<(usize, IpNet)>, report: &mut Report) -> Vec<IpNet> {
    // A prefix comes right before those inside it, and of equal ones the first written comes first.
    prefixes.sort_by_key(|(i, net)| (net.network(), net.prefix_len(), *i));
    let mut kept: Vec<(usize, IpNet)> = Vec::with_capacity(prefixes.len());
    for (i, net) in prefixes {
        match kept.last() {
            Some((_, outer)) if *outer == net => {}
            Some((_, outer)) if outer.contains(&net) => report.add(
                format!("allowedIPs[{i}]"),
                format!("\"{net}\""),
                format!("must not lie inside {outer} of the same list: keep one of the two"),
            ),
            _ => kept.push((i, net)),
        }
    }
    kept.sort_by_key(|(i, _)| *i);
    kept.into_iter().map(|(_, net)| net).collect()
}

fn read_preshared_key(fields: &mut Fields, report: &mut Report) -> Option<PresharedKey> {
    let expected = match fields.take(PRESHARED_KEY)? {
        Value::String(text) => {
            let text = Zeroizing::new(text);
            match PresharedKey::read(&text) {
                Ok(key) => return Some(key),
                Err(expected) => expected,
            }
        }
        _ => "must be text: 32 bytes in base64".into(),
    };
    report.add(PRESHARED_KEY, "not shown", expected);
    None
}
