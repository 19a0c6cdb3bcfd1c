//! Interface names that are safe to print into a ruleset and to resolve under `/proc/sys`.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// The name of a network interface: 1 to 15 printable ASCII bytes, without `/`, `"`, `\`, `*` or white space, and
/// neither `.` nor `..`.
///
/// The kernel allows a little more. Refused are patterns and escapes in nftables rules, and names of other files below
/// `/proc/sys/net`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InterfaceName(String);

/// Why a text is not an interface name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not a valid interface name: 1 to 15 printable ASCII characters without / \" \\ * or spaces")]
pub struct InvalidInterfaceName(String);

impl InterfaceName {
    /// The longest name the kernel takes (`IFNAMSIZ` less the closing zero).
    pub(crate) const MAX_LEN: usize = 15;

    /// Checks `name`.
    ///
    /// # Errors
    /// [`InvalidInterfaceName`] with the text as given.
    pub fn new(name: &str) -> Result<Self, InvalidInterfaceName> {
        let sound = (1..=Self::MAX_LEN).contains(&name.len())
            && name != "."
            && name != ".."
            && name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b'"' | b'\\' | b'*'));
        if sound { Ok(Self(name.to_owned())) } else { Err(InvalidInterfaceName(name.chars().take(64).collect())) }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = InvalidInterfaceName;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::new(s)
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_can_stand_in_a_rule_and_in_a_path() {
        for good in ["eth0", "meshd0", "enp3s0f1.100", "veth-1_2@x", "abcdefghijklmno"] {
            assert_eq!(InterfaceName::new(good).unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "a\"b", "a b", "a\\", "eth*", "é", "abcdefghijklmnop", "a\n"] {
            assert!(InterfaceName::new(bad).is_err(), "{bad:?}");
        }
    }
}
