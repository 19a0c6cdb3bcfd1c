//! Commands for operators to paste: each inserted value is quoted as a single word of the shell.

use std::borrow::Cow;

/// `text` as one word for a POSIX shell. A text of harmless characters stays as it is, any other is put in quotes; one
/// that does not print is written `$'\033'` (POSIX.1-2024, bash, zsh, ksh, busybox). A shell without that, such as
/// dash, takes it for other text, and still for one word: no quote or expansion is left in it.
#[must_use]
pub fn quote(text: &str) -> Cow<'_, str> {
    let is_harmless = |b: u8| b.is_ascii_alphanumeric() || b"/:.,-_+@%".contains(&b);
    if !text.is_empty() && text.bytes().all(is_harmless) {
        return Cow::Borrowed(text);
    }
    if text.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) {
        return Cow::Owned(format!("'{}'", text.replace('\'', r"'\''")));
    }
    let mut out = "$'".to_owned();
    for b in text.bytes() {
        if is_harmless(b) {
            out.push(char::from(b));
        } else {
            out.push_str(&format!("\\{b:03o}"));
        }
    }
    out.push('\'');
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use proptest::prelude::*;

    use super::*;

    /// The words that a shell makes of a line.
    fn words(shell: &str, line: &str) -> Vec<Vec<u8>> {
        let line = format!("printf '%s\\0' {line}");
        let output = Command::new(shell).args(["-c", &line]).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        let mut words: Vec<_> = output.stdout.split(|b| *b == 0).map(<[u8]>::to_vec).collect();
        words.pop();
        words
    }

    #[test]
    fn what_is_quoted_is_one_word_that_runs_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let made = folder.path().join("x");
        let touch = format!("touch {}", made.display());
        for hostile in [
            format!("$({touch})"),
            format!("`{touch}`"),
            format!("'; {touch}; '"),
            format!("a\n{touch}\n"),
            format!("\x1b'$({touch})'"),
            format!("\x1b\\'$({touch})\\'"),
            format!("\u{202e}\"$({touch})\""),
            format!("& {touch} # * ~ !! {{a,b}}"),
            String::new(),
        ] {
            let line = quote(&hostile).into_owned();
            assert_eq!(words("sh", &line).len(), 1, "{line}");
            assert_eq!(words("bash", &line), [hostile.as_bytes()], "{line}");
            assert!(!fs::exists(&made).unwrap(), "{line}");
        }
        assert_eq!(quote("/meshd/subnets/10.244.1.0-24"), "/meshd/subnets/10.244.1.0-24");
        assert_eq!(quote("it's"), r"'it'\''s'");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_shell_reads_back_what_was_quoted(text in "[^\0]{0,40}") {
            let line = quote(&text).into_owned();
            prop_assert_eq!(words("bash", &line), [text.as_bytes().to_vec()]);
            prop_assert_eq!(words("sh", &line).len(), 1);
            prop_assert_eq!(crate::printable::printable(&line), line.as_str());
        }
    }
}
