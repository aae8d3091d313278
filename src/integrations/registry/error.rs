//! What can go wrong between us and a registry, and what that means to a caller.

use std::time::Duration;

use crate::core::error::{Error, Kind};
use crate::core::ids::Digest;

/// A failed request. Every message names the host and what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No connection, or it broke.
    #[error("registry {host}: {what}: connection failed")]
    Unreachable {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// The failure, without its URL.
        #[source]
        source: reqwest::Error,
    },
    /// Nothing came for too long.
    #[error("registry {host}: {what}: no progress for {} s", after.as_secs_f32())]
    Timeout {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// How long.
        after: Duration,
    },
    /// An answer other than success.
    #[error("registry {host}: {what}: answer {status}{message}")]
    Status {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// HTTP status.
        status: u16,
        /// What the registry says, after ": ", or "".
        message: String,
    },
    /// An answer that is longer than it may be.
    #[error("registry {host}: {what}: longer than {limit} bytes")]
    TooLarge {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// Limit.
        limit: u64,
    },
    /// Content that is not what was asked for.
    #[error("registry {host}: {what}: got {got}")]
    Digest {
        /// Host and port.
        host: String,
        /// What was asked for, with its digest.
        what: String,
        /// Digest of what came.
        got: Digest,
    },
    /// An answer that makes no sense.
    #[error("registry {host}: {what}: {why}")]
    Protocol {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// The node's credentials for the host can't be had.
    #[error("registry {host}: its credentials")]
    Credentials {
        /// Host and port.
        host: String,
        /// What failed.
        #[source]
        source: Error,
    },
    /// The client for the host can't be made.
    #[error("registry {host}: {what}")]
    Setup {
        /// Host and port.
        host: String,
        /// What failed.
        what: String,
        /// The failure.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl RegistryError {
    /// What it means to the caller.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Unreachable { .. } => Kind::Unavailable,
            Self::Timeout { .. } => Kind::DeadlineExceeded,
            Self::Status { status, .. } => match status {
                401 | 403 => Kind::PermissionDenied,
                404 => Kind::NotFound,
                429 => Kind::ResourceExhausted,
                400..=499 => Kind::FailedPrecondition,
                _ => Kind::Unavailable,
            },
            Self::TooLarge { .. } => Kind::InvalidArgument,
            Self::Digest { .. } | Self::Protocol { .. } => Kind::Internal,
            Self::Setup { .. } => Kind::FailedPrecondition,
            Self::Credentials { source, .. } => source.kind(),
        }
    }

    /// Whether plain HTTP where TLS is spoken, or the reverse, would look like this.
    pub(super) fn may_be_wrong_scheme(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Status { status: 400, .. })
    }
}

impl From<RegistryError> for Error {
    fn from(e: RegistryError) -> Self {
        let (kind, message) = (e.kind(), e.to_string());
        match e {
            RegistryError::Unreachable { source, .. } => Error::because(kind, message, source),
            RegistryError::Setup { source, .. } => Error::because(kind, message, source),
            RegistryError::Credentials { source, .. } => Error::because(kind, message, source),
            _ => Error::new(kind, message),
        }
    }
}
