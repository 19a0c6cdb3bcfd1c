//! Firewall rules that drop the tunnel's packets on this machine, or pods' packets when forwarded.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use api_types::{Finding, Severity};
use ipnet::IpNet;
use kernel::{FirewallProgram, has_table, owner};
use mesh::problem::{Problem, ProblemCode};
use netfilter::{ListedRuleset, ProbePacket, Taken, items};
use text::quote;

/// How long a listing may take: every ruleset of the machine may be large.
const DEADLINE: Duration = Duration::from_secs(20);

/// Flows that are to get through.
#[derive(Debug, Clone, Default)]
pub struct WantedFlows {
    /// The tunnel's UDP port; the one after is for finding out whether direct paths work.
    pub port: u16,
    /// Hosts that call: address there and here, and the interface that they come by, where these are known.
    pub callers: Vec<(IpAddr, IpAddr, Option<String>)>,
    /// Pods' packets: an address of this node's subnet, one of another node's, and the device that leads there.
    pub forwarded: Vec<(IpAddr, IpAddr, String)>,
    /// The mesh's networks.
    pub networks: Vec<IpNet>,
    /// The daemon's own tables.
    pub own_tables: Vec<String>,
}

impl WantedFlows {
    /// The test packet without a daemon: a handshake from any source.
    #[must_use]
    pub fn unknown(port: u16) -> Self {
        let (from, here) = (Ipv4Addr::new(198, 51, 100, 1), Ipv4Addr::UNSPECIFIED);
        Self { port, callers: vec![(from.into(), here.into(), None)], ..Self::default() }
    }
}

/// The chains that drop one of these flows, each with the remedy; in the network namespace of this thread.
#[must_use]
pub fn findings(wanted: &WantedFlows) -> Vec<Finding> {
    // Without the elements of named sets, of which there may be very many.
    let listed = netfilter::nft("nft", &["-j", "-t", "list", "ruleset"], "", DEADLINE);
    let ruleset = ListedRuleset::new(listed.ok().and_then(|listed| items(&listed).ok()).unwrap_or_default());
    let own: Vec<&str> = wanted.own_tables.iter().map(String::as_str).collect();
    let mut findings = Vec::new();
    let mut add = |finding: Finding| {
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    };
    for (source, destination, interface) in &wanted.callers {
        let packet = ProbePacket {
            source: *source,
            destination: *destination,
            protocol: "udp",
            port: Some(wanted.port),
            comes_by: interface.clone(),
            leaves_by: None,
            local: [false, true],
            mark: 0,
            tracked: true,
        };
        for dropped in ruleset.dropping("input", &packet, &own) {
            add(closed(&dropped, wanted.port));
        }
    }
    let mut shut: Vec<(Taken, ProbePacket)> = Vec::new();
    for (pod, peer, device) in &wanted.forwarded {
        let flow = |source: &IpAddr, destination: &IpAddr, comes_by, leaves_by| ProbePacket {
            source: *source,
            destination: *destination,
            protocol: "tcp",
            port: None,
            comes_by,
            leaves_by,
            local: [false, false],
            mark: 0,
            tracked: true,
        };
        for packet in [flow(pod, peer, None, Some(device.clone())), flow(peer, pod, Some(device.clone()), None)] {
            for dropped in ruleset.dropping("forward", &packet, &own) {
                // One family is enough.
                if !shut.iter().any(|(known, _)| *known == dropped) {
                    shut.push((dropped, packet.clone()));
                }
            }
        }
    }
    for (dropped, packet) in &shut {
        add(not_forwarded(dropped, packet, &wanted.networks));
    }
    for (tool, file) in [("iptables-legacy", "ip_tables_names"), ("ip6tables-legacy", "ip6_tables_names")] {
        // Never without a table: asking would load it.
        let listed = has_table(file, "filter").then(|| netfilter::run(tool, &["-w", "5", "-S"], "", DEADLINE));
        if let Some(Ok(output)) = listed
            && closes(&String::from_utf8_lossy(&output.stdout), wanted.port)
        {
            let table = format!("{tool} filter");
            let remedy = format!("{tool} -I INPUT -p udp --dport {}:{} -j ACCEPT", wanted.port, wanted.port + 1);
            add(finding(&table, "INPUT", wanted.port, remedy));
        }
    }
    findings
}

fn finding(table: &str, chain: &str, port: u16, remedy: String) -> Finding {
    let cause = format!("chain {chain} of table {table} drops packets to UDP port {port}");
    Finding::new(Severity::Warning, ProblemCode::UdpPortMayBeClosed, cause, remedy)
}

fn closed(dropped: &Taken, port: u16) -> Finding {
    let Taken { table, chain, at, jumps } = dropped;
    let (place, chain) = (place(table), quote(chain));
    let last = port + 1;
    let remedy = match owner(table.split(' ').nth(1).unwrap_or_default(), jumps) {
        Some(FirewallProgram::Firewalld) => {
            format!("firewall-cmd --permanent --add-port={port}-{last}/udp && firewall-cmd --reload")
        }
        Some(FirewallProgram::Ufw) => format!("ufw allow {port}:{last}/udp"),
        Some(FirewallProgram::Docker) | None => match iptables(table) {
            Some(tool) => format!("{tool} -I {chain} -p udp --dport {port}:{last} -j ACCEPT"),
            None => format!("nft insert rule {place} {chain} udp dport {port}-{last} accept"),
        },
    };
    finding(table, at, port, remedy)
}

/// Family and name of a table, for a command.
fn place(table: &str) -> String {
    table.split_once(' ').map_or_else(String::new, |(family, name)| format!("{family} {}", quote(name)))
}

/// The program that must edit a table: rules that `nft` adds to an iptables table are lost when iptables restores it.
fn iptables(table: &str) -> Option<&'static str> {
    match table {
        "ip filter" => Some("iptables"),
        "ip6 filter" => Some("ip6tables"),
        _ => None,
    }
}

fn not_forwarded(dropped: &Taken, packet: &ProbePacket, networks: &[IpNet]) -> Finding {
    let Taken { table, chain, at, .. } = dropped;
    let (place, chain) = (place(table), quote(chain));
    let (source, destination) = (packet.source, packet.destination);
    let of_table = |net: &&IpNet| match table.split(' ').next() {
        Some("ip") => net.addr().is_ipv4(),
        Some("ip6") => net.addr().is_ipv6(),
        _ => true,
    };
    let commands = networks.iter().filter(of_table).map(|net| match iptables(table) {
        Some(tool) => format!("{tool} -I {chain} -s {net} -j ACCEPT && {tool} -I {chain} -d {net} -j ACCEPT"),
        None => {
            let rule = format!("nft insert rule {place} {chain} {}", if net.addr().is_ipv4() { "ip" } else { "ip6" });
            format!("{rule} saddr {net} accept && {rule} daddr {net} accept")
        }
    });
    let remedy = commands.collect::<Vec<_>>().join(" && ");
    let packets = format!("packets forwarded from {source} to {destination}");
    let remedy = format!("{remedy} # or remove the drop rule from chain {at}");
    Finding::of(Severity::Error, foreign_forward_drop(at, table, &packets, remedy))
}

/// The problem of a foreign chain that drops packets of pods.
pub(crate) fn foreign_forward_drop(chain: &str, table: &str, packets: &str, remedy: String) -> Problem {
    let cause = format!("chain {chain} of table {table} drops {packets}");
    Problem::new(ProblemCode::ForeignForwardDrop, cause, remedy)
}

/// Whether INPUT in the output of `iptables -S` drops by default and has no rule with the port.
fn closes(listing: &str, port: u16) -> bool {
    let input: Vec<&str> = listing.lines().filter(|line| line.starts_with("-A INPUT")).collect();
    let drops = listing.lines().any(|line| line.trim() == "-P INPUT DROP")
        || input
            .last()
            .is_some_and(|line| ["-A INPUT -j DROP", "-A INPUT -j REJECT"].iter().any(|rule| line.starts_with(rule)));
    let holds = |ports: &str| {
        ports.split(',').any(|part| {
            let (from, to) = part.split_once(':').unwrap_or((part, part));
            matches!((from.parse::<u16>(), to.parse::<u16>()), (Ok(from), Ok(to)) if (from..=to).contains(&port))
        })
    };
    let words: Vec<&str> = listing.split_whitespace().collect();
    drops && !words.windows(2).any(|pair| matches!(pair, ["--dport" | "--dports", ports] if holds(ports)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_tables_are_read() {
        let closed = "-P INPUT DROP\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n";
        assert!(closes(closed, 51820));
        assert!(closes(
            "-P INPUT ACCEPT\n-A INPUT -i lo -j ACCEPT\n-A INPUT -j REJECT --reject-with icmp-host-prohibited\n",
            51820
        ));
        assert!(!closes(&format!("{closed}-A INPUT -p udp -m udp --dport 51820:51821 -j ACCEPT\n"), 51820));
        assert!(!closes(&format!("{closed}-A INPUT -p udp -m multiport --dports 53,51820 -j ACCEPT\n"), 51820));
        assert!(!closes("-P INPUT ACCEPT\n", 51820));
    }
}
