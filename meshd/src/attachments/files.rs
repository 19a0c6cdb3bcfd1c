//! RUN/attachments: a file per attachment, and one that says which boot they are of.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use cni::{
    daemon::{Attached, record_file},
    environment::AttachmentName,
};

use super::AttachError;

/// Which boot the addresses in RUN/ipam are of. No attachment's file has this name: it has no `@`.
const BOOT: &str = "boot";

/// The attachments of this boot, and the names of those of others, whose files are gone then. A file that cannot be read
/// is none of ours, and stays out of the way.
pub(super) fn read_all(dir: &Path, boot_id: &str) -> io::Result<(Vec<Attached>, Vec<AttachmentName>)> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let (mut present, mut stale) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name == BOOT) {
            continue;
        }
        let read = fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice::<Attached>(&bytes)?));
        match read {
            Ok(attached) if attached.boot_id == boot_id && path == dir.join(record_file(&attached.name())) => {
                present.push(attached);
            }
            Ok(attached) => {
                fs::remove_file(&path)?;
                stale.push(attached.name());
            }
            Err(error) => {
                // Half a file that was never renamed, or something of another version.
                tracing::warn!(file = %path.display(), %error, "not an attachment; it is removed");
                fs::remove_file(&path)?;
            }
        }
    }
    Ok((present, stale))
}

/// Frees all addresses but those of `present` when they were given out in another boot.
pub(super) fn end_boot(dir: &Path, addresses: &Path, boot_id: &str, present: &[Attached]) -> io::Result<()> {
    let file = dir.join(BOOT);
    if fs::read_to_string(&file).is_ok_and(|known| known == boot_id) {
        return Ok(());
    }
    let networks = match fs::read_dir(addresses) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        entries => Some(entries?),
    };
    for network in networks.into_iter().flatten() {
        let name = network?.file_name();
        let Some(name) = name.to_str() else { continue };
        let freed = cni::ipam::give_back(addresses, name, |holder| present.iter().all(|one| one.name() != *holder))?;
        if freed > 0 {
            tracing::info!(network = name, addresses = freed, "addresses of an earlier boot are free");
        }
    }
    put(&file, boot_id.as_bytes())
}

pub(super) fn write(dir: &Path, attached: &Attached) -> Result<(), AttachError> {
    let path = dir.join(record_file(&attached.name()));
    let written = serde_json::to_vec(attached).map_err(io::Error::from).and_then(|bytes| put(&path, &bytes));
    written.map_err(failed(&path))
}

pub(super) fn remove(dir: &Path, name: &AttachmentName) -> Result<(), AttachError> {
    let path = dir.join(record_file(name));
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(&path)(error)),
        _ => Ok(()),
    }
}

/// Whole or not at all for whoever reads it after this process is gone; not for after a crash of the machine, which ends
/// what these files speak of.
fn put(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use io::Write as _;
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    let written = file.write_all(bytes).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> AttachError {
    let path = path.display().to_string();
    move |source| AttachError::File { path, source }
}
