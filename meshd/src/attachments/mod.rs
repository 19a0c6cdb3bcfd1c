//! Who is attached to this node: what the CNI plugin has said by the local API.
//!
//! ```text
//! plugin ─▶ api ─▶ Attachments ─┬─▶ a file per attachment in RUN/attachments
//!                     ▲         ├─▶ Table ─▶ control: endpoints/ID/CONTAINER/IFNAME in etcd
//!                  sweep        └─▶ Table ─▶ policy, which answers by Progress
//! ```
//!
//! The files are replaced whole, and hold for one boot of the machine: containers do not outlive it, and so their files
//! and addresses are dropped at the first start after it. They need not reach the disk for that reason. An attachment
//! goes when the plugin says so, or when its container's namespace and its interface on the host are both gone.

mod endpoints;
mod files;
mod sweep;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use cni::{
    daemon::{Attach, Attached, Begin},
    environment::AttachmentName,
};
use etcd_schema::{Attachment, Violations};
use tokio::sync::watch;

pub use endpoints::{endpoints, record};
pub use sweep::sweep;

/// Most attachments of one node: far more than a machine runs, and few enough to be held at any time.
pub const MAX_ATTACHMENTS: usize = 8192;

/// All attachments at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// Grows with every change.
    pub generation: u64,
    /// By container and interface. Those without `attach` have no addresses yet.
    pub attachments: BTreeMap<AttachmentName, Arc<Attached>>,
}

/// The attachments of this node.
#[derive(Debug)]
pub struct Attachments {
    run_dir: PathBuf,
    files: PathBuf,
    /// host-local's folder of addresses.
    addresses: PathBuf,
    boot_id: String,
    /// Held over a change: files and table change together.
    change: Mutex<()>,
    table: watch::Sender<Arc<Table>>,
    progress: watch::Sender<Option<Progress>>,
}

/// How far whoever enforces policy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Policy is in force for all attachments up to this generation of the table; 0: for none yet.
    pub generation: u64,
    /// What is newer cannot be put in force: the kernel refuses it.
    pub refused: bool,
}

/// The side of whoever enforces policy.
///
/// Each ADD waits, before anything leads to its container, until [`progress`](Self::progress) was called with a
/// generation that is not below that of the table which has it. Until the first call nobody enforces policy on this node,
/// and no ADD waits; whoever is going to must say generation 0 before the local API is served.
#[derive(Debug)]
pub struct Enforcement {
    /// What is to be enforced.
    pub table: watch::Receiver<Arc<Table>>,
    progress: watch::Sender<Option<Progress>>,
}

impl Enforcement {
    /// Says how far policy is in force.
    pub fn progress(&self, progress: Progress) {
        self.progress.send_if_modified(|held| held.replace(progress) != Some(progress));
    }
}

/// Why the attachments cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct OpenError {
    path: String,
    source: io::Error,
}

/// Why an attachment is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Something in it does not hold.
    #[error("{0}")]
    Invalid(Violations),
    /// Its name is none.
    #[error("{0:?} is not the name of an attachment")]
    BadName(AttachmentName),
    /// Its ADD was never begun.
    #[error("container {} has no attachment {}", .0.container_id, .0.ifname)]
    Unknown(AttachmentName),
    /// Another one has its address.
    #[error("{address} belongs to container {}", holder.container_id)]
    Taken {
        /// The address.
        address: std::net::IpAddr,
        /// Who has it.
        holder: AttachmentName,
    },
    /// There are too many.
    #[error("{MAX_ATTACHMENTS} attachments are there already")]
    TooMany,
    /// It could not be written down.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
}

impl Attachments {
    /// Those that an earlier run has left in `run_dir`, without those of an earlier boot.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub fn open(run_dir: &Path, boot_id: &str) -> Result<Self, OpenError> {
        let files = run_dir.join(cni::daemon::RECORDS);
        let addresses = cni::config::address_dir(run_dir);
        let failed = |source| OpenError { path: files.display().to_string(), source };
        let (attachments, stale) = files::read_all(&files, boot_id).map_err(failed)?;
        for name in &stale {
            tracing::info!(container = name.container_id, interface = name.ifname, "an attachment of an earlier boot");
        }
        files::end_boot(&files, &addresses, boot_id, &attachments).map_err(failed)?;
        let attachments = attachments.into_iter().map(|one| (one.name(), Arc::new(one))).collect();
        Ok(Self {
            run_dir: run_dir.to_owned(),
            addresses,
            files,
            boot_id: boot_id.to_owned(),
            change: Mutex::new(()),
            table: watch::Sender::new(Arc::new(Table { generation: 1, attachments })),
            progress: watch::Sender::new(None),
        })
    }

    /// The attachments, now and later.
    #[must_use]
    pub fn table(&self) -> watch::Receiver<Arc<Table>> {
        self.table.subscribe()
    }

    /// The seam to whoever enforces policy.
    #[must_use]
    pub fn enforcement(&self) -> Enforcement {
        Enforcement { table: self.table.subscribe(), progress: self.progress.clone() }
    }

    /// Notes that an ADD has begun. One of the same name that broke off is forgotten.
    ///
    /// # Errors
    /// [`AttachError`]
    pub fn begin(&self, name: &AttachmentName, begin: Begin) -> Result<(), AttachError> {
        check_name(name)?;
        let _change = self.lock();
        let table = self.table.borrow().clone();
        if table.attachments.len() >= MAX_ATTACHMENTS && !table.attachments.contains_key(name) {
            return Err(AttachError::TooMany);
        }
        let begun = Attached {
            container_id: name.container_id.clone(),
            ifname: name.ifname.clone(),
            begin,
            attach: None,
            boot_id: self.boot_id.clone(),
        };
        self.put(&table, begun).map(drop)
    }

    /// Notes how it ended. Returns the generation of the table that has it.
    ///
    /// # Errors
    /// [`AttachError`]
    pub fn attach(&self, name: &AttachmentName, attach: Attach) -> Result<u64, AttachError> {
        Attachment::parse(&endpoints::value(&attach)).map_err(AttachError::Invalid)?;
        let _change = self.lock();
        let table = self.table.borrow().clone();
        let begun = table.attachments.get(name).ok_or_else(|| AttachError::Unknown(name.clone()))?;
        let held = |(other, attached): (&AttachmentName, &Arc<Attached>)| {
            let theirs = &attached.attach.as_ref()?.addresses;
            let address = attach.addresses.iter().find(|address| theirs.contains(address))?;
            (other != name).then(|| AttachError::Taken { address: *address, holder: other.clone() })
        };
        if let Some(taken) = table.attachments.iter().find_map(held) {
            return Err(taken);
        }
        let attached = Attached { attach: Some(attach), ..Attached::clone(begun) };
        self.put(&table, attached)
    }

    /// Forgets an attachment; returns whether there was one.
    ///
    /// # Errors
    /// When its file cannot be removed.
    pub fn detach(&self, name: &AttachmentName) -> Result<bool, AttachError> {
        check_name(name)?;
        let _change = self.lock();
        files::remove(&self.files, name)?;
        let table = self.table.borrow().clone();
        if !table.attachments.contains_key(name) {
            return Ok(false);
        }
        let mut next = Table::clone(&table);
        next.attachments.remove(name);
        self.publish(next);
        Ok(true)
    }

    /// Whether ADD would wait in vain: policy is enforced on this node, and nothing of it is in force yet, or the kernel
    /// refuses it.
    #[must_use]
    pub fn awaits_policy(&self) -> bool {
        self.progress.borrow().is_some_and(|progress| progress.generation == 0 || progress.refused)
    }

    /// Waits until policy is in force for the table of this generation; at once while nobody enforces policy.
    pub async fn in_force(&self, generation: u64) {
        let mut progress = self.progress.subscribe();
        // The sender lives as long as `self`.
        let _ = progress.wait_for(|reached| reached.is_none_or(|reached| reached.generation >= generation)).await;
    }

    /// The run directory.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// host-local's folder of addresses.
    #[must_use]
    pub fn address_dir(&self) -> &Path {
        &self.addresses
    }

    fn put(&self, table: &Table, attached: Attached) -> Result<u64, AttachError> {
        files::write(&self.files, &attached)?;
        let mut next = table.clone();
        next.attachments.insert(attached.name(), Arc::new(attached));
        Ok(self.publish(next))
    }

    fn publish(&self, mut next: Table) -> u64 {
        next.generation += 1;
        let generation = next.generation;
        self.table.send_replace(Arc::new(next));
        generation
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file is named after it, and a key of etcd.
fn check_name(name: &AttachmentName) -> Result<(), AttachError> {
    let is_id = cni::environment::is_identifier(&name.container_id) && name.container_id.len() <= 200;
    if is_id && cni::environment::check_interface(&name.ifname).is_ok() {
        Ok(())
    } else {
        Err(AttachError::BadName(name.clone()))
    }
}
