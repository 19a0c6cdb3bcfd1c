//! Atomic file replacement: a reader, or a start after a crash, finds the old content or the new, never a part.
//! [`Folder`] reads other users' files, follows no link and never blocks.

#![forbid(unsafe_code)]

mod folder;

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, BufWriter, Write},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

pub use self::folder::{FileError, Folder};

/// Reads the file at `path` whole, if it is an ordinary file of at most `most` bytes. A link in its place is an error;
/// links on the way to its directory are followed.
///
/// # Errors
/// The system's error; [`io::ErrorKind::InvalidInput`] with a [`FileError`] for anything but such a file.
pub fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let name = path.file_name().and_then(OsStr::to_str).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(Folder::open(parent(path))?.read(name, most)?)
}

/// Writes `bytes` beside `path`, with `mode` whatever the umask, onto the disk, and puts that in the place of `path`.
/// Two writers of one path at a time must be kept apart by the caller.
///
/// # Errors
/// The system's error; `path` is then as it was, except when only its directory could not be synced.
pub fn write(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    write_by(path, mode, |file| file.write_all(bytes))
}

/// [`write()`] for content that is not held in one piece: `content` writes it.
///
/// # Errors
/// The system's error, or that of `content`; `path` is then as it was, except when only its directory could not be synced.
pub fn write_by(path: &Path, mode: u32, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let beside = beside(path)?;
    let written = write_new(&beside, mode, content).and_then(|()| fs::rename(&beside, path));
    if let Err(error) = written {
        // A leftover would be harmless, but may hold a secret.
        let _ = fs::remove_file(&beside);
        return Err(error);
    }
    File::open(parent(path))?.sync_all()
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."))
}

/// In the same directory, for a rename works within one file system only.
fn beside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut name = name.to_owned();
    name.push(".new");
    Ok(path.with_file_name(name))
}

fn write_new(path: &Path, mode: u32, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    // A file that a crash has left may have another mode, and others may have it open.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    let mut buffered = BufWriter::new(file);
    content(&mut buffered)?;
    buffered.into_inner()?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn is_there_whole_with_its_mode_and_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("subnet.env");
        for (given, content) in [(0o600, "first, longer"), (0o664, "second")] {
            write(&path, given, content.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
            assert_eq!(mode(&path), given);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    /// A process that has the old file open reads the old content to its end.
    #[test]
    fn a_reader_keeps_what_it_has_opened() {
        use std::io::Read as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write(&path, 0o600, b"old").unwrap();
        let mut open = File::open(&path).unwrap();
        write(&path, 0o600, b"new").unwrap();
        let mut read = String::new();
        open.read_to_string(&mut read).unwrap();
        assert_eq!(read, "old");
    }

    #[test]
    fn what_a_crash_left_beside_is_no_obstacle_and_gives_no_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let left = dir.path().join("key.new");
        fs::write(&left, "half").unwrap();
        fs::set_permissions(&left, Permissions::from_mode(0o666)).unwrap();
        let mut eavesdropper = File::open(&left).unwrap();
        write(&path, 0o600, b"secret").unwrap();
        assert_eq!(mode(&path), 0o600);
        let mut heard = String::new();
        io::Read::read_to_string(&mut eavesdropper, &mut heard).unwrap();
        assert_eq!(heard, "half");
    }

    #[test]
    fn a_failure_leaves_the_file_and_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::create_dir_all(path.join("not empty")).unwrap();
        assert!(write(&path, 0o600, b"x").is_err());
        assert!(path.is_dir());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
