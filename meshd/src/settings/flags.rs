//! The flags of `meshd run`, which are also the keys of its file and, as `MESHD_*`, variables; `meshd cleanup` has a
//! subset of them.

use std::{net::IpAddr, path::PathBuf};

use clap::{Args, ValueEnum, builder::BoolishValueParser};
use control::etcd_options::{Credentials, EtcdOptions, TlsFiles};
use serde::Deserialize;
use tunnel::OffloadSetting;

/// How etcd is reached; shared with the operator's commands that talk to etcd themselves.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[serde(default)]
#[group(skip)]
pub struct EtcdFlags {
    /// Members of the etcd cluster, tried one at a time in random order until one answers [default:
    /// http://127.0.0.1:2379]
    #[arg(long = "etcd-endpoints", env = "MESHD_ETCD_ENDPOINTS", value_name = "URL,URL", value_delimiter = ',')]
    #[serde(rename = "etcd-endpoints")]
    pub endpoints: Option<Vec<String>>,
    /// Prefix of all keys of this mesh in etcd; the same on every node [default: /meshd]
    #[arg(long = "etcd-prefix", env = "MESHD_ETCD_PREFIX", value_name = "PREFIX")]
    #[serde(rename = "etcd-prefix")]
    pub prefix: Option<String>,
    /// CA certificates (PEM) to verify etcd's server certificate, for https
    #[arg(long = "etcd-cafile", env = "MESHD_ETCD_CAFILE", value_name = "FILE")]
    #[serde(rename = "etcd-cafile")]
    pub cafile: Option<PathBuf>,
    /// Client certificate (PEM) for etcd; needs --etcd-keyfile
    #[arg(long = "etcd-certfile", env = "MESHD_ETCD_CERTFILE", value_name = "FILE")]
    #[serde(rename = "etcd-certfile")]
    pub certfile: Option<PathBuf>,
    /// Private key (PEM) of the client certificate
    #[arg(long = "etcd-keyfile", env = "MESHD_ETCD_KEYFILE", value_name = "FILE")]
    #[serde(rename = "etcd-keyfile")]
    pub keyfile: Option<PathBuf>,
    /// etcd user; needs --etcd-password-file
    #[arg(long = "etcd-username", env = "MESHD_ETCD_USERNAME", value_name = "USER")]
    #[serde(rename = "etcd-username")]
    pub username: Option<String>,
    /// File with the etcd user's password and nothing else
    #[arg(long = "etcd-password-file", env = "MESHD_ETCD_PASSWORD_FILE", value_name = "FILE")]
    #[serde(rename = "etcd-password-file")]
    pub password_file: Option<PathBuf>,
    /// Allow plain http to etcd on other machines. Anyone who can change that traffic controls the mesh
    #[arg(
        long = "etcd-allow-plaintext", env = "MESHD_ETCD_ALLOW_PLAINTEXT", value_name = "true|false", value_parser = BoolishValueParser::new(),
        num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    #[serde(rename = "etcd-allow-plaintext")]
    pub allow_plaintext: Option<bool>,
}

/// Flags of `meshd run`. `None` means not given.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RunFlags {
    /// Settings file (TOML); its keys are these flags without the leading dashes: node = "a". Flags and variables
    /// override it [default: /etc/meshd/meshd.toml, if present]
    #[arg(long, env = "MESHD_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Name of this node, unique in the mesh [default: the host name]
    #[arg(long, env = "MESHD_NODE", value_name = "NAME")]
    pub node: Option<String>,
    /// Site (room, cluster, region) of this node. Nodes of one site on the same IP subnet exchange pod traffic
    /// unencrypted; all other pod traffic is encrypted [default: none]
    #[arg(long, env = "MESHD_SITE", value_name = "NAME")]
    pub site: Option<String>,
    #[command(flatten)]
    #[serde(flatten)]
    #[allow(missing_docs, reason = "a doc comment on a flattened group would become the command's own text")]
    pub etcd: EtcdFlags,
    /// Underlay interface, towards the other nodes. auto: the interface of the default route, for each address family
    /// [default: auto]
    #[arg(long, env = "MESHD_IFACE", value_name = "IF|auto")]
    pub iface: Option<String>,
    /// Addresses at which other nodes reach this one, if they are not the interface's, as behind a NAT with port
    /// forwarding; at most one IPv4 and one IPv6 address [default: the interface's]
    #[arg(long, env = "MESHD_PUBLIC_IP", value_name = "IP,IP", value_delimiter = ',')]
    pub public_ip: Option<Vec<IpAddr>>,
    /// Public address and UDP port of the tunnel, if the port differs from --listen-port. none: this node cannot be
    /// called and initiates all handshakes [default: --public-ip with --listen-port]
    #[arg(long, env = "MESHD_ENDPOINT", value_name = "IP:PORT|none")]
    pub endpoint: Option<String>,
    /// UDP port of the WireGuard tunnel. The next port is used to probe direct paths to other nodes [default: 51820]
    #[arg(long, env = "MESHD_LISTEN_PORT", value_name = "PORT")]
    pub listen_port: Option<u16>,
    /// Name of the TUN device, created if missing [default: meshd0]
    #[arg(long, env = "MESHD_INTERFACE", value_name = "IF")]
    pub interface: Option<String>,
    /// Persistent directory for the private key, the node's identity and the last known state of the mesh [default:
    /// /var/lib/meshd]
    #[arg(long, env = "MESHD_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Directory for the socket of meshctl and for subnet.env, which network plugins read [default: /run/meshd]
    #[arg(long, env = "MESHD_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Insert an accept rule into foreign firewall chains (Docker, firewalld, ufw) that would drop forwarded pod
    /// traffic; without this flag, meshctl status only names the chain
    #[arg(
        long, env = "MESHD_FORWARD_ACCEPT", value_name = "true|false", value_parser = BoolishValueParser::new(),
        num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    pub forward_accept: Option<bool>,
    /// Do not masquerade traffic from pods to addresses outside the mesh; replies must then be routed back by other
    /// means
    #[arg(
        long, env = "MESHD_NO_IP_MASQ", value_name = "true|false", value_parser = BoolishValueParser::new(),
        num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    pub no_ip_masq: Option<bool>,
    /// Send many packets to one node per system call (UDP GSO). auto: until the kernel refuses it [default: auto]
    #[arg(long, env = "MESHD_UDP_GSO", value_name = "auto|off")]
    pub udp_gso: Option<OffloadFlag>,
    /// Receive many packets from one node per system call (UDP GRO). auto: if the kernel supports it [default: auto]
    #[arg(long, env = "MESHD_UDP_GRO", value_name = "auto|off")]
    pub udp_gro: Option<OffloadFlag>,
    /// Exchange packets of up to 64 KiB with the kernel and segment or merge them in the tunnel (TSO, USO). auto: until
    /// the kernel refuses it [default: auto]
    #[arg(long, env = "MESHD_TUN_OFFLOAD", value_name = "auto|off")]
    pub tun_offload: Option<OffloadFlag>,
    /// Address and TCP port of metrics (/metrics) and health checks (/livez, /readyz), without authentication. none:
    /// disabled [default: 127.0.0.1:9473]
    #[arg(long, env = "MESHD_METRICS_ADDR", value_name = "IP:PORT|none")]
    pub metrics_addr: Option<String>,
    /// Export per-peer metrics (cardinality grows with the square of the number of nodes)
    #[arg(
        long, env = "MESHD_METRICS_PER_PEER", value_name = "true|false", value_parser = BoolishValueParser::new(),
        num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    pub metrics_per_peer: Option<bool>,
    /// Loopback address and TCP port of the read-only browser page, without authentication, such as 127.0.0.1:9474.
    /// none: disabled [default: none]
    #[arg(long, env = "MESHD_UI_ADDR", value_name = "IP:PORT|none")]
    pub ui_addr: Option<String>,
    /// Ignored; accepted for configurations of earlier versions
    #[arg(long, env = "MESHD_POLICY_MARKS", value_name = "MASK,MASK", value_delimiter = ',')]
    pub policy_marks: Option<Vec<String>>,
    /// NFLOG group to which nftables reports verdicts, for meshctl flows; no other program on this machine may read it
    /// [default: 15858]
    #[arg(long, env = "MESHD_POLICY_LOG_GROUP", value_name = "GROUP")]
    pub policy_log_group: Option<u16>,
    /// Minimum log level: error, warn, info, debug or trace [default: info]
    #[arg(long, env = "MESHD_LOG_LEVEL", value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Format of the log on standard error [default: text]
    #[arg(long, env = "MESHD_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Check the settings and the files they name, print every mistake and exit: 0 if valid, 2 if not. Files must be
    /// readable for the user meshd
    #[arg(long)]
    #[serde(skip)]
    pub check: bool,
}

/// Flags of `meshd cleanup`: what says where the daemon's state is. `None` means not given.
#[derive(Debug, Clone, Default, Args)]
pub struct CleanupFlags {
    /// Settings file of meshd run, for interface, state-dir and run-dir; mistakes in it are warnings here [default:
    /// /etc/meshd/meshd.toml, if present]
    #[arg(long, env = "MESHD_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name of the TUN device [default: meshd0]
    #[arg(long, env = "MESHD_INTERFACE", value_name = "IF")]
    pub interface: Option<String>,
    /// The daemon's --state-dir; the private key and the identity in it are kept [default: /var/lib/meshd]
    #[arg(long, env = "MESHD_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// The daemon's --run-dir; the socket and subnet.env are removed from it [default: /run/meshd]
    #[arg(long, env = "MESHD_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Minimum log level: error, warn, info, debug or trace [default: info]
    #[arg(long, env = "MESHD_LOG_LEVEL", value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Format of the log on standard error [default: text]
    #[arg(long, env = "MESHD_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Remove everything even if containers are still attached: they lose the mesh
    #[arg(long)]
    pub force: bool,
}

/// Whether the tunnel uses an offload of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OffloadFlag {
    /// Use it where the kernel has it, until the kernel refuses it.
    Auto,
    /// Do without it.
    Off,
}

impl From<OffloadFlag> for OffloadSetting {
    fn from(flag: OffloadFlag) -> Self {
        match flag {
            OffloadFlag::Auto => Self::Auto,
            OffloadFlag::Off => Self::Off,
        }
    }
}

/// `--log-format`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Human-readable lines.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl RunFlags {
    /// These flags, and `below` where they say nothing.
    #[must_use]
    pub fn over(self, below: Self) -> Self {
        Self {
            config: self.config,
            node: self.node.or(below.node),
            site: self.site.or(below.site),
            etcd: self.etcd.over(below.etcd),
            iface: self.iface.or(below.iface),
            public_ip: self.public_ip.or(below.public_ip),
            endpoint: self.endpoint.or(below.endpoint),
            listen_port: self.listen_port.or(below.listen_port),
            interface: self.interface.or(below.interface),
            state_dir: self.state_dir.or(below.state_dir),
            run_dir: self.run_dir.or(below.run_dir),
            forward_accept: self.forward_accept.or(below.forward_accept),
            no_ip_masq: self.no_ip_masq.or(below.no_ip_masq),
            udp_gso: self.udp_gso.or(below.udp_gso),
            udp_gro: self.udp_gro.or(below.udp_gro),
            tun_offload: self.tun_offload.or(below.tun_offload),
            metrics_addr: self.metrics_addr.or(below.metrics_addr),
            metrics_per_peer: self.metrics_per_peer.or(below.metrics_per_peer),
            ui_addr: self.ui_addr.or(below.ui_addr),
            policy_marks: self.policy_marks.or(below.policy_marks),
            policy_log_group: self.policy_log_group.or(below.policy_log_group),
            log_level: self.log_level.or(below.log_level),
            log_format: self.log_format.or(below.log_format),
            check: self.check,
        }
    }
}

impl CleanupFlags {
    /// The same as flags of `meshd run`, which the file is laid under.
    pub(super) fn as_run_flags(&self) -> RunFlags {
        RunFlags {
            config: self.config.clone(),
            interface: self.interface.clone(),
            state_dir: self.state_dir.clone(),
            run_dir: self.run_dir.clone(),
            log_level: self.log_level.clone(),
            log_format: self.log_format,
            ..RunFlags::default()
        }
    }
}

impl EtcdFlags {
    /// Whether they say who it is that asks.
    pub(super) const fn has_identity(&self) -> bool {
        self.certfile.is_some() || self.keyfile.is_some() || self.username.is_some() || self.password_file.is_some()
    }

    /// The same for no particular user.
    pub(super) fn without_identity(self) -> Self {
        Self { certfile: None, keyfile: None, username: None, password_file: None, ..self }
    }

    pub(super) fn over(self, below: Self) -> Self {
        Self {
            endpoints: self.endpoints.or(below.endpoints),
            prefix: self.prefix.or(below.prefix),
            cafile: self.cafile.or(below.cafile),
            certfile: self.certfile.or(below.certfile),
            keyfile: self.keyfile.or(below.keyfile),
            username: self.username.or(below.username),
            password_file: self.password_file.or(below.password_file),
            allow_plaintext: self.allow_plaintext.or(below.allow_plaintext),
        }
    }

    /// What they say of etcd; each mistake is added to `mistakes`.
    pub fn check(self, mistakes: &mut Vec<String>) -> EtcdOptions {
        let endpoints = self.endpoints.unwrap_or_else(|| vec!["http://127.0.0.1:2379".to_owned()]);
        let user = match (self.username, self.password_file) {
            (Some(user), Some(file)) => match Credentials::in_file(user, file.clone()) {
                Ok(credentials) => Some(credentials),
                Err(error) => {
                    mistakes.push(format!("--etcd-password-file {}: {error}", file.display()));
                    None
                }
            },
            (None, None) => None,
            (Some(_), None) => {
                mistakes.push("--etcd-username: needs --etcd-password-file too".to_owned());
                None
            }
            (None, Some(_)) => {
                mistakes.push("--etcd-password-file: needs --etcd-username too".to_owned());
                None
            }
        };
        for (flag, file) in
            [("--etcd-cafile", &self.cafile), ("--etcd-certfile", &self.certfile), ("--etcd-keyfile", &self.keyfile)]
        {
            if let Some(file) = file.as_ref().filter(|file| !file.is_file()) {
                mistakes.push(format!("{flag} {}: no such file", file.display()));
            }
        }
        let options = EtcdOptions {
            endpoints: endpoints.iter().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()).collect(),
            prefix: self.prefix.unwrap_or_else(|| "/meshd".to_owned()),
            tls: TlsFiles { ca: self.cafile, cert: self.certfile, key: self.keyfile },
            user,
            allow_plaintext: self.allow_plaintext.unwrap_or_default(),
        };
        if let Err(errors) = options.check() {
            mistakes.extend(errors.iter().map(ToString::to_string));
        }
        options
    }
}
