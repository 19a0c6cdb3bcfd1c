//! What all kinds of objects have in common: version, kind, name, labels.
//!
//! Unknown fields are ignored, since objects come from API servers of many versions. Known fields are validated like
//! the API server does, because operators may write values by hand.

use etcd_schema::{
    KubernetesName, Labels, Violations,
    reading::{Fields, Report, describe, quoted, timestamp, uid},
};
use serde_json::{Map, Value};

/// A kind of object.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    /// The versions that are read; they differ in nothing that is.
    pub(super) api_versions: &'static [&'static str],
}

/// The place of an object by its key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'k> {
    /// `None` for kinds without namespace.
    pub(super) namespace: Option<&'k KubernetesName>,
    pub(super) name: &'k KubernetesName,
}

/// An object whose envelope was read.
#[derive(Debug)]
pub(super) struct Envelope {
    /// All but `apiVersion`, `kind` and `metadata`.
    pub(super) fields: Fields,
    pub(super) uid: Option<String>,
    pub(super) labels: Labels,
    /// `metadata.annotations`, unchecked: any text is valid, and other values are ignored.
    pub(super) annotations: Map<String, Value>,
}

impl Envelope {
    /// Reads the envelope of the object of `kind`. Violations go to `report`; anything but one object of this kind is
    /// refused at once.
    pub(super) fn read(
        mut fields: Fields,
        kind: Kind,
        place: Place<'_>,
        report: &mut Report,
    ) -> Result<Self, Violations> {
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
        let labels = metadata.labels(report);
        let annotations = match metadata.take("annotations") {
            Some(Value::Object(annotations)) => annotations,
            _ => Map::new(),
        };
        metadata.parsed(report, "deletionTimestamp", timestamp);
        Ok(Self { fields, uid, labels, annotations })
    }
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
