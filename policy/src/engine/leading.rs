//! Labels that lead from a pod or a namespace to the selectors that may match it.

use crate::object::{CLUSTER, NAMESPACE_NAME, Selector, Test};

/// Whether every namespace has a label with this key, regardless of its object.
pub(super) fn is_virtual(key: &str) -> bool {
    matches!(key, NAMESPACE_NAME | CLUSTER)
}

/// Labels one of which whatever the selector matches must have; `None`: there is no such list.
pub(super) fn leading_labels(selector: &Selector) -> Option<Vec<(&str, &str)>> {
    leading(selector, |_| 0)
}

/// The same for a selector of namespaces: a name leads to the fewest of them, a cluster to the most.
pub(super) fn leading_of_namespaces(selector: &Selector) -> Option<Vec<(&str, &str)>> {
    leading(selector, |key| match key {
        NAMESPACE_NAME => 0,
        CLUSTER => 2,
        _ => 1,
    })
}

fn leading(selector: &Selector, rank: impl Fn(&str) -> u8) -> Option<Vec<(&str, &str)>> {
    selector
        .requirements()
        .iter()
        .filter_map(|requirement| match &requirement.test {
            Test::In(values) => Some((&*requirement.key, values)),
            Test::NotIn(_) | Test::Exists | Test::DoesNotExist => None,
        })
        .min_by_key(|(key, values)| (rank(key), values.len()))
        .map(|(key, values)| values.iter().map(|value| (key, &**value)).collect())
}
