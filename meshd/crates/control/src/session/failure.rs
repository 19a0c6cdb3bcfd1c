//! Classifies the client crate's errors: whether the call took effect, and the kind of failure.
//!
//! etcd names its errors by status code and message, as its own client does. Errors of the system keep their type on the
//! way. Those of the TLS library and the resolver keep it only in part, so their text decides last.

use std::{error::Error as StdError, future::Future, io};

use control_core::types::{CallError, EtcdFailure, FailureKind};
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
    pub(super) const DEADLINE_EXCEEDED: i32 = 4;
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

    /// The kind of failure.
    pub(super) fn kind(&self) -> FailureKind {
        match self {
            Self::Deadline => FailureKind::Silent,
            Self::Etcd(error) => match error {
                Error::GRpcStatus(status) if StdError::source(status).is_none() => {
                    of_status(status.code() as i32, status.message())
                }
                Error::GRpcStatus(status) => of_transport(status),
                Error::TransportError(transport) => of_transport(transport),
                Error::IoError(error) => of_io(error.kind()).unwrap_or(FailureKind::Other),
                _ => FailureKind::Other,
            },
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
        )) => CallError::Refused(EtcdFailure::new(failure.kind(), message)),
        _ => {
            let text = match &failure {
                CallFailure::Deadline => format!("no answer within {CALL_DEADLINE:?}"),
                CallFailure::Etcd(error) => with_causes(error),
            };
            CallError::Indeterminate(EtcdFailure::new(failure.kind(), text))
        }
    }
}

/// The kind of an error that etcd returned. Its messages are constants of etcd's protocol (`rpctypes`).
fn of_status(code: i32, message: &str) -> FailureKind {
    match (code, message) {
        (code::PERMISSION_DENIED, _) => FailureKind::Rights,
        (code::RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded") => FailureKind::Quota,
        (code::UNAUTHENTICATED, _)
        | (
            _,
            "etcdserver: authentication failed, invalid user ID or password"
            | "etcdserver: authentication is not enabled"
            | "etcdserver: invalid auth management"
            | "etcdserver: invalid auth token"
            | "etcdserver: user name is empty",
        ) => FailureKind::User,
        (
            _,
            "etcdserver: request timed out"
            | "etcdserver: request timed out, possibly due to previous leader failure"
            | "etcdserver: request timed out, possibly due to connection lost"
            | "etcdserver: request timed out, waiting for the applied index took too long",
        )
        | (code::DEADLINE_EXCEEDED, _) => FailureKind::Silent,
        _ => FailureKind::Other,
    }
}

/// The kind of an error on the way to etcd, by its causes.
fn of_transport(error: &(dyn StdError + 'static)) -> FailureKind {
    let (mut cause, mut texts) = (Some(error), Vec::new());
    while let Some(error) = cause {
        // The TLS library's errors are wrapped in one of the system's.
        let of_system = error.downcast_ref::<io::Error>().filter(|error| error.get_ref().is_none());
        if let Some(kind) = of_system.and_then(|error| of_io(error.kind())) {
            return kind;
        }
        texts.push(error.to_string());
        cause = error.source();
    }
    of_text(&texts)
}

fn of_io(kind: io::ErrorKind) -> Option<FailureKind> {
    match kind {
        io::ErrorKind::ConnectionRefused => Some(FailureKind::Refused),
        io::ErrorKind::TimedOut => Some(FailureKind::Silent),
        _ => None,
    }
}

/// The kind of an error of the TLS library or the resolver.
fn of_text(causes: &[String]) -> FailureKind {
    const WORDS: [(FailureKind, &[&str]); 4] = [
        (FailureKind::NotTls, &["tls handshake eof", "corrupt message"]),
        (FailureKind::Tls, &["certificate", "fatal alert", "handshake", "tls", "InvalidMessage", "DecryptError"]),
        (FailureKind::UnknownHost, &["dns error", "failed to lookup"]),
        (FailureKind::Silent, &["deadline", "timed out"]),
    ];
    let has = |words: &[&str]| causes.iter().any(|cause| words.iter().any(|word| cause.contains(word)));
    WORDS.iter().find(|(_, words)| has(words)).map_or(FailureKind::Other, |(kind, _)| *kind)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etcds_errors_have_kinds() {
        for (code, message, kind) in [
            (code::INVALID_ARGUMENT, "etcdserver: user name is empty", FailureKind::User),
            (
                code::INVALID_ARGUMENT,
                "etcdserver: authentication failed, invalid user ID or password",
                FailureKind::User,
            ),
            (code::INVALID_ARGUMENT, "etcdserver: request is too large", FailureKind::Other),
            (code::PERMISSION_DENIED, "etcdserver: permission denied", FailureKind::Rights),
            (code::RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", FailureKind::Quota),
        ] {
            assert_eq!(of_status(code, message), kind, "{message}");
        }
    }

    #[test]
    fn a_cause_decides_by_its_type_before_its_text() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let wrapped = io::Error::other(Wrapped(refused));
        assert_eq!(of_transport(&wrapped), FailureKind::Refused);
        let tls = io::Error::new(io::ErrorKind::InvalidData, "invalid peer certificate: UnknownIssuer");
        assert_eq!(of_transport(&tls), FailureKind::Tls);
        let unknown = io::Error::other("dns error: failed to lookup address information");
        assert_eq!(of_transport(&unknown), FailureKind::UnknownHost);
    }

    #[derive(Debug, thiserror::Error)]
    #[error("tcp connect error")]
    struct Wrapped(#[source] io::Error);
}
