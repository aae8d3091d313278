//! What the node and the daemon itself may do: looked up once at start.
//!
//! Pure parsers over /proc; nothing is changed.

use crate::core::caps::CapSet;
use crate::core::error::{Error, Result};

/// The daemon's own powers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Powers {
    /// Bounding set.
    pub bounding: CapSet,
    /// Effective set.
    pub effective: CapSet,
    /// oom_score_adj.
    pub oom_score_adj: i32,
    /// Hard limit of open files.
    pub nofile_hard: u64,
}

/// Reads them.
pub fn powers() -> Result<Powers> {
    let read = |path: &str| std::fs::read_to_string(path).map_err(|e| Error::io(format!("read {path}"), e));
    let status = read("/proc/self/status")?;
    let set = |key: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(key));
        line.and_then(|l| u64::from_str_radix(l.trim(), 16).ok())
            .map(|bits| CapSet(bits).and(CapSet::ALL))
            .ok_or_else(|| Error::internal(format!("/proc/self/status has no {key}")))
    };
    Ok(Powers {
        bounding: set("CapBnd:")?,
        effective: set("CapEff:")?,
        oom_score_adj: read("/proc/self/oom_score_adj")?.trim().parse().unwrap_or(0),
        nofile_hard: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(1 << 20),
    })
}

/// Whether SELinux is on.
pub fn selinux() -> bool {
    std::path::Path::new("/sys/fs/selinux/enforce").try_exists().unwrap_or(false)
}
