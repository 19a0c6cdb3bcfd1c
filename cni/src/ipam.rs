//! Source of a container's addresses: the daemon, or the IPAM plugin of the configuration.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    config::{self, Config},
    daemon::{AddressRange, AddressRequest, Network},
    environment::Environment,
    error::{CniError, Code},
    result::{AddResult, Ip, ResultRoute},
};

/// The plugin whose `ranges` the daemon understands, too.
const HOST_LOCAL: &str = "host-local";
/// Addresses at the start of a subnet that containers do not get: its own, which is the node's overlay address in IPv4
/// and the routers' anycast address in IPv6, and the next one, which a bridge takes.
const RESERVED: u8 = 2;

/// Where addresses come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressSource<'a> {
    /// The daemon allocates them.
    Daemon,
    /// The plugin of this name.
    Plugin(&'a str),
}

/// Where this configuration has addresses from. `host-local` without a `dataDir` of its own is the daemon with that
/// plugin's configuration: two stores for one subnet would give an address out twice.
#[must_use]
pub fn source(config: &Config) -> AddressSource<'_> {
    match config.ipam.get("type").and_then(Value::as_str) {
        None => AddressSource::Daemon,
        Some(HOST_LOCAL) if !config.ipam.contains_key("dataDir") => AddressSource::Daemon,
        Some(kind) => AddressSource::Plugin(kind),
    }
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

/// The ranges in host-local's configuration.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HostLocalRanges {
    #[serde(default)]
    ranges: Option<Vec<Vec<AddressRange>>>,
    #[serde(default)]
    subnet: Option<IpNet>,
    #[serde(default)]
    range_start: Option<IpAddr>,
    #[serde(default)]
    range_end: Option<IpAddr>,
    #[serde(default)]
    gateway: Option<IpAddr>,
}

/// The request to the daemon: ranges from the configuration and the capability `ipRanges`, and addresses from the
/// capability `ips`, `args.cni.ips` or `IP` in `CNI_ARGS`.
///
/// # Errors
/// [`Code::InvalidConfig`] or [`Code::InvalidEnvironment`] when one of them is malformed.
pub fn request(environment: &Environment, config: &Config) -> Result<AddressRequest, CniError> {
    let malformed = |what: &str| {
        let what = what.to_owned();
        move |error: serde_json::Error| CniError::new(Code::InvalidConfig, format!("{what}: {error}"))
    };
    let named: HostLocalRanges =
        serde_json::from_value(Value::Object(config.ipam.clone())).map_err(malformed("ipam"))?;
    let mut ranges: Vec<Vec<AddressRange>> = match config.raw.get("runtimeConfig").and_then(|it| it.get("ipRanges")) {
        None | Some(Value::Null) => Vec::new(),
        Some(ranges) => serde_json::from_value(ranges.clone()).map_err(malformed("runtimeConfig.ipRanges"))?,
    };
    let HostLocalRanges { range_start, range_end, gateway, .. } = named;
    ranges.extend(named.subnet.map(|subnet| vec![AddressRange { subnet, range_start, range_end, gateway }]));
    ranges.extend(named.ranges.into_iter().flatten());
    let mut ips = config::wanted_addresses(&config.raw)?;
    for text in environment.arg("IP").into_iter().flat_map(|list| list.split(',')) {
        let bad = || CniError::new(Code::InvalidEnvironment, format!("CNI_ARGS has IP={text}: must be an address"));
        ips.push(config::parse_address(text).ok_or_else(bad)?);
    }
    Ok(AddressRequest { ranges, ips })
}

/// The result for addresses that the daemon has allocated, with the configuration's `routes` and `resolvConf`.
///
/// # Errors
/// [`Code::InvalidConfig`] when `routes` is malformed, [`Code::Io`] when the file cannot be read.
pub fn allocated(config: &Config, addresses: &[IpNet]) -> Result<AddResult, CniError> {
    let routes: Vec<ResultRoute> = match config.ipam.get("routes") {
        None | Some(Value::Null) => Vec::new(),
        Some(routes) => serde_json::from_value(routes.clone())
            .map_err(|error| CniError::new(Code::InvalidConfig, format!("ipam.routes: {error}")))?,
    };
    let dns = match config.ipam.get("resolvConf").and_then(Value::as_str).filter(|path| !path.is_empty()) {
        None => Map::new(),
        Some(path) => {
            let text = fs::read_to_string(path)
                .map_err(|error| CniError::new(Code::Io, format!("ipam.resolvConf {path}: {error}")))?;
            resolver(&text)
        }
    };
    let ips = addresses.iter().map(|address| Ip { version: None, address: *address, gateway: None, interface: None });
    Ok(AddResult { interfaces: Vec::new(), ips: ips.collect(), routes, dns })
}

/// `dns` of a result by a `resolv.conf`.
fn resolver(text: &str) -> Map<String, Value> {
    let (mut nameservers, mut search, mut options, mut domain) = (Vec::new(), Vec::new(), Vec::new(), None);
    for line in text.lines().filter(|line| !line.starts_with(['#', ';'])) {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => nameservers.extend(words.next()),
            Some("domain") => domain = words.next(),
            Some("search") => search.extend(words),
            Some("options") => options.extend(words),
            _ => {}
        }
    }
    let mut dns = Map::new();
    for (name, list) in [("nameservers", nameservers), ("search", search), ("options", options)] {
        if !list.is_empty() {
            dns.insert(name.to_owned(), json!(list));
        }
    }
    dns.extend(domain.map(|domain| ("domain".to_owned(), domain.into())));
    dns
}

/// The configuration for an IPAM plugin: the network's own. A host-local without ranges gets those of `network`, which
/// is not needed to give addresses back.
///
/// # Errors
/// [`Code::NoSubnet`] when the subnets have no address to give.
pub fn configuration(config: &Config, network: Option<&Network>) -> Result<Map<String, Value>, CniError> {
    let mut whole = config.raw.clone();
    whole.remove("prevResult");
    let mut ipam = config.ipam.clone();
    if source(config) == AddressSource::Plugin(HOST_LOCAL)
        && !ipam.contains_key("ranges")
        && !ipam.contains_key("subnet")
    {
        ipam.insert("ranges".to_owned(), ranges(network)?);
    }
    whole.insert("ipam".to_owned(), Value::Object(ipam));
    Ok(whole)
}

fn ranges(network: Option<&Network>) -> Result<Value, CniError> {
    let Some(network) = network else {
        // It refuses to release addresses without a range, and searches all ranges for the container's addresses.
        return Ok(json!([[{"subnet": "192.0.2.0/24"}]]));
    };
    let sets: Vec<Value> = network
        .subnets
        .iter()
        .filter_map(|subnet| {
            let (first, last) = range(subnet, &network.overlay)?;
            Some(json!([{"subnet": subnet, "rangeStart": first, "rangeEnd": last}]))
        })
        .collect();
    if sets.len() < network.subnets.len() || sets.is_empty() {
        return Err(CniError::new(Code::NoSubnet, "this node's subnet is too small for container addresses"));
    }
    Ok(Value::Array(sets))
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
            "prevResult": {}, "runtimeConfig": {"ips": ["10.244.3.9/24"]}, "ipam": ipam});
        Config::parse(config.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_named_plugin_gives_the_addresses_and_host_local_only_with_a_folder_of_its_own() {
        for (ipam, named) in [
            (json!({}), AddressSource::Daemon),
            (json!({"subnet": "10.244.3.0/24"}), AddressSource::Daemon),
            (json!({"type": "host-local", "ranges": []}), AddressSource::Daemon),
            (json!({"type": "host-local", "dataDir": "/d"}), AddressSource::Plugin("host-local")),
            (json!({"type": "dhcp"}), AddressSource::Plugin("dhcp")),
        ] {
            assert_eq!(source(&config(&ipam)), named, "{ipam}");
        }
    }

    #[test]
    fn the_request_has_every_range_and_every_wanted_address() {
        let ipam = json!({"subnet": "10.244.3.0/24", "rangeStart": "10.244.3.20",
            "ranges": [[{"subnet": "fd42:244:0:3::/64", "rangeEnd": "fd42:244:0:3::ff", "gateway": "fd42:244:0:3::7"}]]});
        let mut config = config(&ipam);
        config.raw["runtimeConfig"]["ipRanges"] = json!([[{"subnet": "10.244.3.128/25"}]]);
        let environment = Environment { args: "IP=10.244.3.8,fd42::8".to_owned(), ..Environment::default() };
        let asked = request(&environment, &config).unwrap();
        assert_eq!(
            serde_json::to_value(&asked).unwrap(),
            json!({"ranges": [
                [{"subnet": "10.244.3.128/25"}],
                [{"subnet": "10.244.3.0/24", "rangeStart": "10.244.3.20"}],
                [{"subnet": "fd42:244:0:3::/64", "rangeEnd": "fd42:244:0:3::ff", "gateway": "fd42:244:0:3::7"}],
            ], "ips": ["10.244.3.9", "10.244.3.8", "fd42::8"]})
        );
        let nothing = json!({"cniVersion": "1.0.0", "name": "mesh", "type": "meshd-cni"});
        let nothing = Config::parse(nothing.to_string().as_bytes()).unwrap();
        assert_eq!(request(&Environment::default(), &nothing).unwrap(), AddressRequest::default());
    }

    #[test]
    fn malformed_wishes_are_refused_with_their_code() {
        let of = |args: &str, ipam: &Value| {
            let environment = Environment { args: args.to_owned(), ..Environment::default() };
            request(&environment, &config(ipam)).unwrap_err().code
        };
        assert_eq!(of("IP=10.244.3", &json!({})), Code::InvalidEnvironment);
        assert_eq!(of("", &json!({"subnet": "10.244.3.0"})), Code::InvalidConfig);
        assert_eq!(of("", &json!({"ranges": [{"subnet": "10.244.3.0/24"}]})), Code::InvalidConfig);
        let mut ips = config(&json!({}));
        ips.raw["runtimeConfig"]["ips"] = json!(["10.244.3.256"]);
        assert_eq!(request(&Environment::default(), &ips).unwrap_err().code, Code::InvalidConfig);
    }

    #[test]
    fn routes_and_name_servers_are_those_of_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("resolv.conf");
        fs::write(&file, "# by hand\nnameserver 10.96.0.10\nsearch a.example b.example\noptions ndots:5\n").unwrap();
        let ipam = json!({"routes": [{"dst": "192.0.2.0/24"}], "resolvConf": file});
        let result = allocated(&config(&ipam), &["10.244.3.2/24".parse().unwrap()]).unwrap();
        assert_eq!(result.ips[0].address.to_string(), "10.244.3.2/24");
        assert_eq!(result.routes[0].dst.to_string(), "192.0.2.0/24");
        let dns = json!({"nameservers": ["10.96.0.10"], "search": ["a.example", "b.example"], "options": ["ndots:5"]});
        assert_eq!(Value::Object(result.dns), dns);
    }

    #[test]
    fn a_named_host_local_without_ranges_gets_both_subnets_without_the_nodes_own_addresses() {
        let told = configuration(&config(&json!({"type": "host-local", "dataDir": "/d"})), Some(&network())).unwrap();
        assert_eq!(
            told["ipam"],
            json!({"type": "host-local", "dataDir": "/d", "ranges": [
                [{"subnet": "10.244.3.0/24", "rangeStart": "10.244.3.2", "rangeEnd": "10.244.3.254"}],
                [{"subnet": "fd42:244:0:3::/64", "rangeStart": "fd42:244:0:3::2",
                  "rangeEnd": "fd42:244:0:3:ffff:ffff:ffff:fffe"}]]})
        );
        assert_eq!(told["runtimeConfig"], json!({"ips": ["10.244.3.9/24"]}));
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
}
