//! The pod of a container.

use crate::{config::Config, daemon::PodReference, environment::Environment};

/// The namespace of pods without a stated one.
const DEFAULT_NAMESPACE: &str = "default";

/// The pod behind an attachment: by the runtime's arguments if it is a Kubernetes pod, else by the configuration, else
/// by the container's ID.
///
/// Podman 3 gives the container's name as `K8S_POD_NAMESPACE` and as `K8S_POD_NAME`, later versions as the latter
/// alone: a runtime's own name, which need not be valid in Kubernetes and is ignored. Without a UID, equal names are
/// taken for that, and so are any if the configuration has a `pod`.
#[must_use]
pub fn pod(environment: &Environment, config: &Config) -> PodReference {
    let argument = |name| environment.arg(name).map(str::to_owned);
    let uid = argument("K8S_POD_UID");
    if let (Some(namespace), Some(name)) = (argument("K8S_POD_NAMESPACE"), argument("K8S_POD_NAME"))
        && (uid.is_some() || (namespace != name && config.pod.is_none()))
    {
        return PodReference { namespace, name, uid, labels: config.labels.clone() };
    }
    let named = config.pod.clone().unwrap_or_default();
    let mut labels = named.labels;
    // The runtime speaks of this container, the configuration's `pod` of all of the network.
    labels.extend(config.labels.clone());
    PodReference {
        namespace: named.namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()),
        name: named.name.unwrap_or_else(|| environment.container_id.clone()),
        uid: None,
        labels,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(args: &str, more: &serde_json::Value) -> PodReference {
        let mut config = json!({"cniVersion": "1.0.0", "name": "mesh", "type": "meshd-cni"});
        if let (Some(config), Some(more)) = (config.as_object_mut(), more.as_object()) {
            config.extend(more.clone());
        }
        let environment =
            Environment { container_id: "c1".to_owned(), args: args.to_owned(), ..Environment::default() };
        pod(&environment, &Config::parse(config.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn a_kubernetes_pod_is_what_the_runtime_says() {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u1";
        let pod = of(args, &json!({"pod": {"namespace": "x", "name": "y", "labels": {"a": "b"}}}));
        assert_eq!((pod.namespace.as_str(), pod.name.as_str(), pod.uid.as_deref()), ("shop", "web-0", Some("u1")));
        // Labels of a Kubernetes pod are the Pod object's.
        assert!(pod.labels.is_empty());
    }

    #[test]
    fn a_name_without_a_namespace_is_a_runtimes_name() {
        let pod = of("K8S_POD_NAME=quirky_turing;K8S_POD_UID=u", &json!({}));
        assert_eq!((pod.namespace.as_str(), pod.name.as_str(), pod.uid), ("default", "c1", None));
    }

    #[test]
    fn podman_3_gives_the_containers_name_twice() {
        let named = json!({"pod": {"namespace": "shop", "name": "db", "labels": {"app": "db"}}});
        let cases = [
            ("quirky_turing", "quirky_turing", &json!({}), ("default", "c1")),
            ("web1", "web1", &json!({}), ("default", "c1")),
            ("quirky_turing", "quirky_turing", &named, ("shop", "db")),
            ("web1", "web1", &named, ("shop", "db")),
            // The configuration's `pod` says that these are no pods of Kubernetes.
            ("some", "quirky_turing", &named, ("shop", "db")),
            // Runtimes of Kubernetes that give no UID.
            ("shop", "web-0", &json!({}), ("shop", "web-0")),
        ];
        for (namespace, name, config, expected) in cases {
            let pod = of(&format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}"), config);
            assert_eq!((pod.namespace.as_str(), pod.name.as_str()), expected, "{namespace} {name} {config}");
            assert_eq!(pod.labels.get("app").map(String::as_str), (config == &named).then_some("db"));
            assert_eq!(pod.uid, None);
        }
        // With a UID it is Kubernetes that speaks.
        let pod = of("K8S_POD_NAMESPACE=web;K8S_POD_NAME=web;K8S_POD_UID=u1", &named);
        assert_eq!((pod.namespace.as_str(), pod.name.as_str(), pod.uid.as_deref()), ("web", "web", Some("u1")));
    }

    #[test]
    fn outside_kubernetes_the_configuration_says() {
        let pod = of(
            "",
            &json!({
                "pod": {"namespace": "shop", "name": "db", "labels": {"a": "1", "b": "1"}},
                "args": {"cni": {"labels": {"b": "2"}}},
            }),
        );
        assert_eq!((pod.namespace.as_str(), pod.name.as_str()), ("shop", "db"));
        assert_eq!(pod.labels.into_iter().collect::<Vec<_>>(), [("a".into(), "1".into()), ("b".into(), "2".into())]);
    }
}
