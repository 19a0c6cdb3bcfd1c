//! Values that mean harm, or come from a program gone wild: each is refused by itself, with a short reason, without
//! reading further than the limit that it breaks.

use etcd_schema::{CheckError, MAX_VALUE_BYTES, check};

const KEY: &str = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";

/// What `check` has against the value, which must be something.
fn refusal(key: &str, value: impl AsRef<[u8]>) -> String {
    let said = match check(key, value.as_ref()) {
        Err(CheckError::Value(violations)) => violations.to_string(),
        Err(CheckError::Key(e)) => e.to_string(),
        Ok(checked) => panic!("{key} was accepted: {}", checked.summary),
    };
    assert!(said.len() < 8000, "{} bytes: {}", said.len(), &said[..800]);
    said
}

/// A million prefixes, then something that is no JSON or YAML at all. The reason is the length, so nothing beyond the
/// limit was read: a reader that collects first would have met the rest.
fn endless(prefix: &str, suffix: &str) -> String {
    let mut value = String::from(prefix);
    let mut n = 0_u32;
    while value.len() < MAX_VALUE_BYTES - 100 {
        value.push_str(&format!("\"10.{}.{}.0/24\",", n >> 8 & 255, n & 255));
        n += 1;
    }
    value.push_str(suffix);
    value
}

#[test]
fn a_million_prefixes_are_not_collected() {
    let json = endless(&format!("{{\"publicKey\":\"{KEY}\",\"allowedIPs\":["), "}} no JSON");
    let said = refusal("peers/a", json);
    assert!(said.starts_with("allowedIPs is longer than 4096 entries"), "{said}");

    let yaml = endless(&format!("publicKey: {KEY}\nallowedIPs: ["), "}}}\n\t: [");
    let said = refusal("peers/a", yaml);
    assert!(said.starts_with("allowedIPs is longer than 4096 entries"), "{said}");

    let block = "- 10.0.0.0/24\n".repeat(100_000);
    let said = refusal("peers/a", format!("publicKey: {KEY}\nallowedIPs:\n{block}\n}}}}}}"));
    assert!(said.starts_with("allowedIPs is longer than 4096 entries"), "{said}");
}

#[test]
fn the_longest_allowed_list_is_read() {
    let list: Vec<String> = (0..4096).map(|n| format!("\"10.{}.{}.0/24\"", n >> 8, n & 255)).collect();
    let value = format!("{{\"publicKey\":\"{KEY}\",\"allowedIPs\":[{}]}}", list.join(","));
    assert!(check("peers/a", value.as_bytes()).is_ok());
    let longer = value.replace("[\"10.0.0.0/24\"", "[\"192.168.0.0/24\",\"10.0.0.0/24\"");
    assert!(refusal("peers/a", longer).contains("longer than 4096 entries"));
}

#[test]
fn a_million_fields_are_not_collected() {
    let fields: String = (0..100_000).map(|n| format!("\"f{n}\":1,")).collect();
    for key in ["config", "nodes/a", "subnets/10.0.0.0-24", "alive/a", "removed/a", "endpoints/a/b/c"] {
        let said = refusal(key, format!("{{{fields}"));
        assert!(said.contains("longer than 4096 fields"), "{key}: {said}");
    }
}

#[test]
fn a_tree_of_short_lists_is_bounded_as_a_whole() {
    let lists = format!("[{}]", "1,".repeat(4000).trim_end_matches(','));
    let value = format!("{{\"x\":[{}", format!("{lists},").repeat(50));
    assert!(refusal("config", value).contains("first 16384 fields and entries"));
}

#[test]
fn a_value_longer_than_etcd_takes_is_not_read() {
    let value = format!("{{\"x\":\"{}\"}}", "y".repeat(MAX_VALUE_BYTES));
    assert!(refusal("config", value).contains("at most 1572864 are read"));
}

#[test]
fn values_of_the_largest_size_are_judged() {
    let fill = MAX_VALUE_BYTES - 200;
    let cases = [
        format!("{{\"Network\":\"{}\"}}", "1".repeat(fill)),
        format!("Network: {}", "1".repeat(fill)),
        format!("Network: \"{}", "x".repeat(fill)),
        format!("{{\"{}\":1}}", "k".repeat(fill)),
        "[".repeat(fill),
        "{\"a\":".repeat(fill / 5),
        "- ".repeat(fill / 2),
        "? ".repeat(fill / 2),
        "a: ".repeat(fill / 3),
        "{a: ".repeat(fill / 4),
        "# comment\n".repeat(fill / 10),
        "---\n".repeat(fill / 4),
        "&a ".repeat(fill / 3),
        "!!str ".repeat(fill / 6),
        "%TAG ! tag:x\n".repeat(fill / 13),
        "\"\\u0041\" ".repeat(fill / 9),
        " ".repeat(fill),
        "\n".repeat(fill),
        "a\n".repeat(fill / 2),
        format!("x: |\n{}", "  line\n".repeat(fill / 7)),
        "9".repeat(fill),
        "-".repeat(fill),
        "'".repeat(fill),
        "*a ".repeat(fill / 3),
    ];
    for value in cases {
        refusal("config", value);
    }
}

#[test]
fn yaml_does_not_multiply() {
    let bomb = "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n";
    assert!(refusal("config", bomb).contains("anchor or alias"));
    assert!(refusal("config", "base: {MTU: 1}\n<<: {Network: 10.0.0.0/8}\n").contains("line 2"));
}

#[test]
fn reasons_are_short_whatever_the_value() {
    let long = "z".repeat(100_000);
    let entries: Vec<String> = (0..4000).map(|_| format!("\"{}\"", &long[..300])).collect();
    refusal("peers/a", format!("{{\"publicKey\":\"{long}\",\"allowedIPs\":[{}]}}", entries.join(",")));
    refusal(&format!("nodes/{long}"), "{}");
    refusal(&long, "{}");
    refusal("nodes/a\0b", "{}");
}

#[test]
fn a_repeated_key_is_refused_at_any_depth() {
    for value in [
        r#"{"Network":"10.0.0.0/8","Network":"10.0.0.0/8"}"#,
        r#"{"Network":"10.0.0.0/8","x":{"y":[{"z":1,"z":1}]}}"#,
        "Network: 10.0.0.0/8\nx: {y: [{z: 1, z: 1}]}\n",
        "Network: 10.0.0.0/8\nx:\n  y:\n    - z: 1\n      z: 2\n",
        "Network: 10.0.0.0/8\nx: {1: a, 1: b}\n",
    ] {
        assert!(refusal("config", value).contains("is a duplicate"), "{value}");
    }
}
