//! The flags of `meshd run`, which are also the keys of its file and, as `MESHD_*`, variables; `meshd cleanup` has a
//! subset of them.

use std::{net::IpAddr, path::PathBuf};

use clap::{Args, ValueEnum, builder::BoolishValueParser};
use program::{etcd_flags::EtcdFlags, log::LogFormat};
use serde::Deserialize;
use tunnel::OffloadSetting;

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
    /// Kubernetes cluster of this node, as Networks in config names it: it leases its subnet from that cluster's
    /// networks. For policies, the Node objects that meshd-sync copies decide [default: none]
    #[arg(long, env = "MESHD_CLUSTER", value_name = "NAME")]
    pub cluster: Option<String>,
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
    /// Seconds, 0 to 9, that a container's start waits for its Pod object if meshd-sync copies this node's cluster.
    /// Until the object is in etcd, policies that may select the pod refuse its traffic [default: 5]
    #[arg(long, env = "MESHD_POD_WAIT", value_name = "SECONDS")]
    pub pod_wait: Option<u64>,
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

/// Flags of `meshd cleanup`: the locations of the daemon's state. `None` means not given.
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

impl RunFlags {
    /// These flags, and `below` where they say nothing.
    #[must_use]
    pub fn over(self, below: Self) -> Self {
        Self {
            config: self.config,
            node: self.node.or(below.node),
            site: self.site.or(below.site),
            cluster: self.cluster.or(below.cluster),
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
            pod_wait: self.pod_wait.or(below.pod_wait),
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
