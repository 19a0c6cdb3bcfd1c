//! Other WireGuard implementations, configured with the stock `wg`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{Namespace, Process, await_until, programs::tool};

const READY: Duration = Duration::from_secs(60);
/// Where all userspace implementations put their sockets.
const SOCKETS: &str = "/var/run/wireguard";

/// Which program to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Implementation {
    /// `wireguard-go`: a recent one when `scripts/install-peers` has built it, else Debian's.
    WireguardGo,
    /// The `wireguard-go` of the Debian package, whatever else is there.
    DebianWireguardGo,
    /// `boringtun-cli`, built by `scripts/install-peers`.
    BoringtunCli,
    /// `gotatun`, built by `scripts/install-peers`.
    GotatunCli,
}

impl Implementation {
    /// What `--version` prints first, in one line: name and number.
    ///
    /// # Panics
    /// When the program is missing.
    #[must_use]
    #[track_caller]
    pub fn version(self) -> String {
        let program = self.program();
        let output = Command::new(&program).arg("--version").output();
        let output = output.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().next().unwrap_or_default().trim().to_owned()
    }

    #[track_caller]
    fn program(self) -> PathBuf {
        let built =
            |name| tool("bin", name).unwrap_or_else(|| panic!("{name} is not built; run: scripts/install-peers"));
        match self {
            Self::WireguardGo => tool("bin", "wireguard-go").unwrap_or_else(|| PathBuf::from("wireguard-go")),
            Self::DebianWireguardGo => PathBuf::from("wireguard-go"),
            Self::BoringtunCli => built("boringtun-cli"),
            Self::GotatunCli => built("gotatun"),
        }
    }

    fn arguments(self, interface: &str) -> Vec<&str> {
        match self {
            Self::BoringtunCli | Self::GotatunCli => vec!["-f", "--disable-drop-privileges", interface],
            Self::WireguardGo | Self::DebianWireguardGo => vec!["-f", interface],
        }
    }
}

/// A WireGuard interface in a namespace, driven by one of those programs.
pub struct WireguardPeer {
    namespace: Namespace,
    interface: String,
    process: Process,
}

/// A new private key and its public key, by `wg`.
///
/// # Panics
/// When `wg` is missing.
#[must_use]
pub fn key_pair(namespace: &Namespace) -> (String, String) {
    let private = namespace.run("wg genkey").stdout;
    let public = namespace.run_with_input(&["wg", "pubkey"], &private);
    (private.trim().to_owned(), public.stdout.trim().to_owned())
}

impl WireguardPeer {
    /// Starts the program with a new interface, gives it the addresses (with prefix length) and brings it up.
    ///
    /// # Panics
    /// When the program is missing or does not come up.
    #[must_use]
    #[track_caller]
    pub fn start(namespace: &Namespace, implementation: Implementation, addresses: &[&str]) -> Self {
        let interface = namespace.lab().unique_interface("w");
        let process = namespace.spawn(implementation.program(), &implementation.arguments(&interface));
        let socket = Path::new(SOCKETS).join(format!("{interface}.sock"));
        await_until(&format!("the socket of {}", process.name()), READY, || {
            assert!(process.running(), "{} has ended:\n{}", process.name(), process.log());
            socket.exists().then_some(())
        });
        let mut commands: Vec<String> =
            addresses.iter().map(|address| format!("addr add {address} dev {interface}")).collect();
        commands.push(format!("link set {interface} up"));
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        namespace.ip(&commands);
        Self { namespace: namespace.clone(), interface, process }
    }

    /// Configures it with `wg setconf`: the text of a file with `[Interface]` and `[Peer]` sections. Lines that only
    /// `wg-quick` knows (Address, MTU, DNS, …) are left out.
    ///
    /// # Panics
    /// When `wg` refuses it.
    #[track_caller]
    pub fn setconf(&self, text: &str) {
        const QUICK: [&str; 9] =
            ["address", "dns", "mtu", "table", "preup", "postup", "predown", "postdown", "saveconfig"];
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| {
                let key = line.split('=').next().unwrap_or_default().trim().to_ascii_lowercase();
                !QUICK.contains(&key.as_str())
            })
            .collect();
        let file = self.namespace.lab().folder().join(format!("{}.conf", self.interface));
        fs::write(&file, lines.join("\n") + "\n").unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        self.namespace.run_args(&["wg", "setconf", &self.interface, &file.to_string_lossy()]);
        let _ = fs::remove_file(&file);
    }

    /// `wg set` with these words after the interface.
    ///
    /// # Panics
    /// When `wg` refuses them.
    #[track_caller]
    pub fn set(&self, words: &str) {
        self.namespace.run(&format!("wg set {} {words}", self.interface));
    }

    /// `wg show INTERFACE WHAT`: `latest-handshakes`, `transfer`, `endpoints`, …
    #[must_use]
    #[track_caller]
    pub fn show(&self, what: &str) -> String {
        self.namespace.run(&format!("wg show {} {what}", self.interface)).stdout
    }

    /// Adds a route into the tunnel.
    #[track_caller]
    pub fn route(&self, destination: &str) {
        self.namespace.route(destination, &format!("dev {}", self.interface));
    }

    /// Its interface; unique on this machine.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The program.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }
}
