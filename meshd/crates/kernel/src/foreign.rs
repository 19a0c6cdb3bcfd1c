//! Other programs' firewalls: chains that would drop forwarded mesh packets, and the one rule that exempts them.
//!
//! Our `accept` cannot override a drop in another table: if Docker, firewalld or ufw drop a packet at the forward hook,
//! only their own chain can accept it. The exemption is one rule at the top of that chain, which jumps to a chain of
//! ours in the same table. Its rules are plain prefix matches, one each: `iptables-save` can print and restore those,
//! but not sets.

mod iptables;
mod legacy;
mod met;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use ipnet::IpNet;
use mesh::kernel_state::Desired;
use netfilter::{
    AcceptedPrefixes, ListedRuleset, accepted, expressions, foreign_rules, is_identifier, items, table_of,
};
use serde_json::Value;
use text::quote;

use super::{
    Options,
    failure::{Failure, FailureCause},
    nft::{Element, Nft, NftSet, NftTableError, NftTransaction, run},
};
pub use legacy::has_table;
pub(crate) use legacy::legacy;
pub(crate) use met::met;
pub use met::{Met, RuleEffect};

/// A chain at the forward hook in another table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignChain {
    /// `ip`, `ip6` or `inet`.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// Its default is to drop.
    pub drops: bool,
    /// Its owner, if known.
    pub owner: Option<FirewallProgram>,
    /// Handles of rules in it that lead to our accept chain.
    pub tagged: Vec<u64>,
    /// The prefixes that its owner's rules accept.
    pub accepted: AcceptedPrefixes,
    /// The comments of our accept chain's rules in the same table, if that chain is there.
    pub accept_chain: Option<Vec<Option<String>>>,
}

/// Programs that are known to drop forwarded packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirewallProgram {
    /// Docker's engine sets the policy of FORWARD to DROP.
    Docker,
    /// firewalld rejects packets that no zone or policy allows.
    Firewalld,
    /// ufw's default for routed packets is to drop.
    Ufw,
}

/// A chain that drops forwarded mesh packets and is not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignDrop {
    /// `ip`, `ip6` or `inet`; `iptables-legacy` or `ip6tables-legacy` for tables that nftables does not show.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// Its owner, if known.
    pub owner: Option<FirewallProgram>,
    /// The remedy.
    pub remedy: String,
}

/// Commands for one foreign table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignEdit {
    /// `ip`, `ip6` or `inet`.
    pub family: String,
    /// The table.
    pub table: String,
    /// Accepts mesh packets there, or takes that back.
    pub accept: bool,
    /// The commands.
    pub transaction: NftTransaction,
}

impl ForeignEdit {
    pub(super) fn opens(&self) -> bool {
        self.accept
    }
}

impl fmt::Display for ForeignEdit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.accept { "accepts" } else { "no longer accepts" };
        write!(f, "table {} {}: a tagged rule {what} mesh packets", self.family, self.table)
    }
}

impl fmt::Display for FirewallProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Docker => "Docker",
            Self::Firewalld => "firewalld",
            Self::Ufw => "ufw",
        })
    }
}

/// The name of our chain in a foreign table, as iptables' users write chains.
pub(crate) fn accept_chain(options: &Options) -> String {
    format!("{}-FORWARD", options.table_name.to_ascii_uppercase())
}

/// Other programs' rules that a pass reads.
#[derive(Debug, Clone, Default)]
pub(crate) struct Foreign {
    /// Chains at the forward hook that drop, or that hold a rule of ours.
    pub chains: Vec<ForeignChain>,
    /// Chains on the path of mesh packets: source NAT, and filters of this node's own packets.
    pub met: Arc<ListedRuleset>,
}

/// Reads the rules outside our tables, without the elements of named sets: others keep a hundred thousand of them.
pub(crate) async fn observe(options: &Options, nft: &Nft) -> Result<Foreign, NftTableError> {
    let Some(json) = nft.list(&["list", "chains"]).await? else {
        return Ok(Foreign::default());
    };
    let policies = super::policy_table(&options.table_name);
    let is_foreign = |item: &Value| {
        let ours = (item["family"] == "inet" && item["table"] == options.table_name.as_str())
            || item["table"] == policies.as_str();
        !ours && matches!(item["family"].as_str(), Some("ip" | "ip6" | "inet"))
    };
    let chains = items(&json)?;
    let hooked = chains.iter().filter_map(|item| item.get("chain")).filter(|chain| is_foreign(chain) && is_met(chain));
    let families: BTreeSet<&str> = hooked.filter_map(|chain| chain["family"].as_str()).collect();
    let mut listed = Vec::new();
    for family in families {
        // Of a table by itself, nft reads the elements even where it does not print them.
        if let Some(json) = nft.list(&["-t", "list", "ruleset", family]).await? {
            let all = items(&json)?.into_iter();
            listed.extend(
                all.filter(|item| ["chain", "rule"].iter().any(|kind| item.get(*kind).is_some_and(is_foreign))),
            );
        }
    }
    let rules = ListedRuleset::new(listed.clone());
    let chains = forward_chains(&accept_chain(options), &rules);
    for (table, options) in [("nat", &["-t", "nat"]), ("mangle", &["-t", "mangle"]), ("raw", &["-t", "raw"])] {
        translate_matches(table, options, &mut listed).await;
    }
    let met = ListedRuleset::new(listed).reachable(|chain| is_met(chain) && chain["hook"] != "forward");
    Ok(Foreign { chains, met: Arc::new(met) })
}

/// Whether packets of the mesh meet a base chain.
fn is_met(chain: &Value) -> bool {
    match chain["type"].as_str() {
        Some("nat") => chain["hook"] == "postrouting",
        Some("filter" | "route") => {
            ["forward", "input", "output", "postrouting"].iter().any(|hook| chain["hook"] == *hook)
        }
        _ => false,
    }
}

/// Puts the rules of an iptables table in the place of their listings, which lack the arguments of its matches and
/// targets, and adds those of the old table. `options`: those that select the table.
async fn translate_matches(table: &str, options: &'static [&'static str], listed: &mut Vec<Value>) {
    for (family, names, [new, old]) in [
        ("ip", "ip_tables_names", ["iptables-nft-save", "iptables-legacy-save"]),
        ("ip6", "ip6_tables_names", ["ip6tables-nft-save", "ip6tables-legacy-save"]),
    ] {
        let is_of_table = |item: &Value| {
            let of = item.get("rule").or_else(|| item.get("chain"));
            of.is_some_and(|of| of["family"] == family && of["table"] == table)
        };
        let lacking = listed.iter().filter(|item| is_of_table(item)).filter_map(|item| item.get("rule"));
        let lacks = lacking.flat_map(expressions).any(lacks_arguments);
        let legacy = format!("{table}{}", met::LEGACY);
        let mut add = Vec::new();
        let old = (has_table(names, table), old, legacy.as_str());
        for (wanted, program, called) in [(lacks, new, table), old] {
            if !wanted {
                continue;
            }
            match run(program, options).await {
                Ok(output) if output.status.success() => {
                    add.extend(iptables::items(&String::from_utf8_lossy(&output.stdout), family, table, called));
                }
                // Their listing alone shows less, so nothing is concluded.
                Ok(output) => tracing::debug!(program, status = %output.status, "iptables' rules not read"),
                Err(error) => tracing::debug!(program, %error, "iptables' rules not read"),
            }
        }
        if add.iter().any(&is_of_table) {
            listed.retain(|item| !is_of_table(item));
        }
        listed.append(&mut add);
    }
}

/// Whether nft lists an expression of iptables' own by its name alone.
fn lacks_arguments(expression: &Value) -> bool {
    expression.get("xt").is_some_and(|xt| match xt["type"].as_str() {
        Some("match") => xt["name"] != "comment",
        Some("target") => xt["name"] == "MARK",
        _ => false,
    })
}

/// The chains at the forward hook.
fn forward_chains(accept_name: &str, rules: &ListedRuleset) -> Vec<ForeignChain> {
    let mut found = Vec::new();
    for chain in rules.items("chain").filter(|chain| chain["hook"] == "forward" && chain["type"] == "filter") {
        let table = table_of(chain);
        let [family, table_name, name] =
            ["family", "table", "name"].map(|key| chain[key].as_str().unwrap_or_default().to_owned());
        let of = foreign_rules(rules.rules(&table, &name), accept_name);
        let has_accept = rules.items("chain").any(|other| other["name"] == accept_name && table_of(other) == table);
        let drops = chain["policy"] == "drop" || of.ends_in_drop;
        let accepted = match drops && of.tagged.is_empty() {
            true => accepted(rules.items("rule").filter(|rule| table_of(rule) == table), accept_name),
            false => AcceptedPrefixes::default(),
        };
        found.push(ForeignChain {
            drops,
            accepted,
            owner: owner(&table_name, &of.jumps),
            accept_chain: has_accept.then(|| foreign_rules(rules.rules(&table, accept_name), accept_name).comments),
            family,
            table: table_name,
            chain: name,
            tagged: of.tagged,
        });
    }
    found.retain(|c| c.drops || !c.tagged.is_empty() || c.accept_chain.is_some());
    found
}

/// The chains that drop mesh packets and hold no rule of ours, or will not after this pass; without those whose owner
/// has rules for the mesh's networks.
pub(crate) fn unanswered(desired: &Desired, foreign: &[ForeignChain]) -> Vec<ForeignDrop> {
    foreign
        .iter()
        .filter(|c| c.drops && (c.tagged.is_empty() || !desired.forward_accept))
        .filter(|c| !accepts(&c.accepted, &prefixes(desired, &c.family)))
        .map(|c| ForeignDrop {
            family: c.family.clone(),
            table: c.table.clone(),
            chain: c.chain.clone(),
            owner: c.owner,
            remedy: remedy(desired, c),
        })
        .collect()
}

/// Whether there is a rule for each of these, as a packet's source and as its destination.
fn accepts(accepted: &AcceptedPrefixes, networks: &[IpNet]) -> bool {
    let all = |by: &[IpNet]| networks.iter().all(|net| by.iter().any(|prefix| prefix.contains(net)));
    all(&accepted.sources) && all(&accepted.destinations)
}

/// The changes of foreign tables whose chains at the forward hook are `observed`.
pub(super) fn plan(
    options: &Options,
    desired: &Desired,
    observed: &[ForeignChain],
    failures: &mut Vec<Failure>,
) -> Vec<ForeignEdit> {
    let mut edits = Vec::new();
    let mut tables: BTreeMap<(&str, &str), Vec<&ForeignChain>> = BTreeMap::new();
    for chain in observed {
        tables.entry((&chain.family, &chain.table)).or_default().push(chain);
    }
    for ((family, table), chains) in tables {
        let prefixes = prefixes(desired, family);
        let accept = desired.forward_accept && !prefixes.is_empty() && chains.iter().any(|c| c.drops);
        if !is_identifier(table) || chains.iter().any(|c| !is_identifier(&c.chain)) {
            if accept {
                failures.push(Failure::new(format!("table {family} {table:?}"), FailureCause::ForeignName));
            }
            continue;
        }
        let transaction = if accept {
            accepting(options, (family, table), &prefixes, &chains)
        } else {
            withdrawing(options, (family, table), &chains)
        };
        if !transaction.is_empty() {
            edits.push(ForeignEdit { family: family.to_owned(), table: table.to_owned(), accept, transaction });
        }
    }
    edits
}

fn accepting(
    options: &Options,
    (family, table): (&str, &str),
    prefixes: &[IpNet],
    chains: &[&ForeignChain],
) -> NftTransaction {
    let mut transaction = NftTransaction::default();
    let (name, tag) = (accept_chain(options), &options.table_name);
    let place = format!("{family} {table}");
    let wanted: Vec<(&str, &IpNet)> =
        prefixes.iter().flat_map(|prefix| [("saddr", prefix), ("daddr", prefix)]).collect();
    let comment = |(direction, prefix): &(&str, &IpNet)| format!("{tag} {direction} {prefix}");
    let seen = chains.first().and_then(|c| c.accept_chain.as_ref());
    let same = seen.is_some_and(|seen| {
        seen.len() == wanted.len()
            && seen.iter().zip(&wanted).all(|(seen, wanted)| seen.as_ref() == Some(&comment(wanted)))
    });
    if !same {
        transaction.push(format!("add chain {place} {name}"));
        transaction.push(format!("flush chain {place} {name}"));
        for rule in &wanted {
            let (direction, prefix) = rule;
            let ip = if matches!(prefix, IpNet::V4(_)) { "ip" } else { "ip6" };
            transaction.push(format!(
                "add rule {place} {name} {ip} {direction} {prefix} accept comment \"{}\"",
                comment(rule)
            ));
        }
    }
    for chain in chains {
        let keep = usize::from(chain.drops);
        for handle in chain.tagged.iter().skip(keep) {
            transaction.push(format!("delete rule {place} {} handle {handle}", chain.chain));
        }
        if chain.drops && chain.tagged.is_empty() {
            transaction.push(format!("insert rule {place} {} jump {name} comment \"{tag}\"", chain.chain));
        }
    }
    transaction
}

/// Takes the tagged rules and the chain that they jump to out of one table.
pub(crate) fn withdrawing(
    options: &Options,
    (family, table): (&str, &str),
    chains: &[&ForeignChain],
) -> NftTransaction {
    let mut transaction = NftTransaction::default();
    for chain in chains {
        for handle in &chain.tagged {
            transaction.push(format!("delete rule {family} {table} {} handle {handle}", chain.chain));
        }
    }
    if chains.iter().any(|c| c.accept_chain.is_some()) {
        let name = accept_chain(options);
        transaction.push(format!("flush chain {family} {table} {name}"));
        transaction.push(format!("delete chain {family} {table} {name}"));
    }
    transaction
}

/// The mesh's prefixes that packets in a table of `family` can have.
fn prefixes(desired: &Desired, family: &str) -> Vec<IpNet> {
    let mut all = BTreeSet::new();
    for ipv4 in [true, false] {
        if family == "inet" || (family == "ip") == ipv4 {
            for element in NftSet::prefixes(ipv4, &desired.firewall.networks).elements {
                if let Element::Prefix(prefix) = element {
                    all.insert(prefix);
                }
            }
        }
    }
    all.into_iter().collect()
}

/// The program that has made `table`, known by its name or by the chains that it jumps to.
pub fn owner(table: &str, jumps: &[String]) -> Option<FirewallProgram> {
    let jumps_to = |start: &str| jumps.iter().any(|j| j.starts_with(start));
    if table == "firewalld" {
        Some(FirewallProgram::Firewalld)
    } else if jumps_to("ufw-") || jumps_to("ufw6-") {
        Some(FirewallProgram::Ufw)
    } else if jumps_to("DOCKER") || table == "docker-bridges" {
        Some(FirewallProgram::Docker)
    } else {
        None
    }
}

/// The commands that let the mesh's packets through, in the words of whose chain it is.
fn remedy(desired: &Desired, chain: &ForeignChain) -> String {
    let ForeignChain { family, table, chain: name, owner, .. } = chain;
    let (quoted_table, name) = (quote(table), quote(name));
    let for_each = |commands: &dyn Fn(&IpNet) -> String| {
        prefixes(desired, family).iter().map(commands).collect::<Vec<_>>().join(" && ")
    };
    let commands = match owner {
        // The chain that Docker leaves to its users.
        Some(FirewallProgram::Docker) if table == "filter" => {
            let tool = if family == "ip6" { "ip6tables" } else { "iptables" };
            for_each(&|net| {
                format!("{tool} -I DOCKER-USER -s {net} -j ACCEPT && {tool} -I DOCKER-USER -d {net} -j ACCEPT")
            })
        }
        Some(FirewallProgram::Firewalld) => {
            let sources = for_each(&|net| format!("firewall-cmd --permanent --zone=trusted --add-source={net}"));
            format!("{sources} && firewall-cmd --reload")
        }
        Some(FirewallProgram::Ufw) => {
            for_each(&|net| format!("ufw route allow from {net} && ufw route allow to {net}"))
        }
        Some(FirewallProgram::Docker) | None if table == "filter" && family != "inet" => {
            let tool = if family == "ip6" { "ip6tables" } else { "iptables" };
            for_each(&|net| format!("{tool} -I {name} -s {net} -j ACCEPT && {tool} -I {name} -d {net} -j ACCEPT"))
        }
        Some(FirewallProgram::Docker) | None => for_each(&|net| {
            let ip = if matches!(net, IpNet::V4(_)) { "ip" } else { "ip6" };
            let rule = format!("nft insert rule {family} {quoted_table} {name} {ip}");
            format!("{rule} saddr {net} accept && {rule} daddr {net} accept")
        }),
    };
    format!("{commands} # or start meshd with --forward-accept, which keeps such a rule in each of these chains")
}
