//! Names, each with its own type and limits.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{Violations, violation::quoted};

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $check:ident, $expected:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Box<str>);

        impl $name {
            /// The rule for the text, for messages.
            pub(crate) const EXPECTED: &'static str = $expected;

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The name that `text` is.
            ///
            /// # Errors
            /// The violated rule.
            pub fn read(text: &str) -> Result<Self, crate::fields::Expected> {
                if $check(text) {
                    Ok(Self(text.into()))
                } else {
                    Err(Self::EXPECTED.into())
                }
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = Violations;
            fn from_str(text: &str) -> Result<Self, Violations> {
                Self::read(text).map_err(|expected| Violations::one("", quoted(text), expected))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }
    };
}

name_type! {
    /// Stable identity of a node: `[a-z0-9]([-a-z0-9]*[a-z0-9])?`, at most 63 characters.
    NodeId, is_label,
    "must be 1 to 63 of a-z, 0-9 and \"-\", beginning and ending with a letter or digit"
}
name_type! {
    /// Name of a node, unique in the mesh: a DNS subdomain (RFC 1123), at most 253 characters.
    NodeName, is_subdomain,
    "must be a DNS name (RFC 1123): labels of 1 to 63 of a-z, 0-9 and \"-\" with dots between, at most 253 in all"
}
name_type! {
    /// Name of a site: a DNS label, at most 63 characters.
    SiteName, is_label,
    "must be 1 to 63 of a-z, 0-9 and \"-\", beginning and ending with a letter or digit"
}
name_type! {
    /// Name of an external peer: a DNS label.
    PeerName, is_label,
    "must be 1 to 63 of a-z, 0-9 and \"-\", beginning and ending with a letter or digit"
}
name_type! {
    /// Name of a Kubernetes object: a DNS subdomain.
    KubernetesName, is_subdomain,
    "must be a DNS name (RFC 1123): labels of 1 to 63 of a-z, 0-9 and \"-\" with dots between, at most 253 in all"
}
name_type! {
    /// A container's id as the CNI specification allows it: a letter or digit, then letters, digits, `_`, `.`, `-`;
    /// at most 253 characters.
    ContainerId, is_container_id,
    "must be 1 to 253 of letters, digits, \"_\", \".\" and \"-\", beginning with a letter or digit"
}
name_type! {
    /// Name of an attached pod: a Kubernetes name, or the container's id if the runtime supplied no name; each has the
    /// form of a [`ContainerId`].
    PodName, is_container_id,
    "must be 1 to 253 of letters, digits, \"_\", \".\" and \"-\", beginning with a letter or digit"
}
name_type! {
    /// A Linux interface name: 1 to 15 printable ASCII characters without `/` and `:`, neither `.` nor `..`.
    InterfaceName, is_interface_name,
    "must be 1 to 15 printable characters without \"/\", \":\" and spaces, neither \".\" nor \"..\""
}

impl KubernetesName {
    /// Parses a namespace name, one DNS label, or returns the rule.
    pub(crate) fn read_label(text: &str) -> Result<Self, crate::fields::Expected> {
        if is_label(text) { Ok(Self(text.into())) } else { Err(NodeId::EXPECTED.into()) }
    }
}

/// A DNS label in lower case (RFC 1123).
pub(crate) fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let word = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| word(b) || *b == b'-')
        && bytes.first().is_some_and(word)
        && bytes.last().is_some_and(word)
}

fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

fn is_container_id(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() <= 253
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

fn is_interface_name(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':')
        && text != "."
        && text != ".."
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepts<T: FromStr>(text: &str) -> bool {
        text.parse::<T>().is_ok()
    }

    #[test]
    fn labels() {
        let longest = "a".repeat(63);
        for good in ["a", "0", "a-b", "a--b", &longest] {
            assert!(accepts::<NodeId>(good) && accepts::<SiteName>(good), "{good}");
        }
        let long = "a".repeat(64);
        for bad in ["", "-", "-a", "a-", "A", "a.b", "a_b", "a b", "ä", "a\0", "a/b", "..", &long] {
            assert!(!accepts::<NodeId>(bad) && !accepts::<PeerName>(bad), "{bad}");
        }
    }

    #[test]
    fn subdomains() {
        let longest = format!("{0}.{0}.{0}.{1}", "a".repeat(63), "a".repeat(61));
        assert_eq!(longest.len(), 253);
        for good in ["a", "a.b", "1.2.3.4", &longest] {
            assert!(accepts::<KubernetesName>(good) && accepts::<NodeName>(good), "{good}");
        }
        let long = format!("{longest}a");
        for bad in ["", ".", "a.", ".a", "a..b", "a.-b", "A.b", &long] {
            assert!(!accepts::<KubernetesName>(bad) && !accepts::<NodeName>(bad), "{bad}");
        }
    }

    #[test]
    fn interfaces_and_containers() {
        for good in ["eth0", "a", "veth-1.2@x", "fifteen-chars-x", "..."] {
            assert!(accepts::<InterfaceName>(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "a\tb", "sixteen-chars-xy", "\u{7f}", "é"] {
            assert!(!accepts::<InterfaceName>(bad), "{bad}");
        }
        let longest = "A".repeat(253);
        for good in ["a", "0", "A_b.c-", &longest] {
            assert!(accepts::<ContainerId>(good) && accepts::<PodName>(good), "{good}");
        }
        for bad in ["", "_a", ".a", "-a", "a/b", "a b", &format!("{longest}A")] {
            assert!(!accepts::<ContainerId>(bad) && !accepts::<PodName>(bad), "{bad}");
        }
    }

    #[test]
    fn names_are_text_in_json() {
        let id: NodeId = serde_json::from_str("\"a1\"").unwrap();
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"a1\"");
        let said = serde_json::from_str::<NodeId>("\"A1\"").unwrap_err().to_string();
        assert!(said.contains("\"A1\"") && said.contains("must be 1 to 63"), "{said}");
    }
}
