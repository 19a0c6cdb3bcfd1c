//! Unknown fields: allowed, preserved by rewrites, and often a typing mistake.

use std::fmt;

use serde_json::{Map, Value};

use crate::{
    Key,
    document::{DocumentLimits, read},
    kinds::{KNOWN_BACKEND, WITHOUT_MEANING},
    spelling::nearest,
    violation::{join, quoted},
};

/// A field that this version does not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownField {
    /// Its path, such as `Backend.DirectRoutin`.
    pub path: String,
    /// The field that it is nearest to, where it is near to one.
    pub meant: Option<&'static str>,
    /// Why an option of Flannel's has no meaning here, if it is one.
    pub without_meaning: Option<&'static str>,
}

impl fmt::Display for UnknownField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(why) = self.without_meaning {
            return write!(f, "Flannel's {} has no meaning here: {why}", self.path);
        }
        write!(f, "unknown field {} is ignored", quoted(&self.path))?;
        self.meant.map_or(Ok(()), |meant| write!(f, "; did you mean {meant}?"))
    }
}

/// The unknown fields of a valid value. Those of Kubernetes objects are irrelevant here and are not reported.
pub(crate) fn unknown_fields(key: &Key, value: &[u8]) -> Vec<UnknownField> {
    let known = key.kind().fields;
    if known.is_empty() {
        return Vec::new();
    }
    let Ok(fields) = read(value, DocumentLimits::RECORD) else { return Vec::new() };
    let mut unknown = beside(known, &fields, "");
    if let (Key::Config, Some(Value::Object(backend))) = (key, fields.get("Backend")) {
        let of_flannel = |field: UnknownField| {
            let name = field.path.strip_prefix("Backend.").unwrap_or_default();
            let known = WITHOUT_MEANING.iter().find(|(known, _)| *known == name);
            UnknownField { without_meaning: known.map(|(_, why)| *why), ..field }
        };
        unknown.extend(beside(KNOWN_BACKEND, backend, "Backend").into_iter().map(of_flannel));
    }
    unknown
}

fn beside(known: &[&'static str], fields: &Map<String, Value>, path: &str) -> Vec<UnknownField> {
    let unknown = fields.keys().filter(|name| !known.contains(&name.as_str()));
    unknown
        .map(|name| UnknownField { path: join(path, name), meant: nearest(known, name), without_meaning: None })
        .collect()
}

#[cfg(test)]
mod tests {
    use crate::check;

    #[test]
    fn a_misspelt_field_is_told_with_the_one_that_it_is_near_to() {
        let value = br#"{"Network": "10.244.0.0/16", "LeesTTL": 60, "note": "x",
            "IPv6SubnetLen": 64, "Backend": {"Type": "wireguard", "PSK": "x"}}"#;
        let told: Vec<String> = check("config", value).unwrap().unknown.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "unknown field \"LeesTTL\" is ignored; did you mean LeaseTTL?",
                "unknown field \"note\" is ignored",
                "Flannel's Backend.PSK has no meaning here: each pair of nodes has keys of its own",
            ]
        );
    }
}
