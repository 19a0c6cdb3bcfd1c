//! `pods/NS/NAME`: a Pod object.

use super::{KindInfo, KindRules, RecordClass};

pub(super) const KIND: KindInfo =
    KindInfo { place: "pods/", is_flat: true, rules: KindRules::policy(RecordClass::Object), fields: &[] };
