//! Suites of others, as their own programs. docs/conformance.md has their results.

use std::{fs, path::PathBuf, process::ExitStatus, time::Duration};

use integration::{ProxyMode, kubernetes_programs};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    fixture::{Cluster, NODES, images},
    workload::now,
};

/// Longest run of a suite.
const LONG: Duration = Duration::from_secs(4 * 3600);
/// Tests of Kubernetes about a cloud's load balancers, nodes that reboot or have no network, and other families; of a pod
/// that is evicted for its use of a disk, which these nodes do not measure; and of one that the API server asks itself,
/// whose host is no node here.
const NOT_HERE: &str =
    r"LoadBalancer|Disruptive|SCTP|IPv6|DualStack|Feature:|Serial|Slow|Flaky|evicted pods|endpoints for unready";
const SERVICES: &str = r"\[sig-network\] Services";
/// Tests of network-policy-api that a kernel without SCTP cannot run, and those with checks that begin with it.
const SCTP: &str = ".*/.*/(SCTP|TierGress|PortRange|InlineCIDRPeers)|.*/.*/NodePeers/deny-egress";

#[test]
#[ignore = "an hour: make conformance"]
fn kubernetes_network_policies() {
    // Two tests have the word in their names and need none of it.
    e2e("e2e-netpol", ProxyMode::Iptables, r"\[sig-network\] Netpol", r"\[Feature:SCTPConnectivity\]");
}

#[test]
#[ignore = "half an hour: make conformance"]
fn kubernetes_networking() {
    let focus = r"\[sig-network\] (HostPort|Networking Granular Checks)";
    e2e("e2e-networking", ProxyMode::Iptables, focus, NOT_HERE);
}

#[test]
#[ignore = "an hour: make conformance"]
fn kubernetes_services() {
    e2e("e2e-services", ProxyMode::Iptables, SERVICES, NOT_HERE);
}

#[test]
#[ignore = "an hour: make conformance"]
fn kubernetes_services_with_nftables() {
    e2e("e2e-services-nftables", ProxyMode::Nftables, SERVICES, NOT_HERE);
}

#[test]
#[ignore = "half an hour: make conformance"]
fn kubernetes_dual_stack() {
    e2e(
        "e2e-dual-stack",
        ProxyMode::Iptables,
        r"\[sig-network\].*\[Feature:IPv6DualStack\]",
        "SCTP|LoadBalancer|Serial",
    );
}

#[test]
#[ignore = "half an hour: make conformance"]
fn policy_api() {
    let cluster = Cluster::start("cluster-policy-api", ProxyMode::Iptables);
    let definitions = kubernetes_programs("definitions").join("experimental");
    cluster.kubectl(&format!("apply --server-side -f {}", definitions.display()));
    let sctp = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::from(libc::IPPROTO_SCTP))).is_ok();
    let skip = if sctp { "-test.skip=^$".to_owned() } else { format!("-test.skip={SCTP}") };
    let args = [
        "-test.v",
        "-test.run=TestConformanceProfiles",
        "-test.timeout=2h",
        "-supported-features=ClusterNetworkPolicy,ClusterNetworkPolicyNamedPorts,ClusterNetworkPolicyEgressNodePeers",
        &skip,
    ];
    run(&cluster, "policy-api", "policy-conformance.test", &args);
}

#[test]
#[ignore = "an hour: make conformance"]
fn cyclonus() {
    let cluster = Cluster::start("cluster-cyclonus", ProxyMode::Iptables);
    let common = "generate --server-protocol TCP,UDP --retries 2 --perturbation-wait-seconds 2 \
        --job-timeout-seconds 1 --pod-creation-timeout-seconds 120 --ignore-loopback --cleanup-namespaces";
    // Of pods that a case creates or relabels, it does not know the Service's address, and its client asks itself.
    let changed = "create-namespace,create-pod,set-pod-labels";
    let exclude = "sctp,multi-peer,upstream-e2e,example,end-port,namespaces-by-default-label";
    for (name, rest) in [
        ("cyclonus", format!("--exclude {exclude},{changed} --destination-type service-ip")),
        ("cyclonus-changed", format!("--include {changed} --exclude {exclude} --destination-type pod-ip")),
    ] {
        let args: Vec<&str> = common.split_whitespace().chain(rest.split_whitespace()).collect();
        let log = run(&cluster, name, "cyclonus", &args);
        let wrong: Vec<&str> = log.lines().filter(|line| line.contains("Discrepancy found")).collect();
        assert!(wrong.is_empty(), "{wrong:?}");
    }
}

/// The tests of Kubernetes that `focus` names and `skip` does not.
fn e2e(name: &str, proxy_mode: ProxyMode, focus: &str, skip: &str) {
    let cluster = Cluster::start(&format!("cluster-{name}"), proxy_mode);
    cluster.api.apply(include_str!("dns.yaml"));
    cluster.kubectl("-n kube-system rollout status deployment/coredns --timeout=50s");
    let nodes = NODES.len();
    let args = [
        &format!("--kubeconfig={}", cluster.api.kubeconfig().display()),
        &format!("--kubectl-path={}", kubernetes_programs("api").join("kubectl").display()),
        "--provider=skeleton",
        &format!("--ginkgo.focus={focus}"),
        &format!("--ginkgo.skip={skip}"),
        "--ginkgo.v",
        "--ginkgo.no-color",
        "--ginkgo.timeout=4h",
        "-test.timeout=0",
        &format!("--num-nodes={nodes}"),
        "--dump-logs-on-failure=false",
        "--disable-log-dump",
    ];
    run(&cluster, name, "e2e.test", &args);
}

/// Runs a suite to its end, keeps what it printed in `target/conformance`, and returns it.
#[track_caller]
fn run(cluster: &Cluster, name: &str, program: &str, args: &[&str]) -> String {
    let begin = now();
    let kubeconfig = cluster.api.kubeconfig().display().to_string();
    let program = kubernetes_programs("suites").join(program);
    let process = cluster.sites.store.spawn_with_env(program, args, &[("KUBECONFIG", &kubeconfig)]);
    // Also of a run that is ended: its log is linked, not copied.
    let kept = folder().join(format!("{name}.log"));
    let _ = fs::remove_file(&kept);
    let linked = fs::hard_link(process.log_path(), &kept);
    let status: ExitStatus = process.await_exit(LONG);
    let log = process.log();
    if linked.is_err() {
        fs::write(&kept, &log).unwrap();
    }
    println!("{name}: {status} after {:.0?}; {}", now() - begin, kept.display());
    for line in log.lines().filter(|line| line.contains(" Passed | ") || line.starts_with("Ran ")) {
        println!("{name}: {line}");
    }
    assert!(status.success(), "{}", kept.display());
    cluster.sniffer.assert_clean();
    log
}

/// Where what the suites printed is kept.
fn folder() -> PathBuf {
    // …/target/PROFILE/images
    let folder = images().ancestors().nth(2).unwrap().join("conformance");
    fs::create_dir_all(&folder).unwrap();
    folder
}
