//! The commands.

mod add;
mod chained;
mod check;
mod del;
mod gc;
mod status;

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{
    config::{self, Config},
    delegate::Delegate,
    environment::{AttachmentName, CniCommand, Environment},
    error::{CniError, Code, WireError},
    host_local,
    ipam::{self, AddressSource},
    version::CniVersion,
};

/// The plugin's answer to the runtime: standard output and success.
#[derive(Debug)]
pub struct PluginOutput {
    /// JSON; empty when there is nothing to say.
    pub stdout: String,
    /// Whether the command succeeded.
    pub success: bool,
}

/// Runs the command that the environment names, with this configuration.
#[must_use]
pub fn run(environment: &Environment, stdin: &[u8]) -> PluginOutput {
    let raw: Option<Map<String, Value>> = serde_json::from_slice(stdin).ok();
    // The shape of an error is that of the configuration's version, as far as it is known.
    let version = raw.and_then(|raw| config::version(&raw).ok()).unwrap_or(CniVersion::V1_1_0);
    match command(environment, stdin) {
        Ok(None) => PluginOutput { stdout: String::new(), success: true },
        Ok(Some(json)) => PluginOutput { stdout: json.to_string(), success: true },
        Err(error) => {
            let wire: WireError = error.to_wire(version);
            let stdout = serde_json::to_string(&wire).unwrap_or_default();
            PluginOutput { stdout, success: false }
        }
    }
}

fn command(environment: &Environment, stdin: &[u8]) -> Result<Option<Value>, CniError> {
    let command = environment.command()?;
    if command == CniCommand::Version {
        return Ok(Some(versions(stdin)));
    }
    let config = Config::parse(stdin)?;
    let since = match command {
        CniCommand::Check => CniVersion::V0_4_0,
        CniCommand::Status | CniCommand::Gc => CniVersion::V1_1_0,
        _ => CniVersion::V0_3_1,
    };
    if config.version < since {
        let message = format!("{} exists since version {since}", environment.command);
        return Err(CniError::new(Code::IncompatibleVersion, message));
    }
    let call = Invocation { environment, config: &config };
    match command {
        CniCommand::Version => Ok(None),
        CniCommand::Add if config.is_chained() => chained::add(&call).map(Some),
        CniCommand::Add => add::add(&call).map(Some),
        CniCommand::Del => del::del(&call).map(|()| None),
        CniCommand::Check => check::check(&call).map(|()| None),
        CniCommand::Status => status::status(&call).map(|()| None),
        CniCommand::Gc => gc::gc(&call).map(|()| None),
    }
}

/// Inputs of one command.
struct Invocation<'a> {
    environment: &'a Environment,
    config: &'a Config,
}

impl Invocation<'_> {
    fn run_dir(&self) -> &Path {
        &self.config.run_dir
    }

    /// The IPAM plugin, if the configuration names one.
    fn delegate(&self) -> Result<Option<Delegate>, CniError> {
        match ipam::source(self.config) {
            AddressSource::Daemon => Ok(None),
            AddressSource::Plugin(kind) => Delegate::find(kind, self.environment, self.run_dir()).map(Some),
        }
    }

    /// Releases the addresses of an attachment that the daemon does not manage: those of an IPAM plugin, and those of
    /// host-local below the run directory.
    fn free_addresses(&self, name: &AttachmentName) -> Result<(), CniError> {
        let Some(delegate) = self.delegate()? else {
            return self.free_host_locals(|holder| holder == name);
        };
        let environment = Environment {
            container_id: name.container_id.clone(),
            ifname: name.ifname.clone(),
            ..self.environment.clone()
        };
        delegate.call("DEL", &environment, ipam::configuration(self.config, None)?).map(drop)
    }

    fn free_host_locals(&self, gone: impl Fn(&AttachmentName) -> bool) -> Result<(), CniError> {
        let freed = host_local::give_back(self.run_dir(), &self.config.name, gone);
        freed.map(drop).map_err(|error| {
            CniError::new(Code::Io, format!("{}: {error}", host_local::folder(self.run_dir()).display()))
        })
    }
}

/// The answer to VERSION. Of standard input, only the version to echo is read.
fn versions(stdin: &[u8]) -> Value {
    let asked: Option<Map<String, Value>> = serde_json::from_slice(stdin).ok();
    let asked = asked.and_then(|raw| config::version(&raw).ok()).unwrap_or(CniVersion::V1_1_0);
    json!({"cniVersion": asked, "supportedVersions": CniVersion::ALL})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_with(command: &str, stdin: &str) -> (bool, Value) {
        let environment = Environment { command: command.to_owned(), ..Environment::default() };
        let outcome = run(&environment, stdin.as_bytes());
        (outcome.success, serde_json::from_str(&outcome.stdout).unwrap())
    }

    #[test]
    fn version_tells_all_of_them() {
        let (success, told) = run_with("VERSION", r#"{"cniVersion": "0.4.0"}"#);
        assert!(success);
        assert_eq!(told, json!({"cniVersion": "0.4.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}));
        assert!(run_with("VERSION", "").0);
    }

    #[test]
    fn errors_are_on_standard_output_with_their_code() {
        let config = |version: &str| format!(r#"{{"cniVersion": "{version}", "name": "mesh", "type": "meshd-cni"}}"#);
        for (command, stdin, code) in [
            ("", config("1.0.0"), 4),
            ("ADD", "{".to_owned(), 6),
            ("ADD", config("9.9.9"), 1),
            ("CHECK", config("0.3.1"), 1),
            ("STATUS", config("1.0.0"), 1),
            ("GC", config("0.4.0"), 1),
            ("ADD", config("0.4.0"), 4),
            ("DEL", config("0.4.0"), 4),
        ] {
            let (success, told) = run_with(command, &stdin);
            assert!(!success, "{command}");
            assert_eq!(told["code"], code, "{command} {stdin}: {told}");
            assert!(told["msg"].as_str().is_some_and(|msg| !msg.is_empty()));
        }
        assert_eq!(run_with("ADD", &config("0.4.0")).1["cniVersion"], "0.4.0");
    }
}
