//! Measures what a container has written: a bounded walk over its upper folder.
//!
//! Called by the store, which keeps the answer for a while. The folder changes under the walk; what vanishes is not
//! counted. Links are not followed. Fails if the folder itself can't be read.

use std::collections::HashSet;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use camino::Utf8Path;
use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags};

use crate::core::ports::Usage;

/// Entries after which the walk ends with what it has.
const MAX_ENTRIES: u64 = 2_000_000;
/// Time after which it does.
const MAX_TIME: Duration = Duration::from_secs(10);

/// Bytes on disk and inodes below `path`, the folder itself not counted.
pub(super) fn measure(path: &Utf8Path) -> io::Result<Usage> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let begin = Instant::now();
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let top: OwnedFd = fs::open(path.as_std_path(), flags, Mode::empty())?;
    let mut pending: Vec<(Rc<OwnedFd>, CString)> = vec![(Rc::new(top), c".".to_owned())];
    while let Some((parent, name)) = pending.pop() {
        // Gone, or too many folders open: go on with the others.
        let Ok(folder) = fs::openat(parent.as_fd(), &name, flags, Mode::empty()) else { continue };
        let folder = Rc::new(folder);
        let Ok(entries) = Dir::read_from(folder.as_fd()) else { continue };
        for entry in entries {
            let Ok(entry) = entry else { break };
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(stat) = fs::statat(folder.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if is_folder {
                pending.push((folder.clone(), name.to_owned()));
            } else if stat.st_nlink > 1 && !linked.insert(stat.st_ino) {
                continue;
            }
            usage.inodes += 1;
            usage.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
            if usage.inodes >= MAX_ENTRIES || begin.elapsed() > MAX_TIME {
                tracing::warn!(%path, "too much to measure, the usage told is a part");
                return Ok(usage);
            }
        }
    }
    Ok(usage)
}
