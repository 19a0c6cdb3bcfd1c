//! Connectivity problems that the daemon can detect. Blocking: for a thread that may wait.

mod etcd;
mod overlaps;
mod paths;

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::SystemTime,
};

use api_types::{Diagnosis, Families, Finding, Path, Peer, Severity};
use ipnet::IpNet;
use mesh::problem::{Problem, ProblemCode};
use tunnel::OffloadState;

use self::{
    overlaps::Prefixes,
    paths::{narrow_interfaces, narrow_paths, translated},
};
use super::published::{ApiState, Carrier};
use crate::doctor::filters::{self, WantedFlows};

/// Peers whose calls and packets are followed through the firewall.
const FOLLOWED: usize = 64;

impl ApiState {
    /// Looks at everything that the daemon knows of, and asks etcd and those peers that are not reached.
    pub(super) fn diagnose(&self) -> Diagnosis {
        let peers = self.peers_by_owner();
        let control = self.control.borrow().clone();
        let finding = |problem: &Problem| {
            let severity = if problem.code.is_harmless() { Severity::Warning } else { Severity::Error };
            Finding::new(severity, problem.code, problem.to_string(), problem.remedy.clone())
        };
        let mut findings: Vec<Finding> = self.problems(&control, &peers).problems.iter().map(finding).collect();
        self.unreached(&peers, &mut findings);
        let (underlay, networks, own, ours, mtu, topology) = {
            let in_force = self.lock();
            let ours: Vec<IpNet> = in_force.plan.iter().flat_map(|plan| plan.kernel.routes.keys().copied()).collect();
            (
                in_force.underlay.clone(),
                in_force.topology.networks().collect::<Vec<_>>(),
                in_force.topology.own_prefixes().collect::<Vec<_>>(),
                ours,
                in_force.plan.as_ref().map(|plan| plan.mtu),
                in_force.topology.clone(),
            )
        };
        if let Some(mtu) = mtu {
            narrow_paths(&peers, mtu, &self.etcd.prefix, &mut findings);
            narrow_interfaces(&underlay, mtu, &topology, &mut findings);
        }
        translated(&peers, &topology, &mut findings);
        let reached = peers.iter().filter(|(_, peer)| peer.path != Path::Unreachable).take(FOLLOWED);
        let others: Vec<IpAddr> = reached.flat_map(|(_, peer)| peer.overlay.clone()).collect();
        for finding in self.not_forwarded(&others) {
            if !findings.contains(&finding) {
                findings.push(finding);
            }
        }
        let mut devices: BTreeSet<String> = underlay.iter().map(|carrier| carrier.name.clone()).collect();
        devices.insert(self.identity.interface.clone());
        let mesh = Prefixes { networks: &networks, own: &own, routed: &ours, devices: &devices };
        self.overlaps(&peers, &mesh, &mut findings);
        let mut wanted = self.wanted(&peers, &underlay, &networks, &own);
        if findings.iter().any(|finding| finding.is(ProblemCode::ForeignForwardDrop)) {
            // It is named already, with its owner's own words for a remedy.
            wanted.forwarded.clear();
        }
        findings.extend(filters::findings(&wanted));
        for (name, state) in self.tunnel.offloads().iter().filter(|(_, state)| *state != OffloadState::On) {
            findings.push(Finding::new(
                Severity::Note,
                ProblemCode::OffloadOff,
                format!("the tunnel runs without {name} ({}) and is slower", state.name()),
                match state {
                    OffloadState::SetOff => {
                        format!(
                            "sed -i '/^{}/d' /etc/meshd/meshd.toml && systemctl restart meshd",
                            name.replace('_', "-")
                        )
                    }
                    OffloadState::Refused => {
                        format!("journalctl -u meshd | grep {name} # shows the kernel's error; a restart tries again")
                    }
                    _ => "uname -r # Linux supports UDP_SEGMENT since 4.18, UDP_GRO since 5.0, UDP offload on TUN \
                          devices since 6.2"
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
            families: Families {
                ipv4: networks.iter().any(|net| net.addr().is_ipv4()),
                ipv6: networks.iter().any(|net| net.addr().is_ipv6()),
            },
            listen_port: self.tunnel.listen_port(),
            etcd,
            findings,
        }
    }

    /// The flows that a mesh with these peers has.
    fn wanted(&self, peers: &[(String, Peer)], underlay: &[Carrier], networks: &[IpNet], own: &[IpNet]) -> WantedFlows {
        let endpoints = self.lock().own_endpoints.clone();
        let interface = if let [only] = underlay { Some(only.name.clone()) } else { None };
        let here = |ipv4: bool| {
            let own = endpoints.iter().map(|at| at.ip()).find(|ip| ip.is_ipv4() == ipv4);
            let any = if ipv4 { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
            own.unwrap_or(any)
        };
        let callers = peers.iter().filter_map(|(_, peer)| Some(peer.endpoint?.ip())).take(FOLLOWED);
        let mut callers: Vec<_> = callers.map(|from| (from, here(from.is_ipv4()), interface.clone())).collect();
        if callers.is_empty() {
            // Nobody calls yet; anybody may.
            callers.push((Ipv4Addr::new(198, 51, 100, 1).into(), here(true), interface));
        }
        let pod = |net: &IpNet| net.hosts().nth(1).unwrap_or_else(|| net.addr());
        let mut forwarded = Vec::new();
        for (_, peer) in peers.iter().filter(|(_, peer)| peer.path != Path::Unreachable).take(FOLLOWED) {
            for net in &peer.subnets {
                let own = own.iter().find(|own| own.addr().is_ipv4() == net.addr().is_ipv4());
                if let (Some(own), Some(device)) = (own, self.device_to(pod(net))) {
                    forwarded.push((pod(own), pod(net), device));
                }
            }
        }
        WantedFlows {
            port: self.tunnel.listen_port(),
            callers,
            forwarded,
            networks: networks.to_vec(),
            own_tables: vec![kernel::TABLE.to_owned(), kernel::policy_table(kernel::TABLE)],
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
                ProblemCode::ClockWentBack,
                format!(
                    "the clock is {} s behind the time of this node's last saved state: peers refuse its handshakes \
                     until it has caught up",
                    ahead.as_secs()
                ),
                "timedatectl set-ntp true # if the clock was ahead before, remove this node (meshctl node remove) and \
                 let it join again",
            ));
        }
    }
}
