//! Paths to other nodes: unreachable peers, a low path MTU, NAT.

use std::thread;

use api_types::{Finding, LayerKind, Path, Peer, Severity};
use mesh::{
    backend::{KernelForm, PathKind},
    problem::ProblemCode,
    topology::{PeerId, Topology},
};
use text::quote;

use super::ApiState;
use crate::{daemon::published::Carrier, echo::Echo};

/// Nodes that are asked for an echo; of a larger mesh, those that are known not to be reached come first.
const ECHOED: usize = 64;
/// Of those that give none, as many are asked layer by layer: they tell enough.
const ASKED: usize = 8;

impl ApiState {
    /// Nodes that answer no echo, each with the outermost layer that does not let packets pass.
    pub(super) fn unreached(&self, peers: &[(String, Peer)], findings: &mut Vec<Finding>) {
        let topology = self.lock().topology.clone();
        let overlay = |owner: &String| {
            let member = topology.members.get(&PeerId::named(owner)?)?;
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
            let code =
                if layer.layer == LayerKind::Udp { ProblemCode::UdpNotThrough } else { ProblemCode::PeerNotReached };
            let cause =
                format!("{} unreachable at layer {}, {}: {}", peer.name, layer.layer.name(), layer.address, layer.text);
            findings.push(Finding::new(Severity::Error, code, cause, layer.remedy.clone()));
        }
    }
}

pub(super) fn narrow_paths(peers: &[(String, Peer)], mtu: u16, prefix: &str, findings: &mut Vec<Finding>) {
    for (_, peer) in peers {
        let tunnelled = matches!(peer.path, Path::By(kind) if kind.backend().form == KernelForm::TunRoute);
        let Some(carried) = peer.mtu.filter(|carried| *carried < mtu && tunnelled) else { continue };
        findings.push(Finding::new(
            Severity::Warning,
            ProblemCode::PathMtu,
            format!("path MTU to {} is {carried} bytes inside the tunnel, less than the mesh's {mtu}", peer.name),
            format!(
                "config=$(etcdctl get {0} --print-value-only | jq -e '.Backend.MTU = {carried}') && etcdctl put {0} \
                 \"$config\" # or raise the MTU on the path: meshctl ping {1} --size finds the largest packet",
                quote(&format!("{}/config", prefix.trim_end_matches('/'))),
                quote(&peer.name)
            ),
        ));
    }
}

pub(super) fn narrow_interfaces(underlay: &[Carrier], mtu: u16, topology: &Topology, findings: &mut Vec<Finding>) {
    let Some(config) = &topology.network else { return };
    let ipv6 = topology.networks().any(|network| network.addr().is_ipv6());
    let overhead = PathKind::largest_overhead(&config.backend, ipv6);
    for Carrier { name, mtu: link } in underlay {
        if u32::from(mtu) + u32::from(overhead) > *link {
            findings.push(Finding::new(
                Severity::Error,
                ProblemCode::MtuBeyondInterface,
                format!(
                    "the mesh's MTU {mtu} plus {overhead} bytes of tunnel overhead exceeds the MTU {link} of {name}"
                ),
                format!(
                    "ip link set {} mtu {} # or a smaller Backend.MTU in config",
                    quote(name),
                    u32::from(mtu) + u32::from(overhead)
                ),
            ));
        }
    }
}

/// Peers that are heard from where their records do not say they are.
pub(super) fn translated(peers: &[(String, Peer)], topology: &Topology, findings: &mut Vec<Finding>) {
    for (owner, peer) in peers {
        let Some(member) = PeerId::named(owner).and_then(|owner| topology.members.get(&owner)) else { continue };
        let (Some(at), Some(_)) = (peer.endpoint, peer.latest_handshake) else { continue };
        // One that has none calls out, which is what is to be done about a NAT.
        if !member.endpoints.is_empty() && !member.endpoints.contains(&at) {
            let recorded: Vec<String> = member.endpoints.iter().map(ToString::to_string).collect();
            let recorded = recorded.join(", ");
            findings.push(Finding::new(
                Severity::Note,
                ProblemCode::NatInTheWay,
                format!("{} sends from {at}, but its record says {recorded}: it is behind a NAT", peer.name),
                format!(
                    "echo 'endpoint = \"none\"' >> /etc/meshd/meshd.toml && systemctl restart meshd # on {}: then it \
                     initiates all handshakes and keeps the NAT mapping open. Or forward a UDP port to it and set \
                     that as its endpoint",
                    peer.name
                ),
            ));
        }
    }
}
