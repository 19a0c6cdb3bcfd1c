//! `namespaces/NS`: a Namespace object.

use super::{KindInfo, KindRules, RecordClass};

pub(super) const KIND: KindInfo =
    KindInfo { place: "namespaces/", is_flat: true, rules: KindRules::policy(RecordClass::Object), fields: &[] };
