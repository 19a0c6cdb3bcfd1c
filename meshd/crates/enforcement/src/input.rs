//! Reads the records that policies are made of.

use std::sync::Arc;

use control_core::objects::{Item, ReadObject, RefusedObject};
use etcd_schema::{Attachment, Key, Violations};
use policy::objects::{self, Object};

/// A record that policies are made of.
#[derive(Debug, Clone)]
pub(super) enum PolicyRecord {
    /// An object of Kubernetes.
    Object(Object),
    /// An attachment, valid only while its addresses are in a subnet of its node.
    Attachment(Arc<Attachment>),
}

impl PolicyRecord {
    fn item(object: Object) -> Item {
        Item::new(Self::Object(object))
    }
}

pub(super) fn read(key: &Key, bytes: &[u8], rewritten: bool) -> Result<ReadObject, RefusedObject> {
    let refused = |violations| RefusedObject { violations, stand_in: None, effect: "it has no effect".to_owned() };
    match key {
        // A cluster's API server has accepted the objects below its prefix: they are in force from their first write.
        Key::Kubernetes(cluster, key) => match objects::read(key, bytes, rewritten || !cluster.is_flat()) {
            Ok(reading) => {
                Ok(ReadObject { item: PolicyRecord::item(reading.object), canonical: reading.canonical.into() })
            }
            Err(refusal) => Err(RefusedObject {
                effect: objects::effect(key, refusal.stand_in.as_deref()),
                stand_in: refusal.stand_in.map(|object| PolicyRecord::item(*object)),
                violations: refusal.violations,
            }),
        },
        Key::Endpoint(..) => {
            let attachment = Attachment::parse(bytes).map_err(refused)?;
            Ok(ReadObject { item: Item::new(PolicyRecord::Attachment(Arc::new(attachment))), canonical: bytes.into() })
        }
        other => Err(refused(Violations::one("", other.to_string(), "policies are made of no such record"))),
    }
}

#[cfg(test)]
mod tests {
    use policy::engine::PolicyState;

    use super::*;

    #[test]
    fn a_mirrored_policy_that_cannot_be_read_isolates_its_namespace_at_its_first_write() {
        let stand_in = |key: &str, rewritten| {
            let refused = read(&Key::parse(key).unwrap(), b"{\"spec\": 7", rewritten).unwrap_err();
            assert_eq!(refused.effect.contains("isolated"), refused.stand_in.is_some(), "{}", refused.effect);
            refused.stand_in.is_some_and(|item| {
                let input = item.into_read::<PolicyRecord>().unwrap();
                matches!(input, PolicyRecord::Object(Object::NetworkPolicy(PolicyState::IsolatesNamespace)))
            })
        };
        assert!(stand_in("k8s/east/networkpolicies/shop/p", false));
        assert!(!stand_in("networkpolicies/shop/p", false));
        assert!(stand_in("networkpolicies/shop/p", true));
    }
}
