//! A mesh for the tests of this crate.

use std::{collections::BTreeMap, sync::Arc};

use control_core::{core::ControlStatus, membership::MembershipState};
use etcd_schema::{Alive, Key, NetworkConfig, NodeId, NodeRecord, PublicKey, SubnetKey, SubnetLease};
use mesh::{
    address::Family,
    plan::{Local, UnderlayLink},
    records::{Record, Records},
};

const CONFIG: &str = r#"{"Network": "10.244.0.0/16", "LeaseTTL": 60}"#;

pub(crate) fn record<T>(value: T, revision: i64) -> Record<T> {
    Record { value: Arc::new(value), create_revision: revision, mod_revision: revision, lease: None, retained: None }
}

/// Records of so many nodes, n1 with 10.244.1.0/24 and so on, on one underlay network of one site.
pub(crate) fn records(nodes: u8) -> Records {
    let mut records = Records {
        synced: true,
        config: Some(record(NetworkConfig::parse(CONFIG.as_bytes()).unwrap(), 1)),
        ..Records::default()
    };
    for n in 1..=nodes {
        let key = PublicKey::from_bytes([n + 9; 32]);
        let json = format!(
            r#"{{"name": "node-{n}", "site": "s", "publicKey": "{key}", "listenPort": 51820,
                "endpoints": ["192.0.2.{n}:51820"], "addresses": ["192.0.2.{n}/24"], "version": "1"}}"#
        );
        let id: NodeId = format!("n{n}").parse().unwrap();
        records.nodes.insert(id.clone(), record(NodeRecord::parse(json.as_bytes()).unwrap(), n.into()));
        let lease = format!(r#"{{"PublicIP": "192.0.2.{n}", "Node": "{id}"}}"#);
        records.subnets.insert(subnet(n), record(SubnetLease::parse(lease.as_bytes()).unwrap(), n.into()));
    }
    records
}

pub(crate) fn alive(start: u64) -> Record<Alive> {
    let json = format!(r#"{{"bootId": "b", "startCount": {start}, "incarnation": 7}}"#);
    record(Alive::parse(json.as_bytes()).unwrap(), 9)
}

pub(crate) fn subnet(n: u8) -> SubnetKey {
    match Key::parse(&format!("subnets/10.244.{n}.0-24")) {
        Ok(Key::Subnet(key)) => key,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn status(state: MembershipState, subnet: Option<SubnetKey>) -> ControlStatus {
    ControlStatus {
        connected: true,
        endpoint: None,
        error: None,
        revision: 1,
        known_until: None,
        state,
        subnet,
        holds_identity: true,
        problems: Vec::new(),
        no_kubernetes_objects: false,
        copies: Default::default(),
        lists: 1,
        audit_differences: 0,
    }
}

pub(crate) fn joined() -> ControlStatus {
    status(MembershipState::Joined { subnet: subnet(1) }, Some(subnet(1)))
}

pub(crate) fn local() -> Local {
    let link = UnderlayLink {
        name: "eth0".parse().unwrap(),
        index: 2,
        mtu: 1500,
        addresses: vec!["192.0.2.1/24".parse().unwrap()],
    };
    Local {
        vteps: BTreeMap::new(),
        site: Some("s".to_owned()),
        underlay: BTreeMap::from([(Family::V4, link)]),
        has_endpoint: true,
        listen_port: 51820,
        protected: Vec::new(),
        ip_masq: false,
        forward_accept: false,
    }
}
