//! What holds for every key and value, not only for those somebody thought of.

#![expect(clippy::unwrap_used, reason = "a value that must parse and does not has failed its property")]

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU16,
    time::Duration,
};

use etcd_schema::{
    Alive, Allocate, AttachedPod, Attachment, BackendConfig, BackendKind, Cluster, ClusterNetworks, Key, KubernetesKey,
    Labels, LeaseData, MacAddress, NetworkConfig, NodeRecord, OutsidePeer, PolicyMode, Pool, PresharedKey, PublicKey,
    Readiness, Removed, SubnetKey, SubnetLease, Vtep, VxlanData, VxlanOptions, WireguardData, check,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::{collection::vec, option, prelude::*, sample::select};
use serde_json::{Map, Value, json};

const LABEL: &str = "[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?";
const SUBDOMAIN: &str = "[a-z0-9]([a-z0-9-]{0,5}[a-z0-9])?(\\.[a-z0-9]([a-z0-9-]{0,5}[a-z0-9])?){0,2}";

fn text<T>(pattern: &'static str) -> impl Strategy<Value = T>
where
    T: std::str::FromStr + std::fmt::Debug,
    T::Err: std::fmt::Debug,
{
    pattern.prop_map(|text: String| text.parse().unwrap())
}

fn key() -> impl Strategy<Value = Key> {
    let name = || text(SUBDOMAIN);
    prop_oneof![
        Just(Key::Config),
        subnet_key().prop_map(Key::Subnet),
        text(LABEL).prop_map(Key::Node),
        text(LABEL).prop_map(Key::Removed),
        text(LABEL).prop_map(Key::Alive),
        text(LABEL).prop_map(Key::Peer),
        (text(LABEL), text("[A-Za-z0-9][A-Za-z0-9_.-]{0,70}"), text("[!-.0-9;-~]{3,15}"))
            .prop_map(|(id, container, interface)| Key::Endpoint(id, container, interface)),
        object_key().prop_map(|key| Key::Kubernetes(Cluster::default(), key)),
        (
            text(LABEL),
            prop_oneof![
                object_key(),
                name().prop_map(KubernetesKey::Node),
                Just(KubernetesKey::Leader),
                Just(KubernetesKey::State),
                Just(KubernetesKey::Confirm),
            ]
        )
            .prop_map(|(cluster, key)| Key::Kubernetes(cluster, key)),
    ]
}

/// Of a kind that flat keys have, too.
fn object_key() -> impl Strategy<Value = KubernetesKey> {
    let name = || text(SUBDOMAIN);
    prop_oneof![
        text(LABEL).prop_map(KubernetesKey::Namespace),
        (text(LABEL), name()).prop_map(|(ns, name)| KubernetesKey::Pod(ns, name)),
        (text(LABEL), name()).prop_map(|(ns, name)| KubernetesKey::NetworkPolicy(ns, name)),
        name().prop_map(KubernetesKey::ClusterNetworkPolicy),
    ]
}

fn subnet_key() -> impl Strategy<Value = SubnetKey> {
    (0_u8..3, any::<u32>(), 8_u8..=30, any::<u128>(), 8_u8..=126).prop_map(|(families, v4, len4, v6, len6)| {
        let v4 = Ipv4Net::new(Ipv4Addr::from_bits(v4 % (100 << 24) + (10 << 24)), len4).unwrap().trunc();
        let v6 = Ipv6Net::new(Ipv6Addr::from_bits((v6 >> 8) | (0xfd << 120)), len6).unwrap().trunc();
        SubnetKey { v4: (families != 1).then_some(v4), v6: (families != 0).then_some(v6) }
    })
}

fn host_v4() -> impl Strategy<Value = Ipv4Addr> {
    any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits % (100 << 24) + (10 << 24)))
}

fn host_v6() -> impl Strategy<Value = Ipv6Addr> {
    any::<u128>().prop_map(|bits| Ipv6Addr::from_bits((bits >> 8) | (0x20 << 120)))
}

fn host() -> impl Strategy<Value = IpAddr> {
    prop_oneof![host_v4().prop_map(IpAddr::V4), host_v6().prop_map(IpAddr::V6)]
}

fn endpoint() -> impl Strategy<Value = SocketAddr> {
    (host(), 1..=u16::MAX).prop_map(SocketAddr::from)
}

fn public_key() -> impl Strategy<Value = PublicKey> {
    any::<[u8; 32]>().prop_map(|mut bytes| {
        bytes[31] &= 0x3f;
        bytes[5] |= 2;
        PublicKey::from_bytes(bytes)
    })
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-1_000_000_i32..1_000_000).prop_map(|n| json!(f64::from(n) / 8.0)),
        "[^\\x00]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec(("x[a-zé \"]{0,5}", inner), 0..4).prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// Fields of a later version. Null counts as absent, so it is no such field.
fn extra() -> impl Strategy<Value = Map<String, Value>> {
    let present = json_value().prop_filter("null is absent", |v| !v.is_null());
    vec(("later[A-Z][a-z]{0,5}", present), 0..3).prop_map(|fields| fields.into_iter().collect())
}

fn labels() -> impl Strategy<Value = Labels> {
    let label =
        ("([a-z]{1,5}\\.example/)?[A-Za-z0-9][A-Za-z0-9_.-]{0,5}[0-9]", "([A-Za-z0-9]([A-Za-z0-9_.-]{0,5}[0-9])?)?");
    vec(label, 0..4).prop_map(|labels| labels.into_iter().collect())
}

fn pool_v4() -> impl Strategy<Value = Pool<Ipv4Net>> {
    (host_v4(), 8_u8..=28, any::<u8>(), any::<[u32; 2]>()).prop_map(|(address, len, more, ends)| {
        let network = Ipv4Net::new(address, len).unwrap().trunc();
        let subnet_len = len + 2 + more % (29 - len);
        let size = 1_u32 << (32 - subnet_len);
        let count = 1_u32 << (subnet_len - len);
        let mut ends = ends.map(|n| n % count);
        ends.sort_unstable();
        let [min, max] =
            ends.map(|n| Ipv4Net::new(Ipv4Addr::from_bits(network.addr().to_bits() + n * size), subnet_len).unwrap());
        Pool { network, subnet_len, min, max }
    })
}

fn pool_v6() -> impl Strategy<Value = Pool<Ipv6Net>> {
    (host_v6(), 8_u8..=124, any::<u8>(), any::<[u128; 2]>()).prop_map(|(address, len, more, ends)| {
        let network = Ipv6Net::new(address, len).unwrap().trunc();
        let subnet_len = len + 2 + more % (125 - len);
        let size = 1_u128 << (128 - subnet_len);
        let count = 1_u128 << (subnet_len - len);
        let mut ends = ends.map(|n| n % count);
        ends.sort_unstable();
        let [min, max] =
            ends.map(|n| Ipv6Net::new(Ipv6Addr::from_bits(network.addr().to_bits() + n * size), subnet_len).unwrap());
        Pool { network, subnet_len, min, max }
    })
}

fn backend() -> impl Strategy<Value = BackendConfig> {
    let kinds = vec![BackendKind::Wireguard, BackendKind::HostGw, BackendKind::Vxlan, BackendKind::Udp];
    (select(kinds), any::<bool>(), option::of(1280..=u16::MAX), any::<u16>()).prop_map(
        |(kind, direct_routing, mtu, keepalive)| BackendConfig {
            kind,
            direct_routing,
            mtu: mtu.and_then(NonZeroU16::new),
            persistent_keepalive: NonZeroU16::new(keepalive),
            vxlan: match kind {
                BackendKind::Vxlan => VxlanOptions { vni: 1 + u32::from(keepalive), ..VxlanOptions::default() },
                _ => VxlanOptions::default(),
            },
        },
    )
}

fn networks() -> impl Strategy<Value = ClusterNetworks> {
    (0_u8..3, pool_v4(), pool_v6(), any::<bool>()).prop_map(|(families, v4, v6, mesh)| ClusterNetworks {
        allocate: if mesh { Allocate::Mesh } else { Allocate::Kubernetes },
        ipv4: (families != 1).then_some(v4),
        ipv6: (families != 0).then_some(v6),
    })
}

/// Networks of no cluster alone, or of several clusters, none of which overlaps another.
fn clusters() -> impl Strategy<Value = BTreeMap<Cluster, ClusterNetworks>> {
    let flat = networks().prop_map(|networks| BTreeMap::from([(Cluster::default(), networks)]));
    let named = vec((select(vec!["", "a", "b-1", "c"]), networks()), 1..5).prop_map(|all| {
        let mut clusters = BTreeMap::<Cluster, ClusterNetworks>::new();
        for (name, mut networks) in all {
            let overlaps = |net: IpNet| {
                let mut known = clusters.values().flat_map(ClusterNetworks::networks);
                known.any(|known| known.contains(&net) || net.contains(&known))
            };
            networks.ipv4 = networks.ipv4.filter(|pool| !overlaps(pool.network.into()));
            networks.ipv6 = networks.ipv6.filter(|pool| !overlaps(pool.network.into()));
            if networks.networks().next().is_some() {
                clusters.entry(name.parse().unwrap()).or_insert(networks);
            }
        }
        clusters
    });
    prop_oneof![flat, named]
}

fn config() -> impl Strategy<Value = NetworkConfig> {
    (clusters(), backend(), 5_u64..=31_536_000, (extra(), any::<[bool; 2]>())).prop_map(
        |(clusters, backend, ttl, (mut extra, [psk, audit]))| {
            if psk {
                extra.insert("Backend".into(), json!({"PSK": "Flannel's"}));
            }
            NetworkConfig {
                clusters,
                backend,
                lease_ttl: Duration::from_secs(ttl),
                policy_mode: if audit { PolicyMode::Audit } else { PolicyMode::Enforce },
                extra,
            }
        },
    )
}

fn node() -> impl Strategy<Value = NodeRecord> {
    let interface = (host(), 1_u8..=32).prop_map(|(address, len)| IpNet::new(address, len).unwrap());
    let cluster = select(vec!["", "east", "b-1"]).prop_map(|name| name.parse().unwrap());
    let keys = (public_key(), option::of(public_key())).prop_map(|(key, next)| (key, next.filter(|n| *n != key)));
    (
        (text(SUBDOMAIN), (option::of(text(LABEL)), cluster), keys, 1_u16..65535),
        (vec(endpoint(), 0..=16), vec(interface, 0..=16), vteps(), "[ -~]{0,64}", extra()),
    )
        .prop_map(
            |(
                (name, (site, cluster), (public_key, next_public_key), listen_port),
                (endpoints, addresses, vteps, version, extra),
            )| {
                NodeRecord {
                    name,
                    site,
                    cluster,
                    public_key,
                    next_public_key,
                    listen_port,
                    endpoints,
                    addresses,
                    vteps,
                    version,
                    extra,
                }
            },
        )
}

fn mac() -> impl Strategy<Value = MacAddress> {
    any::<[u8; 6]>().prop_map(|[first, rest @ ..]| {
        let [a, b, c, d, e] = rest;
        MacAddress([first & !1 | 2, a, b, c, d, e])
    })
}

fn vteps() -> impl Strategy<Value = Vec<Vtep>> {
    let v4 = (host_v4(), mac()).prop_map(|(address, mac)| Vtep { address: address.into(), mac });
    let v6 = (host_v6(), mac()).prop_map(|(address, mac)| Vtep { address: address.into(), mac });
    (option::of(v4), option::of(v6)).prop_map(|(v4, v6)| v4.into_iter().chain(v6).collect())
}

fn lease() -> impl Strategy<Value = SubnetLease> {
    let data = (public_key(), 1..=u16::MAX).prop_map(|(public_key, port)| WireguardData { public_key, port });
    let vxlan = || option::of((1_u32..1 << 24, mac()).prop_map(|(vni, mac)| VxlanData { vni, mac }));
    let data = prop_oneof![
        data.prop_map(LeaseData::Wireguard),
        (vxlan(), vxlan()).prop_map(|(v4, v6)| LeaseData::Vxlan([v4, v6])),
        select(vec![BackendKind::HostGw, BackendKind::Udp]).prop_map(LeaseData::Bare),
    ];
    (option::of(host_v4()), option::of(host_v6()), data, option::of(text(LABEL)), extra()).prop_map(
        |(v4, v6, data, node, extra)| {
            let mut lease = SubnetLease::for_node("n".parse().unwrap(), v4, v6, data);
            lease.node = node;
            lease.extra = extra;
            lease
        },
    )
}

/// Prefixes of the pools above, none in another.
fn allowed_ips() -> impl Strategy<Value = Vec<IpNet>> {
    let prefix = (host(), 8_u8..=32).prop_map(|(address, len)| IpNet::new(address, len).unwrap().trunc());
    vec(prefix, 1..40).prop_map(|prefixes| {
        let mut apart: Vec<IpNet> = Vec::new();
        for prefix in prefixes {
            if !apart.iter().any(|p| p.contains(&prefix) || prefix.contains(p)) {
                apart.push(prefix);
            }
        }
        apart
    })
}

fn peer() -> impl Strategy<Value = OutsidePeer> {
    let secret = any::<[u8; 32]>().prop_filter("zero is none", |b| *b != [0; 32]);
    (
        (public_key(), allowed_ips(), option::of(endpoint()), option::of(secret.prop_map(PresharedKey::from_bytes))),
        (option::of(1..=u16::MAX), option::of(text(LABEL)), extra()),
    )
        .prop_map(|((public_key, allowed_ips, endpoint, preshared_key), (persistent_keepalive, site, extra))| {
            OutsidePeer { public_key, allowed_ips, endpoint, preshared_key, persistent_keepalive, site, extra }
        })
}

fn attachment() -> impl Strategy<Value = Attachment> {
    let pod = (text(LABEL), text("[A-Za-z0-9][A-Za-z0-9_.-]{0,20}"), labels())
        .prop_map(|(namespace, name, labels)| AttachedPod { namespace, name, labels });
    let addresses =
        vec(host(), 1..=16).prop_filter("each once", |list| (1..list.len()).all(|i| !list[..i].contains(&list[i])));
    (pod, option::of("[0-9a-f-]{1,40}"), addresses, text("[a-z][a-z0-9.]{0,14}"), allowed_ips(), extra()).prop_map(
        |(pod, uid, addresses, interface, allowed_sources, extra)| Attachment {
            pod,
            uid,
            addresses,
            interface,
            allowed_sources,
            extra,
        },
    )
}

fn removed() -> impl Strategy<Value = Removed> {
    (
        option::of(text(SUBDOMAIN)),
        vec(public_key(), 0..=16),
        select(&["", "2026-11-22T22:35:05Z", "2026-11-22T22:35:05.123+01:00"][..]),
    )
        .prop_map(|(name, public_keys, time)| Removed { name, public_keys, time: time.into() })
}

fn alive() -> impl Strategy<Value = Alive> {
    let readiness = prop_oneof![
        Just(None),
        Just(Some(Readiness::Ready)),
        "[!-~]([ -~]{0,38}[!-~])?".prop_map(|reason| Some(Readiness::NotReady { reason })),
    ];
    ("[!-~]{1,64}", any::<u64>(), any::<Option<u64>>(), any::<u64>(), vec("[a-z0-9]{1,9}", 0..3), readiness).prop_map(
        |(boot_id, start_count, start_revision, incarnation, reads, readiness)| Alive {
            boot_id,
            start_count,
            start_revision,
            incarnation,
            reads,
            readiness,
        },
    )
}

/// The same value in YAML.
fn yaml(json: &[u8]) -> String {
    let value: Value = serde_json::from_slice(json).unwrap();
    serde_saphyr::to_string(&value).unwrap()
}

/// A key of each kind with a value that is mostly right.
fn plausible() -> impl Strategy<Value = (String, Value)> {
    let json = |bytes: Vec<u8>| serde_json::from_slice::<Value>(&bytes).unwrap();
    prop_oneof![
        config().prop_map(move |v| ("config".to_owned(), json(v.to_json()))),
        lease().prop_map(move |v| ("subnets/10.244.3.0-24".to_owned(), json(v.to_json()))),
        node().prop_map(move |v| ("nodes/a".to_owned(), json(v.to_json()))),
        peer().prop_map(move |v| ("peers/a".to_owned(), json(v.to_json()))),
        removed().prop_map(move |v| ("removed/a".to_owned(), json(v.to_json()))),
        attachment().prop_map(move |v| ("endpoints/a/b/c".to_owned(), json(v.to_json()))),
    ]
}

macro_rules! survives {
    ($($name:ident: $strategy:expr, $type:ty;)*) => {
        proptest! {
            $(
                #[test]
                fn $name(value in $strategy) {
                    let json = value.to_json();
                    prop_assert_eq!(&<$type>::parse(&json).unwrap(), &value);
                    let yaml = yaml(&json);
                    let again = <$type>::parse(yaml.as_bytes());
                    prop_assert_eq!(again.as_ref(), Ok(&value), "{}", yaml);
                }
            )*
        }
    };
}

survives! {
    config_survives_a_rewrite: config(), NetworkConfig;
    lease_survives_a_rewrite: lease(), SubnetLease;
    node_survives_a_rewrite: node(), NodeRecord;
    peer_survives_a_rewrite: peer(), OutsidePeer;
    attachment_survives_a_rewrite: attachment(), Attachment;
    removed_survives_a_rewrite: removed(), Removed;
    alive_survives_a_rewrite: alive(), Alive;
}

proptest! {
    #[test]
    fn key_is_read_as_it_is_written(key in key()) {
        let written = key.to_string();
        prop_assert_eq!(&Key::parse(&written).unwrap(), &key);
        prop_assert_eq!(written.parse::<Key>().unwrap(), key);
    }

    /// One thing, one key: whatever text is accepted is the text that would be written.
    #[test]
    fn accepted_key_is_canonical(text in prop_oneof![
        ".{0,40}",
        "(subnets|nodes|peers|pods|endpoints|config)/?[-a-z0-9.:&/]{0,40}",
        "k8s/[-a-z0-9]{0,34}/(pods|nodes|namespaces|leader|state|[a-z]{0,3})/?[-a-z0-9./]{0,10}",
        "subnets/1[0-9]{0,2}\\.[0-9]{1,3}\\.[0-9]{1,3}\\.0-[0-9]{1,2}(&fd[0-9a-f:]{1,12}::-[0-9]{1,3})?",
    ]) {
        if let Ok(key) = Key::parse(&text) {
            prop_assert_eq!(key.to_string(), text);
        }
    }

    #[test]
    fn any_bytes_are_judged_without_panic(
        key in key(),
        value in prop_oneof![vec(any::<u8>(), 0..200), "[-\\[\\]{}:,\"'&*!|> \n#?a-z0-9.]{0,200}".prop_map(String::into_bytes)],
    ) {
        let _ = check(&key.to_string(), &value);
    }

    /// One field changed to anything at all: refused with that field's name, or accepted and still one line.
    #[test]
    fn one_wrong_field_is_named((key, mut value) in plausible(), at in any::<prop::sample::Index>(), wrong in json_value()) {
        let fields = value.as_object_mut().unwrap();
        let name = fields.keys().nth(at.index(fields.len())).unwrap().clone();
        fields.insert(name.clone(), wrong);
        match check(&key, value.to_string().as_bytes()) {
            Ok(checked) => prop_assert!(!checked.summary.chars().any(char::is_control)),
            Err(etcd_schema::CheckError::Value(violations)) => {
                // `Enable…` and BackendType decide how their neighbours are read.
                let decides = name.starts_with("Enable") || name == "BackendType" || name == "Node";
                for v in violations.as_slice() {
                    let related = v.field.starts_with(&name) || name.starts_with(v.field.trim_start_matches("Enable"))
                        || ["Network", "Subnet", "Key", "Enable"].iter().any(|part| v.field.contains(part) && name.contains(part));
                    prop_assert!(decides || related, "{} was changed: {}", name, v);
                    prop_assert!(!v.to_string().chars().any(char::is_control));
                    prop_assert!(v.to_string().len() < 700);
                }
            }
            Err(e) => prop_assert!(false, "{}", e),
        }
    }

    #[test]
    fn pool_numbers_its_subnets_v4(pool in pool_v4(), index in any::<u32>(), other in host_v4(), len in 8_u8..=32) {
        let count = pool.subnet_count();
        let index = u128::from(index) % count;
        let subnet = pool.subnet(index).unwrap();
        prop_assert_eq!(subnet, subnet.trunc());
        prop_assert_eq!(subnet.prefix_len(), pool.subnet_len);
        prop_assert!(pool.network.contains(&subnet) && pool.min <= subnet && subnet <= pool.max);
        prop_assert_eq!(pool.index_of(&subnet), Some(index));
        prop_assert_eq!(pool.subnet(0), Some(pool.min));
        prop_assert_eq!(pool.subnet(count - 1), Some(pool.max));
        prop_assert_eq!(pool.subnet(count), None);
        let other = Ipv4Net::new(other, len).unwrap();
        let naive = len == pool.subnet_len && other == other.trunc() && pool.min <= other && other <= pool.max;
        prop_assert_eq!(pool.contains(&other), naive);
    }

    #[test]
    fn pool_numbers_its_subnets_v6(pool in pool_v6(), index in any::<u128>()) {
        let count = pool.subnet_count();
        let index = index % count;
        let subnet = pool.subnet(index).unwrap();
        prop_assert_eq!(subnet, subnet.trunc());
        prop_assert!(pool.network.contains(&subnet) && pool.min <= subnet && subnet <= pool.max);
        prop_assert_eq!(pool.index_of(&subnet), Some(index));
        prop_assert_eq!(pool.subnet(0), Some(pool.min));
        prop_assert_eq!(pool.subnet(count - 1), Some(pool.max));
        prop_assert_eq!(pool.subnet(count), None);
    }

    /// Against the naive comparison of each with each.
    #[test]
    fn allowed_ips_overlap_is_found(prefixes in vec((0_u8..4, 8_u8..=12), 1..8), key in public_key()) {
        let prefixes: Vec<IpNet> = prefixes
            .into_iter()
            .map(|(n, len)| IpNet::new(Ipv4Addr::new(10, n << 4, 0, 0).into(), len).unwrap().trunc())
            .collect();
        let texts: Vec<String> = prefixes.iter().map(ToString::to_string).collect();
        let value = json!({"publicKey": key, "allowedIPs": texts}).to_string();
        let nested = prefixes.iter().any(|a| prefixes.iter().any(|b| a != b && a.contains(b)));
        match OutsidePeer::parse(value.as_bytes()) {
            Ok(peer) => {
                prop_assert!(!nested);
                let mut naive: Vec<IpNet> = Vec::new();
                for p in prefixes {
                    if !naive.contains(&p) {
                        naive.push(p);
                    }
                }
                prop_assert_eq!(peer.allowed_ips, naive);
            }
            Err(violations) => prop_assert!(nested, "{}", violations),
        }
    }
}
