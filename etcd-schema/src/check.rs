//! Validation of any value before `etcdctl put`.

use crate::{Key, KeyError, UnknownField, Value, Violations, unknown::unknown_fields};

/// A valid key and its value.
#[derive(Debug)]
pub struct Checked {
    /// The parsed key.
    pub key: Key,
    /// A one-line summary for operators, without secrets and control characters.
    pub summary: String,
    /// Fields that are kept and not read.
    pub unknown: Vec<UnknownField>,
}

/// Why a key and its value do not hold.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The key is none of ours.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The value does not hold.
    #[error(transparent)]
    Value(#[from] Violations),
}

/// Judges `value` under `relative`, a key without its prefix, by itself (not against other records). The objects of
/// Kubernetes are left to `policy`.
///
/// # Errors
/// When either does not hold.
pub fn check(relative: &str, value: &[u8]) -> Result<Checked, CheckError> {
    let key = Key::parse(relative)?;
    let summary = match Value::parse(&key, value) {
        Some(read) => read?.summary(&key),
        None => format!("{key}; its value is not checked here"),
    };
    let unknown = unknown_fields(&key, value);
    Ok(Checked { key, summary, unknown })
}
