//! Reads of the main loop: underlay, attached containers, neighbours, counters.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
};

use api_types::DropCount;
use control_core::membership::LocalFacts;
use etcd_schema::{NodeId, PublicKey, SubnetKey};
use ipnet::IpNet;
use kernel::{Kernel, Underlay, UnderlaySelection};
use mesh::{
    address::{Family, prefixes},
    interface::InterfaceName,
    path::MacAddress,
};
use node_core::Input;
use prober::Neighbours;

use super::NodeLoop;
use crate::{daemon::underlay, settings::Settings};

impl NodeLoop {
    /// The host's ends of the interfaces of attached pods.
    pub(super) fn pod_interfaces(&self) -> Vec<InterfaceName> {
        let table = self.published.attachments.table();
        let table = table.borrow();
        let attached = table.attachments.values().filter_map(|one| one.attach.as_ref());
        attached.filter_map(|attach| attach.interface.parse().ok()).collect()
    }

    /// Tells the control plane whether containers hold addresses of `subnet`, since it draws no other one while they do,
    /// and which `earlier` ones they hold no addresses of.
    pub(super) async fn read_attached(&self, subnet: Option<SubnetKey>, earlier: Vec<SubnetKey>) {
        let own: Vec<IpNet> = subnet.iter().chain(&earlier).flat_map(prefixes).collect();
        match self.kernel.foreign_routes_within(&own).await {
            Ok(routes) => {
                let within = |key: &SubnetKey, dst: &IpNet| prefixes(key).any(|net| net.contains(dst));
                let attached = routes.iter().any(|dst| subnet.is_some_and(|subnet| within(&subnet, dst)));
                self.control.attached.send_if_modified(|held| std::mem::replace(held, attached) != attached);
                // A container that is being attached has addresses before it has a route.
                let table = self.published.attachments.table();
                let held: Vec<IpNet> =
                    table.borrow().attachments.values().flat_map(|one| one.addresses()).map(IpNet::from).collect();
                let is_idle = |key: &SubnetKey| !routes.iter().chain(&held).any(|dst| within(key, dst));
                let idle: BTreeSet<SubnetKey> = earlier.into_iter().filter(is_idle).collect();
                self.control.idle.send_if_modified(|known| {
                    let changed = *known != idle;
                    *known = idle;
                    changed
                });
            }
            Err(error) => tracing::warn!(%error, "cannot read routes"),
        }
    }

    /// Looks at the underlay; publishes what has changed.
    pub(super) async fn read_underlay(&mut self) {
        match self.kernel.underlay(&selection(&self.settings)).await {
            Ok(underlay) if underlay != self.underlay => {
                self.underlay = underlay;
                self.endpoints = underlay::endpoints(&self.settings, &self.underlay);
                let list = |words: Vec<String>| words.join(", ");
                let interfaces = list(self.carriers().into_iter().map(|carrier| carrier.name).collect());
                let endpoints = list(self.endpoints.iter().map(ToString::to_string).collect());
                tracing::info!(interfaces, endpoints, "underlay changed");
                let facts = facts(&self.id, &self.settings, self.public_key, &self.underlay, &self.endpoints);
                self.control.facts.send_modify(|held| {
                    let readiness = held.readiness.take();
                    *held = LocalFacts { readiness, ..facts };
                });
                // Peers need not wait for the record: the endpoint of a live one follows what it receives.
                self.tunnel.announce();
            }
            Ok(_) => {}
            // What is published stays: a cable that is out for a moment moves no node.
            Err(error) => tracing::warn!(%error, "cannot read the underlay"),
        }
    }

    /// Reads the neighbours as long as they decide on paths of an earlier run.
    pub(super) async fn read_earlier_neighbours(&self) {
        if !self.prober.with_agents(|agents| agents.resumes()) {
            return;
        }
        let mut known = HashMap::new();
        for family in Family::BOTH {
            let Some(link) = underlay::of(&self.underlay, family) else { continue };
            let neighbours = read_neighbours(&self.kernel, link.index, family).await;
            known.extend(neighbours.into_iter().map(|(address, mac)| ((link.index, address), mac)));
        }
        self.prober.with_agents(|agents| agents.set_neighbours(known));
    }

    pub(super) async fn read_mtus(&mut self) {
        let peers = self.tunnel.peers().into_iter();
        let mtus = Input::PeerMtus(peers.map(|peer| (peer.name, peer.inner_mtu)).collect());
        self.step(mtus).await;
    }

    pub(super) async fn read_drops(&mut self) {
        if let Ok(drops) = self.kernel.drops().await {
            self.firewall_drops = drops
                .into_iter()
                .map(|(rule, counter)| DropCount { reason: format!("firewall_{rule}"), packets: counter.packets })
                .collect();
        }
    }
}

pub(super) fn selection(settings: &Settings) -> UnderlaySelection {
    settings.iface.clone().map_or(UnderlaySelection::Auto, UnderlaySelection::Named)
}

pub(super) fn facts(
    id: &NodeId,
    settings: &Settings,
    public_key: PublicKey,
    underlay: &Underlay,
    endpoints: &[SocketAddr],
) -> LocalFacts {
    let public = |family| endpoints.iter().map(SocketAddr::ip).find(|ip| Family::of(*ip) == family);
    LocalFacts {
        name: settings.node.clone(),
        site: settings.site.clone(),
        cluster: settings.cluster.clone(),
        public_key,
        next_public_key: None,
        listen_port: settings.listen_port,
        endpoints: endpoints.to_vec(),
        addresses: underlay::addresses(underlay),
        public_ipv4: public(Family::V4).and_then(|ip| if let IpAddr::V4(ip) = ip { Some(ip) } else { None }),
        public_ipv6: public(Family::V6).and_then(|ip| if let IpAddr::V6(ip) = ip { Some(ip) } else { None }),
        vteps: underlay::vteps(id, settings, underlay),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        readiness: None,
    }
}

/// The neighbours of one family on an interface. What cannot be read is not known: a path in doubt is left then.
pub(super) async fn read_neighbours(kernel: &Kernel, interface: u32, family: Family) -> Neighbours {
    let known = kernel.neighbours(interface, family == Family::V4).await.unwrap_or_default();
    known.into_iter().map(|(address, neighbour)| (address, MacAddress(neighbour.mac))).collect()
}
