//! What the node and the daemon itself may do: looked up once at start.
//!
//! Pure parsers over /proc; nothing is changed.

use std::collections::BTreeSet;

use crate::core::caps::CapSet;
use crate::core::error::{Error, Result};
use crate::core::limits;

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

/// Numbers of what is online below /sys/devices/system ("cpu", "node"); None where the kernel does not tell.
pub fn online(what: &str) -> Option<BTreeSet<u32>> {
    let path = format!("/sys/devices/system/{what}/online");
    let found = limits::numbers(&path, &std::fs::read_to_string(&path).ok()?).ok()?;
    (!found.is_empty()).then_some(found)
}

/// Sizes of huge pages, as limits name them: "2MB", "1GB", "64KB".
pub fn hugepage_sizes() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    let size = |name: &str| name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok();
    let sizes = entries.filter_map(|e| e.file_name().to_str().and_then(size));
    sizes.map(page_size).collect()
}

fn page_size(kib: u64) -> String {
    match kib {
        n if n >= 1 << 20 && n % (1 << 20) == 0 => format!("{}GB", n >> 20),
        n if n >= 1 << 10 && n % (1 << 10) == 0 => format!("{}MB", n >> 10),
        n => format!("{n}KB"),
    }
}

/// Whether SELinux is on.
pub fn selinux() -> bool {
    std::path::Path::new("/sys/fs/selinux/enforce").try_exists().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_named_as_limits_name_them() {
        assert_eq!([2048, 1 << 20, 64, 32 << 10].map(page_size), ["2MB", "1GB", "64KB", "32MB"]);
    }
}
