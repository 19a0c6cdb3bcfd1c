//! Brings the members about, step by step, and gives them users and the mesh's network.

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use etcd_schema::{Cluster, NetworkConfig};
use ipnet::IpNet;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::{
    certificates::{NODE, ROOT, Subject},
    etcd::{Look, Members},
    kubernetes::{FoundNode, FoundRecord, Objects},
    plan::{Seen, Step, Wanted, next_step},
    record::{MembersRecord, urls},
};

/// How long to wait before the next look.
const PAUSE: Duration = Duration::from_secs(2);

/// What is wanted, and where.
pub(crate) struct Options {
    pub(crate) kubeconfig: Option<PathBuf>,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) candidates: String,
    pub(crate) wanted: Wanted,
    /// More names and addresses that clients reach the members by.
    pub(crate) names: Vec<String>,
    pub(crate) prefix: String,
    pub(crate) cluster: Cluster,
    pub(crate) other_clusters: Vec<Cluster>,
    /// The mesh's `config`, put where that key is absent.
    pub(crate) config: Option<Value>,
    /// How long to wait for what is not there yet.
    pub(crate) patience: Duration,
    /// Whether to wait, too, for nodes that could run the members that are missing.
    pub(crate) awaits_nodes: bool,
}

/// Members that answer.
pub(crate) struct Answering {
    pub(crate) members: Members,
    /// URL and id of each, the leader last.
    pub(crate) urls: Vec<(String, u64)>,
}

impl Options {
    async fn connect(&self) -> anyhow::Result<Objects> {
        let (namespace, name) = (self.namespace.clone(), self.name.clone());
        Objects::connect(self.kubeconfig.as_deref(), namespace, name, self.candidates.clone()).await
    }

    /// Which members answer now.
    ///
    /// # Errors
    /// What the API server said.
    pub(crate) async fn answering(&self) -> anyhow::Result<Answering> {
        let objects = self.connect().await?;
        let (nodes, found) = (objects.list_nodes().await?, objects.read_record().await?);
        let members = certificates(&objects, self, &nodes).await?;
        let look = members.look(&known_urls(found.as_ref().map(|found| &found.record), &nodes, self)).await;
        Ok(Answering { members, urls: look.answering })
    }
}

/// Steps until nothing is left to do.
///
/// # Errors
/// What is not there after `patience`, or what a server said.
pub(crate) async fn reconcile(options: &Options) -> anyhow::Result<()> {
    let objects = options.connect().await?;
    let deadline = Instant::now() + options.patience;
    let mut told = String::new();
    // Of the network; it keeps no member from its work.
    let mut network: Option<anyhow::Result<()>> = None;
    loop {
        let nodes = objects.list_nodes().await?;
        let found = objects.read_record().await?;
        let record = found.as_ref().map(|found| &found.record);
        let members = certificates(&objects, options, &nodes).await?;
        let look = members.look(&known_urls(record, &nodes, options)).await;
        if network.is_none() && look.members.is_some() && record.is_some_and(|it| it.members.iter().any(|it| it.joined))
        {
            network = Some(users_and_network(&members, &look, &nodes, options).await);
        }
        let seen = Seen {
            nodes: nodes.into_iter().map(|node| node.seen).collect(),
            record: record.cloned(),
            etcd: look.members.clone(),
        };
        let step = next_step(&options.wanted, &seen, &format!("{:08x}", rand::random::<u32>()));
        let (waits_for, is_enough) = match &step {
            Step::Done(None) => return network.unwrap_or(Ok(())),
            Step::Done(Some(said)) if !options.awaits_nodes => {
                tracing::warn!("{said}");
                return network.unwrap_or(Ok(()));
            }
            Step::Done(Some(said)) => (Some(said.clone()), true),
            Step::Await(said) => (Some(said.clone()), false),
            step => {
                carry_out(&objects, &members, &look, found.as_ref(), step).await?;
                (None, false)
            }
        };
        if Instant::now() > deadline {
            match (&waits_for, is_enough) {
                (Some(said), true) => {
                    tracing::warn!("{said}");
                    return network.unwrap_or(Ok(()));
                }
                (Some(said), false) => bail!("{said}"),
                (None, _) => bail!("not done in time: {step:?}"),
            }
        }
        if let Some(said) = waits_for {
            if said != told {
                tracing::info!("waiting: {said}");
                told = said;
            }
            sleep(PAUSE).await;
        }
    }
}

async fn certificates(objects: &Objects, options: &Options, nodes: &[FoundNode]) -> anyhow::Result<Members> {
    let authority = objects.authority().await?;
    // All that may become members: a new one need not wait until the others have another certificate.
    let of_nodes = nodes.iter().filter(|node| node.seen.is_candidate || node.seen.is_labelled);
    let addresses: BTreeSet<IpAddr> =
        of_nodes.flat_map(|node| node.seen.addresses.iter().chain(&node.external)).copied().collect();
    let names = addresses.iter().map(ToString::to_string).chain(options.names.iter().cloned());
    objects.certificate(&authority, "server", &Subject::members(names)).await?;
    objects.certificate(&authority, "node", &Subject::client(NODE)).await?;
    objects.certificate(&authority, "sync", &Subject::sync(&options.cluster)).await?;
    for cluster in &options.other_clusters {
        objects.certificate(&authority, &format!("sync-{cluster}"), &Subject::sync(cluster)).await?;
    }
    let root = objects.certificate(&authority, "root", &Subject::client(ROOT)).await?;
    Ok(Members { root, authority: authority.certificate })
}

/// By the record, and by the addresses that the nodes have now.
fn known_urls(record: Option<&MembersRecord>, nodes: &[FoundNode], options: &Options) -> Vec<String> {
    let Some(record) = record else { return Vec::new() };
    let mut known: Vec<String> = record.members.iter().flat_map(|member| member.client_urls.clone()).collect();
    let now = nodes.iter().filter(|node| record.on_node(&node.seen.name).is_some());
    for url in now.flat_map(|node| urls(&node.seen.addresses, options.wanted.ports.client)) {
        if !known.contains(&url) {
            known.push(url);
        }
    }
    known
}

async fn carry_out(
    objects: &Objects,
    members: &Members,
    look: &Look,
    found: Option<&FoundRecord>,
    step: &Step,
) -> anyhow::Result<()> {
    let url = || look.answering.first().map(|(url, _)| url.as_str()).context("no member answers");
    let leader = || look.answering.last().map(|(url, _)| url.as_str()).context("no member answers");
    tracing::info!(step = ?step, "step");
    match step {
        Step::Record(record) => {
            // Another run was faster where it is not written: the next look shows what it did.
            objects.write_record(record, found).await?;
        }
        Step::Label(node) => objects.label(node, true).await?,
        Step::Unlabel(node) => objects.label(node, false).await?,
        Step::Restart(node) => {
            objects.restart(node).await?;
            sleep(PAUSE).await;
        }
        Step::Add { peer_urls } => members.add(url()?, peer_urls.clone()).await?,
        Step::Promote { id } => {
            if !members.promote(leader()?, *id).await? {
                sleep(PAUSE).await;
            }
        }
        Step::Remove { id } => members.remove(url()?, *id).await?,
        Step::Update { id, peer_urls } => members.update(url()?, *id, peer_urls.clone()).await?,
        Step::Await(_) | Step::Done(_) => {}
    }
    Ok(())
}

/// Users first: until etcd asks for them, every certificate has all rights. A network that is there is left alone.
async fn users_and_network(
    members: &Members,
    look: &Look,
    nodes: &[FoundNode],
    options: &Options,
) -> anyhow::Result<()> {
    let Some((url, _)) = look.answering.first() else { return Ok(()) };
    let clusters: Vec<&Cluster> = std::iter::once(&options.cluster).chain(&options.other_clusters).collect();
    let users = async |config: Option<&NetworkConfig>| members.users(url, &options.prefix, &clusters, config).await;
    users(None).await?;
    if let Some(config) = members.config(url, &options.prefix).await? {
        return users(Some(&config)).await;
    }
    let Some(wanted) = &options.config else { return Ok(()) };
    let pod_cidrs: Vec<(&str, IpNet)> =
        nodes.iter().flat_map(|node| node.pod_cidrs.iter().map(|cidr| (node.seen.name.as_str(), *cidr))).collect();
    let config = network(wanted, &pod_cidrs)?;
    members.put_config(url, &options.prefix, &config).await?;
    users(Some(&config)).await
}

/// The `config` to put: subnets are Kubernetes' where it allocates podCIDRs, unless the value says otherwise.
fn network(config: &Value, pod_cidrs: &[(&str, IpNet)]) -> anyhow::Result<NetworkConfig> {
    let mut config = config.clone();
    if let Some(fields) = config.as_object_mut()
        && !fields.contains_key("Allocate")
        && ["Network", "IPv6Network"].iter().any(|network| fields.contains_key(*network))
        && !pod_cidrs.is_empty()
    {
        fields.insert("Allocate".to_owned(), "kubernetes".into());
    }
    let parsed = match NetworkConfig::parse(config.to_string().as_bytes()) {
        Ok(parsed) => parsed,
        Err(violations) => bail!("the chart's value `config`: {violations}"),
    };
    let adopts = config["Allocate"] == "kubernetes";
    let outside = pod_cidrs.iter().find(|(_, cidr)| !parsed.networks().any(|network| network.contains(cidr)));
    if let Some((node, cidr)) = outside.filter(|_| adopts) {
        let networks: Vec<String> = parsed.networks().map(|network| network.to_string()).collect();
        bail!(
            "node {node} has podCIDR {cidr}, outside of {}: set the chart's value `config` to the cluster's pod network",
            networks.join(", ")
        );
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn subnets_are_those_of_kubernetes_where_it_allocates_any() {
        let config = json!({"Network": "10.42.0.0/16"});
        let allocate = |config: &Value, cidrs: &[&str]| {
            let cidrs: Vec<_> = cidrs.iter().map(|cidr| ("n1", cidr.parse().unwrap())).collect();
            network(config, &cidrs).map(|config| String::from_utf8(config.to_json()).unwrap())
        };
        assert!(allocate(&config, &["10.42.3.0/24"]).unwrap().contains("kubernetes"));
        assert!(!allocate(&config, &[]).unwrap().contains("kubernetes"));
        let own = json!({"Network": "10.42.0.0/16", "Allocate": "mesh"});
        assert!(!allocate(&own, &["10.1.0.0/24"]).unwrap().contains("kubernetes"), "as the value says");
        let of_clusters = json!({"Networks": [{"cidr": "10.42.0.0/16", "cluster": "east"}]});
        assert!(!allocate(&of_clusters, &["10.42.3.0/24"]).unwrap().contains("kubernetes"), "each entry says it");
        let error = allocate(&config, &["10.43.0.0/24"]).unwrap_err().to_string();
        assert!(error.contains("node n1 has podCIDR 10.43.0.0/24, outside of 10.42.0.0/16"), "{error}");
        let error = allocate(&json!({"Network": "x"}), &[]).unwrap_err().to_string();
        assert!(error.contains("`config`") && error.contains("Network"), "{error}");
    }
}
