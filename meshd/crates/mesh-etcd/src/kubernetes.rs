//! Objects of the API server: Nodes, the record, certificates, the members' pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    time::Duration,
};

use anyhow::Context as _;
use ipnet::IpNet;
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Node, Pod, Secret},
};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::json;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    certificates::{Authority, KeyedCertificate, Subject, serves},
    plan::SeenNode,
    record::{MEMBER_LABEL, MembersRecord},
};

const SYSTEM_LABEL: &str = "kubernetes.io/os";
/// Key of the ConfigMap with the members.
pub(crate) const RECORD_KEY: &str = "members";
/// Key of the ConfigMap with their URLs.
const ENDPOINTS_KEY: &str = "endpoints";
/// Names that a certificate serves for, and when it ends.
const NAMES_ANNOTATION: &str = "meshd.io/names";
const ENDS_ANNOTATION: &str = "meshd.io/not-after";
const AUTHORITY: &str = "ca.crt";
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";

/// The objects of one installation.
pub(crate) struct Objects {
    client: Client,
    namespace: String,
    /// Name of the ConfigMap, and of the DaemonSet; Secrets have it before theirs.
    name: String,
    /// Label of the nodes where a member may run.
    candidates: String,
}

/// A ConfigMap's record, and what a write of it must find.
pub(crate) struct FoundRecord {
    pub(crate) record: MembersRecord,
    resource_version: Option<String>,
}

/// A Node, and what Kubernetes allocated to it.
pub(crate) struct FoundNode {
    pub(crate) seen: SeenNode,
    pub(crate) external: Vec<IpAddr>,
    pub(crate) pod_cidrs: Vec<IpNet>,
}

impl Objects {
    /// Reaches the API server by this file, or as a pod of the cluster.
    pub(crate) async fn connect(
        kubeconfig: Option<&Path>,
        namespace: String,
        name: String,
        candidates: String,
    ) -> anyhow::Result<Self> {
        let mut config = match kubeconfig {
            Some(file) => {
                Config::from_custom_kubeconfig(Kubeconfig::read_from(file)?, &KubeConfigOptions::default()).await?
            }
            None => Config::infer().await.context("cannot tell how to reach the API server")?,
        };
        config.connect_timeout = Some(Duration::from_secs(10));
        config.read_timeout = Some(Duration::from_secs(30));
        Ok(Self { client: Client::try_from(config)?, namespace, name, candidates })
    }

    fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn config_maps(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn nodes(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    fn secret_name(&self, what: &str) -> String {
        format!("{}-{what}", self.name)
    }

    /// All Nodes, by name.
    pub(crate) async fn list_nodes(&self) -> anyhow::Result<Vec<FoundNode>> {
        let nodes = self.nodes().list(&ListParams::default()).await.context("Nodes cannot be listed")?;
        let mut found: Vec<FoundNode> = nodes.items.iter().map(|node| self.found_node(node)).collect();
        found.sort_by(|a, b| a.seen.name.cmp(&b.seen.name));
        Ok(found)
    }

    fn found_node(&self, node: &Node) -> FoundNode {
        let status = node.status.clone().unwrap_or_default();
        let spec = node.spec.clone().unwrap_or_default();
        let addresses = |kind: &str| -> Vec<IpAddr> {
            let all = status.addresses.iter().flatten().filter(|address| address.type_ == kind);
            all.filter_map(|address| address.address.parse().ok()).collect()
        };
        let ready = |kind: &str, status: &str| kind == "Ready" && status == "True";
        let seen = SeenNode {
            name: node.name_any(),
            addresses: addresses("InternalIP"),
            is_candidate: node.labels().contains_key(&self.candidates)
                && node.labels().get(SYSTEM_LABEL).is_none_or(|system| system == "linux")
                && node.metadata.deletion_timestamp.is_none(),
            is_labelled: node.labels().get(MEMBER_LABEL).is_some_and(|value| *value == self.name),
            is_ready: status.conditions.iter().flatten().any(|it| ready(&it.type_, &it.status)),
        };
        let pod_cidrs = spec.pod_cidrs.into_iter().flatten().filter_map(|cidr| cidr.parse().ok()).collect();
        FoundNode { seen, external: addresses("ExternalIP"), pod_cidrs }
    }

    /// Puts the label on a node, or takes it off.
    pub(crate) async fn label(&self, node: &str, is_member: bool) -> anyhow::Result<()> {
        let patch = json!({"metadata": {"labels": {MEMBER_LABEL: is_member.then_some(&self.name)}}});
        let patched = self.nodes().patch(node, &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.map(drop).with_context(|| format!("node {node} cannot be labelled"))
    }

    /// The record, if there is one.
    pub(crate) async fn read_record(&self) -> anyhow::Result<Option<FoundRecord>> {
        let Some(found) = self.config_maps().get_opt(&self.name).await.context("the members cannot be read")? else {
            return Ok(None);
        };
        let text = found.data.as_ref().and_then(|data| data.get(RECORD_KEY)).map(String::as_str).unwrap_or_default();
        let record = serde_json::from_str(text).with_context(|| {
            format!("ConfigMap {}/{}: key {RECORD_KEY} is not as it was written", self.namespace, self.name)
        })?;
        Ok(Some(FoundRecord { record, resource_version: found.metadata.resource_version }))
    }

    /// Writes the record in place of `found`, unless it has changed since. Whether it was written.
    pub(crate) async fn write_record(
        &self,
        record: &MembersRecord,
        found: Option<&FoundRecord>,
    ) -> anyhow::Result<bool> {
        let mut map = ConfigMap::default();
        map.metadata.name = Some(self.name.clone());
        map.metadata.labels = Some(self.labels());
        map.metadata.resource_version = found.and_then(|found| found.resource_version.clone());
        map.data = Some(BTreeMap::from([
            (RECORD_KEY.to_owned(), serde_json::to_string_pretty(record)?),
            (ENDPOINTS_KEY.to_owned(), record.endpoints()),
        ]));
        let maps = self.config_maps();
        let written = match found {
            Some(_) => maps.replace(&self.name, &PostParams::default(), &map).await,
            None => maps.create(&PostParams::default(), &map).await,
        };
        match written {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error).context("the members cannot be written"),
        }
    }

    /// Deletes the members' pods on a node; the DaemonSet makes new ones.
    pub(crate) async fn restart(&self, node: &str) -> anyhow::Result<()> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let select = ListParams::default()
            .labels(&format!("app.kubernetes.io/name=meshd-etcd,app.kubernetes.io/instance={}", self.name))
            .fields(&format!("spec.nodeName={node}"));
        for pod in pods.list(&select).await.context("the members' pods cannot be listed")? {
            let deleted = pods.delete(&pod.name_any(), &DeleteParams::default()).await;
            deleted.map(drop).with_context(|| format!("pod {} cannot be deleted", pod.name_any()))?;
        }
        Ok(())
    }

    /// The authority. Without one, makes it.
    pub(crate) async fn authority(&self) -> anyhow::Result<Authority> {
        let name = self.secret_name("ca");
        if let Some(secret) = self.secrets().get_opt(&name).await.context("the authority cannot be read")? {
            let keyed = keyed(&secret).with_context(|| format!("Secret {name} lacks {CERTIFICATE} or {KEY}"))?;
            return Authority::of(keyed).with_context(|| format!("Secret {name}: not a key of an authority"));
        }
        let (authority, keyed) = Authority::new(OffsetDateTime::now_utc())?;
        let secret = self.secret(&name, &keyed, None, BTreeMap::new());
        self.secrets().create(&PostParams::default(), &secret).await.with_context(|| format!("Secret {name}"))?;
        tracing::info!(secret = name, "certificate authority made");
        Ok(authority)
    }

    /// The certificate in a Secret. Without one that serves, issues it.
    pub(crate) async fn certificate(
        &self,
        authority: &Authority,
        what: &str,
        subject: &Subject,
    ) -> anyhow::Result<KeyedCertificate> {
        let (name, now) = (self.secret_name(what), OffsetDateTime::now_utc());
        let found = self.secrets().get_opt(&name).await.with_context(|| format!("Secret {name} cannot be read"))?;
        if let Some(keyed) = found.as_ref().and_then(|secret| serving(secret, authority, subject, now)) {
            return Ok(keyed);
        }
        let (keyed, ends) = authority.issue(subject, now)?;
        let names: Vec<&str> = subject.names.iter().map(String::as_str).collect();
        let annotations = BTreeMap::from([
            (NAMES_ANNOTATION.to_owned(), names.join(",")),
            (ENDS_ANNOTATION.to_owned(), ends.format(&Rfc3339)?),
        ]);
        let mut secret = self.secret(&name, &keyed, Some(&authority.certificate), annotations);
        let secrets = self.secrets();
        match found {
            Some(found) => {
                secret.metadata.resource_version = found.metadata.resource_version;
                secrets.replace(&name, &PostParams::default(), &secret).await
            }
            None => secrets.create(&PostParams::default(), &secret).await,
        }
        .with_context(|| format!("Secret {name} cannot be written"))?;
        tracing::info!(secret = name, %ends, "certificate issued");
        Ok(keyed)
    }

    fn secret(
        &self,
        name: &str,
        keyed: &KeyedCertificate,
        authority: Option<&str>,
        annotations: BTreeMap<String, String>,
    ) -> Secret {
        let mut secret = Secret { type_: Some("kubernetes.io/tls".to_owned()), ..Secret::default() };
        secret.metadata.name = Some(name.to_owned());
        secret.metadata.labels = Some(self.labels());
        secret.metadata.annotations = Some(annotations);
        let mut data = BTreeMap::from([(CERTIFICATE, keyed.certificate.as_str()), (KEY, &keyed.key)]);
        data.extend(authority.map(|authority| (AUTHORITY, authority)));
        let bytes = |(key, text): (&str, &str)| (key.to_owned(), ByteString(text.as_bytes().to_vec()));
        secret.data = Some(data.into_iter().map(bytes).collect());
        secret
    }

    fn labels(&self) -> BTreeMap<String, String> {
        let labels = [("app.kubernetes.io/name", "meshd-etcd"), ("app.kubernetes.io/instance", &self.name)];
        labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
    }
}

fn keyed(secret: &Secret) -> Option<KeyedCertificate> {
    Some(KeyedCertificate { certificate: text_of(secret, CERTIFICATE)?, key: text_of(secret, KEY)? })
}

fn text_of(secret: &Secret, key: &str) -> Option<String> {
    String::from_utf8(secret.data.as_ref()?.get(key)?.0.clone()).ok()
}

/// What a Secret has, if it still serves.
fn serving(secret: &Secret, authority: &Authority, subject: &Subject, now: OffsetDateTime) -> Option<KeyedCertificate> {
    let annotations = secret.annotations();
    let names: BTreeSet<String> = annotations.get(NAMES_ANNOTATION)?.split(',').map(str::to_owned).collect();
    let ends = OffsetDateTime::parse(annotations.get(ENDS_ANNOTATION)?, &Rfc3339).ok()?;
    let same_authority = text_of(secret, AUTHORITY)? == authority.certificate;
    let serves = serves(&names, &subject.names, ends, now);
    if same_authority && serves { keyed(secret) } else { None }
}
