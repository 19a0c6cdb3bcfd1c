//! Two sites with a router between them.

use crate::{Etcd, Host, Interface, Lab, Meshd, MeshdNode, Nat, Relay, Router, Switch};

/// Two sites, a router between them, and a host for etcd on a network of its own:
///
/// ```text
///      site east                                                     site west
///   192.0.2.0/24                                                  198.51.100.0/24
///   2001:db8:1::/64                                               2001:db8:2::/64
///  ┌───────┐                                                              ┌───────┐
///  │ east1 ├──┐  ╔══════╗  ┌───────┐  .1 ┌────────┐ .1   ╔══════╗      ┌──┤ west1 │
///  └───────┘  ├──╢ east ╟──┤ relay ├─────┤ router ├──────╢ west ╟──────┤  └───────┘
///  ┌───────┐  │  ╚══════╝  └───────┘     └───┬────┘      ╚══════╝      │  ┌───────┐
///  │ east2 ├──┘                              │.1                       └──┤ west2 │
///  └───────┘ .11, .12, …             ╔═══════╧══════╗          .11, .12, …└───────┘
///                                    ║  management  ║  203.0.113.0/24, 2001:db8:3::/64
///                                    ╚═══════╤══════╝
///                                        ┌───┴───┐
///                                        │ store │  .10: where etcd runs
///                                        └───────┘
/// ```
///
/// Every host has a default route to the router in both families. The router knows only these three networks: a pod's
/// or overlay address does not get across it. IPv6 addresses end like the IPv4 ones.
pub struct TwoSites {
    /// The site on the relay's side.
    pub east: Site,
    /// The other one.
    pub west: Site,
    /// The router between them; `sites.router.sniff(…)` watches all that passes between the networks.
    pub router: Router,
    /// The line between the switch east and the router; bypassed until a scenario makes it bad.
    pub relay: Relay,
    /// The host for etcd.
    pub store: Host,
    /// The Lab around them.
    pub lab: Lab,
}

/// One site: a switch, and hosts on it.
pub struct Site {
    /// Its name: `east`, `west` or `home`.
    pub name: String,
    /// The switch.
    pub switch: Switch,
    /// Its hosts, `east1` first.
    pub hosts: Vec<Host>,
    /// The interface of each host on the switch.
    pub interfaces: Vec<Interface>,
    prefix_v4: &'static str,
    prefix_v6: &'static str,
}

impl TwoSites {
    /// Two hosts on each site.
    #[must_use]
    pub fn new(title: &str) -> Self {
        Self::with_hosts(title, 2)
    }

    /// This many hosts on each site, at most 80.
    #[must_use]
    pub fn with_hosts(title: &str, hosts: u8) -> Self {
        let lab = Lab::new(title);
        let router = lab.router("router");
        let mut east = Site::empty(&lab, "east", "192.0.2.", "2001:db8:1::");
        let mut west = Site::empty(&lab, "west", "198.51.100.", "2001:db8:2::");
        let [v4, v6] = east.gateway();
        let (relay, _) = router.connect_by_relay(&east.switch, &[&v4, &v6]);
        let [v4, v6] = west.gateway();
        router.connect(&west.switch, &[&v4, &v6]);
        for _ in 0..hosts {
            east.add_host(&lab);
            west.add_host(&lab);
        }
        let management = lab.switch("management");
        router.connect(&management, &["203.0.113.1/24", "2001:db8:3::1/64"]);
        let store = lab.host("store");
        store.connect(&management, &["203.0.113.10/24", "2001:db8:3::10/64"]);
        store.route("default", "via 203.0.113.1");
        store.route("default", "via 2001:db8:3::1");
        Self { east, west, router, relay, store, lab }
    }

    /// An etcd of this many members on the host `store`.
    #[must_use]
    pub fn start_etcd(&self, members: usize) -> Etcd {
        Etcd::start(&self.store, &["203.0.113.10", "2001:db8:3::10"], members)
    }

    /// A node on every host, named like it and with its site, all started and none awaited. `finish` can add to each
    /// one's command line.
    #[must_use]
    pub fn start_nodes(&self, etcd: &Etcd, finish: impl Fn(Meshd) -> Meshd) -> Vec<MeshdNode> {
        self.hosts_and_sites().map(|(host, site)| finish(Meshd::on(host, etcd).site(site)).start()).collect()
    }

    /// A third site, `home`, behind a NAT:
    ///
    /// ```text
    ///               100.64.0.0/24                    192.168.1.0/24
    ///            2001:db8:4::/64                     2001:db8:5::/64
    ///  router ─────╢ uplink ╟───── nat ──────╢ home ╟──┬── home1 (.11)
    ///          .1              .2         .1           └── home2 (.12), …
    /// ```
    ///
    /// IPv4 leaves as 100.64.0.2. IPv6 is routed as it is, and only what answers gets in, too.
    #[must_use]
    pub fn add_home(&self, hosts: u8) -> (Nat, Site) {
        let uplink = self.lab.switch("uplink");
        self.router.connect(&uplink, &["100.64.0.1/24", "2001:db8:4::1/64"]);
        let nat = self.lab.nat("nat");
        let outside = nat.connect(&uplink, &["100.64.0.2/24", "2001:db8:4::2/64"]);
        nat.route("default", "via 100.64.0.1");
        nat.route("default", "via 2001:db8:4::1");
        self.router.route("2001:db8:5::/64", "via 2001:db8:4::2");
        let mut home = Site::empty(&self.lab, "home", "192.168.1.", "2001:db8:5::");
        let [v4, v6] = home.gateway();
        nat.connect(&home.switch, &[&v4, &v6]);
        nat.masquerade(&outside);
        for _ in 0..hosts {
            home.add_host(&self.lab);
        }
        (nat, home)
    }

    /// All hosts of both sites: east first.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.east.hosts.iter().chain(&self.west.hosts)
    }

    /// Every host with its site's name: east first.
    pub fn hosts_and_sites(&self) -> impl Iterator<Item = (&Host, &str)> {
        [&self.east, &self.west].into_iter().flat_map(|site| site.hosts.iter().map(|host| (host, site.name.as_str())))
    }
}

impl Site {
    /// Address of the router on this site.
    #[must_use]
    pub fn router_v4(&self) -> String {
        format!("{}1", self.prefix_v4)
    }

    /// IPv6 address of the router on this site.
    #[must_use]
    pub fn router_v6(&self) -> String {
        format!("{}1", self.prefix_v6)
    }

    /// IPv4 address of the host with this index on the switch.
    #[must_use]
    pub fn v4(&self, index: usize) -> String {
        format!("{}{}", self.prefix_v4, index + 11)
    }

    /// IPv6 address of the host with this index on the switch; its last group reads like the last IPv4 byte.
    #[must_use]
    pub fn v6(&self, index: usize) -> String {
        format!("{}{}", self.prefix_v6, index + 11)
    }

    /// One more host on the switch, with the next address of each family and default routes to the router.
    pub fn add_host(&mut self, lab: &Lab) -> &Host {
        let index = self.hosts.len();
        let host = lab.host(&format!("{}{}", self.name, index + 1));
        let addresses = [format!("{}/24", self.v4(index)), format!("{}/64", self.v6(index))];
        self.interfaces.push(host.connect(&self.switch, &[&addresses[0], &addresses[1]]));
        host.route("default", &format!("via {}", self.router_v4()));
        host.route("default", &format!("via {}", self.router_v6()));
        self.hosts.push(host);
        &self.hosts[index]
    }

    fn empty(lab: &Lab, name: &str, prefix_v4: &'static str, prefix_v6: &'static str) -> Self {
        Self {
            name: name.to_owned(),
            switch: lab.switch(name),
            hosts: Vec::new(),
            interfaces: Vec::new(),
            prefix_v4,
            prefix_v6,
        }
    }

    /// The router's addresses with prefix length.
    fn gateway(&self) -> [String; 2] {
        [format!("{}/24", self.router_v4()), format!("{}/64", self.router_v6())]
    }
}
