//! Writes state files whole or not at all: a temporary file beside the target, then rename.
//!
//! Used for every record, result and bundle file. Fails with the I/O error of the step; a crash leaves at most a
//! `.tmp-` file beside the target, which [`is_temporary`] names for the next start to remove.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::fail_point;

/// Whether a crash of the machine may lose the write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Survives the process, not necessarily the machine: files under /run and what a sync follows up.
    Process,
    /// fsync of file and folder: what must count after a power loss.
    Machine,
}

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// Replaces `path` by `data`, with permission bits `mode`.
pub fn write(path: &Path, data: &[u8], mode: u32, durability: Durability) -> io::Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a state file needs a folder and a name"));
    };
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = folder.join(format!(".tmp-{}-{n}-{}", std::process::id(), name.to_string_lossy()));
    let done = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        #[cfg(feature = "failpoints")]
        crate::utils::failpoint::io_error("atomic.write")?;
        file.write_all(data)?;
        if durability == Durability::Machine {
            file.sync_all()?;
        }
        fail_point!("atomic.written");
        std::fs::rename(&temporary, path)?;
        fail_point!("atomic.renamed");
        if durability == Durability::Machine {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    })();
    if done.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    done
}

/// Whether a file of this name was left by a write that did not end.
pub fn is_temporary(name: &str) -> bool {
    name.starts_with(".tmp-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn replaces_whole_and_leaves_nothing() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("a.json");
        write(&path, b"one", 0o600, Durability::Machine).expect("first");
        write(&path, b"two", 0o600, Durability::Process).expect("second");
        assert_eq!(std::fs::read(&path).expect("read"), b"two");
        assert_eq!(std::fs::metadata(&path).expect("stat").permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1);
        assert!(write(&dir.path().join("gone/b"), b"x", 0o600, Durability::Process).is_err());
    }
}
