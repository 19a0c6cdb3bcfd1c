//! RUN/attachments: one file per attachment, tombstones of attachments withdrawn without the daemon, and the last
//! allocated addresses.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    path::Path,
};

use atomic_file::{FileError, Folder};
use cni::{
    daemon::{Attached, RECORDS, record_file, tombstone_file, withdrawn_by},
    environment::AttachmentName,
};

use super::AttachError;

/// An earlier version's. No attachment's file has this name, nor the next one: they have no `@`.
const BOOT: &str = "boot";
/// The last allocated address of each family, a line each: a hint where to go on after a start.
const LAST: &str = "last-allocated";

/// Longest record that is read: labels and addresses of one container.
const MAX_RECORD: u64 = 1 << 20;

/// The content of the directory.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The attachments of this boot.
    pub(super) present: Vec<Attached>,
    /// The names of those of others, whose files are gone now.
    pub(super) stale: Vec<AttachmentName>,
    /// Files that could not be read, by name, and entries that are no files. They are left alone.
    pub(super) unread: BTreeMap<String, FileError>,
}

/// Reads the folder, which is created if it is not there. Only a file that was read whole, and is no attachment of this
/// boot, is removed.
pub(super) fn read_all(run_dir: &Path, boot_id: &str) -> Result<Found, FileError> {
    let folder = Folder::open(run_dir)?.make_folder(RECORDS, 0o700)?;
    let mut found = Found::default();
    for name in folder.names()? {
        match name.into_string() {
            Ok(name) if name == BOOT || name == LAST || withdrawn_by(&name).is_some() => {}
            Ok(name) => read_one(&folder, name, boot_id, &mut found)?,
            Err(name) => {
                let name = name.to_string_lossy().into_owned();
                found.unread.insert(name, io::Error::from(io::ErrorKind::InvalidFilename).into());
            }
        }
    }
    Ok(found)
}

/// Reads these files again.
pub(super) fn read_again(run_dir: &Path, names: BTreeSet<String>, boot_id: &str) -> Result<Found, FileError> {
    let folder = folder(run_dir)?;
    let mut found = Found::default();
    for name in names {
        read_one(&folder, name, boot_id, &mut found)?;
    }
    Ok(found)
}

fn read_one(folder: &Folder, file: String, boot_id: &str, found: &mut Found) -> Result<(), FileError> {
    let bytes = match folder.read(&file, MAX_RECORD) {
        Ok(bytes) => bytes,
        // It was withdrawn meanwhile.
        Err(error) if error.is_not_found() => return Ok(()),
        Err(error) => {
            tracing::warn!(file, %error, "cannot read a file in the attachment directory; keeping it");
            found.unread.insert(file, error);
            return Ok(());
        }
    };
    match serde_json::from_slice::<Attached>(&bytes) {
        Ok(attached) if attached.boot_id == boot_id && file == record_file(&attached.name()) => {
            found.present.push(attached);
        }
        Ok(attached) => {
            folder.remove(&file)?;
            found.stale.push(attached.name());
        }
        Err(error) => {
            // Half a file that was never renamed, or something of another version.
            tracing::warn!(file, %error, "invalid attachment file; removed");
            folder.remove(&file)?;
        }
    }
    Ok(())
}

fn folder(run_dir: &Path) -> Result<Folder, FileError> {
    Folder::open(run_dir)?.folder(RECORDS)
}

/// The attachments that were withdrawn while the daemon did not answer.
pub(super) fn tombstones(run_dir: &Path) -> Result<Vec<AttachmentName>, FileError> {
    let names = folder(run_dir)?.names()?;
    Ok(names.iter().filter_map(|name| name.to_str().and_then(withdrawn_by)).collect())
}

/// Removes a tombstone, if there is one.
pub(super) fn remove_tombstone(run_dir: &Path, name: &AttachmentName) -> Result<(), AttachError> {
    remove_file(run_dir, &tombstone_file(name))
}

/// The last allocated addresses, as far as they are known.
pub(super) fn last_allocated(run_dir: &Path) -> Vec<IpAddr> {
    let read = folder(run_dir).and_then(|folder| folder.read(LAST, MAX_RECORD)).unwrap_or_default();
    String::from_utf8_lossy(&read).lines().filter_map(|line| line.parse().ok()).collect()
}

/// Writes the last allocated addresses down. Without them the order after a start is another one; that is no reason to
/// fail an ADD.
pub(super) fn write_last_allocated(run_dir: &Path, addresses: impl Iterator<Item = IpAddr>) {
    let text: String = addresses.map(|address| format!("{address}\n")).collect();
    if let Err(error) = put(run_dir, LAST, text.as_bytes()) {
        tracing::debug!(%error, "cannot save the last allocated addresses");
    }
}

pub(super) fn write(run_dir: &Path, attached: &Attached) -> Result<(), AttachError> {
    let file = record_file(&attached.name());
    let written = serde_json::to_vec(attached).map_err(|error| io::Error::from(error).into());
    written.and_then(|bytes| put(run_dir, &file, &bytes)).map_err(failed(run_dir, &file))
}

pub(super) fn remove(run_dir: &Path, name: &AttachmentName) -> Result<(), AttachError> {
    remove_file(run_dir, &record_file(name))
}

fn remove_file(run_dir: &Path, file: &str) -> Result<(), AttachError> {
    let removed = folder(run_dir).and_then(|folder| folder.remove(file));
    removed.map(drop).map_err(failed(run_dir, file))
}

/// Writes a file atomically, but does not sync it: a crash of the machine ends the containers that these files
/// describe.
fn put(run_dir: &Path, file: &str, bytes: &[u8]) -> Result<(), FileError> {
    folder(run_dir)?.replace(file, 0o600, bytes)
}

fn failed(run_dir: &Path, file: &str) -> impl FnOnce(FileError) -> AttachError {
    let path = run_dir.join(RECORDS).join(file).display().to_string();
    move |source| AttachError::File { path, source: source.into() }
}
