//! `meshd-cni`, run by a container runtime.

use std::{
    io::{self, Read as _, Write as _},
    process::ExitCode,
};

use cni::{config::MAX_BYTES, environment::Environment, plugin};

fn main() -> ExitCode {
    let environment = Environment::of_process();
    let mut stdin = Vec::new();
    if let Err(error) = io::stdin().take(MAX_BYTES as u64 + 1).read_to_end(&mut stdin) {
        // What was read is not all: it is refused as what it is, no configuration.
        stdin.clear();
        let _ = writeln!(io::stderr(), "meshd-cni: standard input: {error}");
    }
    let outcome = plugin::run(&environment, &stdin);
    // A runtime that has gone away wants no answer.
    let told = outcome.stdout.is_empty() || writeln!(io::stdout(), "{}", outcome.stdout).is_ok();
    if outcome.success && told { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
