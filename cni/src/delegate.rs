//! Calls another plugin: the IPAM plugin of the configuration.

use std::{
    fs, io,
    io::{Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, Command as Process, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use atomic_file::{FileError, Folder};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    environment::Environment,
    error::{CniError, Code, WireError},
    log::log,
    version::CniVersion,
};

/// How long a plugin may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// Longest answer that is read.
const MAX_ANSWER: u64 = 4 << 20;
/// Name of the folder in the run directory that remembers which versions a plugin speaks.
const VERSIONS: &str = "delegates";

/// A plugin that was found.
#[derive(Debug, Clone)]
pub struct Delegate {
    program: PathBuf,
    /// The highest version that it speaks and this plugin, too.
    version: CniVersion,
}

#[derive(Deserialize)]
struct Spoken {
    #[serde(rename = "supportedVersions", default)]
    supported: Vec<String>,
}

impl Delegate {
    /// Finds the plugin `kind` (the configuration's `type`) and asks for its versions. They are remembered in `run_dir`
    /// for as long as the file is the same.
    ///
    /// # Errors
    /// [`Code::InvalidConfig`] when there is no such plugin, [`Code::IncompatibleVersion`], [`Code::NoAddress`].
    pub fn find(kind: &str, environment: &Environment, run_dir: &Path) -> Result<Self, CniError> {
        // A name, never a path: the configuration must not choose an arbitrary program.
        let is_name = !kind.is_empty() && kind.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !is_name || kind.starts_with('.') {
            let shown: String = kind.chars().take(64).collect();
            return Err(CniError::new(Code::InvalidConfig, format!("type {shown:?} is not a valid plugin name")));
        }
        let program = environment.plugin_dirs().map(|dir| dir.join(kind)).find(|path| path.is_file());
        let program = program.ok_or_else(|| {
            CniError::new(Code::InvalidConfig, format!("plugin {kind} not found in CNI_PATH"))
                .details(format!("{}; on Debian, install containernetworking-plugins", environment.path))
        })?;
        let file = file_of(kind, &program);
        if let Some(version) = file.as_deref().and_then(|file| remembered(run_dir, file)) {
            return Ok(Self { program, version });
        }
        let asked = run(&program, "VERSION", environment, &format!("{{\"cniVersion\":\"{}\"}}", CniVersion::V1_0_0))?;
        let spoken: Spoken = serde_json::from_slice(&asked).map_err(|error| {
            CniError::new(Code::NoAddress, format!("plugin {kind} does not report its versions: {error}"))
        })?;
        let version = CniVersion::highest_common(spoken.supported.iter().map(String::as_str)).ok_or_else(|| {
            let theirs = spoken.supported.join(", ");
            CniError::new(
                Code::IncompatibleVersion,
                format!(
                    "plugin {kind} and meshd-cni have no CNI version in \
                     common"
                ),
            )
            .details(theirs)
        })?;
        if let Some(file) = file {
            remember(run_dir, &file, version);
        }
        Ok(Self { program, version })
    }

    /// The highest version that both speak.
    #[must_use]
    pub const fn version(&self) -> CniVersion {
        self.version
    }

    /// Calls the plugin; `config` gets the common version.
    ///
    /// # Errors
    /// The plugin's own error as [`Code::NoAddress`], or [`Code::TryAgainLater`] when that is what it says.
    pub fn call(
        &self,
        command: &str,
        environment: &Environment,
        mut config: Map<String, Value>,
    ) -> Result<Vec<u8>, CniError> {
        config.insert("cniVersion".to_owned(), self.version.as_str().into());
        run(&self.program, command, environment, &Value::Object(config).to_string())
    }
}

/// The name under which the version of this very file is remembered; `None` when it cannot be looked at.
fn file_of(kind: &str, program: &Path) -> Option<String> {
    let data = fs::metadata(program).ok()?;
    Some(format!("{kind}-{:x}-{:x}-{:x}-{:x}", data.dev(), data.ino(), data.size(), data.ctime_nsec()))
}

fn remembered(run_dir: &Path, file: &str) -> Option<CniVersion> {
    let read = Folder::open(run_dir).map_err(FileError::from).and_then(|run| run.folder(VERSIONS)?.read(file, 64));
    match read {
        Ok(version) => String::from_utf8(version).ok()?.trim().parse().ok(),
        Err(error) => {
            if !error.is_not_found() {
                log(&format!("{}: {error}", run_dir.join(VERSIONS).display()));
            }
            None
        }
    }
}

/// A version that cannot be remembered is asked for again.
fn remember(run_dir: &Path, file: &str, version: CniVersion) {
    let folder = Folder::open(run_dir).map_err(FileError::from).and_then(|run| run.make_folder(VERSIONS, 0o755));
    if let Err(error) = folder.and_then(|folder| folder.replace(file, 0o644, version.as_str().as_bytes())) {
        log(&format!("{}: {error}", run_dir.join(VERSIONS).display()));
    }
}

fn run(program: &Path, command: &str, environment: &Environment, stdin: &str) -> Result<Vec<u8>, CniError> {
    let kind = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let failed = |error: io::Error| CniError::new(Code::NoAddress, format!("plugin {kind}, {command}: {error}"));
    let mut child = Process::new(program)
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", &environment.container_id)
        .env("CNI_NETNS", &environment.netns)
        .env("CNI_IFNAME", &environment.ifname)
        .env("CNI_ARGS", &environment.args)
        .env("CNI_PATH", &environment.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(failed)?;
    let (answer, ended) = converse(&mut child, stdin).map_err(failed)?;
    if ended {
        return Ok(answer);
    }
    let Ok(theirs) = serde_json::from_slice::<WireError>(&answer) else {
        let text: String = String::from_utf8_lossy(&answer).chars().take(500).collect();
        return Err(CniError::new(Code::NoAddress, format!("plugin {kind}, {command}: failed")).details(text));
    };
    let code = if theirs.code == Code::TryAgainLater.number() { Code::TryAgainLater } else { Code::NoAddress };
    let message = format!("plugin {kind}, {command}: {} (code {})", theirs.msg, theirs.code);
    Err(CniError::new(code, message).details(theirs.details))
}

/// Gives the child its input and takes its output; returns whether it ended well. One that takes too long is killed.
fn converse(child: &mut Child, stdin: &str) -> io::Result<(Vec<u8>, bool)> {
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    let input = child.stdin.take();
    let output = child.stdout.take();
    thread::scope(|scope| {
        let (over, is_over) = mpsc::channel::<()>();
        scope.spawn(move || {
            // The child is not waited for before `over` is dropped, so the number is still its own.
            if is_over.recv_timeout(DEADLINE) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        if let Some(mut input) = input {
            // A plugin that ignores its input closes it.
            let _ = input.write_all(stdin.as_bytes());
        }
        let mut answer = Vec::new();
        let read = match output {
            Some(output) => output.take(MAX_ANSWER).read_to_end(&mut answer),
            None => Ok(0),
        };
        if read.is_err() || answer.len() as u64 == MAX_ANSWER {
            let _ = kill(pid, Signal::SIGKILL);
        }
        drop(over);
        let status = child.wait()?;
        read?;
        Ok((answer, status.success()))
    })
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, process::Command};

    use super::*;

    fn plugin(dir: &Path, script: &str) -> Environment {
        let (text, path) = (dir.join("text"), dir.join("other"));
        fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&text, fs::Permissions::from_mode(0o755)).unwrap();
        // By another process: a file that is open for writing in a child that another test begins now cannot be run.
        assert!(Command::new("cp").arg(&text).arg(&path).status().unwrap().success());
        Environment { path: dir.display().to_string(), container_id: "c1".to_owned(), ..Environment::default() }
    }

    const SPEAKS: &str = r#"[ "$CNI_COMMAND" = VERSION ] && { echo asked >>"$0.log"; echo '{"supportedVersions":["0.4.0","1.0.0"]}'; exit; }"#;

    #[test]
    fn is_asked_once_for_its_versions_and_called_with_the_highest() {
        let dir = tempfile::tempdir().unwrap();
        let environment = plugin(dir.path(), &format!("{SPEAKS}\nexec cat"));
        for _ in 0..3 {
            let found = Delegate::find("other", &environment, dir.path()).unwrap();
            let config = serde_json::from_str(r#"{"cniVersion": "1.1.0", "name": "n"}"#).unwrap();
            let answer: Value = serde_json::from_slice(&found.call("ADD", &environment, config).unwrap()).unwrap();
            assert_eq!(answer["cniVersion"], "1.0.0");
        }
        assert_eq!(fs::read_to_string(dir.path().join("other.log")).unwrap(), "asked\n");
    }

    #[test]
    fn its_error_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let script = format!("{SPEAKS}\necho '{{\"code\": 7, \"msg\": \"no range\"}}'; exit 1");
        let environment = plugin(dir.path(), &script);
        let found = Delegate::find("other", &environment, dir.path()).unwrap();
        let error = found.call("ADD", &environment, Map::new()).unwrap_err();
        assert_eq!(error.code, Code::NoAddress);
        assert!(error.message.contains("no range (code 7)"), "{error}");
    }

    #[test]
    fn only_names_are_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        let environment = plugin(dir.path(), SPEAKS);
        for kind in ["", "../other", "a/other", "/bin/sh", ".other", "..", "missing"] {
            let error = Delegate::find(kind, &environment, dir.path()).unwrap_err();
            assert_eq!(error.code, Code::InvalidConfig, "{kind}");
        }
    }
}
