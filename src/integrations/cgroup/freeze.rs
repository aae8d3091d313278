//! Freezes and thaws a container's cgroup. Blocks shortly. A crash leaves it frozen or not.

use std::time::{Duration, Instant};

use camino::Utf8Path;

use super::manage::put;
use super::{CgroupError, Driver, Hierarchy, Mode, Parent};
use crate::core::ids::ContainerId;

impl Hierarchy {
    /// Lets a container's processes run on; one that is gone, or was not frozen, is success.
    pub fn thaw(&self, parent: &Parent, container: &ContainerId) -> Result<(), CgroupError> {
        self.freeze(parent, container, false)
    }

    /// Stops all of a container's processes where they are and waits until they are, or lets them run on. One that is gone
    /// is success.
    pub fn freeze(&self, parent: &Parent, container: &ContainerId, frozen: bool) -> Result<(), CgroupError> {
        let relative = parent.container(container);
        let (root, file, value) = match (self.mode, &self.unified, self.legacy.get("freezer"), frozen) {
            (Mode::Unified, Some(root), _, false) => (root, "cgroup.freeze", "0"),
            (Mode::Unified, Some(root), _, true) => (root, "cgroup.freeze", "1"),
            (_, _, Some(root), false) => (root, "freezer.state", "THAWED"),
            (_, _, Some(root), true) => (root, "freezer.state", "FROZEN"),
            (.., false) => return Ok(()),
            (.., true) => return Err(CgroupError::io("freeze", &relative)(std::io::ErrorKind::Unsupported.into())),
        };
        let folder = root.join(relative);
        let inner = (parent.driver() == Driver::Systemd).then(|| folder.join("container"));
        for folder in inner.into_iter().chain([folder]) {
            match put(&folder, file, value) {
                Err(CgroupError::Io { source, .. }) if super::manage::is_gone(&source) => continue,
                other => other?,
            }
            if frozen {
                return wait_frozen(&folder);
            }
        }
        Ok(())
    }

    /// Whether a container's processes are stopped, or are being stopped. False for one that is gone.
    pub fn is_frozen(&self, parent: &Parent, container: &ContainerId) -> bool {
        let unified = self.unified.as_ref().filter(|_| self.mode == Mode::Unified);
        let (root, file) = match (unified, self.legacy.get("freezer")) {
            (Some(root), _) => (root, "cgroup.freeze"),
            (_, Some(root)) => (root, "freezer.state"),
            _ => return false,
        };
        let folder = root.join(parent.container(container));
        [folder.join("container"), folder]
            .iter()
            .filter_map(|folder| std::fs::read_to_string(folder.join(file)).ok())
            .any(|state| !matches!(state.trim(), "0" | "THAWED"))
    }

    /// For tests: the folder whose state [`Hierarchy::thaw`] writes.
    #[cfg(test)]
    fn freezer(&self) -> Option<camino::Utf8PathBuf> {
        if self.mode == Mode::Unified { self.unified.clone() } else { self.legacy.get("freezer").cloned() }
    }
}

/// How long processes may take to come to a point where they can be stopped.
const PATIENCE: Duration = Duration::from_secs(10);

fn wait_frozen(folder: &Utf8Path) -> Result<(), CgroupError> {
    let until = Instant::now() + PATIENCE;
    loop {
        let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap_or_default();
        let v2 = read("cgroup.events").lines().any(|line| line == "frozen 1");
        let gone = !folder.try_exists().unwrap_or(false);
        if v2 || read("freezer.state").trim() == "FROZEN" || gone {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(CgroupError::io("freeze", folder)(std::io::ErrorKind::TimedOut.into()));
        }
        std::thread::sleep(Duration::from_millis(2));
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
        let done = put(&folder, file, frozen).and_then(|()| {
            assert!(host.is_frozen(&parent, &id));
            host.thaw(&parent, &id)
        });
        assert!(!host.is_frozen(&parent, &id));
        let now = std::fs::read_to_string(folder.join(file));
        std::fs::remove_dir(&folder).unwrap();
        done.unwrap();
        assert!(matches!(now.unwrap().trim(), "0" | "THAWED"));
    }
}
