//! Escapes untrusted text: many users write keys and values into etcd, and a terminal interprets control characters and
//! reorders text around bidirectional ones.
//!
//! Three places print such text: `meshctl`'s `output`, the log, and the labels of metrics. Each escapes all text, so
//! renderers need not.

use std::borrow::Cow;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// `text` as one line: control, format, private and unassigned characters, line breaks and spaces other than U+0020 are
/// escaped as Rust writes them (`\n`, `\u{202e}`).
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, is_printable, |c, out| out.extend(c.escape_default()))
}

/// As [`printable`], of a text that consists of lines.
#[must_use]
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c == '\n' || is_printable(c), |c, out| out.extend(c.escape_default()))
}

/// The same JSON, with characters that must not reach a terminal escaped like `\u202e`. JSON itself requires that below
/// U+0020 only.
#[must_use]
pub fn printable_json(json: &str) -> Cow<'_, str> {
    escaped(
        json,
        |c| c == '\n' || is_printable(c),
        |c, out| {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        },
    )
}

/// `value` with each of its strings, and the keys of its maps, [`printable`].
///
/// # Errors
/// When the type does not come back from its own JSON.
pub fn printable_strings<T: Serialize + DeserializeOwned>(value: &T) -> serde_json::Result<T> {
    let mut json = serde_json::to_value(value)?;
    escape_strings(&mut json);
    serde_json::from_value(json)
}

fn escape_strings(json: &mut Value) {
    match json {
        Value::String(text) => {
            if let Cow::Owned(escaped) = printable(text) {
                *text = escaped;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(escape_strings),
        Value::Object(fields) => {
            let escaped = std::mem::take(fields).into_iter().map(|(name, mut value)| {
                escape_strings(&mut value);
                (printable(&name).into_owned(), value)
            });
            *fields = escaped.collect();
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn escaped(text: &str, passes: impl Fn(char) -> bool, escape: impl Fn(char, &mut String)) -> Cow<'_, str> {
    if text.chars().all(&passes) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if passes(c) { out.push(c) } else { escape(c, &mut out) }
    }
    Cow::Owned(out)
}

/// Whether a character shows as itself. The standard library's tables know; it escapes quotes and backslashes beside.
fn is_printable(c: char) -> bool {
    c == ' ' || c.is_ascii_graphic() || (!c.is_ascii() && c.escape_debug().count() == 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Written out beside the tables that are tested.
    fn is_dangerous(c: char) -> bool {
        c.is_control()
            || matches!(
                c,
                '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
                    | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}'
            )
    }

    #[test]
    fn what_a_terminal_acts_on_is_escaped_and_the_rest_is_left() {
        let hostile = "a\x1b[31m\r\n\u{202e}b\u{9b}2J\u{7f}";
        assert_eq!(printable(hostile), r"a\u{1b}[31m\r\n\u{202e}b\u{9b}2J\u{7f}");
        assert_eq!(printable_json(hostile), "a\\u001b[31m\\u000d\n\\u202eb\\u009b2J\\u007f");
        for plain in ["", r#"it's a "plain" \ text"#, "Zürich, 東京 ✓"] {
            assert!(matches!(printable(plain), Cow::Borrowed(same) if same == plain), "{plain}");
        }
    }

    proptest! {
        #[test]
        fn nothing_dangerous_is_left_and_json_keeps_its_meaning(text in any::<String>()) {
            prop_assert!(!printable(&text).contains(is_dangerous));
            prop_assert!(!printable_lines(&text).contains(|c| c != '\n' && is_dangerous(c)));
            let json = serde_json::to_string(&text).unwrap();
            let shown = printable_json(&json);
            prop_assert!(!shown.contains(is_dangerous));
            prop_assert_eq!(serde_json::from_str::<String>(&shown).unwrap(), text);
        }
    }
}
