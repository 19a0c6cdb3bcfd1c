//! Addresses that host-local allocated below the run directory for `meshd-cni`, before the daemon allocated addresses
//! itself: one directory per network, one file per address, and a lock.
//!
//! The daemon does not allocate these addresses while their container exists. Its user may have read access only;
//! `meshd-cni`, which runs as root, removes the files with their attachment.

use std::{
    fs::File,
    net::IpAddr,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use atomic_file::{FileError, Folder};
use nix::fcntl::{Flock, FlockArg};

use crate::environment::AttachmentName;

/// Name of its folder in the run directory.
const IPAM: &str = "ipam";
/// Longest file that is read: a container's id and an interface.
const MAX_FILE: u64 = 4096;

/// How long host-local's lock is awaited. It holds the lock for a few system calls.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two attempts to get it.
const PAUSE: Duration = Duration::from_millis(2);

/// An address that host-local has given out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reserved {
    /// The network.
    pub network: String,
    /// The address.
    pub address: IpAddr,
    /// The name of its file.
    pub file: String,
    /// Its attachment; `None` while the file is being written, or where only root may read it.
    pub holder: Option<AttachmentName>,
}

/// The folder of these addresses for this run directory.
#[must_use]
pub fn folder(run_dir: &Path) -> PathBuf {
    run_dir.join(IPAM)
}

/// All addresses given out below `run_dir`, read under each network's lock where this user may open it. Without the
/// lock a file may be half-written, and then has no holder.
///
/// # Errors
/// When a folder is there and cannot be read, or is a link: the addresses in a folder that was moved are in use.
pub fn reserved(run_dir: &Path) -> Result<Vec<Reserved>, FileError> {
    let Some(ipam) = open(run_dir)? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for network in ipam.names()?.into_iter().filter_map(|name| name.into_string().ok()) {
        match ipam.folder(&network) {
            Ok(folder) => {
                let _lock = lock(&folder);
                found.extend(reserved_in(&folder, &network)?);
            }
            // Of no network.
            Err(error) if error.is_ordinary_file() => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Frees those addresses of a network whose attachment is `gone`. Returns how many.
///
/// # Errors
/// When the folder is there and cannot be changed, or is a link.
pub fn give_back(run_dir: &Path, network: &str, gone: impl Fn(&AttachmentName) -> bool) -> Result<usize, FileError> {
    let Some(ipam) = open(run_dir)? else { return Ok(0) };
    let folder = match ipam.folder(network) {
        Err(error) if error.is_not_found() => return Ok(0),
        folder => folder?,
    };
    let _lock = lock(&folder)?;
    let mut count = 0;
    for reserved in reserved_in(&folder, network)? {
        if reserved.holder.as_ref().is_some_and(&gone) {
            count += usize::from(folder.remove(&reserved.file)?);
        }
    }
    Ok(count)
}

/// `None`: host-local has given out nothing here.
fn open(run_dir: &Path) -> Result<Option<Folder>, FileError> {
    match Folder::open(run_dir).map_err(FileError::from).and_then(|run| run.folder(IPAM)) {
        Err(error) if error.is_not_found() => Ok(None),
        folder => folder.map(Some),
    }
}

fn reserved_in(folder: &Folder, network: &str) -> Result<Vec<Reserved>, FileError> {
    let mut found = Vec::new();
    for file in folder.names()?.into_iter().filter_map(|name| name.into_string().ok()) {
        let Some(address) = address_of_file(&file) else { continue };
        let holder = match folder.read(&file, MAX_FILE) {
            Ok(text) => holder(&String::from_utf8_lossy(&text)),
            // It was given back meanwhile.
            Err(error) if error.is_not_found() => continue,
            Err(_) => None,
        };
        found.push(Reserved { network: network.to_owned(), address, file, holder });
    }
    Ok(found)
}

/// A container's id and its interface, a line each.
fn holder(text: &str) -> Option<AttachmentName> {
    let mut lines = text.lines().map(str::trim);
    let (container_id, ifname) = (lines.next()?, lines.next()?);
    Some(AttachmentName { container_id: container_id.to_owned(), ifname: ifname.to_owned() })
}

/// A file is named after its address; on file systems that take no colons, with underscores.
fn address_of_file(name: &str) -> Option<IpAddr> {
    name.parse().or_else(|_| name.replace('_', ":").parse()).ok()
}

/// host-local's lock of a network. `Ok(None)`: host-local has made none.
fn lock(folder: &Folder) -> Result<Option<Flock<File>>, FileError> {
    let mut file = match folder.open_file("lock") {
        Err(error) if error.is_not_found() => return Ok(None),
        file => file?,
    };
    let end = Instant::now() + PATIENCE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((same, nix::errno::Errno::EWOULDBLOCK | nix::errno::Errno::EINTR)) if Instant::now() < end => {
                file = same;
                thread::sleep(PAUSE);
            }
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn addresses_of_attachments_that_are_gone_are_given_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(give_back(dir.path(), "mesh", |_| true).unwrap(), 0);
        assert_eq!(reserved(dir.path()).unwrap(), []);
        let folder = dir.path().join("ipam/mesh");
        fs::create_dir_all(&folder).unwrap();
        for (address, id) in [("10.244.3.2", "a"), ("fd42::2", "a"), ("10.244.3.3", "b")] {
            fs::write(folder.join(address), format!("{id}\r\neth0")).unwrap();
        }
        fs::write(folder.join("10.244.3.4"), "").unwrap();
        fs::write(folder.join("lock"), "").unwrap();
        fs::write(folder.join("last_reserved_ip.0"), "10.244.3.3").unwrap();
        assert_eq!(reserved(dir.path()).unwrap().len(), 4);
        assert_eq!(give_back(dir.path(), "mesh", |holder| holder.container_id == "a").unwrap(), 2);
        let mut left: Vec<_> = reserved(dir.path())
            .unwrap()
            .into_iter()
            .map(|one| (one.address.to_string(), one.holder.map(|holder| holder.container_id)))
            .collect();
        left.sort();
        assert_eq!(left, [("10.244.3.3".to_owned(), Some("b".to_owned())), ("10.244.3.4".to_owned(), None)]);
        assert!(folder.join("last_reserved_ip.0").exists());
    }

    #[test]
    fn a_link_is_an_error_and_files_behind_it_stay() {
        use std::os::unix::fs::symlink;
        let (outside, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = outside.path().join("10.244.3.2");
        fs::write(&file, "a\r\neth0").unwrap();
        let ipam = dir.path().join("ipam");
        fs::create_dir(&ipam).unwrap();
        symlink(outside.path(), ipam.join("mesh")).unwrap();
        let error = give_back(dir.path(), "mesh", |_| true).unwrap_err().to_string();
        assert!(error.contains("mesh is a symbolic link"), "{error}");
        // The folder may have been moved: whatever is given out in it is in use.
        let error = reserved(dir.path()).unwrap_err().to_string();
        assert!(error.contains("mesh is a symbolic link"), "{error}");
        fs::remove_file(ipam.join("mesh")).unwrap();
        nix::unistd::mkfifo(&ipam.join("mesh"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(reserved(dir.path()).is_err());
        fs::remove_file(ipam.join("mesh")).unwrap();
        fs::create_dir(ipam.join("mesh")).unwrap();
        fs::write(ipam.join("notes"), "of no network").unwrap();
        symlink(&file, ipam.join("mesh/10.244.3.3")).unwrap();
        nix::unistd::mkfifo(&ipam.join("mesh/10.244.3.4"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let holders: Vec<_> = reserved(dir.path()).unwrap().into_iter().map(|one| one.holder).collect();
        assert_eq!(holders, [None, None], "reserved, whichever container has them");
        fs::remove_dir_all(&ipam).unwrap();
        symlink(outside.path(), &ipam).unwrap();
        assert!(give_back(dir.path(), ".", |_| true).is_err() && reserved(dir.path()).is_err());
        assert!(file.exists());
    }

    #[test]
    fn a_lock_that_is_held_is_awaited() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("ipam/mesh");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("10.244.3.2"), "a\r\neth0").unwrap();
        let file = File::create(folder.join("lock")).unwrap();
        let held = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).unwrap();
        thread::scope(|scope| {
            let freed = scope.spawn(|| give_back(dir.path(), "mesh", |_| true));
            let read = scope.spawn(|| reserved(dir.path()));
            assert!(folder.join("10.244.3.2").exists());
            drop(held);
            freed.join().unwrap().unwrap();
            read.join().unwrap().unwrap();
        });
        assert!(!folder.join("10.244.3.2").exists());
    }
}
