//! Pods that answer and ask.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use integration::{Output, Process, await_ok};
use serde_json::{Value, json};

use crate::{
    SOON,
    fixture::{Cluster, condition, name},
};

/// Answers HTTP on port 8080, and has a shell, curl and ping.
pub(crate) const IMAGE: &str = "registry.k8s.io/e2e-test-images/agnhost:2.56";
pub(crate) const PORT: u16 = 8080;

/// A Pod in a namespace with labels `app=APP`, on a node.
pub(crate) fn pod(namespace: &str, pod: &str, app: &str, node: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": namespace, "name": pod, "labels": {"app": app}},
        "spec": {"nodeSelector": {"kubernetes.io/hostname": node}, "terminationGracePeriodSeconds": 0,
            "enableServiceLinks": false, "containers": [container()]}})
}

pub(crate) fn container() -> Value {
    json!({"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "args": ["netexec", "--http-port=8080"],
        "ports": [{"name": "http", "containerPort": PORT}],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": PORT}, "periodSeconds": 1}})
}

/// How a client in a pod saw its request answered.
pub(crate) struct Probe {
    process: Process,
}

/// One request: when it began, and whether it was answered.
pub(crate) type Attempt = (Duration, bool);

impl Cluster {
    /// Puts a namespace; its service account is there when this returns.
    #[track_caller]
    pub(crate) fn create_namespace(&self, namespace: &str) {
        self.api.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}).to_string());
        await_ok("the service account", SOON, || {
            let accounts = self.api.list("serviceaccounts");
            accounts.iter().find(|one| one["metadata"]["namespace"] == namespace).map(|_| ()).ok_or_else(String::new)
        });
    }

    /// Puts objects.
    #[track_caller]
    pub(crate) fn apply(&self, objects: &[Value]) {
        self.api.apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string());
    }

    /// Waits until all pods of a namespace are Ready, at least this many; returns name and IPv4 address of each.
    #[track_caller]
    pub(crate) fn await_pods(&self, namespace: &str, count: usize) -> Vec<(String, String)> {
        await_ok(&format!("{count} pods to be Ready"), SOON, || {
            let pods = self.pods(namespace);
            let ready = |pod: &&Value| condition(pod, "Ready") == Some("True");
            let ready: Vec<&Value> = pods.iter().filter(ready).collect();
            if ready.len() == pods.len() && pods.len() >= count {
                let pair = |pod: &&Value| (name(pod).unwrap().to_owned(), address(pod).unwrap());
                return Ok(ready.iter().map(pair).collect());
            }
            let waiting = pods.iter().filter(|pod| condition(pod, "Ready") != Some("True"));
            Err(waiting.map(|pod| format!("{}\n", pod["status"])).collect())
        })
    }

    pub(crate) fn pods(&self, namespace: &str) -> Vec<Value> {
        let pods = self.get(&format!("pods -n {namespace}"));
        pods["items"].as_array().unwrap().clone()
    }

    /// The IPv4 address of a pod.
    #[track_caller]
    pub(crate) fn address(&self, namespace: &str, pod: &str) -> String {
        address(&self.get(&format!("pod -n {namespace} {pod}"))).unwrap()
    }

    /// Runs a script in a pod.
    #[track_caller]
    pub(crate) fn exec(&self, namespace: &str, pod: &str, script: &str) -> Output {
        self.api.try_kubectl(&["-n", namespace, "exec", pod, "--", "sh", "-c", script], "")
    }

    /// What `pod` gets of an HTTP server: its answer, or why it sends no answer.
    #[track_caller]
    pub(crate) fn ask(&self, namespace: &str, pod: &str, url: &str) -> Result<String, String> {
        let output = self.exec(namespace, pod, &format!("curl -g -sS -m 3 http://{url}"));
        if output.success() { Ok(output.stdout) } else { Err(output.describe()) }
    }

    /// Waits for the answer that `wanted` names.
    #[track_caller]
    pub(crate) fn await_answer(&self, namespace: &str, pod: &str, url: &str, wanted: &str) {
        await_ok(&format!("{pod} to get {wanted} of {url}"), SOON, || {
            let got = self.ask(namespace, pod, url)?;
            if got == wanted { Ok(()) } else { Err(got) }
        });
    }

    /// Asks again and again from a pod, until the probe is dropped.
    #[track_caller]
    pub(crate) fn probe(&self, namespace: &str, pod: &str, url: &str) -> Probe {
        let script = format!(
            "while :; do at=$(date +%s%3N); if curl -s -o /dev/null -m 1 http://{url}; then echo $at yes; else echo $at no; fi; sleep 0.05; done"
        );
        let process = self.api.spawn_kubectl(&["-n", namespace, "exec", pod, "--", "sh", "-c", &script]);
        let probe = Probe { process };
        await_ok("a first request", SOON, || probe.attempts().first().map(|_| ()).ok_or_else(|| probe.process.log()));
        probe
    }
}

impl Probe {
    /// All so far.
    pub(crate) fn attempts(&self) -> Vec<Attempt> {
        let log = self.process.log();
        let attempt = |line: &str| {
            let (at, answered) = line.split_once(' ')?;
            Some((Duration::from_millis(at.parse().ok()?), answered == "yes"))
        };
        log.lines().filter_map(attempt).collect()
    }

    /// Waits until a request that began after `since` is answered, or is not; returns how long after that it began.
    #[track_caller]
    pub(crate) fn await_change(&self, what: &str, since: Duration, answered: bool) -> Duration {
        await_ok(what, SOON, || {
            let attempts = self.attempts();
            let found = attempts.iter().find(|(at, yes)| *at >= since && *yes == answered);
            found.map(|(at, _)| *at - since).ok_or_else(|| format!("{:?}", attempts.last()))
        })
    }
}

/// Since 1970, as `date` counts.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

fn address(pod: &Value) -> Option<String> {
    let addresses = pod["status"]["podIPs"].as_array()?;
    let v4 = addresses.iter().filter_map(|one| one["ip"].as_str()).find(|ip| !ip.contains(':'))?;
    Some(v4.to_owned())
}
