//! `networkpolicies/NS/NAME`: a NetworkPolicy object.

use super::{KindInfo, KindRules, RecordClass};

pub(super) const KIND: KindInfo =
    KindInfo { place: "networkpolicies/", is_flat: true, rules: KindRules::policy(RecordClass::Policy), fields: &[] };
