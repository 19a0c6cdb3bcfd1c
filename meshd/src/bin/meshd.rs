//! `meshd`, the node daemon.

use std::{io::Write as _, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};
use meshd::{
    daemon::{self, Outcome},
    install_cni::{InstallCniFlags, Installed, install_cni, keep_cni_installed},
    log, manual,
    settings::{
        CleanupFlags, CleanupSettings, FloorSettings, Log, LogFormat, RunFlags, Settings, SettingsError, Trial,
    },
};
use text::with_causes;

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const NOT_READY: u8 = 4;

/// WireGuard-encrypted overlay network for clusters over several sites.
///
/// Exit codes: 0 done, 1 failed or refused, 2 wrong call or settings that do not hold, 4 the daemon was not ready in time
/// (install-cni).
#[derive(Parser)]
#[command(name = "meshd", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Joins the mesh and stays in it until it is told to stop (SIGTERM); then traffic goes on as it is
    ///
    /// Each setting can also be given as a variable or as a key of the settings file. A flag without a value is true as a
    /// variable with 1, true, yes or on, and false with 0, false, no or off.
    Run(Box<RunFlags>),
    /// Puts unreachable routes for the mesh networks of the last run into the kernel, under those of the daemon
    ///
    /// To be run before containers start: until the daemon is up, what they send to the mesh then goes nowhere, and not
    /// out in the clear by the default route. It takes the settings of meshd run, asks nothing of etcd, and can be run again.
    Floor(Box<RunFlags>),
    /// Removes all that meshd has put into the kernel of this machine, once the daemon is stopped
    ///
    /// Routes, rules, the tunnel's device and the firewall table go, and kernel settings get back what they were. It
    /// refuses while containers are attached. The node's key and identity stay: a later run is the same node again.
    Cleanup(CleanupFlags),
    /// Puts the CNI plugin where the container runtime finds it, and its configuration once the daemon is ready
    ///
    /// It can be run again: what is as it should be stays untouched. It exits with 4 when the daemon is not ready in time.
    InstallCni(InstallCniFlags),
    /// Prints a completion script for a shell
    Completions {
        /// The shell that is to read the script
        shell: manual::Shell,
    },
    /// Writes the manual pages into a folder
    #[command(hide = true)]
    Man {
        /// The folder, which is made where it is missing
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(flags) => {
            let only_check = flags.check;
            let settings = match Settings::load(*flags) {
                Ok(settings) => settings,
                Err(mistakes) => return refuse(&mistakes),
            };
            if only_check {
                return tell(&settings.try_out());
            }
            log::to_stderr(settings.log);
            to_its_end(daemon::run(settings))
        }
        Command::Floor(flags) => {
            let settings = FloorSettings::load(*flags);
            log::to_stderr(settings.log);
            warn_of(&settings.mistakes);
            to_its_end(daemon::floor(settings))
        }
        Command::Cleanup(flags) => {
            let settings = match CleanupSettings::load(&flags) {
                Ok(settings) => settings,
                Err(mistakes) => return refuse(&mistakes),
            };
            log::to_stderr(settings.log);
            warn_of(&settings.mistakes);
            to_its_end(daemon::cleanup(settings))
        }
        Command::InstallCni(flags) => {
            log::to_stderr(Log { level: tracing::Level::INFO, format: LogFormat::Text });
            if flags.keep {
                return exit_code(to_its_end(async { keep_cni_installed(flags).await.map(|()| Outcome::Done) }));
            }
            match install_cni(&flags) {
                Ok(Installed::Done) => Ok(Outcome::Done),
                Ok(Installed::NotReady(reason)) => {
                    tracing::error!(reason, "the daemon is not ready: no configuration was written");
                    return ExitCode::from(NOT_READY);
                }
                Err(error) => Err(error),
            }
        }
        Command::Completions { shell } => {
            // A reader that closes the pipe early has had enough.
            let _ = std::io::stdout().write_all(manual::completions(&mut Cli::command(), shell).as_bytes());
            return ExitCode::SUCCESS;
        }
        Command::Man { folder } => {
            if let Err(error) = manual::man_pages(Cli::command(), &folder) {
                log::print_error(&format!("meshd: {}: {error}", folder.display()));
                return ExitCode::from(FAILED);
            }
            return ExitCode::SUCCESS;
        }
    };
    exit_code(outcome)
}

fn exit_code(outcome: anyhow::Result<Outcome>) -> ExitCode {
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Refused(reason)) => {
            tracing::error!(reason, "refused to run");
            ExitCode::from(FAILED)
        }
        Err(error) => {
            tracing::error!("{}", with_causes(error.as_ref()));
            ExitCode::from(FAILED)
        }
    }
}

fn refuse(mistakes: &SettingsError) -> ExitCode {
    log::print_error(&format!("meshd: the settings do not hold:\n{mistakes}"));
    ExitCode::from(USAGE)
}

/// What came of `run --check`.
fn tell(trial: &Trial) -> ExitCode {
    for warning in &trial.warnings {
        log::print_error(&format!("meshd: warning: {warning}"));
    }
    if trial.mistakes.is_empty() {
        return ExitCode::SUCCESS;
    }
    log::print_error(&format!("meshd: the settings do not hold:\n{}", trial.mistakes.join("\n")));
    ExitCode::from(USAGE)
}

fn warn_of(mistakes: &[String]) {
    for mistake in mistakes {
        tracing::warn!("the settings do not hold: {mistake}");
    }
}

fn to_its_end(work: impl Future<Output = anyhow::Result<Outcome>>) -> anyhow::Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.context("no runtime")?.block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleanup_takes_its_own_flags_only() {
        for flags in [&["--force"][..], &["--interface", "m0", "--state-dir", "/s", "--run-dir", "/r"]] {
            let line = ["meshd", "cleanup"].iter().chain(flags);
            assert!(Cli::try_parse_from(line).is_ok(), "{flags:?}");
        }
        for flag in ["--check", "--node=a", "--etcd-prefix=/x", "--forward-accept"] {
            assert!(Cli::try_parse_from(["meshd", "cleanup", flag]).is_err(), "{flag}");
        }
    }

    #[test]
    fn every_flag_has_help_and_the_commands_are_listed() {
        let mut cli = Cli::command();
        cli.clone().debug_assert();
        let help = cli.render_help().to_string();
        assert!(help.contains("run ") && help.contains("cleanup "), "{help}");
        for command in cli.get_subcommands() {
            for arg in command.get_arguments().filter(|arg| arg.get_id() != "help") {
                assert!(arg.get_help().is_some_and(|help| help.to_string().len() > 20), "{}", arg.get_id());
            }
        }
    }
}
