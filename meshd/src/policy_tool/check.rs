//! `meshctl check`: validates a value like the daemon, including a policy's spec.

use etcd_schema::{BackendKind, CheckError as SchemaError, Checked, Key, NetworkConfig};
use mesh::backend::is_supported;
use policy::objects;

/// Why a value does not hold.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ValueError {
    /// The key or the value is not of its form.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// The configuration is valid, but needs a backend that this version lacks.
    #[error("Backend.Type: \"{0}\" is not supported by this version; use \"wireguard\"")]
    Backend(BackendKind),
}

/// Validates `value` under `relative`, a key without its prefix. The summary of a policy is its parsed form.
///
/// # Errors
/// When either does not hold.
pub fn check(relative: &str, value: &[u8]) -> Result<Checked, ValueError> {
    let mut checked = etcd_schema::check(relative, value)?;
    match &checked.key {
        Key::Config => {
            let kind = NetworkConfig::parse(value).map_err(SchemaError::from)?.backend.kind;
            if !is_supported(kind) {
                return Err(ValueError::Backend(kind));
            }
        }
        Key::Kubernetes(_, key) if objects::is_read(key) => {
            let read = objects::read(key, value, false).map_err(|refusal| SchemaError::from(refusal.violations))?;
            checked.summary = objects::summary(key, &read.object);
        }
        _ => {}
    }
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_that_the_daemon_does_not_have_is_refused_here_too() {
        let config = |kind: &str| format!(r#"{{"Network": "10.244.0.0/16", "Backend": {{"Type": "{kind}"}}}}"#);
        assert!(check("config", config("wireguard").as_bytes()).is_ok());
        let error = check("config", config("udp").as_bytes()).unwrap_err();
        assert!(error.to_string().contains("Backend.Type: \"udp\""), "{error}");
    }
}
