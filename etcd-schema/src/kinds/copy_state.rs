//! `k8s/CLUSTER/state`: how far the copy of the cluster is.

use super::{Kind, Rules};

pub(super) const KIND: Kind = Kind { place: "state", is_flat: false, rules: Rules::UNREAD, fields: &[] };
