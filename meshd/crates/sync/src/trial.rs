//! `--dry-run`: what the first list would change.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Context as _;
use control::session::Session;
use sync_core::{ClusterKeys, Copier, Effect, Input, ObjectKind, Planned};
use tokio::time::{Instant, timeout};

use crate::{
    election,
    follow::WatchEvents,
    run::{self, Options},
    term::{self, Followers},
};

/// How long the lists may take.
const DEADLINE: Duration = Duration::from_secs(300);

/// Compares the API server with etcd, and returns a line for each key that would change, a summary, and what
/// is stored twice. Writes nothing and needs no leadership.
///
/// # Errors
/// When one of the servers does not answer, or what the API server says would be refused.
pub async fn try_out(options: &Options) -> anyhow::Result<Vec<String>> {
    let (api, mut dialer) = run::connect(options).await?;
    let keys = ClusterKeys::new(&options.cluster);
    let session = election::open(&mut dialer, &keys, &mut 0).await.map_err(|error| anyhow::anyhow!("etcd: {error}"))?;
    let listing = session.list_below(keys.root()).await.context("cannot list etcd")?;
    let begun = Instant::now();
    let mut copier = Copier::trial(keys, &listing, term::now(begun));
    let (mut followers, mut heard) = Followers::new(api);
    let mut missing: BTreeSet<ObjectKind> = ObjectKind::ALL.into();
    for kind in ObjectKind::ALL {
        followers.start(kind, Duration::ZERO);
    }
    let complete = async {
        while !missing.is_empty() {
            let Some(heard) = heard.recv().await else { break };
            let Some(WatchEvents { input, .. }) = followers.accept(heard) else { continue };
            let ended = match &input {
                Input::ListEnded { kind, .. } => Some(*kind),
                _ => None,
            };
            missing.extend(ended);
            if let Some(kind) = ended {
                missing.remove(&kind);
            }
            for effect in copier.step(term::now(begun), input) {
                // Tried again it would be the same.
                if copier.refusal().is_some() {
                    return;
                }
                match effect {
                    // A list that lacks much is taken again, as in earnest.
                    Effect::List { kind, after: Duration::ZERO } => {
                        missing.insert(kind);
                        followers.start(kind, Duration::ZERO);
                    }
                    Effect::Notice(notice) => term::log_notice(&notice),
                    _ => {}
                }
            }
        }
    };
    timeout(DEADLINE, complete).await.context("the API server did not answer in time")?;
    if let Some(refusal) = copier.refusal() {
        anyhow::bail!("nothing would be copied: {refusal}");
    }
    let mut lines = lines(&copier);
    lines.extend(stored_twice(&session, &copier).await);
    Ok(lines)
}

/// Flat keys of objects that the copy has, too: both apply until an operator deletes one.
async fn stored_twice(session: &Session, copier: &Copier) -> Vec<String> {
    let mut lines = Vec::new();
    for kind in ObjectKind::ALL.into_iter().filter(|kind| *kind != ObjectKind::Node) {
        let directory = format!("{}/", kind.plural());
        match session.list_below(&directory).await {
            Ok(listing) => {
                let paths = listing.entries.iter().filter_map(|entry| entry.key.strip_prefix(&directory));
                let twice = paths.filter(|path| copier.will_hold(kind, path));
                lines.extend(twice.map(|path| format!("stored twice: {directory}{path}, without a cluster")));
            }
            Err(error) => lines.push(format!("not compared with {directory}: {error}")),
        }
    }
    lines
}

fn lines(copier: &Copier) -> Vec<String> {
    let mut planned: Vec<_> = copier.planned().collect();
    planned.sort_by(|a, b| a.0.cmp(&b.0));
    let mut lines: Vec<String> = planned
        .iter()
        .map(|(key, planned)| {
            let verb = match planned {
                Planned::Create => "create",
                Planned::Change => "change",
                Planned::Delete => "delete",
            };
            format!("{verb} {key}")
        })
        .collect();
    let count = |of: Planned| planned.iter().filter(|(_, planned)| *planned == of).count();
    let (create, change, delete) = (count(Planned::Create), count(Planned::Change), count(Planned::Delete));
    lines.push(format!("{create} to create, {change} to change, {delete} to delete"));
    lines
}
