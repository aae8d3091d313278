//! Why a ZFS operation failed, told apart by what `zfs` and `zpool` say. Nobody else reads their messages.
//!
//! Used by the wrapper's callers, which act on the kind (a busy dataset is destroyed later) and turn the rest into the
//! engine's error. OpenZFS's and zfs-fuse's wording differ in places; both are in the tests below, as captured.

use crate::core::error::{Error, Kind};
use crate::utils::process::SpawnError;

use super::name::BadName;

/// What kind of failure it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// No such dataset, snapshot, tag or parent.
    NotFound,
    /// No such pool: it was exported, or never imported.
    NoPool,
    /// It is there already.
    Exists,
    /// Mounted, held or otherwise in use.
    Busy,
    /// Mounted where it should be.
    Mounted,
    /// It has clones, snapshots or children.
    HasDependents,
    /// The pool, or the dataset by its quota, is full.
    Full,
    /// The pool's I/O is suspended.
    Suspended,
    /// This ZFS does not know the operation or option.
    Unsupported,
    /// Not permitted.
    Permission,
    /// A stream that can't be received.
    BadStream,
    /// Anything else.
    Other,
}

/// A ZFS operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum ZfsError {
    /// So many operations wait already that this one was not queued.
    #[error("{what}: {waiting} ZFS operations wait already")]
    QueueFull {
        /// What was to be done.
        what: String,
        /// Operations in the queue.
        waiting: usize,
    },
    /// Others kept the pool busy for as long as this one could wait.
    #[error("{what}: the pool is busy, no turn within {} s", waited.as_secs())]
    Busy {
        /// What was to be done.
        what: String,
        /// How long it waited.
        waited: std::time::Duration,
    },
    /// A name that can't be one.
    #[error("not a name of ZFS")]
    Name(#[from] BadName),
    /// The program said no.
    #[error("{what}: {message}")]
    Failed {
        /// What was to be done: program and arguments.
        what: String,
        /// As far as it is understood.
        reason: Reason,
        /// The first line that it said.
        message: String,
    },
    /// The program could not be run, or took too long.
    #[error("ZFS can't be asked")]
    Spawn(#[from] SpawnError),
    /// The program's output is not what it should be.
    #[error("{what}: its answer can't be read: {line:?}")]
    Output {
        /// What was asked.
        what: String,
        /// The line that makes no sense.
        line: String,
    },
    /// This kind of ZFS can't do it.
    #[error("{what}: this ZFS ({version}) can't do that")]
    Unsupported {
        /// What was to be done.
        what: &'static str,
        /// Which ZFS it is.
        version: String,
    },
}

impl ZfsError {
    /// As far as it is understood.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Failed { reason, .. } => *reason,
            Self::Unsupported { .. } => Reason::Unsupported,
            _ => Reason::Other,
        }
    }

    /// From what a failed program said.
    pub(super) fn from_words(what: String, stderr: &str) -> Self {
        let line = stderr.lines().map(str::trim).find(|l| !l.is_empty()).unwrap_or("it gave no reason");
        Self::Failed { what, reason: reason(stderr), message: line.chars().take(400).collect() }
    }
}

/// In this order: the first that fits counts.
const WORDS: &[(&str, Reason)] = &[
    ("no such pool", Reason::NoPool),
    ("i/o is currently suspended", Reason::Suspended),
    ("pool i/o is", Reason::Suspended),
    ("has dependent clones", Reason::HasDependents),
    ("has children", Reason::HasDependents),
    ("filesystem already mounted", Reason::Mounted),
    ("is busy", Reason::Busy),
    ("dataset is used", Reason::Busy),
    ("umount failed", Reason::Busy),
    ("more recent snapshots", Reason::HasDependents),
    ("already exists", Reason::Exists),
    ("out of space", Reason::Full),
    ("no space left", Reason::Full),
    ("quota exceeded", Reason::Full),
    ("would exceed", Reason::Full),
    ("failed to read from stream", Reason::BadStream),
    ("invalid stream", Reason::BadStream),
    ("invalid backup stream", Reason::BadStream),
    ("checksum mismatch", Reason::BadStream),
    ("unrecognized command", Reason::Unsupported),
    ("invalid option", Reason::Unsupported),
    ("permission denied", Reason::Permission),
    ("does not exist", Reason::NotFound),
    ("could not find any snapshots", Reason::NotFound),
    ("no such tag", Reason::NotFound),
    ("not a cloned filesystem", Reason::NotFound),
];

fn reason(stderr: &str) -> Reason {
    let text = stderr.to_ascii_lowercase();
    WORDS.iter().find(|(words, _)| text.contains(words)).map_or(Reason::Other, |(_, reason)| *reason)
}

impl From<ZfsError> for Error {
    fn from(e: ZfsError) -> Self {
        let kind = match &e {
            ZfsError::QueueFull { .. } | ZfsError::Busy { .. } => Kind::ResourceExhausted,
            ZfsError::Name(_) => Kind::InvalidArgument,
            ZfsError::Output { .. } => Kind::Internal,
            ZfsError::Unsupported { .. } => Kind::Unimplemented,
            ZfsError::Failed { reason, .. } => match reason {
                Reason::NotFound => Kind::NotFound,
                Reason::Exists => Kind::AlreadyExists,
                Reason::Busy | Reason::Mounted | Reason::HasDependents => Kind::FailedPrecondition,
                Reason::NoPool | Reason::Suspended => Kind::Unavailable,
                Reason::Full => Kind::ResourceExhausted,
                Reason::Unsupported => Kind::Unimplemented,
                Reason::Permission => Kind::PermissionDenied,
                Reason::BadStream => Kind::InvalidArgument,
                Reason::Other => Kind::Internal,
            },
            ZfsError::Spawn(_) => {
                return match e {
                    ZfsError::Spawn(spawn) => Error::from(spawn).context("ZFS can't be asked"),
                    other => Error::internal(other.to_string()),
                };
            }
        };
        let message = e.to_string();
        match e {
            ZfsError::Name(source) => Error::because(kind, message, source),
            _ => Error::new(kind, message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_both_kinds_of_zfs_say() {
        for (said, expected) in [
            // OpenZFS 2.3.9 and zfs-fuse 0.7.0, the same words.
            ("cannot create 'tank/l/a': dataset already exists\n", Reason::Exists),
            ("cannot create 'tank/q/a': parent does not exist\n", Reason::NotFound),
            ("cannot create 'nopool/a': no such pool 'nopool'\n", Reason::NoPool),
            ("cannot open 'nopool': no such pool\n", Reason::NoPool),
            ("cannot open 'tank/l/a@nope': dataset does not exist\n", Reason::NotFound),
            (
                "cannot destroy 'tank/l/a': filesystem has children\nuse '-r' to destroy the following datasets:\ntank/l/a@ready\n",
                Reason::HasDependents,
            ),
            (
                "cannot destroy 'tank/l/a@ready': snapshot has dependent clones\nuse '-R' to destroy the following datasets:\ntank/l/c\n",
                Reason::HasDependents,
            ),
            (
                "cannot rollback to 'tank/l/a@x': more recent snapshots exist\nuse '-r' to force deletion of the following snapshots:\ntank/l/a@y\n",
                Reason::HasDependents,
            ),
            ("cannot destroy 'tank/l/a': dataset is busy\n", Reason::Busy),
            ("cannot promote 'tank/l/c': not a cloned filesystem\n", Reason::NotFound),
            ("cannot receive: failed to read from stream\n", Reason::BadStream),
            // OpenZFS alone.
            ("could not find any snapshots to destroy; check snapshot names.\n", Reason::NotFound),
            ("cannot release hold from snapshot 'tank/l/a@ready': no such tag on this dataset\n", Reason::NotFound),
            ("cannot hold snapshot 'tank/l/a@ready': tag already exists on this dataset\n", Reason::Exists),
            ("cannot create 'tank/f': out of space\n", Reason::Full),
            ("cannot create 'tank/l/x': pool I/O is currently suspended\n", Reason::Suspended),
            // zfs-fuse alone.
            (
                "umount: /tmp/m: target is busy.\ncannot unmount '/tmp/m': umount failed: umount child process failed\n",
                Reason::Busy,
            ),
            ("cannot mount 'tank/l/a': mountpoint or dataset is busy\n", Reason::Busy),
            ("internal error: /usr/lib/zfs/pyzfs.py not found\n", Reason::Other),
            ("cannot set property for 'tank/l/c': size is less than current used or reserved space\n", Reason::Other),
            ("cannot release 'lxcri' from 'tank/l/a@ready': no such tag on this dataset\n", Reason::NotFound),
            ("unrecognized command 'diff'\nusage: zfs command args ...\n", Reason::Unsupported),
            ("invalid option 's'\nusage:\n", Reason::Unsupported),
            ("cannot mount 'tank/l/c': filesystem already mounted\n", Reason::Mounted),
            // OpenZFS, of streams that were cut.
            (
                "cannot receive new filesystem stream: checksum mismatch or incomplete stream.\nPartially received snapshot is saved.\n",
                Reason::BadStream,
            ),
            ("cannot resume send: resume token is corrupt (invalid format)\n", Reason::Other),
            ("something new\n", Reason::Other),
        ] {
            let e = ZfsError::from_words("zfs x".into(), said);
            assert_eq!(e.reason(), expected, "{said}");
            assert!(!e.to_string().contains('\n'), "{e}");
        }
    }
}
