//! `meshctl`, the operator's tool: arguments in, one file a command, exit code out.

mod check;
mod doctor;
mod etcd_roles;
mod exit;
mod node;
mod output;
mod ping;
mod policy;
mod show;

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{CommandFactory as _, Parser, Subcommand};
use meshd::{api::Client, manual};

use crate::{exit::exit_code, output::Output};

/// Looks into the mesh daemon of this node, and checks and changes what etcd holds for the mesh.
///
/// Exit codes: 0 well, 1 failed, 2 wrong call, 3 the daemon is not reachable, 4 degraded (status --check, doctor), 5 not
/// found, 6 denied (policy explain).
#[derive(Parser)]
#[command(name = "meshctl", version, disable_help_subcommand = true)]
struct Cli {
    /// Directory of the daemon's socket
    #[arg(long, env = "MESHD_RUN_DIR", default_value = "/run/meshd", global = true)]
    run_dir: PathBuf,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Output::Table, global = true)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// This node at a glance, and what is not well
    Status {
        /// Exit with 4 unless all is well
        #[arg(long)]
        check: bool,
    },
    /// The other nodes and the outside peers, and how packets reach them
    Peers {
        #[command(subcommand)]
        command: Option<PeersCommand>,
    },
    /// The mesh routes of this node
    Routes,
    /// Asks a node or an address for an echo, and shows each layer on the way: which one answers, and how fast
    Ping(ping::Ping),
    /// Looks for what keeps packets from getting through, and names the command that mends it
    Doctor(doctor::Doctor),
    /// Changes the set of nodes, in etcd itself
    Node {
        #[command(subcommand)]
        command: node::NodeCommand,
    },
    /// Policies: what is in force on this node, what they say, and what they would say
    Policy {
        #[command(subcommand)]
        command: policy::PolicyCommand,
    },
    /// Verdicts of this node, a sample of them
    Flows {
        /// Goes on printing what comes
        #[arg(long)]
        follow: bool,
        /// Only what was refused, or would have been but for audit mode
        #[arg(long)]
        denied: bool,
    },
    /// Validates a value before `etcdctl put`
    Check {
        /// The key, with or without the prefix: peers/laptop, /meshd/config
        key: String,
        /// The file that holds the value; - reads standard input
        file: PathBuf,
        /// Prefix of all keys
        #[arg(long, env = "MESHD_ETCD_PREFIX", default_value = "/meshd")]
        etcd_prefix: String,
    },
    /// Prints the etcdctl commands for the least roles that nodes, operators and readers need
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
    /// Prints a wg-quick file for an outside peer
    Config {
        /// The peer's name: peers/NAME in etcd
        name: String,
    },
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // Nothing is left to tell it to when standard error is gone too.
            let _ = writeln!(io::stderr(), "meshctl: {error:#}");
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
        Command::EtcdRoles(roles) => roles.run(cli.output),
        Command::Completions { shell } => {
            output::write_out(&manual::completions(&mut Cli::command(), *shell))?;
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
