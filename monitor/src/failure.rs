//! Why a request was refused or failed, as the daemon is told it.
//!
//! Every module of the monitor fails with this: it is the wire's Error with constructors. It is told to whoever asked,
//! never logged besides.

use lxcri_monitor_proto::v1::{Error, ErrorCode};
use rustix::io::Errno;

/// A failed request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Class, see monitor.proto.
    pub code: ErrorCode,
    /// Names the object and what went wrong.
    pub message: String,
    /// 0 unless a system call failed.
    pub errno: i32,
}

/// Result with [`Failure`].
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// Of a class.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), errno: 0 }
    }

    /// The request makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::ErrorInvalid, message)
    }

    /// Not in the present state.
    pub fn state(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::ErrorState, message)
    }

    /// Nothing of that id.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::ErrorNotFound, message)
    }

    /// A system call on `object` failed.
    pub fn errno(object: impl std::fmt::Display, errno: Errno) -> Self {
        Self { code: ErrorCode::ErrorSystem, message: format!("{object}: {errno}"), errno: errno.raw_os_error() }
    }

    /// As [`Failure::errno`], for the standard library's errors.
    pub fn io(object: impl std::fmt::Display, error: &std::io::Error) -> Self {
        Self {
            code: ErrorCode::ErrorSystem,
            message: format!("{object}: {error}"),
            errno: error.raw_os_error().unwrap_or(0),
        }
    }

    /// As the wire has it. The text is capped, so that the answer always fits a packet.
    pub fn to_wire(&self) -> Error {
        let mut message = self.message.clone();
        if message.len() > 8192 {
            let mut end = 8192;
            while !message.is_char_boundary(end) {
                end -= 1;
            }
            message.truncate(end);
        }
        Error { code: self.code.into(), message, errno: self.errno }
    }
}
