//! What has come for the inputs of policies.

use std::sync::Arc;

use attachments::AttachmentTable;
use control_core::objects::ObjectChanges;
use mesh::records::Revision;

use super::PolicyInputs;
use crate::MeshFacts;

/// Something to look up in the world, in the policy thread.
pub(crate) struct Query(pub(crate) Box<dyn FnOnce(&PolicyInputs) + Send>);

impl std::fmt::Debug for Query {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Query")
    }
}

/// Input since it was last emptied.
#[derive(Debug, Default)]
pub(crate) struct PendingInput {
    pub(crate) changes: ObjectChanges,
    /// Everything up to here is in this input and those before.
    pub(crate) revision: Option<Revision>,
    /// With all earlier input, the inputs are complete.
    pub(crate) complete: bool,
    pub(crate) mesh: Option<Arc<MeshFacts>>,
    /// All attachments of this node.
    pub(crate) attachments: Option<Arc<AttachmentTable>>,
    /// Somebody may have changed the kernel's ruleset.
    pub(crate) look: bool,
    pub(crate) questions: Vec<Query>,
}

impl PendingInput {
    pub(crate) fn is_empty(&self) -> bool {
        self.revision.is_none()
            && self.mesh.is_none()
            && self.attachments.is_none()
            && !self.look
            && self.questions.is_empty()
    }
}
