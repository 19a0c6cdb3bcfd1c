//! A cluster's objects in a directory, and one query about them.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use api_types::{Explained, Question};
use policy::{
    engine::{Classifier, Engine, Flow, ObjectName, PolicyState},
    object::{CLUSTER_POLICY_VERSIONS, ClusterPolicy, NetworkPolicy, namespace_from, pod_from},
    service::Service,
};
use serde_json::Value;

use super::documents::{self, Format, ReadError};

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExplainError {
    /// Files could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The question itself makes no sense.
    #[error("{0}")]
    Question(String),
    /// There is no such pod, or it has no address.
    #[error("{0}")]
    NotFound(String),
}

/// Answers from the Kubernetes objects in the files of `folder` and the folders in it.
///
/// # Errors
/// When a file cannot be read, the question makes no sense, or a pod that it names is not there.
pub fn explain(folder: &Path, question: &Question) -> Result<Explained, ExplainError> {
    let mut cluster = Cluster::default();
    let mut files = Vec::new();
    list_files(folder, 0, &mut files)?;
    files.sort();
    for file in files {
        let text = documents::text(&file)?;
        for object in documents::parse(&text, &file.display().to_string(), Format::of(&text))? {
            cluster.add(&object);
        }
    }
    let classifier = cluster.engine.commit(0);
    let flow = cluster.flow(&classifier, question)?;
    Ok(Explained::of(&classifier, &flow, cluster.problems))
}

#[derive(Default)]
struct Cluster {
    engine: Engine,
    problems: Vec<String>,
    age: u64,
}

impl Cluster {
    fn add(&mut self, object: &Value) {
        let kind = object.get("kind").and_then(Value::as_str).unwrap_or_default();
        if kind == "List" || (kind.ends_with("List") && object.get("items").is_some()) {
            let item_kind = kind.strip_suffix("List").filter(|kind| !kind.is_empty());
            for item in object.get("items").and_then(Value::as_array).into_iter().flatten() {
                match (item_kind, item.get("kind")) {
                    // `kubectl get --raw` leaves the kind of a typed list's items out.
                    (Some(kind), None) => {
                        let mut item = item.clone();
                        if let Some(map) = item.as_object_mut() {
                            map.insert("kind".to_owned(), kind.into());
                        }
                        self.add(&item);
                    }
                    _ => self.add(item),
                }
            }
            return;
        }
        if let Err(problem) = self.add_one(kind, object) {
            let metadata = object.get("metadata").unwrap_or(&Value::Null);
            let name = ["namespace", "name"].map(|field| metadata.get(field).and_then(Value::as_str));
            let name = name.into_iter().flatten().collect::<Vec<_>>().join("/");
            self.problems.push(format!("{kind} {name}: {problem}"));
        }
    }

    fn add_one(&mut self, kind: &str, object: &Value) -> Result<(), String> {
        let metadata = object.get("metadata").unwrap_or(&Value::Null);
        let spec = object.get("spec").unwrap_or(&Value::Null);
        let text = |name: &str| metadata.get(name).and_then(Value::as_str);
        self.age += 1;
        match kind {
            "Namespace" => {
                let (name, labels) = namespace_from(object).map_err(|error| error.to_string())?;
                self.engine.put_namespace(&etcd_schema::Cluster::default(), &name, labels);
            }
            "Pod" => {
                let (namespace, name, pod) = pod_from(object).map_err(|error| error.to_string())?;
                self.engine.put_pod(ObjectName::new(namespace, name), pod, self.age);
            }
            "Node" => {
                let name = text("name").ok_or("it has no name")?;
                let listed = object.pointer("/status/addresses").and_then(Value::as_array);
                let addresses: Arc<[IpAddr]> = listed
                    .into_iter()
                    .flatten()
                    .filter_map(|entry| entry.get("address")?.as_str()?.parse().ok())
                    .collect();
                self.engine.put_node(name.into(), addresses);
            }
            "NetworkPolicy" => {
                version(object, &["networking.k8s.io/v1"])?;
                let name = ObjectName::new(text("namespace").unwrap_or("default"), text("name").ok_or("no name")?);
                match NetworkPolicy::parse(spec) {
                    Ok(policy) => self.engine.put_policy(name, &PolicyState::Valid(policy)),
                    Err(invalid) => {
                        let Some((subject, directions)) = invalid.isolates else {
                            return Err(format!("{}; it has no effect", invalid.violations));
                        };
                        self.engine.put_policy(name, &PolicyState::Isolates(subject, directions));
                        return Err(format!("{}; it isolates its pods and allows nothing", invalid.violations));
                    }
                }
            }
            "ClusterNetworkPolicy" => {
                version(object, &CLUSTER_POLICY_VERSIONS)?;
                let name = ObjectName::new("", text("name").ok_or("it has no name")?);
                match ClusterPolicy::parse(spec) {
                    Ok(policy) => self.engine.put_cluster_policy(name, &policy),
                    Err(invalid) => {
                        let Some(policy) = invalid.fail_closed else {
                            return Err(format!("{}; it has no effect", invalid.violations));
                        };
                        self.engine.put_cluster_policy(name, &policy);
                        return Err(format!("{}; its unreadable rules deny", invalid.violations));
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn flow(&self, classifier: &Classifier, question: &Question) -> Result<Flow, ExplainError> {
        let (source, destination) = (self.addresses(&question.source)?, self.addresses(&question.destination)?);
        let pair = [true, false].into_iter().find_map(|v4| {
            let first = |list: &[IpAddr]| list.iter().find(|address| address.is_ipv4() == v4).copied();
            first(&source).zip(first(&destination))
        });
        let (source, destination) = pair.ok_or_else(|| {
            let Question { source, destination, .. } = question;
            ExplainError::Question(format!("{source} and {destination} have no common address family"))
        })?;
        let service = Service::parse(&question.service).map_err(ExplainError::Question)?;
        service.flow(classifier, source, destination).map_err(ExplainError::Question)
    }

    fn addresses(&self, text: &str) -> Result<Vec<IpAddr>, ExplainError> {
        if let Ok(address) = text.parse() {
            return Ok(vec![address]);
        }
        let (namespace, name) = text
            .split_once('/')
            .ok_or_else(|| ExplainError::Question(format!("{text}: must be NAMESPACE/POD or an address")))?;
        let addresses: Vec<IpAddr> = self
            .engine
            .pods_named(&ObjectName::new(namespace, name))
            .flat_map(|pod| pod.addresses.iter().copied())
            .collect();
        if addresses.is_empty() {
            return Err(ExplainError::NotFound(format!("{text}: no such pod, or no address")));
        }
        Ok(addresses)
    }
}

fn version(object: &Value, known: &[&str]) -> Result<(), String> {
    match object.get("apiVersion").and_then(Value::as_str) {
        Some(version) if known.contains(&version) => Ok(()),
        other => Err(format!("apiVersion is {}: must be {}", other.unwrap_or("missing"), known.join(" or "))),
    }
}

/// Folders inside each other that are looked into.
const MAX_DEPTH: usize = 16;

fn list_files(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<(), ReadError> {
    let failed = |source| ReadError::File { file: folder.display().to_string(), source };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        if path.is_dir() {
            if depth < MAX_DEPTH {
                list_files(&path, depth + 1, files)?;
            }
        } else if path.extension().is_some_and(|ext| ext == "json" || ext == "jsonl" || ext == "yaml" || ext == "yml") {
            files.push(path);
        }
    }
    Ok(())
}
