//! `k8s/CLUSTER/state`: how far the copy of the cluster is.

use super::{KindInfo, KindRules};

pub(super) const KIND: KindInfo = KindInfo { place: "state", is_flat: false, rules: KindRules::UNREAD, fields: &[] };
