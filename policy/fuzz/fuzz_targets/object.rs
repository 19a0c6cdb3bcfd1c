//! Any bytes as a policy or pod: reading must not panic, and what holds must compile.
//! Run with `cargo +nightly fuzz run object` in `policy/`.
#![no_main]

use etcd_schema::Key;
use libfuzzer_sys::fuzz_target;
use policy::{
    engine::{Engine, ObjectName, PolicyState},
    object::{ClusterPolicy, NetworkPolicy, namespace_from, pod_from},
    objects,
};

const KEYS: [&str; 4] = ["namespaces/a", "pods/a/p", "networkpolicies/a/p", "clusternetworkpolicies/c"];

fuzz_target!(|bytes: &[u8]| {
    for key in KEYS {
        let Ok(Key::Kubernetes(_, key)) = key.parse() else { panic!("{key}") };
        let Ok(reading) = objects::read(&key, bytes, true) else { continue };
        let again = objects::read(&key, &reading.canonical, true).expect("the canonical form holds");
        assert_eq!((again.object, again.canonical), (reading.object, reading.canonical));
    }
    let Ok(value) = serde_json::from_slice(bytes) else { return };
    let mut engine = Engine::new();
    if let Ok((namespace, name, pod)) = pod_from(&value) {
        engine.put_pod(ObjectName::new(namespace, name), pod, 1);
    }
    if let Ok((name, labels)) = namespace_from(&value) {
        engine.put_namespace(&Default::default(), &name, labels);
    }
    match NetworkPolicy::parse(&value) {
        Ok(policy) => engine.put_policy(ObjectName::new("a", "p"), &PolicyState::Valid(policy)),
        Err(invalid) => assert!(!invalid.violations.as_slice().is_empty()),
    }
    match ClusterPolicy::parse(&value) {
        Ok(policy) => engine.put_cluster_policy(ObjectName::new("", "c"), &policy),
        Err(invalid) => assert!(!invalid.violations.as_slice().is_empty()),
    }
    engine.commit(1);
});
