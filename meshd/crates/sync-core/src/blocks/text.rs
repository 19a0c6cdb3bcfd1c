//! Keys of subnets by their text, for grants in etcd.

use ipnet::IpNet;

/// The beginnings of the keys below `subnets/` of all subnets inside `network`. For IPv4, no other subnet's key starts
/// with them; for IPv6, those of a larger network may.
#[must_use]
pub(crate) fn keys_within(network: &IpNet) -> Vec<String> {
    match network.trunc() {
        IpNet::V4(net) => {
            let octets = net.addr().octets();
            let whole = usize::from(net.prefix_len() / 8).min(3);
            // Length of the prefix within the octet that is not whole.
            let within = usize::from(net.prefix_len()) - 8 * whole;
            let start: String = octets[..whole].iter().map(|octet| format!("{octet}.")).collect();
            let end = if whole == 3 { '-' } else { '.' };
            if within == 0 {
                return vec![format!("subnets/{start}")];
            }
            let values = 1_u32 << (8 - within);
            let first = u32::from(octets[whole]);
            (first..first + values).map(|octet| format!("subnets/{start}{octet}{end}")).collect()
        }
        IpNet::V6(net) => {
            let whole = usize::from(net.prefix_len() / 16);
            // From the first zero on, the text may be shortened.
            let hextets = net.addr().segments();
            let plain = hextets[..whole].iter().take_while(|hextet| **hextet != 0);
            vec![format!("subnets/{}", plain.map(|hextet| format!("{hextet:x}:")).collect::<String>())]
        }
    }
}

#[cfg(test)]
mod tests {
    use etcd_schema::{Key, SubnetKey};
    use ipnet::{Ipv4Net, Ipv6Net};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_network_is_few_prefixes() {
        let of = |net: &str| keys_within(&net.parse().unwrap());
        assert_eq!(of("10.42.0.0/16"), ["subnets/10.42."]);
        assert_eq!(of("10.0.0.0/8"), ["subnets/10."]);
        assert_eq!(of("10.42.252.0/23"), ["subnets/10.42.252.", "subnets/10.42.253."]);
        assert_eq!(of("172.16.0.0/12").len(), 16);
        assert_eq!(of("10.42.7.64/31"), ["subnets/10.42.7.64-", "subnets/10.42.7.65-"]);
        assert_eq!(of("10.42.7.0/24"), ["subnets/10.42.7."]);
        assert_eq!(of("fd42:42::/48"), ["subnets/fd42:42:"]);
        assert_eq!(of("fd42:42:a1::/48"), ["subnets/fd42:42:a1:"]);
    }

    proptest! {
        #[test]
        fn exactly_the_keys_of_a_network_start_so(
            at: u32, len in 1u8..=30, other: u32, more in 0u8..=8, v6: u128, len6 in 1u8..=120,
        ) {
            let net = Ipv4Net::new(at.into(), len).unwrap().trunc();
            let starts = keys_within(&net.into());
            let within = (u32::from(net.addr()) | (other & u32::from(net.hostmask()))).into();
            for (address, len) in [(within, (len + more).min(32)), (other.into(), (len + more).min(32))] {
                let subnet = Ipv4Net::new(address, len).unwrap().trunc();
                let key = Key::Subnet(SubnetKey { v4: Some(subnet), v6: None }).to_string();
                prop_assert_eq!(starts.iter().any(|start| key.starts_with(start)), net.contains(&subnet), "{}", key);
            }
            let net = Ipv6Net::new(v6.into(), len6).unwrap().trunc();
            let within = v6 ^ (u128::from(other) & u128::from(net.hostmask()));
            let subnet = Ipv6Net::new(within.into(), (len6 + more).min(128)).unwrap().trunc();
            let key = Key::Subnet(SubnetKey { v4: None, v6: Some(subnet) }).to_string();
            prop_assert!(keys_within(&net.into()).iter().any(|start| key.starts_with(start)), "{}", key);
        }
    }
}
