//! `meshd`, the node daemon.

use std::{
    io::{ErrorKind, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};
use control::state_dir::StateDirError;
use meshd::{
    daemon::{self, RunOutcome},
    install_cni::{InstallCniFlags, Installed, install_cni, keep_cni_installed},
    manual,
    settings::{CleanupFlags, CleanupSettings, FloorSettings, RunFlags, Settings, SettingsError, Trial},
};
use program::log::{self, Log, LogFormat};
use text::with_causes;
use tunnel::StartError;

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const NOT_READY: u8 = 4;

/// WireGuard-encrypted overlay network with NetworkPolicy for clusters that span several sites.
///
/// Exit codes: 0 success, 1 failed or refused, 2 usage error or invalid configuration, 4 daemon not ready in time
/// (install-cni).
#[derive(Parser)]
#[command(name = "meshd", version = program::VERSION)]
struct MeshdCli {
    #[command(subcommand)]
    command: MeshdCommand,
}

#[derive(Subcommand)]
enum MeshdCommand {
    /// Join the mesh and run until SIGTERM; kernel state stays in place afterwards
    ///
    /// Each setting can also be an environment variable or a key of the settings file. Variables of switches take 1,
    /// true, yes, on, or 0, false, no, off.
    ///
    /// Example: meshd run --node east-1 --site east --etcd-endpoints https://etcd-1:2379 --etcd-cafile
    /// /etc/meshd/ca.pem
    Run(Box<RunFlags>),
    /// Install unreachable fallback routes for the mesh networks of the last run
    ///
    /// Run it before containers start: until the daemon is up, their packets to the mesh are dropped instead of leaving
    /// in clear text by the default route. It takes the settings of meshd run, does not contact etcd and is idempotent.
    ///
    /// Example: meshd floor
    Floor(Box<RunFlags>),
    /// Remove all kernel state of meshd from this machine, once the daemon is stopped
    ///
    /// Removes routes, rules, the TUN device and firewall tables, and restores kernel settings. It refuses while
    /// containers are attached. The node's key and identity are kept: a later run is the same node.
    ///
    /// Example: systemctl stop meshd && meshd cleanup
    Cleanup(CleanupFlags),
    /// Install the CNI plugin for the container runtime, and its configuration once the daemon is ready
    ///
    /// It is idempotent. It exits with 4 if the daemon is not ready in time.
    ///
    /// Example: meshd install-cni --chain /etc/cni/net.d/10-flannel.conflist
    InstallCni(InstallCniFlags),
    /// Print a shell completion script
    Completions {
        /// Shell to generate the script for
        shell: manual::Shell,
    },
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man {
        /// Target directory, created if missing
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    let outcome = match MeshdCli::parse().command {
        MeshdCommand::Run(flags) => {
            let only_check = flags.check;
            let settings = match Settings::load(*flags) {
                Ok(settings) => settings,
                Err(mistakes) => return refuse(&mistakes),
            };
            if only_check {
                return print_trial(&settings.try_out());
            }
            log::to_stderr(settings.log);
            run_to_end(daemon::run(settings))
        }
        MeshdCommand::Floor(flags) => {
            let settings = FloorSettings::load(*flags);
            log::to_stderr(settings.log);
            warn_of(&settings.mistakes);
            run_to_end(daemon::floor(settings))
        }
        MeshdCommand::Cleanup(flags) => {
            let settings = match CleanupSettings::load(&flags) {
                Ok(settings) => settings,
                Err(mistakes) => return refuse(&mistakes),
            };
            log::to_stderr(settings.log);
            warn_of(&settings.mistakes);
            run_to_end(daemon::cleanup(settings))
        }
        MeshdCommand::InstallCni(flags) => {
            log::to_stderr(Log { level: tracing::Level::INFO, format: LogFormat::Text });
            if flags.keep {
                return exit_code(run_to_end(async { keep_cni_installed(flags).await.map(|()| RunOutcome::Done) }));
            }
            let check = flags.check;
            match install_cni(&flags) {
                Ok(Installed::Done) => Ok(RunOutcome::Done),
                Ok(Installed::Unused(reason) | Installed::NotReady(reason)) if check => {
                    log::print_error(&format!("meshd: {reason}"));
                    return ExitCode::from(NOT_READY);
                }
                Ok(Installed::Unused(reason)) => {
                    tracing::warn!(reason, "CNI configuration written, but not in use");
                    Ok(RunOutcome::Done)
                }
                Ok(Installed::NotReady(reason)) => {
                    tracing::error!(reason, "daemon not ready; no configuration written");
                    return ExitCode::from(NOT_READY);
                }
                Err(error) => Err(error),
            }
        }
        MeshdCommand::Completions { shell } => {
            // A reader that closes the pipe early has had enough.
            let _ = std::io::stdout().write_all(manual::completions(&mut MeshdCli::command(), shell).as_bytes());
            return ExitCode::SUCCESS;
        }
        MeshdCommand::Man { folder } => {
            if let Err(error) = manual::man_pages(MeshdCli::command(), &folder) {
                log::print_error(&format!("meshd: {}: {error}", folder.display()));
                return ExitCode::from(FAILED);
            }
            return ExitCode::SUCCESS;
        }
    };
    exit_code(outcome)
}

fn exit_code(outcome: anyhow::Result<RunOutcome>) -> ExitCode {
    match outcome {
        Ok(RunOutcome::Done) => ExitCode::SUCCESS,
        Ok(RunOutcome::Refused(reason)) => {
            tracing::error!(reason, "refused to run");
            ExitCode::from(FAILED)
        }
        Err(error) => {
            tracing::error!("{}", with_causes(error.as_ref()));
            ExitCode::from(if is_of_settings(&error) { USAGE } else { FAILED })
        }
    }
}

/// Whether only an operator can end it: no later start would go better.
fn is_of_settings(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let start = cause.downcast_ref::<StartError>().is_some_and(|start| match start {
            // The name is that of a device of another kind.
            StartError::Tun(tun) => tun.source.kind() == ErrorKind::InvalidInput,
            // Below 1024, without the capability for it.
            StartError::Udp { source, .. } => source.kind() == ErrorKind::PermissionDenied,
            _ => false,
        });
        let id = cause.downcast_ref::<StateDirError>();
        start || matches!(id, Some(StateDirError::BadNodeId { .. } | StateDirError::NodeIdChanged { .. }))
    })
}

fn refuse(mistakes: &SettingsError) -> ExitCode {
    log::print_error(&format!("meshd: invalid configuration:\n{mistakes}"));
    ExitCode::from(USAGE)
}

/// Prints the result of `run --check`.
fn print_trial(trial: &Trial) -> ExitCode {
    for warning in &trial.warnings {
        log::print_error(&format!("meshd: warning: {warning}"));
    }
    if trial.mistakes.is_empty() {
        return ExitCode::SUCCESS;
    }
    log::print_error(&format!("meshd: invalid configuration:\n{}", trial.mistakes.join("\n")));
    ExitCode::from(USAGE)
}

fn warn_of(mistakes: &[String]) {
    for mistake in mistakes {
        tracing::warn!(mistake, "invalid configuration");
    }
}

fn run_to_end(work: impl Future<Output = anyhow::Result<RunOutcome>>) -> anyhow::Result<RunOutcome> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.context("cannot start the async runtime")?.block_on(work)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn cleanup_takes_its_own_flags_only() {
        for flags in [&["--force"][..], &["--interface", "m0", "--state-dir", "/s", "--run-dir", "/r"]] {
            let line = ["meshd", "cleanup"].iter().chain(flags);
            assert!(MeshdCli::try_parse_from(line).is_ok(), "{flags:?}");
        }
        for flag in ["--check", "--node=a", "--etcd-prefix=/x", "--forward-accept"] {
            assert!(MeshdCli::try_parse_from(["meshd", "cleanup", flag]).is_err(), "{flag}");
        }
    }

    #[test]
    fn every_flag_has_help_and_the_commands_are_listed() {
        let mut cli = MeshdCli::command();
        cli.clone().debug_assert();
        let help = cli.render_help().to_string();
        assert!(help.contains("run ") && help.contains("cleanup "), "{help}");
        for command in cli.get_subcommands() {
            for arg in command.get_arguments().filter(|arg| arg.get_id() != "help") {
                assert!(arg.get_help().is_some_and(|help| help.to_string().len() > 20), "{}", arg.get_id());
            }
        }
    }

    #[test]
    fn what_no_later_start_can_do_better_ends_as_invalid_settings_do() {
        let udp = |kind: ErrorKind| StartError::Udp { port: 80, source: kind.into() };
        let tun = |errno| {
            let source = io::Error::from_raw_os_error(errno);
            StartError::from(tunnel::TunError { name: "eth0".to_owned(), source })
        };
        let of_settings = |error| is_of_settings(&anyhow::Error::from(error).context("cannot start"));
        assert!(of_settings(udp(ErrorKind::PermissionDenied)) && !of_settings(udp(ErrorKind::AddrInUse)));
        assert!(of_settings(tun(libc::EINVAL)) && !of_settings(tun(libc::EBUSY)));
        let id = StateDirError::BadNodeId { path: "node-id".to_owned(), reason: "empty".to_owned() };
        assert!(is_of_settings(&anyhow::Error::from(id).context("cannot start")));
        assert!(!is_of_settings(&anyhow::anyhow!("cannot start")));
    }
}
