//! `meshd-cni`: the entry point for container runtimes.

use std::{
    io::{self, Read as _, Write as _},
    process::ExitCode,
};

use cni::{config::MAX_BYTES, environment::Environment, plugin};

/// Printed for `--help`; a runtime passes no arguments.
const HELP: &str = "\
meshd-cni is the CNI plugin of meshd. Container runtimes run it with CNI_* variables and a configuration on standard input.
Install it with meshd install-cni. docs/cni.md of meshd describes its configuration.";

/// The version, with the commit that `make build` was run at.
const VERSION: &str = match option_env!("MESHD_BUILD") {
    Some(build) => build,
    None => env!("CARGO_PKG_VERSION"),
};

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("--help" | "-h" | "help") => return say(HELP),
        Some("--version" | "-V") => return say(&format!("meshd-cni {VERSION}")),
        _ => {}
    }
    let environment = Environment::of_process();
    let mut stdin = Vec::new();
    if let Err(error) = io::stdin().take(MAX_BYTES as u64 + 1).read_to_end(&mut stdin) {
        // The input is incomplete, and refused as an invalid configuration.
        stdin.clear();
        let _ = writeln!(io::stderr(), "meshd-cni: standard input: {error}");
    }
    let outcome = plugin::run(&environment, &stdin);
    // A runtime that has gone away wants no answer.
    let told = outcome.stdout.is_empty() || writeln!(io::stdout(), "{}", outcome.stdout).is_ok();
    if outcome.success && told { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn say(text: &str) -> ExitCode {
    // A reader that closes the pipe early has had enough.
    let _ = writeln!(io::stdout(), "{text}");
    ExitCode::SUCCESS
}
