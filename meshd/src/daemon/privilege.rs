//! Checks privileges up front, before a command fails halfway.

use std::fs;

use anyhow::bail;

/// A capability and its number (linux/capability.h).
type Capability = (&'static str, u32);

pub(super) const NET_ADMIN: Capability = ("CAP_NET_ADMIN", 12);
pub(super) const NET_RAW: Capability = ("CAP_NET_RAW", 13);

/// Fails where one of these is missing, with how to have it.
pub(super) fn demand(command: &str, wanted: &[Capability]) -> anyhow::Result<()> {
    // Without /proc, the failing operation reports the missing privilege.
    let Ok(status) = fs::read_to_string("/proc/self/status") else { return Ok(()) };
    let missing = missing(&status, wanted);
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "meshd {command} needs {}, which this user lacks: run it as root (sudo meshd {command}) or as a service \
         (systemctl start meshd)",
        missing.join(" and ")
    )
}

fn missing(status: &str, wanted: &[Capability]) -> Vec<&'static str> {
    let effective = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    let Some(effective) = effective else { return Vec::new() };
    wanted.iter().filter(|(_, number)| effective & 1 << number == 0).map(|(name, _)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let missing =
            |effective: &str| missing(&format!("Name:\tmeshd\nCapEff:\t{effective}\n"), &[NET_ADMIN, NET_RAW]);
        assert_eq!(missing("0000000000003000"), [""; 0]);
        assert_eq!(missing("0000000000001000"), ["CAP_NET_RAW"]);
        assert_eq!(missing("0000000000000000"), ["CAP_NET_ADMIN", "CAP_NET_RAW"]);
    }
}
