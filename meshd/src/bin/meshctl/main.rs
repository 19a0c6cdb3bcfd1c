//! `meshctl`, the operator's tool: arguments in, one file per command, exit code out.

mod check;
mod doctor;
mod etcd;
mod etcd_roles;
mod exit;
#[cfg(test)]
mod hostile;
mod node;
mod output;
mod ping;
mod policy;
mod show;

use std::{path::PathBuf, process::ExitCode};

use api::Client;
use clap::{CommandFactory as _, Parser, Subcommand};
use meshd::manual;
use text::with_causes;

use crate::{exit::exit_code, output::Output};

/// Looks into the mesh daemon of this node, and checks and changes what etcd holds for the mesh.
///
/// What asks the daemon takes root or a user of the group meshd; check, etcd-roles, policy test and policy explain --offline
/// ask nobody, and node remove asks etcd alone.
///
/// Exit codes: 0 well, 1 failed, 2 wrong call, 3 the daemon is not reachable or its socket not for this user, 4 degraded
/// (status --check, doctor), 5 not found, 6 denied (policy explain).
#[derive(Parser)]
#[command(name = "meshctl", version)]
struct Cli {
    /// The daemon's --run-dir: where its socket is
    #[arg(long, env = "MESHD_RUN_DIR", default_value = "/run/meshd", global = true, value_name = "DIR")]
    run_dir: PathBuf,
    /// How to print the answer: for people, or for programs
    #[arg(short, long, value_enum, default_value_t = Output::Table, global = true, value_name = "FORMAT")]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows this node at a glance: state, subnets, etcd, peers, and what is not well with cause and remedy
    Status {
        /// Exits with 4 when this node is not running or anything is not well
        #[arg(long)]
        check: bool,
    },
    /// Lists the other nodes and the outside peers, and how packets reach each: direct, wireguard or unreachable
    Peers {
        #[command(subcommand)]
        command: Option<PeersCommand>,
    },
    /// Lists the mesh routes of this node, and the peer that each leads to
    Routes,
    /// Asks a node or an address for an echo, and shows which layer on the way answers, and how fast
    Ping(ping::Ping),
    /// Looks for what keeps packets from getting through, and names the command that mends it
    Doctor(doctor::Doctor),
    /// Takes nodes out of the mesh, in etcd itself; works without a daemon here
    Node {
        #[command(subcommand)]
        command: node::NodeCommand,
    },
    /// Shows the policies in force on this node, and whether they let a connection through
    Policy {
        #[command(subcommand)]
        command: policy::PolicyCommand,
    },
    /// Prints recent connections to and from this node's pods that policies judged: a sample, not every one
    Flows {
        /// Goes on printing as more are judged
        #[arg(long)]
        follow: bool,
        /// Only those that were refused, or would have been if policyMode were not audit
        #[arg(long)]
        denied: bool,
    },
    /// Checks a value as the daemons would read it, before `etcdctl put`; exits with 1 when it does not hold
    Check {
        /// The key, with or without the prefix: peers/laptop, /meshd/config
        key: String,
        /// The file that holds the value; - reads standard input
        file: PathBuf,
        /// What all keys of this mesh begin with
        #[arg(long, env = "MESHD_ETCD_PREFIX", default_value = "/meshd", value_name = "PREFIX")]
        etcd_prefix: String,
    },
    /// Decide about records that this node keeps in force without etcd
    Etcd {
        #[command(subcommand)]
        command: etcd::EtcdCommand,
    },
    EtcdRoles(etcd_roles::EtcdRoles),
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

#[derive(Subcommand)]
enum PeersCommand {
    /// Prints a wg-quick file for an outside peer; the private key is left for its owner to fill in
    Config {
        /// The peer's name: peers/NAME in etcd
        name: String,
    },
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::print_error(&with_causes(error.as_ref()));
            ExitCode::from(exit_code(&error))
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<u8> {
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
        Command::Completions { shell } => {
            output::print_lines(&manual::completions(&mut Cli::command(), *shell))?;
            Ok(0)
        }
        Command::Man { folder } => {
            manual::man_pages(Cli::command(), folder)?;
            Ok(0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        Cli::command().debug_assert();
    }
}
