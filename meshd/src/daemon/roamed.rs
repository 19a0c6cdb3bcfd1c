//! The last known endpoints of peers, kept over a restart.
//!
//! A node or external peer without a configured endpoint must initiate handshakes itself. When this daemon restarts,
//! its sessions are gone, but the other end considers them valid for minutes. A handshake to its last endpoint, through
//! the NAT mapping that its keepalives hold open, restores the session at once.

use std::{
    collections::BTreeMap,
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use control::state_dir::FILE_MODE;
use cow_map::CowMap;

/// Delay before a write, so that changes are written together and a roaming peer costs little.
const SAVE_AFTER: Duration = Duration::from_secs(2);
/// Largest file that is read: some hundred thousand peers.
const MAX_FILE: u64 = 16 << 20;

/// `STATE/cache/endpoints.json`: peers' names and addresses. They are hints to try first: a lost or outdated one only
/// costs time.
#[derive(Debug)]
pub(super) struct EndpointCache {
    path: PathBuf,
    at: BTreeMap<String, SocketAddr>,
    /// The time of the next write, if one is due.
    save_at: Option<Instant>,
}

impl EndpointCache {
    /// Loads the state of an earlier run from `state_dir`; empty without a readable file.
    pub(super) fn load(state_dir: &Path) -> Self {
        let path = state_dir.join("cache").join("endpoints.json");
        let at = read(&path).unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), %error, "cannot read the endpoints of the last run");
            }
            BTreeMap::new()
        });
        Self { path, at, save_at: None }
    }

    /// All peers with a known endpoint, by name.
    pub(super) fn all(&self) -> &BTreeMap<String, SocketAddr> {
        &self.at
    }

    /// Notes that `peer` was authenticated from `endpoint`.
    pub(super) fn note(&mut self, now: Instant, peer: &str, endpoint: SocketAddr) {
        if self.at.get(peer) != Some(&endpoint) {
            self.at.insert(peer.to_owned(), endpoint);
            self.save_at.get_or_insert(now + SAVE_AFTER);
        }
    }

    /// When [`Self::save_if_due`] has something to do.
    pub(super) fn save_at(&self) -> Option<Instant> {
        self.save_at
    }

    /// Writes the file if it is due, without peers that are gone from `peers`. An empty table, as while this daemon is
    /// a clone, does not mean that they are gone.
    pub(super) fn save_if_due<T>(&mut self, now: Instant, peers: Option<&CowMap<String, T>>) {
        if self.save_at.is_some_and(|at| at <= now) {
            if let Some(peers) = peers.filter(|peers| !peers.is_empty()) {
                self.at.retain(|peer, _| peers.contains_key(peer));
            }
            self.save();
        }
    }

    fn save(&mut self) {
        self.save_at = None;
        if let Err(error) = write(&self.path, &self.at) {
            tracing::warn!(path = %self.path.display(), %error, "cannot save peer endpoints for the next start");
        }
    }
}

impl Drop for EndpointCache {
    /// Writes pending changes at the end.
    fn drop(&mut self) {
        if self.save_at.is_some() {
            self.save();
        }
    }
}

fn read(path: &Path) -> io::Result<BTreeMap<String, SocketAddr>> {
    Ok(serde_json::from_slice(&atomic_file::read(path, MAX_FILE)?)?)
}

fn write(path: &Path, at: &BTreeMap<String, SocketAddr>) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    atomic_file::write(path, FILE_MODE, &serde_json::to_vec(at)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn what_was_noted_is_there_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let now = Instant::now();
        let none: Option<&CowMap<String, ()>> = None;
        let mut roamed = EndpointCache::load(dir.path());
        assert!(roamed.all().is_empty());
        roamed.note(now, "nodes/a", at("192.0.2.1:1"));
        roamed.note(now, "peers/b", at("[2001:db8::1]:2"));
        roamed.note(now, "nodes/gone", at("192.0.2.9:9"));
        roamed.save_if_due(now, none);
        assert!(EndpointCache::load(dir.path()).all().is_empty(), "not yet");
        let due = roamed.save_at().unwrap();
        roamed.save_if_due(due, Some(&CowMap::<String, ()>::default()));
        assert_eq!(
            (EndpointCache::load(dir.path()).all().len(), roamed.save_at()),
            (3, None),
            "a clone's table has no peers"
        );
        roamed.note(now, "nodes/a", at("192.0.2.1:2"));
        let peers: CowMap<String, ()> = ["nodes/a", "peers/b"].map(|peer| (peer.to_owned(), ())).into_iter().collect();
        roamed.save_if_due(due, Some(&peers));
        assert_eq!((EndpointCache::load(dir.path()).all().len(), roamed.save_at()), (2, None));
        // The same again is no news; something else is, and is kept at the end at the latest.
        roamed.note(due, "nodes/a", at("192.0.2.1:2"));
        assert_eq!(roamed.save_at(), None);
        roamed.note(due, "nodes/a", at("192.0.2.2:1"));
        drop(roamed);
        assert_eq!(EndpointCache::load(dir.path()).all()["nodes/a"], at("192.0.2.2:1"));
    }

    #[test]
    fn a_link_in_the_cache_is_not_followed() {
        use super::super::handshakes::Handshakes;
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(dir.path().join("cache")).unwrap();
        for (name, text) in
            [("endpoints.json", r#"{"nodes/a": "192.0.2.1:1"}"#), ("handshakes.json", r#"{"talking": ["nodes/a"]}"#)]
        {
            fs::write(outside.path().join(name), text).unwrap();
            std::os::unix::fs::symlink(outside.path().join(name), dir.path().join("cache").join(name)).unwrap();
        }
        assert!(EndpointCache::load(dir.path()).all().is_empty());
        assert!(Handshakes::load(dir.path(), Instant::now()).talking().is_empty());
    }

    #[test]
    fn a_damaged_file_is_as_none() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("cache")).unwrap();
        fs::write(dir.path().join("cache/endpoints.json"), "{\"nodes/a\": \"here\"}").unwrap();
        assert!(EndpointCache::load(dir.path()).all().is_empty());
    }
}
