//! Other people's firewalls: chains that would drop forwarded mesh packets, and the one rule that answers them.
//!
//! An `accept` of ours cannot undo a drop in another table, so what Docker, firewalld or ufw drop at the forward hook
//! stays dropped until their own chain accepts it. The answer is one rule at the top of that chain, which jumps to a
//! chain of ours in the same table. Its rules are plain prefix matches, one each: `iptables-save` can print those and
//! read them back, which is not so for sets.

mod legacy;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ipnet::IpNet;

use super::Options;
use super::change::Change;
use super::desired::Desired;
use super::failure::{Failure, Problem};
use super::nft::{Accepted, Element, Nft, RulesetError, Set, Transaction, is_identifier};
use super::nft::{parse_accepted, parse_chains, parse_foreign_chain};
use super::observed::Observed;
use super::plan::Plan;
pub(crate) use legacy::{has_filter_table, legacy};

/// A chain at the forward hook in another table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignChain {
    /// `ip`, `ip6` or `inet`.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// It drops what none of its rules takes.
    pub drops: bool,
    /// Whose it is, where that can be told.
    pub owner: Option<Owner>,
    /// Handles of rules in it that lead to our accept chain.
    pub tagged: Vec<u64>,
    /// What its table lets through by rules of its owner's.
    pub(crate) accepted: Accepted,
    /// The comments of our accept chain's rules in the same table, if that chain is there.
    pub accept_chain: Option<Vec<Option<String>>>,
}

/// Programs that are known to drop forwarded packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Owner {
    /// Docker's engine sets the policy of FORWARD to DROP.
    Docker,
    /// firewalld rejects what no zone or policy allows.
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
    /// Whose it is, where that can be told.
    pub owner: Option<Owner>,
    /// What to do.
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
    pub transaction: Transaction,
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

impl fmt::Display for Owner {
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

/// Reads all chains at the forward hook outside our tables.
pub(crate) async fn observe(options: &Options, nft: &Nft) -> Result<Vec<ForeignChain>, RulesetError> {
    let Some(json) = nft.list(&["list", "chains"]).await? else {
        return Ok(Vec::new());
    };
    let (forward, all) = parse_chains(&json)?;
    let accept_name = accept_chain(options);
    let mut accepts: BTreeMap<(String, String), Option<Vec<Option<String>>>> = BTreeMap::new();
    let mut found = Vec::new();
    let policies = super::policy_table(&options.table_name);
    for chain in forward {
        let ours = (chain.family == "inet" && chain.table == options.table_name) || chain.table == policies;
        if ours || !matches!(chain.family.as_str(), "ip" | "ip6" | "inet") {
            continue;
        }
        let place = (chain.family.clone(), chain.table.clone());
        if !accepts.contains_key(&place) {
            let there = all.contains(&(place.0.clone(), place.1.clone(), accept_name.clone()));
            let comments = match there {
                true => nft
                    .list(&["list", "chain", &place.0, &place.1, &accept_name])
                    .await?
                    .map(|json| parse_foreign_chain(&json, &accept_name))
                    .transpose()?
                    .map(|rules| rules.comments),
                false => None,
            };
            accepts.insert(place.clone(), comments);
        }
        let args = ["list", "chain", &chain.family, &chain.table, &chain.name];
        // Gone since the listing: nothing to answer.
        let Some(json) = nft.list(&args).await? else {
            continue;
        };
        let rules = parse_foreign_chain(&json, &accept_name)?;
        let drops = chain.policy_drop || rules.ends_in_drop;
        let accepted = match drops && rules.tagged.is_empty() {
            true => nft
                .list(&["list", "table", &chain.family, &chain.table])
                .await?
                .map(|json| parse_accepted(&json, &accept_name))
                .transpose()?,
            false => None,
        };
        found.push(ForeignChain {
            drops,
            accepted: accepted.unwrap_or_default(),
            owner: owner(&chain.table, &rules.jumps),
            family: chain.family,
            table: chain.table,
            chain: chain.name,
            tagged: rules.tagged,
            accept_chain: accepts.get(&place).cloned().flatten(),
        });
    }
    found.retain(|c| c.drops || !c.tagged.is_empty() || c.accept_chain.is_some());
    Ok(found)
}

/// The chains that drop mesh packets and hold no rule of ours, or will not after this pass; without those whose owner has
/// rules for the mesh's networks.
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
fn accepts(accepted: &Accepted, networks: &[IpNet]) -> bool {
    let all = |by: &[IpNet]| networks.iter().all(|net| by.iter().any(|prefix| prefix.contains(net)));
    all(&accepted.sources) && all(&accepted.destinations)
}

/// Adds the edits that bring foreign tables to what is desired.
pub(super) fn plan(options: &Options, desired: &Desired, observed: &Observed, plan: &mut Plan) {
    let mut tables: BTreeMap<(&str, &str), Vec<&ForeignChain>> = BTreeMap::new();
    for chain in &observed.foreign {
        tables.entry((&chain.family, &chain.table)).or_default().push(chain);
    }
    for ((family, table), chains) in tables {
        let prefixes = prefixes(desired, family);
        let accept = desired.forward_accept && !prefixes.is_empty() && chains.iter().any(|c| c.drops);
        if !is_identifier(table) || chains.iter().any(|c| !is_identifier(&c.chain)) {
            if accept {
                plan.failures.push(Failure::new(format!("table {family} {table:?}"), Problem::ForeignName));
            }
            continue;
        }
        let transaction = if accept {
            accepting(options, (family, table), &prefixes, &chains)
        } else {
            withdrawing(options, (family, table), &chains)
        };
        if !transaction.is_empty() {
            plan.changes.push(Change::Foreign(ForeignEdit {
                family: family.to_owned(),
                table: table.to_owned(),
                accept,
                transaction,
            }));
        }
    }
}

fn accepting(
    options: &Options,
    (family, table): (&str, &str),
    prefixes: &[IpNet],
    chains: &[&ForeignChain],
) -> Transaction {
    let mut transaction = Transaction::default();
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
pub(crate) fn withdrawing(options: &Options, (family, table): (&str, &str), chains: &[&ForeignChain]) -> Transaction {
    let mut transaction = Transaction::default();
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
            for element in Set::prefixes(ipv4, &desired.firewall.networks).elements {
                if let Element::Prefix(prefix) = element {
                    all.insert(prefix);
                }
            }
        }
    }
    all.into_iter().collect()
}

pub(crate) fn owner(table: &str, jumps: &[String]) -> Option<Owner> {
    let jumps_to = |start: &str| jumps.iter().any(|j| j.starts_with(start));
    if table == "firewalld" {
        Some(Owner::Firewalld)
    } else if jumps_to("ufw-") || jumps_to("ufw6-") {
        Some(Owner::Ufw)
    } else if jumps_to("DOCKER") || table == "docker-bridges" {
        Some(Owner::Docker)
    } else {
        None
    }
}

/// The commands that let the mesh's packets through, in the words of whose chain it is.
fn remedy(desired: &Desired, chain: &ForeignChain) -> String {
    let ForeignChain { family, table, chain: name, owner, .. } = chain;
    let for_each = |commands: &dyn Fn(&IpNet) -> String| {
        prefixes(desired, family).iter().map(commands).collect::<Vec<_>>().join(" && ")
    };
    let commands = match owner {
        // The chain that Docker leaves to its users.
        Some(Owner::Docker) if table == "filter" => {
            let tool = if family == "ip6" { "ip6tables" } else { "iptables" };
            for_each(&|net| {
                format!("{tool} -I DOCKER-USER -s {net} -j ACCEPT && {tool} -I DOCKER-USER -d {net} -j ACCEPT")
            })
        }
        Some(Owner::Firewalld) => {
            let sources = for_each(&|net| format!("firewall-cmd --permanent --zone=trusted --add-source={net}"));
            format!("{sources} && firewall-cmd --reload")
        }
        Some(Owner::Ufw) => for_each(&|net| format!("ufw route allow from {net} && ufw route allow to {net}")),
        Some(Owner::Docker) | None if table == "filter" && family != "inet" => {
            let tool = if family == "ip6" { "ip6tables" } else { "iptables" };
            for_each(&|net| format!("{tool} -I {name} -s {net} -j ACCEPT && {tool} -I {name} -d {net} -j ACCEPT"))
        }
        Some(Owner::Docker) | None => for_each(&|net| {
            let ip = if matches!(net, IpNet::V4(_)) { "ip" } else { "ip6" };
            let rule = format!("nft insert rule {family} {table} {name} {ip}");
            format!("{rule} saddr {net} accept && {rule} daddr {net} accept")
        }),
    };
    format!("{commands} # or start meshd with --forward-accept, which keeps such a rule in every such chain")
}
