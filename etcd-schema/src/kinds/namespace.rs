//! `namespaces/NS`: a Namespace object.

use super::{Kind, RecordClass, Rules};

pub(super) const KIND: Kind =
    Kind { place: "namespaces/", is_flat: true, rules: Rules::policy(RecordClass::Object), fields: &[] };
