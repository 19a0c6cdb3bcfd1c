//! Takes the known fields out of one JSON object and collects all violations; the remaining fields are unknown.

use std::{borrow::Cow, fmt, ops::RangeInclusive};

use serde_json::{Map, Value};

use crate::{
    Violations,
    document::{DocumentLimits, describe, read},
    violation::{Report, join, quoted},
};

/// The rule that a text violates.
pub type Expected = Cow<'static, str>;

/// The fields of one object that are not taken yet.
#[derive(Debug)]
pub struct Fields {
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The fields of the Kubernetes object that `value` holds, in JSON or YAML.
    ///
    /// # Errors
    /// When it is not one object, or too large.
    pub fn of_object(value: &[u8]) -> Result<Self, Violations> {
        read(value, DocumentLimits::KUBERNETES).map(Self::root)
    }

    /// The fields of a value's root object.
    pub const fn root(map: Map<String, Value>) -> Self {
        Self::at(String::new(), map)
    }

    /// The fields of the object at `path`.
    pub(crate) const fn at(path: String, map: Map<String, Value>) -> Self {
        Self { path, map }
    }

    /// The path of field `name`.
    pub fn path(&self, name: &str) -> String {
        join(&self.path, name)
    }

    /// Whether `name` is there and not null.
    pub fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|v| !v.is_null())
    }

    /// The text in field `name`, which stays.
    pub(crate) fn peek(&self, name: &str) -> Option<&str> {
        self.map.get(name).and_then(Value::as_str)
    }

    /// Field `name`; null counts as absent.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|v| !v.is_null())
    }

    /// Text, verbatim.
    pub fn text(&mut self, report: &mut Report, name: &str) -> Option<String> {
        match self.take(name)? {
            Value::String(s) => Some(s),
            other => {
                report.add(self.path(name), describe(&other), "must be text; put it in quotes");
                None
            }
        }
    }

    /// Text that `parse` understands.
    pub fn parsed<T>(
        &mut self,
        report: &mut Report,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, Expected>,
    ) -> Option<T> {
        let text = self.text(report, name)?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err(expected) => {
                report.add(self.path(name), quoted(&text), expected);
                None
            }
        }
    }

    /// As [`Self::parsed`]; empty text counts as absent, as it does in Kubernetes.
    pub fn parsed_unless_empty<T>(
        &mut self,
        report: &mut Report,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, Expected>,
    ) -> Option<T> {
        if self.map.get(name).and_then(Value::as_str) == Some("") {
            self.map.shift_remove(name);
            return None;
        }
        self.parsed(report, name, parse)
    }

    /// A required text for `parse`; `what` describes it in messages.
    pub(crate) fn required<T>(
        &mut self,
        report: &mut Report,
        name: &str,
        what: &'static str,
        parse: impl FnOnce(&str) -> Result<T, Expected>,
    ) -> Option<T> {
        if !self.has(name) {
            self.map.shift_remove(name);
            report.add(self.path(name), "missing", what);
            return None;
        }
        self.parsed(report, name, parse)
    }

    /// `true` or `false`.
    pub fn boolean(&mut self, report: &mut Report, name: &str) -> Option<bool> {
        match self.take(name)? {
            Value::Bool(b) => Some(b),
            other => {
                report.add(self.path(name), describe(&other), "must be true or false");
                None
            }
        }
    }

    /// An integer within `range`; `hint` is added to the rule in messages.
    pub fn integer<T>(&mut self, report: &mut Report, name: &str, range: RangeInclusive<T>, hint: &str) -> Option<T>
    where
        T: TryFrom<u64> + PartialOrd + fmt::Display,
    {
        let value = self.take(name)?;
        let number = value.as_u64().and_then(|n| T::try_from(n).ok());
        match number {
            Some(n) if range.contains(&n) => Some(n),
            _ => {
                report.add(
                    self.path(name),
                    describe(&value),
                    format!("must be a whole number from {} to {}{hint}", range.start(), range.end()),
                );
                None
            }
        }
    }

    /// The entries of a list of at most `most`, each with its path. `None` when absent or no such list.
    pub(crate) fn list(&mut self, report: &mut Report, name: &str, most: usize) -> Option<Vec<(String, Value)>> {
        let path = self.path(name);
        match self.take(name)? {
            Value::Array(list) if list.len() <= most => {
                Some(list.into_iter().enumerate().map(|(i, v)| (format!("{path}[{i}]"), v)).collect())
            }
            Value::Array(list) => {
                report.add(path, format!("a list of {}", list.len()), format!("at most {most} entries"));
                None
            }
            other => {
                report.add(path, describe(&other), "must be a list");
                None
            }
        }
    }

    /// A list of texts, each of which `parse` understands; those that it does not are noted and left out.
    pub fn texts<T>(
        &mut self,
        report: &mut Report,
        name: &str,
        most: usize,
        parse: impl Fn(&str) -> Result<T, Expected>,
    ) -> Option<Vec<T>> {
        let list = self.list(report, name, most)?;
        let mut out = Vec::with_capacity(list.len());
        for (path, value) in list {
            out.extend(entry(path, value, report, &parse));
        }
        Some(out)
    }

    /// Like [`Self::texts`], each with its index, with at least one entry; `what` describes them in messages.
    pub(crate) fn some_texts<T>(
        &mut self,
        report: &mut Report,
        name: &str,
        most: usize,
        what: &'static str,
        parse: impl Fn(&str) -> Result<T, Expected>,
    ) -> Vec<(usize, T)> {
        let found = match self.map.get(name) {
            None | Some(Value::Null) => "missing",
            Some(Value::Array(list)) if list.is_empty() => "an empty list",
            Some(_) => {
                let list = self.list(report, name, most).unwrap_or_default();
                let mut out = Vec::with_capacity(list.len());
                for (i, (path, value)) in list.into_iter().enumerate() {
                    out.extend(entry(path, value, report, &parse).map(|value| (i, value)));
                }
                return out;
            }
        };
        self.map.shift_remove(name);
        report.add(self.path(name), found, what);
        Vec::new()
    }

    /// The objects in a list of at most `most`; empty when absent.
    pub fn objects(&mut self, report: &mut Report, name: &str, most: usize) -> Vec<Self> {
        let mut objects = Vec::new();
        for (path, value) in self.list(report, name, most).unwrap_or_default() {
            match value {
                Value::Object(map) => objects.push(Self::at(path, map)),
                other => report.add(path, describe(&other), "must be an object"),
            }
        }
        objects
    }

    /// The object in field `name`.
    pub fn object(&mut self, report: &mut Report, name: &str) -> Option<Self> {
        let path = self.path(name);
        match self.take(name)? {
            Value::Object(map) => Some(Self::at(path, map)),
            other => {
                report.add(path, describe(&other), "must be an object");
                None
            }
        }
    }

    /// The remaining fields. One that differs from a field of `known` only in its case is a typing mistake.
    pub(crate) fn rest(self, report: &mut Report, known: &[&str]) -> Map<String, Value> {
        for name in self.map.keys() {
            if let Some(meant) = known.iter().find(|k| k.eq_ignore_ascii_case(name) && *k != name) {
                report.add(join(&self.path, name), "an unknown field", format!("write it \"{meant}\""));
            }
        }
        // Rebuilt: this map keeps its capacity for the fields that were taken, and thousands of records are held for
        // long.
        self.map.into_iter().collect()
    }
}

/// Parses one entry of a list of strings.
fn entry<T>(path: String, value: Value, report: &mut Report, parse: impl Fn(&str) -> Result<T, Expected>) -> Option<T> {
    match value {
        Value::String(text) => match parse(&text) {
            Ok(value) => return Some(value),
            Err(expected) => report.add(path, quoted(&text), expected),
        },
        other => report.add(path, describe(&other), "must be text; put it in quotes"),
    }
    None
}

/// Writes the fields of one object, those without a value left out.
#[derive(Debug, Default)]
pub(crate) struct Writer(Map<String, Value>);

impl Writer {
    /// Adds field `name`.
    pub(crate) fn put(&mut self, name: &str, value: impl Into<Value>) -> &mut Self {
        self.0.insert(name.to_owned(), value.into());
        self
    }

    /// Adds field `name` when there is a value.
    pub(crate) fn maybe(&mut self, name: &str, value: Option<impl Into<Value>>) -> &mut Self {
        if let Some(value) = value {
            self.put(name, value);
        }
        self
    }

    /// Adds a list of texts.
    pub(crate) fn texts<T: fmt::Display>(&mut self, name: &str, list: &[T]) -> &mut Self {
        let list: Vec<Value> = list.iter().map(|v| v.to_string().into()).collect();
        self.put(name, list)
    }

    /// The object, with those of the unknown fields that it does not have itself.
    pub(crate) fn finish(&mut self, extra: &Map<String, Value>) -> Map<String, Value> {
        for (name, value) in extra {
            if !self.0.contains_key(name) {
                self.0.insert(name.clone(), value.clone());
            }
        }
        std::mem::take(&mut self.0)
    }

    /// As [`Self::finish`], as text.
    pub(crate) fn json(&mut self, extra: &Map<String, Value>) -> Vec<u8> {
        Value::Object(self.finish(extra)).to_string().into_bytes()
    }
}

/// Unknown fields in `Debug`: their names only, since their values may be secret.
pub(crate) struct NamesOf<'a>(pub(crate) &'a Map<String, Value>);

impl fmt::Debug for NamesOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}
