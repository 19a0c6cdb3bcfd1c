//! Cleanup leaves none of our state, even if only parts of it were left.

use super::{
    namespace::{isolated, try_run},
    *,
};

fn nothing_left() {
    for line in
        ["ip route show table all proto 158", "ip -6 route show table all proto 158", "ip -br link show type tun"]
    {
        assert_eq!(run(line), "", "{line}");
    }
    assert!(!run("ip rule show").contains("15858"));
    assert!(!run("ip -6 rule show").contains("15858"));
    assert!(!try_run("nft list table inet meshd").1);
}

#[test]
fn all_of_it_goes_and_a_second_run_finds_nothing() {
    isolated(|| async {
        topology();
        run("sysctl -qw net.ipv4.conf.eth0.rp_filter=1");
        let (kernel, state) = kernel();
        settle(&kernel, &desired()).await;
        assert_eq!(run("sysctl -n net.ipv4.conf.eth0.rp_filter").trim(), "2");
        let cleanup = kernel.cleanup().await.unwrap();
        assert_eq!(cleanup.failures, []);
        for what in ["device meshd0", "nftables table inet meshd", "net/ipv4/ip_forward restored to 0"] {
            assert!(cleanup.removed.iter().any(|r| r == what), "{:?}", cleanup.removed);
        }
        nothing_left();
        assert_eq!(run("sysctl -n net.ipv4.conf.eth0.rp_filter").trim(), "1");
        assert_eq!(run("sysctl -n net.ipv4.ip_forward").trim(), "0");
        assert_eq!(run("sysctl -n net.ipv6.conf.all.forwarding").trim(), "0");
        assert!(std::fs::read_dir(state.path()).unwrap().next().is_none());
        assert_eq!(kernel.cleanup().await.unwrap(), Cleanup::default());
    });
}

#[test]
fn works_when_half_of_it_is_missing() {
    isolated(|| async {
        for damage in [
            "ip link del meshd0",
            "nft delete table inet meshd",
            "ip rule del priority 15800",
            "ip link del eth0",
            "ip -6 route flush table 15858",
        ] {
            topology();
            let (kernel, _state) = kernel();
            settle(&kernel, &desired()).await;
            run(damage);
            assert_eq!(kernel.cleanup().await.unwrap().failures, [], "{damage}");
            nothing_left();
            try_run("ip link del eth0");
        }
    });
}

/// The caller knows no subnet: what the kernel still holds tells it, or that it cannot be told.
#[test]
fn attached_containers_are_found_by_what_an_earlier_run_left() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        assert_eq!(kernel.attachments(&[]).await.unwrap(), AttachedRoutes::None);
        settle(&kernel, &desired()).await;
        assert_eq!(kernel.attachments(&[]).await.unwrap(), AttachedRoutes::None);
        let pod = vec![net("10.244.1.9/32")];
        run("ip route add 10.244.1.9/32 dev eth0");
        assert_eq!(kernel.attachments(&[]).await.unwrap(), AttachedRoutes::Routes(pod.clone()));
        run("nft delete table inet meshd");
        assert_eq!(kernel.attachments(&[]).await.unwrap(), AttachedRoutes::Possible(pod.clone()));
        run("ip link del meshd0");
        assert_eq!(kernel.attachments(&[]).await.unwrap(), AttachedRoutes::Possible(pod.clone()));
        assert_eq!(kernel.attachments(&[net("10.244.1.0/24")]).await.unwrap(), AttachedRoutes::Routes(pod));
        run("ip route del 10.244.1.9/32 dev eth0");
        assert_eq!(kernel.attachments(&[]).await.unwrap(), AttachedRoutes::None);
    });
}
