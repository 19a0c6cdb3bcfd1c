//! Logs what changes: problems when they appear and when they are gone, peers when they become unreachable or
//! reachable, and when their path changes. An outage of the whole mesh is one line, and flapping peers do not fill the
//! log.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use api_types::{Path, Peer};
use mesh::problem::{LogLine, Problem, ProblemCode, ProblemLog};
use tokio::time::{MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::SharedState;

/// Between two looks at the peers.
const LOOK: Duration = Duration::from_secs(5);
/// More changes of one kind in one look are one line.
const MOST_LINES: usize = 10;
/// Most lines within [`WINDOW`]; further ones are counted.
const MOST_IN_WINDOW: usize = 40;
const WINDOW: Duration = Duration::from_secs(600);
/// Peers that a summary names.
const NAMED: usize = 5;

/// The peers' paths, as the log knows them.
#[derive(Debug, Default)]
struct PeerLog {
    /// By the tunnel's name for the peer: its path, and since when it has that.
    known: BTreeMap<String, (Path, Instant)>,
    window: Option<Instant>,
    lines: usize,
    unsaid: usize,
}

/// A change of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
enum PeerChange {
    Unreachable { site: Option<String>, online: Option<bool>, reason: String },
    Reachable { path: Path, after: Duration },
    Path { from: Path, to: Path, reason: String },
}

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Line {
    One {
        peer: String,
        change: PeerChange,
    },
    /// The same for many; `change` is that of the first.
    Many {
        change: PeerChange,
        count: usize,
        of: usize,
        peers: String,
    },
    /// How many changes had no line in the window that is over.
    Unsaid {
        count: usize,
    },
}

/// Looks at problems and peers until `stop`.
pub(super) async fn log_changes(published: SharedState, stop: CancellationToken) {
    let (mut peer_log, mut problem_log) = (PeerLog::default(), ProblemLog::default());
    // Problems that end when the node has joined are not worth a line.
    let mut look = interval_at(tokio::time::Instant::now() + LOOK, LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = look.tick() => {}
            () = stop.cancelled() => return,
        }
        let peers = published.peers_by_owner();
        peer_log.look(&peers, Instant::now()).iter().for_each(Line::write);
        let control = published.control.borrow().clone();
        let mut problems = published.problems(&control, &peers).problems;
        problems.retain(|problem| !has_own_lines(problem.code));
        problem_log.update(problems).into_iter().for_each(write_problem);
    }
}

/// Whether the log has lines of another kind about such a problem: those of each peer, and those of each attempt to
/// connect.
fn has_own_lines(code: ProblemCode) -> bool {
    matches!(code, ProblemCode::PeersUnreachable | ProblemCode::EtcdUnreachable)
}

fn write_problem(line: LogLine) {
    match line {
        LogLine::Appeared(problem) => {
            let Problem { code, key, cause, remedy } = problem;
            warn!(code = code.as_str(), key, cause, remedy, "problem");
        }
        LogLine::Gone(Problem { code, key, cause, .. }) => info!(code = code.as_str(), key, cause, "problem is gone"),
        LogLine::More(count) => warn!(count, "more problems came or went; see `meshctl status`"),
    }
}

impl PeerLog {
    /// The lines to log for the current peers.
    fn look(&mut self, peers: &[(String, Peer)], now: Instant) -> Vec<Line> {
        let mut lines = Vec::new();
        if self.window.is_none_or(|begun| now.saturating_duration_since(begun) >= WINDOW) {
            if self.unsaid > 0 {
                lines.push(Line::Unsaid { count: self.unsaid });
            }
            (self.window, self.lines, self.unsaid) = (Some(now), 0, 0);
        }
        let mut before = std::mem::take(&mut self.known);
        let (mut lost, mut back, mut moved) = (Vec::new(), Vec::new(), Vec::new());
        for (owner, peer) in peers {
            let known = before.remove(owner);
            let (list, change) = match (known, peer.path) {
                (Some((path, since)), same) if path == same => {
                    self.known.insert(owner.clone(), (path, since));
                    continue;
                }
                (_, Path::Unreachable) => {
                    let (site, online, reason) = (peer.site.clone(), peer.online, peer.reason.clone());
                    (&mut lost, Some(PeerChange::Unreachable { site, online, reason }))
                }
                // A new peer counts as reached until it answers no handshake.
                (None, _) => (&mut moved, None),
                (Some((Path::Unreachable, since)), path) => {
                    (&mut back, Some(PeerChange::Reachable { path, after: now.saturating_duration_since(since) }))
                }
                (Some((from, _)), to) => (&mut moved, Some(PeerChange::Path { from, to, reason: peer.reason.clone() })),
            };
            list.extend(change.map(|change| (peer.name.as_str(), change)));
            self.known.insert(owner.clone(), (peer.path, now));
        }
        for changes in [lost, back, moved] {
            self.say(changes, peers.len(), &mut lines);
        }
        lines
    }

    /// Adds lines for changes of one kind, as far as there is room for them.
    fn say(&mut self, changes: Vec<(&str, PeerChange)>, of: usize, lines: &mut Vec<Line>) {
        let count = changes.len();
        let said = match &changes[..] {
            [(_, first), ..] if count > MOST_LINES => {
                let named: Vec<&str> = changes.iter().take(NAMED).map(|(peer, _)| *peer).collect();
                let peers = format!("{} and {} more", named.join(", "), count - named.len());
                vec![Line::Many { change: first.clone(), count, of, peers }]
            }
            _ => changes.into_iter().map(|(peer, change)| Line::One { peer: peer.to_owned(), change }).collect(),
        };
        if self.lines + said.len() > MOST_IN_WINDOW {
            self.unsaid += count;
            return;
        }
        self.lines += said.len();
        lines.extend(said);
    }
}

impl Line {
    fn write(&self) {
        match self {
            Self::One { peer, change } => match change {
                PeerChange::Unreachable { site, online, reason } => {
                    warn!(peer, site, online, reason, "peer unreachable")
                }
                PeerChange::Reachable { path, after } => {
                    let after = humantime::format_duration(Duration::from_secs(after.as_secs()));
                    info!(peer, %path, %after, "peer reachable");
                }
                PeerChange::Path { from, to, reason } => info!(peer, %from, %to, reason, "peer path changed"),
            },
            Self::Many { change, count, of, peers } => match change {
                PeerChange::Unreachable { reason, .. } => warn!(count, of, peers, reason, "peers unreachable"),
                PeerChange::Reachable { .. } => info!(count, of, peers, "peers reachable"),
                PeerChange::Path { from, to, .. } => info!(count, of, peers, %from, %to, "peer paths changed"),
            },
            Self::Unsaid { count } => {
                warn!(count, "more changes of peers than are logged; meshctl peers lists all peers")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh::backend::PathKind;

    use super::*;

    fn peer(number: usize, path: Path) -> (String, Peer) {
        let peer = serde_json::json!({
            "name": format!("west{number}"), "id": format!("n{number}"), "site": "west", "subnets": [], "path": path,
            "reason": "no handshake", "endpoint": null, "latestHandshake": null, "rx": 0, "tx": 0, "mtu": null,
        });
        (format!("nodes/n{number}"), serde_json::from_value(peer).unwrap())
    }

    fn all(count: usize, path: Path) -> Vec<(String, Peer)> {
        (0..count).map(|number| peer(number, path)).collect()
    }

    #[test]
    fn each_change_is_said_once() {
        let start = Instant::now();
        let mut log = PeerLog::default();
        assert_eq!(log.look(&[peer(1, Path::By(PathKind::Wireguard)), peer(2, Path::By(PathKind::HostGw))], start), []);
        let lost = [peer(1, Path::Unreachable), peer(2, Path::By(PathKind::HostGw))];
        let said = log.look(&lost, start + LOOK);
        let is_loss =
            |line: &Line| matches!(line, Line::One { peer, change: PeerChange::Unreachable { .. } } if peer == "west1");
        assert!(said.len() == 1 && is_loss(&said[0]), "{said:?}");
        assert_eq!(log.look(&lost, start + 2 * LOOK), []);
        let said =
            log.look(&[peer(1, Path::By(PathKind::HostGw)), peer(2, Path::By(PathKind::Wireguard))], start + 3 * LOOK);
        let one = |peer: &str, change| Line::One { peer: peer.to_owned(), change };
        let back = PeerChange::Reachable { path: Path::By(PathKind::HostGw), after: 2 * LOOK };
        let moved = PeerChange::Path {
            from: Path::By(PathKind::HostGw),
            to: Path::By(PathKind::Wireguard),
            reason: "no handshake".to_owned(),
        };
        assert_eq!(said, [one("west1", back), one("west2", moved)]);
    }

    #[test]
    fn one_that_is_removed_does_not_come_back() {
        let start = Instant::now();
        let mut log = PeerLog::default();
        log.look(&[peer(1, Path::Unreachable)], start);
        assert_eq!(log.look(&[], start + LOOK), []);
        assert_eq!(log.look(&[peer(1, Path::By(PathKind::Wireguard))], start + 2 * LOOK), []);
    }

    #[test]
    fn an_outage_of_the_mesh_is_one_line_each_way() {
        let start = Instant::now();
        let mut log = PeerLog::default();
        for (at, path) in [(start, Path::Unreachable), (start + LOOK, Path::By(PathKind::Wireguard))] {
            let said = log.look(&all(500, path), at);
            assert!(
                matches!(&said[..], [Line::Many { count: 500, of: 500, peers, .. }] if peers.ends_with("and 495 more"))
            );
        }
    }

    #[test]
    fn peers_that_come_and_go_do_not_fill_the_log() {
        let start = Instant::now();
        let mut log = PeerLog::default();
        let mut lines = 0;
        for look in 0..119 {
            let path = if look % 2 == 0 { Path::Unreachable } else { Path::By(PathKind::Wireguard) };
            lines += log.look(&all(5, path), start + LOOK * look).len();
        }
        assert!(lines <= MOST_IN_WINDOW, "{lines}");
        let said = log.look(&all(5, Path::Unreachable), start + WINDOW);
        assert!(matches!(said[0], Line::Unsaid { count } if count > 0), "{said:?}");
    }
}
