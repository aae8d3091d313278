//! Makes, empties and removes cgroups, and gives the daemon's own unit its two halves.
//!
//! Called through [`Hierarchy`] by the backends and at start. Everything blocks and may be repeated. Only folders with
//! our mark (an extended attribute with the pod's id), and those named after our containers, are ever removed; a crash leaves
//! empty groups of both kinds.

use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};

use super::{CgroupError, Driver, Hierarchy, Mode, Parent};
use crate::core::ids::{ContainerId, PodId};

/// Extended attribute of groups that we made: the pod's id.
pub(super) const MARK: &str = "trusted.lxcri.pod";
/// systemd marks the groups that it leaves to their unit (Delegate=) with one of these.
const DELEGATED: [&str; 2] = ["trusted.delegate", "user.delegate"];
/// Longest wait for a group to become empty before it is removed: zombies count until they are reaped.
const EMPTY: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);

impl Hierarchy {
    /// Makes the pod's parent where it is absent, with controllers for what comes below it. With systemd nothing is
    /// done: it makes slices itself when the first scope is asked for.
    pub fn create_parent(&self, parent: &Parent, pod: &PodId) -> Result<(), CgroupError> {
        if parent.driver() == Driver::Systemd {
            return Ok(());
        }
        self.roots().into_iter().try_for_each(|root| self.make(root, parent.relative(), pod, true))
    }

    /// Makes a group for the pod's init; the folders, one per hierarchy, to write its pid into. Empty with systemd,
    /// where the init stays with its monitor.
    pub fn create_init(&self, parent: &Parent, pod: &PodId) -> Result<Vec<Utf8PathBuf>, CgroupError> {
        self.create_parent(parent, pod)?;
        let Some(init) = parent.init(pod) else { return Ok(Vec::new()) };
        let mut folders = Vec::new();
        for root in self.roots() {
            self.make(root, &init, pod, false)?;
            folders.push(root.join(&init));
        }
        Ok(folders)
    }

    /// Removes what [`Hierarchy::create_parent`] and [`Hierarchy::create_init`] made for this pod, once it is empty of
    /// processes; a caller's own groups stay. Nothing there is success. What is in the init's group is killed, for up to
    /// `patience`: an init whose monitor died before it told of it is known by its group alone.
    pub fn remove_parent(&self, parent: &Parent, pod: &PodId, patience: Duration) -> Result<(), CgroupError> {
        if parent.driver() == Driver::Systemd {
            return Ok(());
        }
        for root in self.roots() {
            if let Some(init) = parent.init(pod) {
                let init = root.join(init);
                kill(&init, patience)?;
                remove_marked(&init, pod)?;
            }
            let mut relative = Some(parent.relative());
            while let Some(path) = relative.filter(|p| !p.as_str().is_empty()) {
                if !remove_marked(&root.join(path), pod)? {
                    break;
                }
                relative = path.parent();
            }
        }
        Ok(())
    }

    /// Ends what a container's groups hold, for up to `patience`, in every hierarchy: a runtime that was killed over making
    /// them knows of none, and may have put the process into some only. Nothing there is success.
    pub fn kill_container(
        &self,
        parent: &Parent,
        container: &ContainerId,
        patience: Duration,
    ) -> Result<(), CgroupError> {
        // With v1 no signal reaches who is frozen.
        self.thaw(parent, container)?;
        self.everywhere(&parent.container(container)).iter().try_for_each(|folder| kill(folder, patience))
    }

    /// Removes a container's groups, and those below them, where its runtime has left them empty; one that is not stays and
    /// is an error. With systemd nothing is done: it removes a scope once that is empty.
    pub fn remove_container(&self, parent: &Parent, container: &ContainerId) -> Result<(), CgroupError> {
        if parent.driver() == Driver::Systemd {
            return Ok(());
        }
        self.everywhere(&parent.container(container)).iter().try_for_each(|folder| remove_tree(folder))
    }

    /// Groups that are made in `group` from now on get its CPUs and memory nodes, as liblxc takes for granted on v1. One that
    /// is not there (yet), or v2, which always does so, is success.
    pub fn let_cpuset_be_inherited(&self, group: &Utf8Path) -> Result<(), CgroupError> {
        let Some(root) = self.legacy.get("cpuset") else { return Ok(()) };
        let folder = root.join(group);
        match folder.try_exists() {
            Ok(true) => put(&folder, "cgroup.clone_children", "1"),
            _ => Ok(()),
        }
    }

    /// The folder in every hierarchy that has it.
    fn everywhere(&self, relative: &Utf8Path) -> Vec<Utf8PathBuf> {
        let folders = self.roots().into_iter().map(|root| root.join(relative));
        folders.filter(|folder| folder.try_exists().unwrap_or(true)).collect()
    }

    /// Makes `relative` and the folders to it. `inner`: children get controllers from it, too.
    fn make(&self, root: &Utf8Path, relative: &Utf8Path, pod: &PodId, inner: bool) -> Result<(), CgroupError> {
        let v2 = self.unified.as_deref() == Some(root);
        let mut path = root.to_owned();
        let mut parts = relative.as_str().split('/').filter(|p| !p.is_empty()).peekable();
        while let Some(part) = parts.next() {
            if v2 {
                enable_controllers(&path);
            }
            path.push(part);
            match std::fs::create_dir(&path) {
                Ok(()) => {
                    // Our common folder belongs to no pod. Without extended attributes the group just stays.
                    if !(relative.as_str().starts_with("proxmox-lxcri") && parts.peek().is_some())
                        && let Err(e) = xattr::set(&path, MARK, pod.as_str().as_bytes())
                    {
                        tracing::debug!(%path, error = %e, "a cgroup can't be marked as ours and will not be removed");
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(CgroupError::io("create cgroup", &path)(e)),
            }
            if !v2 {
                inherit_cpuset(&path)?;
            }
        }
        if v2 && inner {
            enable_controllers(&path);
        }
        Ok(())
    }

    /// Takes the daemon's own place apart, on v2 in a delegated unit: this process goes to `daemon/`, and the
    /// answer is `monitors/`, where monitors outlive it. None: the place is not ours to divide.
    pub fn delegate(&self) -> Result<Option<Utf8PathBuf>, CgroupError> {
        let file = Utf8Path::new("/proc/self/cgroup");
        let text = std::fs::read_to_string(file).map_err(CgroupError::io("read", file))?;
        match (self.mode, text.lines().find_map(|line| line.strip_prefix("0::/"))) {
            (Mode::Unified, Some(own)) => self.delegate_at(Utf8Path::new(own), std::process::id()),
            _ => Ok(None),
        }
    }

    fn delegate_at(&self, own: &Utf8Path, pid: u32) -> Result<Option<Utf8PathBuf>, CgroupError> {
        let Some(root) = &self.unified else { return Ok(None) };
        let is_ours = |folder: &Utf8Path| {
            DELEGATED.iter().any(|name| matches!(xattr::get(folder, name), Ok(Some(value)) if value == b"1"))
        };
        let here = root.join(own);
        // A restarted daemon may be put into daemon/ at once (DelegateSubgroup=).
        let base = match (is_ours(&here), here.parent().filter(|_| here.file_name() == Some("daemon"))) {
            (true, _) => here,
            (false, Some(parent)) if is_ours(parent) => parent.to_owned(),
            _ => return Ok(None),
        };
        for half in ["daemon", "monitors"] {
            let folder = base.join(half);
            match std::fs::create_dir(&folder) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError::io("create cgroup", &folder)(e));
                }
                _ => {}
            }
        }
        put(&base.join("daemon"), "cgroup.procs", &pid.to_string())?;
        Ok(Some(base.join("monitors")))
    }
}

/// Kills every process in the group and below it and waits until none is left. A group that is gone is success.
pub fn kill(folder: &Utf8Path, deadline: Duration) -> Result<(), CgroupError> {
    let until = Instant::now() + deadline;
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let mut pids = processes(folder)?;
    if pids.contains(&own) {
        return Err(CgroupError::OwnGroup(folder.to_owned()));
    }
    let at_once = folder.join("cgroup.kill");
    let v2 = at_once.try_exists().unwrap_or(false);
    loop {
        if pids.is_empty() {
            return Ok(());
        }
        if v2 {
            match put(folder, "cgroup.kill", "1") {
                Err(CgroupError::Io { source, .. }) if is_gone(&source) => return Ok(()),
                other => other?,
            }
        } else {
            // Again in each round: what forked meanwhile is found by the next look.
            for pid in pids.iter().filter(|p| **p > 0).filter_map(|p| rustix::process::Pid::from_raw(*p)) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        if Instant::now() >= until {
            let pids = pids.into_iter().take(8).collect();
            return Err(CgroupError::Stuck { path: folder.to_owned(), after: deadline, pids });
        }
        std::thread::sleep(PAUSE);
        pids = processes(folder)?;
    }
}

/// Pids in the group and all below it; zombies that only wait for their parent do not count.
pub(super) fn processes(folder: &Utf8Path) -> Result<BTreeSet<i32>, CgroupError> {
    let mut all = BTreeSet::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let file = folder.join("cgroup.procs");
        match std::fs::read_to_string(&file) {
            Ok(text) => all.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
            Err(e) if is_gone(&e) => continue,
            // A threaded group has no list of processes; they are in its domain.
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            Err(e) => return Err(CgroupError::io("read", &file)(e)),
        }
        folders.extend(children(&folder)?);
    }
    all.retain(|pid| crate::utils::pidfd::start_time(*pid).is_ok() || has_other_threads(*pid));
    Ok(all)
}

/// A process whose first thread has ended looks like a zombie while its other threads run on.
fn has_other_threads(pid: i32) -> bool {
    std::fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|threads| threads.count() > 1)
}

pub(super) fn children(folder: &Utf8Path) -> Result<Vec<Utf8PathBuf>, CgroupError> {
    let failed = CgroupError::io("list cgroup", folder);
    let entries = match std::fs::read_dir(folder) {
        Err(e) if is_gone(&e) => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
        Ok(entries) => entries,
    };
    let folders = entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    Ok(folders.filter_map(|e| Utf8PathBuf::try_from(e.path()).ok()).collect())
}

pub(super) fn is_gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// Whether the folder is gone now. A group without our mark, or with groups below it that others use, stays.
fn remove_marked(folder: &Utf8Path, pod: &PodId) -> Result<bool, CgroupError> {
    match xattr::get(folder, MARK) {
        Ok(Some(mark)) if mark == pod.as_str().as_bytes() => {}
        Ok(_) => return Ok(false),
        Err(e) if is_gone(&e) => return Ok(true),
        Err(e) => return Err(CgroupError::io("read the mark of cgroup", folder)(e)),
    }
    remove_empty(folder)
}

/// Removes the group once no process is in it; false: groups below it keep it.
fn remove_empty(folder: &Utf8Path) -> Result<bool, CgroupError> {
    let until = Instant::now() + EMPTY;
    loop {
        match std::fs::remove_dir(folder) {
            Ok(()) => return Ok(true),
            Err(e) if is_gone(&e) => return Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                if !children(folder)?.is_empty() {
                    return Ok(false);
                }
                if Instant::now() >= until {
                    return Err(CgroupError::io("remove cgroup", folder)(e));
                }
                std::thread::sleep(PAUSE);
            }
            Err(e) => return Err(CgroupError::io("remove cgroup", folder)(e)),
        }
    }
}

/// Removes the group and all below it, deepest first.
fn remove_tree(folder: &Utf8Path) -> Result<(), CgroupError> {
    let mut all = vec![folder.to_owned()];
    let mut next = 0;
    while let Some(folder) = all.get(next) {
        let below = children(folder)?;
        all.extend(below);
        next += 1;
    }
    all.iter().rev().try_for_each(|folder| remove_empty(folder).map(drop))
}

/// Gives the group's children every controller that it has itself. One that can't be given (a group with processes,
/// realtime tasks and cpu) is left out: the OCI runtime says so if a limit needs it.
fn enable_controllers(folder: &Utf8Path) {
    let available = std::fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_ascii_whitespace() {
        if let Err(e) = put(folder, "cgroup.subtree_control", &format!("+{controller}")) {
            tracing::debug!(controller, error = %crate::core::error::Error::from(e).chain(), "controller not enabled");
        }
    }
}

/// A new v1 cpuset group takes no process before it has CPUs and memory nodes; they are its parent's.
pub(super) fn inherit_cpuset(folder: &Utf8Path) -> Result<(), CgroupError> {
    let Some(parent) = folder.parent() else { return Ok(()) };
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let file = folder.join(name);
        match std::fs::read_to_string(&file) {
            Ok(text) if text.trim().is_empty() => {
                let from = parent.join(name);
                let value = std::fs::read_to_string(&from).map_err(CgroupError::io("read", &from))?;
                put(folder, name, value.trim())?;
            }
            Ok(_) => {}
            Err(e) if is_gone(&e) => {} // no cpuset hierarchy
            Err(e) => return Err(CgroupError::io("read", &file)(e)),
        }
    }
    Ok(())
}

/// Writes a control file: one write(2), never created, never by rename.
pub(super) fn put(folder: &Utf8Path, name: &str, value: &str) -> Result<(), CgroupError> {
    let file = folder.join(name);
    let written = std::fs::OpenOptions::new()
        .write(true)
        .open(&file)
        .and_then(|mut f| io::Write::write_all(&mut f, value.as_bytes()));
    written.map_err(CgroupError::io("write", &file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::ContainerId;

    const LONG: Duration = Duration::from_secs(5);

    /// A process in groups of its own, killed and the groups removed whatever happens.
    struct Sleeper {
        child: std::process::Child,
        folders: Vec<Utf8PathBuf>,
    }

    impl Sleeper {
        fn start(folders: &[Utf8PathBuf]) -> Self {
            #[allow(clippy::disallowed_methods)] // outlives the call, unlike what the spawner is for
            let child = std::process::Command::new("/bin/sh").args(["-c", "sleep 60 & wait"]).spawn().unwrap();
            let this = Self { child, folders: folders.to_vec() };
            this.folders.iter().for_each(|f| put(f, "cgroup.procs", &this.pid().to_string()).unwrap());
            this
        }

        fn pid(&self) -> u32 {
            self.child.id()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.folders.iter().for_each(|f| drop(kill(f, Duration::from_secs(5))));
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// Removes test groups, deepest first.
    struct Cleanup(Vec<Utf8PathBuf>);

    impl Drop for Cleanup {
        fn drop(&mut self) {
            for folder in &self.0 {
                for child in children(folder).unwrap_or_default() {
                    let _ = std::fs::remove_dir(child);
                }
                let _ = std::fs::remove_dir(folder);
            }
        }
    }

    fn cleanup(host: &Hierarchy, name: &str) -> Cleanup {
        let all = host.roots().into_iter().flat_map(|root| {
            let path = root.join(name);
            let up = path.parent().filter(|p| *p != root).map(Utf8Path::to_owned);
            [Some(path), up].into_iter().flatten()
        });
        Cleanup(all.collect())
    }

    #[test]
    fn a_pods_groups_are_made_killed_and_removed() {
        let host = Hierarchy::detect().unwrap();
        let pod = PodId::new();
        let name = format!("lxcri-test-{}/inner", &pod.as_str()[..12]);
        let clean = cleanup(&host, &name);
        let parent = Parent::new(Driver::Cgroupfs, &format!("/{name}"), &pod).unwrap();
        host.create_parent(&parent, &pod).unwrap();
        let init = host.create_init(&parent, &pod).unwrap();
        assert_eq!(init, host.create_init(&parent, &pod).unwrap());
        let folders = host.parent(&parent);
        assert!(folders.kill.join("cgroup.procs").try_exists().unwrap());
        let sleeper = Sleeper::start(&init);
        assert!(processes(&folders.kill).unwrap().contains(&(sleeper.pid() as i32)));

        // Another pod's call touches nothing.
        host.remove_parent(&parent, &PodId::new(), LONG).unwrap();
        assert!(init.iter().all(|f| f.try_exists().unwrap()));
        assert!(processes(&folders.kill).unwrap().contains(&(sleeper.pid() as i32)));
        kill(&folders.kill, LONG).unwrap();
        kill(&folders.kill.join("gone"), LONG).unwrap();
        assert!(processes(&folders.kill).unwrap().is_empty());
        drop(sleeper);
        // An init that nobody knows of goes with its group.
        let unknown = Sleeper::start(&init);
        host.remove_parent(&parent, &pod, LONG).unwrap();
        drop(unknown);
        host.remove_parent(&parent, &pod, LONG).unwrap();
        assert!(clean.0.iter().all(|f| !f.try_exists().unwrap()), "{:?}", clean.0);
    }

    #[test]
    fn a_container_that_no_runtime_knows_goes_by_its_groups() {
        let host = Hierarchy::detect().unwrap();
        let (pod, id) = (PodId::new(), ContainerId::new());
        let name = format!("lxcri-test-{}", &pod.as_str()[..12]);
        let parent = Parent::new(Driver::Cgroupfs, &format!("/{name}"), &pod).unwrap();
        let clean = cleanup(&host, &name);
        host.create_parent(&parent, &pod).unwrap();
        // The process came into one hierarchy, and not the one that is asked for processes otherwise.
        let listed = host.container(&parent, &id).kill;
        let folders: Vec<_> = host.roots().into_iter().map(|root| root.join(parent.container(&id))).collect();
        for folder in &folders {
            std::fs::create_dir_all(folder.join("init")).unwrap();
            inherit_cpuset(folder).unwrap();
            inherit_cpuset(&folder.join("init")).unwrap();
        }
        let inner = folders.iter().rfind(|f| **f != listed).unwrap_or(&listed).join("init");
        let sleeper = Sleeper::start(std::slice::from_ref(&inner));
        host.remove_container(&parent, &id).unwrap_err();
        host.kill_container(&parent, &id, LONG).unwrap();
        drop(sleeper);
        host.remove_container(&parent, &id).unwrap();
        assert!(folders.iter().all(|f| !f.try_exists().unwrap()), "{folders:?}");
        host.kill_container(&parent, &id, LONG).unwrap();
        host.remove_container(&parent, &id).unwrap();
        host.remove_parent(&parent, &pod, LONG).unwrap();
        assert!(clean.0.iter().all(|f| !f.try_exists().unwrap()), "{:?}", clean.0);
    }

    #[test]
    fn groups_of_others_stay() {
        let host = Hierarchy::detect().unwrap();
        let pod = PodId::new();
        let name = format!("lxcri-test-{}", &pod.as_str()[..12]);
        let clean = cleanup(&host, &name);
        host.roots().iter().for_each(|root| std::fs::create_dir(root.join(&name)).unwrap());
        let parent = Parent::new(Driver::Cgroupfs, &format!("/{name}"), &pod).unwrap();
        host.create_parent(&parent, &pod).unwrap();
        host.remove_parent(&parent, &pod, LONG).unwrap();
        assert!(clean.0.iter().all(|f| f.try_exists().unwrap()));
        let slice = Parent::new(Driver::Systemd, "", &pod).unwrap();
        host.create_parent(&slice, &pod).unwrap();
        assert_eq!(host.create_init(&slice, &pod).unwrap(), Vec::<Utf8PathBuf>::new());
        assert!(!host.container(&slice, &ContainerId::new()).kill.try_exists().unwrap());
    }

    #[test]
    fn own_group_is_never_killed_and_delegation_needs_the_mark() {
        let host = Hierarchy::detect().unwrap();
        let root = host.unified.clone().unwrap();
        let text = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = text.lines().find_map(|l| l.strip_prefix("0::/")).unwrap();
        let e = kill(&root.join(own), Duration::ZERO).unwrap_err();
        assert!(matches!(e, CgroupError::OwnGroup(_)), "{e}");

        let name = format!("lxcri-test-{}", &PodId::new().as_str()[..12]);
        let folder = root.join(&name);
        std::fs::create_dir(&folder).unwrap();
        let _clean = Cleanup(vec![folder.clone()]);
        let sleeper = Sleeper::start(std::slice::from_ref(&folder));
        let pid = sleeper.pid();
        assert_eq!(host.delegate_at(Utf8Path::new(&name), pid).unwrap(), None);
        xattr::set(&folder, DELEGATED[0], b"1").unwrap();
        let monitors = folder.join("monitors");
        assert_eq!(host.delegate_at(Utf8Path::new(&name), pid).unwrap(), Some(monitors.clone()));
        assert_eq!(host.delegate_at(&Utf8Path::new(&name).join("daemon"), pid).unwrap(), Some(monitors));
        let inside = std::fs::read_to_string(folder.join("daemon/cgroup.procs")).unwrap();
        assert!(inside.lines().any(|l| l == pid.to_string()), "{inside}");
    }
}
