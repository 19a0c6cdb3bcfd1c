//! STATE/cache: the records that a node needs to forward packets after a start without etcd.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use atomic_file::{FileError, Folder};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use control_core::{core::CacheContent, guard::Evidence, types::Entry};
use etcd_schema::{Key, SubnetKey};
use mesh::records::{LeaseId, Revision};
use serde::{Deserialize, Serialize, Serializer};

use super::state_dir::FILE_MODE;

/// Longest file that is written or read.
pub(crate) const MAX_CACHE: usize = 64 << 20;

const VERSION: u32 = 1;
/// Below the state directory.
const FOLDER: &str = "cache";
const FOLDER_MODE: u32 = 0o755;
/// In that folder.
const FILE: &str = "store.json";

/// The records in force when the cache was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedRecords {
    /// When it was written, by the wall clock.
    pub written_at: SystemTime,
    /// The store's revision.
    pub revision: Revision,
    /// `LeaseTTL` of the configuration then; a cache that is older may name subnets that are others' by now.
    pub lease_ttl: Option<Duration>,
    /// The subnet of this node.
    pub subnet: Option<SubnetKey>,
    /// The last good value of every key.
    pub entries: Vec<Entry>,
    /// Which etcd they come from, and which of them it no longer held.
    pub evidence: Evidence,
}

/// Why the cache could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The system's error.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The system's error.
        source: io::Error,
    },
    /// Not JSON of this form, damaged, or of another version.
    #[error("{path}: {reason}")]
    Unreadable {
        /// The file.
        path: String,
        /// The violation.
        reason: String,
    },
    /// Longer than `MAX_CACHE`.
    #[error("{path}: {length} bytes are more than the {MAX_CACHE} that are kept")]
    TooLong {
        /// The file.
        path: String,
        /// How long it is or would be.
        length: usize,
    },
}

impl CachedRecords {
    /// This content, written at `now`.
    pub(crate) fn of(content: CacheContent, now: SystemTime) -> Self {
        let CacheContent { revision, lease_ttl, subnet, entries, evidence } = content;
        Self { written_at: now, revision, lease_ttl, subnet, entries, evidence }
    }

    /// How old it is; a clock that went back makes it new.
    #[must_use]
    pub fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(self.written_at).unwrap_or_default()
    }

    /// Whether a node may forward by it: not older than the lease of its own subnet lasts.
    #[must_use]
    pub(crate) fn is_usable(&self, now: SystemTime) -> bool {
        self.lease_ttl.is_some_and(|ttl| self.age(now) <= ttl)
    }

    /// The cache in `state_dir`; `None` when there is none.
    ///
    /// # Errors
    /// When it is there and cannot be used; the daemon then starts as if it were not.
    pub fn load(state_dir: &Path) -> Result<Option<Self>, CacheError> {
        let path = file(state_dir);
        let at = || path.display().to_string();
        // `meshd cleanup` reads it as root, and the daemon's user owns the directory.
        let state = Folder::open(state_dir).map_err(FileError::from);
        let bytes = match state.and_then(|state| state.folder(FOLDER)?.read(FILE, MAX_CACHE as u64)) {
            Err(error) if error.is_not_found() => return Ok(None),
            bytes => bytes.map_err(|error| CacheError::Io { path: at(), source: error.into() })?,
        };
        let unreadable = |reason: String| CacheError::Unreadable { path: at(), reason };
        let document: Document<Vec<CacheLine<String>>> =
            serde_json::from_slice(&bytes).map_err(|error| unreadable(format!("not a cache: {error}")))?;
        drop(bytes);
        if document.version != VERSION {
            return Err(unreadable(format!("version {} is not {VERSION}", document.version)));
        }
        document.read().map(Some).ok_or_else(|| unreadable("a value is damaged".into()))
    }

    /// Replaces the cache in `state_dir` whole.
    ///
    /// # Errors
    /// The system's error, or that it is too long; the previous file stays.
    pub fn save(&self, state_dir: &Path) -> Result<(), CacheError> {
        let path = file(state_dir);
        let at = || path.display().to_string();
        let io = |source| CacheError::Io { path: at(), source };
        // Behind a link it would be written where no start reads it.
        let state = Folder::open(state_dir).map_err(FileError::from);
        state.and_then(|state| state.make_folder(FOLDER, FOLDER_MODE)).map_err(|error| io(error.into()))?;
        let mut length = 0;
        let written = atomic_file::write_by(&path, FILE_MODE, |file| {
            let mut measured = Measured { file, length: &mut length };
            serde_json::to_writer(&mut measured, &Document::of(self))?;
            if length > MAX_CACHE { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(()) }
        });
        match written {
            Err(_) if length > MAX_CACHE => Err(CacheError::TooLong { path: at(), length }),
            written => written.map_err(io),
        }
    }
}

/// Writes up to a limit, and counts all bytes.
struct Measured<'f> {
    file: &'f mut dyn Write,
    length: &'f mut usize,
}

impl Write for Measured<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        *self.length += bytes.len();
        if *self.length <= MAX_CACHE {
            self.file.write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn file(state_dir: &Path) -> PathBuf {
    state_dir.join(FOLDER).join(FILE)
}

/// The file. Written entries are [`Lines`], so that a large mesh is not copied in memory.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document<E> {
    version: u32,
    written_at: u64,
    revision: Revision,
    lease_ttl: Option<u64>,
    subnet: Option<String>,
    /// Absent from files of earlier versions.
    #[serde(default)]
    evidence: Evidence,
    entries: E,
}

/// Entries that become lines one by one.
struct Lines<'a>(&'a [Entry]);

impl Serialize for Lines<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(CacheLine::of))
    }
}

/// One key. The value is text; other bytes are in base64.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CacheLine<T> {
    key: T,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<String>,
    create_revision: Revision,
    mod_revision: Revision,
    #[serde(default)]
    lease: i64,
}

impl<'a> Document<Lines<'a>> {
    fn of(cached: &'a CachedRecords) -> Self {
        Self {
            version: VERSION,
            written_at: cached.written_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            revision: cached.revision,
            lease_ttl: cached.lease_ttl.map(|ttl| ttl.as_secs()),
            subnet: cached.subnet.map(|subnet| Key::Subnet(subnet).to_string()),
            evidence: cached.evidence.clone(),
            entries: Lines(&cached.entries),
        }
    }
}

impl Document<Vec<CacheLine<String>>> {
    fn read(self) -> Option<CachedRecords> {
        let subnet = match self.subnet {
            None => None,
            Some(text) => match Key::parse(&text) {
                Ok(Key::Subnet(subnet)) => Some(subnet),
                _ => return None,
            },
        };
        Some(CachedRecords {
            written_at: UNIX_EPOCH.checked_add(Duration::from_secs(self.written_at))?,
            revision: self.revision,
            lease_ttl: self.lease_ttl.map(Duration::from_secs),
            subnet,
            entries: self.entries.into_iter().map(CacheLine::read).collect::<Option<_>>()?,
            evidence: self.evidence,
        })
    }
}

impl<'a> CacheLine<&'a str> {
    fn of(entry: &'a Entry) -> Self {
        let text = std::str::from_utf8(&entry.value).ok();
        Self {
            key: &entry.key,
            bytes: text.is_none().then(|| STANDARD.encode(&entry.value)),
            value: text,
            create_revision: entry.create_revision,
            mod_revision: entry.mod_revision,
            lease: entry.lease.map_or(0, LeaseId::get),
        }
    }
}

impl CacheLine<String> {
    fn read(self) -> Option<Entry> {
        let value = match (self.value, self.bytes) {
            (Some(text), None) => text.into_bytes(),
            (None, Some(bytes)) => STANDARD.decode(bytes).ok()?,
            _ => return None,
        };
        Some(Entry {
            key: self.key,
            value: value.into(),
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
            lease: LeaseId::new(self.lease),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use control_core::{
        guard::{Doubt, Lineage, Sign},
        types::ClusterId,
    };

    use super::*;

    fn cached() -> CachedRecords {
        let entry = |key: &str, value: &[u8], lease| Entry {
            key: key.into(),
            value: value.into(),
            create_revision: 3,
            mod_revision: 5,
            lease: LeaseId::new(lease),
        };
        CachedRecords {
            written_at: UNIX_EPOCH + Duration::from_secs(1_000_000),
            revision: 9,
            lease_ttl: Some(Duration::from_secs(60)),
            subnet: Some(SubnetKey { v4: "10.0.1.0/24".parse().ok(), v6: "fd00::/64".parse().ok() }),
            entries: vec![entry("config", b"{}", 0), entry("pods/a/b", &[0xff, 0], -7)],
            evidence: Evidence {
                lineage: Some(Lineage { cluster: ClusterId::new(0xfeed_0000_0000_0001), revision: 12 }),
                doubt: Some(Doubt { sign: Sign::Key, seen: Lineage { cluster: None, revision: 9 }, since: 4 }),
                held: ["pods/a/b".to_owned()].into(),
            },
        }
    }

    #[test]
    fn one_of_an_earlier_version_says_nothing_of_its_etcd() {
        let dir = tempfile::tempdir().unwrap();
        cached().save(dir.path()).unwrap();
        let mut document: serde_json::Value = serde_json::from_slice(&fs::read(file(dir.path())).unwrap()).unwrap();
        assert_eq!(document["evidence"]["lineage"]["cluster"], "feed000000000001");
        document.as_object_mut().unwrap().remove("evidence");
        fs::write(file(dir.path()), document.to_string()).unwrap();
        let expected = CachedRecords { evidence: Evidence::default(), ..cached() };
        assert_eq!(CachedRecords::load(dir.path()).unwrap(), Some(expected));
    }

    #[test]
    fn is_read_back_as_it_was_written_and_by_root_only() {
        let dir = tempfile::tempdir().unwrap();
        assert!(CachedRecords::load(dir.path()).unwrap().is_none());
        cached().save(dir.path()).unwrap();
        assert_eq!(CachedRecords::load(dir.path()).unwrap(), Some(cached()));
        // It holds external peers' pre-shared keys.
        assert_eq!(fs::metadata(file(dir.path())).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn one_that_is_too_long_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        cached().save(dir.path()).unwrap();
        let mut long = cached();
        let value: std::sync::Arc<[u8]> = vec![b'x'; 1 << 20].into();
        long.entries =
            (0..65).map(|_| Entry { value: std::sync::Arc::clone(&value), ..long.entries[0].clone() }).collect();
        assert!(matches!(long.save(dir.path()), Err(CacheError::TooLong { length, .. }) if length > MAX_CACHE));
        assert_eq!(CachedRecords::load(dir.path()).unwrap(), Some(cached()));
        assert_eq!(fs::read_dir(file(dir.path()).parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn is_usable_for_as_long_as_the_lease_lasts() {
        let cached = cached();
        assert!(cached.is_usable(cached.written_at + Duration::from_secs(60)));
        assert!(!cached.is_usable(cached.written_at + Duration::from_secs(61)));
        assert!(!CachedRecords { lease_ttl: None, ..cached.clone() }.is_usable(cached.written_at));
    }

    #[test]
    fn neither_a_link_nor_a_fifo_is_a_cache() {
        use std::os::unix::fs::symlink;
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        cached().save(outside.path()).unwrap();
        let (path, theirs) = (file(dir.path()), file(outside.path()));
        let folder = path.parent().unwrap();
        let refused = || matches!(CachedRecords::load(dir.path()), Err(CacheError::Io { .. }));
        symlink(theirs.parent().unwrap(), folder).unwrap();
        assert!(refused());
        let error = CachedRecords { revision: 10, ..cached() }.save(dir.path()).unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("cache is a symbolic link, not a directory: replace it with a directory, or remove it"),
            "{error}"
        );
        assert_eq!(CachedRecords::load(outside.path()).unwrap(), Some(cached()), "what is behind the link stays");
        fs::remove_file(folder).unwrap();
        fs::create_dir(folder).unwrap();
        for target in [theirs.as_path(), Path::new("/dev/zero")] {
            symlink(target, &path).unwrap();
            assert!(refused());
            fs::remove_file(&path).unwrap();
        }
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(refused());
        fs::remove_file(&path).unwrap();
        fs::File::create(&path).unwrap().set_len(MAX_CACHE as u64 + 1).unwrap();
        assert!(refused());
    }

    #[test]
    fn a_damaged_file_or_another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        cached().save(dir.path()).unwrap();
        let whole = fs::read_to_string(file(dir.path())).unwrap();
        for damaged in [
            whole[..whole.len() / 2].to_owned(),
            whole.replace("\"version\":1", "\"version\":2"),
            whole.replace("10.0.1.0-24", "10.0.1.0-99"),
        ] {
            fs::write(file(dir.path()), damaged).unwrap();
            assert!(matches!(CachedRecords::load(dir.path()), Err(CacheError::Unreadable { .. })));
        }
    }
}
