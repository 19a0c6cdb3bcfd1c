//! A mesh across two sites.

use std::{thread, time::Duration};

use serde_json::Value;

use super::TwoSites;
use crate::{Etcd, Meshd, MeshdNode, Namespace, PingReport, Pod, Sniffer, await_ok, ping};

/// The network configuration that scenarios use unless they bring their own: both families, everything else default.
pub const CONFIG: &str = r#"{"Network": "10.244.0.0/16", "SubnetLen": 24,
    "EnableIPv6": true, "IPv6Network": "fd42:244::/48",
    "Backend": {"Type": "wireguard"}}"#;

/// Where that configuration is in etcd.
const CONFIG_KEY: &str = "/meshd/config";
/// For a whole mesh to come up on a busy machine.
const READY: Duration = Duration::from_secs(120);

/// [`TwoSites`] with an etcd, a node on every host, a pod on every node, and a sniffer on the router that fails the
/// scenario when an address of the mesh passes it in the clear.
pub struct Mesh {
    /// Watches the router.
    pub sniffer: Sniffer,
    /// One pod per node, in the order of the nodes.
    pub pods: Vec<Pod>,
    /// The nodes, those of site east first.
    pub nodes: Vec<MeshdNode>,
    /// The store; one member.
    pub etcd: Etcd,
    /// The network underneath, and the Lab.
    pub sites: TwoSites,
}

impl Mesh {
    /// Two nodes on each site, with [`CONFIG`]. Returns when every node has its subnets; paths may still be coming up,
    /// see [`await_all_reach_each_other`](Self::await_all_reach_each_other).
    #[must_use]
    #[track_caller]
    pub fn start(title: &str) -> Self {
        Self::start_on(TwoSites::new(title), CONFIG, |meshd| meshd)
    }

    /// On these sites and with this configuration; `finish` can add to each node's command line.
    ///
    /// # Panics
    /// When the configuration is not JSON, or a node does not come up.
    #[must_use]
    #[track_caller]
    pub fn start_on(sites: TwoSites, config: &str, finish: impl Fn(Meshd) -> Meshd) -> Self {
        let networks: Value =
            serde_json::from_str(config).unwrap_or_else(|error| panic!("the configuration is not JSON: {error}"));
        let prefixes: Vec<_> = ["Network", "IPv6Network"]
            .into_iter()
            .map(|key| &networks[key])
            .chain(networks["Networks"].as_array().into_iter().flatten().map(|entry| &entry["cidr"]))
            .filter_map(Value::as_str)
            .map(|text| text.parse().unwrap_or_else(|error| panic!("{text}: {error}")))
            .collect();
        let sniffer = sites.router.sniff(&prefixes);
        let etcd = sites.start_etcd(1);
        etcd.put(CONFIG_KEY, config);
        let nodes = sites.start_nodes(&etcd, finish);
        let pods = nodes
            .iter()
            .map(|node| {
                node.await_ready(READY);
                node.pod("pod")
            })
            .collect();
        Self { sniffer, pods, nodes, etcd, sites }
    }

    /// The node with this name.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    #[track_caller]
    pub fn node(&self, name: &str) -> &MeshdNode {
        &self.nodes[self.index(name)]
    }

    /// The pod on the node with this name.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    #[track_caller]
    pub fn pod(&self, node: &str) -> &Pod {
        &self.pods[self.index(node)]
    }

    /// Waits until every pod reaches every other, in every family that they have.
    ///
    /// # Panics
    /// When they do not in time; the message names a pair that does not.
    #[track_caller]
    pub fn await_all_reach_each_other(&self) {
        await_ok("every pod to reach every other", READY, || {
            match self.ping_all().into_iter().find(|report| report.lost() > 0) {
                None => Ok(()),
                Some(report) => Err(report.text),
            }
        });
    }

    /// Pings from every pod to every other in every family that they have, once each.
    #[must_use]
    pub fn ping_all(&self) -> Vec<PingReport> {
        // A thread per source: a mesh of twenty has hundreds of pairs.
        thread::scope(|scope| {
            let threads: Vec<_> = (0..self.pods.len())
                .map(|from| {
                    let others = self.pods.iter().enumerate().filter(move |(to, _)| *to != from);
                    scope.spawn(move || {
                        let source: &Namespace = &self.pods[from];
                        others.flat_map(|(_, pod)| pod.addresses()).map(|address| ping(source, address)).collect()
                    })
                })
                .collect();
            let joined: Vec<Vec<PingReport>> = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect();
            joined.into_iter().flatten().collect()
        })
    }

    #[track_caller]
    fn index(&self, name: &str) -> usize {
        match self.nodes.iter().position(|node| node.name() == name) {
            Some(index) => index,
            None => panic!("no node is called {name}"),
        }
    }
}
