//! Sysctls and programs of this machine.

use std::{collections::BTreeSet, env, fs, path::Path};

use api_types::{Families, Finding, Severity};
use enforcement::bridge_not_filtered;
use mesh::problem::{Problem, ProblemCode};
use text::quote;

use super::routes;

/// The interfaces to check.
#[derive(Debug, Clone, Default)]
pub struct Interfaces {
    /// The tunnel's device.
    pub tun: String,
    /// Interfaces of outer packets; if empty, those of the default routes.
    pub underlay: Vec<String>,
    /// Address families to forward; none without the daemon, which enables forwarding itself.
    pub families: Families,
}

/// Findings in the network namespace of this thread.
#[must_use]
pub fn findings(interfaces: &Interfaces) -> Vec<Finding> {
    let table = routes::main_table();
    let mut underlay: BTreeSet<String> = interfaces.underlay.iter().cloned().collect();
    if underlay.is_empty() {
        underlay.extend(table.iter().filter(|route| route.net.prefix_len() == 0).map(|route| route.device.clone()));
        underlay.remove("lo");
    }
    let advertised: BTreeSet<String> =
        table.iter().filter(|route| route.advertised).map(|route| route.device.clone()).collect();
    let mut findings = settings(&setting, interfaces, &underlay, &advertised);
    if !Path::new("/dev/net/tun").exists() {
        findings.push(Finding::new(
            Severity::Error,
            ProblemCode::TunMissing,
            "/dev/net/tun is missing: the kernel has no TUN support",
            "modprobe tun; echo tun > /etc/modules-load.d/meshd.conf",
        ));
    }
    // The daemon has the administrator's folders in its PATH, who asks may not.
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders = env::split_paths(&path).chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(Into::into));
    if !folders.any(|folder| folder.join("nft").exists()) {
        findings.push(Finding::new(
            Severity::Error,
            ProblemCode::NftMissing,
            "nft is not installed: policies and the firewall cannot be set up",
            "apt-get install nftables",
        ));
    }
    findings
}

/// The problem of an interface whose setting prevents forwarding of arriving packets. IPv6 has such a setting for all
/// interfaces only.
pub(crate) fn not_forwarding(interface: &str) -> Problem {
    let key = format!("net/ipv4/conf/{interface}/forwarding");
    forwarding_off(&key, &format!("IPv4 packets arriving on {interface}"))
}

/// The problem of a key below `/proc/sys` that keeps the kernel from forwarding these packets.
fn forwarding_off(key: &str, packets: &str) -> Problem {
    let cause = format!("{} is 0: the kernel does not forward {packets}", key.replace('/', "."));
    Problem::new(ProblemCode::ForwardingOff, cause, set(key, "1"))
}

/// The value of a key below `/proc/sys`.
fn setting(key: &str) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/sys/{key}")).ok()?.trim().to_owned())
}

/// The command that sets a key below `/proc/sys`.
fn set(key: &str, value: &str) -> String {
    // An interface may have dots in its name: then the parts of the key stay apart by slashes.
    let key = if key.contains('.') { key.to_owned() } else { key.replace('/', ".") };
    format!("sysctl -w {}={value}", quote(&key))
}

/// Kernel settings; `read` gives the value of a key below `/proc/sys`, `None` where there is none.
fn settings(
    read: &dyn Fn(&str) -> Option<String>,
    interfaces: &Interfaces,
    underlay: &BTreeSet<String>,
    advertised: &BTreeSet<String>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let is = |key: &str, value: &str| read(key).is_some_and(|found| found == value);
    let Families { ipv4, ipv6 } = interfaces.families;
    for (carried, key, family) in
        [(ipv4, "net/ipv4/ip_forward", "IPv4"), (ipv6, "net/ipv6/conf/all/forwarding", "IPv6")]
    {
        if carried && is(key, "0") {
            let packets = format!("{family} packets between pods and the mesh");
            findings.push(Finding::of(Severity::Error, forwarding_off(key, &packets)));
        }
    }
    if ipv4 && is("net/ipv4/ip_forward", "1") {
        for interface in underlay.iter().map(String::as_str).chain([interfaces.tun.as_str()]) {
            if is(&format!("net/ipv4/conf/{interface}/forwarding"), "0") {
                findings.push(Finding::of(Severity::Error, not_forwarding(interface)));
            }
        }
    }
    // The stricter of both counts: 1 is strict, 2 loose (ip-sysctl).
    let filter = |interface: &str| read(&format!("net/ipv4/conf/{interface}/rp_filter"));
    let all = filter("all").unwrap_or_default();
    for interface in underlay.iter().map(String::as_str).chain([interfaces.tun.as_str()]) {
        let own = filter(interface);
        if own.is_some() && all.as_str().max(own.as_deref().unwrap_or("0")) == "1" {
            findings.push(Finding::new(
                Severity::Warning,
                ProblemCode::RpFilterStrict,
                format!("the reverse path filter of {interface} is strict: packets on asymmetric paths are dropped"),
                set(&format!("net/ipv4/conf/{interface}/rp_filter"), "2"),
            ));
        }
    }
    for interface in advertised {
        let key = format!("net/ipv6/conf/{interface}/accept_ra");
        if is("net/ipv6/conf/all/forwarding", "1") && is(&key, "1") {
            findings.push(Finding::new(
                Severity::Error,
                ProblemCode::DefaultRouteWillGo,
                format!(
                    "the default route of {interface} comes from router advertisements, which the kernel ignores \
                         with forwarding enabled: it will expire"
                ),
                set(&key, "2"),
            ));
        }
    }
    for key in ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"] {
        if is(key, "0") {
            let off = format!("{} is 0", key.replace('/', "."));
            findings.push(Finding::of(Severity::Warning, bridge_not_filtered(&off, set(key, "1"))));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(settings_of: &[(&str, &str)]) -> Vec<(String, String)> {
        codes_of(settings_of, false)
    }

    fn codes_of(settings_of: &[(&str, &str)], v4_only: bool) -> Vec<(String, String)> {
        let read =
            |key: &str| settings_of.iter().find(|(known, _)| *known == key).map(|(_, value)| (*value).to_owned());
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let families = Families { ipv4: true, ipv6: !v4_only };
        let interfaces = Interfaces { tun: "meshd0".to_owned(), families, ..Interfaces::default() };
        let found = settings(&read, &interfaces, &names(&["eth0"]), &names(&["eth0"]));
        found.into_iter().map(|finding| (finding.code, finding.remedy)).collect()
    }

    #[test]
    fn a_machine_that_is_as_it_should_be_has_no_findings() {
        let well = [
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv4/conf/eth0/forwarding", "1"),
            ("net/ipv6/conf/eth0/forwarding", "0"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/eth0/rp_filter", "2"),
            ("net/ipv4/conf/meshd0/rp_filter", "0"),
            ("net/ipv6/conf/eth0/accept_ra", "2"),
            ("net/bridge/bridge-nf-call-iptables", "1"),
        ];
        assert_eq!(codes(&well), []);
        assert_eq!(codes(&[]), [], "what is not there is not wrong");
        assert_eq!(
            codes_of(&[("net/ipv6/conf/all/forwarding", "0")], true),
            [],
            "a family that the mesh does not carry"
        );
    }

    #[test]
    fn each_fault_is_named_with_the_command_that_mends_it() {
        let one = |code: &str, remedy: &str| vec![(code.to_owned(), remedy.to_owned())];
        for (faulty, code, remedy) in [
            (vec![("net/ipv4/ip_forward", "0")], "forwarding_off", "sysctl -w net.ipv4.ip_forward=1"),
            (
                vec![("net/ipv4/ip_forward", "1"), ("net/ipv4/conf/eth0/forwarding", "0")],
                "forwarding_off",
                "sysctl -w net.ipv4.conf.eth0.forwarding=1",
            ),
            (
                vec![("net/ipv4/conf/all/rp_filter", "1"), ("net/ipv4/conf/meshd0/rp_filter", "0")],
                "rp_filter_strict",
                "sysctl -w net.ipv4.conf.meshd0.rp_filter=2",
            ),
            (
                vec![("net/ipv6/conf/all/forwarding", "1"), ("net/ipv6/conf/eth0/accept_ra", "1")],
                "default_route_will_go",
                "sysctl -w net.ipv6.conf.eth0.accept_ra=2",
            ),
            (
                vec![("net/bridge/bridge-nf-call-ip6tables", "0")],
                "bridge_not_filtered",
                "sysctl -w net.bridge.bridge-nf-call-ip6tables=1",
            ),
        ] {
            assert_eq!(codes(&faulty), one(code, remedy));
        }
    }
}
