//! Cgroups of single execs, below their container's: so that all that an exec has started can be killed, wherever in the
//! process tree it went.
//!
//! Called by the crun backend before and after an exec; the monitor kills and removes the group when the exec is over.
//! Blocks shortly. The container's limits hold, since the group is below its. No controller is turned on for it: on v2 the
//! container's group may go on holding processes. A crash between leaves an empty group, which goes with the next start of
//! the daemon or with the container.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};

use super::manage::{children, inherit_cpuset, is_gone, put};
use super::{CgroupError, Hierarchy, Mode, Parent};
use crate::core::ids::ContainerId;
use crate::core::spec::Resources;

/// What the names begin with. The monitor takes no other.
const PREFIX: &str = "exec-";
/// crun's group inside a systemd scope, which is the container's root.
const SUBGROUP: &str = "container";

impl Hierarchy {
    /// Name of the exec's group and its folders: one on v2, one per hierarchy on v1, first the one that lists its
    /// processes. Empty when the container's group is gone.
    pub fn exec_group(&self, parent: &Parent, container: &ContainerId, exec_id: &str) -> (String, Vec<Utf8PathBuf>) {
        let name = format!("{PREFIX}{exec_id}");
        let folders = self.container_folders(parent, container).into_iter().map(|f| f.join(&name)).collect();
        (name, folders)
    }

    /// Makes an exec's group; its name and folders. A paused container is refused. All or none: a runtime that finds no group in a v1 hierarchy leaves
    /// the process in its caller's.
    pub fn create_exec(
        &self,
        parent: &Parent,
        container: &ContainerId,
        exec_id: &str,
    ) -> Result<(String, Vec<Utf8PathBuf>), CgroupError> {
        if self.is_frozen(parent, container) {
            // Whoever joins its groups is stopped as well, and no deadline could end that.
            return Err(CgroupError::Frozen(container.clone()));
        }
        let (name, folders) = self.exec_group(parent, container, exec_id);
        let made = folders.iter().try_for_each(|folder| {
            match std::fs::create_dir(folder) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError::io("create cgroup", folder)(e));
                }
                _ => {}
            }
            if self.mode == Mode::Unified { Ok(()) } else { inherit_cpuset(folder) }
        });
        if let Err(e) = made {
            remove(&folders);
            return Err(e);
        }
        Ok((name, folders))
    }

    /// Removes an exec's group if nobody is in it.
    pub fn remove_exec(&self, parent: &Parent, container: &ContainerId, exec_id: &str) {
        remove(&self.exec_group(parent, container, exec_id).1);
    }

    /// Removes the groups of all execs of a container that nobody is in; with `kill`, after killing who is, for which it
    /// waits so long at most.
    pub fn end_execs(
        &self,
        parent: &Parent,
        container: &ContainerId,
        kill: Option<Duration>,
    ) -> Result<(), CgroupError> {
        for folder in self.container_folders(parent, container) {
            for group in children(&folder)?.iter().filter(|g| is_execs(g)) {
                if let Some(deadline) = kill {
                    super::kill(group, deadline)?;
                }
                remove(std::slice::from_ref(group));
            }
        }
        Ok(())
    }

    /// The same, killing nobody, for those of `containers` that have a group below one of `parents`. Each parent's folder is
    /// read once: there may be a thousand containers on record, and few in groups.
    pub fn end_idle_execs(&self, parents: &[Parent], containers: &[ContainerId]) -> Result<(), CgroupError> {
        let Some(any) = parents.first() else { return Ok(()) };
        let named = |c: &ContainerId| any.container(c).file_name().map(str::to_owned);
        let ids: HashMap<String, &ContainerId> = containers.iter().filter_map(|c| Some((named(c)?, c))).collect();
        for parent in parents {
            for folder in children(&self.parent(parent).kill)? {
                if let Some(id) = folder.file_name().and_then(|name| ids.get(name)) {
                    self.end_execs(parent, id, None)?;
                }
            }
        }
        Ok(())
    }

    /// Gives the groups of a container's execs the CPUs and memory nodes that the container will have. On v1 a group can't lose
    /// what one below it has: theirs go first. What is not within the container's now is theirs no sooner than the next
    /// exec's; on v2 the kernel sees to all of it.
    pub fn narrow_execs(
        &self,
        parent: &Parent,
        container: &ContainerId,
        limits: &Resources,
    ) -> Result<(), CgroupError> {
        let Some(root) = self.legacy.get("cpuset") else { return Ok(()) };
        for folder in self.container_folders(parent, container).iter().filter(|f| f.starts_with(root)) {
            for group in children(folder)?.iter().filter(|g| is_execs(g)) {
                for (file, value) in limits.cpusets() {
                    match put(group, file, value) {
                        Err(CgroupError::Io { source, .. })
                            if is_gone(&source) || source.kind() == io::ErrorKind::PermissionDenied => {}
                        other => other?,
                    }
                }
            }
        }
        Ok(())
    }

    /// The group that the runtime calls the container's, in every hierarchy that has it, first where processes are listed.
    fn container_folders(&self, parent: &Parent, container: &ContainerId) -> Vec<Utf8PathBuf> {
        let relative = parent.container(container);
        let first = self.container(parent, container).kill;
        let there = |folder: &Utf8PathBuf| folder.try_exists().unwrap_or(false);
        let mut folders: Vec<_> = self.roots().into_iter().map(|r| r.join(&relative)).filter(there).collect();
        folders.sort_by_key(|f| *f != first);
        for folder in &mut folders {
            let inner = folder.join(SUBGROUP);
            if parent.driver() == super::Driver::Systemd && there(&inner) {
                *folder = inner;
            }
        }
        folders
    }
}

fn is_execs(folder: &Utf8Path) -> bool {
    folder.file_name().is_some_and(|n| n.starts_with(PREFIX))
}

fn remove(folders: &[Utf8PathBuf]) {
    for folder in folders {
        match std::fs::remove_dir(folder) {
            Err(e) if !is_gone(&e) => tracing::debug!(%folder, error = %e, "the cgroup of an exec stays for now"),
            _ => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;
    use crate::core::ids::PodId;
    use crate::integrations::cgroup::Driver;

    #[test]
    fn groups_below_the_containers_own() {
        let temp = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::try_from(temp.path().to_owned()).unwrap();
        let (pod, id) = (PodId::new(), ContainerId::new());
        let host = |mode, legacy: &[&str]| Hierarchy {
            mode,
            unified: (mode == Mode::Unified).then(|| root.join("unified")),
            unified_controllers: vec!["memory".into()],
            legacy: legacy.iter().map(|c| (c.to_string(), root.join(c))).collect(),
        };
        let make = |path: Utf8PathBuf| std::fs::create_dir_all(path).unwrap();

        // v2 with systemd: inside crun's own group where there is one.
        let v2 = host(Mode::Unified, &[]);
        let slice = Parent::new(Driver::Systemd, "a.slice", &pod).unwrap();
        assert_eq!(v2.create_exec(&slice, &id, "1").unwrap(), ("exec-1".into(), Vec::new()));
        let scope = root.join(format!("unified/a.slice/lxcri-{id}.scope"));
        make(scope.clone());
        assert_eq!(v2.exec_group(&slice, &id, "1").1, [scope.join("exec-1")]);
        make(scope.join("container"));
        let (name, folders) = v2.create_exec(&slice, &id, "1").unwrap();
        assert_eq!((name.as_str(), &folders[..]), ("exec-1", &[scope.join("container/exec-1")][..]));
        assert!(folders[0].is_dir());
        v2.remove_exec(&slice, &id, "1");
        v2.remove_exec(&slice, &id, "1");
        assert!(!folders[0].try_exists().unwrap());

        // v1: every hierarchy that has the container, the one with the processes first.
        let v1 = host(Mode::Legacy, &["cpu", "memory", "pids"]);
        let parent = Parent::new(Driver::Cgroupfs, "/p", &pod).unwrap();
        ["cpu", "pids"].iter().for_each(|c| make(root.join(c).join("p").join(id.as_str())));
        let (_, folders) = v1.create_exec(&parent, &id, "2").unwrap();
        assert_eq!(folders, ["pids", "cpu"].map(|c| root.join(format!("{c}/p/{id}/exec-2"))));
        make(root.join(format!("cpu/p/{id}/other")));
        v1.end_execs(&parent, &id, Some(Duration::from_secs(5))).unwrap();
        assert!(folders.iter().all(|f| !f.try_exists().unwrap()));
        assert!(root.join(format!("cpu/p/{id}/other")).is_dir());
        // All or none.
        std::fs::write(root.join(format!("cpu/p/{id}/exec-3")), "").unwrap();
        std::fs::remove_dir_all(root.join(format!("cpu/p/{id}"))).unwrap();
        std::fs::write(root.join(format!("cpu/p/{id}")), "").unwrap();
        assert!(v1.create_exec(&parent, &id, "3").is_err());
        assert!(!root.join(format!("pids/p/{id}/exec-3")).try_exists().unwrap());
    }
}
