//! `meshctl`, the operator's tool: arguments in, one file per command, exit code out.

mod check;
mod doctor;
mod etcd;
mod etcd_roles;
mod exit;
#[cfg(test)]
mod hostile;
mod kubectl;
mod node;
mod output;
mod ping;
mod policy;
mod show;
mod sync;

use std::{path::PathBuf, process::ExitCode};

use api::Client;
use clap::{CommandFactory as _, Parser, Subcommand};
use meshd::manual;

use crate::{exit::exit_code, output::Output};

/// Inspect the mesh daemon of this node, and check and change the mesh's records in etcd.
///
/// Commands that query the daemon need root or membership in the group meshd. check, etcd-roles, policy test and policy
/// explain --offline need no daemon; node remove and sync only talk to etcd.
///
/// Exit codes: 0 success, 1 failed, 2 usage error, 3 daemon not reachable or permission denied on its socket, 4
/// degraded (status --check, doctor), 5 not found, 6 denied (policy explain).
#[derive(Parser)]
#[command(name = "meshctl", version = program::VERSION)]
struct MeshctlCli {
    /// The daemon's --run-dir, with its socket
    #[arg(long, env = "MESHD_RUN_DIR", default_value = "/run/meshd", global = true, value_name = "DIR")]
    run_dir: PathBuf,
    /// Output format: table for people, json for programs
    #[arg(short, long, value_enum, default_value_t = Output::Table, global = true, value_name = "FORMAT")]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show this node's state, subnets, etcd connection, peers, and problems with cause and remedy
    ///
    /// Example: meshctl status --check
    Status {
        /// Exit with 4 if this node is not running or has any problem
        #[arg(long)]
        check: bool,
    },
    /// List other nodes and external peers, and the path to each: direct, wireguard or unreachable
    ///
    /// Example: meshctl -o json peers
    Peers {
        #[command(subcommand)]
        command: Option<PeersCommand>,
    },
    /// List this node's mesh routes with the peer behind each
    ///
    /// Example: meshctl routes
    Routes,
    /// Ping a node or address layer by layer, and show which layers answer and how fast
    ///
    /// Example: meshctl ping west-1 --size
    Ping(ping::PingCommand),
    /// Diagnose connectivity problems and print the command that fixes each
    ///
    /// Example: sudo meshctl doctor
    Doctor(doctor::Doctor),
    /// Remove nodes from the mesh, directly in etcd; needs no daemon
    Node {
        #[command(subcommand)]
        command: node::NodeCommand,
    },
    /// Show the policies in force on this node, and whether they allow a connection
    Policy {
        #[command(subcommand)]
        command: policy::PolicyCommand,
    },
    /// Print a sample of recent policy verdicts on connections of this node's pods
    ///
    /// Example: meshctl flows --follow --denied
    Flows {
        /// Keep printing new verdicts
        #[arg(long)]
        follow: bool,
        /// Print only denied connections, and those that would be denied if policyMode were not audit
        #[arg(long)]
        denied: bool,
    },
    /// Validate a value as the daemons would, before `etcdctl put`; exit with 1 if it is invalid
    ///
    /// Example: meshctl check config net-conf.json
    Check {
        /// Key, with or without the prefix: peers/laptop, /meshd/config
        key: String,
        /// File with the value; - reads standard input
        file: PathBuf,
        /// Prefix of all keys of this mesh
        #[arg(long, env = "MESHD_ETCD_PREFIX", default_value = "/meshd", value_name = "PREFIX")]
        etcd_prefix: String,
    },
    /// Accept the records in etcd over those that this node keeps in force
    Etcd {
        #[command(subcommand)]
        command: etcd::EtcdCommand,
    },
    EtcdRoles(etcd_roles::EtcdRoles),
    /// Show and confirm the copy of a Kubernetes cluster, directly in etcd; needs no daemon
    Sync {
        #[command(subcommand)]
        command: sync::SyncCommand,
    },
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

#[derive(Subcommand)]
enum PeersCommand {
    /// Print a wg-quick file for an external peer, with a placeholder for the private key
    ///
    /// Example: meshctl peers config laptop > wg0.conf
    Config {
        /// Name of the peer: peers/NAME in etcd
        name: String,
    },
}

fn main() -> ExitCode {
    let ran = kubectl::local_arguments(std::env::args_os().collect());
    match ran.and_then(|arguments| run(&MeshctlCli::parse_from(arguments))) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::print_error(&exit::lines(&error));
            ExitCode::from(exit_code(&error))
        }
    }
}

fn run(cli: &MeshctlCli) -> anyhow::Result<u8> {
    let client = Client::new(&cli.run_dir);
    match &cli.command {
        Command::Status { check } => show::status(cli.output, &client, *check),
        Command::Peers { command: None } => show::peers(cli.output, &client),
        Command::Peers { command: Some(PeersCommand::Config { name }) } => show::peer_config(&client, name),
        Command::Routes => show::routes(cli.output, &client),
        Command::Ping(ping) => ping.run(cli.output, &client),
        Command::Doctor(doctor) => doctor.run(cli.output, &client),
        Command::Node { command } => node::run(cli.output, command),
        Command::Policy { command } => policy::policy(cli.output, &client, command),
        Command::Flows { follow, denied } => policy::flows(cli.output, &client, *follow, *denied),
        Command::Check { key, file, etcd_prefix } => check::run(cli.output, key, file, etcd_prefix),
        Command::Etcd { command } => etcd::run(cli.output, &client, command),
        Command::EtcdRoles(roles) => roles.run(cli.output),
        Command::Sync { command } => sync::run(cli.output, command),
        Command::Completions { shell } => {
            output::print_lines(&manual::completions(&mut MeshctlCli::command(), *shell))?;
            Ok(0)
        }
        Command::Man { folder } => {
            manual::man_pages(MeshctlCli::command(), folder)?;
            Ok(0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        MeshctlCli::command().debug_assert();
    }
}
