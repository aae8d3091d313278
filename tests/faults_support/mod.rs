//! The table of all crash points: where in a pod's, container's, exec's or image's life each one is met.
//!
//! A backend, driver or format that comes with points of its own adds lines here; `every_point_is_in_the_table` fails when it
//! has not. Points whose name begins with `zfs.` are the business of `zfs_crash.rs`.

use std::collections::BTreeSet;
use std::path::Path;

/// The step of a life in which a point is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// PullImage.
    Pull,
    /// RemoveImage.
    RemoveImage,
    /// RunPodSandbox.
    Run,
    /// CreateContainer.
    Create,
    /// StartContainer.
    Start,
    /// A container writes to its log.
    Write,
    /// ReopenContainerLog.
    Reopen,
    /// ExecSync.
    Exec,
    /// StopContainer, and the end of the container.
    Stop,
    /// RemoveContainer.
    Remove,
    /// StopPodSandbox.
    StopPod,
    /// RemovePodSandbox.
    RemovePod,
    /// The start of a daemon, killed twice.
    Recover,
    /// The end of a monitor under a daemon that runs.
    TakeOver,
}

/// A point.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// As in the source.
    pub name: &'static str,
    /// Where it is met.
    pub step: Step,
    /// It is met so many times at least: which one is the last is chosen at random.
    pub hits: u32,
}

/// Points of pods that are namespaces of the node: others make theirs in another way.
const OF_THE_NODE: [&str; 7] = [
    "sandbox.noted",
    "sandbox.cgroup",
    "sandbox.pinned",
    "sandbox.shm",
    "sandbox.init_cgroup",
    "sandbox.connected",
    "sandbox.files",
];

impl Point {
    /// Whether pods of that handler meet it.
    pub fn is_met_by(&self, handler: &str) -> bool {
        match handler {
            "proxmox-lxc" => !OF_THE_NODE.contains(&self.name) && !self.name.starts_with("vm."),
            _ => !self.name.starts_with("ct.") && !self.name.starts_with("vm."),
        }
    }

    /// Whether a monitor meets it.
    pub fn is_monitors(&self) -> bool {
        self.name.starts_with("monitor.")
    }
}

const fn at(step: Step, name: &'static str) -> Point {
    Point { name, step, hits: 1 }
}

const fn often(step: Step, name: &'static str, hits: u32) -> Point {
    Point { name, step, hits }
}

/// All of them.
pub const POINTS: &[Point] = &[
    at(Step::Pull, "overlay.layer.folder"),
    at(Step::Pull, "overlay.layer.unpacked"),
    at(Step::Pull, "overlay.layer.verified"),
    at(Step::Pull, "overlay.layer.synced"),
    at(Step::Pull, "overlay.layer.renamed"),
    at(Step::Pull, "image.layers"),
    at(Step::Pull, "image.blobs"),
    at(Step::Pull, "image.saved"),
    at(Step::RemoveImage, "image.forgotten"),
    at(Step::RemoveImage, "image.blobs_forgotten"),
    at(Step::RemoveImage, "image.layers_gone"),
    at(Step::Run, "sandbox.recorded"),
    at(Step::Run, "sandbox.folder"),
    at(Step::Run, "monitor_spawn.bound"),
    at(Step::Run, "monitor_spawn.started"),
    at(Step::Run, "monitor.begins"),
    at(Step::Run, "sandbox.monitor"),
    at(Step::Run, "sandbox.noted"),
    at(Step::Run, "sandbox.cgroup"),
    at(Step::Run, "sandbox.pinned"),
    at(Step::Run, "sandbox.shm"),
    at(Step::Run, "sandbox.init_cgroup"),
    at(Step::Run, "monitor.init.spawned"),
    at(Step::Run, "monitor.init.known"),
    at(Step::Run, "sandbox.init_started"),
    at(Step::Run, "sandbox.init_noted"),
    at(Step::Run, "sandbox.connected"),
    at(Step::Run, "sandbox.files"),
    at(Step::Run, "ct.noted_number"),
    at(Step::Run, "ct.asked"),
    at(Step::Run, "ct.created"),
    at(Step::Run, "ct.started"),
    at(Step::Run, "ct.noted"),
    at(Step::Run, "ct.pinned"),
    at(Step::Run, "ct.watched"),
    at(Step::Run, "ct.connected"),
    at(Step::Run, "vm.noted_number"),
    at(Step::Run, "vm.cloned"),
    at(Step::Run, "vm.configured"),
    at(Step::Run, "vm.started"),
    at(Step::Run, "sandbox.made"),
    at(Step::Run, "sandbox.ready"),
    at(Step::Run, "sandbox.told"),
    often(Step::Run, "atomic.written", 5),
    often(Step::Run, "atomic.renamed", 5),
    at(Step::Create, "create.recorded"),
    at(Step::Create, "create.folder"),
    at(Step::Create, "overlay.rootfs.made"),
    at(Step::Create, "overlay.rootfs.renamed"),
    at(Step::Create, "create.rootfs"),
    at(Step::Create, "create.mounted"),
    at(Step::Create, "vm.image_made"),
    at(Step::Create, "vm.image_filled"),
    at(Step::Create, "vm.attached"),
    at(Step::Create, "vm.root_made"),
    at(Step::Create, "create.bundle"),
    at(Step::Create, "create.planned"),
    at(Step::Create, "monitor.create.fifos"),
    at(Step::Create, "monitor.create.mounted"),
    at(Step::Create, "monitor.create.spawned"),
    at(Step::Create, "monitor.create.ended"),
    at(Step::Create, "monitor.create.known"),
    at(Step::Create, "monitor.create.answered"),
    at(Step::Create, "create.made"),
    at(Step::Create, "create.saved"),
    at(Step::Create, "create.kept"),
    at(Step::Start, "start.asked"),
    at(Step::Start, "monitor.start.spawned"),
    at(Step::Start, "monitor.start.ended"),
    at(Step::Start, "monitor.start.answered"),
    at(Step::Start, "start.answered"),
    at(Step::Start, "start.saved"),
    often(Step::Write, "monitor.log.read", 20),
    often(Step::Write, "monitor.log.written", 20),
    at(Step::Reopen, "monitor.log.reopened"),
    at(Step::Exec, "exec.planned"),
    at(Step::Exec, "monitor.exec.spawned"),
    at(Step::Exec, "monitor.exec.started"),
    at(Step::Exec, "monitor.exec.over"),
    at(Step::Exec, "exec.ended"),
    at(Step::Exec, "exec.cleaned"),
    at(Step::Stop, "stop.signalled"),
    at(Step::Stop, "monitor.exit.seen"),
    at(Step::Stop, "monitor.exit.drained"),
    at(Step::Stop, "monitor.exit.recorded"),
    at(Step::Stop, "monitor.exit.told"),
    at(Step::Stop, "exit.heard"),
    at(Step::Stop, "exit.saved"),
    at(Step::Stop, "monitor.delete.spawned"),
    at(Step::Stop, "monitor.delete.ended"),
    at(Step::Stop, "monitor.log.closing"),
    at(Step::Stop, "exit.reaped"),
    at(Step::Remove, "remove.reaped"),
    at(Step::Remove, "remove.marked"),
    at(Step::Remove, "remove.rootfs"),
    at(Step::Remove, "remove.folder"),
    at(Step::StopPod, "stop_pod.marked"),
    at(Step::StopPod, "stop_pod.ended"),
    at(Step::StopPod, "monitor.shutdown"),
    at(Step::StopPod, "stop_pod.monitor"),
    often(Step::StopPod, "teardown.step", 4),
    at(Step::StopPod, "ct.stopped"),
    at(Step::StopPod, "vm.stopped"),
    at(Step::StopPod, "stop_pod.torn"),
    at(Step::StopPod, "stop_pod.saved"),
    at(Step::RemovePod, "remove_pod.marked"),
    at(Step::RemovePod, "remove_pod.containers"),
    at(Step::RemovePod, "remove_pod.monitor"),
    at(Step::RemovePod, "remove_pod.folder"),
    at(Step::RemovePod, "remove_pod.record"),
    at(Step::Recover, "recovery.loaded"),
    at(Step::Recover, "recovery.compared"),
    at(Step::Recover, "recovery.saved"),
    at(Step::Recover, "recovery.pods"),
    at(Step::Recover, "recovery.collected"),
    at(Step::TakeOver, "takeover.cleaned"),
    at(Step::TakeOver, "takeover.spawned"),
    at(Step::TakeOver, "takeover.adopted"),
    at(Step::TakeOver, "monitor.adopt.inserted"),
];

/// Names of the points in the sources below a folder, and how often each is there.
fn named_below(folder: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder of sources").flatten() {
        let path = entry.path();
        if path.is_dir() {
            named_below(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&path).expect("a source");
            let code = text.lines().filter(|l| !l.trim_start().starts_with("//"));
            let names = code.filter_map(|l| l.split_once("fail_point!(\"")?.1.split_once('"'));
            found.extend(names.map(|(name, _)| name.to_owned()));
        }
    }
}

/// Fails when the table and the sources differ.
pub fn check_table() {
    let root = super::support::repository();
    let mut found = Vec::new();
    for sources in ["src", "monitor/src"] {
        named_below(&root.join(sources), &mut found);
    }
    found.retain(|name| !name.starts_with("zfs."));
    let once: BTreeSet<&str> = found.iter().map(String::as_str).collect();
    let known: BTreeSet<&str> = POINTS.iter().map(|p| p.name).collect();
    assert_eq!(known.len(), POINTS.len(), "a point is in the table twice");
    let (new, gone): (Vec<_>, Vec<_>) = (once.difference(&known).collect(), known.difference(&once).collect());
    assert!(new.is_empty(), "points that no test meets; add them to the table: {new:?}");
    assert!(gone.is_empty(), "points of the table that are not in the sources: {gone:?}");
    assert!(known.len() >= 60, "{}", known.len());
}
