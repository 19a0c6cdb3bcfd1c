//! `namespaces/NS`: a Namespace and its labels.

use super::{Kind, Labels, Object, Place};
use crate::{KubernetesName, Violations, violation::Report};

const KIND: Kind = Kind { name: "Namespace", api_versions: &["v1"] };

/// Value of `namespaces/NS`, as far as it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// `metadata.name`
    pub name: KubernetesName,
    /// `metadata.labels` as they were written; `kubernetes.io/metadata.name` is not added.
    pub labels: Labels,
}

impl Namespace {
    /// The namespace that `value` under `namespaces/{name}` holds, in JSON or YAML.
    ///
    /// # Errors
    /// All that is wrong with it, another name than the key's too.
    pub fn parse(name: &KubernetesName, value: &[u8]) -> Result<Self, Violations> {
        let mut report = Report::default();
        let object = Object::read(value, KIND, Place { namespace: None, name }, &mut report)?;
        report.finish(Some(Self { name: name.clone(), labels: object.labels }))
    }
}
