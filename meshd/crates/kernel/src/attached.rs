//! Kernel state before the first plan: direct routes of an earlier run, and other programs' routes into this node's
//! subnets, which lead to attached containers.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    Kernel,
    netlink::{Rtnetlink, RtnetlinkError, tun_among},
    nft::{Element, NftBackend as _, ObservedTable},
    plan::{FLOOR_METRIC, MAIN_TABLE},
    route::NextHop,
};

/// Others' routes that show that containers are attached to this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttachedRoutes {
    /// There are none.
    None,
    /// These destinations lie in this node's subnets.
    Routes(Vec<IpNet>),
    /// Of some mesh network this node's subnet is not known, and these destinations lie in it.
    Possible(Vec<IpNet>),
}

/// Traces in the kernel of this node's place in the mesh, and others' routes.
#[derive(Debug, Default)]
struct Traces {
    /// The subnets that the firewall knows as this node's own.
    subnets: Vec<IpNet>,
    /// The mesh networks, by the floor under them.
    networks: Vec<IpNet>,
    /// The TUN device's addresses.
    overlay: Vec<IpAddr>,
    /// Destinations of others' routes that do not lead to the TUN device.
    others: Vec<IpNet>,
}

impl Kernel {
    /// Routes of ours to a next hop: prefix and gateway.
    ///
    /// # Errors
    /// [`RtnetlinkError`].
    pub async fn direct_routes(&self) -> Result<Vec<(IpNet, IpAddr)>, RtnetlinkError> {
        let routes = Rtnetlink::open()?.routes(self.options.route_protocol).await?;
        let direct = routes.into_iter().filter(|route| route.table == MAIN_TABLE);
        Ok(direct
            .filter_map(|route| match route.target {
                NextHop::Device { gateway: Some(gateway), onlink: false, .. } => Some((route.dst, gateway)),
                _ => None,
            })
            .collect())
    }

    /// Destinations inside `subnets` that others have routes to: a bridge's prefix, a container's address.
    ///
    /// # Errors
    /// [`RtnetlinkError`].
    pub async fn foreign_routes_within(&self, subnets: &[IpNet]) -> Result<Vec<IpNet>, RtnetlinkError> {
        if subnets.is_empty() {
            return Ok(Vec::new());
        }
        let netlink = Rtnetlink::open()?;
        let tun = tun_among(&netlink.links().await?, &self.options.tun).map(|tun| tun.index);
        let others = self.others(&netlink, tun).await?;
        Ok(others.into_iter().filter(|dst| subnets.iter().any(|subnet| subnet.contains(dst))).collect())
    }

    /// Whether containers are attached to this node, by the subnets that the caller knows and by the kernel state of an
    /// earlier run.
    ///
    /// # Errors
    /// [`RtnetlinkError`].
    pub async fn attachments(&self, known: &[IpNet]) -> Result<AttachedRoutes, RtnetlinkError> {
        let netlink = Rtnetlink::open()?;
        let tun = tun_among(&netlink.links().await?, &self.options.tun).map(|tun| tun.index);
        let mut traces = Traces { others: self.others(&netlink, tun).await?, ..Traces::default() };
        if tun.is_some() {
            let addresses = netlink.addresses(tun).await?;
            traces.overlay = addresses.into_iter().map(|found| found.address.addr()).collect();
        }
        let ours = netlink.routes(self.options.route_protocol).await?;
        let floor = ours.into_iter().filter(|route| route.table == MAIN_TABLE && route.metric == FLOOR_METRIC);
        traces.networks = floor.map(|route| route.dst).collect();
        // Without nftables there is one witness less, which makes the judgement more careful.
        if let Ok(Some(table)) = self.nft.table(&self.options.table_name).await {
            traces.subnets = own_subnets(&table);
        }
        Ok(traces.judge(known))
    }

    /// Destinations of others' routes, but for those to the TUN device.
    async fn others(&self, netlink: &Rtnetlink, tun: Option<u32>) -> Result<Vec<IpNet>, RtnetlinkError> {
        let routes = netlink.others_routes(self.options.route_protocol).await?;
        Ok(routes
            .into_iter()
            .filter(|route| !matches!(route.target, NextHop::Device { index, .. } if Some(index) == tun))
            .map(|route| route.dst)
            .collect())
    }
}

impl Traces {
    fn judge(&self, known: &[IpNet]) -> AttachedRoutes {
        let subnets: Vec<IpNet> = known.iter().chain(&self.subnets).copied().collect();
        let attached: Vec<IpNet> =
            self.others.iter().filter(|dst| subnets.iter().any(|subnet| subnet.contains(*dst))).copied().collect();
        if !attached.is_empty() {
            return AttachedRoutes::Routes(attached);
        }
        // Of another cluster's, too: a node that has moved to another network may have left containers in the one
        // before.
        let unknown: Vec<&IpNet> =
            self.networks.iter().filter(|network| !subnets.iter().any(|subnet| network.contains(subnet))).collect();
        let lost: Vec<IpNet> = self
            .overlay
            .iter()
            .copied()
            .filter(|own| !subnets.iter().any(|s| s.contains(own)))
            .map(IpNet::from)
            .collect();
        let possible = self.others.iter().filter(|dst| {
            unknown.iter().any(|network| network.contains(*dst))
                // The subnet of a bridge holds this node's own address, too.
                || lost.iter().any(|own| dst.prefix_len() > 0 && dst.contains(own))
                || lost.iter().any(|own| self.networks.iter().any(|network| network.contains(own) && network.contains(*dst)))
        });
        let possible: Vec<IpNet> = possible.copied().collect();
        if possible.is_empty() { AttachedRoutes::None } else { AttachedRoutes::Possible(possible) }
    }
}

/// This node's own prefixes, without its overlay addresses.
fn own_subnets(table: &ObservedTable) -> Vec<IpNet> {
    let elements = ["own4", "own6"].into_iter().filter_map(|name| table.sets.get(name)?.elements.as_ref()).flatten();
    elements
        .filter_map(|element| match element {
            Element::Prefix(prefix) if prefix.prefix_len() < prefix.max_prefix_len() => Some(*prefix),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn traces(others: &[&str]) -> Traces {
        Traces {
            networks: nets(&["10.244.0.0/16", "fd42:244::/48"]),
            overlay: vec!["10.244.3.0".parse().unwrap(), "fd42:244:0:3:ffff:ffff:ffff:ffff".parse().unwrap()],
            others: nets(others),
            ..Traces::default()
        }
    }

    const BOTH: [&str; 2] = ["10.244.3.0/24", "fd42:244:0:3::/64"];

    #[test]
    fn routes_into_a_known_subnet_are_attachments() {
        for other in ["10.244.3.0/24", "10.244.3.7/32", "fd42:244:0:3::7/128"] {
            assert_eq!(traces(&["0.0.0.0/0", other]).judge(&nets(&BOTH)), AttachedRoutes::Routes(nets(&[other])));
            let by_table = Traces { subnets: nets(&BOTH), ..traces(&["0.0.0.0/0", other]) };
            assert_eq!(by_table.judge(&[]), AttachedRoutes::Routes(nets(&[other])));
        }
    }

    #[test]
    fn routes_elsewhere_are_none_once_the_subnet_is_known() {
        let elsewhere = traces(&["0.0.0.0/0", "::/0", "192.0.2.0/24", "10.244.9.0/24", "10.0.0.0/8"]);
        assert_eq!(elsewhere.judge(&nets(&BOTH)), AttachedRoutes::None);
    }

    #[test]
    fn routes_into_another_network_may_be_containers_of_before_a_move() {
        let networks = nets(&["10.244.0.0/16", "fd42:244::/48", "10.42.0.0/16", "fd42:42::/48"]);
        let other = Traces { networks, ..traces(&["0.0.0.0/0", "10.42.9.0/24", "fd42:42:0:9::7/128"]) };
        let possible = AttachedRoutes::Possible(nets(&["10.42.9.0/24", "fd42:42:0:9::7/128"]));
        assert_eq!(other.judge(&nets(&BOTH)), possible);
        assert_eq!(other.judge(&[]), possible);
    }

    #[test]
    fn routes_into_the_network_may_be_attachments_while_the_subnet_is_not_known() {
        let unknown = traces(&["0.0.0.0/0", "::/0", "192.0.2.0/24", "10.244.9.7/32"]);
        assert_eq!(unknown.judge(&[]), AttachedRoutes::Possible(nets(&["10.244.9.7/32"])));
        // Known in one family only.
        let half = traces(&["fd42:244:0:3::7/128"]);
        assert_eq!(half.judge(&nets(&BOTH[..1])), AttachedRoutes::Possible(nets(&["fd42:244:0:3::7/128"])));
        assert_eq!(traces(&["0.0.0.0/0", "::/0", "192.0.2.0/24"]).judge(&[]), AttachedRoutes::None);
    }

    #[test]
    fn the_overlay_address_tells_that_a_known_subnet_is_an_old_one() {
        let moved = traces(&["10.244.3.9/32"]);
        let old = nets(&["10.244.8.0/24", "fd42:244:0:3::/64"]);
        assert_eq!(moved.judge(&old), AttachedRoutes::Possible(nets(&["10.244.3.9/32"])));
        // Without a floor, a bridge shows by its prefix.
        let bare = Traces { networks: Vec::new(), ..traces(&["0.0.0.0/0", "10.244.3.0/24", "192.0.2.0/24"]) };
        assert_eq!(bare.judge(&[]), AttachedRoutes::Possible(nets(&["10.244.3.0/24"])));
    }
}
