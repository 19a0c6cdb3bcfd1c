//! Exit codes, and the errors with a specific code.

use api::ClientError;

pub(crate) const FAILED: u8 = 1;
pub(crate) const USAGE: u8 = 2;
pub(crate) const NOT_REACHABLE: u8 = 3;
pub(crate) const DEGRADED: u8 = 4;
pub(crate) const NOT_FOUND: u8 = 5;
pub(crate) const DENIED: u8 = 6;

/// A mistake in the call.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// What was named does not exist.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct NotFound(pub(crate) String);

pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Unreachable { .. } | ClientError::NotAllowed(_) | ClientError::Broken { .. }) => {
            NOT_REACHABLE
        }
        Some(ClientError::NotFound(_)) => NOT_FOUND,
        Some(ClientError::Invalid(_)) => USAGE,
        _ if error.is::<Usage>() => USAGE,
        _ if error.is::<NotFound>() => NOT_FOUND,
        _ => FAILED,
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_daemon_that_does_not_answer_is_not_reachable() {
        let refused = || io::Error::from(io::ErrorKind::ConnectionReset);
        for (error, code) in [
            (ClientError::Unreachable { socket: String::new(), source: refused() }, 3),
            (ClientError::NotAllowed(String::new()), 3),
            (ClientError::Broken { socket: String::new(), source: refused() }, 3),
            (ClientError::NotFound(String::new()), 5),
            (ClientError::Malformed(String::new()), 1),
        ] {
            assert_eq!(exit_code(&error.into()), code);
        }
        assert_eq!(exit_code(&Usage(String::new()).into()), 2);
    }
}
