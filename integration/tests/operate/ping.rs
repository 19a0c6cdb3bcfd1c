//! How far packets get.
//!
//! ```text
//!   east1 (pod) ─┐                                 ┌─ west1 (pod)
//!                ├─ switch ──── router ──── switch ┤
//!   east2 (pod) ─┘                                 └─ west2 (pod)
//! ```

use serde_json::Value;

use crate::{SOON, json, mesh};

fn layer<'a>(ping: &'a Value, name: &str) -> &'a Value {
    let layers = ping["layers"].as_array().unwrap();
    layers.iter().find(|layer| layer["layer"] == name).unwrap_or_else(|| panic!("no {name} in {ping}"))
}

#[test]
fn every_layer_answers_by_either_path() {
    let mesh = mesh("ping", 2);
    let east1 = mesh.node("east1");
    east1.await_path("east2", "direct", SOON);
    let (direct, code) = json(east1, &["ping", "east2"]);
    assert_eq!((code, &direct["path"], &direct["reached"]), (0, &"direct".into(), &true.into()), "{direct}");
    assert_eq!(layer(&direct, "direct")["passes"], true);
    let pod = mesh.pod("west1").v6().to_string();
    let (tunnelled, code) = json(east1, &["ping", &pod, "--count", "2"]);
    assert_eq!((code, &tunnelled["peer"]), (0, &"west1".into()), "{tunnelled}");
    for name in ["udp", "wireguard", "overlay", "pod"] {
        assert_eq!(layer(&tunnelled, name)["passes"], true, "{name} of {tunnelled}");
    }
    assert!(layer(&tunnelled, "pod")["roundTrip"].as_f64().is_some_and(|seconds| seconds > 0.0), "{tunnelled}");
    assert_eq!(tunnelled["further"].as_array().map(Vec::len), Some(1));
    let (own, code) = json(east1, &["ping", "east1"]);
    assert_eq!((code, &own["reached"]), (0, &true.into()), "{own}");
    assert_eq!(east1.meshctl(&["ping", "nobody"]).code(), Some(5));
    assert_eq!(east1.meshctl(&["ping", "192.0.2.99"]).code(), Some(5));
    assert_eq!(east1.meshctl(&["ping", "a b"]).code(), Some(2));
    let table = east1.meshctl(&["ping", "west1", "--size"]).stdout;
    assert!(table.contains("wireguard") && table.contains("passes") && table.contains("up to 1420 bytes"), "{table}");
    let one = east1.meshctl(&["ping", "--size=56", "west1"]);
    assert!(one.success() && one.stdout.contains("a packet of 56 bytes gets through"), "{}", one.describe());
}

#[test]
fn the_layer_where_it_ends_is_named() {
    let mesh = mesh("ping-ends", 1);
    let (east1, west1) = (mesh.node("east1"), mesh.node("west1"));
    let router = &mesh.sites.router;
    // A hole: what is longer is lost without a word.
    router.nft(
        "table inet fault { chain forward { type filter hook forward priority 0; udp dport 51820 meta length > 1350 drop; }; }",
    );
    let (hole, code) = json(east1, &["ping", "west1", "--size"]);
    let longest = hole["size"]["longest"].as_u64().unwrap();
    assert!(code == 1 && (1200..1340).contains(&longest), "{hole}");
    // A firewall between the sites.
    router.nft("flush chain inet fault forward; add rule inet fault forward udp dport 51820 drop");
    let (closed, code) = json(east1, &["ping", "west1"]);
    let udp = layer(&closed, "udp");
    assert_eq!((code, &udp["passes"]), (1, &false.into()), "{closed}");
    assert!(udp["remedy"].as_str().unwrap().contains("open UDP 51820"), "{udp}");
    assert_eq!(layer(&closed, "overlay")["passes"], false);
    let skipped = east1.meshctl(&["ping", "--size", "west1"]);
    assert!(skipped.stdout.contains("--size were not tried on west1: it is not reached"), "{}", skipped.describe());
    router.nft("delete table inet fault");
    // A firewall on this very machine.
    east1
        .host()
        .nft("table inet fault { chain output { type filter hook output priority 0; udp dport 51820 drop; }; }");
    let (barred, _) = json(east1, &["ping", "west1"]);
    let udp = layer(&barred, "udp");
    assert!(udp["text"].as_str().unwrap().contains("a firewall on this machine"), "{udp}");
    assert!(udp["remedy"].as_str().unwrap().starts_with("nft list ruleset"), "{udp}");
    east1.host().nft("delete table inet fault");
    // Nobody is there.
    west1.kill9();
    let (away, code) = json(east1, &["ping", "west1"]);
    assert_eq!(code, 1);
    assert!(layer(&away, "udp")["text"].as_str().unwrap().contains("nobody listens"), "{away}");
}
