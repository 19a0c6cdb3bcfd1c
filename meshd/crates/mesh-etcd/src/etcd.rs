//! Calls to the members.

use std::{
    future::Future,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use control_core::roles::{self, Grant, Role};
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Error, Identity, MemberAddOptions, Permission, TlsOptions,
    Txn, TxnOp, UserAddOptions,
};
use etcd_schema::{Cluster, ClusterNetworks, NetworkConfig};
use tokio::time::timeout;

use crate::{
    certificates::{KeyedCertificate, NODE, ROOT},
    plan::SeenMember,
};

/// How long a call may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// Longer for what reads or writes all data.
const LONG_DEADLINE: Duration = Duration::from_secs(300);

/// Reaches members with all rights.
pub(crate) struct Members {
    pub(crate) root: KeyedCertificate,
    /// PEM.
    pub(crate) authority: String,
}

/// What a look at the members brought.
pub(crate) struct Look {
    /// As etcd lists them; `None`: no majority answers.
    pub(crate) members: Option<Vec<SeenMember>>,
    /// Those that answer: URL and id, the leader last.
    pub(crate) answering: Vec<(String, u64)>,
}

impl Members {
    async fn client(&self, url: &str) -> anyhow::Result<Client> {
        let identity = Identity::from_pem(&self.root.certificate, &self.root.key);
        let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(&self.authority)).identity(identity);
        let options = ConnectOptions::new().with_tls(tls).with_connect_timeout(DEADLINE);
        within(DEADLINE, Client::connect([url], Some(options))).await
    }

    /// Asks all `urls`; those of one member may be among them more than once.
    pub(crate) async fn look(&self, urls: &[String]) -> Look {
        let mut look = Look { members: None, answering: Vec::new() };
        let mut leader = 0;
        for url in urls {
            let asked = async {
                let mut client = self.client(url).await?;
                let status = within(DEADLINE, client.status()).await?;
                Ok::<_, anyhow::Error>((client, status))
            };
            let (mut client, status) = match asked.await {
                Ok(answer) => answer,
                Err(error) => {
                    tracing::debug!(url, error = format!("{error:#}"), "member does not answer");
                    continue;
                }
            };
            let Some(id) = status.header().map(etcd_client::ResponseHeader::member_id) else { continue };
            if look.answering.iter().any(|(_, known)| *known == id) {
                continue;
            }
            leader = status.leader();
            look.answering.push((url.clone(), id));
            if look.members.is_none()
                && let Ok(list) = within(DEADLINE, client.member_list()).await
            {
                look.members = Some(list.members().iter().map(seen).collect());
            }
        }
        look.answering.sort_by_key(|(_, id)| *id == leader);
        for member in look.members.iter_mut().flatten() {
            member.is_healthy = look.answering.iter().any(|(_, id)| *id == member.id);
        }
        look
    }

    /// Adds a learner.
    pub(crate) async fn add(&self, url: &str, peer_urls: Vec<String>) -> anyhow::Result<()> {
        let options = MemberAddOptions::new().with_is_learner();
        let mut client = self.client(url).await?;
        within(DEADLINE, client.member_add(peer_urls, Some(options))).await.map(drop)
    }

    /// Makes a learner a voting member; `false`: it does not have all data yet. Asks the leader: another member would pass the
    /// request on without its user.
    pub(crate) async fn promote(&self, url: &str, id: u64) -> anyhow::Result<bool> {
        let mut client = self.client(url).await?;
        match timeout(DEADLINE, client.member_promote(id)).await {
            Ok(Ok(_)) => Ok(true),
            Ok(Err(Error::GRpcStatus(status))) if status.message().contains("in sync") => Ok(false),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => bail!("no answer within {} s", DEADLINE.as_secs()),
        }
    }

    pub(crate) async fn remove(&self, url: &str, id: u64) -> anyhow::Result<()> {
        let mut client = self.client(url).await?;
        within(DEADLINE, client.member_remove(id)).await.map(drop)
    }

    pub(crate) async fn update(&self, url: &str, id: u64, peer_urls: Vec<String>) -> anyhow::Result<()> {
        let mut client = self.client(url).await?;
        within(DEADLINE, client.member_update(id, peer_urls)).await.map(drop)
    }

    /// The mesh's `config`, if there is one.
    pub(crate) async fn config(&self, url: &str, prefix: &str) -> anyhow::Result<Option<NetworkConfig>> {
        let key = format!("{prefix}/config");
        let mut client = self.client(url).await?;
        let found = within(DEADLINE, client.get(key.as_str(), None)).await?;
        let Some(found) = found.kvs().first() else { return Ok(None) };
        match NetworkConfig::parse(found.value()) {
            Ok(config) => Ok(Some(config)),
            Err(error) => bail!("{key} in etcd: {error}"),
        }
    }

    /// Puts `config` unless there is one.
    pub(crate) async fn put_config(&self, url: &str, prefix: &str, config: &NetworkConfig) -> anyhow::Result<()> {
        let key = format!("{prefix}/config");
        let mut client = self.client(url).await?;
        let absent = [Compare::create_revision(key.as_str(), CompareOp::Equal, 0)];
        let put = [TxnOp::put(key.as_str(), config.to_json(), None)];
        let done = within(DEADLINE, client.txn(Txn::new().when(absent).and_then(put))).await?;
        if done.succeeded() {
            tracing::info!(key, config = %String::from_utf8_lossy(&config.to_json()), "network put");
        }
        Ok(())
    }

    /// Gives every user its role, and has etcd ask for them.
    pub(crate) async fn users(
        &self,
        url: &str,
        prefix: &str,
        clusters: &[&Cluster],
        config: Option<&NetworkConfig>,
    ) -> anyhow::Result<()> {
        let mut client = self.client(url).await?;
        self.user(&mut client, NODE, &roles::nodes(prefix)).await?;
        for cluster in clusters {
            // One without networks of its own has those of no cluster.
            let networks =
                config.and_then(|config| config.of_cluster(cluster).or_else(|| config.of_cluster(&Cluster::default())));
            let networks: Vec<_> = networks.into_iter().flat_map(ClusterNetworks::networks).collect();
            let role = sync_core::sync_role(prefix, cluster, &networks);
            self.user(&mut client, &role.name, &role).await?;
        }
        let root = Role { name: ROOT.to_owned(), purpose: String::new(), grants: Vec::new() };
        self.user(&mut client, ROOT, &root).await?;
        within(DEADLINE, client.auth_enable()).await.map(drop).context("users cannot be asked for")
    }

    /// Writes only what is missing: each write makes etcd refuse the requests of all users that are under way.
    async fn user(&self, client: &mut Client, name: &str, role: &Role) -> anyhow::Result<()> {
        let context = || format!("user {name}");
        if role.name != ROOT {
            let held = match client.role_get(role.name.as_str()).await {
                Ok(found) => found.permissions(),
                Err(Error::GRpcStatus(status)) if status.message().contains("not found") => {
                    unless_there(client.role_add(role.name.as_str()).await).with_context(context)?;
                    Vec::new()
                }
                Err(error) => return Err(error).with_context(context),
            };
            for permission in role.grants.iter().map(permission) {
                if !held.iter().any(|it| same(it, &permission)) {
                    let granted = client.role_grant_permission(role.name.as_str(), permission);
                    within(DEADLINE, granted).await.with_context(context)?;
                }
            }
        }
        let roles = match client.user_get(name).await {
            Ok(found) => found.roles().to_vec(),
            Err(Error::GRpcStatus(status)) if status.message().contains("not found") => {
                let options = UserAddOptions::new().with_no_pwd();
                unless_there(client.user_add(name, "", Some(options)).await).with_context(context)?;
                Vec::new()
            }
            Err(error) => return Err(error).with_context(context),
        };
        if roles.contains(&role.name) {
            return Ok(());
        }
        within(DEADLINE, client.user_grant_role(name, role.name.as_str())).await.map(drop).with_context(context)
    }

    /// Gives space of the data file back to the disk. The member answers nothing meanwhile.
    pub(crate) async fn defragment(&self, url: &str) -> anyhow::Result<()> {
        let mut client = self.client(url).await?;
        let status = within(DEADLINE, client.status()).await?;
        // Twice the size of what it holds: not worth the pause before.
        if status.db_size() < 2 * status.raft_used_db_size() {
            return Ok(());
        }
        within(LONG_DEADLINE, client.defragment()).await.map(drop)
    }

    /// All data, as `etcdctl snapshot save` has it, piece by piece to `take`.
    pub(crate) async fn snapshot(
        &self,
        url: &str,
        mut take: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> anyhow::Result<()> {
        let mut client = self.client(url).await?;
        let begun = SystemTime::now();
        let mut stream = within(DEADLINE, client.snapshot()).await?;
        while let Some(piece) = within(LONG_DEADLINE, stream.message()).await? {
            take(piece.blob())?;
        }
        tracing::info!(url, milliseconds = begun.elapsed().unwrap_or_default().as_millis(), "snapshot taken");
        Ok(())
    }
}

fn seen(member: &etcd_client::Member) -> SeenMember {
    SeenMember {
        id: member.id(),
        name: member.name().to_owned(),
        peer_urls: member.peer_urls().to_vec(),
        is_learner: member.is_learner(),
        is_healthy: false,
    }
}

fn permission(grant: &Grant) -> Permission {
    let key = grant.key.as_str();
    let permission = match grant.permission {
        roles::Permission::Read => Permission::read(key),
        roles::Permission::ReadWrite => Permission::read_write(key),
    };
    if grant.prefix { permission.with_prefix() } else { permission }
}

fn same(a: &Permission, b: &Permission) -> bool {
    (a.get_type(), a.key(), a.is_prefix()) == (b.get_type(), b.key(), b.is_prefix())
}

/// What was asked for is there already.
fn unless_there<T>(answer: Result<T, Error>) -> anyhow::Result<()> {
    match answer {
        Ok(_) => Ok(()),
        Err(Error::GRpcStatus(status)) if status.message().contains("already exists") => Ok(()),
        Err(error) => Err(error.into()),
    }
}

async fn within<T>(deadline: Duration, call: impl Future<Output = Result<T, Error>>) -> anyhow::Result<T> {
    match timeout(deadline, call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => bail!("no answer within {} s", deadline.as_secs()),
    }
}
