//! What keeps packets from getting through, as far as the daemon can tell. Blocking: for a thread that may wait.

use std::{process::Command, thread, time::SystemTime};

use ipnet::IpNet;
use serde_json::Value;
use tokio::runtime::Handle;

use super::published::{Carrier, Published};
use crate::{
    api::{Diagnosis, Finding, LayerKind, Path, Peer, Severity, Source as _},
    control::session::Dialer,
    doctor::routes,
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
            narrow_paths(&peers, mtu, &mut findings);
            narrow_interfaces(&underlay, mtu, &mut findings);
        }
        translated(&peers, &snapshot, &mut findings);
        foreign_routes(&networks, &own, &ours, &self.identity.interface, &mut findings);
        closed_input(self.tunnel.listen_port(), &mut findings);
        for (name, state) in self.tunnel.offloads().iter().filter(|(_, state)| *state != OffloadState::On) {
            findings.push(Finding::new(
                Severity::Note,
                "offload_off",
                format!("the tunnel goes without {name} ({state:?}): it is slower"),
                "a newer kernel may have it; see udp_gso, udp_gro and tun_offload in the settings",
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
                "timedatectl set-ntp true; if the clock was ahead before, meshctl node remove this node and let it join anew",
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
                            "upgrade etcd, one member after the other",
                        ));
                    }
                    versions.push(format!("{member} {version}"));
                }
                Err(error) => findings.push(Finding::new(
                    Severity::Warning,
                    "etcd_member_unreachable",
                    format!("etcd at {member} does not answer: {error}"),
                    format!(
                        "start it (etcdctl --endpoints {member} endpoint health tells when it is back), or take it out of \
                         --etcd-endpoints"
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

fn narrow_paths(peers: &[(String, Peer)], mtu: u16, findings: &mut Vec<Finding>) {
    for (_, peer) in peers {
        let Some(carried) = peer.mtu.filter(|carried| *carried < mtu && peer.path == Path::Wireguard) else { continue };
        findings.push(Finding::new(
            Severity::Warning,
            "path_mtu",
            format!("the path to {} carries packets of {carried} bytes inside the tunnel, not {mtu}", peer.name),
            format!(
                "raise the MTU on the way, or put \"Backend\": {{…, \"MTU\": {carried}}} into config; meshctl ping {} --size \
                 finds what passes",
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
                    "ip link set {name} mtu {}, or a smaller Backend.MTU in config",
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
                "it works while it calls: start it with --endpoint none, which keeps the NAT open; or forward a UDP port to it \
                 and name that with --endpoint",
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

/// Chains at the input hook that drop what no rule takes, where no rule speaks of the tunnel's port.
fn closed_input(port: u16, findings: &mut Vec<Finding>) {
    let listed = Command::new("nft").args(["-j", "-t", "list", "ruleset"]).output();
    let Ok(document) = listed.map_err(drop).and_then(|out| serde_json::from_slice(&out.stdout).map_err(drop)) else {
        return;
    };
    for (table, chain) in chains_without(&document, port) {
        findings.push(Finding::new(
            Severity::Warning,
            "udp_port_may_be_closed",
            format!("chain {chain} of table {table} drops what comes in, and no rule in it speaks of UDP port {port}"),
            format!("nft insert rule {table} {chain} udp dport {{ {port}, {} }} accept", port + 1),
        ));
    }
}

/// `family table` and chain of those at the input hook that drop by policy, where no rule of the table has the port.
fn chains_without(document: &Value, port: u16) -> Vec<(String, String)> {
    let items = || document["nftables"].as_array().into_iter().flatten();
    let table = |item: &Value| {
        format!("{} {}", item["family"].as_str().unwrap_or_default(), item["table"].as_str().unwrap_or_default())
    };
    let text = port.to_string();
    let speaks = |of: &str| {
        items().filter_map(|item| item.get("rule")).filter(|rule| table(rule) == of).any(|rule| {
            let words = rule["expr"].to_string();
            words.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == text)
        })
    };
    items()
        .filter_map(|item| item.get("chain"))
        .filter(|chain| chain["hook"] == "input" && chain["policy"] == "drop")
        .map(|chain| (table(chain), chain["name"].as_str().unwrap_or_default().to_owned()))
        .filter(|(table, _)| !speaks(table))
        .collect()
}

fn release(version: &str) -> Option<(u64, u64)> {
    let mut parts = version.split('.').map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_chain_that_drops_all_but_other_ports_is_named() {
        let chain = |table: &str, hook: &str, policy: &str| json!({"chain": {"family": "inet", "table": table, "name": "in", "hook": hook, "policy": policy}});
        let rule = |table: &str, port: u16| {
            json!({"rule": {"family": "inet", "table": table, "chain": "in", "expr": [
                {"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": {"set": [port]}}}]}})
        };
        let document = json!({"nftables": [
            chain("a", "input", "drop"), rule("a", 5182),
            chain("b", "input", "drop"), rule("b", 51820),
            chain("c", "input", "accept"), chain("d", "forward", "drop"),
        ]});
        assert_eq!(chains_without(&document, 51820), [("inet a".to_owned(), "in".to_owned())]);
    }

    #[test]
    fn releases_are_read() {
        assert_eq!(release("3.4.23"), Some((3, 4)));
        assert!(release("3.3.9").unwrap() < OLDEST_ETCD);
        assert_eq!(release("x"), None);
    }
}
