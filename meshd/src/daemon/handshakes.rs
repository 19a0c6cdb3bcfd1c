//! Handshake state for the next start: peers to contact, timestamps of received initiations, and the time of this
//! node's last one.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use control::state_dir::FILE_MODE;
use etcd_schema::PublicKey;
use mesh::problem::{Problem, ProblemCode};
use serde::{Deserialize, Serialize};
use text::quote;
use tunnel::{PeerStatus, Stamp};

/// Delay before a write, so that changes are written together.
const SAVE_AFTER: Duration = Duration::from_secs(2);
/// Largest file that is read: some hundred thousand peers.
const MAX_FILE: u64 = 32 << 20;
/// A time stamp further ahead of this node's clock is not kept: one of the two clocks is wrong.
const TOO_FAR: Duration = Duration::from_secs(3600);
/// How long after a start a peer that the run before talked to is called by the next start, too, whether or not it has
/// answered yet: a second restart comes before the sessions do.
const CALLED: Duration = Duration::from_secs(30);
/// How old the clock on disk may be.
const CLOCK_AGE: u64 = 600;

/// `STATE/cache/handshakes.json`. Losing it, or a part of it, costs patience only.
#[derive(Debug)]
pub(super) struct Handshakes {
    path: PathBuf,
    kept: SavedHandshakes,
    /// The latest that the clock was in earlier runs, in seconds since 1970.
    clock_before: u64,
    loaded_at: Instant,
    /// The time of the next write, if one is due.
    save_at: Option<Instant>,
}

#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct SavedHandshakes {
    /// Names of the peers with a session that works.
    talking: BTreeSet<String>,
    /// The greatest time stamp that came in initiations of each public key.
    seen: BTreeMap<String, String>,
    /// The latest that this node's clock was, in seconds since 1970, give or take ten minutes.
    clock: u64,
}

impl Handshakes {
    /// Loads the state of an earlier run from `state_dir`; empty without a readable file.
    pub(super) fn load(state_dir: &Path, now: Instant) -> Self {
        let path = state_dir.join("cache").join("handshakes.json");
        let kept = read(&path).unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), %error, "cannot read the handshakes of the last run");
            }
            SavedHandshakes::default()
        });
        Self { path, clock_before: kept.clock, kept, loaded_at: now, save_at: None }
    }

    /// The peers that the run before had working sessions with.
    pub(super) fn talking(&self) -> Vec<String> {
        self.kept.talking.iter().cloned().collect()
    }

    /// The time stamps up to which initiations are refused.
    pub(super) fn seen(&self) -> HashMap<PublicKey, Stamp> {
        let read = |(key, stamp): (&String, &String)| Some((key.parse().ok()?, stamp.parse().ok()?));
        self.kept.seen.iter().filter_map(read).collect()
    }

    /// Takes note that there is something new to keep.
    pub(super) fn changed(&mut self, now: Instant) {
        self.save_at.get_or_insert(now + SAVE_AFTER);
    }

    /// When [`Self::keep`] is to be called.
    pub(super) const fn save_at(&self) -> Option<Instant> {
        self.save_at
    }

    /// Writes the current state if it differs. Timestamps too far ahead of `clock` stay in memory. Does nothing without
    /// peers, as before the first table and while this daemon is a clone.
    pub(super) fn keep(
        &mut self,
        now: Instant,
        peers: &[PeerStatus],
        seen: &HashMap<PublicKey, Stamp>,
        clock: SystemTime,
    ) {
        self.save_at = None;
        if peers.is_empty() {
            return;
        }
        let called = now < self.loaded_at + CALLED;
        let talks = |peer: &PeerStatus| peer.session.alive || called && self.kept.talking.contains(&peer.name);
        let kept = SavedHandshakes {
            talking: peers.iter().filter(|peer| talks(peer)).map(|peer| peer.name.clone()).collect(),
            seen: seen
                .iter()
                .filter(|(_, stamp)| stamp.ahead_of(clock) <= TOO_FAR)
                .map(|(key, stamp)| (key.to_string(), stamp.to_string()))
                .collect(),
            clock: self.kept.clock.max(seconds(clock)),
        };
        let same = (&kept.talking, &kept.seen) == (&self.kept.talking, &self.kept.seen);
        if same && kept.clock - self.kept.clock < CLOCK_AGE {
            return;
        }
        match write(&self.path, &kept) {
            Ok(()) => self.kept = kept,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "cannot save handshakes for the next start");
            }
        }
    }

    /// The problem that this node's clock is behind that of an earlier run: peers that saw later handshakes refuse its
    /// own.
    pub(super) fn behind(&self, clock: SystemTime) -> Option<Problem> {
        let behind = self.clock_before.checked_sub(seconds(clock)).filter(|behind| *behind > 60)?;
        Some(Problem::new(
            ProblemCode::HandshakeClock,
            format!(
                "the clock is {} minutes behind its time before the last start: peers that saw later handshakes of \
                 this node refuse its handshakes until it has caught up",
                behind.div_ceil(60)
            ),
            format!(
                "check `timedatectl`; meshd peers call this node, on other peers restart WireGuard; if the clock is \
                 right now and was wrong before: systemctl stop meshd && rm {} && systemctl start meshd",
                quote(&self.path.display().to_string())
            ),
        ))
    }
}

/// The problems of peers whose last initiation is far ahead of this node's clock: once theirs is correct, their
/// handshakes are refused. `name` returns a peer's displayed name.
pub(super) fn ahead(
    peers: &[PeerStatus],
    seen: &HashMap<PublicKey, Stamp>,
    clock: SystemTime,
    name: impl Fn(&str) -> String,
) -> Vec<Problem> {
    let mut problems: Vec<Problem> = Vec::new();
    for peer in peers {
        let ahead = peer.keys.iter().filter_map(|key| seen.get(key)).map(|stamp| stamp.ahead_of(clock)).max();
        let Some(ahead) = ahead.filter(|ahead| *ahead > TOO_FAR) else { continue };
        let name = name(&peer.name);
        let minutes = ahead.as_secs() / 60;
        problems.push(Problem::new(
            ProblemCode::PeerClockAhead,
            format!(
                "the last handshake of {name} is {minutes} minutes ahead of this node's clock: earlier handshakes of \
                 {name} are refused as replays until the clock has caught up"
            ),
            format!(
                "compare `timedatectl` here and on {name}; once both clocks are right: systemctl restart meshd # \
                     on this node"
            ),
        ));
    }
    problems
}

fn seconds(clock: SystemTime) -> u64 {
    clock.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn read(path: &Path) -> io::Result<SavedHandshakes> {
    Ok(serde_json::from_slice(&atomic_file::read(path, MAX_FILE)?)?)
}

fn write(path: &Path, kept: &SavedHandshakes) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    atomic_file::write(path, FILE_MODE, &serde_json::to_vec(kept)?)
}

#[cfg(test)]
mod tests {
    use mesh::path::TunnelSession;

    use super::*;

    fn peer(name: &str, key: PublicKey, alive: bool) -> PeerStatus {
        PeerStatus {
            name: name.to_owned(),
            keys: vec![key],
            endpoint: None,
            latest_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
            session: TunnelSession { alive, ..TunnelSession::default() },
            inner_mtu: 1420,
            without_df: false,
        }
    }

    #[test]
    fn the_next_start_knows_whom_to_call_and_what_was_seen() {
        let dir = tempfile::tempdir().unwrap();
        let clock = SystemTime::now();
        let keys = [1, 2, 3].map(|n| PublicKey::from_bytes([n; 32]));
        let peers = [peer("nodes/a", keys[0], true), peer("nodes/b", keys[1], false), peer("peers/c", keys[2], true)];
        let at = |seconds: u64| Stamp::at(clock + Duration::from_secs(seconds));
        let seen = HashMap::from([(keys[0], at(0)), (keys[1], at(3500)), (keys[2], at(2 * 3600))]);
        let now = Instant::now();
        let mut handshakes = Handshakes::load(dir.path(), now);
        assert_eq!((handshakes.talking(), handshakes.seen()), (vec![], HashMap::new()));
        handshakes.changed(now);
        assert_eq!(handshakes.save_at(), Some(now + SAVE_AFTER));
        handshakes.keep(now, &peers, &seen, clock);
        assert_eq!(handshakes.save_at(), None);

        let loaded = Handshakes::load(dir.path(), now);
        assert_eq!(loaded.talking(), ["nodes/a", "peers/c"]);
        // Two hours ahead is not kept, and is named.
        assert_eq!(loaded.seen(), HashMap::from([(keys[0], at(0)), (keys[1], at(3500))]));
        let problems = ahead(&peers, &seen, clock, |name| name.to_uppercase());
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].code, ProblemCode::PeerClockAhead);
        assert!(problems[0].cause.contains("PEERS/C is 120 minutes ahead"), "{}", problems[0].cause);
        assert_eq!(ahead(&peers, &seen, clock + TOO_FAR, str::to_owned), []);

        // A clock that has gone back is named until it has caught up, over further starts too.
        assert_eq!(loaded.behind(clock), None);
        let back = clock - TOO_FAR;
        assert!(loaded.behind(back).unwrap().cause.contains("60 minutes behind"));
        let mut loaded = loaded;
        loaded.keep(now, &peers, &seen, back);
        let again = Handshakes::load(dir.path(), now);
        assert_eq!(again.behind(back).map(|problem| problem.code), Some(ProblemCode::HandshakeClock));
        assert_eq!(again.behind(clock), None);
        // The command in the remedy ends it.
        let file = dir.path().join("cache/handshakes.json");
        let remedy = again.behind(back).unwrap().remedy;
        assert!(remedy.contains(&format!("rm {} &&", file.display())), "{remedy}");
        fs::remove_file(file).unwrap();
        assert_eq!(Handshakes::load(dir.path(), now).behind(back), None);
    }

    #[test]
    fn a_second_restart_calls_whom_the_first_did() {
        let dir = tempfile::tempdir().unwrap();
        let (now, clock) = (Instant::now(), SystemTime::now());
        let key = PublicKey::from_bytes([1; 32]);
        let none = HashMap::new();
        let (talks, silent) = (peer("nodes/a", key, true), peer("nodes/a", key, false));
        Handshakes::load(dir.path(), now).keep(now, &[talks], &none, clock);
        let mut second = Handshakes::load(dir.path(), now);
        second.keep(now, std::slice::from_ref(&silent), &none, clock);
        assert_eq!(Handshakes::load(dir.path(), now).talking(), ["nodes/a"], "it was called, and may yet answer");
        second.keep(now + CALLED, &[silent], &none, clock);
        assert_eq!(Handshakes::load(dir.path(), now).talking(), Vec::<String>::new());
    }

    /// As a clone's, or one of a start before there is a config.
    #[test]
    fn a_table_without_peers_takes_nothing_from_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let (now, clock) = (Instant::now(), SystemTime::now());
        let key = PublicKey::from_bytes([1; 32]);
        let seen = HashMap::from([(key, Stamp::at(clock))]);
        Handshakes::load(dir.path(), now).keep(now, &[peer("nodes/a", key, true)], &seen, clock);
        let mut without = Handshakes::load(dir.path(), now);
        without.changed(now);
        without.keep(now + CALLED, &[], &HashMap::new(), clock + Duration::from_secs(CLOCK_AGE));
        assert_eq!(without.save_at(), None, "it would be due again at once");
        let next = Handshakes::load(dir.path(), now);
        assert_eq!((next.talking(), next.seen()), (vec!["nodes/a".to_owned()], seen));
    }

    #[test]
    fn a_damaged_file_is_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let now = Instant::now();
        fs::create_dir(dir.path().join("cache")).unwrap();
        let file = dir.path().join("cache/handshakes.json");
        fs::write(&file, "{\"talking\": 3}").unwrap();
        assert_eq!(Handshakes::load(dir.path(), now).talking(), Vec::<String>::new());
        // A part that cannot be read takes nothing else with it.
        fs::write(&file, r#"{"talking": ["nodes/a"], "seen": {"a": "b"}, "more": 1}"#).unwrap();
        let loaded = Handshakes::load(dir.path(), now);
        assert_eq!((loaded.talking(), loaded.seen()), (vec!["nodes/a".to_owned()], HashMap::new()));
    }
}
