//! `pods/NS/NAME`: a Pod object.

use super::{Kind, RecordClass, Rules};

pub(super) const KIND: Kind =
    Kind { place: "pods/", is_flat: true, rules: Rules::policy(RecordClass::Object), fields: &[] };
