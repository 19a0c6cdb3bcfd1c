//! `k8s/CLUSTER/confirm`: an operator's answer to what the copy of the cluster waits for.

use super::{KindInfo, KindRules};

pub(super) const KIND: KindInfo = KindInfo { place: "confirm", is_flat: false, rules: KindRules::UNREAD, fields: &[] };
