//! `k8s/CLUSTER/nodes/NAME`: a Node object.

use super::{Kind, RecordClass, Rules};

pub(super) const KIND: Kind =
    Kind { place: "nodes/", is_flat: false, rules: Rules::policy(RecordClass::Object), fields: &[] };
