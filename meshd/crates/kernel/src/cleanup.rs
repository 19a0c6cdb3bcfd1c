//! Removes all state from the kernel.

use thiserror::Error;

use super::{
    Kernel,
    failure::{Failure, FailureCause},
    foreign::{self, ForeignChain},
    netlink::{self, Rtnetlink, RtnetlinkError},
    nft::{NftBackend as _, NftTableError, NftTransaction},
    plan::is_floor,
    sysctl, vxlan,
};

/// The result of a cleanup.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cleanup {
    /// Removed or restored state, one line each; empty if there was none.
    pub removed: Vec<String>,
    /// Remaining state, and why.
    pub failures: Vec<Failure>,
}

/// A cleanup that could not read the kernel's state. The remaining state is unchanged.
#[derive(Debug, Error)]
pub enum CleanupError {
    /// Reading links, routes or rules failed.
    #[error(transparent)]
    Netlink(#[from] RtnetlinkError),
}

impl Kernel {
    /// Removes routes and rules by protocol number, the TUN device, tagged rules in foreign chains, and the nftables
    /// table, and restores sysctls that still have our values. Continues if parts are missing; a second run finds
    /// nothing.
    ///
    /// # Errors
    /// [`CleanupError`], when not even the state could be read.
    pub async fn cleanup(&self) -> Result<Cleanup, CleanupError> {
        let netlink = Rtnetlink::open()?;
        let mut result = Cleanup::default();
        self.remove_routes(&netlink, &mut result).await?;
        // Forwarding goes back before the firewall does.
        match sysctl::restore(&self.options.state_dir) {
            Ok((restored, failures)) => {
                result.removed.extend(restored);
                result.failures.extend(failures);
            }
            Err(e) => result.failures.push(e.into()),
        }
        self.remove_tagged(&mut result).await;
        for name in [self.options.table_name.clone(), super::policy_table(&self.options.table_name)] {
            self.remove_table(&name, &mut result).await;
        }
        Ok(result)
    }

    /// Routes to peers, then rules, then the device, then the floor.
    async fn remove_routes(&self, netlink: &Rtnetlink, result: &mut Cleanup) -> Result<(), RtnetlinkError> {
        let protocol = self.options.route_protocol;
        let (floor, routes): (Vec<_>, Vec<_>) = netlink.routes(protocol).await?.into_iter().partition(is_floor);
        for route in routes {
            let done = netlink.remove_route(&route, protocol).await;
            note(result, format!("route {route}"), done);
        }
        for rule in netlink.rules(protocol).await? {
            let done = netlink.remove_rule(&rule, protocol).await;
            note(result, format!("rule {rule}"), done);
        }
        let links = netlink.links().await?;
        if let Some(tun) = netlink::tun_among(&links, &self.options.tun) {
            let done = netlink.delete_link(tun.index).await;
            note(result, format!("device {}", self.options.tun), done);
        }
        for link in links.iter().filter(|link| vxlan::is_ours(&self.options, link)) {
            let done = netlink.delete_link(link.index).await;
            note(result, format!("device {}", link.name), done);
        }
        for route in floor {
            let done = netlink.remove_route(&route, protocol).await;
            note(result, format!("route {route}"), done);
        }
        Ok(())
    }

    async fn remove_tagged(&self, result: &mut Cleanup) {
        let chains = match foreign::observe(&self.options, &self.nft).await {
            Ok(foreign) => foreign.chains,
            Err(e) => {
                let what = "tagged rules in other nftables tables".to_owned();
                result.failures.push(Failure::new(what, problem(&e)));
                return;
            }
        };
        let mut places: Vec<(&str, &str)> = chains.iter().map(|c| (c.family.as_str(), c.table.as_str())).collect();
        places.dedup();
        for place in places {
            let in_place: Vec<&ForeignChain> =
                chains.iter().filter(|c| (c.family.as_str(), c.table.as_str()) == place).collect();
            let transaction = foreign::withdrawing(&self.options, place, &in_place);
            if !transaction.is_empty() {
                let what = format!("tagged rule in table {} {}", place.0, place.1);
                self.commit(what, &transaction, result).await;
            }
        }
    }

    async fn remove_table(&self, name: &str, result: &mut Cleanup) {
        let what = format!("nftables table inet {name}");
        match self.nft.table(name).await {
            Ok(None) => {}
            Ok(Some(_)) => {
                let mut transaction = NftTransaction::default();
                transaction.push(format!("delete table inet {name}"));
                if name == super::policy_table(&self.options.table_name) {
                    // Made first, so that it can be deleted whether it was there or not.
                    transaction.push(format!("add table bridge {name}"));
                    transaction.push(format!("delete table bridge {name}"));
                }
                self.commit(what, &transaction, result).await;
            }
            Err(e) => result.failures.push(Failure::new(what, problem(&e))),
        }
    }

    async fn commit(&self, what: String, transaction: &NftTransaction, result: &mut Cleanup) {
        match self.nft.apply(transaction).await {
            Ok(()) => result.removed.push(what),
            Err(e) => result.failures.push(Failure::new(what, problem(&e))),
        }
    }
}

fn note(result: &mut Cleanup, what: String, done: Result<(), FailureCause>) {
    match done {
        Ok(()) => result.removed.push(what),
        Err(problem) => result.failures.push(Failure::new(what, problem)),
    }
}

fn problem(error: &NftTableError) -> FailureCause {
    FailureCause::Firewall { message: error.to_string(), remedy: error.remedy() }
}
