//! What an operator should know.

use std::fmt;

use control_core::types::CallError;

use crate::ObjectKind;

/// Something to log.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// A list lacks so much that it is taken again.
    ListDoubted {
        /// Of which kind.
        kind: ObjectKind,
        /// How many keys it lacks.
        absent: usize,
        /// Of how many.
        total: usize,
    },
    /// The second list lacks as much: the deletions wait.
    DeletionsHeld {
        /// Of which kind.
        kind: ObjectKind,
        /// How many.
        absent: usize,
        /// Of how many.
        total: usize,
        /// The token that releases them.
        token: String,
    },
    /// They wait no longer.
    DeletionsReleased {
        /// Of which kind.
        kind: ObjectKind,
        /// How many.
        count: usize,
    },
    /// Policies wait for nodes that do not read them.
    PoliciesHeld {
        /// The number, the nodes and the remedy.
        reason: String,
    },
    /// The API server's data is refused, and nothing is written.
    Refused {
        /// Why.
        refusal: String,
        /// The token that accepts it.
        token: Option<String>,
    },
    /// The API server's data is accepted again.
    Accepted {
        /// Why it was not.
        refusal: String,
    },
    /// The value of `state` is not one.
    UnreadableState,
    /// An operator's token matches no finding.
    UnknownToken {
        /// The token.
        token: String,
    },
}

/// Why a term ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Resigned {
    /// Another leader's term has begun, or someone else wrote below the cluster's root.
    #[error("the leader key, the state or a key to delete was changed by another writer")]
    Fenced,
    /// etcd did not answer: whether the transaction happened is not known.
    #[error("{0}")]
    Doubt(CallError),
    /// The API server is that of another cluster, or of one that is not there yet.
    #[error("the API server is not that of the copied cluster")]
    Refused,
    /// The API server did not answer for long.
    #[error("the API server does not answer")]
    Silent,
    /// An operator confirmed that the cluster is to be adopted as it is.
    #[error("confirmed by an operator: the cluster is adopted as it is")]
    Confirmed,
}

impl Notice {
    /// Whether the copy is paused, wholly or partly.
    #[must_use]
    pub const fn is_error(&self) -> bool {
        matches!(
            self,
            Self::DeletionsHeld { .. } | Self::PoliciesHeld { .. } | Self::Refused { .. } | Self::UnreadableState
        )
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ListDoubted { kind, absent, total } => {
                write!(f, "a list lacks {absent} of {total} {}: listing again", kind.plural())
            }
            Self::DeletionsHeld { kind, absent, total, token } => write!(
                f,
                "{absent} of {total} {} are gone from the API server: deletions wait 60 seconds, or for the token {token}",
                kind.plural()
            ),
            Self::PoliciesHeld { reason } => f.write_str(reason),
            Self::DeletionsReleased { kind, count } => write!(f, "deleting {count} {}", kind.plural()),
            Self::Refused { refusal, token: Some(token), .. } => {
                write!(f, "nothing is copied: {refusal}; the token {token} adopts it as it is")
            }
            Self::Refused { refusal, token: None, .. } => write!(f, "nothing is copied: {refusal}"),
            Self::Accepted { refusal } => write!(f, "copying again; before: {refusal}"),
            Self::UnreadableState => {
                f.write_str("nothing is copied: the value of state is unreadable; the token state deletes it")
            }
            Self::UnknownToken { token } => write!(f, "the confirmation {token:?} is for nothing that waits now"),
        }
    }
}
