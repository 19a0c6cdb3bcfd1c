//! Containers attached to this node and their addresses, as reported by the CNI plugin through the local API.
//!
//! ```text
//! plugin ─▶ api ─▶ Attachments ─┬─▶ a file per attachment in RUN/attachments
//!                   ▲   │       ├─▶ Table ─▶ control: endpoints/ID/CONTAINER/IFNAME in etcd
//!                sweep  │       └─▶ Table ─▶ policy, which answers by Progress
//!                       └─▶ addresses: which one is next
//! ```
//!
//! The files are replaced atomically and are valid for one boot of the machine. Containers do not survive a boot, so
//! the first start after it deletes their files; therefore the files need not reach the disk. An attachment ends when
//! the plugin withdraws it (by a tombstone if the daemon does not answer), or when its container's namespace and its
//! interface on the host are both gone.
//!
//! The attachments are the only store of addresses: an address without an attachment is free. Addresses that host-local
//! allocated below RUN/ipam, for an earlier version of the plugin, count as in use until their container is gone.

pub mod addresses;
mod endpoints;
mod files;
mod sweep;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use atomic_file::FileError;
use cni::{
    daemon::{AddressRequest, Attach, Attached, BeginAdd, Network, RECORDS, recorded_by},
    environment::AttachmentName,
    host_local,
};
use etcd_schema::{Attachment, Violations};
use ipnet::IpNet;
use mesh::problem::{Problem, ProblemCode};
use tokio::sync::watch;

use crate::addresses::{AddressError, History, InUse, range_sets};

use self::files::Found;
pub use endpoints::{endpoints, record};
pub use sweep::sweep;

/// Most attachments of one node: far more than a machine runs, and few enough to be held at any time.
pub(crate) const MAX_ATTACHMENTS: usize = 8192;

/// Most deletions that a late ADD is compared with: more than there are connections at one time.
const MAX_DELETED: usize = 1024;

/// Most unreadable entries that are named.
const NAMED: usize = 3;

/// All attachments at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttachmentTable {
    /// Grows with every change.
    pub generation: u64,
    /// By container and interface. Those without `attach` have no addresses yet.
    pub attachments: BTreeMap<AttachmentName, Arc<Attached>>,
}

/// The attachments of this node.
#[derive(Debug)]
pub struct Attachments {
    run_dir: PathBuf,
    boot_id: String,
    /// Held over a change: files, table and the order of free addresses change together.
    change: Mutex<TableChange>,
    table: watch::Sender<Arc<AttachmentTable>>,
    progress: watch::Sender<Option<AckProgress>>,
}

/// State that changes with the table.
#[derive(Debug)]
struct TableChange {
    history: History,
    /// The holders of addresses of host-local whose containers are gone, though their files may still be there.
    gone: BTreeSet<AttachmentName>,
    /// Unreadable entries of RUN/attachments, by name.
    unread: BTreeMap<String, FileError>,
    /// The latest deletion of each name.
    deleted: BTreeMap<AttachmentName, Arrival>,
}

/// The place of a request's connection in the order in which the local API accepted them. A request may be processed
/// late, when its client has given up; a DEL that came after it wins all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Arrival(pub u64);

/// How far enforcement is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AckProgress {
    /// Policy is in force for all attachments up to this generation of the table; 0: for none yet.
    pub generation: u64,
    /// The kernel refuses newer rules.
    pub refused: bool,
    /// Of these, no Pod object is in force, although one is to be expected: policies judge them by an unknown pod's
    /// rules.
    pub without_pod: Arc<BTreeSet<AttachmentName>>,
}

/// The side of enforcement.
///
/// Each ADD waits, before anything leads to its container, until [`progress`](Self::progress) was called with a
/// generation that is not below that of the table which has it. Until the first call no policy is enforced on this
/// node, and no ADD waits; an enforcer must report generation 0 before the local API is served.
#[derive(Debug)]
pub struct AttachmentAcks {
    /// The attachments to enforce policy on.
    pub table: watch::Receiver<Arc<AttachmentTable>>,
    progress: watch::Sender<Option<AckProgress>>,
}

impl AttachmentAcks {
    /// Says how far policy is in force.
    pub fn progress(&self, progress: AckProgress) {
        self.progress.send_if_modified(|held| {
            let changed = held.as_ref() != Some(&progress);
            if changed {
                *held = Some(progress);
            }
            changed
        });
    }
}

/// Why the attachments cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct OpenFolderError {
    path: String,
    source: io::Error,
}

/// Why an attachment is not taken.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Something in it does not hold.
    #[error("{0}")]
    Invalid(Violations),
    /// Its name is invalid.
    #[error("{0:?} is not a valid attachment name")]
    BadName(AttachmentName),
    /// Its ADD was never begun.
    #[error("container {} has no attachment {}", .0.container_id, .0.ifname)]
    Unknown(AttachmentName),
    /// Another one has its address.
    #[error("{address} belongs to container {}", holder.container_id)]
    Taken {
        /// The address.
        address: IpAddr,
        /// The attachment that has it.
        holder: AttachmentName,
    },
    /// There is no address for it.
    #[error(transparent)]
    NoAddress(#[from] AddressError),
    /// The container may send from another container's address.
    #[error(
        "allowedSources {prefix} of container {router} covers {address} of container {holder}: remove it from the CNI \
         configuration"
    )]
    SourceTaken {
        /// The prefix in the CNI configuration.
        prefix: IpNet,
        /// The container that it allows that.
        router: String,
        /// The address.
        address: IpAddr,
        /// The container that has it.
        holder: String,
    },
    /// Its interface's name would mean something else in nftables.
    #[error("interface name {0:?} cannot be used in nftables: rename it without '*', '\"' and '\\'")]
    BadInterface(String),
    /// A DEL of it came after this ADD.
    #[error("container {} was deleted meanwhile", .0.container_id)]
    Deleted(AttachmentName),
    /// There are too many.
    #[error("the limit of {MAX_ATTACHMENTS} attachments is reached")]
    TooMany,
    /// The attachment's file could not be written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// The system's error.
        source: io::Error,
    },
}

impl Attachments {
    /// Opens the attachments of earlier runs in `run_dir`, without those of an earlier boot.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub fn open(run_dir: &Path, boot_id: &str) -> Result<Self, OpenFolderError> {
        let failed = |source: FileError| OpenFolderError { path: run_dir.display().to_string(), source: source.into() };
        let Found { present, stale, unread } = files::read_all(run_dir, boot_id).map_err(failed)?;
        for name in &stale {
            tracing::info!(
                container = name.container_id,
                interface = name.ifname,
                "attachment of an earlier boot \
                 dropped"
            );
        }
        let attachments = present.into_iter().map(|one| (one.name(), Arc::new(one))).collect();
        let history = History::after(files::last_allocated(run_dir));
        let opened = Self {
            run_dir: run_dir.to_owned(),
            boot_id: boot_id.to_owned(),
            change: Mutex::new(TableChange { history, gone: BTreeSet::new(), unread, deleted: BTreeMap::new() }),
            table: watch::Sender::new(Arc::new(AttachmentTable { generation: 1, attachments })),
            progress: watch::Sender::new(None),
        };
        opened.honour_tombstones();
        Ok(opened)
    }

    /// The attachments, now and later.
    #[must_use]
    pub fn table(&self) -> watch::Receiver<Arc<AttachmentTable>> {
        self.table.subscribe()
    }

    /// The interface to enforcement.
    #[must_use]
    pub fn enforcement(&self) -> AttachmentAcks {
        AttachmentAcks { table: self.table.subscribe(), progress: self.progress.clone() }
    }

    /// Records that an ADD has begun, and allocates its requested addresses in this `network`. An interrupted ADD of
    /// the same name is replaced; its addresses are reused if they match the request. Without a request nothing is
    /// allocated, and `None` returned.
    ///
    /// # Errors
    /// [`AttachError`]
    pub fn begin(
        &self,
        name: &AttachmentName,
        begin: BeginAdd,
        network: &Network,
        arrival: Arrival,
    ) -> Result<Option<Vec<IpNet>>, AttachError> {
        check_name(name)?;
        let BeginAdd { begin, addresses: request } = begin;
        let mut change = self.lock();
        if change.deleted.get(name).is_some_and(|deletion| *deletion > arrival) {
            return Err(AttachError::Deleted(name.clone()));
        }
        let table = self.table.borrow().clone();
        if table.attachments.len() >= MAX_ATTACHMENTS && !table.attachments.contains_key(name) {
            return Err(AttachError::TooMany);
        }
        let before: Vec<IpAddr> = table.attachments.get(name).into_iter().flat_map(|one| one.addresses()).collect();
        let allocated = match &request {
            None => None,
            Some(request) => Some(self.choose(&change, &table, Some(name), request, network, &before)?),
        };
        // The tombstone of a DEL before this ADD.
        files::remove_tombstone(&self.run_dir, name)?;
        let begun = Attached {
            container_id: name.container_id.clone(),
            ifname: name.ifname.clone(),
            begin,
            allocated: allocated.iter().flatten().map(IpNet::addr).collect(),
            attach: None,
            boot_id: self.boot_id.clone(),
        };
        let now = begun.allocated.clone();
        self.put(&table, begun)?;
        change.history.freed(before.into_iter().filter(|address| !now.contains(address)));
        if !now.is_empty() {
            change.history.allocated(now);
            files::write_last_allocated(&self.run_dir, change.history.last());
        }
        Ok(allocated)
    }

    /// Whether an ADD with this request would get its addresses now.
    ///
    /// # Errors
    /// [`AttachError::NoAddress`]
    pub fn has_addresses(&self, request: &AddressRequest, network: &Network) -> Result<(), AttachError> {
        let change = self.lock();
        let table = self.table.borrow().clone();
        self.choose(&change, &table, None, request, network, &[]).map(drop)
    }

    fn choose(
        &self,
        change: &TableChange,
        table: &AttachmentTable,
        name: Option<&AttachmentName>,
        request: &AddressRequest,
        network: &Network,
        held: &[IpAddr],
    ) -> Result<Vec<IpNet>, AttachError> {
        let sets = range_sets(&request.ranges, &network.subnets, &network.overlay)?;
        let in_use = self.addresses_in_use(change, table, name)?;
        Ok(change.history.choose(&sets, &request.ips, held, &in_use)?)
    }

    /// Addresses that others than `name` have: attachments, and reservations of Debian's `host-local`.
    fn addresses_in_use(
        &self,
        change: &TableChange,
        table: &AttachmentTable,
        name: Option<&AttachmentName>,
    ) -> Result<InUse, AttachError> {
        // An unreadable attachment has unknown addresses, which could be among the free ones. Other files have none.
        let is_record = |file: &str| recorded_by(file).is_some_and(|name| check_name(&name).is_ok());
        let unread = change.unread.iter().find(|(file, error)| matches!(error, FileError::Io(_)) && is_record(file));
        if let Some((file, FileError::Io(error))) = unread {
            let path = self.run_dir.join(RECORDS).join(file).display().to_string();
            return Err(AttachError::File { path, source: io::Error::new(error.kind(), error.to_string()) });
        }
        let folder = host_local::folder(&self.run_dir);
        let reserved = host_local::reserved(&self.run_dir)
            .map_err(|source| AttachError::File { path: folder.display().to_string(), source: source.into() })?;
        let is_there = |holder: &Option<AttachmentName>| holder.as_ref().is_none_or(|one| !change.gone.contains(one));
        let of_host_local = reserved.into_iter().map(|one| (one.address, one.holder)).filter(|(_, one)| is_there(one));
        let attached = table.attachments.iter();
        let attached = attached.flat_map(|(name, one)| one.addresses().map(|address| (address, Some(name.clone()))));
        // An attachment's claim to an address precedes a file's.
        let all = of_host_local.chain(attached);
        Ok(all.filter(|(_, holder)| holder.is_none() || holder.as_ref() != name).collect())
    }

    /// Records the end of an ADD. Returns the generation of the table that contains it.
    ///
    /// # Errors
    /// [`AttachError`]
    pub fn attach(&self, name: &AttachmentName, attach: Attach) -> Result<u64, AttachError> {
        Attachment::parse(&endpoints::value(&attach)).map_err(AttachError::Invalid)?;
        if attach.interface.contains(['*', '"', '\\']) {
            return Err(AttachError::BadInterface(attach.interface));
        }
        let mut change = self.lock();
        let table = self.table.borrow().clone();
        let begun = table.attachments.get(name).ok_or_else(|| AttachError::Unknown(name.clone()))?;
        let held = |(other, attached): (&AttachmentName, &Arc<Attached>)| {
            let address = attached.addresses().find(|address| attach.addresses.contains(address))?;
            (other != name).then(|| AttachError::Taken { address, holder: other.clone() })
        };
        if let Some(taken) = table.attachments.iter().find_map(held) {
            return Err(taken);
        }
        for (other, attached) in table.attachments.iter().filter(|(other, _)| *other != name) {
            let Some(theirs) = &attached.attach else { continue };
            let [name, other] = [name, other].map(|name| name.container_id.clone());
            if let Some((prefix, address)) = source_of(&attach, theirs) {
                return Err(AttachError::SourceTaken { prefix, router: name, address, holder: other });
            }
            if let Some((prefix, address)) = source_of(theirs, &attach) {
                return Err(AttachError::SourceTaken { prefix, router: other, address, holder: name });
            }
        }
        let announced = attach.addresses.clone();
        let attached = Attached { attach: Some(attach), ..Attached::clone(begun) };
        let generation = self.put(&table, attached)?;
        change.history.allocated(announced);
        Ok(generation)
    }

    /// A DEL: forgets the attachment, and refuses an ADD of this name that arrived earlier and is processed later.
    ///
    /// # Errors
    /// When its file cannot be removed.
    pub fn delete(&self, name: &AttachmentName, arrival: Arrival) -> Result<bool, AttachError> {
        check_name(name)?;
        let mut change = self.lock();
        change.deleted.insert(name.clone(), arrival);
        if change.deleted.len() > MAX_DELETED
            && let Some(oldest) =
                change.deleted.iter().min_by_key(|(_, arrival)| **arrival).map(|(name, _)| name.clone())
        {
            change.deleted.remove(&oldest);
        }
        self.detach_in(&mut change, name)
    }

    /// Forgets an attachment, whose addresses are free from then on; returns whether there was one.
    ///
    /// # Errors
    /// When its file cannot be removed.
    pub fn detach(&self, name: &AttachmentName) -> Result<bool, AttachError> {
        check_name(name)?;
        self.detach_in(&mut self.lock(), name)
    }

    fn detach_in(&self, change: &mut TableChange, name: &AttachmentName) -> Result<bool, AttachError> {
        files::remove(&self.run_dir, name)?;
        files::remove_tombstone(&self.run_dir, name)?;
        let table = self.table.borrow().clone();
        let mut next = AttachmentTable::clone(&table);
        let Some(detached) = next.attachments.remove(name) else { return Ok(false) };
        self.publish(next);
        change.history.freed(detached.addresses());
        Ok(true)
    }

    /// Retries unreadable files.
    fn read_again(&self) {
        let mut change = self.lock();
        let names: BTreeSet<String> = change.unread.keys().cloned().collect();
        if names.is_empty() {
            return;
        }
        match files::read_again(&self.run_dir, names, &self.boot_id) {
            Ok(Found { present, unread, .. }) => {
                change.unread = unread;
                let mut next = AttachmentTable::clone(&self.table.borrow());
                let before = next.attachments.len();
                for attached in present {
                    next.attachments.entry(attached.name()).or_insert_with(|| Arc::new(attached));
                }
                if next.attachments.len() > before {
                    self.publish(next);
                }
            }
            Err(error) => tracing::warn!(%error, "cannot read the attachment directory"),
        }
    }

    /// The problem of RUN/attachments for status.
    #[must_use]
    pub fn problem(&self) -> Option<Problem> {
        let change = self.lock();
        let shown: Vec<String> =
            change.unread.iter().take(NAMED).map(|(file, error)| format!("{file}: {error}")).collect();
        let folder = self.run_dir.join(RECORDS);
        (!shown.is_empty()).then(|| {
            Problem::new(
                ProblemCode::AttachmentsUnreadable,
                format!(
                    "{} of the entries in {} cannot be read ({}); if one is an attachment (CONTAINER@INTERFACE), \
                     policies do not know its container, and no addresses are allocated until it is readable",
                    change.unread.len(),
                    folder.display(),
                    shown.join("; "),
                ),
                format!(
                    "ls -la {} # remove entries that are not regular files; the daemon reads them again every 10 s",
                    folder.display()
                ),
            )
        })
    }

    /// Removes attachments that were withdrawn while the daemon did not answer.
    fn honour_tombstones(&self) {
        let mut change = self.lock();
        let names = files::tombstones(&self.run_dir).unwrap_or_default();
        for name in names {
            match self.detach_in(&mut change, &name) {
                Ok(_) => tracing::info!(
                    container = name.container_id,
                    interface = name.ifname,
                    "container detached while the daemon was down"
                ),
                // The sweep tries again.
                Err(error) => tracing::warn!(container = name.container_id, %error, "cannot detach container"),
            }
        }
    }

    /// Whether ADD would block: policy is enforced on this node, and nothing of it is in force yet, or the kernel
    /// refuses it.
    #[must_use]
    pub fn awaits_policy(&self) -> bool {
        self.progress.borrow().as_ref().is_some_and(|progress| progress.generation == 0 || progress.refused)
    }

    /// Waits until policy is in force for the table of this generation; at once while policy is not enforced.
    pub async fn in_force(&self, generation: u64) {
        let mut progress = self.progress.subscribe();
        // The sender lives as long as `self`.
        let reached = |reached: &Option<AckProgress>| reached.as_ref().is_none_or(|it| it.generation >= generation);
        let _ = progress.wait_for(reached).await;
    }

    /// Waits until the Pod object of this attachment, which policy is [in force](Self::in_force) for, is in force too;
    /// at once where none is to be expected.
    pub async fn pod_in_force(&self, name: &AttachmentName) {
        let mut progress = self.progress.subscribe();
        let known = |held: &Option<AckProgress>| held.as_ref().is_none_or(|held| !held.without_pod.contains(name));
        let _ = progress.wait_for(known).await;
    }

    /// The run directory.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    fn put(&self, table: &AttachmentTable, attached: Attached) -> Result<u64, AttachError> {
        files::write(&self.run_dir, &attached)?;
        let mut next = table.clone();
        next.attachments.insert(attached.name(), Arc::new(attached));
        Ok(self.publish(next))
    }

    fn publish(&self, mut next: AttachmentTable) -> u64 {
        next.generation += 1;
        let generation = next.generation;
        self.table.send_replace(Arc::new(next));
        generation
    }

    fn lock(&self) -> MutexGuard<'_, TableChange> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An address of `holder` that `router` may send from.
fn source_of(router: &Attach, holder: &Attach) -> Option<(IpNet, IpAddr)> {
    router.allowed_sources.iter().find_map(|prefix| {
        holder.addresses.iter().find(|address| prefix.contains(*address)).map(|address| (*prefix, *address))
    })
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

#[cfg(test)]
mod tests;
