//! `RUN/subnet.env`: which subnet the node's pods get their addresses from, in the form that Flannel's daemon writes.

use std::{num::NonZeroU16, str::FromStr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Longest text that is read, in bytes; the file has a few lines.
const MAX_BYTES: usize = 64 * 1024;
/// Longest piece of a value that is repeated in an error, in characters.
const MAX_FOUND: usize = 64;

/// Content of `subnet.env`. At least one family has a subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubnetEnv {
    /// `FLANNEL_NETWORK` and `FLANNEL_SUBNET`
    pub ipv4: Option<Family<Ipv4Net>>,
    /// `FLANNEL_IPV6_NETWORK` and `FLANNEL_IPV6_SUBNET`
    pub ipv6: Option<Family<Ipv6Net>>,
    /// `FLANNEL_MTU`, of pod interfaces.
    pub mtu: NonZeroU16,
    /// `FLANNEL_IPMASQ`: the daemon masquerades what leaves the mesh, so the plugin need not.
    pub ip_masq: bool,
}

/// One family's part of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family<N> {
    /// The network of the whole cluster, without host bits.
    pub network: N,
    /// This node's subnet with the address that its bridge has, `10.244.3.1/24`: host bits are kept.
    pub subnet: N,
}

/// Why `subnet.env` cannot be used. The daemon replaces the file as a whole, so a wrong one is not a half-written one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubnetEnvError {
    /// The text is longer than any such file.
    #[error("subnet.env has {0} bytes, at most {MAX_BYTES} are read")]
    TooLong(usize),
    /// A line is no assignment.
    #[error("subnet.env line {line} is {found:?}: must be NAME=VALUE")]
    NoAssignment {
        /// Counted from 1.
        line: usize,
        /// The line, shortened.
        found: String,
    },
    /// A variable stands twice.
    #[error("subnet.env line {line} sets {name} again")]
    Repeated {
        /// Counted from 1.
        line: usize,
        /// The variable.
        name: &'static str,
    },
    /// No family has a subnet.
    #[error("subnet.env sets neither {SUBNET} nor {IPV6_SUBNET}: the node has no subnet for pods yet")]
    NoSubnet,
    /// A variable is missing that another one or the plugin needs.
    #[error("subnet.env does not set {name}, which {needed_by}")]
    Missing {
        /// The variable.
        name: &'static str,
        /// Why it is needed.
        needed_by: &'static str,
    },
    /// A variable's value is not of its form.
    #[error("subnet.env sets {name} to {found:?}: must be {expected}")]
    Malformed {
        /// The variable.
        name: &'static str,
        /// The value, shortened.
        found: String,
        /// What must hold.
        expected: &'static str,
    },
    /// The node's subnet is not part of the cluster network.
    #[error("subnet.env sets {name} to {subnet}, which does not lie in the network {network}")]
    Outside {
        /// The variable of the subnet.
        name: &'static str,
        /// The subnet.
        subnet: IpNet,
        /// The network.
        network: IpNet,
    },
}

const NETWORK: &str = "FLANNEL_NETWORK";
const SUBNET: &str = "FLANNEL_SUBNET";
const IPV6_NETWORK: &str = "FLANNEL_IPV6_NETWORK";
const IPV6_SUBNET: &str = "FLANNEL_IPV6_SUBNET";
const MTU: &str = "FLANNEL_MTU";
const IPMASQ: &str = "FLANNEL_IPMASQ";
const NAMES: [&str; 6] = [NETWORK, SUBNET, IPV6_NETWORK, IPV6_SUBNET, MTU, IPMASQ];

impl SubnetEnv {
    /// Reads the content of the file. Empty lines, comments (`#`) and variables of other names are skipped; an empty
    /// value counts as not set.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn parse(text: &str) -> Result<Self, SubnetEnvError> {
        let variables = Variables::read(text)?;
        let ipv4: Option<Family<Ipv4Net>> = variables.family(
            (NETWORK, "an IPv4 prefix such as 10.244.0.0/16"),
            (SUBNET, "an IPv4 address with prefix length such as 10.244.3.1/24"),
        )?;
        let ipv6: Option<Family<Ipv6Net>> = variables.family(
            (IPV6_NETWORK, "an IPv6 prefix such as fd42:244::/48"),
            (IPV6_SUBNET, "an IPv6 address with prefix length such as fd42:244:0:3::1/64"),
        )?;
        if ipv4.is_none() && ipv6.is_none() {
            return Err(SubnetEnvError::NoSubnet);
        }
        let mtu = variables.required(MTU, "pod interfaces need", "a whole number from 1 to 65535")?;
        let ip_masq = variables.required(IPMASQ, "says who masquerades", "true or false")?;
        Ok(Self { ipv4, ipv6, mtu, ip_masq })
    }
}

/// A prefix of either family.
trait Prefix: Copy + FromStr + Into<IpNet> {}
impl Prefix for Ipv4Net {}
impl Prefix for Ipv6Net {}

/// The variables of a file, in the order of [`NAMES`].
struct Variables<'t>([Option<&'t str>; NAMES.len()]);

impl<'t> Variables<'t> {
    fn read(text: &'t str) -> Result<Self, SubnetEnvError> {
        if text.len() > MAX_BYTES {
            return Err(SubnetEnvError::TooLong(text.len()));
        }
        let mut values = [None; NAMES.len()];
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let Some((name, value)) = line.split_once('=') else {
                return Err(SubnetEnvError::NoAssignment { line: i + 1, found: shortened(line) });
            };
            let Some(at) = NAMES.iter().position(|known| *known == name.trim_end()) else {
                continue;
            };
            if values[at].replace(value.trim()).is_some() {
                return Err(SubnetEnvError::Repeated { line: i + 1, name: NAMES[at] });
            }
        }
        Ok(Self(values))
    }

    fn get(&self, name: &'static str) -> Option<&'t str> {
        let at = NAMES.iter().position(|known| *known == name)?;
        self.0[at].filter(|value| !value.is_empty())
    }

    fn parsed<T: FromStr>(&self, name: &'static str, expected: &'static str) -> Result<Option<T>, SubnetEnvError> {
        self.get(name)
            .map(|value| {
                value.parse().map_err(|_| SubnetEnvError::Malformed { name, found: shortened(value), expected })
            })
            .transpose()
    }

    fn required<T: FromStr>(
        &self,
        name: &'static str,
        needed_by: &'static str,
        expected: &'static str,
    ) -> Result<T, SubnetEnvError> {
        self.parsed(name, expected)?.ok_or(SubnetEnvError::Missing { name, needed_by })
    }

    fn family<N: Prefix>(
        &self,
        (network_name, network_form): (&'static str, &'static str),
        (subnet_name, subnet_form): (&'static str, &'static str),
    ) -> Result<Option<Family<N>>, SubnetEnvError> {
        let network: Option<N> = self.parsed(network_name, network_form)?;
        let subnet: Option<N> = self.parsed(subnet_name, subnet_form)?;
        let (network, subnet) = match (network, subnet) {
            (Some(network), Some(subnet)) => (network, subnet),
            (None, None) => return Ok(None),
            (None, Some(_)) => {
                return Err(SubnetEnvError::Missing { name: network_name, needed_by: "its subnet belongs to" });
            }
            (Some(_), None) => {
                return Err(SubnetEnvError::Missing { name: subnet_name, needed_by: "pods get their addresses from" });
            }
        };
        let (whole, part): (IpNet, IpNet) = (network.into(), subnet.into());
        if whole != whole.trunc() || whole.prefix_len() == 0 {
            return Err(SubnetEnvError::Malformed {
                name: network_name,
                found: whole.to_string(),
                expected: network_form,
            });
        }
        if !whole.contains(&part) {
            return Err(SubnetEnvError::Outside { name: subnet_name, subnet: part, network: whole });
        }
        Ok(Some(Family { network, subnet }))
    }
}

fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(MAX_FOUND).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUAL: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\n\
        FLANNEL_IPV6_NETWORK=fd42:244::/48\nFLANNEL_IPV6_SUBNET=fd42:244:0:3::1/64\n\
        FLANNEL_MTU=1420\nFLANNEL_IPMASQ=true\n";

    /// `DUAL` without the lines that begin with one of `names`, then `more`.
    fn changed(names: &[&str], more: &str) -> String {
        let kept = DUAL.lines().filter(|l| !names.iter().any(|n| l.starts_with(&format!("{n}="))));
        kept.chain([more]).collect::<Vec<_>>().join("\n")
    }

    fn refusal(text: &str) -> String {
        SubnetEnv::parse(text).expect_err("must be refused").to_string()
    }

    #[test]
    fn both_families() {
        let env = SubnetEnv::parse(DUAL).unwrap();
        let v4 = env.ipv4.unwrap();
        assert_eq!(v4.network, "10.244.0.0/16".parse().unwrap());
        assert_eq!(v4.subnet.addr().to_string(), "10.244.3.1");
        assert_eq!(env.ipv6.unwrap().subnet, "fd42:244:0:3::1/64".parse().unwrap());
        assert_eq!((env.mtu.get(), env.ip_masq), (1420, true));
    }

    #[test]
    fn one_family_alone() {
        let v4 = SubnetEnv::parse(&changed(&[IPV6_NETWORK, IPV6_SUBNET], "")).unwrap();
        assert!(v4.ipv4.is_some() && v4.ipv6.is_none());
        let v6 = SubnetEnv::parse(&changed(&[NETWORK, SUBNET], "")).unwrap();
        assert!(v6.ipv4.is_none() && v6.ipv6.is_some());
        // Flannel's own daemon has written families that it does not have as empty.
        let empty =
            SubnetEnv::parse(&changed(&[IPV6_NETWORK, IPV6_SUBNET], "FLANNEL_IPV6_NETWORK=\nFLANNEL_IPV6_SUBNET="));
        assert_eq!(empty.unwrap(), v4);
    }

    #[test]
    fn what_is_not_ours_is_skipped() {
        let text = format!("# made by meshd\r\n\r\nOTHER=x y z\n{}", DUAL.replace('\n', "\r\n"));
        assert_eq!(SubnetEnv::parse(&text), SubnetEnv::parse(DUAL));
    }

    #[test]
    fn each_refusal_names_the_variable() {
        let cases = [
            (String::new(), "sets neither FLANNEL_SUBNET nor FLANNEL_IPV6_SUBNET"),
            (changed(&[MTU], ""), "does not set FLANNEL_MTU"),
            (changed(&[IPMASQ], ""), "does not set FLANNEL_IPMASQ"),
            (changed(&[NETWORK], ""), "does not set FLANNEL_NETWORK"),
            (changed(&[IPV6_SUBNET], ""), "does not set FLANNEL_IPV6_SUBNET"),
            (changed(&[MTU], "FLANNEL_MTU=0"), "FLANNEL_MTU to \"0\": must be a whole number"),
            (changed(&[MTU], "FLANNEL_MTU=65536"), "FLANNEL_MTU to \"65536\""),
            (changed(&[IPMASQ], "FLANNEL_IPMASQ=yes"), "FLANNEL_IPMASQ to \"yes\": must be true or false"),
            (changed(&[SUBNET], "FLANNEL_SUBNET=10.244.3.1"), "FLANNEL_SUBNET to \"10.244.3.1\""),
            (changed(&[SUBNET], "FLANNEL_SUBNET=fd00::1/64"), "FLANNEL_SUBNET to \"fd00::1/64\""),
            (changed(&[SUBNET], "FLANNEL_SUBNET=10.9.3.1/24"), "does not lie in the network 10.244.0.0/16"),
            (changed(&[SUBNET], "FLANNEL_SUBNET=10.0.0.1/8"), "does not lie in the network 10.244.0.0/16"),
            (changed(&[NETWORK], "FLANNEL_NETWORK=10.244.3.0/16"), "FLANNEL_NETWORK to \"10.244.3.0/16\""),
            (changed(&[NETWORK], "FLANNEL_NETWORK=0.0.0.0/0"), "FLANNEL_NETWORK to \"0.0.0.0/0\""),
            (changed(&[], "FLANNEL_MTU=1400"), "line 7 sets FLANNEL_MTU again"),
            (changed(&[], "export"), "line 7 is \"export\": must be NAME=VALUE"),
            ("x".repeat(MAX_BYTES + 1), "has 65537 bytes"),
        ];
        for (text, expected) in cases {
            let found = refusal(&text);
            assert!(found.contains(expected), "{found:?} does not say {expected:?}");
        }
    }

    #[test]
    fn a_long_value_is_shortened() {
        let found = refusal(&changed(&[MTU], &format!("FLANNEL_MTU={}", "9".repeat(10_000))));
        assert!(found.len() < 300, "{found}");
    }
}
