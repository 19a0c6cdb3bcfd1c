//! The path MTU of a peer.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Every IPv6 link carries packets of this size (RFC 8200); an inner MTU below it would cut IPv6 off.
pub(super) const MIN_INNER_MTU: u16 = 1280;
/// A lowered MTU is raised and tried again after this long, as in kernels.
const RETRY: Duration = Duration::from_secs(600);

/// The path MTU of one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PathMtu {
    route: u16,
    lowered: Option<Lowered>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lowered {
    inner: u16,
    without_df: bool,
    retry_at: Instant,
}

impl PathMtu {
    /// A path with the MTU of the route.
    pub(super) fn new(route: u16) -> Self {
        Self { route, lowered: None }
    }

    /// Sets the MTU of the routes.
    pub(super) fn set_route(&mut self, route: u16) {
        self.route = route;
    }

    /// Largest inner packet.
    pub(super) fn inner(&self) -> u16 {
        self.lowered.map_or(self.route, |l| l.inner.min(self.route))
    }

    /// Whether outer packets must be allowed to fragment.
    pub(super) fn without_df(&self) -> bool {
        self.lowered.is_some_and(|l| l.without_df)
    }

    /// When the full MTU is to be tried again.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.lowered.map(|l| l.retry_at)
    }

    /// Takes in that the path to `remote` carries outer packets of `outer` bytes. Returns whether anything changed.
    pub(super) fn lower(&mut self, now: Instant, remote: SocketAddr, outer: u16) -> bool {
        // IP and UDP header, then WireGuard's 32 bytes.
        let overhead = if remote.is_ipv4() { 60 } else { 80 };
        let before = (self.inner(), self.without_df());
        let inner = outer.saturating_sub(overhead);
        if inner >= self.inner() {
            return false;
        }
        let floor = MIN_INNER_MTU.min(self.route);
        self.lowered = Some(Lowered { inner: inner.max(floor), without_df: inner < floor, retry_at: now + RETRY });
        before != (self.inner(), self.without_df())
    }

    /// Forgets the learned MTU. Returns whether anything changed.
    pub(super) fn reset(&mut self) -> bool {
        let before = (self.inner(), self.without_df());
        self.lowered = None;
        before != (self.inner(), self.without_df())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_lowered_by_what_the_family_costs_and_never_below_1280() {
        let now = Instant::now();
        let v4: SocketAddr = "192.0.2.1:1".parse().unwrap();
        let v6: SocketAddr = "[2001:db8::1]:1".parse().unwrap();
        let mut path = PathMtu::new(1420);
        assert!(!path.lower(now, v4, 1500));
        assert!(path.lower(now, v4, 1400));
        assert_eq!((path.inner(), path.without_df()), (1340, false));
        assert!(!path.lower(now, v6, 1420));
        assert!(path.lower(now, v6, 1380));
        assert_eq!((path.inner(), path.without_df()), (1300, false));
        assert!(path.lower(now, v6, 1280));
        assert_eq!((path.inner(), path.without_df()), (1280, true));
        assert!(!path.lower(now, v6, 576));
        assert!(path.reset());
        assert_eq!((path.inner(), path.without_df()), (1420, false));
    }

    #[test]
    fn routes_below_1280_stay_as_they_are() {
        let now = Instant::now();
        let mut path = PathMtu::new(1000);
        assert!(path.lower(now, "192.0.2.1:1".parse().unwrap(), 900));
        assert_eq!((path.inner(), path.without_df()), (1000, true));
    }
}
