//! Pods on a bridge of the node.
//!
//! ```text
//! borrowed   prerouting   from the host's end of a pod's interface: only the pod's own IPv4, IPv6 and ARP sender
//!                         addresses, link-local ones for neighbour discovery aside
//! switched   forward      where br_netfilter does not show the forward chain what passes from port to port: nothing
//!                         passes to or from a pod
//! ```
//!
//! Without state: conntrack of bridges is not in every kernel. Policies are judged in the `inet` table, by address, for a
//! port is not seen there; that no pod has a neighbour's address is what makes it mean something. Pods that are not on a
//! bridge never come by these chains.

use std::{fmt::Write as _, fs, net::IpAddr};

use super::frame::Frame;

/// Kernel settings that have bridged packets go through netfilter's hooks of IPv4 and IPv6.
const CALLS: [&str; 2] =
    ["/proc/sys/net/bridge/bridge-nf-call-iptables", "/proc/sys/net/bridge/bridge-nf-call-ip6tables"];

/// Whether what a bridge passes from port to port comes by nftables' `inet` chains, in the network namespace of this
/// thread.
pub(in crate::enforcement) fn switched_judged() -> bool {
    CALLS.iter().all(|path| fs::read_to_string(path).is_ok_and(|value| value.trim() == "1"))
}

/// What leads from the table `bridge NAME` as it is for `old` to what is needed for `new`; `None`: it may be anything.
pub(super) fn change(name: &str, old: Option<&Frame>, new: &Frame) -> String {
    let table = format!("bridge {name}");
    let mut out = String::new();
    // Writing to a String cannot fail.
    if old.is_none() {
        // Unlike the others, these chains are few and made anew: in between, which no packet sees, there are none.
        let _ = writeln!(out, "add table {table}\ndelete table {table}\nadd table {table}");
        let _ =
            writeln!(out, "add chain {table} borrowed {{ type filter hook prerouting priority -350; policy accept; }}");
        let _ =
            writeln!(out, "add chain {table} switched {{ type filter hook forward priority -350; policy accept; }}");
        let _ = writeln!(out, "add map {table} ports {{ type ifname : verdict; }}");
        let _ = writeln!(out, "add set {table} pods {{ type ifname; }}");
        let _ = writeln!(out, "add rule {table} borrowed iifname vmap @ports");
    }
    let closed = |frame: &Frame| !frame.switched_judged && !frame.audit;
    if old.is_none_or(|old| closed(old) != closed(new)) {
        let _ = writeln!(out, "flush chain {table} switched");
        if closed(new) {
            for end in ["iifname", "oifname"] {
                let _ = writeln!(out, "add rule {table} switched {end} @pods ether type {{ ip, ip6 }} counter drop");
            }
        }
    }
    let before = |port: &String| old.and_then(|old| old.ports.get(port));
    for port in old.iter().flat_map(|old| old.ports.keys()).filter(|port| !new.ports.contains_key(*port)) {
        let chain = chain(port);
        let _ = writeln!(
            out,
            "delete element {table} ports {{ \"{port}\" }}\ndelete element {table} pods {{ \"{port}\" }}"
        );
        let _ = writeln!(out, "flush chain {table} {chain}\ndelete chain {table} {chain}");
    }
    for (port, addresses) in new.ports.iter().filter(|(port, addresses)| before(port) != Some(*addresses)) {
        let chain = chain(port);
        let _ = writeln!(out, "add chain {table} {chain}\nflush chain {table} {chain}");
        for rule in own_addresses(addresses) {
            let _ = writeln!(out, "add rule {table} {chain} {rule}");
        }
        if before(port).is_none() {
            let _ = writeln!(out, "add element {table} ports {{ \"{port}\" : jump {chain} }}");
            let _ = writeln!(out, "add element {table} pods {{ \"{port}\" }}");
        }
    }
    out
}

/// The chain of a port: names of interfaces may hold what names of chains may not.
fn chain(port: &str) -> String {
    let hex = |byte: u8| format!("{byte:02x}");
    let name: String = port
        .bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("_{}", hex(byte)) })
        .collect();
    format!("port_{name}")
}

/// What a pod with these addresses may send.
fn own_addresses(addresses: &[IpAddr]) -> Vec<String> {
    let mut rules = vec!["ether type { 8021q, 8021ad } counter drop".to_owned()];
    let list = |v4: bool, write: &dyn Fn(&IpAddr) -> String| {
        let texts: Vec<String> = addresses.iter().filter(|address| address.is_ipv4() == v4).map(write).collect();
        (!texts.is_empty()).then(|| texts.join(", "))
    };
    if let Some(v4) = list(true, &ToString::to_string) {
        rules.push(format!("arp saddr ip {{ {v4} }} return"));
        rules.push(format!("ip saddr {{ {v4} }} return"));
    }
    let number = |address: &IpAddr| match address {
        IpAddr::V6(v6) => format!("{:#034x}", u128::from(*v6)),
        IpAddr::V4(v4) => v4.to_string(),
    };
    // Whose link-layer address is said stands behind the ICMPv6 header: link-local ones, and the pod's own.
    let advertised = "icmpv6 type nd-neighbor-advert @th,64,16 & 0xffc0 != 0xfe80";
    match list(false, &number) {
        Some(targets) => rules.push(format!("{advertised} @th,64,128 != {{ {targets} }} counter drop")),
        None => rules.push(format!("{advertised} counter drop")),
    }
    if let Some(v6) = list(false, &ToString::to_string) {
        rules.push(format!("ip6 saddr {{ {v6} }} return"));
    }
    let discovery = "nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld-listener-report, \
                     mld-listener-done, mld2-listener-report";
    rules.push(format!("ip6 saddr fe80::/10 icmpv6 type {{ {discovery} }} return"));
    rules.push("ip6 saddr :: icmpv6 type { nd-neighbor-solicit, mld2-listener-report } return".to_owned());
    rules.push("counter drop".to_owned());
    rules
}

#[cfg(test)]
mod tests {
    use super::chain;

    #[test]
    fn interfaces_with_other_names_have_other_chains() {
        let names = ["veth1", "veth.1", "veth_1", "veth_2e1", "veth-1", "veth+1"];
        let chains: std::collections::BTreeSet<String> = names.iter().map(|name| chain(name)).collect();
        assert_eq!(chains.len(), names.len(), "{chains:?}");
        assert!(chains.iter().all(|chain| crate::kernel::nft::is_identifier(chain)));
    }
}
