//! A machine: disk, kernel and network, which outlive its daemon.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use control_core::{core::CacheContent, membership::LocalFacts};
use etcd_schema::{NodeId, PublicKey};
use ipnet::IpNet;
use mesh::{
    kernel_state::{Desired, Floor, PeerRoute, PrefixOn, RouteVia},
    path::MacAddress,
};
use rand::{Rng as _, rngs::StdRng};

/// The UDP port of every tunnel.
pub(crate) const PORT: u16 = 51820;

/// A node's machine.
pub(crate) struct Machine {
    pub(crate) id: NodeId,
    pub(crate) facts: LocalFacts,
    /// The underlay network that it is on; nodes of one are at one site.
    pub(crate) lan: u8,
    pub(crate) address: Ipv4Addr,
    pub(crate) mac: MacAddress,
    /// Its link to the LAN carries packets.
    pub(crate) lan_up: bool,
    pub(crate) etcd_reachable: bool,
    /// The last cache that was written, with the time by the machine's clock.
    pub(crate) disk: Option<(CacheContent, Duration)>,
    /// RUN: the last process that held the identity.
    pub(crate) note: Option<u64>,
    pub(crate) starts: u64,
    /// Its wall clock at the beginning of the simulation.
    pub(crate) clock: Duration,
    /// A container has an address of its subnet.
    pub(crate) attached: bool,
    pub(crate) kernel: KernelModel,
}

impl Machine {
    pub(crate) fn new(number: u8, lan: u8) -> Self {
        let host = number / 8 + 1;
        let address = Ipv4Addr::new(192, 168, lan, host);
        let facts = LocalFacts {
            name: format!("node-{number}").parse().unwrap(),
            site: Some(format!("site-{lan}").parse().unwrap()),
            cluster: etcd_schema::Cluster::default(),
            public_key: PublicKey::from_bytes([number + 9; 32]),
            next_public_key: None,
            listen_port: PORT,
            endpoints: vec![(IpAddr::V4(address), PORT).into()],
            addresses: vec![IpNet::new(address.into(), 24).unwrap()],
            vteps: Vec::new(),
            public_ipv4: Some(address),
            public_ipv6: None,
            version: "1".into(),
            readiness: None,
        };
        Self {
            id: format!("n{number}").parse().unwrap(),
            facts,
            lan,
            address,
            mac: MacAddress([2, 0, 0, 0, lan, host]),
            lan_up: true,
            etcd_reachable: true,
            disk: None,
            note: None,
            starts: 0,
            clock: Duration::from_secs(1_000_000_000),
            attached: false,
            kernel: KernelModel::default(),
        }
    }
}

/// Operations that a kernel refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum KernelRefusal {
    #[default]
    Nothing,
    /// The rules of nftables, and what needs them.
    Rules,
    /// Some of the routes.
    Routes,
    /// The rules of policies: no first route may be made.
    Policies,
}

/// Routes and guard of a machine. They outlive the daemon.
#[derive(Debug, Default)]
pub(crate) struct KernelModel {
    pub(crate) refuses: KernelRefusal,
    pub(crate) routes: Vec<PeerRoute>,
    pub(crate) floor: Floor,
    pub(crate) direct: Vec<(IpNet, IpAddr)>,
    pub(crate) accepted: Vec<PrefixOn>,
    pub(crate) guarded: Vec<IpNet>,
}

impl KernelModel {
    /// Makes it what is desired, in the order of the daemon's steps: rules that open nothing before routes, and what
    /// only direct routes need before those. Returns whether all was taken.
    pub(crate) fn apply(&mut self, desired: &Desired, rng: &mut StdRng) -> bool {
        self.floor = desired.floor.clone();
        let rules = self.refuses != KernelRefusal::Rules;
        if rules {
            self.direct = desired.firewall.direct.iter().map(|direct| (direct.prefix, direct.via)).collect();
            self.accepted.clone_from(&desired.firewall.accepted);
            self.guarded.clone_from(&desired.firewall.networks);
        }
        let mut all = rules;
        let before = std::mem::take(&mut self.routes);
        for route in desired.routes.values() {
            let same = before.iter().any(|held| held == route);
            let opens = matches!(&route.via, RouteVia::Neighbour { via, .. } if !self.is_open(&route.dst, *via));
            let refused = opens || (self.refuses == KernelRefusal::Routes && rng.random_range(0..3) == 0);
            if same || !refused {
                self.routes.push(route.clone());
            } else {
                all = false;
                // The old one stays, unless the guard is closed for it.
                let old = before.iter().find(|held| held.dst == route.dst);
                self.routes.extend(old.filter(|old| self.is_closed_or_open(old)).cloned());
            }
        }
        all
    }

    fn is_open(&self, dst: &IpNet, via: IpAddr) -> bool {
        self.direct.contains(&(*dst, via))
    }

    fn is_closed_or_open(&self, route: &PeerRoute) -> bool {
        match &route.via {
            RouteVia::Neighbour { via, .. } | RouteVia::Vtep { via, .. } => self.is_open(&route.dst, *via),
            RouteVia::Tunnel | RouteVia::Unreachable => true,
        }
    }

    /// The way of a packet to this address: the most specific route, else the fallback.
    pub(crate) fn route(&self, to: IpAddr) -> Option<RouteVia> {
        let of = self.routes.iter().filter(|route| route.dst.contains(&to)).max_by_key(|route| route.dst.prefix_len());
        let floor = self.floor.prefixes().any(|net| net.contains(&to)).then_some(RouteVia::Unreachable);
        of.map(|route| route.via.clone()).or(floor)
    }
}
