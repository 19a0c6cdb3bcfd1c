//! `k8s/CLUSTER/leader`: which program copies the objects of the cluster.

use super::{KindInfo, KindRules};

pub(super) const KIND: KindInfo = KindInfo { place: "leader", is_flat: false, rules: KindRules::UNREAD, fields: &[] };
