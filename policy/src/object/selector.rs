//! Label selectors with three values: the unknown is neither yes nor no.

use std::{fmt, sync::Arc};

use super::{
    labels::{CLUSTER, Labels, NAMESPACE_NAME},
    reader::{At, ObjectFields},
};
use etcd_schema::reading::{Report, describe, quoted};

/// The result of a selector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Truth {
    /// No match, whatever the unknown labels are.
    No,
    /// Depends on unknown labels.
    Unknown,
    /// A match.
    Yes,
}

impl Truth {
    /// Both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        self.min(other)
    }

    /// Either.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        self.max(other)
    }
}

impl From<bool> for Truth {
    fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

/// A label selector in canonical form; without requirements it matches everything. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Selector {
    /// Sorted, each once. All must hold.
    requirements: Arc<[Requirement]>,
}

/// A condition on one label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Requirement {
    /// The label's key.
    pub key: Box<str>,
    /// The condition.
    pub test: Test,
}

/// Conditions on a label. Value lists are sorted and without repetition.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Test {
    /// The label has one of these values.
    In(Box<[Box<str>]>),
    /// The label is absent or has another value.
    NotIn(Box<[Box<str>]>),
    /// The label is present.
    Exists,
    /// The label is absent.
    DoesNotExist,
}

impl Selector {
    /// A selector of these requirements.
    #[must_use]
    pub fn new(requirements: impl IntoIterator<Item = Requirement>) -> Self {
        let mut list: Vec<Requirement> = requirements.into_iter().collect();
        for requirement in &mut list {
            if let Test::In(values) | Test::NotIn(values) = &mut requirement.test {
                let mut sorted = std::mem::take(values).into_vec();
                sorted.sort_unstable();
                sorted.dedup();
                *values = sorted.into();
            }
        }
        list.sort_unstable();
        list.dedup();
        Self { requirements: list.into() }
    }

    /// A selector of these labels with these values.
    #[must_use]
    pub fn labels<'l>(labels: impl IntoIterator<Item = (&'l str, &'l str)>) -> Self {
        Self::new(
            labels
                .into_iter()
                .map(|(key, value)| Requirement { key: key.into(), test: Test::In([value.into()].into()) }),
        )
    }

    /// This namespace selector restricted to one cluster; a `cluster` without a name restricts nothing.
    #[must_use]
    pub(crate) fn in_cluster(&self, cluster: &str) -> Self {
        if cluster.is_empty() {
            return self.clone();
        }
        let own = Requirement { key: CLUSTER.into(), test: Test::In([cluster.into()].into()) };
        Self::new(self.requirements.iter().cloned().chain([own]))
    }

    /// This selector for peers of a policy of `cluster`: restricted to that cluster, unless it selects clusters itself.
    #[must_use]
    pub(crate) fn peers_of(&self, cluster: &str) -> Self {
        if self.names_clusters() { self.clone() } else { self.in_cluster(cluster) }
    }

    /// Whether this namespace selector selects clusters itself.
    #[must_use]
    pub(crate) fn names_clusters(&self) -> bool {
        self.requirements.iter().any(|requirement| &*requirement.key == CLUSTER)
    }

    /// Whether it matches everything, known or not.
    #[must_use]
    pub(crate) fn is_everything(&self) -> bool {
        self.requirements.is_empty()
    }

    /// The requirements, all of which must hold.
    #[must_use]
    pub(crate) fn requirements(&self) -> &[Requirement] {
        &self.requirements
    }

    /// Whether a pod with `labels` matches; `None`: they are not known.
    #[must_use]
    pub fn matches(&self, labels: Option<&Labels>) -> Truth {
        let Some(labels) = labels else {
            return if self.is_everything() { Truth::Yes } else { Truth::Unknown };
        };
        self.requirements.iter().all(|requirement| requirement.holds(labels.get(&requirement.key))).into()
    }

    /// Whether the namespace `name` of `cluster` matches; both are known even where its labels are not.
    #[must_use]
    pub(crate) fn matches_namespace(&self, cluster: &str, name: &str, labels: Option<&Labels>) -> Truth {
        let mut truth = Truth::Yes;
        for requirement in &*self.requirements {
            let holds = match (&*requirement.key, labels) {
                (NAMESPACE_NAME, _) => requirement.holds(Some(name)).into(),
                (CLUSTER, _) => requirement.holds(Some(cluster)).into(),
                (key, Some(labels)) => requirement.holds(labels.get(key)).into(),
                (_, None) => Truth::Unknown,
            };
            truth = truth.and(holds);
        }
        truth
    }
}

impl Requirement {
    /// Whether it holds of a label with this value; `None`: there is no such label.
    #[must_use]
    pub fn holds(&self, value: Option<&str>) -> bool {
        let among = |values: &[Box<str>], value: &str| values.binary_search_by(|v| (**v).cmp(value)).is_ok();
        match (&self.test, value) {
            (Test::In(values), Some(value)) => among(values, value),
            (Test::NotIn(values), Some(value)) => !among(values, value),
            (Test::NotIn(_) | Test::DoesNotExist, None) | (Test::Exists, Some(_)) => true,
            (Test::In(_) | Test::Exists, None) | (Test::DoesNotExist, Some(_)) => false,
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_everything() {
            return f.write_str("{}");
        }
        f.write_str("{")?;
        for (i, Requirement { key, test }) in self.requirements.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            match test {
                Test::In(values) if values.len() == 1 => write!(f, "{key}={}", values[0])?,
                Test::In(values) => write!(f, "{key} in ({})", values.join(", "))?,
                Test::NotIn(values) => write!(f, "{key} not in ({})", values.join(", "))?,
                Test::Exists => write!(f, "{key}")?,
                Test::DoesNotExist => write!(f, "no {key}")?,
            }
        }
        f.write_str("}")
    }
}

/// The selector that `at` is.
pub(super) fn read(at: &At<'_>, report: &mut Report) -> Option<Selector> {
    let before = report.count();
    let fields = at.object(report)?;
    fields.only(&["matchLabels", "matchExpressions"], report);
    let mut requirements = Vec::new();
    if let Some(labels) = fields.get("matchLabels")
        && labels.object(report).is_some()
        && let Some(map) = labels.value.as_object()
    {
        for (key, value) in map {
            let path = format!("{}[{key}]", labels.path);
            check_key(&path, key, report);
            if let Some(value) = (At { path, value }).text(report) {
                check_value(&format!("{}[{key}]", labels.path), value, report);
                requirements.push(Requirement { key: key.as_str().into(), test: Test::In([value.into()].into()) });
            }
        }
    }
    for expression in fields.list("matchExpressions", report) {
        if let Some(fields) = expression.object(report) {
            requirements.extend(read_expression(&fields, report));
        }
    }
    (report.count() == before).then(|| Selector::new(requirements))
}

fn read_expression(fields: &ObjectFields<'_>, report: &mut Report) -> Option<Requirement> {
    fields.only(&["key", "operator", "values"], report);
    let key = fields.text("key", report).unwrap_or_default();
    check_key(&fields.path("key"), key, report);
    let listed = fields.list("values", report);
    let mut values: Vec<Box<str>> = Vec::with_capacity(listed.len());
    for at in &listed {
        if let Some(text) = at.text(report) {
            check_value(&at.path, text, report);
            values.push(text.into());
        }
    }
    let some = |values: Vec<Box<str>>, report: &mut Report| {
        if listed.is_empty() {
            report.add(fields.path("values"), "missing or empty", "In and NotIn need at least one value");
        }
        values.into_boxed_slice()
    };
    let none = |report: &mut Report| {
        if !listed.is_empty() {
            report.add(
                fields.path("values"),
                format!("a list of {}", listed.len()),
                "Exists and DoesNotExist take no values",
            );
        }
    };
    let test = match fields.text("operator", report).unwrap_or_default() {
        "In" => Test::In(some(values, report)),
        "NotIn" => Test::NotIn(some(values, report)),
        "Exists" => {
            none(report);
            Test::Exists
        }
        "DoesNotExist" => {
            none(report);
            Test::DoesNotExist
        }
        other => {
            report.add(fields.path("operator"), quoted(other), "must be In, NotIn, Exists or DoesNotExist");
            return None;
        }
    };
    Some(Requirement { key: key.into(), test })
}

fn check_key(path: &str, key: &str, report: &mut Report) {
    let valid = match key.split_once('/') {
        Some((prefix, name)) => is_subdomain(prefix) && is_word(name),
        None => is_word(key),
    };
    if !valid {
        report.add(
            path,
            quoted(key),
            "a label key is an optional DNS name and \"/\", then 1 to 63 of letters, digits, \"-\", \"_\" and \".\", \
             beginning and ending with a letter or digit",
        );
    }
}

fn check_value(path: &str, value: &str, report: &mut Report) {
    if !value.is_empty() && !is_word(value) {
        report.add(
            path,
            quoted(value),
            "a label value is empty or 1 to 63 of letters, digits, \"-\", \"_\" and \".\", beginning and ending with \
             a letter or digit",
        );
    }
}

fn is_word(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
}

/// Whether `text` may be the name of an object: a DNS subdomain (RFC 1123) in lower case.
#[must_use]
pub(crate) fn is_object_name(text: &str) -> bool {
    is_subdomain(text)
}

/// Whether `text` may be the name of a namespace: a DNS label (RFC 1123) in lower case.
#[must_use]
pub(crate) fn is_namespace_name(text: &str) -> bool {
    text.len() <= 63 && !text.contains('.') && is_subdomain(text)
}

fn is_subdomain(text: &str) -> bool {
    text.len() <= 253
        && text.split('.').all(|label| {
            let bytes = label.as_bytes();
            let word = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
            bytes.first().is_some_and(word)
                && bytes.last().is_some_and(word)
                && bytes.iter().all(|b| word(b) || *b == b'-')
        })
}

/// The value in place of a list of strings.
pub(super) fn found(at: Option<&At<'_>>) -> String {
    at.map_or_else(|| "missing".to_owned(), |at| describe(at.value))
}
