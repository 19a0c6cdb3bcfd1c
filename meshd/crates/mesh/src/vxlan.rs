//! Names and hardware addresses of VXLAN devices.

use std::net::IpAddr;

use etcd_schema::{MacAddress, NodeId};

use crate::{address::Family, interface::InterfaceName};

/// The name of the device for inner packets of `family`: Flannel's, so that a node that takes over from Flannel has one
/// device and not two of one VNI. Where that would be too long for an interface, a shorter one.
#[must_use]
pub(crate) fn device_name(vni: u32, family: Family) -> InterfaceName {
    let (flannels, short) = match family {
        Family::V4 => ("flannel.", "vx4."),
        Family::V6 => ("flannel-v6.", "vx6."),
    };
    let named = |prefix: &str| InterfaceName::new(&format!("{prefix}{vni}"));
    // An identifier of 24 bits has at most 8 digits: the short name always fits.
    #[expect(clippy::expect_used, reason = "at most 12 characters, all of them fit for a name")]
    named(flannels).or_else(|_| named(short)).expect("a name of letters, digits and a dot")
}

/// The hardware address of a node's device for inner packets of `family`: the same after every restart. A hash of the
/// node's id, locally administered (IEEE 802), so that a record that names another's does not get
/// it: [`crate::plan`] gives an address that two claim to the one whose id it follows from.
#[must_use]
pub fn mac(id: &NodeId, family: Family) -> MacAddress {
    let text = id.as_str().bytes().chain([0, if family == Family::V4 { 4 } else { 6 }]);
    // FNV-1a, then the finalizer of MurmurHash3, which spreads the last bytes over all bits.
    let mut hash =
        text.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    for multiplier in [0xff51_afd7_ed55_8ccd_u64, 0xc4ce_b9fe_1a85_ec53] {
        hash = (hash ^ (hash >> 33)).wrapping_mul(multiplier);
    }
    let [_, _, first, rest @ ..] = (hash ^ (hash >> 33)).to_be_bytes();
    let [b, c, d, e, f] = rest;
    MacAddress([first & !1 | 2, b, c, d, e, f])
}

/// The next hop that stands for a peer's end in this node's device: for IPv4 its overlay address, as with Flannel; for IPv6
/// the link-local address that follows from its hardware address (RFC 4291, appendix A). The kernel refuses an IPv6 next
/// hop that another route leads to, as one does that is about to be replaced.
#[must_use]
pub(crate) fn next_hop(overlay: IpAddr, mac: MacAddress) -> IpAddr {
    if overlay.is_ipv4() {
        return overlay;
    }
    let [a, b, c, d, e, f] = mac.0;
    IpAddr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_device_has_flannels_name_where_it_fits() {
        let name = |vni, family| device_name(vni, family).to_string();
        assert_eq!(name(1, Family::V4), "flannel.1");
        assert_eq!(name(9999, Family::V6), "flannel-v6.9999");
        assert_eq!(name(10_000, Family::V6), "vx6.10000");
        assert_eq!(name(0xff_ffff, Family::V4), "vx4.16777215");
    }

    #[test]
    fn an_end_is_a_neighbour_by_its_overlay_or_link_local_address() {
        let mac = MacAddress([2, 0x42, 0xac, 0x11, 0, 7]);
        let hop = |overlay: &str| next_hop(overlay.parse().unwrap(), mac).to_string();
        assert_eq!(hop("10.244.3.0"), "10.244.3.0");
        assert_eq!(hop("fd42:244:0:3:ffff:ffff:ffff:ffff"), "fe80::42:acff:fe11:7");
    }

    #[test]
    fn addresses_differ_by_node_and_family() {
        let ids = (0..10_000).map(|n| format!("n{n}").parse::<NodeId>().unwrap());
        let all: BTreeSet<MacAddress> = ids.flat_map(|id| Family::BOTH.map(|family| mac(&id, family))).collect();
        assert_eq!(all.len(), 20_000);
        assert!(all.iter().all(|mac| mac.0[0] & 3 == 2), "of one interface, locally administered");
    }
}
