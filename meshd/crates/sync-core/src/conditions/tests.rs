use std::net::IpAddr;

use etcd_schema::Readiness;
use serde_json::{Value, json};

use super::{object::TAINT, *};

const SECOND: Duration = Duration::from_secs(1);

/// A Node as an API server keeps it, to which patches are applied as it does.
fn node(name: &str, tainted: bool) -> Value {
    let mut taints = vec![json!({"key": "other", "effect": "NoExecute", "value": "x"})];
    taints.extend(tainted.then(|| json!({"key": TAINT, "effect": "NoSchedule"})));
    json!({
        "metadata": {"name": name, "resourceVersion": "7"}, "spec": {"taints": taints},
        "status": {
            "addresses": [{"type": "Hostname", "address": name}, {"type": "InternalIP", "address": address(name)}],
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
        },
    })
}

/// Of n3: 192.0.2.3.
fn address(name: &str) -> IpAddr {
    format!("192.0.2.{}", &name[1..]).parse().unwrap()
}

fn member(name: &str, readiness: Option<Readiness>) -> MeshNode {
    MeshNode {
        cluster: etcd_schema::Cluster::default(),
        id: format!("id-{name}").parse().unwrap(),
        name: name.to_owned(),
        addresses: vec![address(name)],
        runs: readiness.is_some(),
        reads_kubernetes: true,
        readiness,
    }
}

fn ready(name: &str) -> MeshNode {
    member(name, Some(Readiness::Ready))
}

fn unready(name: &str) -> MeshNode {
    member(name, Some(Readiness::NotReady { reason: "policy: late".to_owned() }))
}

/// A cluster and the machine that patches it.
struct Cluster {
    objects: BTreeMap<String, Value>,
    conditions: Conditions,
    now: Duration,
}

impl Cluster {
    fn new(objects: impl IntoIterator<Item = Value>) -> Self {
        let objects: BTreeMap<String, Value> = objects
            .into_iter()
            .map(|object| (object["metadata"]["name"].as_str().unwrap().to_owned(), object))
            .collect();
        let mut cluster = Self { objects, conditions: Conditions::default(), now: SECOND * 1000 };
        cluster.conditions.list_begun();
        cluster.tell();
        cluster.conditions.list_ended();
        cluster
    }

    fn tell(&mut self) {
        for object in self.objects.values() {
            self.conditions.applied(NodeConditions::read(&object.to_string()).unwrap());
        }
    }

    /// Applies the patches of so many seconds; returns the names of those that were patched.
    fn run(&mut self, seconds: u32, mesh: &[MeshNode]) -> Vec<String> {
        let mut patched = Vec::new();
        for _ in 0..seconds {
            self.now += SECOND;
            self.conditions.mesh(mesh.to_vec());
            for patch in self.conditions.step(self.now) {
                let object = self.objects.get_mut(&patch.node).unwrap();
                if let Some(conditioned) = &patch.conditions {
                    let body = conditioned.status_patch(&format!("second {}", self.now.as_secs()));
                    let conditions = object["status"]["conditions"].as_array_mut().unwrap();
                    for condition in body["status"]["conditions"].as_array().unwrap() {
                        conditions.retain(|held| held["type"] != condition["type"]);
                        if condition["$patch"] != "delete" {
                            conditions.push(condition.clone());
                        }
                    }
                }
                if let Some(untaint) = &patch.untaint {
                    let body = untaint.patch();
                    assert_eq!(body["metadata"]["resourceVersion"], object["metadata"]["resourceVersion"]);
                    object["spec"]["taints"] = body["spec"]["taints"].clone();
                }
                object["metadata"]["resourceVersion"] = self.now.as_secs().to_string().into();
                patched.push(patch.node);
            }
            self.tell();
        }
        patched
    }

    /// Status and reason of a condition.
    fn condition(&self, name: &str, of: &str) -> Option<(String, String)> {
        let conditions = self.objects[name]["status"]["conditions"].as_array().unwrap();
        let found = conditions.iter().find(|condition| condition["type"] == of)?;
        let text = |field: &str| found[field].as_str().unwrap().to_owned();
        Some((text("status"), text("reason")))
    }

    fn says(&self, name: &str, available: bool, reason: &str) -> bool {
        let status = |said: bool| Some((if said { "True" } else { "False" }.to_owned(), reason.to_owned()));
        self.condition(name, "NetworkUnavailable") == status(!available)
            && self.condition(name, "meshd.io/NetworkReady") == status(available)
    }

    fn taints(&self, name: &str) -> Vec<String> {
        let taints = self.objects[name]["spec"]["taints"].as_array().unwrap();
        taints.iter().map(|taint| taint["key"].as_str().unwrap().to_owned()).collect()
    }
}

#[test]
fn a_node_that_is_ready_says_so_and_loses_its_taint() {
    let mut cluster = Cluster::new([node("n1", true), node("n2", true), node("n3", true)]);
    let mut mesh = vec![ready("n1"), unready("n2"), member("n3", None)];
    assert_eq!(cluster.run(1, &mesh), ["n1"]);
    assert!(cluster.says("n1", true, "MeshdReady") && cluster.taints("n1") == ["other"]);
    assert_eq!(cluster.condition("n1", "Ready").unwrap().1, "KubeletReady", "others' conditions stay");
    assert_eq!(cluster.taints("n2"), ["other", TAINT]);
    assert_eq!(cluster.condition("n2", "NetworkUnavailable"), None);
    mesh[1] = ready("n2");
    assert_eq!(cluster.run(10, &mesh), ["n2"], "once");
}

#[test]
fn others_changes_are_undone() {
    let mut cluster = Cluster::new([node("n1", false)]);
    let mesh = [ready("n1")];
    cluster.run(10, &mesh);
    let changed = |version: u32| {
        let mut changed = node("n1", true);
        changed["metadata"]["resourceVersion"] = format!("other-{version}").into();
        changed
    };
    cluster.objects.insert("n1".to_owned(), changed(0));
    cluster.tell();
    cluster.run(1, &mesh);
    assert!(cluster.says("n1", true, "MeshdReady") && cluster.taints("n1") == ["other"]);
    // One that insists is answered at this pace.
    let mut answers = 0;
    for version in 1..=60 {
        cluster.objects.insert("n1".to_owned(), changed(version));
        cluster.tell();
        answers += cluster.run(1, &mesh).len();
    }
    assert!((10..=13).contains(&answers), "{answers}");
}

#[test]
fn a_node_that_stays_unready_says_so_and_a_restart_does_not() {
    let mut cluster = Cluster::new(["n1", "n2", "n3", "n4"].map(|name| node(name, false)));
    let well: Vec<MeshNode> = ["n1", "n2", "n3", "n4"].map(ready).to_vec();
    cluster.run(2, &well);
    let with = |node: MeshNode| {
        let mut mesh = well.clone();
        mesh[0] = node;
        mesh
    };
    assert_eq!(cluster.run(14, &with(unready("n1"))), [""; 0]);
    assert_eq!(cluster.run(1, &well), [""; 0]);
    assert_eq!(cluster.run(20, &with(unready("n1"))), ["n1"]);
    assert!(cluster.says("n1", false, "MeshdNotReady"));
    assert_eq!(cluster.run(1, &well), ["n1"]);
    // Without a daemon it takes longer.
    assert_eq!(cluster.run(59, &with(member("n1", None))), [""; 0]);
    assert_eq!(cluster.run(10, &with(member("n1", None))), ["n1"]);
    assert!(cluster.says("n1", false, "MeshdNotRunning"));
    // One that has just started, or is older, says nothing.
    let silent = MeshNode { runs: true, ..member("n1", None) };
    assert_eq!(cluster.run(100, &with(silent)), [""; 0]);
}

#[test]
fn what_is_not_known_or_true_of_many_changes_nothing() {
    let names = ["n1", "n2", "n3", "n4", "n5", "n6"];
    let mut cluster = Cluster::new(names.map(|name| node(name, false)));
    let well: Vec<MeshNode> = names.map(ready).to_vec();
    cluster.run(2, &well);
    let lost = |count: usize| -> Vec<MeshNode> {
        names.iter().enumerate().map(|(n, name)| if n < count { member(name, None) } else { ready(name) }).collect()
    };
    assert_eq!(cluster.run(300, &lost(3)), [""; 0], "more than a third");
    cluster.run(1, &well);
    assert_eq!(cluster.run(61, &lost(2)).len(), 2, "a third");
    cluster.run(10, &well);
    // etcd is away, and has no sign of life afterwards: the time counts from then.
    cluster.conditions.mesh_unknown();
    assert_eq!(cluster.conditions.step(cluster.now + SECOND * 600), []);
    cluster.run(50, &lost(1));
    cluster.conditions.mesh_unknown();
    assert_eq!(cluster.run(50, &lost(1)), [""; 0]);
}

#[test]
fn a_node_that_is_not_one_of_the_mesh_is_left_alone() {
    let elsewhere = MeshNode { addresses: vec!["198.51.100.1".parse().unwrap()], ..ready("n1") };
    let twice = [ready("n2"), MeshNode { id: "other".parse().unwrap(), ..ready("n2") }];
    let mut cluster = Cluster::new(["n1", "n2", "n3"].map(|name| node(name, true)));
    let mesh: Vec<MeshNode> = std::iter::once(elsewhere).chain(twice).collect();
    assert_eq!(cluster.run(100, &mesh), [""; 0]);
    // Nor is one that is gone from the API server.
    cluster.conditions.deleted("n2");
    cluster.objects.remove("n2");
    cluster.conditions.list_begun();
    cluster.conditions.list_ended();
    cluster.conditions.mesh(vec![ready("n1"), ready("n3")]);
    assert_eq!(cluster.conditions.step(SECOND * 5000), []);
}

#[test]
fn a_node_that_leaves_the_mesh_loses_its_conditions() {
    let names = ["n1", "n2", "n3"];
    let mut cluster = Cluster::new(names.map(|name| node(name, false)));
    let well: Vec<MeshNode> = names.map(ready).to_vec();
    cluster.run(2, &well);
    assert_eq!(cluster.run(59, &well[1..]), [""; 0]);
    assert_eq!(cluster.run(10, &well[1..]), ["n1"]);
    assert_eq!(cluster.condition("n1", "NetworkUnavailable"), None);
    assert_eq!(cluster.condition("n1", "meshd.io/NetworkReady"), None);
    assert_eq!(cluster.condition("n1", "Ready").unwrap().1, "KubeletReady");
    // An etcd that lost its records is no sign that all left.
    assert_eq!(cluster.run(300, &[]), [""; 0]);
}

#[test]
fn of_a_node_that_was_made_again_the_running_one_counts() {
    let mut cluster = Cluster::new([node("n1", true)]);
    let old = MeshNode { id: "old".parse().unwrap(), ..member("n1", None) };
    assert_eq!(cluster.run(1, &[old, ready("n1")]), ["n1"]);
    assert!(cluster.says("n1", true, "MeshdReady") && cluster.taints("n1") == ["other"]);
}

#[test]
fn a_condition_keeps_its_time_while_its_status_stays() {
    let mut cluster = Cluster::new(["n1", "n2", "n3"].map(|name| node(name, false)));
    let with = |reason: &str| {
        let readiness = Some(Readiness::NotReady { reason: reason.to_owned() });
        vec![member("n1", readiness), ready("n2"), ready("n3")]
    };
    cluster.run(30, &with("policy: late"));
    let time = |cluster: &Cluster| {
        let conditions = cluster.objects["n1"]["status"]["conditions"].as_array().unwrap().clone();
        let ours = conditions.iter().find(|condition| condition["type"] == "NetworkUnavailable").unwrap().clone();
        (ours["message"].as_str().unwrap().to_owned(), ours["lastTransitionTime"].as_str().unwrap().to_owned())
    };
    let (_, before) = time(&cluster);
    cluster.run(10, &with("subnet: none"));
    assert_eq!(time(&cluster), ("subnet: none".to_owned(), before));
    // While the watch stands still, nothing is said again and again.
    cluster.objects.insert("n1".to_owned(), node("n1", true));
    cluster.tell();
    let patches = (0..25).flat_map(|_| {
        cluster.now += SECOND;
        cluster.conditions.mesh(["n1", "n2", "n3"].map(ready).to_vec());
        cluster.conditions.step(cluster.now)
    });
    assert_eq!(patches.count(), 1);
}
