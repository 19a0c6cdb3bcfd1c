//! Tables of the legacy kernel interface, which no nftables listing shows, read by `iptables-legacy`.
//!
//! meshd reads but never edits them. A reported problem ends once the rules from its remedy exist.

use ipnet::IpNet;
use mesh::kernel_state::Desired;

use super::{super::nft::run, ForeignDrop, owner, prefixes};

/// The old filter tables that drop forwarded mesh packets. Without the tool, they cannot be read and are not reported.
pub(crate) async fn legacy(desired: &Desired) -> Vec<ForeignDrop> {
    let mut found = Vec::new();
    for (family, file, tool) in
        [("ip", "ip_tables_names", "iptables-legacy"), ("ip6", "ip6_tables_names", "ip6tables-legacy")]
    {
        let prefixes = prefixes(desired, family);
        if prefixes.is_empty() || !has_table(file, "filter") {
            continue;
        }
        // Never without a table: asking would load it.
        match run(tool, &["-w", "5", "-S", "FORWARD"]).await {
            Ok(output) if output.status.success() => {
                found.extend(judge(tool, &String::from_utf8_lossy(&output.stdout), &prefixes));
            }
            Ok(output) => tracing::debug!(tool, status = %output.status, "the old tables cannot be looked at"),
            Err(error) => tracing::debug!(tool, %error, "the old tables cannot be looked at"),
        }
    }
    found
}

/// Whether the old interface has this table in this network namespace.
pub fn has_table(file: &str, table: &str) -> bool {
    std::fs::read_to_string(format!("/proc/thread-self/net/{file}"))
        .is_ok_and(|names| names.lines().any(|name| name.trim() == table))
}

/// Judges the output of `tool -S FORWARD`, rule by rule like the kernel.
fn judge(tool: &str, listing: &str, prefixes: &[IpNet]) -> Option<ForeignDrop> {
    let rules: Vec<LegacyRule> = listing.lines().filter_map(LegacyRule::parse).collect();
    let mut accepted: Vec<(Direction, IpNet)> = Vec::new();
    let policy = listing.lines().any(|line| matches!(line.trim(), "-P FORWARD DROP" | "-P FORWARD REJECT"));
    let mut drops = policy;
    for rule in &rules {
        match (rule.matches.as_slice(), rule.target.as_str()) {
            // A rule without conditions ends the chain.
            ([], "ACCEPT") => {
                drops = false;
                break;
            }
            ([], "DROP" | "REJECT") => {
                drops = true;
                break;
            }
            ([LegacyMatch::Prefix(direction, prefix)], "ACCEPT") => accepted.push((*direction, *prefix)),
            _ => {}
        }
    }
    let passes = |direction, net: &IpNet| accepted.iter().any(|(to, prefix)| *to == direction && prefix.contains(net));
    let missing =
        prefixes.iter().find(|net| !passes(Direction::Source, net) || !passes(Direction::Destination, net))?;
    let jumps: Vec<String> = rules.iter().map(|rule| rule.target.clone()).collect();
    drops.then(|| ForeignDrop {
        family: tool.to_owned(),
        table: "filter".to_owned(),
        chain: "FORWARD".to_owned(),
        owner: owner("filter", &jumps),
        remedy: format!(
            "{tool} -I FORWARD -s {missing} -j ACCEPT && {tool} -I FORWARD -d {missing} -j ACCEPT # --forward-accept \
             does not edit legacy tables"
        ),
    })
}

/// A rule of the chain, as far as it matters here.
struct LegacyRule {
    matches: Vec<LegacyMatch>,
    target: String,
}

#[derive(Debug, PartialEq)]
enum LegacyMatch {
    Prefix(Direction, IpNet),
    /// Anything else, which not every packet meets.
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Direction {
    Source,
    Destination,
}

impl LegacyRule {
    /// Of a line `-A FORWARD …`.
    fn parse(line: &str) -> Option<Self> {
        let words = words(line);
        let mut words = words.iter().map(String::as_str);
        if words.next() != Some("-A") || words.next() != Some("FORWARD") {
            return None;
        }
        let mut rule = Self { matches: Vec::new(), target: String::new() };
        while let Some(word) = words.next() {
            match word {
                "-s" | "-d" => {
                    let direction = if word == "-s" { Direction::Source } else { Direction::Destination };
                    let prefix = words.next().and_then(|text| text.parse().ok());
                    rule.matches
                        .push(prefix.map_or(LegacyMatch::Other, |prefix| LegacyMatch::Prefix(direction, prefix)));
                }
                "-j" | "-g" => {
                    rule.target = words.next().unwrap_or_default().to_owned();
                    // The target's own options follow.
                    break;
                }
                // Comments match everything.
                "--comment" => drop(words.next()),
                "-m" => {
                    if words.next() != Some("comment") {
                        rule.matches.push(LegacyMatch::Other);
                    }
                }
                _ => rule.matches.push(LegacyMatch::Other),
            }
        }
        Some(rule)
    }
}

/// The words of a line; double quotes hold one together, a backslash takes the next character as it is.
pub(super) fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' => word.get_or_insert_default().extend(characters.next()),
            ' ' | '\t' if !quoted => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::super::FirewallProgram;
    use super::*;

    fn judged(listing: &str) -> Option<ForeignDrop> {
        judge("iptables-legacy", listing, &["10.244.0.0/16".parse().unwrap()])
    }

    #[test]
    fn what_drops_is_reported() {
        for listing in [
            "-P FORWARD DROP\n",
            "-P FORWARD DROP\n-A FORWARD -i eth0 -j ACCEPT\n",
            "-P FORWARD ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n",
            "-P FORWARD ACCEPT\n-A FORWARD -m comment --comment \"the -j ACCEPT end\" -j DROP\n-A FORWARD -j ACCEPT\n",
            // One direction alone carries no answers.
            "-P FORWARD DROP\n-A FORWARD -s 10.244.0.0/16 -j ACCEPT\n",
            "-P FORWARD DROP\n-A FORWARD -s 10.244.0.0/24 -j ACCEPT\n-A FORWARD -d 10.244.0.0/16 -j ACCEPT\n",
            // Too late.
            "-P FORWARD DROP\n-A FORWARD -j DROP\n-A FORWARD -s 10.0.0.0/8 -j ACCEPT\n-A FORWARD -d 10.0.0.0/8 -j ACCEPT\n",
            "-P FORWARD DROP\n-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n",
            "-P FORWARD DROP\n-A FORWARD ! -s 10.244.0.0/16 -j ACCEPT\n-A FORWARD -d 10.244.0.0/16 -j ACCEPT\n",
        ] {
            assert!(judged(listing).is_some(), "{listing}");
        }
    }

    #[test]
    fn what_passes_mesh_packets_is_not() {
        for listing in [
            "",
            "-P FORWARD ACCEPT\n",
            "-P FORWARD ACCEPT\n-A FORWARD -s 192.0.2.0/24 -j DROP\n-A FORWARD -p tcp -m tcp --dport 25 -j REJECT\n",
            "-P FORWARD DROP\n-A FORWARD -m comment --comment all -j ACCEPT\n-A FORWARD -j DROP\n",
            // The remedy, with a comment of the operator's.
            "-P FORWARD DROP\n-A FORWARD -d 10.244.0.0/16 -j ACCEPT\n\
             -A FORWARD -s 10.0.0.0/8 -m comment --comment \"our \\\"mesh\\\"\" -j ACCEPT\n-A FORWARD -j REJECT\n",
        ] {
            assert_eq!(judged(listing), None, "{listing}");
        }
    }

    #[test]
    fn the_owner_is_told_by_its_chains() {
        let found = judged("-P FORWARD DROP\n-A FORWARD -j DOCKER-USER\n").unwrap();
        assert_eq!(found.owner, Some(FirewallProgram::Docker));
        assert!(found.remedy.contains("iptables-legacy -I FORWARD -s 10.244.0.0/16 -j ACCEPT"), "{}", found.remedy);
    }
}
