//! Keeps two daemons from the same folders: a lock on a file in each, which the kernel gives back at any end.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::time::{Duration, Instant};

use camino::Utf8Path;
use rustix::fs::FlockOperation;

use crate::core::error::{Error, Kind, Result};

/// How long a daemon that was killed may take to be gone.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between two tries.
const LOOK: Duration = Duration::from_millis(10);

/// The locks of root and state folder.
#[derive(Debug)]
pub struct StateLock {
    _files: Vec<File>,
}

impl StateLock {
    /// Takes both or fails with the pid of who has one.
    pub fn take(root: &Utf8Path, state: &Utf8Path) -> Result<Self> {
        let mut files = Vec::new();
        for folder in [root, state] {
            let path = folder.join("daemon.lock");
            let failed = |e: std::io::Error| Error::io(format!("lock {path}"), e);
            let mut file =
                OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
            match lock(&file) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let mut pid = String::new();
                    let _ = file.read_to_string(&mut pid);
                    return Err(Error::new(
                        Kind::AlreadyExists,
                        format!("another daemon (pid {}) uses {folder}", pid.trim()),
                    ));
                }
                Err(e) => return Err(failed(e.into())),
            }
            file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
            writeln!(file, "{}", std::process::id()).map_err(failed)?;
            files.push(file);
        }
        Ok(Self { _files: files })
    }
}

/// Waits a moment for one who has it: of a daemon that was killed the kernel first closes all that it held for its pods.
fn lock(file: &File) -> rustix::io::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => std::thread::sleep(LOOK),
            locked => return locked,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = Utf8Path::from_path(dir.path()).expect("utf8");
        let (root, state) = (path.join("root"), path.join("state"));
        std::fs::create_dir(&root).and_then(|()| std::fs::create_dir(&state)).expect("folders");
        let first = StateLock::take(&root, &state).expect("first");
        let e = StateLock::take(&root, &state).expect_err("second");
        assert_eq!(e.kind(), Kind::AlreadyExists);
        assert!(e.to_string().contains(&std::process::id().to_string()), "{e}");
        drop(first);
        StateLock::take(&root, &state).expect("after the first");
    }
}
