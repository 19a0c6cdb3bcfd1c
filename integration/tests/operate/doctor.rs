//! Faults are named, with the command that mends them: each is made, seen, mended by what was printed, and gone.

mod etcd;
mod machine;
mod network;

use integration::{MeshdNode, await_ok};
use serde_json::Value;

use crate::{SOON, json};

fn findings(node: &MeshdNode) -> Vec<Value> {
    json(node, &["doctor"]).0["findings"].as_array().unwrap().clone()
}

#[track_caller]
fn await_named(node: &MeshdNode, code: &str) -> Value {
    await_ok(&format!("{code} to be named"), SOON, || {
        let all = findings(node);
        all.iter().find(|finding| finding["code"] == code).cloned().ok_or_else(|| format!("{all:?}"))
    })
}

#[track_caller]
fn await_gone(node: &MeshdNode, code: &str) {
    await_ok(&format!("{code} to be gone"), SOON, || {
        let all = findings(node);
        if all.iter().any(|finding| finding["code"] == code) { Err(format!("{all:?}")) } else { Ok(()) }
    });
}

/// Sees the fault named, does what the remedy says, and sees it gone.
#[track_caller]
fn mends(node: &MeshdNode, code: &str) {
    let remedy = await_named(node, code)["remedy"].as_str().unwrap().to_owned();
    node.host().run_args(&["sh", "-c", &remedy]);
    await_gone(node, code);
}

#[track_caller]
fn await_well(node: &MeshdNode) {
    await_ok("nothing to be wrong", SOON, || {
        let (examined, code) = json(node, &["doctor"]);
        if code == 0 { Ok(()) } else { Err(examined.to_string()) }
    });
}
