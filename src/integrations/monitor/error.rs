//! What goes wrong with a monitor, and which kind of failure that is for the engine.

use std::time::Duration;

use camino::Utf8PathBuf;
use lxcri_monitor_proto::v1::{self, ErrorCode};
use lxcri_monitor_proto::wire::WireError;

use crate::core::error::{Error, Kind};

/// A failure of a monitor or on the way to it.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// Nothing listens on the pod's socket.
    #[error("pod {pod}: no monitor runs")]
    NotRunning {
        /// The pod.
        pod: String,
    },
    /// There is one already.
    #[error("pod {pod}: a monitor runs already")]
    Running {
        /// The pod.
        pod: String,
    },
    /// The monitor's program ended at once.
    #[error("pod {pod}: the monitor ended at its start ({status}): {words}")]
    Stillborn {
        /// The pod.
        pod: String,
        /// Exit status.
        status: String,
        /// The end of what it wrote to its log.
        words: String,
    },
    /// A step on the host failed.
    #[error("{what}")]
    Host {
        /// The step and its object.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// The connection failed.
    #[error("pod {pod}: the connection to its monitor")]
    Wire {
        /// The pod.
        pod: String,
        /// Why.
        source: WireError,
    },
    /// The monitor ended, or the connection broke, before it answered.
    #[error("pod {pod}: the monitor is gone")]
    Gone {
        /// The pod.
        pod: String,
    },
    /// No answer in time.
    #[error("pod {pod}: the monitor has not answered {operation} after {} s", .after.as_secs())]
    Silent {
        /// The pod.
        pod: String,
        /// What was asked.
        operation: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// The monitor said no.
    #[error("{message}")]
    Refused {
        /// Class.
        code: ErrorCode,
        /// Its words, naming the object.
        message: String,
        /// 0 if no system call failed.
        errno: i32,
    },
    /// An answer that does not fit the question.
    #[error("pod {pod}: the monitor's answer to {operation} makes no sense")]
    Nonsense {
        /// The pod.
        pod: String,
        /// What was asked.
        operation: &'static str,
    },
    /// The folder for monitors can't be used.
    #[error("{path}: not an absolute path")]
    Relative {
        /// The path.
        path: Utf8PathBuf,
    },
}

impl From<v1::Error> for MonitorError {
    fn from(error: v1::Error) -> Self {
        Self::Refused { code: error.code(), message: error.message, errno: error.errno }
    }
}

impl MonitorError {
    /// A failed step on the host.
    pub(super) fn host(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Host { what: what.into(), source: source.into() }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::NotRunning { .. } => Kind::NotFound,
            Self::Running { .. } => Kind::AlreadyExists,
            Self::Wire { source: WireError::TooLong(_) | WireError::TooManyFds(_), .. } => Kind::InvalidArgument,
            Self::Wire { .. } | Self::Gone { .. } => Kind::Unavailable,
            Self::Silent { .. } => Kind::DeadlineExceeded,
            Self::Host { source, .. } => Self::kind_of(source.raw_os_error()),
            Self::Refused { code, errno, .. } => match code {
                ErrorCode::ErrorNotFound => Kind::NotFound,
                ErrorCode::ErrorExists => Kind::AlreadyExists,
                ErrorCode::ErrorState => Kind::FailedPrecondition,
                ErrorCode::ErrorDeadline => Kind::DeadlineExceeded,
                ErrorCode::ErrorInvalid => Kind::InvalidArgument,
                ErrorCode::ErrorUnknownOperation => Kind::Unimplemented,
                ErrorCode::ErrorSystem => Self::kind_of(Some(*errno)),
                ErrorCode::ErrorProgram | ErrorCode::ErrorUnspecified => Kind::Internal,
            },
            Self::Stillborn { .. } | Self::Nonsense { .. } | Self::Relative { .. } => Kind::Internal,
        }
    }

    fn kind_of(errno: Option<i32>) -> Kind {
        errno.map_or(Kind::Internal, |n| Error::io("", std::io::Error::from_raw_os_error(n)).kind())
    }
}

impl From<MonitorError> for Error {
    fn from(error: MonitorError) -> Self {
        let (kind, message) = (error.kind(), error.to_string());
        match error {
            MonitorError::Host { source, .. } => Error::because(kind, message, source),
            MonitorError::Wire { source, .. } => Error::because(kind, message, source),
            _ => Error::new(kind, message),
        }
    }
}
