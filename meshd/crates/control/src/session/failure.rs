//! Classifies the client crate's errors for callers: done, perhaps done, or refused.

use std::future::Future;

use control_core::types::CallError;
use etcd_client::Error;
use text::followed_by;

use super::CALL_DEADLINE;

/// A failed call, before it is classified for the caller.
#[derive(Debug)]
pub(super) enum CallFailure {
    Deadline,
    Etcd(Error),
}

impl From<Error> for CallFailure {
    fn from(error: Error) -> Self {
        Self::Etcd(error)
    }
}

/// Numbers of the gRPC status codes in use.
mod code {
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const NOT_FOUND: i32 = 5;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(super) const FAILED_PRECONDITION: i32 = 9;
    pub(super) const OUT_OF_RANGE: i32 = 11;
    pub(super) const UNIMPLEMENTED: i32 = 12;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

impl CallFailure {
    fn status(&self) -> Option<(i32, &str)> {
        match self {
            Self::Etcd(Error::GRpcStatus(status)) => Some((status.code() as i32, status.message())),
            _ => None,
        }
    }

    /// Why the TLS library does not take certificates or key: the only fault that the client crate reports of the
    /// transport itself, before it sends anything.
    pub(super) fn of_tls_files(&self) -> Option<String> {
        match self {
            Self::Etcd(error @ Error::TransportError(transport)) => {
                let text = followed_by(error.to_string(), std::error::Error::source(transport));
                Some(text.trim_start_matches("transport error: ").to_owned())
            }
            _ => None,
        }
    }

    pub(super) fn is_stale_token(&self) -> bool {
        self.status().is_some_and(|(code, message)| {
            code == code::UNAUTHENTICATED
                || message.contains("invalid auth token")
                || (code == code::INVALID_ARGUMENT && message.contains("revision of auth store is old"))
        })
    }

    pub(super) fn is_compacted(&self) -> bool {
        self.status().is_some_and(|(code, message)| code == code::OUT_OF_RANGE && message.contains("compacted"))
    }

    pub(super) fn is_too_long(&self) -> bool {
        self.status().is_some_and(|(code, message)| {
            (code == code::OUT_OF_RANGE && message.contains("too large"))
                || (code == code::RESOURCE_EXHAUSTED && message.contains("larger than max"))
        })
    }
}

pub(super) fn classify(failure: CallFailure) -> CallError {
    match failure.status() {
        Some((code::NOT_FOUND, message)) if message.contains("lease not found") => CallError::LeaseNotFound,
        Some((
            code::INVALID_ARGUMENT
            | code::NOT_FOUND
            | code::PERMISSION_DENIED
            | code::RESOURCE_EXHAUSTED
            | code::FAILED_PRECONDITION
            | code::OUT_OF_RANGE
            | code::UNIMPLEMENTED
            | code::UNAUTHENTICATED,
            message,
        )) => CallError::Refused(message.to_owned()),
        _ => CallError::Indeterminate(match &failure {
            CallFailure::Deadline => format!("no answer within {CALL_DEADLINE:?}"),
            CallFailure::Etcd(error) => with_causes(error),
        }),
    }
}

/// An error with its causes: "transport error" or "tcp connect error" alone explain nothing.
fn with_causes(error: &Error) -> String {
    match error {
        Error::GRpcStatus(status) => followed_by(status.message().to_owned(), std::error::Error::source(status)),
        Error::TransportError(transport) => followed_by(error.to_string(), std::error::Error::source(transport)),
        _ => error.to_string(),
    }
}

pub(super) async fn bounded<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, CallFailure> {
    match tokio::time::timeout(CALL_DEADLINE, call).await {
        Ok(result) => result.map_err(CallFailure::Etcd),
        Err(_) => Err(CallFailure::Deadline),
    }
}

pub(super) async fn within_deadline<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, CallError> {
    bounded(call).await.map_err(classify)
}
