//! `clusternetworkpolicies/NAME`: a ClusterNetworkPolicy object.

use super::{KindInfo, KindRules, RecordClass};

pub(super) const KIND: KindInfo = KindInfo {
    place: "clusternetworkpolicies/",
    is_flat: true,
    rules: KindRules::policy(RecordClass::Policy),
    fields: &[],
};
