//! Settings and hardware addresses of links.

use netlink::{Mac, NetlinkError};

use crate::{environment::AttachmentName, namespace::sysctl};

/// Has the kernel forward IPv4 packets that arrive on an interface of the host, whatever its default for new ones is. For
/// IPv6 it has one setting for all of them.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn forward(interface: &str) -> Result<(), NetlinkError> {
    sysctl(&forwarding(interface), "1")
}

/// Whether it does; also where the kernel has no such setting.
pub(crate) fn forwards(interface: &str) -> bool {
    let value = std::fs::read_to_string(format!("/proc/sys/net/{}", forwarding(interface)));
    value.map_or(true, |value| value.trim() != "0")
}

fn forwarding(interface: &str) -> String {
    format!("ipv4/conf/{interface}/forwarding")
}

/// As people write it.
#[must_use]
pub fn mac_text(mac: &Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Lets no host on the wire give this interface routes or addresses.
pub(crate) fn quiet(ifname: &str) -> Result<(), NetlinkError> {
    sysctl(&format!("ipv6/conf/{ifname}/accept_ra"), "0")?;
    sysctl(&format!("ipv6/conf/{ifname}/autoconf"), "0")?;
    sysctl(&format!("ipv4/conf/{ifname}/accept_redirects"), "0")?;
    sysctl(&format!("ipv6/conf/{ifname}/accept_redirects"), "0")
}

/// A hardware address of this attachment's own, the same every time, from the range that is free for local use. Set by us,
/// it is left alone by udev, which would else give the host's end another one after containers have learnt it.
pub(crate) fn mac(name: &AttachmentName, which: u8) -> Mac {
    let [_, _, a, b, c, d, e, f] = hash(name, which).to_be_bytes();
    [(a & 0xfc) | 2, b, c, d, e, f]
}

/// FNV-1a over the attachment's name.
pub(crate) fn hash(name: &AttachmentName, which: u8) -> u64 {
    let bytes = [which].into_iter().chain(name.container_id.bytes()).chain([b'@']).chain(name.ifname.bytes());
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    // The lower bits of names that differ in their last letter only would else differ little.
    let mixed = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}
