//! Synchronizes policies with this node's attachments, in both directions.

use std::sync::Arc;

use attachments::{self, AckProgress, Attachments};
use enforcement::{Applied, Enforcement};

/// Passes attachments to the policy thread, and its progress back, until either ends. When this returns, the current
/// table has been passed on, and ADDs wait.
pub(super) fn enforce(attachments: &Attachments, enforcement: Arc<Enforcement>) {
    let seam = attachments.enforcement();
    seam.progress(AckProgress::default());
    enforcement.attachments(seam.table.borrow().clone());
    tokio::spawn(keep(seam, enforcement));
}

async fn keep(mut seam: attachments::AttachmentAcks, enforcement: Arc<Enforcement>) {
    let mut applied = enforcement.applied();
    loop {
        let Applied { attachments: generation, refused, .. } = *applied.borrow_and_update();
        // Read after `applied`: the set at that time or a later one.
        seam.progress(AckProgress { generation, refused, without_pod: enforcement.awaited() });
        tokio::select! {
            changed = applied.changed() => if changed.is_err() { return },
            changed = seam.table.changed() => {
                if changed.is_err() {
                    return;
                }
                let table = seam.table.borrow_and_update().clone();
                enforcement.attachments(table);
            }
        }
    }
}
