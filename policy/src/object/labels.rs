//! Labels of pods and namespaces.

use std::sync::Arc;

/// The label that the control plane gives every namespace: its name. It is known even where nothing else is.
pub(crate) const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// The label with which selectors of namespaces name clusters. Every namespace bears it, known like its name; one that
/// its object has under this key is ignored.
pub const CLUSTER: &str = "meshd.io/cluster";

/// Labels by key, each key once. Cheap to clone and to compare.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Labels(Arc<[(Box<str>, Box<str>)]>);

impl Labels {
    /// The value of label `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
        Some(&self.0[at].1)
    }

    /// Keys and values, by key.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (&**key, &**value))
    }

    /// These labels with `key` set to `value`.
    #[must_use]
    pub fn with(&self, key: &str, value: &str) -> Self {
        self.iter().chain([(key, value)]).collect()
    }
}

/// Of a key that comes twice the last value counts.
impl<K: Into<Box<str>>, V: Into<Box<str>>> FromIterator<(K, V)> for Labels {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(labels: I) -> Self {
        let mut list: Vec<(Box<str>, Box<str>)> = labels.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        // Stable, so that of equal keys the last one stays last.
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list.reverse();
        list.dedup_by(|later, kept| later.0 == kept.0);
        list.reverse();
        Self(list.into())
    }
}
