//! What keeps packets from getting through, as far as the daemon can tell. Blocking: for a thread that may wait.

use std::{thread, time::SystemTime};

use ipnet::IpNet;
use tokio::runtime::Handle;

use super::published::{Carrier, Published};
use crate::{
    api::{Diagnosis, Finding, LayerKind, Path, Peer, Severity, Source as _},
    control::session::Dialer,
    doctor::{input, routes},
    echo::Echo,
    mesh::{
        address::overlap,
        plan::OVERHEAD,
        snapshot::{Owner, Snapshot},
    },
    tunnel::OffloadState,
};

/// Nodes that are asked for an echo; of a larger mesh, those that are known not to be reached come first.
const ECHOED: usize = 64;
/// Of those that give none, as many are asked layer by layer: they tell enough.
const ASKED: usize = 8;
/// What the allocator's transaction and the watch's progress need.
const OLDEST_ETCD: (u64, u64) = (3, 4);

impl Published {
    /// Looks at everything that the daemon knows of, and asks etcd and those peers that are not reached.
    pub(super) fn diagnose(&self) -> Diagnosis {
        let mut findings: Vec<Finding> = self
            .status()
            .problems
            .into_iter()
            .map(|problem| {
                let severity = if is_harmless(&problem.code) { Severity::Warning } else { Severity::Error };
                Finding::new(severity, &problem.code, problem.cause, problem.remedy)
            })
            .collect();
        let peers = self.peers_by_owner();
        self.unreached(&peers, &mut findings);
        let (underlay, networks, own, ours, mtu, snapshot) = {
            let in_force = self.lock();
            let ours: Vec<IpNet> = in_force.plan.iter().flat_map(|plan| plan.kernel.routes.keys().copied()).collect();
            (
                in_force.underlay.clone(),
                in_force.snapshot.networks().collect::<Vec<_>>(),
                in_force.snapshot.own_prefixes().collect::<Vec<_>>(),
                ours,
                in_force.plan.as_ref().map(|plan| plan.mtu),
                in_force.snapshot.clone(),
            )
        };
        if let Some(mtu) = mtu {
            narrow_paths(&peers, mtu, &self.etcd.prefix, &mut findings);
            narrow_interfaces(&underlay, mtu, &mut findings);
        }
        translated(&peers, &snapshot, &mut findings);
        foreign_routes(&networks, &own, &ours, &self.identity.interface, &mut findings);
        findings.extend(input::findings(self.tunnel.listen_port()));
        for (name, state) in self.tunnel.offloads().iter().filter(|(_, state)| *state != OffloadState::On) {
            findings.push(Finding::new(
                Severity::Note,
                "offload_off",
                format!("the tunnel goes without {name} ({}): it is slower", state.name()),
                match state {
                    OffloadState::SetOff => {
                        format!(
                            "sed -i '/^{}/d' /etc/meshd/meshd.toml && systemctl restart meshd",
                            name.replace('_', "-")
                        )
                    }
                    OffloadState::Refused => format!(
                        "journalctl -u meshd | grep {name} # what the kernel said; it is tried again after a restart"
                    ),
                    _ => "uname -r # Linux has UDP_SEGMENT from 4.18, UDP_GRO from 5.0, UDP over TUN whole from 6.2"
                        .to_owned(),
                },
            ));
        }
        self.clock(&mut findings);
        let etcd = self.etcd(&mut findings);
        findings.sort_by_key(|finding| finding.severity);
        Diagnosis {
            interface: self.identity.interface.clone(),
            underlay: underlay.into_iter().map(|carrier| carrier.name).collect(),
            listen_port: self.tunnel.listen_port(),
            etcd,
            findings,
        }
    }

    /// Nodes that answer no echo, each with the outermost layer that does not let packets pass.
    fn unreached(&self, peers: &[(String, Peer)], findings: &mut Vec<Finding>) {
        let snapshot = self.lock().snapshot.clone();
        let overlay = |owner: &String| {
            let member = snapshot.members.get(&Owner::named(owner)?)?;
            member.overlay().next()
        };
        // Those first that are known not to be reached.
        let mut asked: Vec<_> = peers.iter().filter_map(|(owner, peer)| Some((peer, overlay(owner)?))).collect();
        asked.sort_by_key(|(peer, _)| peer.path != Path::Unreachable);
        let silent: Vec<&Peer> = thread::scope(|scope| {
            let threads: Vec<_> = asked
                .iter()
                .take(ECHOED)
                .map(|(peer, address)| scope.spawn(move || Echo::to(*address).ask().is_err().then_some(*peer)))
                .collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()?).collect()
        });
        let asked: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = silent
                .iter()
                .take(ASKED)
                .map(|peer| scope.spawn(move || (*peer, Self::reach(self, &peer.name))))
                .collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        for (peer, reached) in asked {
            let Ok(reached) = reached else { continue };
            let Some(layer) = reached.layers.iter().find(|layer| layer.passes != Some(true)) else { continue };
            let code = if layer.layer == LayerKind::Udp { "udp_not_through" } else { "peer_not_reached" };
            let cause = format!("{}, at {} {}: {}", peer.name, layer.layer.name(), layer.address, layer.text);
            findings.push(Finding::new(Severity::Error, code, cause, layer.remedy.clone()));
        }
    }

    /// WireGuard refuses handshakes whose time stamp is not newer than the last.
    fn clock(&self, findings: &mut Vec<Finding>) {
        let newest = std::fs::read_dir(self.state_dir.join("cache")).into_iter().flatten().flatten();
        let newest = newest.filter_map(|entry| entry.metadata().ok()?.modified().ok()).max();
        let ahead = newest.and_then(|newest| newest.duration_since(SystemTime::now()).ok());
        if let Some(ahead) = ahead.filter(|ahead| ahead.as_secs() > 60) {
            findings.push(Finding::new(
                Severity::Error,
                "clock_went_back",
                format!(
                    "the clock is {} s behind what it was when this node last wrote its state: peers refuse its handshakes \
                     until it has caught up",
                    ahead.as_secs()
                ),
                "timedatectl set-ntp true # if the clock was ahead before, meshctl node remove this node and let it join anew",
            ));
        }
    }

    /// Versions of the members that answer; the others are findings.
    fn etcd(&self, findings: &mut Vec<Finding>) -> Vec<String> {
        let Ok(dialer) = Dialer::new(&self.etcd) else { return Vec::new() };
        let mut versions = Vec::new();
        for member in dialer.members() {
            let asked = Handle::current().block_on(async {
                let session = dialer.open(member, 0).await.map_err(|error| error.to_string())?;
                session.version().await.map_err(|error| error.to_string())
            });
            match asked {
                Ok(version) => {
                    if release(&version).is_some_and(|release| release < OLDEST_ETCD) {
                        findings.push(Finding::new(
                            Severity::Error,
                            "etcd_too_old",
                            format!("etcd at {member} is {version}; 3.4 is the oldest that works"),
                            "apt-get install etcd-server # on one member after the other; https://etcd.io/docs/v3.4/upgrades",
                        ));
                    }
                    versions.push(format!("{member} {version}"));
                }
                Err(error) => findings.push(Finding::new(
                    Severity::Warning,
                    "etcd_member_unreachable",
                    format!("etcd at {member} does not answer: {error}"),
                    format!(
                        "systemctl start etcd # on that machine; etcdctl --endpoints {member} endpoint health tells when it is \
                         back. If it is gone for good: take it out of etcd-endpoints"
                    ),
                )),
            }
        }
        versions
    }
}

/// Whether packets go as they should all the same.
fn is_harmless(code: &str) -> bool {
    matches!(code, "offload_refused" | "flows_not_reported" | "etcd_unreachable")
        || code.starts_with("uapi_")
        || code.starts_with("metrics_")
}

fn narrow_paths(peers: &[(String, Peer)], mtu: u16, prefix: &str, findings: &mut Vec<Finding>) {
    for (_, peer) in peers {
        let Some(carried) = peer.mtu.filter(|carried| *carried < mtu && peer.path == Path::Wireguard) else { continue };
        findings.push(Finding::new(
            Severity::Warning,
            "path_mtu",
            format!("the path to {} carries packets of {carried} bytes inside the tunnel, not {mtu}", peer.name),
            format!(
                "config=$(etcdctl get {prefix}/config --print-value-only | jq -e '.Backend.MTU = {carried}') && etcdctl put \
                 {prefix}/config \"$config\" # or raise the MTU on the way: meshctl ping {} --size finds what passes",
                peer.name
            ),
        ));
    }
}

fn narrow_interfaces(underlay: &[Carrier], mtu: u16, findings: &mut Vec<Finding>) {
    for Carrier { name, mtu: link } in underlay {
        if u32::from(mtu) + u32::from(OVERHEAD) > *link {
            findings.push(Finding::new(
                Severity::Error,
                "mtu_beyond_interface",
                format!(
                    "the mesh's MTU is {mtu}; with the tunnel's {OVERHEAD} bytes that is more than {name}'s {link}"
                ),
                format!(
                    "ip link set {name} mtu {} # or a smaller Backend.MTU in config",
                    u32::from(mtu) + u32::from(OVERHEAD)
                ),
            ));
        }
    }
}

/// Peers that are heard from where their records do not say they are.
fn translated(peers: &[(String, Peer)], snapshot: &Snapshot, findings: &mut Vec<Finding>) {
    for (owner, peer) in peers {
        let Some(member) = Owner::named(owner).and_then(|owner| snapshot.members.get(&owner)) else { continue };
        let (Some(at), Some(_)) = (peer.endpoint, peer.latest_handshake) else { continue };
        if !member.endpoints.contains(&at) {
            let recorded: Vec<String> = member.endpoints.iter().map(ToString::to_string).collect();
            let recorded = if recorded.is_empty() { "none".to_owned() } else { recorded.join(", ") };
            findings.push(Finding::new(
                Severity::Note,
                "nat_in_the_way",
                format!("{} is heard from {at}; its record says {recorded}: a NAT translates it", peer.name),
                format!(
                    "echo 'endpoint = \"none\"' >> /etc/meshd/meshd.toml && systemctl restart meshd # on {}: it works while it \
                     calls, and so it keeps the NAT open. Or forward a UDP port to it and name that as its endpoint",
                    peer.name
                ),
            ));
        }
    }
}

/// Routes of others that take packets for the mesh elsewhere.
fn foreign_routes(networks: &[IpNet], own: &[IpNet], ours: &[IpNet], tun: &str, findings: &mut Vec<Finding>) {
    for route in routes::main_table() {
        let inside = networks.iter().any(|net| net.contains(&route.net));
        let known = route.device == tun || ours.contains(&route.net) || own.iter().any(|own| overlap(own, &route.net));
        if inside && !known && route.device != "lo" {
            findings.push(Finding::new(
                Severity::Error,
                "foreign_route",
                format!(
                    "{} goes to {}, by a route that is not the mesh's, inside its network",
                    route.net, route.device
                ),
                format!("ip route delete {} dev {}", route.net, route.device),
            ));
        }
    }
}

fn release(version: &str) -> Option<(u64, u64)> {
    let mut parts = version.split('.').map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read() {
        assert_eq!(release("3.4.23"), Some((3, 4)));
        assert!(release("3.3.9").unwrap() < OLDEST_ETCD);
        assert_eq!(release("x"), None);
    }
}
