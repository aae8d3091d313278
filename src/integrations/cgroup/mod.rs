//! Control groups: which hierarchies this host has, where a pod's and a container's groups are, making and ending them.
//!
//! Called by the crun and lxc backends and, once at start, by `main` (the daemon's own delegation). Reference is
//! cgroup v2 with systemd; v1 is served as far as one OCI runtime needs it. **Functions that touch the file system
//! block** (shortly; killing waits for processes). What we make carries the pod's id in an extended attribute, so that
//! after a crash only our own groups are taken away. Fails with [`CgroupError`].

mod exec;
mod freeze;
mod limits;
mod manage;
mod parse;
mod path;
mod stats;

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};

pub use limits::set_oom_score_adj;
pub use manage::kill;
pub use path::{Driver, Parent, expand_slice};
pub use stats::{Depth, StatsReader, V2_FILES};

use super::mounts::{self, MountError, MountInfo};
use crate::core::error::{Error, Kind};
use crate::core::ids::ContainerId;

/// Mount options of a v1 hierarchy that are no controllers.
const NOT_CONTROLLERS: [&str; 8] = ["rw", "ro", "xattr", "noprefix", "clone_children", "all", "none", "cpuset_v2_mode"];

/// Which cgroups the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// v2 alone.
    Unified,
    /// v1 alone.
    Legacy,
    /// v1, and v2 beside it.
    Hybrid,
}

/// The cgroup mounts of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Which they are.
    pub mode: Mode,
    /// Mount point of v2.
    pub unified: Option<Utf8PathBuf>,
    /// Controllers that v2 has.
    pub unified_controllers: Vec<String>,
    /// Mount points of v1 by controller ("memory", "name=systemd").
    pub legacy: BTreeMap<String, Utf8PathBuf>,
}

/// Absolute folders of one cgroup, as the monitor wants them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Folders {
    /// Has memory.events (v2) or memory.oom_control (v1); "" where no hierarchy has the memory controller.
    pub memory: Utf8PathBuf,
    /// Has cgroup.procs, and cgroup.kill on v2.
    pub kill: Utf8PathBuf,
}

/// A cgroup operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The caller's parent does not fit the driver.
    #[error("cgroup parent {given:?}: {why}")]
    Parent {
        /// As given.
        given: String,
        /// For a human.
        why: String,
    },
    /// Not the name of a driver.
    #[error("{0:?} is not a cgroup driver (cgroupfs, systemd)")]
    Driver(String),
    /// No cgroup file system is mounted.
    #[error("no cgroup file system is mounted")]
    NotMounted,
    /// Mounts could not be read.
    #[error("find the cgroup mounts")]
    Mounts(#[from] MountError),
    /// A file or folder.
    #[error("{step} {path}")]
    Io {
        /// What was done.
        step: &'static str,
        /// To what.
        path: Utf8PathBuf,
        /// errno.
        source: io::Error,
    },
    /// Processes did not end after SIGKILL (state D).
    #[error("processes of cgroup {path} are still there {} ms after SIGKILL: {pids:?}", after.as_millis())]
    Stuck {
        /// Folder.
        path: Utf8PathBuf,
        /// How long was waited.
        after: Duration,
        /// Some of them.
        pids: Vec<i32>,
    },
    /// Nothing can be started in it.
    #[error("container {0} is paused")]
    Frozen(ContainerId),
    /// It would end the daemon.
    #[error("refused to kill cgroup {0}: this daemon is in it")]
    OwnGroup(Utf8PathBuf),
}

impl CgroupError {
    fn io(step: &'static str, path: &Utf8Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { step, path, source }
    }
}

impl From<CgroupError> for Error {
    fn from(e: CgroupError) -> Self {
        let message = e.to_string();
        match e {
            CgroupError::Parent { .. } | CgroupError::Driver(_) => Error::invalid(message),
            CgroupError::NotMounted | CgroupError::Frozen(_) => Error::precondition(message),
            CgroupError::Mounts(source) => Error::from(source).context(message),
            CgroupError::Io { source, .. } => Error::io(message, source),
            CgroupError::Stuck { .. } => Error::new(Kind::DeadlineExceeded, message),
            CgroupError::OwnGroup(_) => Error::internal(message),
        }
    }
}

impl Hierarchy {
    /// Reads the calling thread's mounts. Blocks shortly.
    pub fn detect() -> Result<Self, CgroupError> {
        let mut found = Self::from_mounts(&mounts::list()?)?;
        if let Some(root) = &found.unified {
            let file = root.join("cgroup.controllers");
            let text = std::fs::read_to_string(&file).map_err(CgroupError::io("read", &file))?;
            found.unified_controllers = text.split_ascii_whitespace().map(str::to_owned).collect();
        }
        Ok(found)
    }

    fn from_mounts(mounts: &[MountInfo]) -> Result<Self, CgroupError> {
        let (mut unified, mut legacy) = (None, BTreeMap::new());
        // Stray mounts elsewhere (a container's, a chroot's) must not win over the place where all tools look.
        let (usual, other): (Vec<_>, Vec<_>) = mounts.iter().partition(|m| m.target.starts_with("/sys/fs/cgroup"));
        for mount in usual.into_iter().chain(other) {
            let Some(target) = mount.target.to_str().map(Utf8PathBuf::from) else { continue };
            match mount.fstype.as_str() {
                "cgroup2" => unified = unified.or(Some(target)),
                "cgroup" => {
                    let options = mount.super_options.split(',');
                    let names = options.filter(|o| !NOT_CONTROLLERS.contains(o) && !o.starts_with("release_agent="));
                    for name in names {
                        legacy.entry(name.to_owned()).or_insert_with(|| target.clone());
                    }
                }
                _ => {}
            }
        }
        let mode = match (&unified, legacy.is_empty()) {
            (Some(_), true) => Mode::Unified,
            (Some(_), false) => Mode::Hybrid,
            (None, false) => Mode::Legacy,
            (None, true) => return Err(CgroupError::NotMounted),
        };
        Ok(Self { mode, unified, unified_controllers: Vec::new(), legacy })
    }

    /// Why crun would refuse this host, in words for `doctor` and Status; None: it does not.
    pub fn crun_refusal(&self) -> Option<String> {
        let (Mode::Hybrid, Some(root)) = (self.mode, &self.unified) else { return None };
        if self.unified_controllers.is_empty() {
            return None;
        }
        Some(format!(
            "cgroups are in hybrid mode and the v2 mount {root} has controllers ({}): crun refuses such a host. Boot with \
             systemd.unified_cgroup_hierarchy=1, or run the daemon in a mount namespace without {root}",
            self.unified_controllers.join(" ")
        ))
    }

    /// Whether the host has the controller ("hugetlb", "memory"). Blocks shortly.
    pub fn has_controller(&self, name: &str) -> bool {
        let listed = |root: &Utf8PathBuf| {
            std::fs::read_to_string(root.join("cgroup.controllers"))
                .is_ok_and(|l| l.split_whitespace().any(|c| c == name))
        };
        match self.mode {
            Mode::Unified => self.unified.as_ref().is_some_and(listed),
            _ => self.legacy.contains_key(name),
        }
    }

    /// Whether swap of a cgroup can be limited: swap accounting is on. Blocks shortly.
    pub fn can_limit_swap(&self) -> bool {
        let has = |path: Utf8PathBuf| path.try_exists().unwrap_or(false);
        match (&self.mode, &self.unified) {
            // The root group has no such file: every group below it does.
            (Mode::Unified, Some(root)) => root
                .read_dir_utf8()
                .is_ok_and(|entries| entries.flatten().any(|e| has(e.path().join("memory.swap.max")))),
            _ => self.legacy.get("memory").is_some_and(|root| has(root.join("memory.memsw.limit_in_bytes"))),
        }
    }

    /// Where the container's cgroup is, once the OCI runtime has made it.
    pub fn container(&self, parent: &Parent, container: &ContainerId) -> Folders {
        self.folders(&parent.container(container))
    }

    /// Where the parent is.
    pub fn parent(&self, parent: &Parent) -> Folders {
        self.folders(parent.relative())
    }

    fn folders(&self, relative: &Utf8Path) -> Folders {
        let at = |root: &Utf8PathBuf| root.join(relative);
        if let (Mode::Unified, Some(root)) = (self.mode, &self.unified) {
            // No controller, no file: the monitor would watch in vain.
            let memory = self.unified_controllers.iter().any(|c| c == "memory");
            return Folders { memory: if memory { at(root) } else { Utf8PathBuf::new() }, kill: at(root) };
        }
        let memory = self.legacy.get("memory").map(at).unwrap_or_default();
        let order = ["pids", "memory", "freezer", "devices", "cpu", "name=systemd"];
        let kill = order.iter().find_map(|c| self.legacy.get(*c)).or_else(|| self.legacy.values().next());
        Folders { memory, kill: kill.map(at).unwrap_or_default() }
    }

    /// Mount points of every hierarchy, each once.
    pub fn roots(&self) -> Vec<&Utf8Path> {
        let mut roots: Vec<&Utf8Path> = self.unified.iter().chain(self.legacy.values()).map(AsRef::as_ref).collect();
        roots.sort();
        roots.dedup();
        roots
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::PodId;

    fn mount(target: &str, fstype: &str, super_options: &str) -> MountInfo {
        MountInfo {
            id: 1,
            parent: 0,
            device: "0:30".into(),
            root: "/".into(),
            target: target.into(),
            shared: false,
            slave: false,
            fstype: fstype.into(),
            source: "cgroup".into(),
            options: "rw".into(),
            super_options: super_options.into(),
        }
    }

    #[test]
    fn modes_and_folders() {
        let (pod, cid) = (PodId::new(), ContainerId::new());
        let parent = Parent::new(Driver::Cgroupfs, "/p", &pod).unwrap();
        let v2 = [mount("/mnt/stray", "cgroup2", "rw"), mount("/sys/fs/cgroup", "cgroup2", "rw,nsdelegate")];
        let mut v2 = Hierarchy::from_mounts(&v2).unwrap();
        v2.unified_controllers = vec!["memory".into()];
        assert_eq!((v2.mode, v2.crun_refusal()), (Mode::Unified, None));
        let folder = Utf8PathBuf::from(format!("/sys/fs/cgroup/p/{cid}"));
        assert_eq!(v2.container(&parent, &cid), Folders { memory: folder.clone(), kill: folder });

        let v1 = [
            mount("/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct"),
            mount("/sys/fs/cgroup/memory", "cgroup", "rw,memory"),
            mount("/sys/fs/cgroup/systemd", "cgroup", "rw,xattr,release_agent=/x,name=systemd"),
        ];
        let v1 = Hierarchy::from_mounts(&v1).unwrap();
        assert_eq!(v1.mode, Mode::Legacy);
        assert_eq!(v1.legacy.keys().collect::<Vec<_>>(), ["cpu", "cpuacct", "memory", "name=systemd"]);
        assert_eq!(v1.roots().len(), 3);
        assert_eq!(v1.parent(&parent).memory, "/sys/fs/cgroup/memory/p");
        assert_eq!(v1.parent(&parent).kill, "/sys/fs/cgroup/memory/p");

        let both = [mount("/sys/fs/cgroup/cpu", "cgroup", "rw,cpu"), mount("/sys/fs/cgroup/unified", "cgroup2", "rw")];
        let mut both = Hierarchy::from_mounts(&both).unwrap();
        assert_eq!((both.mode, both.crun_refusal()), (Mode::Hybrid, None));
        assert_eq!(both.parent(&parent), Folders { memory: "".into(), kill: "/sys/fs/cgroup/cpu/p".into() });
        both.unified_controllers = vec!["hugetlb".into()];
        assert!(both.crun_refusal().unwrap().contains("hugetlb"));
        assert!(matches!(Hierarchy::from_mounts(&[]), Err(CgroupError::NotMounted)));
    }
}
