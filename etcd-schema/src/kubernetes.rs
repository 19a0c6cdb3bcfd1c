//! Kubernetes objects as `kubectl get … -o json|yaml` prints one: the envelope of all kinds.
//!
//! Unknown fields are ignored, since objects come from API servers of many versions. Known fields are validated like
//! the API server does, because operators may write values by hand.

mod labels;
mod namespace;
mod node;
mod pod;
mod policy;

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::{
    KubernetesName, Violations,
    document::{Limits, describe, read},
    fields::{Expected, Fields},
    kinds::timestamp,
    violation::{Report, quoted},
};

pub use namespace::Namespace;
pub use node::KubernetesNode;
pub use pod::{MIRROR_ANNOTATIONS, NamedPort, Pod, PodPhase, Protocol};
pub use policy::PolicyEnvelope;

pub(crate) use labels::read_labels;

/// Labels of an object, by key.
pub type Labels = BTreeMap<String, String>;

/// Longest `metadata.uid`, in bytes.
const MAX_UID: usize = 128;

/// A kind of object.
#[derive(Debug, Clone, Copy)]
struct Kind {
    name: &'static str,
    /// The versions that are read; they differ in nothing that is.
    api_versions: &'static [&'static str],
}

/// Where the key says that an object belongs.
#[derive(Debug, Clone, Copy)]
struct Place<'k> {
    /// `None` for kinds without namespace.
    namespace: Option<&'k KubernetesName>,
    name: &'k KubernetesName,
}

/// An object whose envelope was read.
#[derive(Debug)]
struct Object {
    /// All but `apiVersion`, `kind` and `metadata`.
    fields: Fields,
    uid: Option<String>,
    labels: Labels,
    /// `metadata.annotations`, unchecked: any text is valid, and other values are ignored.
    annotations: Map<String, Value>,
    /// `metadata.deletionTimestamp`, RFC 3339.
    deletion_timestamp: Option<String>,
}

impl Object {
    /// Reads the envelope of the object of `kind` in `value`. What is wrong with it is noted in `report`; only a value
    /// that is not one object of this kind at all is refused at once.
    fn read(value: &[u8], kind: Kind, place: Place<'_>, report: &mut Report) -> Result<Self, Violations> {
        let mut fields = Fields::root(read(value, Limits::KUBERNETES)?);
        of_kind(&mut fields, kind)?;
        let Some(mut metadata) = fields.object(report, "metadata") else {
            return Err(Violations::one(
                "metadata",
                "missing",
                format!("write the object as kubectl prints a {}", kind.name),
            ));
        };
        same_name(&mut metadata, report, "name", place.name);
        match place.namespace {
            Some(namespace) => same_name(&mut metadata, report, "namespace", namespace),
            None => {
                if let Some(text) = metadata.text(report, "namespace")
                    && !text.is_empty()
                {
                    report.add(
                        "metadata.namespace",
                        quoted(&text),
                        format!("a {} has no namespace: leave it out", kind.name),
                    );
                }
            }
        }
        let uid = metadata.parsed(report, "uid", uid);
        let labels = read_labels(&mut metadata, report);
        let annotations = match metadata.take("annotations") {
            Some(Value::Object(annotations)) => annotations,
            _ => Map::new(),
        };
        let deletion_timestamp = metadata.parsed(report, "deletionTimestamp", timestamp);
        Ok(Self { fields, uid, labels, annotations, deletion_timestamp })
    }
}

/// A Kubernetes uid, opaque text.
pub(crate) fn uid(text: &str) -> Result<String, Expected> {
    let plain = (1..=MAX_UID).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    if plain { Ok(text.to_owned()) } else { Err(format!("must be 1 to {MAX_UID} printable characters").into()) }
}

fn of_kind(fields: &mut Fields, kind: Kind) -> Result<(), Violations> {
    let found = fields.take("kind");
    let is_list = found
        .as_ref()
        .and_then(Value::as_str)
        .is_some_and(|k| k == "List" || k.strip_suffix("List") == Some(kind.name));
    if is_list {
        return Err(Violations::one(
            "kind",
            found.as_ref().map_or_else(String::new, describe),
            format!("put each {} of the list under its own key", kind.name),
        ));
    }
    for (name, found, wanted) in
        [("kind", found, &[kind.name][..]), ("apiVersion", fields.take("apiVersion"), kind.api_versions)]
    {
        if !found.as_ref().and_then(Value::as_str).is_some_and(|found| wanted.contains(&found)) {
            return Err(Violations::one(
                name,
                found.as_ref().map_or_else(|| "missing".to_owned(), describe),
                format!("this key takes a {} of {}", kind.name, kind.api_versions.join(" or ")),
            ));
        }
    }
    Ok(())
}

fn same_name(metadata: &mut Fields, report: &mut Report, field: &str, name: &KubernetesName) {
    let path = metadata.path(field);
    if !metadata.has(field) {
        report.add(path, "missing", format!("write \"{name}\", as the key says"));
        return;
    }
    if let Some(text) = metadata.text(report, field)
        && text != name.as_str()
    {
        report.add(path, quoted(&text), format!("the key says \"{name}\": make them equal"));
    }
}

#[cfg(test)]
mod tests;
