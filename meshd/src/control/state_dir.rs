//! STATE: the lock and the node's identity.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use etcd_schema::NodeId;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

use tracing::{debug, warn};

use super::membership::Identity;
use crate::whole_file;

/// What is kept in STATE is for this daemon alone.
pub(crate) const FILE_MODE: u32 = 0o600;

/// The state directory of one running daemon. The lock goes with the value (or the process, however it ends).
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    identity: Identity,
    _lock: Flock<File>,
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateDirError {
    /// Another daemon runs on it.
    #[error("state directory {path} is in use by process {holder}: one meshd at a time")]
    InUse {
        /// The directory.
        path: String,
        /// The process that holds the lock, as it wrote it down.
        holder: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// `node-id` holds something else.
    #[error(
        "{path} does not hold a node id ({reason}): write back the id that this node had (the part after `nodes/` of \
         its key in etcd), or delete the file to join as a new node with a new subnet"
    )]
    BadNodeId {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

impl StateDir {
    /// Opens (or makes) the directory, locks it, reads (or makes) the node's id and counts the start.
    ///
    /// # Errors
    /// When another daemon holds it, or there is no lock or no id to be had. That nothing else can be written is only
    /// logged.
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error(path))?;
        let lock = lock(path)?;
        let id = node_id(&path.join("node-id"))?;
        let count_file = path.join("starts");
        let start_count = fs::read_to_string(&count_file)
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
            .unwrap_or(0)
            .saturating_add(1);
        // Only people read the count: a full or read-only disk must not keep the node from starting.
        if let Err(error) = whole_file::write(&count_file, FILE_MODE, format!("{start_count}\n").as_bytes()) {
            warn!(file = %count_file.display(), %error, "this start could not be counted; state that is kept here may \
                be missing after the next one: make room, or the file system writable");
        }
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned());
        let incarnation = u64::from_ne_bytes(random().map_err(io_error(path))?);
        let identity = Identity { id, boot_id, start_count, incarnation };
        Ok(Self { path: path.to_owned(), identity, _lock: lock })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who this process is.
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }
}

fn lock(dir: &Path) -> Result<Flock<File>, StateDirError> {
    let path = dir.join("lock");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = match options.open(&path) {
        // A lock on a file that can only be read is as good.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => File::open(&path),
        opened => opened,
    };
    let file = file.map_err(io_error(&path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            // For the message of whoever comes second; the lock itself is the kernel's.
            let written =
                lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| writeln!(lock, "{}", std::process::id()));
            if let Err(error) = written {
                debug!(file = %path.display(), %error, "the lock does not name its holder");
            }
            Ok(lock)
        }
        Err((mut file, Errno::EWOULDBLOCK)) => {
            let mut holder = String::new();
            let read = file.read_to_string(&mut holder);
            let holder = if read.is_ok() && !holder.trim().is_empty() { holder.trim() } else { "unknown" };
            Err(StateDirError::InUse { path: dir.display().to_string(), holder: holder.to_owned() })
        }
        Err((_, errno)) => Err(io_error(&path)(errno.into())),
    }
}

fn node_id(path: &Path) -> Result<NodeId, StateDirError> {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).trim().parse().map_err(|violations: etcd_schema::Violations| {
            StateDirError::BadNodeId { path: path.display().to_string(), reason: violations.to_string() }
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let random: [u8; 8] = random().map_err(io_error(path))?;
            let text = format!("n{:016x}", u64::from_ne_bytes(random));
            whole_file::write(path, FILE_MODE, format!("{text}\n").as_bytes()).map_err(io_error(path))?;
            text.parse().map_err(|violations: etcd_schema::Violations| StateDirError::BadNodeId {
                path: path.display().to_string(),
                reason: violations.to_string(),
            })
        }
        Err(source) => Err(io_error(path)(source)),
    }
}

fn random() -> io::Result<[u8; 8]> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> StateDirError {
    let path = path.display().to_string();
    move |source| StateDirError::Io { path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_stays_and_starts_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let first = StateDir::open(&path).unwrap();
        let (id, incarnation) = (first.identity().id.clone(), first.identity().incarnation);
        assert_eq!(first.identity().start_count, 1);
        drop(first);
        let second = StateDir::open(&path).unwrap();
        assert_eq!(second.identity().id, id);
        assert_eq!(second.identity().start_count, 2);
        assert_ne!(second.identity().incarnation, incarnation);
    }

    #[test]
    fn a_second_daemon_is_told_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let held = StateDir::open(dir.path()).unwrap();
        let error = StateDir::open(dir.path()).unwrap_err();
        assert!(
            matches!(&error, StateDirError::InUse { holder, .. } if *holder == std::process::id().to_string()),
            "{error}"
        );
        drop(held);
        assert!(StateDir::open(dir.path()).is_ok());
    }

    #[test]
    fn a_damaged_id_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        // As an operator or a crash leaves it.
        for damaged in [&b"Not An Id\n"[..], b"", &[0; 18], &[0xff; 18]] {
            fs::write(dir.path().join("node-id"), damaged).unwrap();
            let error = StateDir::open(dir.path()).unwrap_err();
            assert!(matches!(error, StateDirError::BadNodeId { .. }), "{error}");
            assert!(error.to_string().contains("delete the file"), "{error}");
            assert_eq!(fs::read(dir.path().join("node-id")).unwrap(), damaged);
        }
    }

    #[test]
    fn a_start_that_cannot_be_counted_is_one_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let id = StateDir::open(dir.path()).unwrap().identity().id.clone();
        // What `starts` is replaced by cannot be written: as on a full or read-only disk, and for root too.
        fs::create_dir(dir.path().join("starts.new")).unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        assert_eq!((&state.identity().id, state.identity().start_count), (&id, 2));
    }
}
