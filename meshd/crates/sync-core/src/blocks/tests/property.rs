//! Blocks against a naive reading, while nodes, Node objects, leaders and etcd itself come and go.

use proptest::prelude::*;

use super::*;

/// What may happen.
#[derive(Debug, Clone)]
enum Happens {
    /// A Node has this podCIDR.
    Object(u8, u8),
    NoObject(u8),
    /// A node of the mesh starts under this name.
    Node(u8, u8),
    Alive(u8),
    Dead(u8),
    /// A node leases a block by itself.
    Draws(u8, u8),
    /// A node deletes one of its blocks.
    Releases(u8),
    Time(u64),
    /// Another sync takes over.
    Leader,
    /// etcd is what it was so many changes ago.
    Restored(usize),
    /// What is decided now is written after the next change.
    Late,
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        3 => (0..4u8, 0..6u8).prop_map(|(name, block)| Happens::Object(name, block)),
        1 => (0..4u8).prop_map(Happens::NoObject),
        3 => (0..5u8, 0..4u8).prop_map(|(id, name)| Happens::Node(id, name)),
        1 => (0..5u8).prop_map(Happens::Alive),
        2 => (0..5u8).prop_map(Happens::Dead),
        1 => (0..5u8, 0..6u8).prop_map(|(id, block)| Happens::Draws(id, block)),
        1 => (0..5u8).prop_map(Happens::Releases),
        3 => (1..200u64).prop_map(Happens::Time),
        1 => Just(Happens::Leader),
        1 => (1..6usize).prop_map(Happens::Restored),
        2 => Just(Happens::Late),
    ]
}

const CIDRS: [&str; 6] =
    ["10.42.0.0/24", "10.42.1.0/24", "10.42.0.0/23", "10.42.1.128/25", "10.43.0.0/24", "10.42.8.0/24"];

fn key_of(block: u8) -> SubnetKey {
    CIDRS[usize::from(block)].replace('/', "-").parse().unwrap()
}

impl Etcd {
    fn is_alive(&self, id: &str) -> bool {
        self.keys.contains_key(&format!("alive/{id}"))
    }

    fn json(&self, key: &str) -> Option<serde_json::Value> {
        Some(serde_json::from_slice(&self.keys.get(key)?.value).unwrap())
    }

    /// Nodes of the mesh with their names.
    fn names(&self) -> BTreeMap<String, String> {
        let nodes = self.keys.keys().filter_map(|key| key.strip_prefix("nodes/"));
        nodes
            .map(|id| (id.to_owned(), self.json(&format!("nodes/{id}")).unwrap()["name"].as_str().unwrap().to_owned()))
            .collect()
    }

    /// Node objects with their podCIDRs.
    fn objects(&self) -> BTreeMap<String, String> {
        let objects = self.keys.keys().filter_map(|key| key.strip_prefix("k8s/east/nodes/"));
        let cidr = |name: &str| self.json(&format!("k8s/east/nodes/{name}")).unwrap()["spec"]["podCIDRs"][0].clone();
        objects.map(|name| (name.to_owned(), cidr(name).as_str().unwrap().to_owned())).collect()
    }
}

struct World {
    etcd: Etcd,
    earlier: Vec<Etcd>,
    blocks: NodeBlocks,
    now: u64,
    /// Nodes without a sign of life, since when.
    silent: BTreeMap<String, u64>,
    late: Option<Transaction>,
}

impl World {
    fn new() -> Self {
        let mut etcd = Etcd::default();
        let blocks = begin(&mut etcd);
        etcd.put("config", CONFIG);
        Self { etcd, earlier: Vec::new(), blocks, now: 100, silent: BTreeMap::new(), late: None }
    }

    fn happen(&mut self, what: &Happens) {
        self.earlier.push(self.etcd.clone());
        let etcd = &mut self.etcd;
        match *what {
            Happens::Object(name, block) => put_object(etcd, &format!("w{name}"), name, &[CIDRS[usize::from(block)]]),
            Happens::NoObject(name) => etcd.delete(&format!("k8s/east/nodes/w{name}")),
            Happens::Node(id, name) => put_node(etcd, &format!("n{id}"), &format!("w{name}"), name),
            Happens::Alive(id) => etcd.put(&format!("alive/n{id}"), ALIVE),
            Happens::Dead(id) => etcd.delete(&format!("alive/n{id}")),
            Happens::Draws(id, block) => {
                let free = etcd.blocks().iter().all(|(is, _)| !key_of(block).overlaps(&is.parse().unwrap()));
                if free && etcd.is_alive(&format!("n{id}")) {
                    etcd.lease(&Key::Subnet(key_of(block)).to_string(), &format!("n{id}"));
                }
            }
            Happens::Releases(id) => {
                let of_node = |(_, owner): &(String, String)| *owner == format!("n{id}");
                let first = etcd.blocks().into_iter().find(of_node);
                first.into_iter().for_each(|(block, _)| etcd.delete(&format!("subnets/{block}")));
            }
            Happens::Time(seconds) => self.now += seconds,
            Happens::Leader => {
                etcd.delete("k8s/east/leader");
                etcd.put("k8s/east/leader", "{}");
                let fence = etcd.keys["k8s/east/leader"].create_revision;
                self.blocks = NodeBlocks::new("east".parse().unwrap(), fence, at(self.now));
            }
            Happens::Restored(back) => {
                let at = self.earlier.len().saturating_sub(back);
                *etcd = self.earlier[at].clone();
                // The next leader begins a term of its own.
                self.happen(&Happens::Leader);
            }
            Happens::Late => {}
        }
        let etcd = &self.etcd;
        self.silent.retain(|id, _| !etcd.is_alive(id));
        for id in (0..5).map(|id| format!("n{id}")).filter(|id| !etcd.is_alive(id)) {
            self.silent.entry(id).or_insert(self.now);
        }
    }

    /// Writes it, if nothing has changed that it depends on, and checks what it did. Returns whether it was written.
    fn commit(&mut self, transaction: &Transaction) -> Result<bool, TestCaseError> {
        let before = self.etcd.clone();
        if !self.etcd.commit(transaction).succeeded {
            return Ok(false);
        }
        let after = self.etcd.blocks();
        for (block, owner) in before.blocks().into_iter().filter(|(_, owner)| owner != "-") {
            if after.contains(&(block.clone(), owner.clone())) {
                continue;
            }
            prop_assert!(!before.is_alive(&owner), "{} was taken from {}", block, owner);
            let since = self.silent.get(&owner).map_or(0, |since| self.now - since);
            let (names, objects) = (before.names(), before.objects());
            let Some(name) = names.get(&owner) else { continue };
            if !objects.contains_key(name) {
                prop_assert!(since >= 20, "{} of {} after {} s", block, owner, since);
                continue;
            }
            let running = names.iter().filter(|(id, of)| *of == name && before.is_alive(id)).count();
            prop_assert_eq!(running, 1, "{} of {}, which is a Node", block, owner);
            prop_assert!(since >= 300, "{} of {} after {} s", block, owner, since);
        }
        for entry in self.etcd.keys.values().filter(|entry| entry.key.starts_with("subnets/")) {
            let lease = SubnetLease::parse(&entry.value).unwrap();
            prop_assert!(
                lease.freed.is_none() || (lease.node.is_none() && lease.kubernetes_node.is_none()),
                "{:?}",
                lease
            );
        }
        let keys: Vec<SubnetKey> = after.iter().map(|(block, _)| block.parse().unwrap()).collect();
        for (i, a) in keys.iter().enumerate() {
            prop_assert!(keys[i + 1..].iter().all(|b| !a.overlaps(b)), "{:?}", keys);
        }
        Ok(true)
    }

    fn settle(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..50 {
            let Some(transaction) = step(&mut self.blocks, &self.etcd, at(self.now), true).transaction else {
                return Ok(());
            };
            prop_assert!(self.commit(&transaction)?, "{:?}", transaction);
        }
        Err(TestCaseError::fail(format!("it never comes to rest: {:?}", self.etcd.blocks())))
    }

    /// Every Node that is a running node's has its block, unless another's is in its way, and it was written last.
    fn check_served(&self) -> Result<(), TestCaseError> {
        let etcd = &self.etcd;
        let owned = etcd.blocks();
        for (name, cidr) in etcd.objects().into_iter().filter(|(_, cidr)| cidr.starts_with("10.42.")) {
            let counts = |id: &String| etcd.is_alive(id) || owned.iter().any(|(_, owner)| owner == id);
            let names = etcd.names();
            let ids: Vec<&String> =
                names.iter().filter(|(id, of)| **of == name && counts(id)).map(|(id, _)| id).collect();
            let &[id] = &ids[..] else { continue };
            if !etcd.is_alive(id) {
                continue;
            }
            let wanted: SubnetKey = cidr.replace('/', "-").parse().unwrap();
            let overlapping =
                owned.iter().filter(|(key, owner)| owner != "-" && wanted.overlaps(&key.parse().unwrap()));
            let (mine, others): (Vec<_>, Vec<_>) =
                overlapping.partition(|(key, owner)| owner == id && key.parse() == Ok(wanted));
            prop_assert!(mine.len() == 1 || !others.is_empty(), "{:?} of {} in {:?}", wanted, id, owned);
            let revision = |block: &str| etcd.keys[&format!("subnets/{block}")].mod_revision;
            let reserved = owned.iter().filter(|(block, owner)| {
                owner == id && etcd.json(&format!("subnets/{block}")).unwrap()["KubernetesNode"].is_string()
            });
            let last = reserved.max_by_key(|(block, _)| revision(block));
            prop_assert!(mine.is_empty() || last == Some(mine[0]), "{:?} of {} in {:?}", wanted, id, owned);
        }
        Ok(())
    }
}

proptest! {
    /// Whose block each may be, and whose blocks may be given up.
    #[test]
    fn no_block_of_a_living_owner_moves_and_every_node_gets_its_own(history in prop::collection::vec(happens(), 1..80)) {
        let mut world = World::new();
        for what in history {
            world.happen(&what);
            if let Some(late) = world.late.take() {
                world.commit(&late)?;
            }
            if matches!(what, Happens::Late) {
                world.late = step(&mut world.blocks, &world.etcd, at(world.now), true).transaction;
                continue;
            }
            world.settle()?;
            world.check_served()?;
        }
    }
}
