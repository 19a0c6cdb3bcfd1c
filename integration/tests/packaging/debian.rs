//! The Debian package: installed, run by systemd, upgraded, removed, purged.
//!
//! ```text
//!   east1: machine with systemd ── switch ── router ── switch ── west1: a node
//!                                              │
//!                                            etcd
//! ```

use integration::{
    Etcd, Host, Machine, Meshd, await_ok,
    topology::{CONFIG, TwoSites},
};
use serde_json::Value;

use crate::{SOON, package::package};

/// What of a mesh is in the kernel: routes, rules, tables, devices.
pub(crate) fn left_in_kernel(host: &Host) -> Vec<String> {
    let commands = [
        "ip route show table all proto 158",
        "ip -6 route show table all proto 158",
        "ip rule show priority 15800",
        "ip -6 rule show priority 15800",
        "nft list tables",
        "ip -o link show type tun",
    ];
    commands
        .iter()
        .flat_map(|command| host.run(command).stdout.lines().map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

pub(crate) fn status(machine: &Machine) -> Result<Value, String> {
    let output = machine.try_sh("meshctl -o json status");
    serde_json::from_str(&output.stdout).map_err(|_| output.describe())
}

#[track_caller]
pub(crate) fn await_running(machine: &Machine) -> Value {
    await_ok("the daemon to have its subnets", SOON, || {
        let status = status(machine)?;
        if status["state"] == "running" { Ok(status) } else { Err(status.to_string()) }
    })
}

/// Settings for this etcd; the daemon starts with them.
#[track_caller]
pub(crate) fn configure(machine: &Machine, etcd: &Etcd) {
    machine.sh(&format!(
        "cat > /etc/meshd/meshd.toml <<'.'\nsite = \"east\"\netcd-endpoints = [\"{}\"]\netcd-allow-plaintext = true\n.\n\
         meshd run --check\nsystemctl enable --now meshd",
        etcd.endpoints().split(',').next().unwrap()
    ));
}

#[test]
fn is_installed_run_by_systemd_removed_and_purged() {
    let sites = TwoSites::with_hosts("package", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let other = Meshd::on(&sites.west.hosts[0], &etcd).site("west").start();
    let host = &sites.east.hosts[0];
    let machine = Machine::boot(host, "east-1");
    machine.put(package(), "/root/meshd.deb");

    machine.sh("apt-get install -y ./meshd.deb");
    machine.sh("zcat /usr/share/man/man1/meshctl-ping.1.gz | grep -q gets");
    machine.sh("bash -c 'source /usr/share/bash-completion/completions/meshctl && complete -p meshctl'");
    machine.sh("systemd-analyze verify meshd.service");
    // Of 100, which is a service that may do anything.
    machine.sh("systemd-analyze security --no-pager --threshold=30 meshd.service");
    assert_eq!(left_in_kernel(host), Vec::<String>::new(), "nothing runs before it is configured");
    assert_eq!(machine.try_sh("systemctl is-enabled meshd").stdout.trim(), "disabled");

    configure(&machine, &etcd);
    let id = await_running(&machine)["id"].clone();
    other.await_path("east-1", "wireguard", SOON);
    let overlay = other.overlay()[0];
    await_ok("the other node to answer", SOON, || {
        let ping = machine.try_sh(&format!("ping -c 1 -W 1 {overlay}"));
        if ping.success() { Ok(()) } else { Err(ping.describe()) }
    });
    // The check names what the service cannot read, though root can.
    let unreadable = machine.try_sh(
        "umask 077; echo word > /etc/meshd/password; meshd run --check --etcd-username u --etcd-password-file /etc/meshd/password",
    );
    assert!(unreadable.stderr.contains("chown meshd: /etc/meshd/password"), "{}", unreadable.describe());
    machine.sh("rm /etc/meshd/password");
    let process = machine.sh("cat /proc/$(systemctl show -P MainPID meshd)/status").stdout;
    assert!(process.contains("CapEff:\t0000000000003000"), "CAP_NET_ADMIN and CAP_NET_RAW alone: {process}");

    // A hung daemon is restarted, as often as it takes.
    assert_eq!(machine.sh("systemctl show -P StartLimitIntervalUSec meshd").stdout.trim(), "0");
    machine.sh("mkdir -p /run/systemd/system/meshd.service.d
         printf '[Service]\nWatchdogSec=10\n' > /run/systemd/system/meshd.service.d/short.conf
         systemctl daemon-reload && systemctl restart meshd");
    await_running(&machine);
    machine.sh("kill -STOP $(systemctl show -P MainPID meshd)");
    await_ok("the watchdog to restart it", SOON, || {
        let restarts = machine.sh("systemctl show -P NRestarts meshd").stdout;
        if restarts.trim() != "0" { Ok(()) } else { Err(restarts) }
    });
    await_running(&machine);
    machine.sh("rm -r /run/systemd/system/meshd.service.d; systemctl daemon-reload; systemctl restart meshd");
    await_running(&machine);

    // Wrong settings end it once, and the journal has the reason as an error.
    machine.sh("cp /etc/meshd/meshd.toml /root/good.toml; echo 'no-such-setting = 1' >> /etc/meshd/meshd.toml");
    let _fails = machine.try_sh("systemctl restart meshd");
    await_ok("systemd to leave it at that", SOON, || {
        let state = machine.try_sh("systemctl is-failed meshd").stdout;
        if state.trim() == "failed" { Ok(()) } else { Err(state) }
    });
    assert_eq!(machine.sh("systemctl show -P NRestarts meshd").stdout.trim(), "0");
    await_ok("the reason in the journal", SOON, || {
        let told = machine.try_sh("journalctl -u meshd -p err -o cat");
        if told.stdout.contains("no-such-setting: unknown setting") { Ok(()) } else { Err(told.describe()) }
    });
    machine.sh("mv /root/good.toml /etc/meshd/meshd.toml; systemctl restart meshd");
    await_running(&machine);
    await_ok("the start in the journal", SOON, || {
        let told = machine.try_sh("journalctl -u meshd -p info -o cat");
        if told.stdout.contains("\nstarting node=") { Ok(()) } else { Err(told.describe()) }
    });

    // The same version again is an upgrade to the maintainer scripts: the daemon restarts, the node is the same.
    let before = machine.sh("systemctl show -P MainPID meshd").stdout;
    machine.sh("apt-get install -y --reinstall ./meshd.deb");
    assert_ne!(machine.sh("systemctl show -P MainPID meshd").stdout, before);
    let status = await_running(&machine);
    assert_eq!(status["id"], id);

    // While something is attached it stays, and goes on.
    let subnet: ipnet::IpNet = status["subnets"][0].as_str().unwrap().parse().unwrap();
    let address = subnet.hosts().nth(20).unwrap();
    let pod = host.pod("attached", &[address]);
    let refused = machine.try_sh("apt-get remove -y meshd");
    assert!(!refused.success(), "{}", refused.describe());
    let said = format!("{}{}", refused.stdout, refused.stderr);
    assert!(said.contains("containers are still attached") && said.contains("dpkg --purge meshd"), "{said}");
    machine.sh("systemctl is-active meshd");
    await_running(&machine);

    host.ip(&[&format!("link delete {}", pod.host_interface().name())]);
    // Invalid settings do not prevent removal.
    machine.sh("echo 'no-such-setting = 1' >> /etc/meshd/meshd.toml");
    machine.sh("apt-get remove -y meshd");
    assert_eq!(left_in_kernel(host), Vec::<String>::new());
    machine.sh("test -s /var/lib/meshd/key -a -s /etc/meshd/meshd.toml");
    machine.sh("sed -i /no-such-setting/d /etc/meshd/meshd.toml");

    machine.sh("apt-get install -y ./meshd.deb && systemctl enable --now meshd");
    let status = await_running(&machine);
    assert_eq!(status["id"], id, "it is the same node again");
    let _pod = host.pod("attached-again", &[address]);
    machine.sh("dpkg --purge meshd");
    assert_eq!(left_in_kernel(host), Vec::<String>::new());
    machine.sh("test ! -e /var/lib/meshd -a ! -e /etc/meshd/meshd.toml");
}
