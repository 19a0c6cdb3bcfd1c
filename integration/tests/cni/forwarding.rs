//! Hosts whose new interfaces do not forward, and one whose underlay does not.
//!
//! ```text
//!   east1 (near) ─┬─ switch ── router ── switch ── west1 (far)
//!   east2 (peer) ─┘              └── etcd
//! ```

use integration::{CniFailure, MeshdNode, await_ok, await_until};
use serde_json::{Value, json};

use crate::{Nodes, SOON, await_reaches, pod_interfaces};

const FORWARDING: [&str; 2] = ["net/ipv4/conf/default/forwarding", "net/ipv6/conf/default/forwarding"];

fn forwarding(interface: &str) -> String {
    format!("net/ipv4/conf/{interface}/forwarding")
}

fn await_forwards(node: &MeshdNode, interface: &str) {
    await_ok(&format!("{interface} to forward"), SOON, || {
        let value = node.host().read_sysctl(&forwarding(interface));
        if value.trim() == "1" { Ok(()) } else { Err(value) }
    });
}

fn named(list: &Value, code: &str) -> Option<Value> {
    list.as_array().into_iter().flatten().find(|one| one["code"] == code).cloned()
}

/// CHECK between two repairs: another program keeps taking the setting away, faster than the daemon puts it back.
#[track_caller]
fn assert_check_names_what_does_not_forward(
    node: &MeshdNode,
    interface: &str,
    check: impl Fn() -> Result<(), CniFailure>,
) {
    let key = forwarding(interface);
    let program = format!("while :; do echo 0 >/proc/sys/{key}; done");
    let other = node.host().spawn("sh", &["-c", &program]);
    let named = format!("net.ipv4.conf.{interface}.forwarding is 0");
    await_ok("CHECK to name the setting", SOON, || match check() {
        Err(failure) if failure.code() == Some(105) && failure.to_string().contains(&named) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    other.kill9();
    await_forwards(node, interface);
    check().unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn interfaces_of_the_mesh_forward_whatever_the_default_is_and_the_underlays_is_named() {
    let mesh = Nodes::start("cni-forwarding", 2, 1);
    let east1 = &mesh.nodes[0];
    for node in &mesh.nodes {
        for key in FORWARDING {
            node.host().sysctl(key, "0");
        }
        // A device that comes after the setting.
        node.host().ip(&[&format!("link delete {}", node.interface())]);
        await_until("the device to be made again", SOON, || {
            node.host().try_run(&["ip", "link", "show", node.interface()]).success().then_some(())
        });
    }
    let networks: Vec<_> = mesh.nodes.iter().map(|node| node.cni("1.1.0", &json!({}))).collect();
    let (near, peer, far) = (networks[0].pod("near"), networks[1].pod("peer"), networks[2].pod("far"));
    let bridge = east1.cni("1.1.0", &json!({"mode": "bridge"}));
    let bridged = bridge.pod("bridged");
    for (from, to) in [(&near, &far), (&far, &near), (&near, &peer), (&peer, &near), (&bridged, &far), (&far, &bridged)]
    {
        await_reaches(from, to);
    }
    east1.await_path("east2", "direct", SOON);

    // Taken away, it comes back.
    let interface = pod_interfaces(east1).into_iter().find(|name| {
        let routes = east1.host().run(&format!("ip route show {} dev {name}", near.v4())).stdout;
        !routes.is_empty()
    });
    let interface = interface.unwrap();
    for device in [&*interface, east1.interface(), "meshbr0"] {
        east1.host().sysctl(&forwarding(device), "0");
        await_forwards(east1, device);
    }
    networks[0].check("near", &near).unwrap_or_else(|failure| panic!("{failure}"));
    await_reaches(&near, &far);
    assert_check_names_what_does_not_forward(east1, &interface, || networks[0].check("near", &near));
    assert_check_names_what_does_not_forward(east1, "meshbr0", || bridge.check("bridged", &bridged));
    await_reaches(&near, &far);

    // The underlay's own setting is the operator's: it is named with its remedy, and nothing says that all is well.
    east1.host().sysctl(&forwarding("eth0"), "0");
    let status = east1
        .await_status("to name the setting", SOON, |status| named(&status["problems"], "forwarding_off").is_some());
    let remedy = named(&status["problems"], "forwarding_off").unwrap()["remedy"].as_str().unwrap().to_owned();
    assert_eq!(remedy, "sysctl -w net.ipv4.conf.eth0.forwarding=1");
    let doctor = east1.meshctl(&["-o", "json", "doctor"]);
    let found: Value = serde_json::from_str(&doctor.stdout).unwrap();
    assert_eq!(named(&found["findings"], "forwarding_off").unwrap()["remedy"], remedy.as_str(), "{found}");
    assert_eq!(found["findings"].as_array().unwrap().iter().filter(|one| one["code"] == "forwarding_off").count(), 1);
    let pinged = east1.meshctl(&["ping", "east2"]);
    assert!(!pinged.success() && pinged.stdout.contains(&remedy), "{}", pinged.describe());
    east1.host().run_args(&["sh", "-c", &remedy]);
    east1.await_status("to be well", SOON, |status| status["state"] == "running");
    await_ok("east2 to be reached", SOON, || {
        let pinged = east1.meshctl(&["ping", "east2"]);
        if pinged.success() { Ok(()) } else { Err(pinged.describe()) }
    });

    // A rule that takes what is forwarded, and nothing of the node's own: only a forwarded packet shows it.
    east1.host().run(&format!("ip rule add iif {interface} to 10.244.0.0/16 priority 100 prohibit"));
    let pinged = east1.meshctl(&["ping", "east2"]);
    assert!(!pinged.success() && pinged.stdout.contains("iif"), "{}", pinged.describe());
    let doctor = east1.meshctl(&["doctor"]);
    assert!(doctor.stdout.contains("not_forwarded"), "{}", doctor.describe());
    east1.host().run("ip rule delete priority 100");
    await_reaches(&near, &far);
}
