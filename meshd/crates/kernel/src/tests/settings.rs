//! Sysctls: forwarding without loss of an advertised default route, and restoring earlier values.

use std::net::SocketAddrV6;

use socket2::{Domain, Protocol, Socket, Type};

use super::{
    namespace::{Host, isolated},
    *,
};

fn get(key: &str) -> String {
    run(&format!("sysctl -n {key}")).trim().to_owned()
}

/// A router behind `wan` whose advertisement has brought a default route.
fn advertised_default() -> Host {
    run("ip link add wan type veth peer name isp");
    let router = Host::new();
    router.take("isp");
    run("ip link set wan addrgenmode none up");
    run("ip addr add fe80::1/64 dev wan nodad");
    router.run("ip link set isp addrgenmode none up");
    router.run("ip addr add fe80::2/64 dev isp nodad");
    advertise(&router);
    router
}

/// Sends router advertisements until the default route is there.
fn advertise(router: &Host) {
    while !run("ip -6 route show default").contains("via fe80::2 dev wan proto ra") {
        router.within(|| {
            let index = nix::net::if_::if_nametoindex("isp").unwrap();
            let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).unwrap();
            socket.set_unicast_hops_v6(255).unwrap();
            // Type 134, a hop limit of 64, a lifetime of half an hour; the kernel fills in the checksum.
            let message = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
            let to = SocketAddrV6::new("fe80::1".parse().unwrap(), 0, 0, index);
            // The link may not be up yet.
            let _ = socket.send_to(&message, &to.into());
        });
        std::thread::yield_now();
    }
}

#[test]
fn an_advertised_default_route_outlives_forwarding() {
    isolated(|| async {
        // What the kernel does to it without care.
        let _router = advertised_default();
        run("sysctl -qw net.ipv6.conf.all.forwarding=1");
        assert_eq!(run("ip -6 route show default"), "");
    });
    isolated(|| async {
        topology();
        let router = advertised_default();
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        assert_eq!(get("net.ipv6.conf.all.forwarding"), "1");
        assert!(run("ip -6 route show default").contains("proto ra"));
        // And later advertisements still count.
        run("ip -6 route del default");
        advertise(&router);
        settled(&kernel, &desired()).await;
        kernel.cleanup().await.unwrap();
        assert!(run("ip -6 route show default").contains("proto ra"));
        assert_eq!(get("net.ipv6.conf.wan.accept_ra"), "1");
    });
}

#[test]
fn accept_ra_is_raised_where_advertisements_count() {
    isolated(|| async {
        topology();
        run("ip link add wan type veth peer name isp");
        run("ip link set wan up");
        run("ip link set isp up");
        run("ip addr add 2001:db8:1::1/64 dev wan nodad");
        run("ip link add pod type veth peer name inpod");
        run("ip -6 route add default via 2001:db8:1::ff dev wan proto ra metric 1024");
        for dev in ["eth0", "wan", "pod"] {
            assert_eq!(get(&format!("net.ipv6.conf.{dev}.accept_ra")), "1");
        }
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        settled(&kernel, &desired()).await;
        assert_eq!(get("net.ipv6.conf.all.forwarding"), "1");
        assert_eq!(get("net.ipv6.conf.wan.accept_ra"), "2");
        assert_eq!(get("net.ipv6.conf.eth0.accept_ra"), "2");
        // A pod's advertisements are not believed.
        assert_eq!(get("net.ipv6.conf.pod.accept_ra"), "1");
        kernel.cleanup().await.unwrap();
        assert_eq!(get("net.ipv6.conf.all.forwarding"), "0");
        assert_eq!(get("net.ipv6.conf.wan.accept_ra"), "1");
        assert_eq!(get("net.ipv6.conf.eth0.accept_ra"), "1");
    });
}

#[test]
fn a_host_that_forwards_already_keeps_its_own_settings() {
    isolated(|| async {
        topology();
        run("sysctl -qw net.ipv6.conf.all.forwarding=1");
        run("sysctl -qw net.ipv4.ip_forward=1");
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        assert_eq!(get("net.ipv6.conf.eth0.accept_ra"), "1");
        kernel.cleanup().await.unwrap();
        assert_eq!(get("net.ipv6.conf.all.forwarding"), "1");
        assert_eq!(get("net.ipv4.ip_forward"), "1");
    });
}

#[test]
fn what_someone_changed_since_is_not_given_back() {
    isolated(|| async {
        topology();
        run("sysctl -qw net.ipv4.conf.eth0.rp_filter=1");
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        run("sysctl -qw net.ipv4.conf.eth0.rp_filter=0");
        kernel.cleanup().await.unwrap();
        assert_eq!(get("net.ipv4.conf.eth0.rp_filter"), "0");
    });
}

/// The larger of `all` and the interface's own counts.
#[test]
fn strict_reverse_path_filters_are_loosened_where_packets_come_in() {
    isolated(|| async {
        topology();
        run("sysctl -qw net.ipv4.conf.all.rp_filter=1");
        run("sysctl -qw net.ipv4.conf.eth0.rp_filter=0");
        run("sysctl -qw net.ipv4.conf.lo.rp_filter=0");
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        settled(&kernel, &desired()).await;
        assert_eq!(get("net.ipv4.conf.eth0.rp_filter"), "2");
        assert_eq!(get("net.ipv4.conf.meshd0.rp_filter"), "2");
        assert_eq!(get("net.ipv4.conf.lo.rp_filter"), "0");
        assert_eq!(get("net.ipv4.conf.all.rp_filter"), "1");
    });
}

/// An overlay address is nothing that a neighbour should be asked by.
#[test]
fn neighbours_are_asked_by_the_underlay_address() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        settled(&kernel, &desired()).await;
        assert_eq!(get("net.ipv4.conf.eth0.arp_announce"), "2");
        assert_eq!(get("net.ipv4.conf.lo.arp_announce"), "0");
        kernel.cleanup().await.unwrap();
        assert_eq!(get("net.ipv4.conf.eth0.arp_announce"), "0");
    });
}

/// Earlier values are on disk before a change: a daemon killed in between, or started again, knows them still.
#[test]
fn a_second_start_keeps_the_first_earlier_value() {
    isolated(|| async {
        topology();
        let (kernel, state) = kernel();
        settle(&kernel, &desired()).await;
        run("sysctl -qw net.ipv4.ip_forward=0");
        let again = Kernel::new(Options::new(name("meshd0"), state.path().into())).unwrap();
        settle(&again, &desired()).await;
        assert_eq!(get("net.ipv4.ip_forward"), "1");
        again.cleanup().await.unwrap();
        assert_eq!(get("net.ipv4.ip_forward"), "0");
    });
}

/// What earlier values were is unknown then: those settings are left alone, and everything else is done.
#[test]
fn a_damaged_file_of_earlier_values_stops_nothing_else() {
    isolated(|| async {
        topology();
        let (kernel, state) = kernel();
        let file = state.path().join("sysctls.json");
        std::fs::write(&file, "{ half").unwrap();
        let report = kernel.reconcile(&desired(), OthersRules::Read).await.unwrap();
        assert!(
            matches!(&report.failures[..], [Failure { problem: FailureCause::Saved { .. }, .. }]),
            "{:?}",
            report.failures
        );
        assert!(run("ip route show 10.244.2.0/24").contains("via 192.0.2.2"));
        run("nft list table inet meshd");
        assert_eq!(get("net.ipv4.ip_forward"), "0");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "{ half");
        let again = kernel.reconcile(&desired(), OthersRules::Read).await.unwrap();
        assert_eq!((again.changes.len(), again.failures), (0, report.failures));

        std::fs::remove_file(&file).unwrap();
        settle(&kernel, &desired()).await;
        assert_eq!(get("net.ipv4.ip_forward"), "1");
    });
}

/// IPv4 is forwarded by the setting of the interface that a packet arrives on: ours forward, and where the underlay's
/// does not, that is named.
#[test]
fn our_interfaces_forward_whatever_the_default_is() {
    isolated(|| async {
        run("sysctl -qw net.ipv4.ip_forward=1");
        run("sysctl -qw net.ipv4.conf.default.forwarding=0");
        topology();
        run("ip link add vpod type veth peer name epod");
        run("ip link add br0 type bridge");
        run("ip link add vport type veth peer name eport");
        run("ip link set vport master br0");
        let (kernel, _state) = kernel();
        let mut desired = desired();
        desired.pods = vec![name("vpod"), name("vport"), name("gone")];
        desired.underlay4 = Some(name("eth0"));
        let report = settle(&kernel, &desired).await;
        for dev in ["meshd0", "vpod", "br0"] {
            assert_eq!(get(&format!("net.ipv4.conf.{dev}.forwarding")), "1", "{dev}");
        }
        assert_eq!(get("net.ipv4.conf.eth0.forwarding"), "0", "it is the operator's");
        assert_eq!(report.not_forwarding, Some(name("eth0")));
        settled(&kernel, &desired).await;
        assert_eq!(kernel.apply_changes(&desired, OthersRules::Read).await.unwrap().not_forwarding, Some(name("eth0")));

        run("sysctl -qw net.ipv4.conf.eth0.forwarding=1");
        run("sysctl -qw net.ipv4.conf.vpod.forwarding=0");
        let report = settle(&kernel, &desired).await;
        assert_eq!((report.not_forwarding, report.changes.len()), (None, 1));
        assert_eq!(get("net.ipv4.conf.vpod.forwarding"), "1");
        kernel.cleanup().await.unwrap();
        assert_eq!(get("net.ipv4.conf.br0.forwarding"), "0", "a bridge outlives its pods");
    });
}
