//! Converts iptables rules, as `iptables-save` prints them, into the form of nftables listings. An nftables listing
//! lacks the arguments of iptables' own matches, and does not show the legacy tables (`iptables-legacy`).

use serde_json::{Value, json};

/// The chains and rules of `table` in the output of `iptables-save` or `ip6tables-save`; `family`: `ip` or `ip6`. The
/// table gets the name `called`.
pub(super) fn items(save: &str, family: &str, table: &str, called: &str) -> Vec<Value> {
    let mut items = Vec::new();
    let of_table = save.lines().skip_while(|line| line.strip_prefix('*') != Some(table)).skip(1);
    let lines: Vec<&str> = of_table.take_while(|line| *line != "COMMIT").collect();
    let chains: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix(':')?.split(' ').next()).collect();
    for line in &lines {
        if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split(' ');
            let (name, policy) = (words.next().unwrap_or_default(), words.next().unwrap_or("-"));
            let mut chain = json!({"family": family, "table": called, "name": name});
            if policy != "-" {
                chain["hook"] = name.to_lowercase().into();
                let kind = if table == "nat" { "nat" } else { "filter" };
                chain["type"] = kind.into();
                chain["policy"] = policy.to_lowercase().into();
                chain["prio"] = priority(table).into();
            }
            items.push(json!({"chain": chain}));
        } else if let Some(rule) = rule(line, family, &chains) {
            let (chain, expressions) = rule;
            items.push(json!({"rule": {"family": family, "table": called, "chain": chain, "expr": expressions}}));
        }
    }
    items
}

/// Where iptables has the chains of a table; those of nat are at two places, of which the one behind routing is read.
fn priority(table: &str) -> i32 {
    match table {
        "raw" => -300,
        "mangle" => -150,
        "nat" => 100,
        _ => 0,
    }
}

/// A line `-A CHAIN …`: the chain, and the rule's expressions.
fn rule(line: &str, family: &str, chains: &[&str]) -> Option<(String, Vec<Value>)> {
    let words = super::legacy::words(line);
    let mut words = words.iter().map(String::as_str).peekable();
    let chain = words.next().filter(|word| *word == "-A").and_then(|_| words.next())?.to_owned();
    let mut expressions = Vec::new();
    let mut negated = false;
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_default();
        let left_right = match word {
            "!" => {
                negated = true;
                continue;
            }
            "-m" | "--comment" => {
                value();
                continue;
            }
            "-j" | "-g" => {
                let name = value();
                expressions.push(match name {
                    "MARK" => mark_set(words.next(), words.next()),
                    _ => target(name, word == "-g", chains),
                });
                break;
            }
            "-s" => Some((payload(family, "saddr"), prefix(value()))),
            "-d" => Some((payload(family, "daddr"), prefix(value()))),
            "-i" => Some((meta("iifname"), interface(value()))),
            "-o" => Some((meta("oifname"), interface(value()))),
            "-p" => Some((meta("l4proto"), value().into())),
            "--src-type" => Some((fib("saddr"), set(value()))),
            "--dst-type" => Some((fib("daddr"), set(value()))),
            "--ctstate" => Some((json!({"ct": {"key": "state"}}), set(value()))),
            "--dport" => Some((json!({"payload": {"protocol": "th", "field": "dport"}}), ports(value()))),
            "--mark" => marked(value()),
            _ => None,
        };
        expressions.push(match left_right {
            Some((left, right)) => {
                let op = if negated { "!=" } else { "==" };
                json!({"match": {"op": op, "left": left, "right": right}})
            }
            None => {
                // Something that cannot be read, with its arguments.
                while words.next_if(|word| !word.starts_with('-') && *word != "!").is_some() {}
                json!({"xt": {"type": "match", "name": word}})
            }
        });
        negated = false;
    }
    Some((chain, expressions))
}

fn payload(family: &str, field: &str) -> Value {
    json!({"payload": {"protocol": family, "field": field}})
}

fn meta(key: &str) -> Value {
    json!({"meta": {"key": key}})
}

fn fib(end: &str) -> Value {
    json!({"fib": {"result": "type", "flags": [end]}})
}

fn prefix(text: &str) -> Value {
    match text.split_once('/').and_then(|(address, length)| Some((address, length.parse::<u8>().ok()?))) {
        Some((address, length)) => json!({"prefix": {"addr": address, "len": length}}),
        None => text.into(),
    }
}

fn interface(text: &str) -> Value {
    text.strip_suffix('+').map_or_else(|| text.into(), |start| format!("{start}*").into())
}

fn set(text: &str) -> Value {
    json!({"set": text.split(',').map(str::to_lowercase).collect::<Vec<_>>()})
}

fn ports(text: &str) -> Value {
    let number = |text: &str| text.parse::<u64>().map_or(Value::Null, Value::from);
    match text.split_once(':') {
        Some((from, to)) => json!({"range": [number(from), number(to)]}),
        None => number(text),
    }
}

/// `0x4000/0x4000`, or a mark alone.
fn marked(text: &str) -> Option<(Value, Value)> {
    Some(match text.split_once('/') {
        Some((mark, mask)) => (json!({"&": [meta("mark"), number(mask)?]}), number(mark)?.into()),
        None => (meta("mark"), number(text)?.into()),
    })
}

/// The target MARK, whose arguments iptables always saves as `--set-xmark VALUE/MASK`.
fn mark_set(option: Option<&str>, argument: Option<&str>) -> Value {
    let value = argument.filter(|_| option == Some("--set-xmark")).and_then(|text| {
        let (mark, mask) = text.split_once('/')?;
        Some(json!({"^": [{"&": [meta("mark"), !number(mask)? & u64::from(u32::MAX)]}, number(mark)?]}))
    });
    match value {
        Some(value) => json!({"mangle": {"key": meta("mark"), "value": value}}),
        None => json!({"xt": {"type": "target", "name": "MARK"}}),
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn target(name: &str, goes: bool, chains: &[&str]) -> Value {
    match name {
        "ACCEPT" | "DROP" | "REJECT" | "RETURN" => json!({(name.to_lowercase()): null}),
        _ if chains.contains(&name) && goes => json!({"goto": {"target": name}}),
        _ if chains.contains(&name) => json!({"jump": {"target": name}}),
        _ => json!({"xt": {"type": "target", "name": name}}),
    }
}
