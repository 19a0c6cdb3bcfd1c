//! Named ports of pods.

use std::sync::Arc;

use super::{pods::PodInfo, storage::Chunked};
use crate::object::NamedPort;

/// Named ports of a destination, looked up when a rule asks for them only: most do not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NamedPorts<'c> {
    pods: Option<(&'c Chunked<Option<Arc<PodInfo>>>, u32)>,
}

impl<'c> NamedPorts<'c> {
    /// Those of no pod.
    pub(super) const NONE: Self = Self { pods: None };

    pub(super) fn of(pods: &'c Chunked<Option<Arc<PodInfo>>>, pod: u32) -> Self {
        Self { pods: Some((pods, pod)) }
    }

    pub(crate) fn get(self) -> &'c [NamedPort] {
        match self.pods.and_then(|(pods, pod)| pods.get(pod)?.as_ref()) {
            Some(pod) => &pod.ports,
            None => &[],
        }
    }
}
