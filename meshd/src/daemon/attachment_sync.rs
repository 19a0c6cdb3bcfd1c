//! Synchronizes policies with this node's attachments, in both directions.

use std::sync::Arc;

use attachments::{self, AckProgress, Attachments};
use enforcement::{Applied, Enforcement};

/// Has the policy thread told of every attachment, and the attachments of what is in force, until one of both ends. When
/// this returns the table of now has been handed over, and ADDs wait.
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
        // Read after it: what was awaited then, or what is by now.
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
