//! VXLAN devices, with neighbours and forwarding entries.

use std::{collections::BTreeSet, net::IpAddr};

use mesh::{kernel_state::VxlanDevice, path::MacAddress};
use rtnetlink::{
    LinkUnspec, LinkVxlan,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        link::InfoVxlan,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    },
};

use super::{
    Rtnetlink, RtnetlinkError, VxlanShape, done,
    message::{family_of, forwarding_entry, permanent_neighbour},
};
use crate::failure::FailureCause;

impl Rtnetlink {
    /// The permanent neighbours of a link.
    pub(crate) async fn permanent_neighbours(
        &self,
        index: u32,
        ipv4: bool,
    ) -> Result<BTreeSet<(IpAddr, MacAddress)>, RtnetlinkError> {
        Ok(self.neighbours(index, ipv4).await?.iter().filter_map(permanent_neighbour).collect())
    }

    /// The forwarding entries of a VXLAN device.
    pub(crate) async fn forwarding_entries(
        &self,
        index: u32,
    ) -> Result<BTreeSet<(MacAddress, IpAddr)>, RtnetlinkError> {
        let mut request = NeighbourMessage::default();
        request.header.family = AddressFamily::Bridge;
        request.attributes.push(NeighbourAttribute::IfIndex(index));
        let messages = self
            .dump("forwarding entries", RouteNetlinkMessage::GetNeighbour(request), |m| match m {
                RouteNetlinkMessage::NewNeighbour(m) => Some(m),
                _ => None,
            })
            .await?;
        Ok(messages.iter().filter(|m| m.header.ifindex == index).filter_map(forwarding_entry).collect())
    }

    /// Makes a VXLAN device, down.
    pub(crate) async fn add_vxlan(&self, device: &VxlanDevice, shape: VxlanShape) -> Result<(), FailureCause> {
        let link = LinkVxlan::new(device.name.as_str(), shape.vni)
            .dev(shape.underlay)
            .port(shape.port)
            .learning(shape.learning)
            .append_info_data(match device.local.address {
                IpAddr::V4(local) => InfoVxlan::Local(local),
                IpAddr::V6(local) => InfoVxlan::Local6(local),
            });
        let link = if shape.gbp { link.gbp() } else { link };
        let link = link.address(device.local.mac.0.to_vec()).mtu(device.mtu).down();
        done(self.handle.link().add(link.build()).execute().await, &[])
    }

    /// Writes a name beside its name on an interface. The kernel ignores it in the message that makes a device.
    pub(crate) async fn set_alias(&self, index: u32, alias: &str) -> Result<(), FailureCause> {
        let message = LinkUnspec::new_with_index(index).alias(alias).build();
        done(self.handle.link().set(message).execute().await, &[])
    }

    pub(crate) async fn set_mac(&self, index: u32, mac: MacAddress) -> Result<(), FailureCause> {
        let message = LinkUnspec::new_with_index(index).address(mac.0.to_vec()).build();
        done(self.handle.link().set(message).execute().await, &[])
    }

    pub(crate) async fn set_neighbour(&self, index: u32, address: IpAddr, mac: MacAddress) -> Result<(), FailureCause> {
        let request = self.handle.neighbours().add(index, address).link_layer_address(&mac.0).replace();
        done(request.execute().await, &[])
    }

    pub(crate) async fn remove_neighbour(&self, index: u32, address: IpAddr) -> Result<(), FailureCause> {
        let mut message = NeighbourMessage::default();
        message.header.family = family_of(address.is_ipv4());
        message.header.ifindex = index;
        message.attributes.push(NeighbourAttribute::Destination(address.into()));
        done(self.handle.neighbours().del(message).execute().await, &[libc::ENOENT, libc::ENODEV])
    }

    pub(crate) async fn set_forwarding(&self, index: u32, mac: MacAddress, to: IpAddr) -> Result<(), FailureCause> {
        let request = self.handle.neighbours().add_bridge(index, &mac.0).destination(to);
        done(request.flags(NeighbourFlags::Own).replace().execute().await, &[])
    }

    pub(crate) async fn remove_forwarding(&self, index: u32, mac: MacAddress, to: IpAddr) -> Result<(), FailureCause> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.header.flags = NeighbourFlags::Own;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::from(to)));
        done(self.handle.neighbours().del(message).execute().await, &[libc::ENOENT, libc::ENODEV])
    }
}
