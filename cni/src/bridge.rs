//! Bridges on the node: created for the first container, removed after the last one.
//!
//! A lock in the run directory makes joining and removal mutually exclusive; it ends with its holder. Without it, a
//! bridge could be removed between an ADD's check and its join.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use atomic_file::{FileError, Folder};
use ipnet::IpNet;
use netlink::{Link, Mac, Netlink, NetlinkError};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

use crate::{
    daemon::Network,
    environment::AttachmentName,
    error::{CniError, Code},
    link::{forward, mac, quiet},
    namespace::sysctl,
};

/// Name of the lock in the run directory.
const LOCK: &str = "bridges.lock";
/// How long the lock is waited for. Whoever has it makes a few system calls.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts to get it.
const PAUSE: Duration = Duration::from_millis(2);

/// Makes the interface `port` a port of the bridge `name`, which is made, and given the first address of each subnet,
/// when it is not there, and sets both up.
///
/// # Errors
/// [`Code::InvalidConfig`] when `name` is something else; [`Code::TryAgainLater`]; the kernel's error.
pub fn join(netlink: &mut Netlink, run_dir: &Path, name: &str, network: &Network, port: u32) -> Result<(), CniError> {
    let _lock = lock(run_dir)?;
    match netlink.create_bridge(name, own_mac(name), u32::from(network.mtu)) {
        Err(error) if error.is(Errno::EEXIST) => {}
        made => made?,
    }
    let bridge = netlink.link(name)?.ok_or_else(|| {
        CniError::new(
            Code::Kernel,
            format!(
                "bridge {name} was removed \
                 meanwhile"
            ),
        )
    })?;
    if !bridge.is_bridge {
        return Err(CniError::new(Code::InvalidConfig, format!("{name} is not a bridge")));
    }
    if bridge.learns_from_link_local {
        netlink.stop_link_local_learning(bridge.index)?;
    }
    quiet(name)?;
    for subnet in &network.subnets {
        if subnet.addr().is_ipv6() {
            sysctl(&format!("ipv6/conf/{name}/disable_ipv6"), "0")?;
        } else {
            forward(name)?;
        }
        netlink.add_address(bridge.index, address(subnet))?;
    }
    if !bridge.up {
        netlink.set_up(bridge.index)?;
    }
    netlink.set_port(port, bridge.index)?;
    Ok(netlink.set_up(port)?)
}

/// Removes bridges that [`join`] has made and that nothing is a port of, or only the one called `name`. Returns their
/// names.
///
/// # Errors
/// [`Code::TryAgainLater`]; the kernel's error.
pub fn remove_idle(netlink: &mut Netlink, run_dir: &Path, name: Option<&str>) -> Result<Vec<String>, CniError> {
    let wanted = |bridge: &Link| name.is_none_or(|name| bridge.name == name);
    let exists = match name {
        Some(name) => netlink.link(name)?.is_some(),
        None => true,
    };
    if !exists || !idle(netlink)?.iter().any(wanted) {
        return Ok(Vec::new());
    }
    let _lock = lock(run_dir)?;
    let mut removed = Vec::new();
    for bridge in idle(netlink)?.into_iter().filter(wanted) {
        if netlink.delete(&bridge.name)? {
            removed.push(bridge.name);
        }
    }
    Ok(removed)
}

/// The first usable address of a subnet, with its prefix: the bridge's own.
#[must_use]
pub fn address(subnet: &IpNet) -> IpNet {
    let first = match subnet.network() {
        IpAddr::V4(ip) => IpAddr::from(Ipv4Addr::from(u32::from(ip).saturating_add(1))),
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip).saturating_add(1)).into(),
    };
    IpNet::new(first, subnet.prefix_len()).unwrap_or_else(|_| IpNet::from(first))
}

/// Bridges that bear the hardware address that theirs would have here, with no port and nothing stacked on them.
fn idle(netlink: &mut Netlink) -> Result<Vec<Link>, NetlinkError> {
    let links = netlink.links()?;
    let used = |bridge: &Link| {
        links.iter().any(|link| {
            link.master == Some(bridge.index) || (!link.is_veth && link.peer == Some(bridge.index) && link != bridge)
        })
    };
    let is_own = |link: &&Link| link.is_bridge && link.mac == Some(own_mac(&link.name)) && !used(link);
    Ok(links.iter().filter(is_own).cloned().collect())
}

fn own_mac(name: &str) -> Mac {
    mac(&AttachmentName { container_id: name.to_owned(), ifname: "bridge".to_owned() }, 0)
}

/// `None`: there is no run directory, so no other command can join.
fn lock(run_dir: &Path) -> Result<Option<Flock<File>>, CniError> {
    let path = run_dir.join(LOCK);
    let failed = |error: FileError| CniError::new(Code::Io, format!("{}: {error}", path.display()));
    let folder = match Folder::open(run_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        folder => folder.map_err(|error| failed(error.into()))?,
    };
    // Root may have created it, and the daemon be another user: a lock needs no right to write.
    let mut file = folder.open_or_create(LOCK, 0o644).map_err(failed)?;
    let end = Instant::now() + PATIENCE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((same, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < end => {
                file = same;
                thread::sleep(PAUSE);
            }
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(CniError::new(
                    Code::TryAgainLater,
                    format!("{} is locked by another process; try again", path.display()),
                ));
            }
            Err((_, errno)) => return Err(failed(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use netlink::VethEnd;
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn the_lock_is_no_link() {
        let (outside, run) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(outside.path().join("new"), run.path().join(LOCK)).unwrap();
        let error = lock(run.path()).unwrap_err().to_string();
        assert!(error.contains("is a symbolic link"), "{error}");
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        assert!(lock(&run.path().join("none")).unwrap().is_none());
    }

    #[test]
    fn a_bridge_is_removed_behind_its_last_port_and_others_never_are() {
        let thread = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
            let here = File::open("/proc/thread-self/ns/net").unwrap();
            let run = tempfile::tempdir().unwrap();
            let network = Network {
                networks: vec!["10.244.0.0/16".parse().unwrap()],
                subnets: vec!["10.244.3.0/24".parse().unwrap(), "fd42:244:0:3::/64".parse().unwrap()],
                overlay: Vec::new(),
                mtu: 1420,
            };
            let mut netlink = Netlink::open().unwrap();
            netlink.create_bridge("other0", [2, 0, 0, 0, 0, 1], 1500).unwrap();
            let ends = |n| {
                [
                    VethEnd { name: ["a0", "a1"][n], mac: [2, 0, 0, 0, 1, n as u8] },
                    VethEnd { name: ["b0", "b1"][n], mac: [2, 0, 0, 0, 2, n as u8] },
                ]
            };
            for n in 0..2 {
                let [host, inside] = ends(n);
                netlink.create_veth(host, inside, here.as_fd(), 1420).unwrap();
                let port = netlink.link(host.name).unwrap().unwrap().index;
                join(&mut netlink, run.path(), "meshbr0", &network, port).unwrap();
            }
            let bridge = netlink.link("meshbr0").unwrap().unwrap();
            let addresses = netlink.addresses(bridge.index).unwrap();
            assert!(network.subnets.iter().all(|subnet| addresses.contains(&address(subnet))), "{addresses:?}");
            // A port could claim another's hardware address by frames that no rule sees.
            assert!(!bridge.learns_from_link_local);
            assert!(netlink.link("other0").unwrap().unwrap().learns_from_link_local);
            for n in 0..2 {
                assert_eq!(remove_idle(&mut netlink, run.path(), Some("meshbr0")).unwrap(), [""; 0]);
                assert!(netlink.delete(ends(n)[0].name).unwrap());
            }
            assert_eq!(remove_idle(&mut netlink, run.path(), Some("other0")).unwrap(), [""; 0]);
            assert_eq!(remove_idle(&mut netlink, run.path(), Some("none")).unwrap(), [""; 0]);
            assert_eq!(remove_idle(&mut netlink, run.path(), None).unwrap(), ["meshbr0"]);
            assert_eq!(remove_idle(&mut netlink, run.path(), None).unwrap(), [""; 0]);
            assert!(netlink.link("other0").unwrap().is_some());
        });
        thread.join().unwrap();
    }
}
