//! Copies of programs that the daemon has lent (`KeepProgram`): an OCI runtime that runs from one need not copy itself first.
//!
//! Asked by `program` before each start. A copy counts as long as the file at its path is the one that was copied: an upgraded
//! runtime is started from its file until the daemon has lent the new one. Nothing here fails a start.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use lxcri_monitor_proto::sealed::{Stamp, is_sealed};
use lxcri_monitor_proto::v1;

use crate::failure::{Failure, Result};

/// The copies, by path.
#[derive(Default)]
pub struct Kept(BTreeMap<String, (Stamp, OwnedFd)>);

impl Kept {
    /// Keeps one in place of what was kept for its path.
    pub fn keep(&mut self, request: v1::KeepProgram, fds: Vec<OwnedFd>) -> Result<()> {
        let v1::KeepProgram { path, device, inode, size, changed } = request;
        let copy = <[OwnedFd; 1]>::try_from(fds).map(|[copy]| copy);
        match copy {
            Ok(copy) if Path::new(&path).is_absolute() && is_sealed(&copy) => {
                self.0.insert(path, (Stamp { device, inode, size, changed }, copy));
                Ok(())
            }
            _ => Err(Failure::invalid("a program to keep is an absolute path with one sealed copy")),
        }
    }

    /// What is to be executed in place of `path`, if there is a copy of what is there now.
    pub fn instead_of(&self, path: &str) -> Option<String> {
        let (stamp, copy) = self.0.get(path)?;
        let now = Stamp::of(Path::new(path)).ok()?;
        (now == *stamp).then(|| format!("/proc/self/fd/{}", copy.as_raw_fd()))
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;
    use lxcri_monitor_proto::sealed;
    use std::fs::File;

    fn request(path: &str) -> v1::KeepProgram {
        let Stamp { device, inode, size, changed } = Stamp::of(Path::new(path)).expect("a file");
        v1::KeepProgram { path: path.into(), device, inode, size, changed }
    }

    #[test]
    fn a_copy_counts_while_its_file_is_the_same() {
        let path = std::env::temp_dir().join(format!("lxcri-kept-{}", std::process::id()));
        std::fs::copy("/bin/true", &path).expect("a program");
        let name = path.to_str().expect("a path");
        let copy = || sealed::copy("true", File::open("/bin/true").expect("a program")).expect("a copy");
        let mut kept = Kept::default();
        assert!(kept.instead_of(name).is_none());
        kept.keep(request(name), vec![copy()]).expect("kept");
        assert!(kept.instead_of(name).is_some_and(|p| p.starts_with("/proc/self/fd/")));
        std::fs::remove_file(&path).expect("removed");
        assert!(kept.instead_of(name).is_none());
        std::fs::copy("/bin/sh", &path).expect("another program");
        assert!(kept.instead_of(name).is_none());
        kept.keep(request(name), vec![copy()]).expect("kept");
        assert!(kept.instead_of(name).is_some());
        std::fs::remove_file(&path).expect("removed");
        for bad in [vec![], vec![copy(), copy()], vec![File::open("/bin/true").expect("a file").into()]] {
            assert!(Kept::default().keep(request("/bin/true"), bad).is_err());
        }
        assert!(
            Kept::default()
                .keep(v1::KeepProgram { path: "true".into(), ..request("/bin/true") }, vec![copy()])
                .is_err()
        );
    }
}
