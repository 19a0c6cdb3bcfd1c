//! `RUN/subnet.env` in Flannel's format, for CNI plugins and scripts.

use std::{fmt::Write as _, io, net::IpAddr, path::Path};

use ipnet::IpNet;

/// Longest file that is read.
const MAX_FILE: u64 = 1 << 16;

/// The file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The networks of the mesh. Flannel's plugin takes several of a family, separated by commas.
    pub networks: Vec<IpNet>,
    /// This node's subnets, at most one of each family.
    pub subnets: Vec<IpNet>,
    /// MTU of pods.
    pub mtu: u16,
    /// The daemon masquerades traffic out of the mesh, so plugins need not.
    pub ip_masq: bool,
}

impl SubnetEnv {
    /// The text. A subnet is written by its first usable address, that of a bridge: `10.244.3.1/24`.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{name}={value}");
        };
        let of = |nets: &[IpNet], v4: bool| nets.iter().find(|net| net.addr().is_ipv4() == v4).copied();
        for (v4, infix) in [(true, ""), (false, "IPV6_")] {
            let subnet = of(&self.subnets, v4);
            let mut networks: Vec<&IpNet> = self.networks.iter().filter(|net| net.addr().is_ipv4() == v4).collect();
            // This node's own first: scripts may read no further.
            networks.sort_by_key(|net| !subnet.is_some_and(|subnet| net.contains(&subnet)));
            if !networks.is_empty() {
                let networks: Vec<String> = networks.iter().map(ToString::to_string).collect();
                line(&format!("FLANNEL_{infix}NETWORK"), networks.join(","));
            }
            if let Some(subnet) = subnet {
                line(&format!("FLANNEL_{infix}SUBNET"), format!("{}/{}", bridge_address(&subnet), subnet.prefix_len()));
            }
        }
        line("FLANNEL_MTU", self.mtu.to_string());
        line("FLANNEL_IPMASQ", self.ip_masq.to_string());
        text
    }

    /// Writes the file atomically, unless its content is the same.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let text = self.text();
        if atomic_file::read(path, MAX_FILE).is_ok_and(|now| now == text.as_bytes()) {
            return Ok(());
        }
        // Plugins and scripts of any user source it.
        atomic_file::write(path, 0o644, text.as_bytes())
    }
}

/// This node's subnets in the file at `path`, at most one of each family; none where there is no such file. Lines that
/// do not hold a subnet are passed over.
///
/// # Errors
/// When it is there and cannot be read, or is no ordinary file: root reads it, and another user owns its directory.
pub(crate) fn read_subnets(path: &Path) -> io::Result<Vec<IpNet>> {
    let bytes = match atomic_file::read(path, MAX_FILE) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        bytes => bytes?,
    };
    let text = String::from_utf8_lossy(&bytes);
    let value = |line: &str| {
        let (name, value) = line.split_once('=')?;
        let net: IpNet = value.trim().parse().ok()?;
        matches!(name, "FLANNEL_SUBNET" | "FLANNEL_IPV6_SUBNET").then(|| net.trunc())
    };
    Ok(text.lines().filter_map(value).collect())
}

/// The address after the first: the one a bridge takes.
fn bridge_address(subnet: &IpNet) -> IpAddr {
    match subnet {
        IpNet::V4(net) => IpAddr::V4(net.network().to_bits().saturating_add(1).into()),
        IpNet::V6(net) => IpAddr::V6(net.network().to_bits().saturating_add(1).into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn example() -> SubnetEnv {
        SubnetEnv {
            networks: vec!["10.244.0.0/16".parse().unwrap(), "fd42:244::/48".parse().unwrap()],
            subnets: vec!["10.244.3.0/24".parse().unwrap(), "fd42:244:0:3::/64".parse().unwrap()],
            mtu: 1420,
            ip_masq: true,
        }
    }

    #[test]
    fn looks_as_flannels_does() {
        assert_eq!(
            example().text(),
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_IPV6_NETWORK=fd42:244::/48\n\
             FLANNEL_IPV6_SUBNET=fd42:244:0:3::1/64\nFLANNEL_MTU=1420\nFLANNEL_IPMASQ=true\n"
        );
    }

    #[test]
    fn the_networks_of_all_clusters_are_there_and_the_own_first() {
        let networks =
            ["10.42.0.0/16", "10.244.0.0/16", "10.99.0.0/16", "fd42:42::/48"].map(|net| net.parse().unwrap());
        let env = SubnetEnv { networks: networks.into(), subnets: vec!["10.244.3.0/24".parse().unwrap()], ..example() };
        let text = env.text();
        let lines: Vec<&str> = text.lines().filter(|line| line.contains("NETWORK")).collect();
        assert_eq!(
            lines,
            ["FLANNEL_NETWORK=10.244.0.0/16,10.42.0.0/16,10.99.0.0/16", "FLANNEL_IPV6_NETWORK=fd42:42::/48"]
        );
    }

    #[test]
    fn its_subnets_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("subnet.env");
        assert_eq!(read_subnets(&path).unwrap(), []);
        example().write(&path).unwrap();
        assert_eq!(read_subnets(&path).unwrap(), example().subnets);
        fs::write(&path, "FLANNEL_SUBNET=\nnonsense\nFLANNEL_IPV6_SUBNET=fd42::1/64\n").unwrap();
        assert_eq!(read_subnets(&path).unwrap(), ["fd42::/64".parse().unwrap()]);
        assert!(read_subnets(dir.path()).is_err());
    }

    #[test]
    fn a_link_in_its_place_is_not_read_and_is_replaced() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (path, target) = (dir.path().join("subnet.env"), outside.path().join("target"));
        example().write(&target).unwrap();
        std::os::unix::fs::symlink(&target, &path).unwrap();
        assert!(read_subnets(&path).is_err());
        example().write(&path).unwrap();
        assert_eq!(read_subnets(&path).unwrap(), example().subnets);
        assert!(path.symlink_metadata().unwrap().is_file());
    }

    #[test]
    fn is_not_written_again_when_nothing_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("subnet.env");
        example().write(&path).unwrap();
        let before = fs::metadata(&path).unwrap();
        example().write(&path).unwrap();
        let after = fs::metadata(&path).unwrap();
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!((before.ino(), before.mtime_nsec()), (after.ino(), after.mtime_nsec()));
    }
}
