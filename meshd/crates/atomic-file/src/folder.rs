//! Directories that several users write to: in the run and state directories, root's processes read files of the
//! daemon's user, and the daemon reads root's.
//!
//! Neither trusts the other's files. No link in a directory is followed, only ordinary files are opened, no open
//! blocks, and every read has a limit. All names are resolved relative to an open directory, so nothing can be
//! exchanged between a check and its use.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    process,
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, open, openat, renameat},
    sys::stat::{Mode, SFlag, fstat, fstatat, mkdirat},
    unistd::{UnlinkatFlags, unlinkat},
};

/// An open directory.
#[derive(Debug)]
pub struct Folder(OwnedFd);

/// Why an entry of a folder cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The entry has another file type than expected, and stays untouched.
    #[error("{name} is {found}, not {wanted}: replace it with {wanted}, or remove it")]
    Odd {
        /// Its name in the folder.
        name: String,
        /// Its file type.
        found: &'static str,
        /// The expected file type.
        wanted: &'static str,
    },
    /// The file exceeds the limit.
    #[error("{name} is longer than {most} bytes: remove it")]
    TooLong {
        /// Its name in the folder.
        name: String,
        /// The limit.
        most: u64,
    },
    /// The system's error.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for FileError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

impl From<FileError> for io::Error {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Io(error) => error,
            error => Self::new(io::ErrorKind::InvalidInput, error),
        }
    }
}

impl FileError {
    /// Whether there is no such entry.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Whether an ordinary file is where a directory was wanted.
    #[must_use]
    pub fn is_ordinary_file(&self) -> bool {
        matches!(self, Self::Odd { found, .. } if *found == FILE)
    }
}

const NO_LINK: OFlag = OFlag::O_NOFOLLOW.union(OFlag::O_CLOEXEC).union(OFlag::O_NONBLOCK);
const FOLDER: &str = "a directory";
const FILE: &str = "a regular file";

impl Folder {
    /// Opens a directory by the operator's path; links on that path are followed.
    ///
    /// # Errors
    /// The system's error.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(open(path, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?))
    }

    /// Opens a directory in this one.
    ///
    /// # Errors
    /// [`FileError::Odd`] when it is a link or anything else; the system's error.
    pub fn folder(&self, name: &str) -> Result<Self, FileError> {
        self.expect(name, SFlag::S_IFDIR, FOLDER)?;
        Ok(Self(openat(&self.0, name, NO_LINK | OFlag::O_DIRECTORY, Mode::empty())?))
    }

    /// [`folder`](Self::folder), which is created with `mode` if it is not there.
    ///
    /// # Errors
    /// The same.
    pub fn make_folder(&self, name: &str, mode: u32) -> Result<Self, FileError> {
        match mkdirat(&self.0, one_component(name)?, Mode::from_bits_truncate(mode)) {
            Ok(()) | Err(Errno::EEXIST) => self.folder(name),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The names of its entries.
    ///
    /// # Errors
    /// The system's error.
    pub fn names(&self) -> io::Result<Vec<OsString>> {
        let entries = fs::read_dir(format!("/proc/self/fd/{}", self.0.as_raw_fd()))?;
        entries.map(|entry| Ok(entry?.file_name())).collect()
    }

    /// Opens an ordinary file for reading.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn open_file(&self, name: &str) -> Result<File, FileError> {
        self.open_with(name, OFlag::O_RDONLY)
    }

    /// Opens an ordinary file for reading and writing. Its content stays.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn open_for_writing(&self, name: &str) -> Result<File, FileError> {
        self.open_with(name, OFlag::O_RDWR)
    }

    fn open_with(&self, name: &str, access: OFlag) -> Result<File, FileError> {
        self.expect(name, SFlag::S_IFREG, FILE)?;
        let file = File::from(openat(&self.0, name, NO_LINK | access, Mode::empty())?);
        match kind(fstat(&file)?.st_mode) {
            SFlag::S_IFREG => Ok(file),
            other => Err(odd(name, other, FILE)),
        }
    }

    /// Reads a whole file of at most `most` bytes.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn read(&self, name: &str, most: u64) -> Result<Vec<u8>, FileError> {
        let file = self.open_file(name)?;
        let mut bytes = Vec::new();
        // A long file is refused at once; one that grows meanwhile ends at the limit.
        if file.metadata()?.len() <= most {
            file.take(most + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 <= most {
                return Ok(bytes);
            }
        }
        Err(FileError::TooLong { name: name.to_owned(), most })
    }

    /// Creates a file.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] whatever it is that has the name; the system's error.
    pub fn create(&self, name: &str, mode: u32) -> Result<File, FileError> {
        let flags = NO_LINK | OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        Ok(openat(&self.0, one_component(name)?, flags, Mode::from_bits_truncate(mode))?.into())
    }

    /// Opens an ordinary file for reading, which is created if it is not there.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn open_or_create(&self, name: &str, mode: u32) -> Result<File, FileError> {
        match self.open_file(name) {
            Err(error) if error.is_not_found() => {}
            opened => return opened,
        }
        match self.create(name, mode) {
            // Another process was quicker.
            Err(FileError::Io(error)) if error.kind() == io::ErrorKind::AlreadyExists => self.open_file(name),
            created => created,
        }
    }

    /// Replaces a file: a reader finds the old content or the new. The previous entry of that name is not opened.
    /// Processes may replace one file concurrently, threads of one process may not. A process that dies meanwhile
    /// leaves `.new.PID.NAME`, which no reader opens.
    ///
    /// # Errors
    /// The system's error; the file is then as it was.
    pub fn replace(&self, name: &str, mode: u32, bytes: &[u8]) -> Result<(), FileError> {
        let beside = beside(name);
        self.remove(&beside)?;
        let written = self.create(&beside, mode).and_then(|mut file| Ok(file.write_all(bytes)?));
        let replaced = written.and_then(|()| Ok(renameat(&self.0, beside.as_str(), &self.0, name)?));
        if replaced.is_err() {
            let _ = self.remove(&beside);
        }
        replaced
    }

    /// Removes a file, or the link that has the name. Returns whether there was one.
    ///
    /// # Errors
    /// The system's error.
    pub fn remove(&self, name: &str) -> Result<bool, FileError> {
        match unlinkat(&self.0, one_component(name)?, UnlinkatFlags::NoRemoveDir) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn expect(&self, name: &str, wanted: SFlag, words: &'static str) -> Result<(), FileError> {
        let found = kind(fstatat(&self.0, one_component(name)?, AtFlags::AT_SYMLINK_NOFOLLOW)?.st_mode);
        if found == wanted { Ok(()) } else { Err(odd(name, found, words)) }
    }
}

/// The temporary name under which this process writes the new content.
fn beside(name: &str) -> String {
    format!(".new.{}.{name}", process::id())
}

/// A name leads to an entry of the folder itself.
fn one_component(name: &str) -> io::Result<&str> {
    match name {
        "" | "." | ".." => Err(io::ErrorKind::InvalidInput.into()),
        name if name.contains('/') => Err(io::ErrorKind::InvalidInput.into()),
        name => Ok(name),
    }
}

const fn kind(mode: u32) -> SFlag {
    SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits())
}

fn odd(name: &str, found: SFlag, wanted: &'static str) -> FileError {
    let found = match found {
        SFlag::S_IFLNK => "a symbolic link",
        SFlag::S_IFDIR => FOLDER,
        SFlag::S_IFREG => FILE,
        SFlag::S_IFIFO => "a FIFO",
        SFlag::S_IFSOCK => "a socket",
        _ => "a device",
    };
    FileError::Odd { name: name.to_owned(), found, wanted }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn no_link_is_followed_and_its_target_stays_as_it_is() {
        let (outside, run) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let target = outside.path().join("shadow");
        fs::write(&target, "secret").unwrap();
        symlink(&target, run.path().join("file")).unwrap();
        symlink(outside.path().join("new"), run.path().join("dangling")).unwrap();
        symlink(outside.path(), run.path().join("folder")).unwrap();
        let folder = Folder::open(run.path()).unwrap();
        for name in ["file", "dangling"] {
            for error in [
                folder.read(name, 10).unwrap_err(),
                folder.open_or_create(name, 0o600).map(drop).unwrap_err(),
                folder.folder(name).map(drop).unwrap_err(),
            ] {
                assert!(error.to_string().contains("is a symbolic link"), "{error}");
            }
            assert!(folder.create(name, 0o600).is_err());
        }
        assert!(folder.folder("folder").unwrap_err().to_string().contains("is a symbolic link"));
        assert!(folder.make_folder("folder", 0o700).is_err());
        for name in ["../x", "a/b", "..", ""] {
            assert!(
                folder.create(name, 0o600).is_err() && folder.remove(name).is_err() && folder.read(name, 1).is_err()
            );
        }
        // What replaces a file, or removes it, has the link itself.
        symlink(&target, run.path().join(beside("file"))).unwrap();
        folder.replace("file", 0o600, b"mine").unwrap();
        assert_eq!(folder.read("file", 10).unwrap(), b"mine");
        assert!(folder.remove("dangling").unwrap() && !folder.remove("dangling").unwrap());
        assert_eq!(fs::read_to_string(&target).unwrap(), "secret");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }

    /// As when two plugins replace one file at a time: neither has the other's half.
    #[test]
    fn a_file_that_another_process_is_writing_stays() {
        let run = tempfile::tempdir().unwrap();
        let folder = Folder::open(run.path()).unwrap();
        for theirs in ["file.new", ".new.1.file"] {
            fs::write(run.path().join(theirs), "half").unwrap();
        }
        folder.replace("file", 0o600, b"mine").unwrap();
        let mut names = folder.names().unwrap();
        names.sort();
        assert_eq!(names, [".new.1.file", "file", "file.new"]);
    }

    #[test]
    fn nothing_but_an_ordinary_file_is_opened_and_nothing_blocks() {
        let run = tempfile::tempdir().unwrap();
        mkfifo(&run.path().join("fifo"), Mode::S_IRWXU).unwrap();
        fs::create_dir(run.path().join("directory")).unwrap();
        let _socket = UnixListener::bind(run.path().join("socket")).unwrap();
        fs::write(run.path().join("long"), "12345").unwrap();
        let folder = Folder::open(run.path()).unwrap();
        for (name, words) in
            [("fifo", "a FIFO"), ("directory", "a directory"), ("socket", "a socket"), ("long", "longer")]
        {
            let error = folder.read(name, 4).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
        assert_eq!(folder.read("long", 5).unwrap(), b"12345");
        assert!(folder.read("none", 5).unwrap_err().is_not_found());
        assert_eq!(folder.names().unwrap().len(), 4);
    }
}
