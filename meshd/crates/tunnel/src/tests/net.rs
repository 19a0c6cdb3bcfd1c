//! Real TUN devices and sockets, in a namespace per test. These tests need root.

use std::{
    fs::File,
    net::{IpAddr, SocketAddr},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use etcd_schema::PublicKey;
use mesh::tunnel_table::PeerConfig;
use nix::sched::{CloneFlags, setns};

use super::super::*;

/// Two hosts on one wire:
///
/// ```text
///   a: 192.0.2.1, 2001:db8::1 ── veth ── b: 192.0.2.2, 2001:db8::2
/// ```
struct Wire {
    id: String,
}

const OUTER: [[&str; 2]; 2] = [["192.0.2.1", "2001:db8::1"], ["192.0.2.2", "2001:db8::2"]];
const INNER: [[&str; 2]; 2] = [["10.244.1.0", "fd42::1:ffff"], ["10.244.2.0", "fd42::2:ffff"]];
const SUBNETS: [[&str; 2]; 2] = [["10.244.1.0/24", "fd42::1:0/112"], ["10.244.2.0/24", "fd42::2:0/112"]];

impl Wire {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let wire = Self { id: format!("mt{:x}x{n:x}", std::process::id()) };
        for host in 0..2 {
            wire.add_host(host);
        }
        ip(&format!("-n {} link add out type veth peer name out netns {}", wire.ns(0), wire.ns(1)));
        for (host, outer) in OUTER.iter().enumerate() {
            let ns = wire.ns(host);
            ip(&format!("-n {ns} addr add {}/24 dev out", outer[0]));
            ip(&format!("-n {ns} addr add {}/64 dev out nodad", outer[1]));
            ip(&format!("-n {ns} link set out up"));
        }
        wire.until_up(OUTER[1]);
        wire
    }

    fn add_host(&self, host: usize) {
        let ns = self.ns(host);
        ip(&format!("netns add {ns}"));
        ip(&format!("-n {ns} link set lo up"));
        // Nobody else is there, and looking for duplicates takes seconds.
        let output = run("ip", &format!("netns exec {ns} sysctl -w net.ipv6.conf.default.accept_dad=0"));
        assert!(output.status.success(), "{}", text(&output));
    }

    /// Waits until the hosts reach each other: links, duplicate address detection and neighbours take their time,
    /// and a first initiation that is lost costs five seconds.
    fn until_up(&self, far: [&str; 2]) {
        for address in far {
            until("the wire", || self.ping(0, address, "-c 1 -W 1").status.success());
        }
    }

    /// The same hosts behind a router, `r`, each on a network of its own:
    ///
    /// ```text
    ///   a: 192.0.2.1 ── .254 r .254 ── b: 198.51.100.2
    ///   a: 2001:db8::1 ── ::fe r ::fe ── b: 2001:db8:1::2
    /// ```
    fn routed(mtu_to_b: u32) -> Self {
        let wire = Self::new();
        let [a, b, r] = [0, 1, 2].map(|host| wire.ns(host));
        wire.add_host(2);
        ip(&format!("-n {a} link del out"));
        for (host, ns, net4, net6) in [(0, &a, "192.0.2", "2001:db8:"), (1, &b, "198.51.100", "2001:db8:1:")] {
            ip(&format!("-n {r} link add to{host} type veth peer name out netns {ns}"));
            ip(&format!("-n {r} addr add {net4}.254/24 dev to{host}"));
            ip(&format!("-n {r} addr add {net6}:fe/64 dev to{host} nodad"));
            ip(&format!("-n {r} link set to{host} up"));
            ip(&format!("-n {ns} addr add {net4}.{}/24 dev out", host + 1));
            ip(&format!("-n {ns} addr add {net6}:{}/64 dev out nodad", host + 1));
            ip(&format!("-n {ns} link set out up"));
            ip(&format!("-n {ns} route add default via {net4}.254"));
            ip(&format!("-n {ns} route add default via {net6}:fe"));
        }
        ip(&format!("-n {r} link set to1 mtu {mtu_to_b}"));
        ip(&format!("-n {b} link set out mtu {mtu_to_b}"));
        for key in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
            let output = run("ip", &format!("netns exec {r} sysctl -w {key}"));
            assert!(output.status.success(), "{}", text(&output));
        }
        wire.until_up(["198.51.100.2", "2001:db8:1::2"]);
        wire
    }

    fn ns(&self, host: usize) -> String {
        format!("{}{}", self.id, ["a", "b", "r"][host])
    }

    /// A TUN name: namespaces share the directory of control sockets, so that it is the host's own.
    fn tun(&self, host: usize) -> String {
        self.ns(host)
    }

    /// Runs `act` on a thread inside the host.
    fn inside<T: Send + 'static>(&self, host: usize, act: impl FnOnce() -> T + Send + 'static) -> T {
        let ns = File::open(format!("/run/netns/{}", self.ns(host))).unwrap();
        std::thread::spawn(move || {
            setns(ns, CloneFlags::CLONE_NEWNET).unwrap();
            act()
        })
        .join()
        .unwrap()
    }

    fn start(&self, host: usize, key: &PrivateKey) -> Tunnel {
        self.start_with(host, key, OffloadSettings::default(), false)
    }

    fn start_with(&self, host: usize, key: &PrivateKey, offloads: OffloadSettings, two_threads: bool) -> Tunnel {
        let mut options = Options::new(self.tun(host), 0, key.clone());
        options.offloads = offloads;
        let tunnel = self.inside(host, move || Tunnel::start_on(options, two_threads).unwrap());
        self.address(host);
        tunnel
    }

    /// Gives the TUN device its addresses and routes.
    fn address(&self, host: usize) {
        let (ns, tun, far) = (self.ns(host), self.tun(host), 1 - host);
        ip(&format!("-n {ns} link set {tun} mtu 1420 up"));
        for family in 0..2 {
            let len = [32, 128][family];
            ip(&format!("-n {ns} addr add {}/{len} dev {tun} nodad", INNER[host][family]));
            ip(&format!("-n {ns} route add {} dev {tun} src {}", SUBNETS[far][family], INNER[host][family]));
        }
    }

    fn ping(&self, host: usize, to: &str, more: &str) -> Output {
        run("ip", &format!("netns exec {} ping -n -W 5 {more} {to}", self.ns(host)))
    }

    fn pings(&self, host: usize, to: &str) {
        let output = self.ping(host, to, "-c 3 -i 0.05");
        assert!(output.status.success(), "{to} from {host}: {}", text(&output));
    }

    /// Waits until all of one run of pings are answered. `ping` awaits the last ones for no longer than twice what the
    /// others took, which on a busy machine looks like a loss.
    fn pings_without_loss(&self, host: usize, to: &str, more: &str) {
        until(&format!("every answer from {to} to {more}"), || {
            text(&self.ping(host, to, more)).contains(" 0% packet loss")
        });
    }

    /// Echo replies over IPv4 that the host's kernel has taken in, also those that `ping` no longer awaits.
    fn echoes(&self, host: usize) -> u64 {
        let text = text(&run("ip", &format!("netns exec {} nstat -asz IcmpInEchoReps", self.ns(host))));
        let line = text.lines().find_map(|line| line.strip_prefix("IcmpInEchoReps")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for host in 0..3 {
            run("ip", &format!("netns del {}", self.ns(host)));
        }
    }
}

fn run(program: &str, args: &str) -> Output {
    Command::new(program).args(args.split_whitespace()).output().unwrap()
}

fn ip(args: &str) {
    let output = run("ip", args);
    assert!(output.status.success(), "ip {args}: {}", text(&output));
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

/// Waits for a condition that comes about by itself.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(90);
    while !condition() {
        assert!(Instant::now() < end, "no answer: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn far(table: &mut TunnelTable) -> &mut PeerConfig {
    Arc::make_mut(table.peers.get_mut("far").unwrap())
}

fn table(host: usize, peer_key: PublicKey, candidate: Option<(usize, u16)>) -> TunnelTable {
    let far = 1 - host;
    TunnelTable {
        peers: [PeerConfig {
            name: "far".into(),
            keys: vec![peer_key],
            preshared_key: None,
            allowed: SUBNETS[far].iter().map(|p| p.parse().unwrap()).collect(),
            candidates: candidate
                .map(|(family, port)| SocketAddr::new(OUTER[far][family].parse::<IpAddr>().unwrap(), port))
                .into_iter()
                .collect(),
            keepalive: None,
            call_out: false,
        }]
        .into_iter()
        .collect(),
        local: SUBNETS[host].iter().map(|p| p.parse().unwrap()).collect(),
        overlay: INNER[host].iter().map(|a| a.parse().unwrap()).collect(),
        mtu: 1420,
    }
}

fn two_tunnels(wire: &Wire, family: usize) -> [Tunnel; 2] {
    two_tunnels_with(wire, family, [OffloadSettings::default(); 2], false)
}

fn two_tunnels_with(wire: &Wire, family: usize, offloads: [OffloadSettings; 2], two_threads: bool) -> [Tunnel; 2] {
    let keys = [PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap()];
    let tunnels = [0, 1].map(|host| wire.start_with(host, &keys[host], offloads[host], two_threads));
    let port = tunnels[1].listen_port();
    assert_eq!(tunnels[0].apply(table(0, keys[1].public(), Some((family, port)))), []);
    assert_eq!(tunnels[1].apply(table(1, keys[0].public(), None)), []);
    tunnels
}

#[test]
fn carries_both_families_inside_both_families() {
    for family in [0, 1] {
        let wire = Wire::new();
        let tunnels = two_tunnels(&wire, family);
        wire.pings(0, INNER[1][0]);
        wire.pings(0, INNER[1][1]);
        wire.pings(1, INNER[0][0]);
        wire.pings(1, INNER[0][1]);
        // Up to the route's MTU, and no packet is lost in a flood.
        let output = wire.ping(0, INNER[1][0], "-c 3 -i 0.05 -M do -s 1392");
        assert!(output.status.success(), "{}", text(&output));
        wire.pings_without_loss(0, INNER[1][1], "-f -c 500");
        for (host, tunnel) in tunnels.iter().enumerate() {
            let status = &tunnel.peers()[0];
            assert!(status.session.alive && status.latest_handshake.is_some());
            assert_eq!(status.endpoint.map(|e| e.ip().to_string()).as_deref(), Some(OUTER[1 - host][family]));
            // Router solicitations and the like, which the kernel sends on its own.
            let unexpected: Vec<_> =
                tunnel.drops().iter().filter(|(reason, n)| *n > 0 && *reason != DropReason::OutNotUnicast).collect();
            assert_eq!(unexpected, []);
        }
        tunnels[0].shutdown();
        tunnels[1].shutdown();
    }
}

#[test]
fn a_deleted_device_is_reported_and_comes_back() {
    let wire = Wire::new();
    let tunnels = two_tunnels(&wire, 0);
    wire.pings(0, INNER[1][0]);
    let mut events = tunnels[0].subscribe();
    ip(&format!("-n {} link del {}", wire.ns(0), wire.tun(0)));
    until("TunGone", || matches!(events.try_recv(), Ok(TunnelEvent::TunGone)));
    let tunnel = tunnels[0].clone();
    wire.inside(0, move || tunnel.reopen_tun().unwrap());
    wire.address(0);
    wire.pings(0, INNER[1][0]);
    wire.pings(1, INNER[0][1]);
    tunnels[0].reopen_tun().unwrap();
}

#[test]
fn the_device_stays_when_the_tunnel_stops() {
    let wire = Wire::new();
    let key = PrivateKey::generate().unwrap();
    let tunnel = wire.start(0, &key);
    drop(tunnel);
    let (ns, tun) = (wire.ns(0), wire.tun(0));
    ip(&format!("-n {ns} link show {tun}"));
    // And can be taken up again as it is.
    let options = Options::new(tun, 0, key);
    wire.inside(0, move || Tunnel::start(options).unwrap());
}

#[test]
fn what_has_no_peer_comes_back_as_unreachable() {
    let wire = Wire::new();
    let tunnels = two_tunnels(&wire, 0);
    for (family, to) in ["10.9.9.9", "fd99::9"].into_iter().enumerate() {
        ip(&format!("-n {} route add {to} dev {} src {}", wire.ns(0), wire.tun(0), INNER[0][family]));
        let output = wire.ping(0, to, "-c 1");
        let text = text(&output);
        assert!(text.contains("Destination Host Unreachable") || text.contains("No route"), "{text}");
    }
    assert!(tunnels[0].drops().get(DropReason::OutNoPeer) >= 2);
}

/// wireguard-go on host b.
struct WireguardGo(Child);

impl WireguardGo {
    fn start(wire: &Wire) -> Self {
        let child = Command::new("ip")
            .args(["netns", "exec", &wire.ns(1), "wireguard-go", "-f", &wire.tun(1)])
            .env("LOG_LEVEL", "error")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let socket = format!("/var/run/wireguard/{}.sock", wire.tun(1));
        until("wireguard-go", || std::path::Path::new(&socket).exists());
        Self(child)
    }
}

impl Drop for WireguardGo {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

#[test]
fn talks_to_wireguard_go_whoever_calls() {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    for we_call in [true, false] {
        let wire = Wire::new();
        let keys = [PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap()];
        let psk = [7u8; 32];
        let other = WireguardGo::start(&wire);
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(path("key"), STANDARD.encode(keys[1].secret().as_bytes())).unwrap();
        std::fs::write(path("psk"), STANDARD.encode(psk)).unwrap();
        let tunnel = wire.start(0, &keys[0]);
        let endpoint =
            if we_call { String::new() } else { format!("endpoint {}:{}", OUTER[0][0], tunnel.listen_port()) };
        let command = format!(
            "set {} listen-port 51820 private-key {} peer {} preshared-key {} {endpoint} allowed-ips {},{}",
            wire.tun(1),
            path("key"),
            keys[0].public(),
            path("psk"),
            SUBNETS[0][0],
            SUBNETS[0][1],
        );
        // Its socket is there before it listens.
        until("wireguard-go to be configured", || run("wg", &command).status.success());
        wire.address(1);
        let mut table = table(0, keys[1].public(), we_call.then_some((0, 51820)));
        far(&mut table).preshared_key = Some(etcd_schema::PresharedKey::from_bytes(psk));
        assert_eq!(tunnel.apply(table), []);
        let caller = usize::from(!we_call);
        wire.pings(caller, INNER[1 - caller][0]);
        wire.pings(1 - caller, INNER[caller][1]);
        assert!(tunnel.peers()[0].session.alive);
        // A message may be under way between the two looks.
        let mut seen = Vec::new();
        let agree = (0..50).any(|_| {
            let transfer = text(&run("wg", &format!("show {} transfer", wire.tun(1))));
            let theirs: Vec<u64> = transfer.split_whitespace().skip(1).map(|n| n.parse().unwrap()).collect();
            let status = &tunnel.peers()[0];
            let ours = [status.tx_bytes, status.rx_bytes];
            seen.push((ours, theirs.clone()));
            ours == theirs[..]
        });
        assert!(agree, "{seen:?}");
        drop(other);
    }
}

#[test]
fn answers_come_from_the_address_that_was_called_as_long_as_it_is_there() {
    for (family, second) in [(0, "192.0.2.11"), (1, "2001:db8::11")] {
        let wire = Wire::new();
        let len = [24, 64][family];
        ip(&format!("-n {} addr add {second}/{len} dev out nodad", wire.ns(0)));
        let tunnels = two_tunnels(&wire, family);
        let key = tunnels[1].peers()[0].keys[0];
        let mut table = table(1, key, None);
        let address = |text: &str| SocketAddr::new(text.parse().unwrap(), tunnels[0].listen_port());
        far(&mut table).candidates = vec![address(second)];
        tunnels[1].apply(table);
        let seen_at = || tunnels[1].peers()[0].endpoint;
        wire.pings(1, INNER[0][0]);
        assert_eq!(seen_at(), Some(address(second)));
        ip(&format!("-n {} addr del {second}/{len} dev out", wire.ns(0)));
        wire.pings(0, INNER[1][0]);
        assert_eq!(seen_at(), Some(address(OUTER[0][family])));
    }
}

/// Waits until the tunnel has learned that the path to its peer carries less.
fn until_lowered(wire: &Wire, tunnel: &Tunnel, inner_mtu: u16, without_df: bool) {
    until("the path's MTU", || {
        wire.ping(0, INNER[1][0], "-c 1 -W 1 -M do -s 1392");
        let status = &tunnel.peers()[0];
        (status.inner_mtu, status.without_df) == (inner_mtu, without_df)
    });
}

#[test]
fn a_narrow_link_of_our_own_lowers_the_peers_mtu() {
    let wire = Wire::new();
    let tunnels = two_tunnels(&wire, 0);
    wire.pings(0, INNER[1][0]);
    ip(&format!("-n {} link set out mtu 1400", wire.ns(0)));
    until_lowered(&wire, &tunnels[0], 1340, false);
    // What was too big for the link went in fragments.
    assert_eq!(tunnels[0].drops().get(DropReason::UdpSendTooBig), 0);
    // From now on, senders of too large packets get an error.
    until("the sender to be told", || {
        let output = text(&wire.ping(0, INNER[1][0], "-c 1 -W 1 -M do -s 1392"));
        output.contains("mtu = 1340") || output.contains("mtu=1340")
    });
    let output = wire.ping(0, INNER[1][0], "-c 1 -M do -s 1312");
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn a_narrow_link_far_away_lowers_the_peers_mtu() {
    // (outer family, its MTU, what is left inside, whether that is too little for IPv6)
    for (family, outer, inner, without_df) in
        [(0, 1400, 1340, false), (0, 1300, 1280, true), (1, 1400, 1320, false), (1, 1300, 1280, true)]
    {
        let wire = Wire::routed(outer);
        let keys = [PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap()];
        let tunnels = [wire.start(0, &keys[0]), wire.start(1, &keys[1])];
        let mut to_b = table(0, keys[1].public(), None);
        let b: IpAddr = ["198.51.100.2", "2001:db8:1::2"][family].parse().unwrap();
        far(&mut to_b).candidates = vec![SocketAddr::new(b, tunnels[1].listen_port())];
        assert_eq!(tunnels[0].apply(to_b), []);
        assert_eq!(tunnels[1].apply(table(1, keys[0].public(), None)), []);
        wire.pings(0, INNER[1][1]);
        until_lowered(&wire, &tunnels[0], inner, without_df);
        for (address, header) in [(INNER[1][0], 28), (INNER[1][1], 48)] {
            wire.pings_without_loss(0, address, &format!("-c 2 -i 0.05 -M do -s {}", inner - header));
        }
    }
}

#[test]
fn keepalive_keeps_a_way_through_nat_open() {
    let wire = Wire::routed(1500);
    let r = wire.ns(2);
    let rules = "add table ip nat; \
        add chain ip nat post { type nat hook postrouting priority 100; }; \
        add rule ip nat post oifname to1 masquerade; \
        add table ip filter; \
        add chain ip filter forward { type filter hook forward priority 0; policy drop; }; \
        add rule ip filter forward iifname to0 accept; \
        add rule ip filter forward ct state established accept";
    let output = Command::new("ip").args(["netns", "exec", &r, "nft", rules]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    for key in ["udp_timeout=2", "udp_timeout_stream=2"] {
        let output = run("ip", &format!("netns exec {r} sysctl -w net.netfilter.nf_conntrack_{key}"));
        assert!(output.status.success(), "{}", text(&output));
    }
    let keys = [PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap()];
    let tunnels = [wire.start(0, &keys[0]), wire.start(1, &keys[1])];
    let mut to_b = table(0, keys[1].public(), None);
    far(&mut to_b).candidates = vec![SocketAddr::new("198.51.100.2".parse().unwrap(), tunnels[1].listen_port())];
    far(&mut to_b).call_out = true;
    far(&mut to_b).keepalive = Some(Duration::from_secs(1));
    assert_eq!(tunnels[0].apply(to_b), []);
    assert_eq!(tunnels[1].apply(table(1, keys[0].public(), None)), []);
    // It calls by itself, and b sees it at the router.
    until("a handshake", || tunnels[1].peers()[0].session.alive);
    let seen = tunnels[1].peers()[0].endpoint.unwrap();
    assert_eq!(seen.ip().to_string(), "198.51.100.254");
    // Once more where a thread waits for a processor for longer than the router remembers a flow.
    until("the way to be open", || {
        // Four keepalives are longer than the router remembers it.
        let before = tunnels[1].peers()[0].rx_bytes;
        until("keepalives", || tunnels[1].peers()[0].rx_bytes >= before + 4 * 32);
        wire.ping(1, INNER[0][0], "-c 1").status.success()
    });
}

#[test]
fn tables_come_and_go_under_traffic_and_nothing_is_lost() {
    let wire = Wire::new();
    let tunnels = two_tunnels(&wire, 0);
    wire.pings(0, INNER[1][0]);
    // When it was, and not how long ago: between two looks at the clock any time may pass.
    let latest_handshake = || {
        let tables = tunnels[0].0.shell.core.tables.get();
        tables.named("far").unwrap().lock().latest_handshake().unwrap()
    };
    let (handshake, echoes) = (latest_handshake(), wire.echoes(0));
    let keys = [&tunnels[1], &tunnels[0]].map(|t| t.peers()[0].keys[0]);
    let ping = Command::new("ip")
        .args(["netns", "exec", &wire.ns(0), "ping", "-n", "-q", "-f", "-c", "2000", INNER[1][0]])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    for round in 0..200 {
        for host in 0..2 {
            // Each round has other peers around the one that matters, and that one elsewhere in the table.
            let mut table = table(host, keys[1 - host], None);
            let other = |n| PeerConfig {
                name: format!("other{n}"),
                keys: vec![PrivateKey::generate().unwrap().public()],
                allowed: vec![format!("10.99.{n}.0/24").parse().unwrap()],
                ..PeerConfig::clone(&table.peers["far"])
            };
            for other in (0..round % 5).map(other).collect::<Vec<_>>() {
                table.put(other);
            }
            assert_eq!(tunnels[host].apply(table), []);
        }
    }
    let output = ping.wait_with_output().unwrap();
    assert!(text(&output).contains("2000 packets transmitted"), "{}", text(&output));
    until("every answer", || wire.echoes(0) >= echoes + 2000);
    assert_eq!(latest_handshake(), handshake, "a new handshake");
}

#[test]
fn whole_streams_arrive_whatever_is_switched_off_with_one_thread_and_with_two() {
    use std::io::{Read as _, Write as _};
    let sent: Vec<u8> = (0..8 << 20).map(|n: u32| (n % 251) as u8 ^ (n >> 12) as u8).collect();
    let (on, off) = (OffloadSetting::Auto, OffloadSetting::Off);
    let all = |udp_gso, udp_gro, tun_offload| OffloadSettings { udp_gso, udp_gro, tun_offload };
    for (round, offloads) in [
        [all(on, on, on), all(on, on, on)],
        [all(on, on, on), all(on, on, on)],
        [all(off, off, off), all(on, on, on)],
        [all(on, on, on), all(off, off, off)],
        [all(on, off, off), all(off, on, on)],
        [all(off, on, on), all(on, off, on)],
    ]
    .into_iter()
    .enumerate()
    {
        let wire = Wire::new();
        let tunnels = two_tunnels_with(&wire, round % 2, offloads, round % 2 == 0);
        for (tunnel, settings) in tunnels.iter().zip(offloads) {
            let expected = |setting| if setting == on { OffloadState::On } else { OffloadState::SetOff };
            let status = tunnel.offloads();
            assert_eq!(status.udp_gso, expected(settings.udp_gso));
            assert_eq!(status.udp_gro, expected(settings.udp_gro));
            assert_eq!(
                (status.tun_tcp, status.tun_udp),
                (expected(settings.tun_offload), expected(settings.tun_offload))
            );
        }
        for inner in INNER[1] {
            let address = SocketAddr::new(inner.parse().unwrap(), 7000);
            let listener = wire.inside(1, move || std::net::TcpListener::bind(address).unwrap());
            let to_send = sent.clone();
            let mut stream = wire.inside(0, move || std::net::TcpStream::connect(address).unwrap());
            let sender = std::thread::spawn(move || stream.write_all(&to_send).unwrap());
            let mut received = Vec::new();
            listener.accept().unwrap().0.read_to_end(&mut received).unwrap();
            sender.join().unwrap();
            assert!(received == sent, "another stream came out to {inner}, {offloads:?}");
        }
        for (tunnel, settings) in tunnels.iter().zip(offloads) {
            assert_eq!(tunnel.offloads().refused().count(), 0, "{settings:?}");
        }
    }
}
