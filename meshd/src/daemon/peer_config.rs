//! A wg-quick file for an external peer, with every node as a peer.

use std::{fmt::Write as _, net::SocketAddr};

use etcd_schema::{PeerName, PublicKey};
use ipnet::IpNet;
use mesh::topology::{PeerId, Topology};

use super::published::NodeIdentity;

/// The file for `name`, with one `[Peer]` per node that either end can initiate to; `None` without such an external
/// peer. `mtu` is that of pods in bytes. It contains no secrets: the peer's private key never leaves its machine, and a
/// pre-shared key is mentioned, not printed.
pub(super) fn wg_quick(
    name: &PeerName,
    topology: &Topology,
    own: &NodeIdentity,
    own_endpoints: &[SocketAddr],
    mtu: u16,
) -> Option<String> {
    let peer = topology.outside.get(name)?;
    let outside = name.as_str();
    let mut text = String::new();
    let mut line = |line: String| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{line}");
    };
    line(format!("# wg-quick file for external peer {name}, revision {}", topology.revision));
    line("[Interface]".to_owned());
    line("# PrivateKey = the private key of this public key:".to_owned());
    line(format!("#   {}", peer.public_key));
    let (addresses, behind): (Vec<IpNet>, Vec<IpNet>) =
        peer.allowed_ips.iter().copied().partition(|net| net.prefix_len() == net.max_prefix_len());
    if !addresses.is_empty() {
        line(format!("Address = {}", list(&addresses)));
    }
    // The first address of a network is unused, and the record does not state the peer's own address.
    if !behind.is_empty() {
        line(format!("# Routed behind this peer: {}", list(&behind)));
    }
    line(format!("MTU = {mtu}"));
    if let Some(port) = peer.endpoint.map(|endpoint| endpoint.port()) {
        line(format!("ListenPort = {port}"));
    }
    let mut node = |name: &str, key: &PublicKey, allowed: Vec<IpNet>, endpoints: &[SocketAddr]| {
        if allowed.is_empty() || (endpoints.is_empty() && peer.endpoint.is_none()) {
            return;
        }
        line(String::new());
        line(format!("# {name}"));
        line("[Peer]".to_owned());
        line(format!("PublicKey = {key}"));
        if peer.preshared_key.is_some() {
            line(format!("# PresharedKey = the presharedKey in peers/{outside}"));
        }
        line(format!("AllowedIPs = {}", list(&allowed)));
        // A wg-quick file knows one endpoint: one of the family that most networks have.
        if let Some(endpoint) = endpoints.iter().find(|at| at.is_ipv4()).or_else(|| endpoints.first()) {
            line(format!("Endpoint = {endpoint}"));
            line("PersistentKeepalive = 25".to_owned());
        }
    };
    node(&own.name, &own.public_key, topology.own_prefixes().collect(), own_endpoints);
    for (owner, member) in topology.members.iter() {
        if let (PeerId::Node(_) | PeerId::Lease(_), Some(key)) = (owner, member.keys.first()) {
            node(&member.name, key, member.prefixes().collect(), &member.endpoints);
        }
    }
    Some(text)
}

fn list(nets: &[IpNet]) -> String {
    nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use keys::PrivateKey;
    use mesh::topology::ExternalPeer;

    use super::*;

    fn key(seed: u8) -> PublicKey {
        PrivateKey::from_bytes([seed; 32]).public()
    }

    fn world(endpoint: Option<&str>) -> (Topology, NodeIdentity) {
        let mut topology = Topology { own_subnets: vec!["10.244.1.0-24".parse().unwrap()], ..Topology::default() };
        topology.outside.insert(
            "laptop".parse().unwrap(),
            Arc::new(ExternalPeer {
                public_key: key(9),
                preshared_key: Some(etcd_schema::PresharedKey::from_bytes([0x5a; 32])),
                allowed_ips: vec!["10.9.0.2/32".parse().unwrap()],
                endpoint: endpoint.map(|text| text.parse().unwrap()),
                persistent_keepalive: None,
                site: None,
            }),
        );
        let own = NodeIdentity {
            name: "a".to_owned(),
            id: "aa".to_owned(),
            site: None,
            cluster: etcd_schema::Cluster::default(),
            public_key: key(1),
            interface: "meshd0".to_owned(),
        };
        (topology, own)
    }

    #[test]
    fn names_each_node_that_can_be_called() {
        let (topology, own) = world(None);
        let at = ["[2001:db8::1]:51820".parse().unwrap(), "192.0.2.1:51820".parse().unwrap()];
        let text = wg_quick(&"laptop".parse().unwrap(), &topology, &own, &at, 1420).unwrap();
        for line in [
            "Address = 10.9.0.2/32",
            "MTU = 1420",
            "PersistentKeepalive = 25",
            &format!("PublicKey = {}", key(1)),
            "AllowedIPs = 10.244.1.0/24",
            "Endpoint = 192.0.2.1:51820",
            "# PresharedKey = the presharedKey in peers/laptop",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in:\n{text}");
        }
        assert!(wg_quick(&"other".parse().unwrap(), &topology, &own, &at, 1420).is_none());
    }

    #[test]
    fn gives_the_peer_addresses_only_and_names_the_networks_behind_it() {
        let (mut topology, own) = world(None);
        let laptop = "laptop".parse().unwrap();
        let text_for = |topology: &Topology| wg_quick(&laptop, topology, &own, &[], 1380).unwrap();
        let peer = Arc::make_mut(topology.outside.get_mut(&laptop).unwrap());
        peer.allowed_ips =
            ["10.9.0.2/32", "10.8.0.0/24", "fd09::2/128", "fd09:1::/64"].map(|net| net.parse().unwrap()).to_vec();
        let text = text_for(&topology);
        for line in ["Address = 10.9.0.2/32, fd09::2/128", "# Routed behind this peer: 10.8.0.0/24, fd09:1::/64"] {
            assert!(text.lines().any(|have| have == line), "{line} in:\n{text}");
        }
        Arc::make_mut(topology.outside.get_mut(&laptop).unwrap()).allowed_ips = vec!["10.8.0.0/24".parse().unwrap()];
        assert!(!text_for(&topology).contains("Address"));
    }

    #[test]
    fn leaves_out_a_node_when_neither_can_call_the_other() {
        let (topology, own) = world(None);
        assert!(!wg_quick(&"laptop".parse().unwrap(), &topology, &own, &[], 1420).unwrap().contains("[Peer]"));
        let (topology, own) = world(Some("198.51.100.4:51820"));
        assert!(wg_quick(&"laptop".parse().unwrap(), &topology, &own, &[], 1420).unwrap().contains("[Peer]"));
    }

    #[test]
    fn prints_no_secret() {
        use base64::Engine as _;
        let (topology, own) = world(None);
        let text = wg_quick(&"laptop".parse().unwrap(), &topology, &own, &[], 1420).unwrap();
        assert!(!text.contains(&base64::engine::general_purpose::STANDARD.encode([0x5a; 32])));
    }
}
