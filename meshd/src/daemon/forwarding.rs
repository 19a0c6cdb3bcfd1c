//! Checks whether the kernel forwards packets between this node's pods and other nodes. The node's own echoes cannot
//! show that, because its own packets are not forwarded. Blocking: for a thread that may wait.

use std::{collections::BTreeMap, net::IpAddr};

use api_types::{Finding, Severity};
use kernel::{Rtnetlink, RtnetlinkError};
use mesh::{kernel_state, problem::ProblemCode};

use super::published::ApiState;
use crate::doctor::{host::not_forwarding, routes::wait_for};

/// Pods whose packets are tried.
const PODS: usize = 256;

/// A packet that is to be forwarded.
struct Tried {
    from: IpAddr,
    by: String,
    to: IpAddr,
}

impl ApiState {
    /// Queries the kernel's route for a packet from each attached pod to one of these addresses of other nodes, and
    /// from each of them to a pod. Empty without attached pods, or if the kernel does not answer.
    pub(super) fn not_forwarded(&self, others: &[IpAddr]) -> Vec<Finding> {
        let pods = self.pods();
        let mut tried = Vec::new();
        for ipv4 in [true, false] {
            let mut remote = others.iter().copied().filter(|address| address.is_ipv4() == ipv4).peekable();
            let mut local = pods.iter().filter(|(address, _)| address.is_ipv4() == ipv4).peekable();
            let (Some(first), Some((pod, _))) = (remote.peek().copied(), local.peek().copied()) else { continue };
            tried.extend(remote.filter_map(|from| Some(Tried { from, by: self.device_to(from)?, to: *pod })));
            tried.extend(local.map(|(from, by)| Tried { from: *from, by: by.clone(), to: first }));
        }
        let mut findings: Vec<Finding> = Vec::new();
        for (tried, errno) in wait_for(refused(tried)).unwrap_or_default() {
            let finding = finding(&tried, errno);
            if !findings.iter().any(|known| known.remedy == finding.remedy) {
                findings.push(finding);
            }
        }
        findings
    }

    /// Addresses of attached pods, with the host's ends of their interfaces.
    fn pods(&self) -> Vec<(IpAddr, String)> {
        let table = self.attachments.table();
        let table = table.borrow();
        let attached = table.attachments.values().filter_map(|one| one.attach.as_ref()).take(PODS);
        attached.flat_map(|one| one.addresses.iter().map(|address| (*address, one.interface.clone()))).collect()
    }

    /// The interface that leads to another node, by the routes in force.
    pub(super) fn device_to(&self, address: IpAddr) -> Option<String> {
        let in_force = self.lock();
        let routes = in_force.plan.as_ref()?.kernel.routes.iter();
        let (_, route) = routes.filter(|(net, _)| net.contains(&address)).max_by_key(|(net, _)| net.prefix_len())?;
        match &route.via {
            kernel_state::RouteVia::Neighbour { dev, .. } | kernel_state::RouteVia::Vtep { dev, .. } => {
                Some(dev.to_string())
            }
            kernel_state::RouteVia::Tunnel => Some(self.identity.interface.clone()),
            kernel_state::RouteVia::Unreachable => None,
        }
    }
}

/// The pairs that the kernel does not forward, each with its error number. Packets of a pod on a bridge come from the
/// bridge.
async fn refused(tried: Vec<Tried>) -> Result<Vec<(Tried, i32)>, RtnetlinkError> {
    let netlink = Rtnetlink::open()?;
    let links = netlink.links().await?;
    let named: BTreeMap<&str, _> = links.iter().map(|link| (link.name.as_str(), link)).collect();
    let mut refused = Vec::new();
    for mut one in tried {
        let Some(link) = named.get(one.by.as_str()) else { continue };
        let bridge = link.master.and_then(|index| links.iter().find(|link| link.index == index));
        let by = bridge.unwrap_or(link);
        one.by.clone_from(&by.name);
        if let Err(errno) = netlink.forwards(one.from, by.index, one.to).await? {
            refused.push((one, errno));
        }
    }
    Ok(refused)
}

fn finding(tried: &Tried, errno: i32) -> Finding {
    let Tried { from, by, to } = tried;
    let is_off = |path: String| std::fs::read_to_string(path).is_ok_and(|value| value.trim() == "0");
    if from.is_ipv4() && is_off(format!("/proc/sys/net/ipv4/conf/{by}/forwarding")) {
        return Finding::of(Severity::Error, not_forwarding(by));
    }
    let error = std::io::Error::from_raw_os_error(errno);
    let family = if to.is_ipv4() { "" } else { " -6" };
    Finding::new(
        Severity::Error,
        ProblemCode::NotForwarded,
        format!("the kernel does not forward packets from {from} arriving on {by} to {to}: {error}"),
        format!(
            "ip{family} route get {to} from {from} iif {by}; ip{family} rule show # find the route or rule that \
             diverts them"
        ),
    )
}
