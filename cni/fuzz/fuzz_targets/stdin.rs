//! Anything on standard input, under every command that does not reach for the kernel with it: no panic, an error that
//! is JSON with a code, and a configuration that is accepted keeps its version.

#![no_main]

use cni::{config::Config, environment::Environment, identity, ipam, plugin, result::AddResult, version::CniVersion};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|stdin: &[u8]| {
    for command in ["VERSION", "ADD", "DEL", "CHECK", "NONE"] {
        // Without a container each of them ends before it does anything.
        let environment = Environment { command: command.to_owned(), ..Environment::default() };
        let outcome = plugin::run(&environment, stdin);
        let told: serde_json::Value = serde_json::from_str(&outcome.stdout).expect("JSON");
        assert_eq!(outcome.success, command == "VERSION");
        assert!(outcome.success || told["code"].as_u64().is_some_and(|code| code > 0));
    }
    let Ok(config) = Config::parse(stdin) else { return };
    assert!(CniVersion::ALL.contains(&config.version));
    let _ = ipam::configuration(&config, None);
    let pod = identity::pod(&Environment { container_id: "c".to_owned(), ..Environment::default() }, &config);
    assert!(config.pod.is_some() || pod.namespace == "default");
    if let Some(previous) = config.prev_result
        && let Ok(result) = serde_json::from_value::<AddResult>(previous)
    {
        for version in CniVersion::ALL {
            let shaped = result.to_json(version);
            assert!(serde_json::from_value::<AddResult>(shaped).is_ok());
        }
    }
});
