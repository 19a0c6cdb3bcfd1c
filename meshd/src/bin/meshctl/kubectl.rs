//! `kubectl meshd …`: meshctl in the pod of a node's daemon, for those who have kubectl's rights and no shell on the
//! node.
//!
//! Commands that read local files, or need neither daemon nor etcd, run here.

use std::{
    ffi::OsString,
    io::IsTerminal as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};
use clap::Parser;
use serde::Deserialize;

use crate::exit::{NotFound, Remedied};

/// The program's name as a plugin.
const NAME: &str = "kubectl-meshd";
/// Selects the daemon's pods, and the container with the daemon in them.
const SELECTOR: &str = "app.kubernetes.io/name=meshd";
const CONTAINER: &str = "meshd";
/// Commands that run here.
const LOCAL: [&str; 5] = ["check", "completions", "etcd-roles", "help", "man"];

/// Run meshctl in the pod of a node's meshd, through the API server.
///
/// All other arguments are meshctl's; see: kubectl meshd help. check, etcd-roles, policy test and policy explain
/// --offline run on this machine.
#[derive(Parser)]
#[command(name = "kubectl meshd", bin_name = "kubectl meshd", disable_help_subcommand = true)]
struct Plugin {
    /// Kubernetes node whose daemon is asked; default: the first node with a ready one
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// Namespace that meshd is installed in
    #[arg(short, long, default_value = "kube-system", value_name = "NAMESPACE")]
    namespace: String,
    /// Context of the kubeconfig
    #[arg(long, value_name = "CONTEXT")]
    context: Option<String>,
    /// Kubeconfig file of kubectl
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// meshctl's arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "COMMAND")]
    arguments: Vec<OsString>,
}

/// The arguments of meshctl that are to be run on this machine, its name first.
///
/// As a plugin that runs in a pod, it does not return.
///
/// # Errors
/// When there is no such pod, or kubectl fails.
pub(crate) fn local_arguments(arguments: Vec<OsString>) -> anyhow::Result<Vec<OsString>> {
    let is_plugin = arguments.first().is_some_and(|path| Path::new(path).file_name().is_some_and(|name| name == NAME));
    if !is_plugin {
        return Ok(arguments);
    }
    let plugin = Plugin::parse_from(arguments);
    if is_local(&plugin.arguments) {
        return Ok(std::iter::once(OsString::from("meshctl")).chain(plugin.arguments).collect());
    }
    let pod = plugin.pod()?;
    let mut command = plugin.kubectl();
    command.args(["exec", "--stdin", "--quiet", "--namespace", &pod.namespace, "--container", CONTAINER, &pod.name]);
    if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        command.arg("--tty");
    }
    command.args(["--", "meshctl"]).args(&plugin.arguments);
    Err(command.exec()).context("cannot run kubectl")
}

/// Whether these are for meshctl on this machine.
fn is_local(arguments: &[OsString]) -> bool {
    let words: Vec<&str> = arguments.iter().filter_map(|argument| argument.to_str()).collect();
    let asks = |word: &&str| ["--help", "-h", "--version", "-V"].contains(word);
    let offline = |word: &&str| *word == "--offline" || word.starts_with("--offline=");
    // Before the command stand options alone, of which these have a value.
    let mut rest = words.iter().copied();
    let command = loop {
        match rest.next() {
            Some("-o" | "--output" | "--run-dir") => drop(rest.next()),
            Some(option) if option.starts_with('-') => {}
            command => break command,
        }
    };
    words.iter().any(|word| asks(word) || offline(word))
        || command.is_some_and(|command| LOCAL.contains(&command))
        || (command == Some("policy") && rest.next() == Some("test"))
}

/// A pod of the daemon.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct DaemonPod {
    /// Ready pods sort first.
    not_ready: bool,
    node: String,
    namespace: String,
    name: String,
}

#[derive(Deserialize)]
struct PodList {
    items: Vec<DaemonPodObject>,
}

#[derive(Deserialize)]
struct DaemonPodObject {
    metadata: PodMetadata,
    #[serde(default)]
    spec: DaemonPodSpec,
    #[serde(default)]
    status: DaemonPodStatus,
}

#[derive(Deserialize)]
struct PodMetadata {
    name: String,
    namespace: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct DaemonPodSpec {
    node_name: String,
    containers: Vec<NamedContainer>,
}

#[derive(Deserialize)]
struct NamedContainer {
    name: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct DaemonPodStatus {
    phase: String,
    conditions: Vec<PodCondition>,
}

#[derive(Deserialize)]
struct PodCondition {
    r#type: String,
    status: String,
}

impl Plugin {
    fn kubectl(&self) -> Command {
        let mut command = Command::new("kubectl");
        if let Some(context) = &self.context {
            command.arg("--context").arg(context);
        }
        if let Some(file) = &self.kubeconfig {
            command.arg("--kubeconfig").arg(file);
        }
        command
    }

    fn pod(&self) -> anyhow::Result<DaemonPod> {
        let mut command = self.kubectl();
        // In one namespace: a user who may create pods in another could impersonate the daemon.
        command.args(["get", "pods", "--namespace", &self.namespace, "--selector", SELECTOR, "--output", "json"]);
        if let Some(node) = &self.node {
            command.args(["--field-selector", &format!("spec.nodeName={node}")]);
        }
        let output = command.output().context("cannot run kubectl")?;
        if !output.status.success() {
            bail!("kubectl get pods: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        let pod = choose(&output.stdout).context("kubectl get pods: unexpected output")?;
        pod.ok_or_else(|| match &self.node {
            Some(node) => Remedied {
                cause: format!("no pod of meshd in namespace {} runs on node {node}", self.namespace),
                remedy: format!("kubectl get pods -A -o wide -l {SELECTOR}, then --namespace"),
            }
            .into(),
            None => {
                let namespace = &self.namespace;
                NotFound(format!("no pod with the label {SELECTOR} runs in namespace {namespace}: see --namespace"))
                    .into()
            }
        })
    }
}

/// The first pod by node whose daemon is ready, else the first that runs.
fn choose(list: &[u8]) -> serde_json::Result<Option<DaemonPod>> {
    let PodList { items } = serde_json::from_slice(list)?;
    let runs = |pod: &DaemonPodObject| {
        pod.status.phase == "Running" && pod.spec.containers.iter().any(|container| container.name == CONTAINER)
    };
    let pods = items.into_iter().filter(runs).map(|pod| DaemonPod {
        not_ready: !pod.status.conditions.iter().any(|it| it.r#type == "Ready" && it.status == "True"),
        node: pod.spec.node_name,
        namespace: pod.metadata.namespace,
        name: pod.metadata.name,
    });
    Ok(pods.min())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use serde_json::json;

    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn the_command_line_holds_together() {
        Plugin::command().debug_assert();
        let plugin = Plugin::parse_from(words("kubectl-meshd --node e1 -o json status --check"));
        assert_eq!((plugin.node.as_deref(), plugin.arguments), (Some("e1"), words("-o json status --check")));
    }

    #[test]
    fn under_its_own_name_it_is_no_plugin() {
        let arguments = words("/usr/bin/meshctl --node status");
        assert_eq!(local_arguments(arguments.clone()).unwrap(), arguments);
    }

    #[test]
    fn what_needs_files_runs_on_this_machine() {
        for local in ["check config -", "policy test a.yaml", "policy explain --offline=x a b", "-o json etcd-roles"] {
            let called = words(&format!("/usr/local/bin/kubectl-meshd {local}"));
            assert_eq!(local_arguments(called).unwrap(), words(&format!("meshctl {local}")));
        }
        for remote in ["status", "policy list", "policy explain a b", "node remove check", "-o json ping man"] {
            assert!(!is_local(&words(remote)), "{remote}");
        }
    }

    #[test]
    fn the_first_node_with_a_ready_daemon_is_asked() {
        let pod = |name: &str, node: &str, phase: &str, ready: &str, container: &str| {
            json!({
                "metadata": {"name": name, "namespace": "kube-system"},
                "spec": {"nodeName": node, "containers": [{"name": "cni"}, {"name": container}]},
                "status": {"phase": phase, "conditions": [{"type": "Ready", "status": ready}]},
            })
        };
        let of = |items: Vec<serde_json::Value>| {
            choose(json!({"items": items}).to_string().as_bytes()).unwrap().map(|pod| pod.name)
        };
        let not_ready = pod("a", "n1", "Running", "False", "meshd");
        assert_eq!(of(vec![not_ready.clone()]).as_deref(), Some("a"));
        let well = [pod("c", "n3", "Running", "True", "meshd"), pod("b", "n2", "Running", "True", "meshd")];
        let others = [pod("d", "n0", "Pending", "True", "meshd"), pod("e", "n0", "Running", "True", "sync")];
        assert_eq!(of([vec![not_ready], well.to_vec(), others.to_vec()].concat()).as_deref(), Some("b"));
        assert_eq!(of(others.to_vec()), None);
    }
}
