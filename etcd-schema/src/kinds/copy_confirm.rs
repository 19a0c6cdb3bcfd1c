//! `k8s/CLUSTER/confirm`: an operator's answer to what the copy of the cluster waits for.

use super::{Kind, Rules};

pub(super) const KIND: Kind = Kind { place: "confirm", is_flat: false, rules: Rules::UNREAD, fields: &[] };
