//! A container's network namespace.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    thread,
};

use netlink::{Netlink, NetlinkError};
use nix::{
    sched::{CloneFlags, setns},
    sys::statfs::{NSFS_MAGIC, PROC_SUPER_MAGIC, fstatfs},
};

use crate::error::{CniError, Code};

/// An open namespace: it lives at least as long as this value.
#[derive(Debug)]
pub struct NetworkNamespace {
    path: PathBuf,
    file: File,
    inode: (u64, u64),
}

impl NetworkNamespace {
    /// Opens the namespace at `path`.
    ///
    /// # Errors
    /// [`Code::UnknownContainer`] when there is none, [`Code::InvalidEnvironment`] when it is the host's own.
    pub fn open(path: &Path) -> Result<Self, CniError> {
        let unknown = |reason: String| {
            CniError::new(Code::UnknownContainer, format!("no network namespace at {}: {reason}", path.display()))
        };
        let file = File::open(path).map_err(|error| unknown(error.to_string()))?;
        let kind = fstatfs(&file).map_err(|error| unknown(error.to_string()))?.filesystem_type();
        if kind != NSFS_MAGIC && kind != PROC_SUPER_MAGIC {
            return Err(unknown("not a namespace file".to_owned()));
        }
        let inode = file.metadata().map(|data| (data.dev(), data.ino())).map_err(|error| unknown(error.to_string()))?;
        let own = fs::metadata("/proc/self/ns/net").map(|data| (data.dev(), data.ino()));
        if own.is_ok_and(|own| own == inode) {
            return Err(CniError::new(
                Code::InvalidEnvironment,
                format!("CNI_NETNS {} is the host's own network namespace", path.display()),
            ));
        }
        Ok(Self { path: path.to_owned(), file, inode })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode number: its identity.
    #[must_use]
    pub const fn inode(&self) -> (u64, u64) {
        self.inode
    }

    /// Calls `work` on a thread in the namespace, with a netlink socket there.
    ///
    /// # Errors
    /// Those of `work`, and when the namespace cannot be entered.
    pub fn enter<T: Send, E: From<NetlinkError> + Send>(
        &self,
        work: impl FnOnce(&mut Netlink) -> Result<T, E> + Send,
    ) -> Result<T, E> {
        let entered = |source| NetlinkError { what: format!("namespace {}", self.path.display()), source };
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| entered(errno.into()))?;
                work(&mut Netlink::open()?)
            });
            inside.join().unwrap_or_else(|_| Err(entered(io::Error::other("a thread panicked")).into()))
        })
    }
}

impl AsFd for NetworkNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Sets a sysctl in the namespace of this thread, by its path below `/proc/sys/net`. Skips settings that the kernel
/// lacks.
///
/// # Errors
/// When the kernel refuses.
pub fn sysctl(path: &str, value: &str) -> Result<(), NetlinkError> {
    match fs::write(Path::new("/proc/sys/net").join(path), value) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(NetlinkError { what: format!("sysctl {path}"), source })
        }
        _ => Ok(()),
    }
}
