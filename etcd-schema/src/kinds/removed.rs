//! `removed/ID`: a node that was permanently removed from the mesh.

use serde_json::Map;

use super::{KindInfo, KindRules, RecordClass};
use crate::{
    NodeId, NodeName, PublicKey, Violations,
    document::{DocumentLimits, read},
    fields::{Expected, Fields, Writer},
    summary::counted,
    violation::Report,
};

/// Value of `removed/ID`: `{"name", "publicKeys", "time"}`.
///
/// The key alone marks the node as removed, so each field is optional (`{}` is a valid value). Unknown fields are
/// ignored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removed {
    /// The node's name when it was removed, if it had a readable record.
    pub name: Option<NodeName>,
    /// Keys that no node may use while this record exists.
    pub public_keys: Vec<PublicKey>,
    /// RFC 3339, for people.
    pub time: String,
}

pub(super) const KIND: KindInfo =
    KindInfo { place: "removed/", is_flat: true, rules: KindRules::mesh(RecordClass::Setting), fields: KNOWN };

const KNOWN: &[&str] = &["name", "publicKeys", "time"];

impl Removed {
    /// Most entries of `publicKeys`: room for each key that a node had in several removals and rotations.
    pub const MAX_KEYS: usize = 64;

    /// The removal that `value` holds, in JSON or YAML.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn parse(value: &[u8]) -> Result<Self, Violations> {
        let mut fields = Fields::root(read(value, DocumentLimits::RECORD)?);
        let mut report = Report::default();
        let name = fields.parsed(&mut report, "name", NodeName::read);
        let public_keys = fields.texts(&mut report, "publicKeys", Self::MAX_KEYS, PublicKey::read).unwrap_or_default();
        let time = fields.parsed(&mut report, "time", timestamp).unwrap_or_default();
        fields.rest(&mut report, KNOWN);
        report.finish(Some(Self { name, public_keys, time }))
    }

    /// The value as JSON, fields without a value left out.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.maybe("name", self.name.as_ref().map(NodeName::as_str))
            .texts("publicKeys", &self.public_keys)
            .maybe("time", Some(self.time.as_str()).filter(|time| !time.is_empty()));
        out.json(&Map::new())
    }

    /// A one-line summary for operators.
    pub(super) fn summary(&self, id: &NodeId) -> String {
        let name = self.name.as_ref().map_or_else(String::new, |name| format!(" ({name})"));
        format!("node {id}{name} removed, with {}", counted(self.public_keys.len(), "public key"))
    }
}

/// The form of RFC 3339; days of the month are not counted.
///
/// # Errors
/// The violated rule.
pub fn timestamp(text: &str) -> Result<String, Expected> {
    const FORM: &str = "must be a time as in RFC 3339, such as 2026-01-31T12:00:00Z";
    let number = |from: usize, to: usize, range: std::ops::RangeInclusive<u32>| {
        text.get(from..to)
            .filter(|s| s.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|s| s.parse().ok())
            .is_some_and(|n| range.contains(&n))
    };
    let mark = |at: usize, marks: &[u8]| text.as_bytes().get(at).is_some_and(|b| marks.contains(b));
    let date =
        number(0, 4, 0..=9999) && mark(4, b"-") && number(5, 7, 1..=12) && mark(7, b"-") && number(8, 10, 1..=31);
    let time = mark(10, b"Tt ")
        && number(11, 13, 0..=23)
        && mark(13, b":")
        && number(14, 16, 0..=59)
        && mark(16, b":")
        && number(17, 19, 0..=60);
    if !date || !time || text.len() > 40 {
        return Err(FORM.into());
    }
    let mut zone = 19;
    if mark(zone, b".") {
        let digits = text.bytes().skip(20).take_while(u8::is_ascii_digit).count();
        if digits == 0 {
            return Err(FORM.into());
        }
        zone = 20 + digits;
    }
    let utc = mark(zone, b"Zz") && text.len() == zone + 1;
    let offset = mark(zone, b"+-")
        && number(zone + 1, zone + 3, 0..=23)
        && mark(zone + 3, b":")
        && number(zone + 4, zone + 6, 0..=59)
        && text.len() == zone + 6;
    if utc || offset { Ok(text.to_owned()) } else { Err(FORM.into()) }
}

#[cfg(test)]
mod tests {
    use super::timestamp;

    #[test]
    fn times_as_in_rfc_3339() {
        for text in [
            "2026-11-22T22:35:05Z",
            "2026-11-22t22:35:05z",
            "2026-11-22T22:35:05.123456789Z",
            "2026-11-22T22:35:60+01:00",
            "2026-11-22 22:35:05-23:59",
        ] {
            assert!(timestamp(text).is_ok(), "{text}");
        }
        for text in [
            "",
            "2026-11-22",
            "2026-11-22T22:35:05",
            "2026-13-22T22:35:05Z",
            "2026-11-32T22:35:05Z",
            "2026-11-22T24:35:05Z",
            "2026-11-22T22:35:05.Z",
            "2026-11-22T22:35:05ZZ",
            "2026-11-22T22:35:05+1:00",
            "2026-11-22T22:35:05+01:00x",
            "+026-11-22T22:35:05Z",
            "2026-11-22T22:35:0éZ",
            "2026-11-22T22:35:05.1234567890123456789012345678901234567890Z",
        ] {
            assert!(timestamp(text).is_err(), "{text}");
        }
    }
}
