//! Why a container can't be read, and why one can't be written.
//!
//! Names of entries are quoted and cut: they come from the file. Keys and passwords are in none of it.

use std::fmt;
use std::io;

use crate::core::error::{Error, Kind};

/// An entry's name for messages: quoted, control characters escaped, cut at 200 characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(String);

impl From<&[u8]> for Name {
    fn from(name: &[u8]) -> Self {
        Self(String::from_utf8_lossy(name).chars().take(200).collect())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// Why a container can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file can't be read.
    #[error("reading {what} failed")]
    Io {
        /// Which part.
        what: String,
        /// The failure.
        #[source]
        source: io::Error,
    },
    /// It breaks the format's rules.
    #[error("not a sound BFC container: {0}")]
    Malformed(String),
    /// It is not what its checksum says.
    #[error("damaged: {0}")]
    Damaged(String),
    /// It uses what this program does not know.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// Its content is encrypted and no key was given.
    #[error("{0} is encrypted: a key file or a password is needed")]
    NoKey(Name),
    /// The key does not fit, or somebody changed the content.
    #[error("{0} can't be decrypted: the key or password is another one, or the file was changed")]
    Sealed(Name),
    /// It has no such entry.
    #[error("there is no entry {0}")]
    NoEntry(Name),
}

impl ReadError {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// What was wrong with content that was read as plain bytes; other failures as they are.
    pub fn of_stream(name: &[u8], e: io::Error) -> Self {
        match e.downcast::<ReadError>() {
            Ok(own) => own,
            Err(source) => Self::Io { what: Name::from(name).to_string(), source },
        }
    }
}

impl From<ReadError> for io::Error {
    fn from(e: ReadError) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, e)
    }
}

impl From<ReadError> for Error {
    fn from(e: ReadError) -> Self {
        let kind = match &e {
            ReadError::Io { source, .. } => match source.raw_os_error() {
                Some(code) => Error::io("", io::Error::from_raw_os_error(code)).kind(),
                None => Kind::Internal,
            },
            ReadError::Malformed(_) => Kind::InvalidArgument,
            ReadError::Damaged(_) => Kind::Internal,
            ReadError::Unsupported(_) => Kind::Unimplemented,
            ReadError::NoKey(_) => Kind::FailedPrecondition,
            ReadError::Sealed(_) => Kind::PermissionDenied,
            ReadError::NoEntry(_) => Kind::NotFound,
        };
        let message = e.to_string();
        match e {
            ReadError::Io { source, .. } => Error::because(kind, message, source),
            _ => Error::new(kind, message),
        }
    }
}

/// Why a container can't be written. Whatever it is, the file of that name is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A step failed.
    #[error("{what} failed")]
    Io {
        /// The step.
        what: String,
        /// The failure.
        #[source]
        source: io::Error,
    },
    /// There is a file of that name.
    #[error("{0} is there already (force replaces it)")]
    Exists(String),
    /// What the format can't hold, or what was asked for does not fit together.
    #[error("{0}")]
    Refused(String),
}

impl WriteError {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

impl From<WriteError> for Error {
    fn from(e: WriteError) -> Self {
        let message = e.to_string();
        match e {
            WriteError::Io { what, source } => Error::io(format!("{what} failed"), source),
            WriteError::Exists(_) => Error::new(Kind::AlreadyExists, message),
            WriteError::Refused(_) => Error::invalid(message),
        }
    }
}
