//! Nodes that exist only in etcd: a mesh of any size, without machines.

use std::net::{IpAddr, Ipv4Addr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::json;

/// A configuration with room for 16,384 subnets, IPv4 alone.
pub const LARGE_CONFIG: &str = r#"{"Network": "10.64.0.0/10", "SubnetLen": 24, "Backend": {"Type": "wireguard"}}"#;

/// The records of a registered node without a daemon. Each number below 8,192 is another one.
///
/// It is at a site of its own, has the subnet with its number, counted from 10.64.1.0/24, and an endpoint in
/// 198.18.0.0/15, which is kept for benchmarks (RFC 2544).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PaperNode(u16);

impl PaperNode {
    /// The node with this number.
    ///
    /// # Panics
    /// When it is 8,192 or more.
    #[must_use]
    pub fn new(number: u16) -> Self {
        assert!(number < 8192, "a paper node's number is below 8,192");
        Self(number)
    }

    /// The address of its subnet, a /24.
    #[must_use]
    pub fn subnet(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 64, 1, 0)) + u32::from(self.0) * 256)
    }

    /// Its public key, without a known private key.
    #[must_use]
    pub fn public_key(self) -> [u8; 32] {
        // By seed: the same node has the same key each time.
        let mut key: [u8; 32] = StdRng::seed_from_u64(u64::from(self.0)).random();
        // RFC 7748, section 5: the highest bit is not part of the point.
        key[31] &= 0x7f;
        key
    }

    /// Where it says it is, at WireGuard's usual port.
    #[must_use]
    pub fn endpoint(self) -> IpAddr {
        let first = u32::from(Ipv4Addr::new(198, 18, 0, 1));
        Ipv4Addr::from(first + u32::from(self.0) * 16).into()
    }

    /// Keys and values, below the default prefix.
    #[must_use]
    pub fn entries(self) -> [(String, String); 3] {
        let number = self.0;
        let (key, address) = (STANDARD.encode(self.public_key()), self.endpoint());
        let [node, subnet, alive] = self.keys();
        let id = Self::id(number);
        let record = json!({
            "name": format!("paper-{number}"), "site": format!("paper-{number}"), "publicKey": key, "listenPort": 51820,
            "endpoints": [format!("{address}:51820")], "addresses": [format!("{address}/28")],
            "version": env!("CARGO_PKG_VERSION"),
        });
        let lease = json!({
            "PublicIP": address, "BackendType": "wireguard", "BackendData": {"PublicKey": key, "Port": 51820}, "Node": id,
        });
        let life = json!({"bootId": format!("paper-{number}"), "startCount": 1, "incarnation": number});
        [(node, record.to_string()), (subnet, lease.to_string()), (alive, life.to_string())]
    }

    /// The keys alone.
    #[must_use]
    pub fn keys(self) -> [String; 3] {
        let id = Self::id(self.0);
        [format!("/meshd/nodes/{id}"), format!("/meshd/subnets/{}-24", self.subnet()), format!("/meshd/alive/{id}")]
    }

    fn id(number: u16) -> String {
        format!("n{:016x}", 0x7061_7065_7200_0000 + u64::from(number))
    }
}

#[cfg(test)]
mod tests {
    use etcd_schema::{Alive, NodeRecord, SubnetLease};

    use super::*;

    #[test]
    fn the_records_are_valid_and_differ() {
        let (mut first, second) = (PaperNode::new(0).entries(), PaperNode::new(8191).entries());
        for entries in [&first, &second] {
            NodeRecord::parse(entries[0].1.as_bytes()).unwrap();
            SubnetLease::parse(entries[1].1.as_bytes()).unwrap();
            Alive::parse(entries[2].1.as_bytes()).unwrap();
        }
        assert_eq!(first[1].0, "/meshd/subnets/10.64.1.0-24");
        assert_eq!(second[1].0, "/meshd/subnets/10.96.0.0-24");
        for (one, other) in first.iter_mut().zip(&second) {
            assert_ne!(one, other);
        }
    }
}
