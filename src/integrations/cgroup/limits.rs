//! Writes limits into a pod's parent cgroup, and out-of-memory scores into what is in a cgroup.
//!
//! Called by the backends for changes at run time (containers' own limits are the OCI runtime's work). Blocks shortly.
//! Only a group with our mark is written to: others keep theirs, and have done what they wanted already. A crash
//! between two files leaves the first written: the same call again writes all.

use std::io;

use camino::Utf8Path;

use super::manage::{MARK, is_gone, processes, put};
use super::{CgroupError, Driver, Hierarchy, Mode, Parent};
use crate::core::ids::PodId;
use crate::core::spec::Resources;

/// CFS period that a quota without one goes with, in microseconds.
const PERIOD: i64 = 100_000;

impl Hierarchy {
    /// Writes files of a group, by its path from the hierarchies' roots, each where its controller is: the part of the
    /// name before the first dot. Limits of which one must not exceed the other are written in whichever order works.
    pub fn set(&self, group: &Utf8Path, files: &[(String, String)]) -> Result<(), CgroupError> {
        let mut refused: Vec<(&Utf8Path, &(String, String), CgroupError)> = Vec::new();
        for setting in files {
            let (file, value) = setting;
            let controller = file.split('.').next().unwrap_or_default();
            let root = match (self.mode, &self.unified, self.legacy.get(controller)) {
                (Mode::Unified, Some(root), _) | (_, _, Some(root)) => root,
                _ => {
                    let none = io::Error::new(io::ErrorKind::NotFound, "no controller of this host has it");
                    return Err(CgroupError::Io { step: "write", path: group.join(file), source: none });
                }
            };
            if let Err(e) = put(&root.join(group), file, value) {
                refused.push((root.as_path(), setting, e));
            }
        }
        for (root, (file, value), first) in refused {
            put(&root.join(group), file, value).map_err(|_| first)?;
        }
        Ok(())
    }

    /// Gives the group `to` the limit of processes of the group `from`, both by their paths from the hierarchies' roots. Nothing is
    /// done where one of them is not there, or has none.
    pub fn copy_process_limit(&self, from: &Utf8Path, to: &Utf8Path) -> Result<(), CgroupError> {
        let v2 = self.mode == Mode::Unified;
        let root = if v2 { self.unified.as_ref() } else { self.legacy.get("pids") };
        let Some(root) = root else { return Ok(()) };
        let file = root.join(from).join("pids.max");
        let limit = match std::fs::read_to_string(&file) {
            Ok(limit) => limit,
            Err(e) if is_gone(&e) => return Ok(()),
            Err(e) => return Err(CgroupError::io("read", &file)(e)),
        };
        if v2 {
            // From the top: a controller is there below a group that hands it on.
            let mut above: Vec<_> = to.ancestors().skip(1).collect();
            above.reverse();
            for group in above {
                put(&root.join(group), "cgroup.subtree_control", "+pids")?;
            }
        }
        match put(&root.join(to), "pids.max", limit.trim()) {
            // Nothing is in it any more.
            Err(CgroupError::Io { source, .. }) if is_gone(&source) => Ok(()),
            put => put,
        }
    }

    /// Writes what is given of `limits` into the pod's parent group. False: the group is not ours (the kubelet's, or
    /// systemd's), and nothing was written.
    pub fn limit_parent(&self, parent: &Parent, pod: &PodId, limits: &Resources) -> Result<bool, CgroupError> {
        if parent.driver() == Driver::Systemd || parent.relative().as_str().is_empty() {
            return Ok(false);
        }
        let (mut ours, mut files) = (Vec::new(), std::collections::BTreeMap::new());
        for root in self.roots() {
            let folder = root.join(parent.relative());
            match xattr::get(&folder, MARK) {
                Ok(Some(mark)) if mark == pod.as_str().as_bytes() => ours.push((root, folder)),
                // On v1 a kubelet makes its group in the hierarchies that it writes to, and the others are made by us:
                // where one is not ours, the limits are not.
                Ok(_) => return Ok(false),
                Err(e) if is_gone(&e) => {}
                Err(e) => return Err(CgroupError::io("read the mark of cgroup", &folder)(e)),
            }
        }
        for (root, folder) in &ours {
            let v2 = self.unified.as_deref() == Some(*root);
            if v2 && self.mode != Mode::Unified {
                continue; // beside v1 it has no controllers
            }
            for (file, value) in if v2 { files_v2(limits) } else { files_v1(limits, folder) } {
                // A v1 hierarchy has the files of its own controllers only: one of them has to take it.
                match put(folder, &file, &value) {
                    Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                        files.entry(file).or_insert((folder.clone(), false));
                    }
                    other => {
                        other?;
                        files.insert(file, (folder.clone(), true));
                    }
                }
            }
        }
        if let Some((file, (folder, _))) = files.into_iter().find(|(_, (_, written))| !written) {
            let none = io::Error::new(io::ErrorKind::NotFound, "no controller of this host has it");
            return Err(CgroupError::Io { step: "write", path: folder.join(file), source: none });
        }
        Ok(!ours.is_empty())
    }
}

/// Gives every process in the group and below it the score; false: the kernel does not let us lower that far.
pub fn set_oom_score_adj(folder: &Utf8Path, score: i64) -> Result<bool, CgroupError> {
    let mut allowed = true;
    for pid in processes(folder)? {
        let file = camino::Utf8PathBuf::from(format!("/proc/{pid}"));
        match put(&file, "oom_score_adj", &score.to_string()) {
            Err(CgroupError::Io { source, .. }) => match source.raw_os_error() {
                Some(libc::ENOENT | libc::ESRCH) => {} // it has ended
                Some(libc::EACCES | libc::EPERM) => allowed = false,
                _ => return Err(CgroupError::Io { step: "write", path: file.join("oom_score_adj"), source }),
            },
            other => other?,
        }
    }
    Ok(allowed)
}

/// cgroup v2's files and values.
fn files_v2(limits: &Resources) -> Vec<(String, String)> {
    let max = |n: i64| if n < 0 { "max".to_owned() } else { n.to_string() };
    let mut files = Vec::new();
    let mut put = |name: &str, value: String| files.push((name.to_owned(), value));
    if limits.cpu_quota != 0 || limits.cpu_period != 0 {
        let quota = if limits.cpu_quota == 0 { "max".to_owned() } else { max(limits.cpu_quota) };
        put("cpu.max", format!("{quota} {}", period(limits)));
    }
    if limits.cpu_shares > 0 {
        put("cpu.weight", weight(limits.cpu_shares).to_string());
    }
    if limits.memory_limit != 0 {
        put("memory.max", max(limits.memory_limit));
    }
    if limits.memory_swap_limit != 0 {
        let swap = if limits.memory_swap_limit < 0 || limits.memory_limit < 0 {
            -1
        } else {
            limits.memory_swap_limit.saturating_sub(limits.memory_limit).max(0)
        };
        put("memory.swap.max", max(swap));
    }
    limits.cpusets().for_each(|(name, value)| put(name, value.to_owned()));
    limits.unified.iter().for_each(|(name, value)| put(name, value.clone()));
    files
}

/// cgroup v1's. Memory alone may never be above memory and swap together: the order depends on where it goes.
fn files_v1(limits: &Resources, folder: &Utf8Path) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut put = |name: &str, value: String| files.push((name.to_owned(), value));
    if limits.cpu_period > 0 || limits.cpu_quota > 0 {
        put("cpu.cfs_period_us", period(limits).to_string());
    }
    if limits.cpu_quota != 0 {
        put("cpu.cfs_quota_us", limits.cpu_quota.max(-1).to_string());
    }
    if limits.cpu_shares > 0 {
        put("cpu.shares", limits.cpu_shares.to_string());
    }
    let mut memory = Vec::new();
    if limits.memory_limit != 0 {
        memory.push(("memory.limit_in_bytes", limits.memory_limit.max(-1).to_string()));
    }
    if limits.memory_swap_limit != 0 {
        memory.push(("memory.memsw.limit_in_bytes", limits.memory_swap_limit.max(-1).to_string()));
    }
    let now = std::fs::read_to_string(folder.join("memory.limit_in_bytes")).ok().and_then(|t| t.trim().parse().ok());
    if limits.memory_limit < 0 || now.is_some_and(|now: i64| limits.memory_limit > now) {
        memory.reverse();
    }
    memory.into_iter().for_each(|(name, value)| put(name, value));
    limits.cpusets().for_each(|(name, value)| put(name, value.to_owned()));
    files
}

fn period(limits: &Resources) -> i64 {
    if limits.cpu_period > 0 { limits.cpu_period } else { PERIOD }
}

/// cpu.weight (1..10000) for cpu.shares (2..262144), as OCI runtimes convert it.
fn weight(shares: i64) -> i64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Resources {
        Resources {
            cpu_quota: 50_000,
            cpu_shares: 1024,
            memory_limit: 64 << 20,
            memory_swap_limit: 96 << 20,
            cpuset_cpus: "0".into(),
            unified: [("memory.high".to_owned(), "60000000".to_owned())].into(),
            ..Default::default()
        }
    }

    fn shown(files: &[(String, String)]) -> Vec<String> {
        files.iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    #[test]
    fn v2_files() {
        let expected = [
            "cpu.max=50000 100000",
            "cpu.weight=39",
            "memory.max=67108864",
            "memory.swap.max=33554432",
            "cpuset.cpus=0",
            "memory.high=60000000",
        ];
        assert_eq!(shown(&files_v2(&limits())), expected);
        let none = Resources { cpu_quota: -1, memory_limit: -1, memory_swap_limit: -1, ..Default::default() };
        assert_eq!(shown(&files_v2(&none)), ["cpu.max=max 100000", "memory.max=max", "memory.swap.max=max"]);
        assert_eq!(shown(&files_v2(&Resources::default())), Vec::<String>::new());
        assert_eq!((weight(2), weight(262_144), weight(i64::MAX)), (1, 10_000, 10_000));
    }

    #[test]
    fn v1_memory_grows_from_the_outside_and_shrinks_from_the_inside() {
        let dir = tempfile::tempdir().expect("tempdir");
        let folder = Utf8Path::from_path(dir.path()).expect("utf8");
        let order = |now: &str| {
            let path = dir.path().join("memory.limit_in_bytes");
            crate::utils::atomic::write(&path, now.as_bytes(), 0o600, crate::utils::atomic::Durability::Process)
                .expect("file");
            let files = files_v1(&limits(), folder);
            files.into_iter().map(|(n, _)| n).filter(|n| n.starts_with("memory")).collect::<Vec<_>>()
        };
        let (memory, both) = ("memory.limit_in_bytes".to_owned(), "memory.memsw.limit_in_bytes".to_owned());
        assert_eq!(order("1000\n"), [both.clone(), memory.clone()]);
        assert_eq!(order("9223372036854771712\n"), [memory, both]);
    }

    #[test]
    fn only_our_own_groups_are_limited() {
        let host = Hierarchy::detect().expect("cgroups");
        let pod = PodId::new();
        let name = format!("/lxcri-test-{}", &pod.as_str()[..12]);
        let parent = Parent::new(Driver::Cgroupfs, &name, &pod).expect("fits");
        struct Cleanup<'a>(&'a Hierarchy, &'a Parent, &'a PodId);
        impl Drop for Cleanup<'_> {
            fn drop(&mut self) {
                let _ = self.0.remove_parent(self.1, self.2, std::time::Duration::ZERO);
            }
        }
        let asked = Resources { memory_limit: 64 << 20, cpu_quota: 20_000, cpu_period: 100_000, ..Default::default() };
        assert!(!host.limit_parent(&parent, &pod, &asked).expect("absent is not ours"));
        host.create_parent(&parent, &pod).expect("made");
        let _clean = Cleanup(&host, &parent, &pod);
        assert!(!host.limit_parent(&parent, &PodId::new(), &asked).expect("another pod's"));
        assert!(host.limit_parent(&parent, &pod, &asked).expect("ours"));
        let read = |controller: &str, v1: &str, v2: &str| {
            let path = match host.legacy.get(controller) {
                Some(root) => root.join(parent.relative()).join(v1),
                None => host.unified.clone().expect("v2").join(parent.relative()).join(v2),
            };
            std::fs::read_to_string(path).expect("a limit").trim().to_owned()
        };
        assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), (64 << 20).to_string());
        assert!(read("cpu", "cpu.cfs_quota_us", "cpu.max").starts_with("20000"));
        // A kubelet's group on v1: somebody else's in one hierarchy, made by us in the others.
        if let Some(memory) = host.legacy.get("memory") {
            xattr::remove(memory.join(parent.relative()), MARK).expect("the mark goes");
            assert!(!host.limit_parent(&parent, &pod, &asked).expect("partly another's"));
            xattr::set(memory.join(parent.relative()), MARK, pod.as_str().as_bytes()).expect("and comes back");
        }
    }
}
