//! The commands of the documentation, run on machines with systemd in the order in which a reader comes to them.
//!
//! ```text
//!   east-1 ─┐                               ┌─ west-1
//!           ├─ switch ──── router ──── switch ┘
//!   east-2 ─┘                │
//!                         etcd-1
//! ```

use std::{fs, path::Path, thread};

use integration::{Host, Machine, topology::TwoSites};
use serde_json::Value;

use crate::package::package;

/// As `kubectl get -A -o json` prints several.
const OBJECTS: &str = r#"{"apiVersion": "v1", "kind": "List", "items": [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}},
    {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "web", "namespace": "shop"},
     "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}}]}"#;

/// One block of commands.
struct Block {
    line: usize,
    machines: Vec<String>,
    script: String,
}

/// The blocks of a page that begin with "```sh on=MACHINE,MACHINE".
fn blocks(page: &str) -> Vec<Block> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(page)).unwrap();
    let mut blocks = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if let Some(machines) = line.strip_prefix("```sh on=") {
            let script: Vec<&str> = lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").collect();
            let machines = machines.split(',').map(|name| name.trim().to_owned()).collect();
            blocks.push(Block { line: number + 1, machines, script: script.join("\n") });
        } else {
            assert!(!line.starts_with("```sh"), "{page}:{}: a block that no machine is named for", number + 1);
        }
    }
    blocks
}

/// The machines of the page's picture, with the package in root's home folder and each other's names.
struct Machines {
    machines: Vec<Machine>,
    sites: TwoSites,
}

impl Machines {
    fn boot(title: &str) -> Self {
        let sites = TwoSites::new(title);
        let [east, west] = [&sites.east.hosts, &sites.west.hosts];
        let all: [(&str, &Host, &str); 4] = [
            ("etcd-1", &sites.store, "203.0.113.10"),
            ("east-1", &east[0], "192.0.2.11"),
            ("east-2", &east[1], "192.0.2.12"),
            ("west-1", &west[0], "198.51.100.11"),
        ];
        let machines: Vec<Machine> = all.iter().map(|(name, host, _)| Machine::boot(host, name)).collect();
        let names: String = all.iter().map(|(name, _, address)| format!("{address} {name}\n")).collect();
        let file = package().file_name().unwrap().to_string_lossy();
        for machine in &machines {
            machine.sh(&format!("rm -f /root/meshd_*.deb; printf '127.0.0.1 localhost\n{names}' > /etc/hosts"));
            machine.put(package(), &format!("/root/{file}"));
        }
        Self { machines, sites }
    }

    fn at(&self, name: &str) -> &Machine {
        self.machines.iter().find(|machine| machine.name() == name).unwrap()
    }

    /// Runs a block on its machines, side by side.
    fn run(&self, page: &str, block: &Block) {
        thread::scope(|scope| {
            for name in &block.machines {
                scope.spawn(move || {
                    let output = self.at(name).try_sh(&block.script);
                    assert!(output.success(), "{page}:{}: {}", block.line, output.describe());
                });
            }
        });
    }

    /// Copies a file of one machine to another.
    fn copy(&self, from: &str, to: &str, file: &str) {
        let passed = self.sites.lab.folder().join(format!("{from}-{to}"));
        self.at(from).get(file, &passed);
        self.at(to).put(&passed, file);
    }

    /// Waits until this machine reaches that one by this path.
    #[track_caller]
    fn await_path(&self, from: &str, to: &str, path: &str) {
        integration::await_ok(&format!("{from} to reach {to} by {path}"), crate::SOON, || {
            let told = self.at(from).try_sh("meshctl -o json peers");
            let peers: Value = serde_json::from_str(&told.stdout).map_err(|_| told.describe())?;
            let mut peers = peers.as_array().into_iter().flatten();
            let is_so = peers.any(|peer| peer["name"] == to && peer["path"] == path);
            if is_so { Ok(()) } else { Err(told.describe()) }
        });
    }
}

#[test]
fn operations_from_top_to_bottom() {
    let page = "docs/operations.md";
    let machines = Machines::boot("operations");
    for block in blocks(page) {
        if block.script.contains("tar -xf") {
            for name in &block.machines {
                machines.copy("etcd-1", name, &format!("/root/{name}.tar"));
            }
        }
        machines.run(page, &block);
        if block.script.contains("meshctl peers") {
            machines.await_path("east-1", "west-1", "wireguard");
            machines.await_path("east-1", "east-2", "direct");
        }
    }
    let network = machines.at("east-1").sh("cat /run/meshd/subnet.env").stdout;
    assert!(network.contains("FLANNEL_NETWORK=10.96.0.0/16") && network.contains("FLANNEL_IPV6_NETWORK"), "{network}");
}

#[test]
fn the_readme_alone_brings_up_a_mesh() {
    let page = "README.md";
    let machines = Machines::boot("readme");
    for block in blocks(page) {
        machines.run(page, &block);
    }
    machines.await_path("west-1", "east-2", "wireguard");
    let status: Value = serde_json::from_str(&machines.at("east-2").sh("meshctl -o json status").stdout).unwrap();
    let overlay = status["overlay"][0].as_str().unwrap();
    integration::await_ok("east-2 to answer", crate::SOON, || {
        let ping = machines.at("west-1").try_sh(&format!("ping -c 3 -i 0.2 {overlay}"));
        if ping.success() { Ok(()) } else { Err(ping.describe()) }
    });

    for block in blocks("docs/kubernetes.md") {
        machines.run("docs/kubernetes.md", &block);
    }
    machines.at("etcd-1").sh(&format!("put-objects <<'.'\n{OBJECTS}\n."));
    integration::await_ok("the policy to be in force", crate::SOON, || {
        let shown = machines.at("east-1").try_sh("meshctl policy show shop/web");
        if shown.success() { Ok(()) } else { Err(shown.describe()) }
    });
    machines.await_path("east-1", "east-2", "direct");
    for block in blocks("docs/security.md") {
        machines.run("docs/security.md", &block);
    }
    machines.await_path("east-1", "east-2", "wireguard");
}
