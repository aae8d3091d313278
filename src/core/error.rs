//! What went wrong, as a caller needs to know it: a [`Kind`] for the answer's code, a message that names the
//! object, and the cause as a source. Integrations have narrow error types of their own and turn into this
//! at the ports; `cri::status` has the one table from kinds to gRPC codes.

use std::error::Error as StdError;
use std::fmt;

/// The class of a failure; decides the gRPC code and whether a retry can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The object is not there.
    NotFound,
    /// The name or id is taken.
    AlreadyExists,
    /// The request can never succeed as it is.
    InvalidArgument,
    /// The request fits, but not the present state.
    FailedPrecondition,
    /// Something outside is away; a retry may succeed.
    Unavailable,
    /// Something took longer than it was given.
    DeadlineExceeded,
    /// A disk, a queue or a limit is full.
    ResourceExhausted,
    /// We do not do this, by name.
    Unimplemented,
    /// Not allowed by the kernel, a registry or an API.
    PermissionDenied,
    /// An image that the node's policy does not admit.
    Untrusted,
    /// Ended by a stop or by the caller.
    Aborted,
    /// Anything else.
    Internal,
}

/// A failure with its kind. `Display` is the message alone; the causes are its sources.
pub struct Error {
    kind: Kind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure without a cause of its own.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// A failure because of `source`.
    pub fn because(kind: Kind, message: impl Into<String>, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { kind, message: message.into(), source: Some(source.into()) }
    }

    /// Shorthand for [`Kind::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// Shorthand for [`Kind::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidArgument, message)
    }

    /// Shorthand for [`Kind::FailedPrecondition`].
    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(Kind::FailedPrecondition, message)
    }

    /// Shorthand for [`Kind::Internal`].
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    /// An I/O failure on `object`: a full disk is ResourceExhausted, the rest as the errno says.
    pub fn io(object: impl fmt::Display, source: std::io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EMFILE | libc::ENFILE | libc::ENOMEM) => Kind::ResourceExhausted,
            Some(libc::EACCES | libc::EPERM) => Kind::PermissionDenied,
            _ => Kind::Internal,
        };
        Self::because(kind, object.to_string(), source)
    }

    /// The same failure with the object it happened to in front.
    pub fn context(self, message: impl Into<String>) -> Self {
        Self { kind: self.kind, message: message.into(), source: Some(Box::new(self)) }
    }

    /// The class of the failure.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Message and all causes, joined by ": ".
    pub fn chain(&self) -> String {
        let mut text = self.message.clone();
        let mut next = self.source();
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.chain())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

/// A host program that failed: its deadline, a missing tool and a full process table keep their class.
impl From<crate::utils::process::SpawnError> for Error {
    fn from(e: crate::utils::process::SpawnError) -> Self {
        use crate::utils::process::SpawnError;
        let kind = match &e {
            SpawnError::Deadline { .. } => Kind::DeadlineExceeded,
            SpawnError::Missing { .. } => Kind::FailedPrecondition,
            SpawnError::Start { source, .. } => match source.raw_os_error() {
                Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE) => Kind::ResourceExhausted,
                Some(libc::EACCES | libc::EPERM) => Kind::PermissionDenied,
                _ => Kind::Internal,
            },
            SpawnError::Invalid { .. }
            | SpawnError::TooMuch { .. }
            | SpawnError::Io { .. }
            | SpawnError::Failed { .. } => Kind::Internal,
        };
        let message = e.to_string();
        match e {
            // The cause's text must not be lost with the variant that carried it.
            SpawnError::Start { source, .. } | SpawnError::Io { source, .. } => Error::because(kind, message, source),
            _ => Error::new(kind, message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_names_every_cause_once() {
        let e = Error::io("/x/y", std::io::Error::from_raw_os_error(libc::ENOSPC)).context("create container c1");
        assert_eq!(e.kind(), Kind::ResourceExhausted);
        assert_eq!(e.to_string(), "create container c1");
        assert!(e.chain().starts_with("create container c1: /x/y: No space left on device"), "{}", e.chain());
    }
}
