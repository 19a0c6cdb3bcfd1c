//! A cluster's objects in a directory, and one query about them.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use api_types::{Explained, Question};
use etcd_schema::{Cluster, KubernetesKey, KubernetesName};
use policy::{
    engine::{Age, Classifier, Engine, Flow, ObjectName},
    objects,
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
    let mut cluster = OfflineWorld::default();
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

/// The objects of the files; of no cluster, whatever they come from.
#[derive(Default)]
struct OfflineWorld {
    engine: Engine,
    problems: Vec<String>,
    age: u64,
}

impl OfflineWorld {
    fn add(&mut self, object: &Value) {
        let kind = object.get("kind").and_then(Value::as_str).unwrap_or_default();
        if kind == "List" || (kind.ends_with("List") && object.get("items").is_some()) {
            let item_kind = kind.strip_suffix("List").filter(|kind| !kind.is_empty());
            for item in object.get("items").and_then(Value::as_array).into_iter().flatten() {
                match (item_kind, item.get("kind")) {
                    // `kubectl get --raw` leaves kind and version of a typed list's items out.
                    (Some(kind), None) => {
                        let mut item = item.clone();
                        if let Some(map) = item.as_object_mut() {
                            map.insert("kind".to_owned(), kind.into());
                            map.insert("apiVersion".to_owned(), object["apiVersion"].clone());
                        }
                        self.add(&item);
                    }
                    _ => self.add(item),
                }
            }
            return;
        }
        let metadata = object.get("metadata").unwrap_or(&Value::Null);
        let text = |name: &str| metadata.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        if let Err(problem) = self.add_one(kind, text("namespace"), text("name"), object) {
            let name = [text("namespace"), text("name")].into_iter().flatten().collect::<Vec<_>>().join("/");
            self.problems.push(format!("{kind} {name}: {problem}"));
        }
    }

    fn add_one(
        &mut self,
        kind: &str,
        namespace: Option<&str>,
        name: Option<&str>,
        object: &Value,
    ) -> Result<(), String> {
        let namespace = namespace.unwrap_or("default");
        let named = |text: &str| text.parse::<KubernetesName>().map_err(|error| error.to_string());
        let name = || name.ok_or_else(|| "it has no name".to_owned());
        let (key, is_namespaced) = match kind {
            "Namespace" => (KubernetesKey::Namespace(named(name()?)?), false),
            "Pod" => (KubernetesKey::Pod(named(namespace)?, named(name()?)?), true),
            "NetworkPolicy" => (KubernetesKey::NetworkPolicy(named(namespace)?, named(name()?)?), true),
            "ClusterNetworkPolicy" => (KubernetesKey::ClusterNetworkPolicy(named(name()?)?), false),
            "Node" => {
                let listed = object.pointer("/status/addresses").and_then(Value::as_array);
                let addresses: Arc<[IpAddr]> = listed
                    .into_iter()
                    .flatten()
                    .filter_map(|entry| entry.get("address")?.as_str()?.parse().ok())
                    .collect();
                self.engine.put_node(name()?.into(), addresses);
                (KubernetesKey::Node(named(name()?)?), false)
            }
            _ => return Ok(()),
        };
        let mut object = object.as_object().cloned().unwrap_or_default();
        // Files may leave it out, as `kubectl apply` does.
        if is_namespaced && let Some(Value::Object(metadata)) = object.get_mut("metadata") {
            metadata.insert("namespace".to_owned(), namespace.into());
        }
        self.age += 1;
        let age = Age::from(self.age);
        match objects::read_tree(&key, object) {
            Ok(reading) => {
                objects::put(&mut self.engine, &Cluster::default(), &key, reading.object, age);
                Ok(())
            }
            Err(refusal) => {
                let effect = objects::effect(&key, refusal.stand_in.as_deref());
                if let Some(stand_in) = refusal.stand_in {
                    objects::put(&mut self.engine, &Cluster::default(), &key, *stand_in, age);
                }
                Err(format!("{}; {effect}", refusal.violations))
            }
        }
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
