//! Reads fields of a JSON tree one by one with their path, so that unread ones can be refused.

use etcd_schema::reading::{Report, describe};
use serde_json::{Map, Value};

/// An object of the tree.
#[derive(Debug, Clone, Copy)]
pub(super) struct ObjectFields<'v> {
    path: &'v str,
    map: &'v Map<String, Value>,
}

/// A value with the path that leads to it.
pub(super) struct At<'v> {
    pub(super) path: String,
    pub(super) value: &'v Value,
}

impl<'v> At<'v> {
    /// The object that this is.
    pub(super) fn object(&'v self, report: &mut Report) -> Option<ObjectFields<'v>> {
        match self.value {
            Value::Object(map) => Some(ObjectFields { path: &self.path, map }),
            other => {
                report.add(&self.path, describe(other), "must be an object");
                None
            }
        }
    }

    /// The text that this is.
    pub(super) fn text(&self, report: &mut Report) -> Option<&'v str> {
        match self.value {
            Value::String(text) => Some(text),
            other => {
                report.add(&self.path, describe(other), "must be text");
                None
            }
        }
    }

    /// The entries of the list that this is.
    pub(super) fn list(&self, report: &mut Report) -> Option<Vec<Self>> {
        match self.value {
            Value::Array(list) => Some(
                list.iter().enumerate().map(|(i, value)| Self { path: format!("{}[{i}]", self.path), value }).collect(),
            ),
            other => {
                report.add(&self.path, describe(other), "must be a list");
                None
            }
        }
    }
}

impl<'v> ObjectFields<'v> {
    /// Field `name`; null counts as absent.
    pub(super) fn get(&self, name: &str) -> Option<At<'v>> {
        let value = self.map.get(name).filter(|value| !value.is_null())?;
        Some(At { path: self.path(name), value })
    }

    /// The entries of list `name`; none when it is absent.
    pub(super) fn list(&self, name: &str, report: &mut Report) -> Vec<At<'v>> {
        self.get(name).and_then(|at| at.list(report)).unwrap_or_default()
    }

    /// Text `name`; empty text is as good as none, as in Go's decoding.
    pub(super) fn text(&self, name: &str, report: &mut Report) -> Option<&'v str> {
        self.get(name).and_then(|at| at.text(report))
    }

    /// The path of field `name`.
    pub(super) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The path of the object itself.
    pub(super) const fn own_path(&self) -> &'v str {
        self.path
    }

    /// Refuses every field that is not one of `known`, null ones too.
    pub(super) fn only(&self, known: &[&str], report: &mut Report) {
        for name in self.unknown(known) {
            report.add(self.path(name), "an unknown field", "remove it, or correct its name");
        }
    }

    /// The fields that are not among `known`.
    pub(super) fn unknown(&self, known: &[&str]) -> impl Iterator<Item = &'v str> {
        self.map.keys().map(String::as_str).filter(|name| !known.contains(name))
    }
}
