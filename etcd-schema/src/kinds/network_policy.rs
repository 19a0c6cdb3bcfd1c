//! `networkpolicies/NS/NAME`: a NetworkPolicy object.

use super::{Kind, RecordClass, Rules};

pub(super) const KIND: Kind =
    Kind { place: "networkpolicies/", is_flat: true, rules: Rules::policy(RecordClass::Policy), fields: &[] };
