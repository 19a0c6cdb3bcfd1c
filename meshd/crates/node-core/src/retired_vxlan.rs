//! VXLAN devices that the plan no longer has, kept for peers that do not know yet.

use std::time::Instant;

use cow_map::CowMap;
use ipnet::IpNet;
use mesh::{kernel_state::VxlanDevice, topology::PeerId};

use super::direct_sources::LINGER;

type Owners = CowMap<IpNet, PeerId>;

/// VXLAN devices, and their grace period after they leave the plan.
#[derive(Debug, Default)]
pub(super) struct RetiredVxlan {
    /// The devices of the last plan, and who owned their peers' prefixes.
    planned: (Vec<VxlanDevice>, Owners),
    retired: Vec<Retired>,
}

#[derive(Debug)]
struct Retired {
    device: VxlanDevice,
    owners: Owners,
    until: Instant,
}

impl RetiredVxlan {
    /// When a device is next to go.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.retired.iter().map(|retired| retired.until).min()
    }

    /// Adds devices that left the plan lately to `devices`, those of the plan, unless one of them takes their place. Of
    /// their peers, those stay whose prefixes have the same owners as before. No route leads into them.
    pub(super) fn linger(&mut self, devices: &mut Vec<VxlanDevice>, owners: &Owners, now: Instant) {
        let (planned, before) = std::mem::replace(&mut self.planned, (devices.clone(), owners.clone()));
        self.retired.extend(planned.into_iter().map(|device| Retired {
            device,
            owners: before.clone(),
            until: now + LINGER,
        }));
        let replaces = |one: &VxlanDevice, other: &VxlanDevice| {
            let listens = |device: &VxlanDevice| (device.vni, device.port, device.local.address.is_ipv4());
            one.name == other.name || listens(one) == listens(other)
        };
        self.retired.retain(|old| old.until > now && !devices.iter().any(|device| replaces(device, &old.device)));
        for Retired { device, owners: before, .. } in &self.retired {
            let same = |prefix: &IpNet| before.get(prefix).is_some_and(|owner| owners.get(prefix) == Some(owner));
            let mut device = device.clone();
            device.peers.retain(|peer| peer.prefixes.iter().all(same));
            devices.push(device);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, time::Duration};

    use mesh::{
        kernel_state::VxlanPeer,
        path::{MacAddress, Vtep},
    };

    use super::*;

    fn device(name: &str, vni: u32) -> VxlanDevice {
        let vtep = |last: u8| Vtep { address: IpAddr::from([192, 0, 2, last]), mac: MacAddress([2, 0, 0, 0, 0, last]) };
        let peer =
            |n: u8| VxlanPeer { next_hop: IpAddr::from([10, 244, n, 0]), vtep: vtep(n), prefixes: vec![prefix(n)] };
        VxlanDevice {
            name: name.parse().unwrap(),
            vni,
            port: 8472,
            underlay: "eth0".parse().unwrap(),
            local: vtep(1),
            mtu: 1450,
            learning: false,
            gbp: false,
            peers: vec![peer(2), peer(3)],
        }
    }

    fn prefix(n: u8) -> IpNet {
        format!("10.244.{n}.0/24").parse().unwrap()
    }

    fn owners(ids: [&str; 2]) -> Owners {
        let owner = |(n, id): (u8, &str)| (prefix(n), PeerId::Node(id.parse().unwrap()));
        (2..).zip(ids).map(owner).collect()
    }

    fn lingering(
        retired: &mut RetiredVxlan,
        planned: &[VxlanDevice],
        owners: &Owners,
        now: Instant,
    ) -> Vec<VxlanDevice> {
        let mut devices = planned.to_vec();
        retired.linger(&mut devices, owners, now);
        devices
    }

    #[test]
    fn a_device_stays_for_packets_under_way_and_its_peers_while_they_own_their_prefixes() {
        let (mut retired, start) = (RetiredVxlan::default(), Instant::now());
        let (old, same) = (device("flannel.1", 1), owners(["b", "c"]));
        assert_eq!(lingering(&mut retired, std::slice::from_ref(&old), &same, start), std::slice::from_ref(&old));
        assert_eq!(retired.next_deadline(), None);
        assert_eq!(lingering(&mut retired, &[], &same, start), std::slice::from_ref(&old));
        assert_eq!(retired.next_deadline(), Some(start + LINGER));
        // A prefix that is another's now has one sender, not two.
        let left = lingering(&mut retired, &[], &owners(["b", "d"]), start + Duration::from_secs(1));
        assert_eq!(left[0].peers, old.peers[..1]);
        assert_eq!(lingering(&mut retired, &[], &same, start + LINGER), []);
        assert_eq!(retired.next_deadline(), None);
    }

    #[test]
    fn a_planned_device_takes_the_place_of_one_that_hears_the_same() {
        for (planned, stays) in
            [(device("flannel.1", 1), false), (device("flannel.9", 1), false), (device("flannel.9", 9), true)]
        {
            let (mut retired, now) = (RetiredVxlan::default(), Instant::now());
            let mut old = device("flannel.1", 1);
            old.mtu = 1400;
            let _ = lingering(&mut retired, std::slice::from_ref(&old), &owners(["b", "c"]), now);
            let devices = lingering(&mut retired, std::slice::from_ref(&planned), &owners(["b", "c"]), now);
            assert_eq!(devices.len(), if stays { 2 } else { 1 }, "{planned:?}");
        }
    }
}
