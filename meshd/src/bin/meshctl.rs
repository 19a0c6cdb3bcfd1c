//! `meshctl`, the operator's tool.

use std::{
    io::{self, IsTerminal as _, Read as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use comfy_table::{Table, presets};
use meshd::{
    api::{Client, ClientError, Explained, Path, Peer, Policy, Route, ShownPolicy, State, Status},
    control::{
        node_removal::{self, Removal, RemovalError},
        session::Dialer,
    },
    enforcement::{FlowSample, SampledVerdict},
    policy_tool::{self, ExplainError, Question},
    settings,
};
use serde::Serialize;

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const NOT_REACHABLE: u8 = 3;
const DEGRADED: u8 = 4;
const NOT_FOUND: u8 = 5;
const DENIED: u8 = 6;

/// How often `flows --follow` asks for more.
const FOLLOW: Duration = Duration::from_millis(500);

/// Looks into the mesh daemon of this node, and checks and changes what etcd holds for the mesh.
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

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
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
    /// Changes the set of nodes, in etcd itself
    Node {
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// Policies: what is in force on this node, what they say, and what they would say
    Policy {
        #[command(subcommand)]
        command: PolicyCommand,
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
}

#[derive(Subcommand)]
enum PeersCommand {
    /// Prints a wg-quick file for an outside peer
    Config {
        /// The peer's name: peers/NAME in etcd
        name: String,
    },
}

#[derive(Subcommand)]
enum PolicyCommand {
    /// All policies in force
    List,
    /// One policy: NAMESPACE/NAME, or the NAME of a ClusterNetworkPolicy
    Show {
        /// Its name
        name: String,
    },
    /// Checks worlds and what they expect, without a daemon; exits with 1 on any difference
    Test {
        /// JSON Lines or YAML documents, one world each; - reads standard input
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Tells whether SRC may begin a connection to DST, and which rule says so; exits with 6 if not
    Explain {
        /// Namespace/pod, or an address
        src: String,
        /// Namespace/pod, or an address
        dst: String,
        /// tcp/80, udp/53, sctp/5000, icmp, or a protocol's number
        #[arg(value_name = "PROTO/PORT")]
        service: String,
        /// Asks files instead of the daemon: a folder of Kubernetes objects, JSON or YAML, Lists too
        #[arg(long, value_name = "DIR")]
        offline: Option<PathBuf>,
    },
}

#[derive(Subcommand)]
enum NodeCommand {
    /// Takes a node out of the mesh for good, also one that is away or stolen
    Remove(Remove),
}

#[derive(Args)]
struct Remove {
    /// The node's name or id
    name: String,
    #[command(flatten)]
    etcd: settings::EtcdFlags,
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

fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Unreachable { .. } | ClientError::Broken { .. }) => NOT_REACHABLE,
        Some(ClientError::NotFound(_)) => NOT_FOUND,
        Some(ClientError::Invalid(_)) => USAGE,
        _ if error.is::<Usage>() => USAGE,
        _ if error.is::<NotFound>() => NOT_FOUND,
        _ => FAILED,
    }
}

/// A mistake in the call.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// What was named does not exist.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NotFound(String);

fn run(cli: &Cli) -> anyhow::Result<u8> {
    let client = Client::new(&cli.run_dir);
    match &cli.command {
        Command::Status { check } => {
            let status: Status = client.get("/v1/status")?;
            print(cli.output, &status, status_text)?;
            let well = status.state == State::Running && status.problems.is_empty();
            Ok(if *check && !well { DEGRADED } else { 0 })
        }
        Command::Peers { command: None } => {
            let peers: Vec<Peer> = client.get("/v1/peers")?;
            print(cli.output, &peers, |peers| peers_text(peers))?;
            Ok(0)
        }
        Command::Peers { command: Some(PeersCommand::Config { name }) } => {
            let name: etcd_schema::PeerName = name.parse().map_err(|error| Usage(format!("{name}: {error}")))?;
            write_out(&client.get_text(&format!("/v1/peers/{name}/config"))?)?;
            Ok(0)
        }
        Command::Routes => {
            let routes: Vec<Route> = client.get("/v1/routes")?;
            print(cli.output, &routes, |routes| routes_text(routes))?;
            Ok(0)
        }
        Command::Node { command: NodeCommand::Remove(remove) } => {
            let removed = Removed::from(remove_node(remove)?);
            print(cli.output, &removed, Removed::text)?;
            Ok(0)
        }
        Command::Policy { command } => policy(cli.output, &client, command),
        Command::Flows { follow, denied } => flows(cli.output, &client, *follow, *denied),
        Command::Check { key, file, etcd_prefix } => {
            let checked = check(key, file, etcd_prefix)?;
            print(cli.output, &checked, |checked| format!("{} holds: {}\n", checked.key, checked.summary))?;
            Ok(0)
        }
    }
}

fn policy(output: Output, client: &Client, command: &PolicyCommand) -> anyhow::Result<u8> {
    match command {
        PolicyCommand::List => {
            let policies: Vec<Policy> = client.get("/v1/policies")?;
            print(output, &policies, |policies| policies_text(policies))?;
        }
        PolicyCommand::Show { name } => {
            if !is_plain(name) {
                return Err(Usage(format!("{name:?} is no policy's name")).into());
            }
            let shown: ShownPolicy = client.get(&format!("/v1/policies/{name}"))?;
            print(output, &shown, |shown| policies_text(std::slice::from_ref(&shown.policy)) + &shown.understood)?;
        }
        PolicyCommand::Test { files } => {
            let tested = policy_tool::test(files, Instant::now()).map_err(|error| Usage(error.to_string()))?;
            print(output, &tested, policy_tool::Tested::text)?;
            return Ok(if tested.agrees() { 0 } else { FAILED });
        }
        PolicyCommand::Explain { src, dst, service, offline: Some(folder) } => {
            let question = Question { source: src.clone(), destination: dst.clone(), service: service.clone() };
            let explained = policy_tool::explain(folder, &question).map_err(|error| match error {
                ExplainError::NotFound(what) => NotFound(what).into(),
                ExplainError::Question(what) => Usage(what).into(),
                error => anyhow::Error::from(error),
            })?;
            print(output, &explained, Explained::text)?;
            return Ok(if explained.allowed { 0 } else { DENIED });
        }
        PolicyCommand::Explain { src, dst, service, offline: None } => {
            if let Some(odd) = [src, dst, service].into_iter().find(|text| !is_plain(text)) {
                return Err(Usage(format!("{odd:?} is neither a pod's name nor an address, protocol or port")).into());
            }
            let path = format!("/v1/policy/explain?src={src}&dst={dst}&service={service}");
            let explained: Explained = client.get(&path)?;
            print(output, &explained, Explained::text)?;
            return Ok(if explained.allowed { 0 } else { DENIED });
        }
    }
    Ok(0)
}

/// Whether a text may stand in a request as it is.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/:.-_".contains(&b))
}

/// Prints samples, one a line (JSON: one object a line).
fn flows(output: Output, client: &Client, follow: bool, denied: bool) -> anyhow::Result<u8> {
    let mut after = 0;
    loop {
        let samples: Vec<FlowSample> = client.get(&format!("/v1/flows?after={after}"))?;
        after = samples.last().map_or(after, |sample| sample.number);
        for sample in samples.iter().filter(|sample| !denied || sample.verdict != SampledVerdict::Allowed) {
            let line = match output {
                Output::Json => serde_json::to_string(sample)?,
                Output::Table => sample.to_string(),
            };
            write_out(&(line + "\n"))?;
        }
        if !follow {
            return Ok(0);
        }
        std::thread::sleep(FOLLOW);
    }
}

fn policies_text(policies: &[Policy]) -> String {
    let mut text = String::new();
    for policy in policies {
        let directions = policy.directions.join("+");
        let of = if directions.is_empty() { "nothing".to_owned() } else { directions };
        text += &format!("{}  {of}, {} rules, {}\n", policy.key, policy.rules, policy.state);
    }
    text
}

fn remove_node(remove: &Remove) -> anyhow::Result<Removal> {
    let mut mistakes = Vec::new();
    let etcd = remove.etcd.clone().check(&mut mistakes);
    if !mistakes.is_empty() {
        return Err(Usage(mistakes.join("\n")).into());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?;
    let time = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    let removed = runtime.block_on(async {
        let dialer = Dialer::new(&etcd).map_err(|errors| Usage(said(&errors)))?;
        let session = dialer.open_any().await.context("etcd does not answer")?;
        node_removal::remove_node(&session, &remove.name, &time).await.map_err(anyhow::Error::from)
    });
    removed.map_err(|error| match error.downcast::<RemovalError>() {
        Ok(RemovalError::NotFound(name)) => NotFound(RemovalError::NotFound(name).to_string()).into(),
        Ok(error) => anyhow::Error::from(error).context(format!("node {} was not removed", remove.name)),
        Err(error) => error,
    })
}

/// What `node remove` prints.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Removed {
    id: String,
    /// Where a record told it.
    name: Option<String>,
    /// Free again.
    subnets: Vec<String>,
    /// Refused by every node from now on.
    public_keys: Vec<String>,
    /// It had been removed before.
    repeated: bool,
}

impl From<Removal> for Removed {
    fn from(removal: Removal) -> Self {
        Self {
            id: removal.id.to_string(),
            name: removal.name.map(|name| name.to_string()),
            subnets: removal.subnets.iter().map(ToString::to_string).collect(),
            public_keys: removal.public_keys.iter().map(ToString::to_string).collect(),
            repeated: removal.repeated,
        }
    }
}

impl Removed {
    fn text(&self) -> String {
        let name = self.name.as_deref().unwrap_or("without a readable name");
        let mut text = format!("node {} ({name}) is removed; its keys are refused by every node\n", self.id);
        for subnet in &self.subnets {
            text.push_str(&format!("subnet {subnet} is free\n"));
        }
        text
    }
}

/// What `check` prints of a value that holds; one that does not is an error.
#[derive(Serialize)]
struct Checked {
    /// Without the prefix.
    key: String,
    holds: bool,
    summary: String,
}

fn said(errors: &[impl ToString]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn check(key: &str, file: &PathBuf, prefix: &str) -> anyhow::Result<Checked> {
    let prefix = prefix.trim_end_matches('/');
    let relative = key.strip_prefix(prefix).map_or(key, |rest| rest.trim_start_matches('/'));
    let mut value = Vec::new();
    // One byte more than etcd takes, so that a value that is too long is seen to be.
    let limit = etcd_schema::MAX_VALUE_BYTES as u64 + 1;
    if file.as_os_str() == "-" {
        io::stdin().take(limit).read_to_end(&mut value).context("standard input")?;
    } else {
        let opened = std::fs::File::open(file).map_err(|error| Usage(format!("{}: {error}", file.display())))?;
        opened.take(limit).read_to_end(&mut value).with_context(|| file.display().to_string())?;
    }
    let checked = policy_tool::check(relative, &value)?;
    Ok(Checked { key: relative.to_owned(), holds: true, summary: checked.summary })
}

fn print<T: Serialize>(output: Output, value: &T, text: impl Fn(&T) -> String) -> anyhow::Result<()> {
    match output {
        Output::Json => write_out(&(serde_json::to_string_pretty(value)? + "\n")),
        Output::Table => write_out(&text(value)),
    }
}

fn write_out(text: &str) -> anyhow::Result<()> {
    // A reader that closes the pipe early ends us quietly, as it would any tool.
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("standard output"),
    }
}

fn status_text(status: &Status) -> String {
    let list = |items: Vec<String>| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
    let etcd = match (status.etcd.connected, &status.etcd.endpoint) {
        (true, Some(endpoint)) => format!("connected to {endpoint}"),
        (false, Some(endpoint)) => format!("not connected, last to {endpoint}{}", age(status.etcd.age)),
        (_, None) => "not reached yet".to_owned(),
    };
    let mut lines = vec![
        format!("node      {} ({})", status.node, status.id),
        format!("site      {}", status.site.as_deref().unwrap_or("none")),
        format!("subnets   {}", list(status.subnets.iter().map(ToString::to_string).collect())),
        format!("overlay   {}", list(status.overlay.iter().map(ToString::to_string).collect())),
        format!("etcd      {etcd}, revision {}", status.revision),
        format!("state     {}", emphasised(state_name(status.state), status.state)),
    ];
    for problem in &status.problems {
        lines.push(format!("problem   {}: {}", problem.code, problem.cause));
        lines.push(format!("  remedy  {}", problem.remedy));
    }
    lines.join("\n") + "\n"
}

fn age(seconds: Option<f64>) -> String {
    seconds.map_or_else(String::new, |seconds| format!(" {seconds:.0} s ago"))
}

fn state_name(state: State) -> &'static str {
    match state {
        State::Starting => "starting",
        State::Joining => "joining",
        State::Running => "running",
        State::Degraded => "degraded",
        State::Removed => "removed",
    }
}

/// Coloured on a terminal, unless NO_COLOR is set.
fn emphasised(text: &str, state: State) -> String {
    if !io::stdout().is_terminal() || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) {
        return text.to_owned();
    }
    let colour = match state {
        State::Running => 32,
        State::Starting | State::Joining => 33,
        State::Degraded | State::Removed => 31,
    };
    format!("\x1b[{colour}m{text}\x1b[0m")
}

fn peers_text(peers: &[Peer]) -> String {
    let mut table = table(&["NAME", "SITE", "SUBNETS", "PATH", "ENDPOINT", "HANDSHAKE", "RX", "TX", "REASON"]);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    for peer in peers {
        let handshake =
            peer.latest_handshake.map_or_else(|| "-".to_owned(), |at| format!("{} s ago", now.saturating_sub(at)));
        table.add_row([
            peer.name.clone(),
            peer.site.clone().unwrap_or_else(|| "-".to_owned()),
            peer.subnets.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
            peer.path.to_string(),
            peer.endpoint.map_or_else(|| "-".to_owned(), |endpoint| endpoint.to_string()),
            handshake,
            bytes(peer.rx),
            bytes(peer.tx),
            peer.reason.clone(),
        ]);
    }
    table.to_string() + "\n"
}

fn routes_text(routes: &[Route]) -> String {
    let mut table = table(&["DESTINATION", "PATH", "PEER", "VIA", "DEV", "MTU", "SRC"]);
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    for route in routes {
        table.add_row([
            route.dst.to_string(),
            route.path.to_string(),
            if route.peer.is_empty() && route.path == Path::Unreachable {
                "(floor)".into()
            } else {
                route.peer.clone()
            },
            or_dash(route.via.map(|via| via.to_string())),
            or_dash(route.dev.clone()),
            or_dash(route.mtu.map(|mtu| mtu.to_string())),
            or_dash(route.src.map(|src| src.to_string())),
        ]);
    }
    table.to_string() + "\n"
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().copied());
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_does_not_answer_is_not_reachable() {
        let refused = || io::Error::from(io::ErrorKind::ConnectionReset);
        for (error, code) in [
            (ClientError::Unreachable { socket: String::new(), source: refused() }, 3),
            (ClientError::Broken { socket: String::new(), source: refused() }, 3),
            (ClientError::NotFound(String::new()), 5),
            (ClientError::Malformed(String::new()), 1),
        ] {
            assert_eq!(exit_code(&error.into()), code);
        }
        assert_eq!(exit_code(&Usage(String::new()).into()), 2);
    }

    #[test]
    fn a_value_that_holds_is_told_as_json() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"Network": "10.244.0.0/16"}"#).unwrap();
        let checked = check("/meshd/config", &file.path().to_owned(), "/meshd").unwrap();
        let json = serde_json::to_value(&checked).unwrap();
        assert_eq!((&json["key"], &json["holds"]), (&"config".into(), &true.into()));
        assert!(json["summary"].as_str().is_some_and(|summary| summary.contains("10.244.0.0/16")), "{json}");
        std::fs::write(file.path(), r#"{"Network": "nonsense"}"#).unwrap();
        assert!(check("config", &file.path().to_owned(), "/meshd").is_err());
    }

    #[test]
    fn a_removal_is_told_as_text_and_as_json() {
        let removed = Removed::from(Removal {
            id: "n0011223344556677".parse().unwrap(),
            name: Some("a".parse().unwrap()),
            subnets: vec!["10.244.1.0-24".parse().unwrap()],
            public_keys: vec![etcd_schema::PublicKey::from_bytes([9; 32])],
            repeated: false,
        });
        let json = serde_json::to_value(&removed).unwrap();
        assert_eq!((&json["id"], &json["name"]), (&"n0011223344556677".into(), &"a".into()));
        assert_eq!((&json["subnets"][0], &json["repeated"]), (&"10.244.1.0-24".into(), &false.into()));
        assert_eq!(json["publicKeys"].as_array().map(Vec::len), Some(1));
        assert_eq!(
            removed.text(),
            "node n0011223344556677 (a) is removed; its keys are refused by every node\nsubnet 10.244.1.0-24 is free\n"
        );
    }
}
