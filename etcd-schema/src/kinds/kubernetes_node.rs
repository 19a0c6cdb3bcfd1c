//! `k8s/CLUSTER/nodes/NAME`: a Node object.

use super::{KindInfo, KindRules, RecordClass};

pub(super) const KIND: KindInfo =
    KindInfo { place: "nodes/", is_flat: false, rules: KindRules::policy(RecordClass::Object), fields: &[] };
