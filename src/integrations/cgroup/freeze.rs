//! Thaws a container's cgroup, which a checkpoint that was killed may have left frozen. Blocks shortly.

use super::manage::put;
use super::{CgroupError, Driver, Hierarchy, Mode, Parent};
use crate::core::ids::ContainerId;

impl Hierarchy {
    /// Lets a container's processes run on; one that is gone, or was not frozen, is success.
    pub fn thaw(&self, parent: &Parent, container: &ContainerId) -> Result<(), CgroupError> {
        let relative = parent.container(container);
        let (root, file, value) = match (self.mode, &self.unified, self.legacy.get("freezer")) {
            (Mode::Unified, Some(root), _) => (root, "cgroup.freeze", "0"),
            (_, _, Some(root)) => (root, "freezer.state", "THAWED"),
            _ => return Ok(()),
        };
        let folder = root.join(relative);
        let inner = (parent.driver() == Driver::Systemd).then(|| folder.join("container"));
        for folder in inner.into_iter().chain([folder]) {
            match put(&folder, file, value) {
                Err(CgroupError::Io { source, .. }) if super::manage::is_gone(&source) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// For tests: the folder whose state [`Hierarchy::thaw`] writes.
    #[cfg(test)]
    fn freezer(&self) -> Option<camino::Utf8PathBuf> {
        if self.mode == Mode::Unified { self.unified.clone() } else { self.legacy.get("freezer").cloned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::PodId;

    #[test]
    fn what_is_frozen_runs_again() {
        let host = Hierarchy::detect().unwrap();
        let (pod, id) = (PodId::new(), ContainerId::new());
        let parent = Parent::new(Driver::Cgroupfs, "/", &pod).unwrap();
        host.thaw(&parent, &id).unwrap();
        let folder = host.freezer().unwrap().join(id.as_str());
        std::fs::create_dir(&folder).unwrap();
        let v2 = folder.join("cgroup.freeze").try_exists().unwrap();
        let (file, frozen) = if v2 { ("cgroup.freeze", "1") } else { ("freezer.state", "FROZEN") };
        let done = put(&folder, file, frozen).and_then(|()| host.thaw(&parent, &id));
        let now = std::fs::read_to_string(folder.join(file));
        std::fs::remove_dir(&folder).unwrap();
        done.unwrap();
        assert!(matches!(now.unwrap().trim(), "0" | "THAWED"));
    }
}
