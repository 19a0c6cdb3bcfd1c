//! Containers on a machine with the package, whose daemon is not root: addresses, attachments and records are freed all
//! the same. No host-local is there.
//!
//! ```text
//!   east1: machine with systemd, containers ── switch ── router ── etcd
//! ```

use cni::{environment::AttachmentName, interface::host_name};
use integration::{
    Etcd, Machine, await_ok,
    topology::{CONFIG, TwoSites},
};
use serde_json::Value;

use crate::{
    SOON,
    debian::{await_running, configure},
    kubernetes::{LIMITS, PODMAN, PREPARE},
    package::package,
};

/// `attach NETWORK COMMAND CONTAINER [CNI_ARGS]`, as a runtime does it for a namespace of that name.
const ATTACH: &str = r#"
mkdir -p nets
echo '{"cniVersion": "1.0.0", "name": "routed", "type": "meshd-cni"}' > nets/routed
echo '{"cniVersion": "1.0.0", "name": "bridged", "type": "meshd-cni", "mode": "bridge"}' > nets/bridged
cat > /usr/local/bin/attach <<'.'
#!/bin/bash
set -e
[ "$2" != ADD ] || ip netns add "$3"
CNI_COMMAND=$2 CNI_CONTAINERID=$3 CNI_NETNS=/run/netns/$3 CNI_IFNAME=eth0 CNI_ARGS=${4-} CNI_PATH=/opt/cni/bin \
    /opt/cni/bin/meshd-cni < /root/nets/$1
.
chmod +x /usr/local/bin/attach
"#;

/// Attaches a container; returns its IPv4 address.
fn add(machine: &Machine, network: &str, container: &str) -> String {
    let printed = machine.sh(&format!("attach {network} ADD {container}")).stdout;
    let result: Value = serde_json::from_str(&printed).unwrap();
    result["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned()
}

/// Waits until these containers are attached, here and by etcd, and no other.
#[track_caller]
fn await_attached(machine: &Machine, etcd: &Etcd, containers: &[&str]) {
    let all = "curl -s --unix-socket /run/meshd/meshd.sock http://meshd/v1/attachments";
    await_ok(&format!("{containers:?} to be attached"), SOON, || {
        let output = machine.try_sh(all);
        let known: Vec<Value> = serde_json::from_str(&output.stdout).map_err(|_| output.describe())?;
        let known: Vec<&str> = known.iter().filter_map(|one| one["containerId"].as_str()).collect();
        let keys: Vec<String> = etcd.get_prefix("/meshd/endpoints/").into_iter().map(|(key, _)| key).collect();
        let mut keys: Vec<&str> = keys.iter().filter_map(|key| key.rsplit('/').nth(1)).collect();
        keys.sort_unstable();
        if known == containers && keys == containers { Ok(()) } else { Err(format!("{known:?} {keys:?}")) }
    });
}

/// Waits until a container can have this address, and has it.
#[track_caller]
fn await_free(machine: &Machine, address: &str) {
    await_ok(&format!("{address} to be free"), SOON, || {
        let wanted = machine.try_sh(&format!("attach routed ADD wanted IP={address}"));
        machine.sh("attach routed DEL wanted && ip netns delete wanted");
        if wanted.success() { Ok(()) } else { Err(wanted.describe()) }
    });
}

#[test]
fn the_packaged_daemon_frees_what_containers_leave() {
    let sites = TwoSites::with_hosts("package-containers", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let machine = Machine::boot(&sites.east.hosts[0], "east-1");
    machine.put(package(), "/root/meshd.deb");
    machine.sh("apt-get install -y ./meshd.deb");
    configure(&machine, &etcd);
    await_running(&machine);
    machine.sh("mv /usr/lib/cni/host-local /root/host-local && meshd install-cni");
    machine.sh(ATTACH);

    // One that dies without DEL, routed and on a bridge, beside one that stays.
    let dead = add(&machine, "routed", "dead");
    let bridged = add(&machine, "bridged", "dead-bridged");
    add(&machine, "routed", "kept");
    await_attached(&machine, &etcd, &["dead", "dead-bridged", "kept"]);
    machine.sh("ip netns delete dead && ip netns delete dead-bridged");
    await_attached(&machine, &etcd, &["kept"]);
    await_ok("the bridge to be removed", SOON, || {
        let bridge = machine.try_sh("ip link show meshbr0");
        if bridge.success() { Err(bridge.describe()) } else { Ok(()) }
    });
    for address in [dead, bridged] {
        await_free(&machine, &address);
    }

    // DEL, with the daemon and without.
    let away = add(&machine, "routed", "away");
    machine.sh("attach routed DEL kept && ip netns delete kept");
    await_attached(&machine, &etcd, &["away"]);
    machine.sh("systemctl stop meshd && attach routed DEL away && ip netns delete away && systemctl start meshd");
    await_running(&machine);
    await_attached(&machine, &etcd, &[]);
    await_free(&machine, &away);

    // A real container.
    machine.sh(PREPARE);
    machine.sh(&format!("{PODMAN} run -d --name app --network meshd {LIMITS} --rootfs /root/pod /bin/sleep 1000000"));
    let id = machine.sh(&format!("{PODMAN} inspect --format '{{{{.Id}}}}' app")).stdout;
    await_attached(&machine, &etcd, &[id.trim()]);
    machine.sh(&format!("{PODMAN} rm -f -t 0 app"));
    await_attached(&machine, &etcd, &[]);

    // What root's host-local gave out for the version before.
    let subnet = await_running(&machine)["subnets"][0].as_str().unwrap().to_owned();
    let ipam = serde_json::json!({"cniVersion": "1.0.0", "name": "routed", "ipam": {"type": "host-local",
        "dataDir": "/run/meshd/ipam", "ranges": [[{"subnet": subnet, "rangeStart": subnet.replace(".0/24", ".200")}]]}});
    let interface = host_name(&AttachmentName { container_id: "before".to_owned(), ifname: "eth0".to_owned() });
    machine.sh(&format!(
        "ip link add {interface} type veth peer name before1
         echo '{ipam}' | CNI_COMMAND=ADD CNI_CONTAINERID=before CNI_NETNS=/x CNI_IFNAME=eth0 CNI_PATH=/root /root/host-local"
    ));
    let before = subnet.replace(".0/24", ".200");
    let refused = machine.try_sh(&format!("attach routed ADD wanted IP={before}"));
    assert!(refused.stdout.contains("in use by container before"), "{}", refused.describe());
    machine.sh(&format!("attach routed DEL wanted; ip netns delete wanted; ip link delete {interface}"));
    await_free(&machine, &before);

    let log = machine.sh("journalctl -u meshd --no-pager -o cat").stdout;
    let complaints: Vec<&str> = log.lines().filter(|line| line.contains("ermission denied")).collect();
    assert_eq!(complaints, [""; 0]);
}
