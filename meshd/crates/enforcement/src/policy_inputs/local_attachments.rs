//! This node's own attachments, from their table. Their records in etcd come later or never, and only supply their age.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use attachments::{AttachmentTable, record};
use cni::{
    daemon::{Attach, Attached},
    environment::AttachmentName,
};
use etcd_schema::{Attachment, Key, NodeId};
use ipnet::IpNet;
use mesh::records::Revision;

use super::{PolicyInputs, rejoin};
use crate::ruleset::PodPort;

/// The attachments of this node.
#[derive(Debug)]
pub(super) struct LocalAttachments {
    pub(super) node: NodeId,
    /// `None`: not known yet.
    table: Option<Arc<AttachmentTable>>,
    /// When the records that etcd holds came into being.
    echoes: HashMap<Key, Revision>,
    /// Addresses that have another owner than before, or none.
    moved: BTreeSet<IpAddr>,
}

impl LocalAttachments {
    pub(super) fn new(node: NodeId) -> Self {
        Self { node, table: None, echoes: HashMap::new(), moved: BTreeSet::new() }
    }

    /// Whether this is the key of an attachment of this node.
    pub(super) fn is_own(&self, key: &Key) -> bool {
        matches!(key, Key::Endpoint(node, ..) if *node == self.node)
    }

    pub(super) const fn is_known(&self) -> bool {
        self.table.is_some()
    }

    /// All that is attached here and has its addresses.
    fn attached(&self) -> impl Iterator<Item = &Attach> {
        let attached = self.table.iter().flat_map(|table| table.attachments.values());
        attached.filter_map(|attached| attached.attach.as_ref())
    }

    /// The addresses of all that is attached here.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.attached().flat_map(|attach| attach.addresses.iter().copied())
    }

    /// Notes that these addresses are free, unless an attachment has them.
    pub(super) fn release<'a>(&mut self, addresses: impl Iterator<Item = &'a IpAddr>) {
        for address in addresses {
            if !self.addresses().any(|held| held == *address) {
                self.moved.insert(*address);
            }
        }
    }

    fn key(&self, name: &AttachmentName) -> Option<Key> {
        Some(Key::Endpoint(self.node.clone(), name.container_id.parse().ok()?, name.ifname.parse().ok()?))
    }
}

impl PolicyInputs {
    /// Generation of the table of attachments that was taken last; 0: none yet.
    pub(crate) fn attachments(&self) -> u64 {
        self.own.table.as_ref().map_or(0, |table| table.generation)
    }

    /// The interfaces of all that is attached here, by their ends on the host, also while nothing is known of the mesh.
    pub(crate) fn ports(&self) -> BTreeMap<String, PodPort> {
        let mesh = self.mesh.as_deref();
        let mut ports: BTreeMap<String, PodPort> = BTreeMap::new();
        for attach in self.own.attached() {
            let port = ports
                .entry(attach.interface.clone())
                .or_insert_with(|| PodPort { mac: attach.mac, ..PodPort::default() });
            port.mac = port.mac.filter(|mac| attach.mac == Some(*mac));
            port.in_mesh |= attach.addresses.iter().any(|ip| mesh.is_none_or(|mesh| mesh.is_in_networks(*ip)));
            port.addresses.extend(&attach.addresses);
            let free = |source: &&IpNet| mesh.is_some_and(|mesh| mesh.source_conflict(source).is_none());
            port.allowed_sources.extend(attach.allowed_sources.iter().filter(free));
        }
        for port in ports.values_mut() {
            port.addresses.sort_unstable();
            port.allowed_sources.sort_unstable();
        }
        ports
    }

    /// Refused `allowedSources` of attachments, each with the reason.
    pub(crate) fn refused_sources(&self) -> Vec<String> {
        let Some(mesh) = &self.mesh else { return Vec::new() };
        let refused: BTreeSet<String> = self
            .own
            .attached()
            .flat_map(|attach| attach.allowed_sources.iter().map(move |source| (attach, source)))
            .filter_map(|(attach, source)| {
                let conflict = mesh.source_conflict(source)?;
                Some(format!("{source} of {}/{}: it overlaps {conflict}", attach.pod.namespace, attach.pod.name))
            })
            .collect();
        refused.into_iter().collect()
    }

    /// Addresses whose owner has changed and whose connections are another's therefore, until they are
    /// [`settled`](Self::settled).
    pub(crate) const fn moved(&self) -> &BTreeSet<IpAddr> {
        &self.own.moved
    }

    pub(crate) fn settled(&mut self) {
        self.own.moved.clear();
    }

    /// Takes the table. Returns whether it changed anything.
    pub(super) fn take_table(&mut self, table: Arc<AttachmentTable>) -> bool {
        let before = self.own.table.replace(Arc::clone(&table));
        let nobody = BTreeMap::new();
        let old = before.as_ref().map_or(&nobody, |before| &before.attachments);
        let mut changed = before.is_none();
        // The permitted sources of an interface depend on its attachment, even if its addresses are in no subnet of
        // this node.
        for (name, attached) in &table.attachments {
            let known = old.get(name);
            if !known.is_some_and(|known| Arc::ptr_eq(known, attached)) {
                changed |= known.and_then(|known| known.attach.as_ref()) != attached.attach.as_ref();
                changed |= self.attach_own(name, Some(attached), before.is_some());
            }
        }
        for (name, known) in old.iter().filter(|(name, _)| !table.attachments.contains_key(*name)) {
            changed |= known.attach.is_some();
            changed |= self.attach_own(name, None, true);
        }
        changed
    }

    /// Applies all attachments again: which addresses count depends on this node's subnets. No owner changes.
    pub(super) fn retake_table(&mut self) {
        if let Some(table) = self.own.table.clone() {
            for (name, attached) in &table.attachments {
                self.attach_own(name, Some(attached), false);
            }
        }
    }

    /// Applies the record in etcd of an attachment of this node. Returns whether anything changed.
    pub(super) fn take_echo(&mut self, key: Key, create_revision: Option<Revision>) -> bool {
        match create_revision {
            Some(revision) => self.own.echoes.insert(key.clone(), revision),
            None => self.own.echoes.remove(&key),
        };
        let Some(attached) = self.attachments.get_mut(&key) else { return false };
        let age = create_revision.unwrap_or(Revision::MAX);
        // Its age decides which of several attachments supplies the labels; that of a pod with a uid supplies none.
        if attached.create_revision == age || attached.record.uid.is_some() {
            return false;
        }
        attached.create_revision = age;
        rejoin(&mut self.engine, &self.clusters, self.mesh.as_deref(), &key, attached, true);
        true
    }

    /// Takes one attachment. `moves`: its addresses may have been others'.
    fn attach_own(&mut self, name: &AttachmentName, attached: Option<&Arc<Attached>>, moves: bool) -> bool {
        let Some(mesh) = self.mesh.clone() else { return false };
        let Some(key) = self.own.key(name) else { return false };
        let record = attached.and_then(|attached| record(attached, &self.own.node, &mesh.own));
        let record = record.map(|(_, record)| Arc::new(record));
        let before = self.attachments.get(&key).map(|attached| Arc::clone(&attached.record));
        if before == record {
            return false;
        }
        if moves {
            self.own.moved.extend(moved(before.as_deref(), record.as_deref()));
        }
        let age = self.own.echoes.get(&key).copied().unwrap_or(Revision::MAX);
        self.put_attachment(key, record, age, false);
        true
    }
}

/// Addresses that are one's and were not the same one's before, and the other way round.
fn moved(before: Option<&Attachment>, after: Option<&Attachment>) -> BTreeSet<IpAddr> {
    let addresses = |record: Option<&Attachment>| -> BTreeSet<IpAddr> {
        record.into_iter().flat_map(|record| record.addresses.iter().copied()).collect()
    };
    let owner = |record: &Attachment| (record.pod.namespace.clone(), record.pod.name.clone(), record.uid.clone());
    let same = before.map(owner) == after.map(owner);
    let (before, after) = (addresses(before), addresses(after));
    if same { before.symmetric_difference(&after).copied().collect() } else { before.union(&after).copied().collect() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cni::daemon::{Attach, Begin, PodReference};
    use control_core::objects::{Item, ObjectRecord};
    use mesh::topology::PeerId;
    use policy::{engine::End, object::PodObject, objects::Object};

    use super::*;
    use crate::{MeshFacts, NodeFacts, input::PolicyRecord, policy_inputs::PendingInput};

    const KEY: &str = "endpoints/own/c1/eth0";

    fn world(subnet: &str) -> PolicyInputs {
        let mut world = PolicyInputs::new("own".parse().unwrap());
        world.apply_pending(mesh(subnet));
        world
    }

    fn mesh(subnet: &str) -> PendingInput {
        let own = vec![subnet.parse().unwrap()];
        let node = NodeFacts {
            name: "one".into(),
            addresses: Vec::new(),
            prefixes: own.clone().into(),
            ..NodeFacts::default()
        };
        let nodes = [(PeerId::Node("own".parse().unwrap()), Arc::new(node))].into_iter().collect();
        let networks = vec!["10.244.0.0/16".parse().unwrap()];
        let facts = MeshFacts { networks, own, nodes, ..MeshFacts::default() };
        PendingInput { mesh: Some(Arc::new(facts)), complete: true, ..PendingInput::default() }
    }

    fn attached(id: &str, pod: &str, address: Option<&str>) -> (AttachmentName, Arc<Attached>) {
        let attach = address.map(|address| Attach {
            pod: PodReference {
                namespace: "shop".to_owned(),
                name: pod.to_owned(),
                uid: None,
                labels: BTreeMap::from([("app".to_owned(), pod.to_owned())]),
            },
            addresses: vec![address.parse().unwrap()],
            interface: "mesh1".to_owned(),
            mac: Some([2, 0, 0, 0, 0, 1]),
            allowed_sources: vec!["192.0.2.0/24".parse().unwrap(), "10.244.9.0/24".parse().unwrap()],
        });
        let begin = Begin { network: "mesh".to_owned(), netns: "/x".to_owned(), netns_inode: None, interface: None };
        let attached = Attached {
            container_id: id.to_owned(),
            ifname: "eth0".to_owned(),
            begin,
            allocated: Vec::new(),
            attach,
            boot_id: "b".to_owned(),
        };
        (attached.name(), Arc::new(attached))
    }

    fn table(generation: u64, attached: &[(AttachmentName, Arc<Attached>)]) -> PendingInput {
        let table = AttachmentTable { generation, attachments: attached.iter().cloned().collect() };
        PendingInput { attachments: Some(Arc::new(table)), ..PendingInput::default() }
    }

    /// Input with the value of the key in etcd, if any.
    fn echo(value: Option<(&str, Revision)>) -> PendingInput {
        let record = value.map(|(json, create_revision)| {
            let attachment = Attachment::parse(json.as_bytes()).unwrap();
            ObjectRecord {
                item: Item::new(PolicyRecord::Attachment(Arc::new(attachment))),
                create_revision,
                held: false,
            }
        });
        PendingInput {
            changes: [(Key::parse(KEY).unwrap(), record)].into(),
            revision: Some(9),
            ..PendingInput::default()
        }
    }

    fn owner(world: &mut PolicyInputs, address: &str) -> String {
        match world.commit().end(address.parse().unwrap()) {
            End::Pod(pod) => pod.name.to_string(),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn the_table_says_who_is_attached_here_and_etcd_does_not() {
        let mut world = world("10.244.3.0/24");
        let foreign =
            r#"{"pod": {"namespace": "shop", "name": "ghost"}, "addresses": ["10.244.3.7"], "interface": "v"}"#;
        world.apply_pending(echo(Some((foreign, 5))));
        assert_eq!(owner(&mut world, "10.244.3.7"), "UnknownPod");
        assert!(!world.is_complete(), "who is attached is not known");
        assert!(world.apply_pending(table(1, &[])));
        assert!(world.is_complete());
        // One that is being added has no address yet; one with an address of elsewhere has none here, but an interface.
        let pending = attached("c1", "db", None);
        assert!(!world.apply_pending(table(2, &[pending])));
        assert!(world.apply_pending(table(3, &[attached("c1", "db", Some("192.0.2.7"))])));
        assert_eq!(world.attachments(), 3);
        let db = attached("c1", "db", Some("10.244.3.7"));
        assert!(world.apply_pending(table(4, std::slice::from_ref(&db))));
        assert_eq!(owner(&mut world, "10.244.3.7"), "shop/db");
        assert!(!world.apply_pending(table(5, std::slice::from_ref(&db))), "the same again");
        world.apply_pending(echo(None));
        assert_eq!(owner(&mut world, "10.244.3.7"), "shop/db");
        assert!(world.apply_pending(table(6, &[])));
        assert_eq!(owner(&mut world, "10.244.3.7"), "UnknownPod");
        assert_eq!(world.attachments(), 6);
    }

    #[test]
    fn addresses_that_change_hands_are_told_and_those_of_a_start_are_not() {
        let mut world = PolicyInputs::new("own".parse().unwrap());
        let moved = |world: &mut PolicyInputs| {
            let moved: Vec<String> = world.moved().iter().map(ToString::to_string).collect();
            world.settled();
            moved
        };
        let db = attached("c1", "db", Some("10.244.3.7"));
        world.apply_pending(table(1, std::slice::from_ref(&db)));
        world.apply_pending(mesh("10.244.3.0/24"));
        assert_eq!(owner(&mut world, "10.244.3.7"), "shop/db");
        assert_eq!(moved(&mut world), [""; 0], "a restart cuts nothing");
        world.apply_pending(table(2, &[db.clone(), attached("c2", "web", Some("10.244.3.8"))]));
        assert_eq!(moved(&mut world), ["10.244.3.8"]);
        world.apply_pending(table(3, &[db, attached("c2", "api", Some("10.244.3.8"))]));
        assert_eq!(moved(&mut world), ["10.244.3.8"], "another pod");
        world.apply_pending(table(4, &[]));
        assert_eq!(moved(&mut world), ["10.244.3.7", "10.244.3.8"]);
    }

    #[test]
    fn an_attachment_whose_uid_no_pod_has_is_named() {
        let mut world = world("10.244.3.0/24");
        let mut own = attached("c1", "db", Some("10.244.3.7"));
        world.apply_pending(table(1, std::slice::from_ref(&own)));
        assert_eq!(world.unmatched(), [""; 0], "without a UID its labels are the configuration's");
        Arc::make_mut(&mut own.1).attach.as_mut().unwrap().pod.uid = Some("5f".to_owned());
        world.apply_pending(table(2, &[own]));
        let pod = |uid: &str, static_uid: Option<&str>| {
            let pod =
                PodObject { uid: Some(uid.into()), static_uid: static_uid.map(Into::into), ..PodObject::default() };
            let record = ObjectRecord {
                item: Item::new(PolicyRecord::Object(Object::Pod(pod))),
                create_revision: 3,
                held: false,
            };
            PendingInput {
                changes: [(Key::parse("pods/shop/db").unwrap(), Some(record))].into(),
                ..PendingInput::default()
            }
        };
        assert_eq!(world.unmatched(), ["shop/db (UID 5f)"]);
        world.apply_pending(pod("other", None));
        assert_eq!(world.unmatched(), ["shop/db (UID 5f)"]);
        for fits in [pod("5f", None), pod("other", Some("5f"))] {
            world.apply_pending(fits);
            assert_eq!(world.unmatched(), [""; 0]);
        }
        world.apply_pending(table(3, &[]));
        assert_eq!(world.unmatched(), [""; 0]);
    }

    #[test]
    fn interfaces_are_known_before_the_mesh_and_sources_of_others_do_not_count() {
        let mut world = PolicyInputs::new("own".parse().unwrap());
        let mut other = attached("c2", "far", Some("192.0.2.7"));
        let attach = Arc::make_mut(&mut other.1).attach.as_mut().unwrap();
        (attach.interface, attach.mac) = ("mesh2".to_owned(), None);
        world.apply_pending(table(1, &[attached("c1", "db", Some("10.244.3.7")), other]));
        let sources = |world: &PolicyInputs| {
            world.ports().into_iter().map(|(name, port)| (name, port.allowed_sources, port.in_mesh)).collect::<Vec<_>>()
        };
        let [first, second] = ["mesh1".to_owned(), "mesh2".to_owned()];
        assert_eq!(sources(&world), [(first.clone(), vec![], true), (second.clone(), vec![], true)]);
        world.apply_pending(mesh("10.244.3.0/24"));
        let free: Vec<IpNet> = vec!["192.0.2.0/24".parse().unwrap()];
        assert_eq!(sources(&world), [(first, free.clone(), true), (second, free, false)]);
        assert_eq!(
            world.refused_sources(),
            ["db", "far"].map(|pod| format!("10.244.9.0/24 of shop/{pod}: it overlaps 10.244.0.0/16, a mesh network"))
        );
    }

    #[test]
    fn attachments_follow_the_nodes_subnets() {
        let mut world = world("10.244.3.0/24");
        world.apply_pending(table(
            1,
            &[attached("c1", "db", Some("10.244.3.7")), attached("c2", "else", Some("192.0.2.7"))],
        ));
        assert_eq!(owner(&mut world, "10.244.3.7"), "shop/db");
        let (is_displaced, of) =
            (|world: &PolicyInputs| world.displaced().into_iter().collect::<Vec<_>>(), "10.244.3.7");
        assert_eq!(is_displaced(&world), [] as [IpAddr; 0]);
        world.apply_pending(mesh("10.244.4.0/24"));
        assert_eq!(owner(&mut world, of), "UnknownPod");
        assert_eq!(is_displaced(&world), [of.parse::<IpAddr>().unwrap()]);
        let port = &world.ports()["mesh1"];
        assert!(port.in_mesh && port.addresses.contains(&of.parse().unwrap()), "{port:?} is still judged");
        world.apply_pending(mesh("10.244.3.0/24"));
        assert_eq!(owner(&mut world, of), "shop/db");
        assert_eq!(is_displaced(&world), [] as [IpAddr; 0]);
    }

    #[test]
    fn the_address_of_a_pod_that_only_its_object_names_is_free_once_that_is_gone() {
        let pod = |address: Option<&str>| {
            let pod = address.map(|address| PodObject {
                addresses: vec![address.parse().unwrap()],
                node: Some("one".into()),
                ..PodObject::default()
            });
            let record = pod.map(|pod| ObjectRecord {
                item: Item::new(PolicyRecord::Object(Object::Pod(pod))),
                create_revision: 3,
                held: false,
            });
            PendingInput { changes: [(Key::parse("pods/shop/db").unwrap(), record)].into(), ..PendingInput::default() }
        };
        let mut world = world("10.244.3.0/24");
        let free = |world: &mut PolicyInputs| {
            let free: Vec<String> = world.moved().iter().map(ToString::to_string).collect();
            world.settled();
            free
        };
        world.apply_pending(table(1, &[]));
        world.apply_pending(pod(Some("10.244.3.7")));
        assert_eq!(free(&mut world), [""; 0], "its connections are its own");
        world.apply_pending(pod(Some("10.244.3.8")));
        assert_eq!(free(&mut world), ["10.244.3.7"]);
        world.apply_pending(pod(None));
        assert_eq!(free(&mut world), ["10.244.3.8"]);
        // Elsewhere, or attached: others say when that is over.
        world.apply_pending(pod(Some("10.244.9.7")));
        world.apply_pending(table(2, &[attached("c1", "db", Some("10.244.3.9"))]));
        world.settled();
        world.apply_pending(pod(Some("10.244.3.9")));
        world.apply_pending(pod(None));
        assert_eq!(free(&mut world), [""; 0]);
    }

    #[test]
    fn of_two_attachments_of_a_pod_the_newer_one_by_etcd_says_its_labels() {
        let mut world = world("10.244.3.0/24");
        let labels = |world: &mut PolicyInputs| match world.commit().end("10.244.3.7".parse().unwrap()) {
            End::Pod(pod) => format!("{:?}", pod.labels),
            other => format!("{other:?}"),
        };
        let first = attached("c1", "db", Some("10.244.3.7"));
        let mut second = attached("c2", "db", Some("10.244.3.8"));
        let attach = Arc::make_mut(&mut second.1).attach.as_mut().unwrap();
        attach.pod.labels = BTreeMap::from([("app".to_owned(), "other".to_owned())]);
        world.apply_pending(table(1, &[first, second]));
        let json = r#"{"pod": {"namespace": "shop", "name": "db"}, "addresses": ["10.244.3.7"], "interface": "v"}"#;
        // The other one is not written yet: it is newer than anything that is.
        assert!(world.apply_pending(echo(Some((json, 5)))));
        assert!(labels(&mut world).contains("other"), "{}", labels(&mut world));
        assert!(!world.apply_pending(echo(Some((json, 5)))), "nothing new");
    }
}
