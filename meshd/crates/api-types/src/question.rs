//! What the API is asked about policies.

/// May SRC begin this with DST?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// `NS/POD` or an address.
    pub source: String,
    /// `NS/POD` or an address.
    pub destination: String,
    /// `PROTO/PORT`; protocols without ports stand alone.
    pub service: String,
}

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QuestionError {
    /// The query is malformed.
    #[error("{0}")]
    Invalid(String),
    /// The query names an unknown object.
    #[error("{0}")]
    NotFound(String),
}
