//! Addresses: what the IPAM plugin is told, and what it answers.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use ipnet::IpNet;
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Map, Value, json};

use crate::{
    config::Config,
    daemon::Network,
    environment::AttachmentName,
    error::{CniError, Code},
};

/// The IPAM plugin of a configuration that names none.
pub const HOST_LOCAL: &str = "host-local";
/// Addresses at the start of a subnet that containers do not get: its own, which is the node's overlay address in IPv4 and
/// the routers' anycast address in IPv6, and the next one, which a bridge takes.
const RESERVED: u8 = 2;

/// The IPAM plugin that the configuration names.
#[must_use]
pub fn kind(config: &Config) -> &str {
    config.ipam.get("type").and_then(Value::as_str).unwrap_or(HOST_LOCAL)
}

/// The addresses of a subnet that containers get: first and last. `None` when it has none to give.
#[must_use]
pub fn range(subnet: &IpNet, overlay: &[IpAddr]) -> Option<(IpAddr, IpAddr)> {
    let (first, mut last): (IpAddr, IpAddr) = match subnet {
        IpNet::V4(net) => {
            let first = u32::from(net.network()).checked_add(u32::from(RESERVED))?;
            // The last one is the broadcast address.
            (Ipv4Addr::from(first).into(), Ipv4Addr::from(u32::from(net.broadcast()).checked_sub(1)?).into())
        }
        IpNet::V6(net) => {
            let first = u128::from(net.network()).checked_add(u128::from(RESERVED))?;
            (Ipv6Addr::from(first).into(), net.broadcast().into())
        }
    };
    while overlay.contains(&last) {
        last = match last {
            IpAddr::V4(ip) => Ipv4Addr::from(u32::from(ip).checked_sub(1)?).into(),
            IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip).checked_sub(1)?).into(),
        };
    }
    (first <= last).then_some((first, last))
}

/// The configuration for the IPAM plugin: the network's own, with what host-local needs to know of this node where the
/// operator has not said otherwise. `network` is not needed to give addresses back.
///
/// # Errors
/// [`Code::NoSubnet`] when the subnets have no address to give.
pub fn configuration(config: &Config, network: Option<&Network>) -> Result<Map<String, Value>, CniError> {
    let mut whole = config.raw.clone();
    whole.remove("prevResult");
    let mut ipam = config.ipam.clone();
    if kind(config) == HOST_LOCAL {
        ipam.insert("type".to_owned(), HOST_LOCAL.into());
        ipam.entry("dataDir").or_insert_with(|| config.address_dir().to_string_lossy().into());
        if !ipam.contains_key("ranges") && !ipam.contains_key("subnet") {
            ipam.insert("ranges".to_owned(), ranges(network)?);
        }
    }
    whole.insert("ipam".to_owned(), Value::Object(ipam));
    Ok(whole)
}

fn ranges(network: Option<&Network>) -> Result<Value, CniError> {
    let Some(network) = network else {
        // It refuses to give back what it has no range for, and looks for the container's addresses in all of them.
        return Ok(json!([[{"subnet": "192.0.2.0/24"}]]));
    };
    let sets: Vec<Value> = network
        .subnets
        .iter()
        .filter_map(|subnet| {
            let (first, last) = range(subnet, &network.overlay)?;
            let gateway = match subnet.network() {
                IpAddr::V4(ip) => IpAddr::from(Ipv4Addr::from(u32::from(ip) + 1)),
                IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip) + 1).into(),
            };
            Some(json!([{"subnet": subnet, "rangeStart": first, "rangeEnd": last, "gateway": gateway}]))
        })
        .collect();
    if sets.len() < network.subnets.len() || sets.is_empty() {
        return Err(CniError::new(Code::NoSubnet, "this node's subnet has no address for a container"));
    }
    Ok(Value::Array(sets))
}

/// Addresses that host-local has given out of a folder of its own for one network: each with who has it.
///
/// # Errors
/// When the folder is there and cannot be read.
pub fn reserved(dir: &Path, network: &str) -> io::Result<Vec<(IpAddr, AttachmentName)>> {
    let entries = match fs::read_dir(dir.join(network)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut reserved = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let Some(address) = name.to_str().and_then(address_of_file) else { continue };
        // One that is given back meanwhile is none any more.
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        let mut lines = text.lines();
        let (container_id, ifname) = (lines.next().unwrap_or_default().trim(), lines.next().unwrap_or_default().trim());
        reserved.push((address, AttachmentName { container_id: container_id.to_owned(), ifname: ifname.to_owned() }));
    }
    Ok(reserved)
}

/// Gives back what `gone` says of a network's addresses, under host-local's own lock. Returns how many.
///
/// # Errors
/// When the folder is there and cannot be changed.
pub fn give_back(dir: &Path, network: &str, gone: impl Fn(&AttachmentName) -> bool) -> io::Result<usize> {
    let dir_of_network = dir.join(network);
    if !dir_of_network.is_dir() {
        return Ok(0);
    }
    let file = File::options().create(true).truncate(false).write(true).open(dir_of_network.join("lock"))?;
    let _lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io::Error::from(errno))?;
    let mut count = 0;
    for (address, holder) in reserved(dir, network)? {
        if gone(&holder) {
            fs::remove_file(dir_of_network.join(file_of_address(address)))?;
            count += 1;
        }
    }
    Ok(count)
}

/// host-local names a file after its address; where a file system does not take colons, with underscores.
fn address_of_file(name: &str) -> Option<IpAddr> {
    name.parse().or_else(|_| name.replace('_', ":").parse()).ok()
}

fn file_of_address(address: IpAddr) -> String {
    address.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> Network {
        Network {
            networks: vec!["10.244.0.0/16".parse().unwrap(), "fd42:244::/48".parse().unwrap()],
            subnets: vec!["10.244.3.0/24".parse().unwrap(), "fd42:244:0:3::/64".parse().unwrap()],
            overlay: vec!["10.244.3.0".parse().unwrap(), "fd42:244:0:3:ffff:ffff:ffff:ffff".parse().unwrap()],
            mtu: 1420,
        }
    }

    fn config(ipam: &Value) -> Config {
        let config = json!({"cniVersion": "1.0.0", "name": "mesh", "type": "meshd-cni", "runDir": "/r",
            "prevResult": {}, "runtimeConfig": {"ips": ["10.244.3.9"]}, "ipam": ipam});
        Config::parse(config.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn host_local_gets_both_subnets_without_the_nodes_own_addresses() {
        let told = configuration(&config(&json!({})), Some(&network())).unwrap();
        assert_eq!(
            told["ipam"],
            json!({"type": "host-local", "dataDir": "/r/ipam", "ranges": [
                [{"subnet": "10.244.3.0/24", "rangeStart": "10.244.3.2", "rangeEnd": "10.244.3.254", "gateway": "10.244.3.1"}],
                [{"subnet": "fd42:244:0:3::/64", "rangeStart": "fd42:244:0:3::2",
                  "rangeEnd": "fd42:244:0:3:ffff:ffff:ffff:fffe", "gateway": "fd42:244:0:3::1"}]]})
        );
        assert_eq!(told["runtimeConfig"], json!({"ips": ["10.244.3.9"]}));
        assert!(!told.contains_key("prevResult"));
    }

    #[test]
    fn what_the_operator_says_stands() {
        let ipam = json!({"type": "host-local", "dataDir": "/d", "subnet": "10.0.0.0/8", "routes": []});
        assert_eq!(configuration(&config(&ipam), Some(&network())).unwrap()["ipam"], ipam);
        let other = json!({"type": "dhcp"});
        assert_eq!(configuration(&config(&other), None).unwrap()["ipam"], other);
    }

    #[test]
    fn small_subnets_have_what_is_left() {
        let of = |net: &str, overlay: &str| range(&net.parse().unwrap(), &[overlay.parse().unwrap()]);
        let pair = |first: &str, last: &str| Some((first.parse().unwrap(), last.parse().unwrap()));
        assert_eq!(of("10.0.0.0/29", "10.0.0.0"), pair("10.0.0.2", "10.0.0.6"));
        assert_eq!(of("10.0.0.0/30", "10.0.0.0"), pair("10.0.0.2", "10.0.0.2"));
        assert_eq!(of("10.0.0.0/31", "10.0.0.0"), None);
        assert_eq!(of("fd00::/126", "fd00::3"), pair("fd00::2", "fd00::2"));
        assert_eq!(of("fd00::/127", "fd00::1"), None);
    }

    #[test]
    fn addresses_of_who_is_gone_are_given_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(give_back(dir.path(), "mesh", |_| true).unwrap(), 0);
        let folder = dir.path().join("mesh");
        fs::create_dir(&folder).unwrap();
        for (address, id) in [("10.244.3.2", "a"), ("fd42::2", "a"), ("10.244.3.3", "b")] {
            fs::write(folder.join(address), format!("{id}\r\neth0")).unwrap();
        }
        fs::write(folder.join("last_reserved_ip.0"), "10.244.3.3").unwrap();
        assert_eq!(reserved(dir.path(), "mesh").unwrap().len(), 3);
        assert_eq!(give_back(dir.path(), "mesh", |holder| holder.container_id == "a").unwrap(), 2);
        let left = reserved(dir.path(), "mesh").unwrap();
        assert_eq!(
            left.iter().map(|(ip, name)| (ip.to_string(), name.container_id.clone())).collect::<Vec<_>>(),
            [("10.244.3.3".to_owned(), "b".to_owned())]
        );
        assert!(folder.join("last_reserved_ip.0").exists());
    }
}
