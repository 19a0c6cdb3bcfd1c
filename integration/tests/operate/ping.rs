//! How far packets get.
//!
//! ```text
//!   east1 (pod) ─┐                                 ┌─ west1 (pod)
//!                ├─ switch ──── router ──── switch ┤
//!   east2 (pod) ─┘                                 └─ west2 (pod)
//! ```

use integration::{MeshdNode, await_ok};
use serde_json::Value;

use crate::{SOON, json, mesh};

fn layer<'a>(ping: &'a Value, name: &str) -> &'a Value {
    find_layer(ping, name).unwrap_or_else(|| panic!("no {name} in {ping}"))
}

fn find_layer<'a>(ping: &'a Value, name: &str) -> Option<&'a Value> {
    ping["layers"].as_array()?.iter().find(|layer| layer["layer"] == name)
}

fn passes(ping: &Value, name: &str) -> bool {
    find_layer(ping, name).is_some_and(|layer| layer["passes"] == true)
}

/// Whether the line about UDP has these words.
fn udp_says(ping: &Value, words: &str) -> bool {
    find_layer(ping, "udp").and_then(|udp| udp["text"].as_str()).is_some_and(|text| text.contains(words))
}

/// Asks until the answer and the exit code are as wanted: an echo that a busy machine holds up counts as none.
#[track_caller]
fn await_answer(node: &MeshdNode, args: &[&str], is: impl Fn(&Value, i32) -> bool) -> Value {
    await_ok(&args.join(" "), SOON, || {
        let (answer, code) = json(node, args);
        if is(&answer, code) { Ok(answer) } else { Err(format!("{code}: {answer}")) }
    })
}

#[test]
fn every_layer_answers_by_either_path() {
    let mesh = mesh("ping", 2);
    let east1 = mesh.node("east1");
    east1.await_path("east2", "direct", SOON);
    let direct = await_answer(east1, &["ping", "east2"], |direct, code| {
        code == 0 && direct["path"] == "direct" && passes(direct, "direct")
    });
    assert_eq!(direct["reached"], true, "{direct}");
    let pod = mesh.pod("west1").v6().to_string();
    let tunnelled = await_answer(east1, &["ping", &pod, "--count", "2"], |tunnelled, code| {
        code == 0 && ["udp", "wireguard", "overlay", "pod"].iter().all(|name| passes(tunnelled, name))
    });
    assert_eq!(tunnelled["peer"], "west1", "{tunnelled}");
    assert!(layer(&tunnelled, "pod")["roundTrip"].as_f64().is_some_and(|seconds| seconds > 0.0), "{tunnelled}");
    assert_eq!(tunnelled["further"].as_array().map(Vec::len), Some(1));
    let (own, code) = json(east1, &["ping", "east1"]);
    assert_eq!((code, &own["reached"]), (0, &true.into()), "{own}");
    assert_eq!(east1.meshctl(&["ping", "nobody"]).code(), Some(5));
    assert_eq!(east1.meshctl(&["ping", "192.0.2.99"]).code(), Some(5));
    assert_eq!(east1.meshctl(&["ping", "a b"]).code(), Some(2));
    await_ok("a table with the longest packet", SOON, || {
        let table = east1.meshctl(&["ping", "west1", "--size"]);
        let words = ["wireguard", "passes", "up to 1420 bytes"];
        if words.iter().all(|word| table.stdout.contains(word)) { Ok(()) } else { Err(table.describe()) }
    });
    await_ok("one short packet to get through", SOON, || {
        let one = east1.meshctl(&["ping", "--size=56", "west1"]);
        let passes = one.success() && one.stdout.contains("a packet of 56 bytes gets through");
        if passes { Ok(()) } else { Err(one.describe()) }
    });
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
    await_answer(east1, &["ping", "west1", "--size"], |hole, code| {
        code == 1 && hole["size"]["longest"].as_u64().is_some_and(|longest| (1200..1340).contains(&longest))
    });
    // A firewall between the sites.
    router.nft("flush chain inet fault forward; add rule inet fault forward udp dport 51820 drop");
    let (closed, code) = json(east1, &["ping", "west1"]);
    let udp = layer(&closed, "udp");
    assert_eq!((code, &udp["passes"]), (1, &false.into()), "{closed}");
    assert!(udp["remedy"].as_str().unwrap().contains("open UDP port 51820"), "{udp}");
    assert_eq!(layer(&closed, "overlay")["passes"], false);
    let skipped = east1.meshctl(&["ping", "--size", "west1"]);
    assert!(skipped.stdout.contains("--size were not tried on west1: it is unreachable"), "{}", skipped.describe());
    router.nft("delete table inet fault");
    // A firewall on this very machine.
    east1
        .host()
        .nft("table inet fault { chain output { type filter hook output priority 0; udp dport 51820 drop; }; }");
    let barred = await_answer(east1, &["ping", "west1"], |barred, _| udp_says(barred, "a firewall on this machine"));
    let udp = layer(&barred, "udp");
    assert!(udp["remedy"].as_str().unwrap().starts_with("nft list ruleset"), "{udp}");
    east1.host().nft("delete table inet fault");
    // Nobody is there.
    west1.kill9();
    await_answer(east1, &["ping", "west1"], |away, code| code == 1 && udp_says(away, "no process is listening"));
}
