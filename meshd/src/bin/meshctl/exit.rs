//! Exit codes, and the errors with a specific code.

use api::ClientError;
use text::with_causes;

pub(crate) const FAILED: u8 = 1;
pub(crate) const USAGE: u8 = 2;
pub(crate) const NOT_REACHABLE: u8 = 3;
pub(crate) const DEGRADED: u8 = 4;
pub(crate) const NOT_FOUND: u8 = 5;
pub(crate) const DENIED: u8 = 6;

/// A mistake in the call.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

/// A named object does not exist.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct NotFound(pub(crate) String);

/// Several mistakes in the call, each printed on a line of its own.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub(crate) struct Mistakes(pub(crate) Vec<String>);

/// A failure with its remedy, which is printed on a line of its own.
#[derive(Debug, thiserror::Error)]
#[error("{cause}")]
pub(crate) struct Remedied {
    pub(crate) cause: String,
    pub(crate) remedy: String,
}

/// The lines of an error. Other line breaks come from inserted text of users or etcd.
pub(crate) fn lines(error: &anyhow::Error) -> Vec<String> {
    if let Some(Mistakes(mistakes)) = error.downcast_ref() {
        return mistakes.clone();
    }
    let mut lines = vec![with_causes(error.as_ref())];
    lines.extend(error.downcast_ref().map(|Remedied { remedy, .. }| format!("  remedy  {remedy}")));
    lines
}

pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Unreachable { .. } | ClientError::NotAllowed(_) | ClientError::Broken { .. }) => {
            NOT_REACHABLE
        }
        Some(ClientError::NotFound(_)) => NOT_FOUND,
        Some(ClientError::Invalid(_)) => USAGE,
        _ if error.is::<UsageError>() || error.is::<Mistakes>() => USAGE,
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
        assert_eq!(exit_code(&UsageError(String::new()).into()), 2);
        assert_eq!(exit_code(&Mistakes(Vec::new()).into()), 2);
    }

    #[test]
    fn a_remedy_is_a_line_of_its_own_behind_the_whole_cause() {
        let remedied = Remedied { cause: "etcd is away".to_owned(), remedy: "start it".to_owned() };
        let error = anyhow::Error::from(remedied).context("not removed");
        assert_eq!(lines(&error), ["not removed: etcd is away", "  remedy  start it"]);
        assert_eq!(lines(&Mistakes(vec!["a".to_owned(), "b".to_owned()]).into()), ["a", "b"]);
    }
}
