//! Errors in the specification's form: code, message and details, as JSON on standard output.

use serde::{Deserialize, Serialize};

use crate::version::CniVersion;

/// The error code that the runtime gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Code {
    /// 1: the configuration has a version that is not supported.
    IncompatibleVersion,
    /// 2: a field of the configuration has a value that is not supported.
    UnsupportedField,
    /// 3: there is no such container or attachment.
    UnknownContainer,
    /// 4: an environment variable is missing or malformed.
    InvalidEnvironment,
    /// 5: reading or writing failed.
    Io,
    /// 6: the input is not JSON of the expected form.
    Decode,
    /// 7: the configuration does not hold.
    InvalidConfig,
    /// 11: not now; trying again later may succeed.
    TryAgainLater,
    /// 50: no container can be added now.
    NotAvailable,
    /// 51: no container can be added now, and those that are there may not reach all.
    LimitedConnectivity,
    /// 100: the node daemon cannot be reached, or does not answer.
    DaemonUnreachable,
    /// 101: the node has no subnet to give addresses from.
    NoSubnet,
    /// 102: the node daemon answered something else than this plugin understands: they are of different versions.
    DaemonDiffers,
    /// 103: no address: none is left, the requested one is in use, or the IPAM plugin failed, whose own code and
    /// message are in the message.
    NoAddress,
    /// 104: the kernel refused.
    Kernel,
    /// 105: CHECK found the attachment other than it was made.
    NotAsMade,
}

impl Code {
    /// The number.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::UnsupportedField => 2,
            Self::UnknownContainer => 3,
            Self::InvalidEnvironment => 4,
            Self::Io => 5,
            Self::Decode => 6,
            Self::InvalidConfig => 7,
            Self::TryAgainLater => 11,
            Self::NotAvailable => 50,
            Self::LimitedConnectivity => 51,
            Self::DaemonUnreachable => 100,
            Self::NoSubnet => 101,
            Self::DaemonDiffers => 102,
            Self::NoAddress => 103,
            Self::Kernel => 104,
            Self::NotAsMade => 105,
        }
    }
}

/// Why a command failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CniError {
    /// The kind of failure.
    pub code: Code,
    /// The message for operators.
    pub message: String,
    /// Details of the cause, or the remedy.
    pub details: String,
}

impl CniError {
    /// Without details.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }

    /// With details.
    #[must_use]
    pub fn details(self, details: impl Into<String>) -> Self {
        Self { details: details.into(), ..self }
    }

    /// Prefixes the message with the failed operation.
    #[must_use]
    pub fn when(self, doing: &str) -> Self {
        Self { message: format!("{doing}: {}", self.message), ..self }
    }

    /// The form on standard output.
    #[must_use]
    pub(crate) fn to_wire(&self, version: CniVersion) -> WireError {
        WireError {
            cni_version: version.as_str().to_owned(),
            code: self.code.number(),
            msg: self.message.clone(),
            details: self.details.clone(),
        }
    }
}

/// An error in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireError {
    /// Version of the specification that the configuration has.
    #[serde(rename = "cniVersion", default)]
    pub cni_version: String,
    /// The number.
    pub code: u32,
    /// The message.
    #[serde(default)]
    pub msg: String,
    /// The details.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}
