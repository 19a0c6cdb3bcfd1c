//! STATE: the lock and the node's identity.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use atomic_file::{FileError, Folder};
use control_core::membership::Identity;
use etcd_schema::NodeId;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use tracing::{debug, warn};

/// The mode of files in STATE: readable by this daemon only.
pub const FILE_MODE: u32 = 0o600;
/// Name of the file that a running daemon holds a lock on.
const LOCK: &str = "lock";
/// Longest file of the identity that is read.
const MAX_FILE: u64 = 4096;

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
    #[error("state directory {path} is in use by process {holder}: only one meshd may use it")]
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
        /// The system's error.
        source: io::Error,
    },
    /// `node-id` holds something else.
    #[error(
        "{path} contains no valid node id ({reason}): restore this node's id (the part after `nodes/` of its key in \
         etcd), or delete the file to join as a new node with a new subnet"
    )]
    BadNodeId {
        /// The file.
        path: String,
        /// The violation.
        reason: String,
    },
    /// `node-id` holds an id, but not the one that this node started with.
    #[error(
        "{path} contains \"{id}\", but its checksum {sum} is for another id: the file is truncated or was edited. \
         Restore this node's id (the part after `nodes/` of its key in etcd). If \"{id}\" is intended, delete {sum}. \
         To join as a new node with a new subnet, delete {path}"
    )]
    NodeIdChanged {
        /// The file.
        path: String,
        /// Its content.
        id: NodeId,
        /// The file with the checksum.
        sum: String,
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
        let id = node_id(path)?;
        let count_file = path.join("starts");
        let start_count = atomic_file::read(&count_file, MAX_FILE)
            .ok()
            .and_then(|bytes| str::from_utf8(&bytes).ok()?.trim().parse::<u64>().ok())
            .unwrap_or(0)
            .saturating_add(1);
        // Only people read the count: a full or read-only disk must not keep the node from starting.
        if let Err(error) = atomic_file::write(&count_file, FILE_MODE, format!("{start_count}\n").as_bytes()) {
            warn!(file = %count_file.display(), %error, "cannot count this start; saved state may be incomplete after \
                the next one: free disk space, or make the file system \
                writable");
        }
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned());
        let incarnation = u64::from_ne_bytes(random().map_err(io_error(path))?);
        let identity = Identity { id, boot_id, start_count, incarnation, predecessor: None };
        Ok(Self { path: path.to_owned(), identity, _lock: lock })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The identity of this process.
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }
}

fn lock(dir: &Path) -> Result<Flock<File>, StateDirError> {
    let open = || -> Result<File, FileError> {
        let folder = Folder::open(dir)?;
        let readable = folder.open_or_create(LOCK, FILE_MODE)?;
        match folder.open_for_writing(LOCK) {
            // A lock on a file that can only be read is as good.
            Err(FileError::Io(error)) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(readable),
            opened => opened,
        }
    };
    let mut lock = hold(dir, open().map_err(|error| lock_error(dir, error))?)?;
    // For the message of another daemon's start; the lock itself is the kernel's.
    let written = lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| writeln!(lock, "{}", std::process::id()));
    if let Err(error) = written {
        debug!(file = %dir.join(LOCK).display(), %error, "the lock file names no process");
    }
    Ok(lock)
}

/// Locks a state directory and changes nothing in it; `None`: no daemon has ever run on it.
pub fn lock_existing(dir: &Path) -> Result<Option<Flock<File>>, StateDirError> {
    match Folder::open(dir).map_err(FileError::from).and_then(|folder| folder.open_for_writing(LOCK)) {
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(lock_error(dir, error)),
        Ok(file) => hold(dir, file).map(Some),
    }
}

fn hold(dir: &Path, file: File) -> Result<Flock<File>, StateDirError> {
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(file, errno)| match errno {
        Errno::EWOULDBLOCK => {
            let mut text = String::new();
            // Shown to root, and written by the daemon's user: a process id, or nothing.
            let holder = match file.take(MAX_FILE).read_to_string(&mut text).map(|_| text.trim().parse::<u32>()) {
                Ok(Ok(holder)) => holder.to_string(),
                _ => "unknown".to_owned(),
            };
            StateDirError::InUse { path: dir.display().to_string(), holder }
        }
        errno => lock_error(dir, errno.into()),
    })
}

fn lock_error(dir: &Path, error: FileError) -> StateDirError {
    io_error(&dir.join(LOCK))(error.into())
}

/// The node's id, made at the first start. Half an id, as a crash or a hand may leave it, is a valid id of another
/// node: so the first start that finds or makes the id keeps its checksum beside it.
fn node_id(dir: &Path) -> Result<NodeId, StateDirError> {
    let (path, sum_path) = (dir.join("node-id"), dir.join("node-id.sum"));
    match atomic_file::read(&path, MAX_FILE) {
        Ok(bytes) => {
            let id = parse_node_id(&path, &String::from_utf8_lossy(&bytes))?;
            let sum = checksum(&id);
            match atomic_file::read(&sum_path, MAX_FILE) {
                Ok(kept) if kept.split(|byte| byte.is_ascii_whitespace()).next() == Some(sum.as_bytes()) => {}
                Ok(_) => {
                    let (path, sum) = (path.display().to_string(), sum_path.display().to_string());
                    return Err(StateDirError::NodeIdChanged { path, id, sum });
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    // An operator wrote the id, or an older daemon. A read-only disk must not keep the node from
                    // starting.
                    if let Err(error) = write_checksum(&sum_path, &sum) {
                        warn!(file = %sum_path.display(), %error, "cannot write the checksum of the node id; a \
                            damaged id would go unnoticed: free disk space, or \
                            make the file system writable");
                    }
                }
                Err(source) => return Err(io_error(&sum_path)(source)),
            }
            Ok(id)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let random: [u8; 8] = random().map_err(io_error(&path))?;
            let id = parse_node_id(&path, &format!("n{:016x}", u64::from_ne_bytes(random)))?;
            // In this order: a checksum without an id is replaced, an id with the checksum of another one is refused.
            write_checksum(&sum_path, &checksum(&id)).map_err(io_error(&sum_path))?;
            atomic_file::write(&path, FILE_MODE, format!("{id}\n").as_bytes()).map_err(io_error(&path))?;
            Ok(id)
        }
        Err(source) => Err(io_error(&path)(source)),
    }
}

fn parse_node_id(path: &Path, text: &str) -> Result<NodeId, StateDirError> {
    text.trim().parse().map_err(|violations: etcd_schema::Violations| StateDirError::BadNodeId {
        path: path.display().to_string(),
        reason: violations.to_string(),
    })
}

/// SHA-256 of the file as it is written, in hexadecimal.
fn checksum(id: &NodeId) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, format!("{id}\n").as_bytes());
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// In the format of `sha256sum`.
fn write_checksum(path: &Path, sum: &str) -> io::Result<()> {
    atomic_file::write(path, FILE_MODE, format!("{sum}  node-id\n").as_bytes())
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

    /// Root may start a daemon in a directory that another user owns.
    #[test]
    fn no_link_in_it_is_read_or_written_through() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let target = outside.path().join("target");
        fs::write(&target, "rack-7\n").unwrap();
        for name in ["lock", "node-id", "node-id.sum"] {
            let link = dir.path().join(name);
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(&target, &link).unwrap();
            let error = StateDir::open(dir.path()).unwrap_err();
            assert!(error.to_string().contains("is a symbolic link"), "{error}");
            fs::remove_file(&link).unwrap();
            StateDir::open(dir.path()).unwrap();
        }
        let starts = dir.path().join("starts");
        fs::remove_file(&starts).unwrap();
        fs::write(&target, "41\n").unwrap();
        std::os::unix::fs::symlink(&target, &starts).unwrap();
        let identity = StateDir::open(dir.path()).unwrap().identity().clone();
        assert_eq!(identity.start_count, 1);
        assert_eq!(fs::read_to_string(&target).unwrap(), "41\n");
        fs::write(&target, format!("{} {} 7\n", identity.id, identity.boot_id)).unwrap();
        std::os::unix::fs::symlink(&target, dir.path().join("incarnation")).unwrap();
        assert_eq!(super::super::predecessor::load(dir.path(), &identity), None);
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
    fn half_an_id_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node-id");
        let id = StateDir::open(dir.path()).unwrap().identity().id.clone();
        let whole = fs::read_to_string(&path).unwrap();
        for length in 1..id.as_str().len() {
            fs::write(&path, &whole[..length]).unwrap();
            let error = StateDir::open(dir.path()).unwrap_err();
            assert!(matches!(error, StateDirError::NodeIdChanged { .. }), "{error}");
            assert!(error.to_string().contains("node-id.sum"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), whole[..length]);
        }
        // Written back, with or without the end of line.
        for text in [whole.as_str(), whole.trim_end()] {
            fs::write(&path, text).unwrap();
            assert_eq!(StateDir::open(dir.path()).unwrap().identity().id, id);
        }
        fs::remove_file(&path).unwrap();
        assert_ne!(StateDir::open(dir.path()).unwrap().identity().id, id, "a new node");
        assert!(StateDir::open(dir.path()).is_ok());
    }

    #[test]
    fn an_id_that_an_operator_wrote_is_taken_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (path, sum) = (dir.path().join("node-id"), dir.path().join("node-id.sum"));
        fs::write(&path, "rack-7-west\n").unwrap();
        assert_eq!(StateDir::open(dir.path()).unwrap().identity().id.as_str(), "rack-7-west");
        fs::write(&path, "rack-7").unwrap();
        assert!(matches!(StateDir::open(dir.path()), Err(StateDirError::NodeIdChanged { .. })));
        fs::remove_file(&sum).unwrap();
        assert_eq!(StateDir::open(dir.path()).unwrap().identity().id.as_str(), "rack-7");
        // A checksum that is damaged confirms nothing.
        for damaged in [&b""[..], b"12ab", &[0; 64], &[0xff; 64]] {
            fs::write(&sum, damaged).unwrap();
            assert!(matches!(StateDir::open(dir.path()), Err(StateDirError::NodeIdChanged { .. })));
        }
    }

    #[test]
    fn a_checksum_that_cannot_be_written_keeps_no_node_from_starting() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("node-id"), "by-hand").unwrap();
        fs::create_dir(dir.path().join("node-id.sum.new")).unwrap();
        assert_eq!(StateDir::open(dir.path()).unwrap().identity().id.as_str(), "by-hand");
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
