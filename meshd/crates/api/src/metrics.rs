//! `/metrics`: OpenMetrics text, rendered for each scrape from the data behind `meshctl`.
//!
//! Labels are bounded: reasons, states and codes are fixed lists. The number of per-peer series grows with the square
//! of the mesh, so they are optional, under the names of the common WireGuard exporter.

use std::{collections::BTreeMap, fmt, fs};

use ::text::printable;
use api_types::{DaemonState, Path, Peer, Route, Status};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, text},
    metrics::MetricType,
    registry::{Registry, Unit},
};

use super::source::{Figures, Source};

/// Of [`encode`]'s text.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Everything that one scrape sees.
#[derive(Debug)]
struct Scrape {
    status: Status,
    peers: Vec<Peer>,
    routes: Vec<Route>,
    figures: Figures,
    process: ProcessMetrics,
    per_peer: bool,
}

/// The metrics as they are now.
///
/// # Errors
/// Never in practice: a string takes everything.
pub(super) fn encode(source: &dyn Source, per_peer: bool) -> Result<String, fmt::Error> {
    let scrape = Scrape {
        status: source.status(),
        peers: source.peers(),
        routes: source.routes(),
        figures: source.figures(),
        process: ProcessMetrics::own(),
        per_peer,
    };
    let mut registry = Registry::default();
    registry.register_collector(Box::new(scrape));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Out(encoder);
        self.daemon(&mut out)?;
        self.mesh(&mut out)?;
        self.policy(&mut out)?;
        if self.per_peer {
            self.each_peer(&mut out)?;
        }
        self.process.encode(&mut out)
    }
}

impl Scrape {
    fn daemon(&self, out: &mut Out<'_>) -> fmt::Result {
        let Self { status, figures, .. } = self;
        out.gauge("meshd_build_info", "Version of the daemon; always 1", None, |one| {
            one([("version", status.version.as_str())], 1.0)
        })?;
        let help = "Name, id and site of the node and version of its daemon, for joins; always 1";
        let site = status.site.as_deref().unwrap_or_default();
        out.gauge("meshd_node_info", help, None, |one| {
            let (node, id, version) = (status.node.as_str(), status.id.as_str(), status.version.as_str());
            one([("node", node), ("id", id), ("site", site), ("version", version)], 1.0)
        })?;
        out.gauge("meshd_state", "State of the daemon: 1 for the current one", None, |one| {
            for (state, name) in STATES {
                one([("state", name)], f64::from(u8::from(state == status.state)))?;
            }
            Ok(())
        })?;
        let mut problems: BTreeMap<&str, f64> = BTreeMap::new();
        for problem in &status.problems {
            *problems.entry(&problem.code).or_default() += 1.0;
        }
        out.gauge("meshd_problems", "Current problems, by code; see meshctl status", None, |one| {
            problems.iter().try_for_each(|(code, count)| one([("code", *code)], *count))
        })?;
        out.gauge1(
            "meshd_etcd_connected",
            "Whether the daemon is connected to etcd",
            None,
            status.etcd.connected.into(),
        )?;
        if let Some(age) = status.etcd.age {
            out.gauge1(
                "meshd_etcd_age",
                "Time since the state in etcd was last fully known",
                Some(Unit::Seconds),
                age,
            )?;
        }
        out.gauge1("meshd_etcd_revision", "etcd revision in force", None, status.revision as f64)?;
        out.counter1("meshd_etcd_lists", "Full lists read from etcd", None, figures.lists)?;
        let help = "Changed records found by an audit that the etcd watch had missed";
        out.counter1("meshd_etcd_audit_differences", help, None, figures.audit_differences)?;
        out.gauge1("meshd_attachments", "Containers attached to this node", None, figures.attachments as f64)
    }

    fn mesh(&self, out: &mut Out<'_>) -> fmt::Result {
        let by_path = |paths: Vec<Path>| -> Vec<(&str, f64)> {
            let count = |of: Path| paths.iter().filter(|path| **path == of).count() as f64;
            Path::all().map(|path| (path.word(), count(path))).collect()
        };
        let peers = by_path(self.peers.iter().map(|peer| peer.path).collect());
        out.gauge("meshd_peers", "Other nodes and external peers, by path", None, |one| {
            peers.iter().try_for_each(|(name, count)| one([("path", *name)], *count))
        })?;
        let help = "Unreachable peers, by state: online or offline according to etcd, unknown for other peers";
        out.gauge("meshd_unreachable_peers", help, None, |one| {
            let lost = || self.peers.iter().filter(|peer| peer.path == Path::Unreachable);
            [(Some(true), "online"), (Some(false), "offline"), (None, "unknown")].into_iter().try_for_each(
                |(online, name)| one([("state", name)], lost().filter(|peer| peer.online == online).count() as f64),
            )
        })?;
        let routes = by_path(self.routes.iter().map(|route| route.path).collect());
        out.gauge("meshd_routes", "Routes of the mesh, by path", None, |one| {
            routes.iter().try_for_each(|(name, count)| one([("path", *name)], *count))
        })?;
        let (rx, tx) = self.figures.tunnel_bytes;
        out.counter1("meshd_tunnel_received", "Authenticated outer payload", Some(Unit::Bytes), rx)?;
        out.counter1("meshd_tunnel_sent", "Outer payload", Some(Unit::Bytes), tx)?;
        out.counter("meshd_dropped_packets", "Packets dropped, by reason", None, |one| {
            self.figures.drops.iter().try_for_each(|drop| one([("reason", drop.reason.as_str())], drop.packets as f64))
        })?;
        out.gauge("meshd_offload_active", "Whether the tunnel uses this kernel offload", None, |one| {
            self.figures
                .offloads
                .iter()
                .try_for_each(|(offload, active)| one([("offload", *offload)], f64::from(u8::from(*active))))
        })
    }

    fn policy(&self, out: &mut Out<'_>) -> fmt::Result {
        let policy = &self.status.policy;
        let help = "etcd revision of the policies in force; 0: none yet, and pods are unreachable";
        out.gauge1("meshd_policy_revision", help, None, policy.revision as f64)?;
        out.gauge("meshd_policy_mode", "Policy mode: 1 for the current one", None, |one| {
            ["enforce", "audit"]
                .into_iter()
                .try_for_each(|mode| one([("mode", mode)], f64::from(u8::from(mode == policy.mode))))
        })?;
        out.gauge1("meshd_policy_pods", "Pods known to the policy engine", None, policy.pods as f64)?;
        out.gauge1("meshd_policies", "Policies in force", None, policy.policies as f64)?;
        let took = self.figures.policy_apply.as_secs_f64();
        let help = "Time to put the last policy change in force";
        out.gauge1("meshd_policy_apply", help, Some(Unit::Seconds), took)?;
        let help = "First packets of flows at this node's end of the tunnel, by verdict";
        out.counter("meshd_policy_verdicts", help, None, |one| {
            self.figures
                .verdicts
                .iter()
                .try_for_each(|count| one([("verdict", count.reason.as_str())], count.packets as f64))
        })
    }

    /// As the common exporter names them.
    fn each_peer(&self, out: &mut Out<'_>) -> fmt::Result {
        let labelled: Vec<(String, &Peer)> = self
            .peers
            .iter()
            .map(|peer| (peer.subnets.iter().map(ToString::to_string).collect::<Vec<_>>().join(","), peer))
            .collect();
        let interface = self.figures.interface.as_str();
        let labels = |allowed: &'_ str, peer: &'_ Peer| {
            [
                ("interface", interface.to_owned()),
                ("public_key", peer.public_key.clone().unwrap_or_default()),
                ("allowed_ips", allowed.to_owned()),
                ("friendly_name", printable(&peer.name).into_owned()),
            ]
        };
        out.counter("wireguard_sent", "Bytes sent to the peer", Some(Unit::Bytes), |one| {
            labelled.iter().try_for_each(|(allowed, peer)| one(labels(allowed, peer), peer.tx as f64))
        })?;
        out.counter("wireguard_received", "Bytes received from the peer", Some(Unit::Bytes), |one| {
            labelled.iter().try_for_each(|(allowed, peer)| one(labels(allowed, peer), peer.rx as f64))
        })?;
        let help = "Unix time of the last handshake; 0: never";
        out.gauge("wireguard_latest_handshake", help, Some(Unit::Seconds), |one| {
            labelled.iter().try_for_each(|(allowed, peer)| {
                one(labels(allowed, peer), peer.latest_handshake.unwrap_or_default() as f64)
            })
        })
    }
}

const STATES: [(DaemonState, &str); 6] = [
    (DaemonState::Starting, "starting"),
    (DaemonState::Joining, "joining"),
    (DaemonState::Running, "running"),
    (DaemonState::Degraded, "degraded"),
    (DaemonState::Removed, "removed"),
    (DaemonState::Cloned, "cloned"),
];

/// Of an exemplar: there is none.
type NoLabels = [(&'static str, &'static str); 0];

/// Where metrics are written.
struct Out<'e>(DescriptorEncoder<'e>);

impl Out<'_> {
    fn gauge1(&mut self, name: &str, help: &str, unit: Option<Unit>, value: f64) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        metric.encode_gauge(&value)
    }

    fn counter1(&mut self, name: &str, help: &str, unit: Option<Unit>, value: u64) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        metric.encode_counter::<NoLabels, _, u64>(&value, None)
    }

    /// `each` gives every series to the function that it is given.
    fn gauge<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        each: impl Each<L>,
    ) -> fmt::Result {
        self.family(name, help, unit, MetricType::Gauge, each, |mut series, value| series.encode_gauge(&value))
    }

    /// As [`gauge`](Self::gauge).
    fn counter<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        each: impl Each<L>,
    ) -> fmt::Result {
        let put = |mut series: MetricEncoder<'_>, value: f64| series.encode_counter::<NoLabels, _, f64>(&value, None);
        self.family(name, help, unit, MetricType::Counter, each, put)
    }

    fn family<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        of: MetricType,
        each: impl Each<L>,
        put: impl Fn(MetricEncoder<'_>, f64) -> fmt::Result,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, unit.as_ref(), of)?;
        each(&mut |labels, value| put(metric.encode_family(&labels)?, value))
    }
}

/// Gives every series, its labels and its value, to the function that it is given.
trait Each<L>: FnOnce(&mut dyn FnMut(L, f64) -> fmt::Result) -> fmt::Result {}

impl<L, F: FnOnce(&mut dyn FnMut(L, f64) -> fmt::Result) -> fmt::Result> Each<L> for F {}

/// The process metrics of Prometheus' client libraries.
#[derive(Debug, Default)]
struct ProcessMetrics {
    resident: u64,
    cpu: f64,
    files: usize,
    started: f64,
}

impl ProcessMetrics {
    /// Reads /proc; missing values are 0.
    fn own() -> Self {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096);
        let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The second field is the program's name in parentheses, which may hold anything.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
        let booted = fs::read_to_string("/proc/stat").unwrap_or_default();
        let booted = booted.lines().find_map(|line| line.strip_prefix("btime ")?.parse::<f64>().ok()).unwrap_or(0.0);
        Self {
            resident: pages * page as u64,
            cpu: (field(14) + field(15)) / ticks,
            files: fs::read_dir("/proc/self/fd").map_or(0, Iterator::count),
            started: booted + field(22) / ticks,
        }
    }

    fn encode(&self, out: &mut Out<'_>) -> fmt::Result {
        let seconds = Some(Unit::Seconds);
        out.counter("process_cpu", "User and system time", seconds.clone(), |one| one([("", ""); 0], self.cpu))?;
        out.gauge1("process_resident_memory", "Resident memory", Some(Unit::Bytes), self.resident as f64)?;
        out.gauge1("process_open_fds", "Open files", None, self.files as f64)?;
        out.gauge1("process_start_time", "Start time, as Unix time", seconds, self.started)
    }
}
