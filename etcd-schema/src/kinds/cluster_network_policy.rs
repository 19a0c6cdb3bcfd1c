//! `clusternetworkpolicies/NAME`: a ClusterNetworkPolicy object.

use super::{Kind, RecordClass, Rules};

pub(super) const KIND: Kind =
    Kind { place: "clusternetworkpolicies/", is_flat: true, rules: Rules::policy(RecordClass::Policy), fields: &[] };
