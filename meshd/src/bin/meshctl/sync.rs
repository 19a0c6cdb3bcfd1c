//! `meshctl sync`: the copy of a Kubernetes cluster, directly in etcd.

use std::{path::PathBuf, time::SystemTime};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use control::session::{Dialer, Session};
use control_core::types::{CallError, Transaction, Write};
use etcd_schema::Cluster;
use meshd::settings::load_etcd;
use program::etcd_flags::EtcdFlags;
use serde::{Deserialize, Serialize};
use sync_core::{ClusterKeys, state::SyncState};

use crate::{
    exit::{NotFound, UsageError},
    output::{Output, print},
};

#[derive(Subcommand)]
pub(crate) enum SyncCommand {
    /// Show how current the copy of a Kubernetes cluster is, and what waits for a confirmation
    ///
    /// Example: meshctl sync status east
    Status(SyncTarget),
    /// Confirm what meshd-sync holds back: many deletions at once, another cluster or an older one
    ///
    /// Without a token, it confirms the one finding that waits. It connects to etcd by the settings file of meshd;
    /// flags override it. The user or certificate needs the rights of `meshctl etcd-roles --operator`.
    ///
    /// Example: meshctl sync confirm east
    Confirm {
        #[command(flatten)]
        target: SyncTarget,
        /// Token of the finding, as `meshctl sync status` shows it
        token: Option<String>,
    },
}

#[derive(Args)]
pub(crate) struct SyncTarget {
    /// Name of the cluster
    cluster: String,
    /// Settings file of meshd, for the connection to etcd [default: /etc/meshd/meshd.toml, if present]
    #[arg(long, env = "MESHD_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    etcd: EtcdFlags,
}

/// The output of `sync status`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SyncStatus {
    cluster: String,
    /// Process that leads; none: nothing is copied.
    leader: Option<String>,
    /// Seconds since the copy was known to be complete.
    age_seconds: u64,
    #[serde(flatten)]
    state: SyncState,
}

/// The output of `sync confirm`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Confirmed {
    reason: String,
    token: String,
}

pub(crate) fn run(output: Output, command: &SyncCommand) -> anyhow::Result<u8> {
    match command {
        SyncCommand::Status(target) => {
            let status = target.call(async |session, keys| status(session, keys, &target.cluster).await)?;
            print(output, &status, SyncStatus::text)?;
        }
        SyncCommand::Confirm { target, token } => {
            let confirmed = target.call(async |session, keys| confirm(session, keys, token.as_deref()).await)?;
            let text = |of: &Confirmed| format!("confirmed: {}; meshd-sync acts on it within seconds\n", of.reason);
            print(output, &confirmed, text)?;
        }
    }
    Ok(0)
}

impl SyncTarget {
    fn call<T>(&self, work: impl AsyncFnOnce(&Session, &ClusterKeys) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let cluster: Cluster =
            self.cluster.parse().map_err(|error| UsageError(format!("cluster {}: {error}", self.cluster)))?;
        if cluster.is_flat() {
            return Err(UsageError("the cluster needs a name".to_owned()).into());
        }
        let etcd =
            load_etcd(self.etcd.clone(), self.config.clone()).map_err(|mistakes| UsageError(mistakes.to_string()))?;
        let dialer = Dialer::new(&etcd)
            .map_err(|errors| UsageError(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.context("cannot start the async runtime")?.block_on(async {
            let session = dialer.open_any().await?;
            work(&session, &ClusterKeys::new(&cluster)).await
        })
    }
}

async fn value(session: &Session, key: &str) -> Result<Option<Vec<u8>>, CallError> {
    let listed = session.list_below(key).await?;
    Ok(listed.entries.into_iter().find(|entry| entry.key == key).map(|entry| entry.value.to_vec()))
}

async fn state(session: &Session, keys: &ClusterKeys) -> anyhow::Result<SyncState> {
    let Some(value) = value(session, &keys.state()).await? else {
        return Err(NotFound(format!("nothing was copied below {}: is meshd-sync running?", keys.root())).into());
    };
    serde_json::from_slice(&value).with_context(|| {
        format!("{} is unreadable\n  remedy  delete it: etcdctl del PREFIX/{}", keys.state(), keys.state())
    })
}

async fn status(session: &Session, keys: &ClusterKeys, cluster: &str) -> anyhow::Result<SyncStatus> {
    let state = state(session, keys).await?;
    let leader = value(session, &keys.leader()).await?;
    let leader = leader.and_then(|value| serde_json::from_slice::<serde_json::Value>(&value).ok());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    Ok(SyncStatus {
        cluster: cluster.to_owned(),
        leader: leader.and_then(|leader| Some(leader["holder"].as_str()?.to_owned())),
        age_seconds: now.saturating_sub(state.current_at),
        state,
    })
}

async fn confirm(session: &Session, keys: &ClusterKeys, token: Option<&str>) -> anyhow::Result<Confirmed> {
    let held: Vec<_> = state(session, keys).await?.held.into_iter().filter(|held| !held.token.is_empty()).collect();
    let tokens = || held.iter().map(|held| held.token.as_str()).collect::<Vec<_>>().join(", ");
    let found = match (token, held.as_slice()) {
        (Some(token), held) => held.iter().find(|held| held.token == token),
        (None, [only]) => Some(only),
        (None, []) => None,
        (None, _) => return Err(UsageError(format!("several findings wait, say which: {}", tokens())).into()),
    };
    let Some(found) = found else {
        let waits = if held.is_empty() { "nothing waits".to_owned() } else { format!("these wait: {}", tokens()) };
        return Err(NotFound(format!("nothing to confirm: {waits}")).into());
    };
    let put = Write::Put { key: keys.confirm(), value: found.token.clone().into_bytes(), lease: None };
    session.transact(&Transaction { compares: Vec::new(), writes: vec![put] }).await?;
    Ok(Confirmed { reason: found.reason.clone(), token: found.token.clone() })
}

impl SyncStatus {
    fn text(&self) -> String {
        let leader = self.leader.as_deref().unwrap_or("none: nothing is copied");
        let mut text = format!(
            "cluster  {} ({})\nleader   {leader}\nage      {} s\n",
            self.cluster, self.state.uid, self.age_seconds
        );
        let counts: Vec<String> = self.state.counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        text.push_str(&format!("objects  {}\n", counts.join(", ")));
        for held in &self.state.held {
            text.push_str(&format!("held     {}\n", held.reason));
            if !held.token.is_empty() {
                text.push_str(&format!("  confirm  meshctl sync confirm {} {}\n", self.cluster, held.token));
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use sync_core::state::Held;

    use super::*;

    #[test]
    fn what_waits_is_shown_with_the_command_that_confirms_it() {
        let held = Held { reason: "12 of 15 pods would be deleted".into(), token: "delete-pods-7".into(), until: None };
        let status = SyncStatus {
            cluster: "east".into(),
            leader: None,
            age_seconds: 4,
            state: SyncState {
                uid: "u1".into(),
                holder: "h".into(),
                written_at: 10,
                current_at: 6,
                resource_versions: [("pods".to_owned(), 7)].into(),
                counts: [("pods".to_owned(), 15)].into(),
                held: vec![held],
                copies_policies: true,
            },
        };
        assert_eq!(
            status.text(),
            "cluster  east (u1)\nleader   none: nothing is copied\nage      4 s\nobjects  15 pods\n\
             held     12 of 15 pods would be deleted\n  confirm  meshctl sync confirm east delete-pods-7\n"
        );
    }
}
