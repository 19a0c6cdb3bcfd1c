//! The interface of outer packets.

use super::{namespace::isolated, *};

#[test]
fn auto_follows_the_default_route_of_each_family() {
    isolated(|| async {
        topology();
        run("ip link add eth1 type veth peer name far1");
        run("ip link set eth1 up");
        run("ip link set far1 up");
        run("ip addr add 198.51.100.5/26 dev eth1");
        run("ip addr add 2001:db8:1::5/64 dev eth1 nodad");
        let (kernel, _state) = kernel();
        assert!(matches!(kernel.underlay(&UnderlaySelection::Auto).await, Err(UnderlayError::NoDefaultRoute)));
        run("ip route add default via 192.0.2.254 metric 200");
        run("ip route add default via 198.51.100.1 metric 100");
        run("ip -6 route add default via 2001:db8::fe dev eth0");
        run("ip addr add 169.254.7.7/16 dev eth1");
        run("ip addr add 2001:db8::dead/64 dev eth0 nodad preferred_lft 0");
        let underlay = kernel.underlay(&UnderlaySelection::Auto).await.unwrap();
        let four = underlay.ipv4.unwrap();
        assert_eq!(four.name, name("eth1"));
        assert_eq!(four.addresses, [net("198.51.100.5/26")]);
        assert_eq!(four.gateway, Some(addr("198.51.100.1")));
        assert_eq!(four.mtu, 1500);
        let six = underlay.ipv6.unwrap();
        assert_eq!(six.name, name("eth0"));
        assert_eq!(six.addresses, [net("2001:db8::1/64")]);
        assert_eq!(six.gateway, Some(addr("2001:db8::fe")));
    });
}

#[test]
fn addresses_come_in_the_order_in_which_others_should_try_them() {
    isolated(|| async {
        topology();
        run("ip addr add fd00:9::1/64 dev eth0 nodad");
        run("ip addr add 2001:db8::77/128 dev eth0 nodad");
        run("ip addr add 2001:db8::2/64 dev eth0 nodad");
        run("ip addr add 192.0.2.99/32 dev eth0");
        let (kernel, _state) = kernel();
        let underlay = kernel.underlay(&UnderlaySelection::Named(name("eth0"))).await.unwrap();
        assert_eq!(underlay.ipv4.unwrap().addresses, [net("192.0.2.1/24"), net("192.0.2.99/32")]);
        let six = ["2001:db8::1/64", "2001:db8::77/128", "2001:db8::2/64", "fd00:9::1/64"].map(net);
        assert_eq!(underlay.ipv6.unwrap().addresses, six);
    });
}

#[test]
fn a_named_interface_needs_no_default_route() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        let named = |n: &str| UnderlaySelection::Named(name(n));
        let underlay = kernel.underlay(&named("eth0")).await.unwrap();
        let four = underlay.ipv4.unwrap();
        assert_eq!((four.addresses, four.gateway), (vec![net("192.0.2.1/24")], None));
        assert_eq!(underlay.ipv6.unwrap().addresses, [net("2001:db8::1/64")]);
        assert!(matches!(
            kernel.underlay(&named("eth9")).await,
            Err(UnderlayError::NoInterface(n)) if n == name("eth9")
        ));
    });
}

/// A default route that someone leads into the tunnel does not make the tunnel its own underlay.
#[test]
fn the_tunnel_is_never_the_underlay() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        run("ip route add default dev meshd0 metric 1");
        run("ip route add default via 192.0.2.254 metric 500");
        let underlay = kernel.underlay(&UnderlaySelection::Auto).await.unwrap();
        assert_eq!(underlay.ipv4.unwrap().name, name("eth0"));
    });
}

#[test]
fn neighbours_are_known_by_address_and_state() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        run("ip neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev eth0 nud permanent");
        run("ip neigh add 192.0.2.3 lladdr 02:00:00:00:00:03 dev eth0 nud stale");
        run("ip -6 neigh add 2001:db8::2 lladdr 02:00:00:00:00:06 dev eth0 nud permanent");
        let index = kernel.underlay(&UnderlaySelection::Named(name("eth0"))).await.unwrap().ipv4.unwrap().index;
        let known = |last, confirmed| Some(Neighbour { mac: [2, 0, 0, 0, 0, last], confirmed });
        for (address, expected) in [
            ("192.0.2.2", known(2, true)),
            ("192.0.2.3", known(3, false)),
            ("192.0.2.4", None),
            ("2001:db8::2", known(6, true)),
        ] {
            assert_eq!(kernel.neighbour(index, addr(address)).await.unwrap(), expected);
        }
    });
}
