//! Services, NodePorts and hostPorts, with rules of the shape that kube-proxy and portmap write.
//!
//! ```text
//!   outside ──┐
//!             ├─ switch east ── router ── switch west ── west1 (far, client)
//!   east1 ────┘                   │
//!   (near, client)              etcd
//! ```
//!
//! Both endpoints say on a page who they are and whom they see.

use std::{collections::BTreeSet, fs, net::IpAddr, os::unix::fs::PermissionsExt as _};

use integration::{CniPod, CniRuntime, Namespace, Process, await_ok};
use serde_json::json;

use crate::{Nodes, SOON, await_in_force};

const NODE_PORT: u16 = 30080;
const LOCAL_NODE_PORT: u16 = 30081;
const HOST_PORT: u16 = 8081;

struct Cluster {
    near: CniPod,
    far: CniPod,
    near_client: CniPod,
    far_client: CniPod,
    _servers: Vec<Process>,
    _networks: Vec<CniRuntime>,
    mesh: Nodes,
}

/// The addresses of one family.
struct Family {
    near: IpAddr,
    far: IpAddr,
    service: IpAddr,
    node: IpAddr,
    overlay: IpAddr,
    cluster: &'static str,
}

impl Cluster {
    fn start(title: &str) -> Self {
        let mut mesh = Nodes::start(title, 1, 1);
        // A machine that has no part in the mesh.
        mesh.sites.east.add_host(&mesh.sites.lab);
        let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}});
        let labelled = |app: &str| json!({"pod": {"labels": {"app": app}}});
        let web = mesh.nodes[0].cni_plugin(&labelled("web"));
        let east = CniRuntime::new(mesh.nodes[0].host(), "1.0.0", &[web, portmap])
            .capability("portMappings", json!([{"hostPort": HOST_PORT, "containerPort": 8080, "protocol": "tcp"}]));
        let near = east.pod("near");
        let friends = mesh.nodes[0].cni("1.0.0", &labelled("friend"));
        let near_client = friends.pod("near-client");
        let west = mesh.nodes[1].cni("1.0.0", &labelled("web"));
        let strangers = mesh.nodes[1].cni("1.0.0", &labelled("stranger"));
        let (far, far_client) = (west.pod("far"), strangers.pod("far-client"));
        let servers = [("near", &near), ("far", &far)].map(|(name, pod)| serve(&mesh, name, pod)).into();
        Self {
            near,
            far,
            near_client,
            far_client,
            _servers: servers,
            _networks: vec![east, friends, west, strangers],
            mesh,
        }
    }

    fn family(&self, v4: bool) -> Family {
        let of = |pod: &CniPod| if v4 { pod.v4() } else { pod.v6() };
        let overlay = self.mesh.nodes[0].overlay().into_iter().find(|address| address.is_ipv4() == v4).unwrap();
        let east = &self.mesh.sites.east;
        let node = if v4 { east.v4(0) } else { east.v6(0) };
        Family {
            near: of(&self.near),
            far: of(&self.far),
            service: if v4 { "10.96.0.10" } else { "fd00:96::10" }.parse().unwrap(),
            node: node.parse().unwrap(),
            overlay,
            cluster: if v4 { "10.244.0.0/16" } else { "fd42:244::/48" },
        }
    }

    /// The endpoints let in friends and this block, if any.
    fn admit(&self, block: Option<IpAddr>) {
        let mut from = vec![json!({"podSelector": {"matchLabels": {"app": "friend"}}})];
        let host = |address: IpAddr| if address.is_ipv4() { format!("{address}/32") } else { format!("{address}/128") };
        from.extend(block.map(|address| json!({"ipBlock": {"cidr": host(address)}})));
        let policy = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": "default", "name": "web"},
            "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"],
                     "ingress": [{"from": from, "ports": [{"port": 8080}]}]}});
        self.mesh.etcd.put("/meshd/networkpolicies/default/web", &policy.to_string());
        await_in_force(&self.mesh);
    }

    /// Whoever comes by the service is judged as who it is, before its address is rewritten and behind that.
    fn policies_hold(&self, family: &Family) {
        let outside: &Namespace = &self.mesh.sites.east.hosts[1];
        let east = &self.mesh.sites.east;
        let from: IpAddr = if family.service.is_ipv4() { east.v4(1) } else { east.v6(1) }.parse().unwrap();
        // Before there is a policy the stranger gets in by every one of these ways.
        for port in [NODE_PORT, LOCAL_NODE_PORT] {
            answers(&self.far_client, family.overlay, port, 1);
        }
        self.admit(Some(from));
        reaches_both(&self.near_client, family.service, 80);
        reaches(outside, family.node, LOCAL_NODE_PORT, &[format!("near sees {from}")]);
        // Masqueraded as the node, and not.
        for port in [NODE_PORT, LOCAL_NODE_PORT, NODE_PORT] {
            is_refused(&self.far_client, family.overlay, port);
        }
        self.admit(None);
        for port in [NODE_PORT, LOCAL_NODE_PORT, NODE_PORT] {
            is_refused(outside, family.node, port);
        }
        reaches_both(&self.near_client, family.service, 80);
        self.mesh.etcd.del("/meshd/networkpolicies/default/web");
        await_in_force(&self.mesh);
        answers(outside, family.node, LOCAL_NODE_PORT, 1);
    }

    /// All the ways to the service, with the rules in place.
    fn all_ways(&self, family: &Family) {
        let outside: &Namespace = &self.mesh.sites.east.hosts[1];
        let host: &Namespace = self.mesh.nodes[0].host();
        let v4 = family.service.is_ipv4();
        let address = |pod: &CniPod| if v4 { pod.v4() } else { pod.v6() };
        let sees = |who: &str, source: IpAddr| format!("{who} sees {source}");

        // c. From a pod of the node: both endpoints, and each sees the pod.
        let client = address(&self.near_client);
        reaches(&self.near_client, family.service, 80, &[sees("near", client), sees("far", client)]);
        // Hairpin: the endpoint reaches itself, masqueraded, and the other one as itself.
        let answers = answers(&self.near, family.service, 80, 2);
        assert!(answers.contains(&sees("far", family.near)), "{answers:?}");
        assert!(answers.iter().any(|answer| answer.starts_with("near sees ")), "{answers:?}");
        assert!(!answers.contains(&sees("near", family.near)), "a reply would not come back: {answers:?}");
        // The node itself, as its overlay address.
        let from_node = reaches_both(host, family.service, 80);
        assert!(from_node.contains(&sees("far", family.overlay)), "{from_node:?}");

        // d. NodePort with policy Cluster, from outside: both endpoints, and the far one sees the node.
        let seen = reaches_both(outside, family.node, NODE_PORT);
        assert!(seen.contains(&sees("far", family.overlay)), "{seen:?}");
        // With policy Local: the near one, which sees who it is.
        let from = if v4 { self.mesh.sites.east.v4(1) } else { self.mesh.sites.east.v6(1) };
        reaches(outside, family.node, LOCAL_NODE_PORT, &[sees("near", from.parse().unwrap())]);
        // From a pod of another node, through the tunnel, to the node's overlay address.
        let client = address(&self.far_client);
        let seen = reaches_both(&self.far_client, family.overlay, NODE_PORT);
        assert!(seen.contains(&sees("far", family.overlay)), "{seen:?}");
        reaches(&self.far_client, family.overlay, LOCAL_NODE_PORT, &[sees("near", client)]);
        // From the node itself.
        reaches_both(host, family.node, NODE_PORT);
    }
}

/// A server in a pod whose page says its name and the client's address.
fn serve(mesh: &Nodes, name: &str, pod: &CniPod) -> Process {
    let folder = mesh.nodes[0].run_dir().join(format!("www-{name}"));
    let script = folder.join("cgi-bin/who");
    fs::create_dir_all(folder.join("cgi-bin")).unwrap();
    let text = format!("#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\n{name} sees %s\\n' \"$REMOTE_ADDR\"\n");
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    pod.spawn("/bin/busybox", &["httpd", "-f", "-p", "8080", "-h", &folder.to_string_lossy()])
}

/// Waits until every one of these answers has come, and no other.
#[track_caller]
fn reaches(from: &Namespace, to: IpAddr, port: u16, wanted: &[String]) {
    let answers = answers(from, to, port, wanted.len());
    let wanted: BTreeSet<String> = wanted.iter().cloned().collect();
    assert_eq!(answers, wanted, "{} to {to} port {port}", from.name());
}

#[track_caller]
fn reaches_both(from: &Namespace, to: IpAddr, port: u16) -> BTreeSet<String> {
    answers(from, to, port, 2)
}

/// Different answers, as many as are wanted.
#[track_caller]
fn answers(from: &Namespace, to: IpAddr, port: u16, count: usize) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    await_ok(&format!("{count} answers of {to} port {port} to {}", from.name()), SOON, || {
        let answer = ask(from, to, port)?;
        seen.insert(answer);
        if seen.len() >= count { Ok(()) } else { Err(format!("{seen:?}")) }
    });
    seen
}

#[track_caller]
fn is_refused(from: &Namespace, to: IpAddr, port: u16) {
    let answer = ask(from, to, port);
    assert!(answer.is_err(), "{} to {to} port {port}: {answer:?}", from.name());
}

fn ask(from: &Namespace, to: IpAddr, port: u16) -> Result<String, String> {
    let host = if to.is_ipv6() { format!("[{to}]") } else { to.to_string() };
    let url = format!("http://{host}:{port}/cgi-bin/who");
    let output = from.try_run(&["timeout", "3", "busybox", "wget", "-q", "-O", "-", &url]);
    // busybox writes an IPv4 client of a socket of both families as ::ffff:….
    let answer = output.stdout.trim().replace("::ffff:", "").replace(['[', ']'], "");
    if output.success() && !answer.is_empty() { Ok(answer) } else { Err(output.describe()) }
}

/// The chains of kube-proxy's iptables mode.
fn iptables(host: &Namespace, family: &Family) {
    let Family { near, far, service, cluster, .. } = family;
    let (restore, bits) = if service.is_ipv4() { ("iptables-restore", 32) } else { ("ip6tables-restore", 128) };
    let at = |pod: &IpAddr| if pod.is_ipv6() { format!("[{pod}]:8080") } else { format!("{pod}:8080") };
    let (to_near, to_far) = (at(near), at(far));
    let rules = format!(
        "*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-WEB - [0:0]
:KUBE-SVL-WEB - [0:0]
:KUBE-EXT-WEB - [0:0]
:KUBE-EXT-LOCAL - [0:0]
:KUBE-SEP-NEAR - [0:0]
:KUBE-SEP-FAR - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-SERVICES -d {service}/{bits} -p tcp -m tcp --dport 80 -j KUBE-SVC-WEB
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport {NODE_PORT} -j KUBE-EXT-WEB
-A KUBE-NODEPORTS -p tcp -m tcp --dport {LOCAL_NODE_PORT} -j KUBE-EXT-LOCAL
-A KUBE-EXT-WEB -j KUBE-MARK-MASQ
-A KUBE-EXT-WEB -j KUBE-SVC-WEB
-A KUBE-EXT-LOCAL -j KUBE-SVL-WEB
-A KUBE-SVC-WEB ! -s {cluster} -d {service}/{bits} -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-WEB -m statistic --mode random --probability 0.5 -j KUBE-SEP-NEAR
-A KUBE-SVC-WEB -j KUBE-SEP-FAR
-A KUBE-SVL-WEB -j KUBE-SEP-NEAR
-A KUBE-SEP-NEAR -s {near}/{bits} -j KUBE-MARK-MASQ
-A KUBE-SEP-NEAR -p tcp -m tcp -j DNAT --to-destination {to_near}
-A KUBE-SEP-FAR -s {far}/{bits} -j KUBE-MARK-MASQ
-A KUBE-SEP-FAR -p tcp -m tcp -j DNAT --to-destination {to_far}
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
"
    );
    let output = host.run_with_input(&[restore, "--noflush"], &rules);
    assert!(output.success(), "{}\n{rules}", output.describe());
}

/// The maps and chains of kube-proxy's nftables mode.
fn nftables(host: &Namespace, family: &Family) {
    let Family { near, far, service, cluster, .. } = family;
    let (ip, kind) = if service.is_ipv4() { ("ip", "ipv4_addr") } else { ("ip6", "ipv6_addr") };
    let at = |pod: &IpAddr| if pod.is_ipv6() { format!("[{pod}]:8080") } else { format!("{pod}:8080") };
    let (to_near, to_far) = (at(near), at(far));
    host.nft(&format!(
        "table {ip} kube-proxy {{
            map service-ips {{
                type {kind} . inet_proto . inet_service : verdict
                elements = {{ {service} . tcp . 80 : goto service-web }}
            }}
            map service-nodeports {{
                type inet_proto . inet_service : verdict
                elements = {{ tcp . {NODE_PORT} : goto external-web, tcp . {LOCAL_NODE_PORT} : goto external-local }}
            }}
            chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
            chain nat-output {{ type nat hook output priority -100; jump services; }}
            chain nat-postrouting {{ type nat hook postrouting priority srcnat; jump masquerading; }}
            chain services {{
                {ip} daddr . meta l4proto . th dport vmap @service-ips
                fib daddr type local meta l4proto . th dport vmap @service-nodeports
            }}
            chain masquerading {{
                mark and 0x4000 == 0 return
                mark set mark xor 0x4000
                masquerade fully-random
            }}
            chain mark-for-masquerade {{ mark set mark or 0x4000; }}
            chain external-web {{ jump mark-for-masquerade; goto service-web; }}
            chain external-local {{ goto endpoint-near; }}
            chain service-web {{
                {ip} daddr {service} {ip} saddr != {cluster} jump mark-for-masquerade
                numgen random mod 2 vmap {{ 0 : goto endpoint-near, 1 : goto endpoint-far }}
            }}
            chain endpoint-near {{
                {ip} saddr {near} jump mark-for-masquerade
                meta l4proto tcp dnat to {to_near}
            }}
            chain endpoint-far {{
                {ip} saddr {far} jump mark-for-masquerade
                meta l4proto tcp dnat to {to_far}
            }}
        }}"
    ));
}

#[test]
fn services_as_kube_proxys_iptables_mode_programs_them() {
    let cluster = Cluster::start("cni-kube-iptables");
    for v4 in [true, false] {
        let family = cluster.family(v4);
        iptables(cluster.mesh.nodes[0].host(), &family);
        cluster.all_ways(&family);
    }
}

#[test]
fn services_as_kube_proxys_nftables_mode_programs_them() {
    let cluster = Cluster::start("cni-kube-nftables");
    for v4 in [true, false] {
        let family = cluster.family(v4);
        nftables(cluster.mesh.nodes[0].host(), &family);
        cluster.all_ways(&family);
    }
}

#[test]
fn policies_judge_a_services_clients_as_who_they_are() {
    let cluster = Cluster::start("cni-kube-policies");
    let host = cluster.mesh.nodes[0].host();
    let [v4, v6] = [true, false].map(|v4| cluster.family(v4));
    iptables(host, &v4);
    cluster.policies_hold(&v4);
    nftables(host, &v6);
    cluster.policies_hold(&v6);
}

#[test]
fn the_host_port_of_portmap_from_outside_from_the_node_and_through_the_tunnel() {
    let cluster = Cluster::start("cni-host-port");
    let family = cluster.family(true);
    let outside: &Namespace = &cluster.mesh.sites.east.hosts[1];
    let from: IpAddr = cluster.mesh.sites.east.v4(1).parse().unwrap();
    reaches(outside, family.node, HOST_PORT, &[format!("near sees {from}")]);
    reaches(&cluster.far_client, family.overlay, HOST_PORT, &[format!("near sees {}", cluster.far_client.v4())]);
    let answer = answers(cluster.mesh.nodes[0].host(), family.node, HOST_PORT, 1);
    assert!(answer.iter().all(|answer| answer.starts_with("near sees ")), "{answer:?}");
    // The hairpin: the pod by its own node's port.
    let answer = answers(&cluster.near, family.node, HOST_PORT, 1);
    assert!(answer.iter().all(|answer| answer.starts_with("near sees ")), "{answer:?}");
    // Policies judge who comes by it.
    cluster.admit(Some(from));
    reaches(outside, family.node, HOST_PORT, &[format!("near sees {from}")]);
    is_refused(&cluster.far_client, family.overlay, HOST_PORT);
    cluster.admit(None);
    is_refused(outside, family.node, HOST_PORT);
}
