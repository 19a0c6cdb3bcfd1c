//! Hosts around one router.

use crate::{Host, Lab, Relay, Router, Switch};

/// Hosts that are cabled to one router, each on a network of its own, as a router's own ports are:
///
/// ```text
///   host a ── .2  192.0.2.0/30  .1 ──┐
///                                    ├── router ── .1 ── relay ══ far ══╗
///   host b ── .6  192.0.2.4/30  .5 ──┘                                  ╟── host c   198.51.100.2
///                                                                       ╙── host d   198.51.100.3
/// ```
///
/// Every host has a default route to the router. `far` is there once a host has been put behind the relay.
pub struct Star {
    /// In the middle.
    pub router: Router,
    hosts: u8,
    far: Option<Far>,
    /// The Lab around it.
    pub lab: Lab,
}

struct Far {
    switch: Switch,
    relay: Relay,
    hosts: u8,
}

impl Star {
    /// A router alone.
    #[must_use]
    pub fn new(title: &str) -> Self {
        let lab = Lab::new(title);
        let router = lab.router("router");
        Self { router, hosts: 0, far: None, lab }
    }

    /// One more host on a cable to the router, and its address. There is room for 64.
    ///
    /// # Panics
    /// When there is no more.
    pub fn host(&mut self, name: &str) -> (Host, String) {
        assert!(self.hosts < 64, "a star has 64 hosts at most");
        let first = self.hosts * 4;
        self.hosts += 1;
        let host = self.lab.host(name);
        self.router.join(&host, [&format!("192.0.2.{}/30", first + 1), &format!("192.0.2.{}/30", first + 2)]);
        host.route("default", &format!("via 192.0.2.{}", first + 1));
        (host, format!("192.0.2.{}", first + 2))
    }

    /// One more host behind the relay, and its address. There is room for 250.
    ///
    /// # Panics
    /// When there is no more.
    pub fn far_host(&mut self, name: &str) -> (Host, String) {
        let far = self.far.get_or_insert_with(|| {
            let switch = self.lab.switch("far");
            let (relay, _) = self.router.connect_by_relay(&switch, &["198.51.100.1/24"]);
            Far { switch, relay, hosts: 0 }
        });
        assert!(far.hosts < 250, "250 hosts behind the relay at most");
        far.hosts += 1;
        let address = format!("198.51.100.{}", far.hosts + 1);
        let host = self.lab.host(name);
        host.connect(&far.switch, &[&format!("{address}/24")]);
        host.route("default", "via 198.51.100.1");
        (host, address)
    }

    /// The line to the hosts behind it, once there is one.
    #[must_use]
    pub fn relay(&self) -> Option<&Relay> {
        self.far.as_ref().map(|far| &far.relay)
    }
}
