//! Groups of Intel RDT (and AMD QoS): folders of the kernel's file system resctrl, which the administrator makes.
//!
//! Called by the backends when a container asks for one, and by `doctor`. Reads alone: which part of caches and of memory bandwidth
//! a group has is not ours to say. Fails by the group's name.

use camino::Utf8Path;

use crate::core::classes;
use crate::core::error::{Error, Kind, Result};

/// Where it is mounted; the OCI runtime looks nowhere else.
pub const MOUNT: &str = "/sys/fs/resctrl";
/// Type of that file system (RDTGROUP_SUPER_MAGIC).
const MAGIC: u64 = 0x0765_5821;

/// Whether resctrl is mounted at `folder`.
pub fn is_mounted(folder: &Utf8Path) -> bool {
    rustix::fs::statfs(folder.as_std_path()).is_ok_and(|s| u64::try_from(s.f_type).is_ok_and(|t| t == MAGIC))
}

/// Refuses a group that is not there.
pub fn check(name: &str) -> Result<()> {
    check_in(Utf8Path::new(MOUNT), name, is_mounted(Utf8Path::new(MOUNT)))
}

fn check_in(folder: &Utf8Path, name: &str, mounted: bool) -> Result<()> {
    if !classes::is_rdt_group(name) {
        return Err(Error::invalid(format!("RDT class {name:?} is no name of a group of {MOUNT}")));
    }
    if !mounted {
        let why = format!("RDT class {name:?}: resctrl is not mounted at {MOUNT} on this node");
        return Err(Error::new(Kind::FailedPrecondition, why));
    }
    match folder.join(name).is_dir() {
        true => Ok(()),
        false => Err(Error::precondition(format!("RDT class {name:?}: there is no group {MOUNT}/{name} on this node"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_folders_of_the_mount() {
        let temp = tempfile::tempdir().expect("a folder");
        let folder = Utf8Path::from_path(temp.path()).expect("UTF-8");
        for name in ["gold", "info"] {
            std::fs::create_dir(folder.join(name)).expect("a folder");
        }
        assert!(!is_mounted(folder) && !is_mounted(&folder.join("none")));
        check_in(folder, "gold", true).expect("there");
        for (name, mounted, says) in [
            ("gold", false, "not mounted"),
            ("silver", true, "no group /sys/fs/resctrl/silver"),
            ("info", true, "no name"),
            ("../gold", true, "no name"),
            ("", true, "no name"),
            ("..", true, "no name"),
        ] {
            let e = check_in(folder, name, mounted).expect_err(name);
            assert!(e.chain().contains(says), "{name}: {}", e.chain());
        }
    }
}
