//! `k8s/CLUSTER/leader`: which program copies the objects of the cluster.

use super::{Kind, Rules};

pub(super) const KIND: Kind = Kind { place: "leader", is_flat: false, rules: Rules::UNREAD, fields: &[] };
