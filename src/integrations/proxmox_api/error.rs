//! What the Proxmox API says when something fails, turned into kinds.
//!
//! The API has few codes and many words: "not found" is a 500, a task's failure a sentence. This file is the only place
//! that looks at those words, by substrings, since they change between releases. Used by all of this folder.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::fmt;

use crate::core::error::{Error, Kind};

/// What we say of a task that has ended without an exit status.
pub(super) const NO_STATUS: &str = "the task ended without a status";

/// What a failure means to a caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ErrorKind {
    /// The guest, volume, storage, snapshot or task is not there.
    NotFound,
    /// The id or name is taken.
    AlreadyExists,
    /// The guest runs already.
    AlreadyRunning,
    /// The guest does not run.
    NotRunning,
    /// The guest still runs and has to be stopped before.
    StillRunning,
    /// The VM's CPUs stand still: it can't do what it is asked for.
    Paused,
    /// No QEMU guest agent answers in the VM, or none is configured. Nothing was done.
    NoAgent,
    /// The guest is locked by an operation: "backup", "snapshot" and the like; "protection": an operator has protected it.
    Locked(String),
    /// Another change holds the guest's lock file for too long. Nothing was done.
    Busy,
    /// The configuration has changed since it was read (its digest).
    Changed,
    /// The parameters do not fit; see [`ApiError::params`].
    Invalid,
    /// The API, or this release of it, has no such call.
    Unsupported,
    /// Token or ticket were not accepted.
    Auth,
    /// A privilege is missing.
    Permission {
        /// The object's path: "/vms/103"; "" if the API does not tell.
        path: String,
        /// Privileges, any or all of them as the API says.
        privileges: Vec<String>,
    },
    /// No token may do it, only root@pam.
    RootOnly,
    /// The cluster has no quorum: its configuration can't be written.
    NoQuorum,
    /// Storage or quota are full.
    NoSpace,
    /// There is no such node, or its name can't be resolved.
    UnknownNode,
    /// No connection to any endpoint: nothing was sent.
    Unreachable,
    /// An endpoint's certificate is not what was configured: nothing was sent.
    Certificate,
    /// The connection or the node behind the endpoint broke: whether it was done is not known.
    NoAnswer,
    /// It took too long: whether it was done is not known.
    Timeout,
    /// Too much is waiting for this node or storage.
    Overloaded,
    /// A task ended with an error that is none of the others.
    TaskFailed,
    /// An answer that makes no sense.
    Protocol,
    /// Another error of the API.
    Failed,
}

impl ErrorKind {
    /// One word for it, for metrics.
    pub fn word(&self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::AlreadyExists => "already_exists",
            Self::AlreadyRunning | Self::NotRunning | Self::StillRunning | Self::Paused | Self::Changed => "state",
            Self::NoAgent => "no_agent",
            Self::Locked(_) => "locked",
            Self::Busy => "busy",
            Self::Invalid => "invalid",
            Self::Unsupported => "unsupported",
            Self::Auth => "auth",
            Self::Permission { .. } | Self::RootOnly => "permission",
            Self::NoQuorum => "no_quorum",
            Self::NoSpace => "no_space",
            Self::UnknownNode => "unknown_node",
            Self::Unreachable => "unreachable",
            Self::Certificate => "certificate",
            Self::NoAnswer => "no_answer",
            Self::Timeout => "timeout",
            Self::Overloaded => "overloaded",
            Self::TaskFailed => "task_failed",
            Self::Protocol => "protocol",
            Self::Failed => "failed",
        }
    }
}

/// A failed call or task. `Display` names the call and holds no secret.
pub struct ApiError(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    call: String,
    message: String,
    status: Option<u16>,
    /// Of what comes before the call: nothing of it was sent.
    unsent: bool,
    params: BTreeMap<String, String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl ApiError {
    /// A failure of `call` that the API did not word itself.
    pub fn new(kind: ErrorKind, call: impl Into<String>, message: impl Into<String>) -> Self {
        let (call, message) = (call.into(), message.into());
        let params = BTreeMap::new();
        Self(Box::new(Inner { kind, call, message, status: None, unsent: false, params, source: None }))
    }

    /// The same with its cause.
    pub(super) fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The same of a call of which nothing was sent.
    pub(super) fn unsent(mut self) -> Self {
        self.0.unsent = true;
        self
    }

    /// An answer other than success.
    pub(super) fn answer(call: &str, status: u16, message: String, params: BTreeMap<String, String>) -> Self {
        let kind = classify(status, &message, &params);
        let mut e = Self::new(kind, call, message.trim());
        e.0.status = Some(status);
        e.0.params = params;
        e
    }

    /// A task that ended with `exitstatus`.
    pub(super) fn task(call: &str, exitstatus: &str) -> Self {
        let kind = words(exitstatus).unwrap_or(ErrorKind::TaskFailed);
        Self::new(kind, call, exitstatus.trim())
    }

    /// What it means.
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// The API's words.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// HTTP status, if there was an answer.
    pub fn status(&self) -> Option<u16> {
        self.0.status
    }

    /// What is wrong with each parameter.
    pub fn params(&self) -> &BTreeMap<String, String> {
        &self.0.params
    }

    /// Whether a change may have been done, or may be done yet, although it failed for us.
    pub fn is_uncertain(&self) -> bool {
        match self.0.kind {
            _ if self.0.unsent => false,
            ErrorKind::NoAnswer | ErrorKind::Protocol => true,
            // Not if the API itself says that it has waited in vain.
            ErrorKind::Timeout => self.0.status.is_none(),
            _ => false,
        }
    }

    /// Whether it is of a task that died: what that had begun is left as it was. One that fails takes it back.
    pub fn has_died(&self) -> bool {
        self.0.kind == ErrorKind::TaskFailed
            && (self.0.message.contains("unexpected status") || self.0.message == NO_STATUS)
    }

    /// Whether the object is not there.
    pub fn is_not_found(&self) -> bool {
        self.0.kind == ErrorKind::NotFound
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "proxmox: {}: {}", self.0.call, self.0.message)?;
        for (name, why) in &self.0.params {
            write!(f, "; {name}: {}", why.trim())?;
        }
        match &self.0.kind {
            ErrorKind::Permission { path, privileges } if !path.is_empty() && !privileges.is_empty() => {
                write!(f, " (the token lacks {} on {path})", privileges.join(", "))
            }
            ErrorKind::Auth => write!(f, " (token or ticket not accepted)"),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl StdError for ApiError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|e| e as _)
    }
}

impl From<ApiError> for Error {
    fn from(e: ApiError) -> Self {
        use ErrorKind as K;
        let kind = match &e.0.kind {
            K::NotFound => Kind::NotFound,
            K::AlreadyExists => Kind::AlreadyExists,
            K::Invalid => Kind::InvalidArgument,
            K::Unsupported => Kind::Unimplemented,
            K::Auth | K::Permission { .. } | K::RootOnly => Kind::PermissionDenied,
            K::AlreadyRunning
            | K::NotRunning
            | K::StillRunning
            | K::Paused
            | K::Locked(_)
            | K::Changed
            | K::UnknownNode
            | K::Certificate => Kind::FailedPrecondition,
            K::Busy | K::NoAgent | K::NoQuorum | K::Unreachable | K::NoAnswer => Kind::Unavailable,
            K::Timeout => Kind::DeadlineExceeded,
            K::NoSpace | K::Overloaded => Kind::ResourceExhausted,
            K::TaskFailed | K::Protocol | K::Failed => Kind::Internal,
        };
        let message = e.to_string();
        match e.0.source {
            Some(source) => Error::because(kind, message, source),
            None => Error::new(kind, message),
        }
    }
}

/// The kind of an answer.
fn classify(status: u16, message: &str, params: &BTreeMap<String, String>) -> ErrorKind {
    match status {
        401 => return ErrorKind::Auth,
        403 => return permission(message),
        501 => return ErrorKind::Unsupported,
        // 595 to 599: pveproxy has lost the daemon or the node behind it; 502 to 504: so has a proxy before it.
        502..=504 | 595..=599 => return ErrorKind::NoAnswer,
        _ => {}
    }
    if status == 400 {
        let says = |needle: &str| params.values().any(|why| why.to_lowercase().contains(needle));
        return match () {
            () if says("no such task") => ErrorKind::NotFound,
            () if says("already exists") => ErrorKind::AlreadyExists,
            () => ErrorKind::Invalid,
        };
    }
    words(message).unwrap_or(ErrorKind::Failed)
}

/// The kind that the words of an error or of a failed task tell; None: nothing known is in them.
fn words(message: &str) -> Option<ErrorKind> {
    let text = message.to_lowercase();
    let has = |needle: &str| text.contains(needle);
    // From the special to the general: "can't lock file ... got timeout" is no other timeout.
    Some(match () {
        () if has("only root can") || has("only allowed for root@pam") => ErrorKind::RootOnly,
        () if has("permission check failed") => permission(message),
        () if has("can't lock file") || has("got lock timeout") => ErrorKind::Busy,
        () if has("is locked (") => {
            let lock = text.split("is locked (").nth(1).and_then(|rest| rest.split(')').next());
            ErrorKind::Locked(lock.unwrap_or_default().to_owned())
        }
        () if has("protection mode enabled") => ErrorKind::Locked("protection".into()),
        () if has("no quorum") || has("cluster not ready") => ErrorKind::NoQuorum,
        () if has("no space left") || has("out of space") || has("not enough free space") || has("quota exceeded") => {
            ErrorKind::NoSpace
        }
        () if has("detected modified configuration") || has("file change by other user") => ErrorKind::Changed,
        () if has("hostname lookup") => ErrorKind::UnknownNode,
        () if has("already exists") || has("already used") => ErrorKind::AlreadyExists,
        () if has("already running") => ErrorKind::AlreadyRunning,
        () if has("guest agent is not running") || has("no qemu guest agent configured") => ErrorKind::NoAgent,
        () if has("is paused") => ErrorKind::Paused,
        // "... got timeout": it is known that it goes on.
        () if has("powerdown failed") => return None,
        () if has("not running") => ErrorKind::NotRunning,
        () if has("is running") => ErrorKind::StillRunning,
        // Not "no such": a missing file on the node is no missing guest.
        () if has("does not exist") => ErrorKind::NotFound,
        () if has("got timeout") => ErrorKind::Timeout,
        () => return None,
    })
}

/// "Permission check failed (/vms/103, VM.PowerMgmt)", "... (bind mounts are only allowed for root@pam)".
fn permission(message: &str) -> ErrorKind {
    if message.contains("root@pam") || message.to_lowercase().contains("only root can") {
        return ErrorKind::RootOnly;
    }
    let inner = message.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')).map_or("", |(inner, _)| inner);
    let (path, privileges) = inner.split_once(',').unwrap_or((inner, ""));
    let path = if path.starts_with('/') { path.trim().to_owned() } else { String::new() };
    let names = privileges.split([',', '|', ' ']).map(str::trim).filter(|p| p.contains('.'));
    ErrorKind::Permission { path, privileges: names.map(String::from).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(status: u16, message: &str) -> ErrorKind {
        ApiError::answer("GET /x", status, message.into(), BTreeMap::new()).kind().clone()
    }

    #[test]
    fn the_words_of_the_api() {
        use ErrorKind as K;
        let table = [
            ("Configuration file 'nodes/pve1/lxc/999.conf' does not exist\n", K::NotFound),
            ("CT 100 already running", K::AlreadyRunning),
            ("CT 102 not running", K::NotRunning),
            ("CT 100 already exists on node 'pve1'", K::AlreadyExists),
            ("unable to create CT 110 - CT 110 already exists on node 'pve1'", K::AlreadyExists),
            ("CT is locked (backup)", K::Locked("backup".into())),
            ("VM is locked (snapshot-delete)", K::Locked("snapshot-delete".into())),
            ("can't remove CT 100 - protection mode enabled", K::Locked("protection".into())),
            ("unable to destroy CT 100 - container is running", K::StillRunning),
            ("detected modified configuration - file changed by other user? Try again.", K::Changed),
            ("hostname lookup 'zzz' failed - failed to get address info for: zzz", K::UnknownNode),
            ("got timeout", K::Timeout),
            ("can't lock file '/run/lock/lxc/pve-config-100.lock' - got timeout", K::Busy),
            ("cluster not ready - no quorum?", K::NoQuorum),
            ("command 'tar xpf' failed: No space left on device", K::NoSpace),
            ("only root can set 'args' config", K::RootOnly),
            ("Configuration file 'nodes/pve1/qemu-server/100.conf' does not exist", K::NotFound),
            ("VM 100 is running - destroy failed", K::StillRunning),
            ("unable to create VM 101: config file already exists", K::AlreadyExists),
            ("checksum mismatch (file change by other user?)", K::Changed),
            ("QEMU guest agent is not running", K::NoAgent),
            ("No QEMU guest agent configured", K::NoAgent),
            ("VM 120 is not running", K::NotRunning),
            ("VM is paused - cannot shutdown", K::Paused),
            ("VM quit/powerdown failed - got timeout", K::Failed),
            ("something else", K::Failed),
        ];
        for (message, expected) in table {
            assert_eq!(kind(500, message), expected, "{message}");
        }
        assert_eq!(kind(401, ""), K::Auth);
        assert_eq!(kind(501, "Method 'GET /nodes/pve1/nope' not implemented"), K::Unsupported);
        for status in [595, 596, 597, 599] {
            assert_eq!(kind(status, "Broken pipe"), K::NoAnswer);
        }
        let lost = ApiError::new(K::Timeout, "POST /x", "no answer within 30 s");
        assert!(
            lost.is_uncertain()
                && !ApiError::answer("POST /x", 500, "got timeout".into(), BTreeMap::new()).is_uncertain()
        );
        let e = ApiError::task("task x", "unable to create CT 110 - CT 110 already exists on node 'pve1'");
        assert_eq!(*e.kind(), K::AlreadyExists);
        let failed = ApiError::task("task x", "startup for container '100' failed");
        assert!(*failed.kind() == K::TaskFailed && !failed.has_died());
        assert!(ApiError::task("task x", "unexpected status").has_died());
    }

    #[test]
    fn permissions_name_path_and_privilege() {
        let e = ApiError::answer(
            "POST /x",
            403,
            "Permission check failed (/vms/103, VM.PowerMgmt)\n".into(),
            BTreeMap::new(),
        );
        let expected = ErrorKind::Permission { path: "/vms/103".into(), privileges: vec!["VM.PowerMgmt".into()] };
        assert_eq!(*e.kind(), expected);
        assert!(e.to_string().contains("lacks VM.PowerMgmt on /vms/103"), "{e}");
        let any = kind(403, "Permission check failed (/storage/local, Datastore.Audit|Datastore.AllocateSpace)");
        assert!(matches!(any, ErrorKind::Permission { privileges, .. } if privileges.len() == 2));
        let root = "Permission check failed (mount point type bind is only allowed for root@pam)";
        assert_eq!(kind(403, root), ErrorKind::RootOnly);
        assert!(matches!(kind(403, ""), ErrorKind::Permission { .. }));
    }

    #[test]
    fn parameters_are_told() {
        let params = BTreeMap::from([("memory".to_owned(), "type check ('integer') failed - got 'abc'\n".to_owned())]);
        let e = ApiError::answer("PUT /x", 400, "Parameter verification failed.\n".into(), params);
        assert_eq!(*e.kind(), ErrorKind::Invalid);
        assert_eq!(
            e.to_string(),
            "proxmox: PUT /x: Parameter verification failed.; memory: type check ('integer') failed - got 'abc'"
        );
        let params = BTreeMap::from([("upid".to_owned(), "no such task".to_owned())]);
        assert!(ApiError::answer("GET /x", 400, "Parameter verification failed.".into(), params).is_not_found());
        assert_eq!(Error::from(e).kind(), Kind::InvalidArgument);
    }

    proptest::proptest! {
        #[test]
        fn no_words_panic(status in 100u16..1000, message in ".{0,200}") {
            let _ = ApiError::answer("GET /x", status, message, BTreeMap::new()).to_string();
        }
    }
}
