//! Calls to the API server.

use std::{path::Path, time::Duration};

use futures_util::{AsyncBufReadExt as _, Stream, StreamExt as _};
use kube::{
    Client, Config,
    api::{ListParams, Patch, PatchParams, PostParams, Request, WatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, value::RawValue};
use sync_core::ObjectKind;
use tokio::time::timeout;

/// Objects in one page of a list.
const PAGE: u32 = 500;
/// How long a page, or a single object, may take.
const CALL_DEADLINE: Duration = Duration::from_secs(60);
/// A watch without a line for longer has lost its server, which sends a bookmark every minute.
const SILENCE: Duration = Duration::from_secs(90);

/// Where ClusterNetworkPolicies are, and the versions that are read, the first that is served.
const POLICY_GROUP: &str = "policy.networking.k8s.io";
const POLICY_VERSIONS: [&str; 2] = ["v1beta1", "v1alpha2"];
const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

/// A connection to the API server.
pub(crate) struct Api {
    client: Client,
}

/// A failed call.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// The history that was asked for is gone: list again.
    #[error("the resource version is too old")]
    Expired,
    /// There is no such object, or no such kind.
    #[error("not found")]
    NotFound,
    /// An object of that name is there, or has changed.
    #[error("conflict: {0}")]
    Conflict(String),
    #[error("no answer within {} seconds", .0.as_secs())]
    Deadline(Duration),
    #[error("{0}")]
    Other(String),
}

/// Where the objects of a kind are.
#[derive(Debug, Clone)]
pub(crate) struct Resource {
    pub(crate) kind: ObjectKind,
    pub(crate) api_version: String,
    path: String,
}

/// A part of a list.
pub(crate) struct Page {
    pub(crate) resource_version: String,
    /// Asks for the next part.
    pub(crate) next: Option<String>,
    pub(crate) items: Vec<Box<RawValue>>,
}

/// A line of a watch.
pub(crate) enum WatchLine {
    Applied(Box<RawValue>),
    Deleted(Box<RawValue>),
    Bookmark { resource_version: String },
}

/// Where ClusterNetworkPolicies are served; the definition may come and go.
pub(crate) struct PolicyDefinition {
    /// Where they are, if the cluster has the definition.
    pub(crate) resource: Option<Resource>,
    /// The resource version of the answer.
    pub(crate) resource_version: String,
}

#[derive(Deserialize)]
struct List<T> {
    metadata: ListMetadata,
    items: Vec<T>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    #[serde(default)]
    resource_version: String,
    r#continue: Option<String>,
}

#[derive(Deserialize)]
struct Event {
    r#type: String,
    object: Box<RawValue>,
}

#[derive(Deserialize)]
struct OnlyMetadata {
    metadata: ObjectMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ObjectMetadata {
    #[serde(default)]
    uid: String,
    #[serde(default)]
    resource_version: String,
}

#[derive(Deserialize)]
struct ApiStatus {
    #[serde(default)]
    code: u16,
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
struct Definition {
    spec: DefinitionSpec,
}

#[derive(Deserialize)]
struct DefinitionSpec {
    versions: Vec<DefinitionVersion>,
}

#[derive(Deserialize)]
struct DefinitionVersion {
    name: String,
    served: bool,
}

impl Resource {
    /// Where a kind that every cluster has is.
    pub(crate) fn built_in(kind: ObjectKind) -> Self {
        let (api_version, root) = match kind {
            ObjectKind::NetworkPolicy => ("networking.k8s.io/v1", "/apis/networking.k8s.io/v1"),
            _ => ("v1", "/api/v1"),
        };
        Self { kind, api_version: api_version.to_owned(), path: format!("{root}/{}", kind.plural()) }
    }
}

impl Api {
    /// Reads how the API server is reached: from this file, or as a pod of the cluster, or as kubectl does.
    ///
    /// # Errors
    /// The violation; the API server is not called.
    pub(crate) async fn new(kubeconfig: Option<&Path>) -> anyhow::Result<Self> {
        let mut config = match kubeconfig {
            Some(file) => {
                Config::from_custom_kubeconfig(Kubeconfig::read_from(file)?, &KubeConfigOptions::default()).await?
            }
            None => Config::infer().await?,
        };
        config.connect_timeout = Some(Duration::from_secs(10));
        Ok(Self { client: Client::try_from(config)? })
    }

    /// UID of the namespace `kube-system`; `None`: it is not there.
    pub(crate) async fn cluster_uid(&self) -> Result<Option<String>, ApiError> {
        let path = Resource::built_in(ObjectKind::Namespace).path;
        let request = Request::new(path).get("kube-system", &Default::default());
        match self.call::<OnlyMetadata>(request.map_err(other)?).await {
            Ok(namespace) => Ok(Some(namespace.metadata.uid)),
            Err(ApiError::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A page of a list. Without a resource version in the request it is read from a quorum of the cluster's etcd.
    pub(crate) async fn page(&self, resource: &Resource, next: Option<&str>) -> Result<Page, ApiError> {
        let mut parameters = ListParams::default().limit(PAGE);
        parameters.continue_token = next.map(str::to_owned);
        let request = Request::new(&resource.path).list(&parameters).map_err(other)?;
        let List { metadata, items } = self.call(request).await?;
        let next = metadata.r#continue.filter(|next| !next.is_empty());
        Ok(Page { resource_version: metadata.resource_version, next, items })
    }

    /// The API of ClusterNetworkPolicies. Only a list of definitions proves that there is none; a path that is not
    /// found may not be served yet.
    pub(crate) async fn policy_definition(&self) -> Result<PolicyDefinition, ApiError> {
        let plural = ObjectKind::ClusterNetworkPolicy.plural();
        let parameters = ListParams::default().fields(&format!("metadata.name={plural}.{POLICY_GROUP}"));
        let request = Request::new(DEFINITIONS).list(&parameters).map_err(other)?;
        let List { metadata, items } = self.call::<List<Definition>>(request).await?;
        let served: Vec<_> = items.iter().flat_map(|it| &it.spec.versions).filter(|version| version.served).collect();
        let known = POLICY_VERSIONS.iter().find_map(|name| served.iter().find(|version| version.name == *name));
        let resource = known.or_else(|| served.first()).map(|version| Resource {
            kind: ObjectKind::ClusterNetworkPolicy,
            api_version: format!("{POLICY_GROUP}/{}", version.name),
            path: format!("/apis/{POLICY_GROUP}/{}/{plural}", version.name),
        });
        Ok(PolicyDefinition { resource, resource_version: metadata.resource_version })
    }

    /// Watches changes after `resource_version`.
    pub(crate) async fn watch(
        &self,
        resource: &Resource,
        resource_version: &str,
    ) -> Result<impl Stream<Item = Result<WatchLine, ApiError>> + use<>, ApiError> {
        let request = Request::new(&resource.path).watch(&WatchParams::default(), resource_version).map_err(other)?;
        let stream = within(CALL_DEADLINE, self.client.request_stream(request)).await?.map_err(of_kube)?;
        let lines = Box::pin(stream.lines());
        Ok(futures_util::stream::unfold(Some(lines), |lines| async {
            let mut lines = lines?;
            let line = match within(SILENCE, lines.next()).await {
                Ok(None) => return None,
                Ok(Some(Ok(line))) => read_line(&line),
                Ok(Some(Err(error))) => Err(ApiError::Other(error.to_string())),
                Err(error) => Err(error),
            };
            let goes_on = line.is_ok();
            Some((line, goes_on.then_some(lines)))
        }))
    }

    /// Patches the status of a Node, within `deadline`.
    pub(crate) async fn patch_node_status(
        &self,
        node: &str,
        patch: &Value,
        deadline: Duration,
    ) -> Result<(), ApiError> {
        let request = nodes().patch_subresource("status", node, &PatchParams::default(), &Patch::Strategic(patch));
        self.patch(request, deadline).await
    }

    /// Patches a Node, within `deadline`.
    pub(crate) async fn patch_node(&self, node: &str, patch: &Value, deadline: Duration) -> Result<(), ApiError> {
        self.patch(nodes().patch(node, &PatchParams::default(), &Patch::Merge(patch)), deadline).await
    }

    /// Makes an Event, unless one of its name is there.
    pub(crate) async fn create_event(&self, namespace: &str, event: &Value) -> Result<(), ApiError> {
        let body = serde_json::to_vec(event).map_err(other)?;
        let request = Request::new(format!("/api/v1/namespaces/{namespace}/events"));
        let request = request.create(&PostParams::default(), body).map_err(other)?;
        match within(CALL_DEADLINE, self.client.request_text(request)).await?.map_err(of_kube) {
            Ok(_) | Err(ApiError::Conflict(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn patch(
        &self,
        request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
        deadline: Duration,
    ) -> Result<(), ApiError> {
        let answer = self.client.request_text(request.map_err(other)?);
        within(deadline.min(CALL_DEADLINE), answer).await?.map_err(of_kube).map(drop)
    }

    async fn call<T: DeserializeOwned>(&self, request: http::Request<Vec<u8>>) -> Result<T, ApiError> {
        let text = within(CALL_DEADLINE, self.client.request_text(request)).await?.map_err(of_kube)?;
        serde_json::from_str(&text).map_err(other)
    }
}

fn nodes() -> Request {
    Request::new(Resource::built_in(ObjectKind::Node).path)
}

async fn within<T>(deadline: Duration, call: impl Future<Output = T>) -> Result<T, ApiError> {
    timeout(deadline, call).await.map_err(|_| ApiError::Deadline(deadline))
}

fn other(error: impl std::error::Error) -> ApiError {
    ApiError::Other(text::with_causes(&error))
}

fn of_kube(error: kube::Error) -> ApiError {
    match error {
        kube::Error::Api(status) => of_status(status.code, status.message),
        error => other(error),
    }
}

fn of_status(code: u16, message: String) -> ApiError {
    match code {
        404 => ApiError::NotFound,
        409 => ApiError::Conflict(message),
        410 => ApiError::Expired,
        code => ApiError::Other(format!("the API server says {code}: {message}")),
    }
}

fn read_line(line: &str) -> Result<WatchLine, ApiError> {
    let Event { r#type, object } = serde_json::from_str(line).map_err(other)?;
    match r#type.as_str() {
        "ADDED" | "MODIFIED" => Ok(WatchLine::Applied(object)),
        "DELETED" => Ok(WatchLine::Deleted(object)),
        "BOOKMARK" => {
            let OnlyMetadata { metadata } = serde_json::from_str(object.get()).map_err(other)?;
            Ok(WatchLine::Bookmark { resource_version: metadata.resource_version })
        }
        "ERROR" => {
            let ApiStatus { code, message } = serde_json::from_str(object.get()).map_err(other)?;
            Err(of_status(code, message))
        }
        other => Err(ApiError::Other(format!("a watch event of type {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_a_watch_is_told_apart() {
        let object = r#"{"metadata": {"name": "x", "resourceVersion": "7"}, "code": 410, "message": "too old"}"#;
        let line = |kind: &str| read_line(&format!(r#"{{"type": "{kind}", "object": {object}}}"#));
        assert!(matches!(line("ADDED"), Ok(WatchLine::Applied(raw)) if raw.get() == object));
        assert!(matches!(line("DELETED"), Ok(WatchLine::Deleted(_))));
        assert!(matches!(line("BOOKMARK"), Ok(WatchLine::Bookmark { resource_version }) if resource_version == "7"));
        assert!(matches!(line("ERROR"), Err(ApiError::Expired)));
        assert!(matches!(line("FROB"), Err(ApiError::Other(_))));
        assert!(read_line("{").is_err());
    }
}
