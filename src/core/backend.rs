//! What a backend is: it turns "this pod" into its own kind of unit and "this container" into a plan that the
//! pod's monitor runs. The engine decides when; a backend never does.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use tokio_util::sync::CancellationToken;

use super::error::{Error, Kind, Result};
use super::ids::{ContainerId, PodId};
use super::plugins::Adjusted;
use super::ports::{Image, Monitor, monitor_v1};
use super::records::{ContainerRecord, PodRecord, ResolvedUser, Resource, SandboxFacts};
use super::spec::{ContainerConfig, Resources};
use super::stats::{PodSample, StatsTarget, StatsWanted};

/// What a backend can do, as data; shown in Status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// Pods with their own user namespace.
    pub user_namespaces: bool,
    /// Mounts that are read-only with everything below them.
    pub recursive_read_only_mounts: bool,
}

/// Notes what a pod is about to own, on disk, before it is made.
#[async_trait]
pub trait Journal: Send {
    /// Returns once the notes are written; noting twice is fine.
    async fn note(&mut self, resources: Vec<Resource>) -> Result<()>;
}

/// Says whether a pod is on record, as it is on disk at that moment: a pod is on record before its unit is made, and until it is
/// gone.
pub type IsKnown = dyn Fn(&PodId) -> Result<bool> + Send + Sync;

/// A container about to be made.
pub struct LaunchContext<'a> {
    /// Its pod, Ready.
    pub pod: &'a PodRecord,
    /// What the pod's unit is.
    pub facts: &'a SandboxFacts,
    /// Folder of the pod under the state folder.
    pub pod_dir: &'a Utf8Path,
    /// Folder of the container below it; exists, is empty and private.
    pub run_dir: &'a Utf8Path,
    /// Empty folder that the root file system will be mounted on.
    pub rootfs_mount_point: &'a Utf8Path,
    /// Id.
    pub id: &'a ContainerId,
    /// As asked for, environment included.
    pub config: &'a ContainerConfig,
    /// Its image.
    pub image: &'a Image,
    /// Root of its (detached) root file system, to look at.
    pub rootfs: BorrowedFd<'a>,
    /// Images that are mounted as volumes; their descriptors follow the root file system's in the order of
    /// [`Volumes::mount_points`].
    pub volumes: &'a Volumes,
    /// The container whose PID namespace it joins, with NamespaceMode::Target.
    pub target: Option<&'a ContainerRecord>,
    /// Absolute; None: no log.
    pub log_path: Option<&'a Utf8Path>,
}

/// Images that a container has as volumes, mounted nowhere yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Volumes {
    /// Empty folders, one an image, that the detached mounts go onto.
    pub mount_points: Vec<Utf8PathBuf>,
    /// For each mount of the container's configuration: the folder it shows, at or below one of `mount_points` and without
    /// links; None where it is no image.
    pub sources: Vec<Option<Utf8PathBuf>>,
}

/// How to launch it.
pub struct Launch {
    /// For the monitor.
    pub plan: monitor_v1::CreateContainer,
    /// Whom it runs as.
    pub user: ResolvedUser,
    /// Signal that asks it to end.
    pub stop_signal: i32,
    /// What plugins have made of it; None: they were not asked.
    pub adjusted: Option<Adjusted>,
}

/// A process to run in a container.
pub struct ExecContext<'a> {
    /// Its pod.
    pub pod: &'a PodRecord,
    /// The container, running.
    pub container: &'a ContainerRecord,
    /// Folder of the container.
    pub run_dir: &'a Utf8Path,
    /// Unique; names the files of this exec in `run_dir`, which the caller removes by [`Backend::end_exec`].
    pub exec_id: &'a str,
    /// Program and arguments.
    pub command: &'a [String],
    /// With a terminal.
    pub tty: bool,
}

/// A running container to write down.
pub struct CheckpointContext<'a> {
    /// Its pod.
    pub pod: &'a PodRecord,
    /// The container, running.
    pub container: &'a ContainerRecord,
    /// Folder of the container.
    pub run_dir: &'a Utf8Path,
    /// Private folder for what is needed on the way; removed by the caller.
    pub folder: &'a Utf8Path,
    /// Folder of what goes into the archive; has an empty folder `checkpoint` for the images of the processes.
    pub archive: &'a Utf8Path,
    /// Whether it is for [`Backend::restore_plan`]: each process is to go on in the same cgroup of the new container.
    pub groups: bool,
}

/// A container of a checkpoint, about to be made without processes.
pub struct RestoreContext<'a> {
    /// Its pod, Ready.
    pub pod: &'a PodRecord,
    /// Id.
    pub id: &'a ContainerId,
    /// As asked for.
    pub config: &'a ContainerConfig,
    /// Folder of the container, with what [`Backend::launch_plan`] has written.
    pub run_dir: &'a Utf8Path,
    /// Private folder with what [`Backend::checkpoint`] has written, its own to change; there until the restore.
    pub folder: &'a Utf8Path,
}

/// New limits of a container.
pub struct UpdateContext<'a> {
    /// Its pod.
    pub pod: &'a PodRecord,
    /// The container, created or running, with the limits it has now.
    pub container: &'a ContainerRecord,
    /// Folder of the container.
    pub run_dir: &'a Utf8Path,
    /// What is asked for: what is not given stays as it is.
    pub asked: &'a Resources,
    /// What the limits are afterwards, the old ones included.
    pub merged: &'a Resources,
}

/// A kind of pod. Each verb may be repeated after a crash at any point of an earlier try.
#[async_trait]
pub trait Backend: Send + Sync {
    /// Handler name ("crun").
    fn handler(&self) -> &'static str;
    /// What it can do.
    fn capabilities(&self) -> Capabilities;
    /// Whether it can work now; the message says what is missing and what to do.
    async fn probe(&self) -> Result<()>;
    /// Refuses what this backend can't honour, before anything is made.
    fn check(&self, pod: &super::spec::SandboxConfig) -> Result<()>;
    /// Adds what every pod of this backend has, asked for or not. Called before [`Backend::check`].
    fn adapt_pod(&self, pod: &mut super::spec::SandboxConfig) -> Result<()> {
        let _ = pod;
        Ok(())
    }
    /// As `adapt_pod`, for a container of such a pod.
    fn adapt_container(&self, pod: &PodRecord, container: &mut ContainerConfig) -> Result<()> {
        let _ = (pod, container);
        Ok(())
    }
    /// Makes the pod's unit; on failure the engine calls [`Backend::teardown`]. `cancel` ends waits for the outside.
    async fn ensure_sandbox(
        &self,
        pod: &PodRecord,
        pod_dir: &Utf8Path,
        monitor: &dyn Monitor,
        journal: &mut dyn Journal,
        cancel: &CancellationToken,
    ) -> Result<SandboxFacts>;
    /// Writes what the launch needs into the container's folder and says how to launch it.
    async fn launch_plan(&self, context: LaunchContext<'_>) -> Result<Launch>;
    /// After a `create` of the plan that failed: why the container's program can't run, if that was the reason.
    async fn cannot_run(&self, run_dir: &Utf8Path) -> Option<String> {
        let _ = run_dir;
        None
    }
    /// As `launch_plan`, for an exec.
    async fn exec_plan(&self, context: ExecContext<'_>) -> Result<monitor_v1::Exec>;
    /// The pod has another monitor from now on, or none. Called for each, those of an earlier daemon's pods included; what it
    /// does takes no time.
    fn monitor_changed(&self, pod: &PodRecord, monitor: Option<&Arc<dyn Monitor>>) {
        let _ = (pod, monitor);
    }
    /// A container's processes have ended; what its caller is to find on the node then is there when this returns. A failure is
    /// told in the log.
    async fn container_ended(&self, pod: &PodRecord, container: &ContainerRecord) -> Result<()> {
        let _ = (pod, container);
        Ok(())
    }
    /// Removes what the unit has of a container that its monitor has forgotten; a failure is told in the log. The unit may be gone.
    async fn container_removed(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        let _ = (pod, container);
        Ok(())
    }
    /// Waits for the end of a ready pod's unit, of whose containers then nobody tells any more; says what has become of it. Never
    /// where monitors see it themselves. May be dropped and asked again.
    async fn unit_ended(&self, pod: &PodId) -> String {
        let _ = pod;
        std::future::pending().await
    }
    /// Whether containers are the node's own: what they write is in the root file systems that it makes for them, and their processes
    /// are among its. Of others only their monitor knows whether they run.
    fn on_node(&self) -> bool {
        true
    }
    /// Removes the files of an exec that is over.
    fn end_exec(&self, pod: &PodRecord, container: &ContainerId, run_dir: &Utf8Path, exec_id: &str);
    /// Kills all execs of a container whose monitor is gone: nobody else could end them any more.
    async fn abandon_execs(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        let _ = (pod, container);
        Ok(())
    }
    /// Connects with a TCP port of a ready pod on its loopback interface. Blocking or not is for the caller to set.
    async fn dial(&self, pod: &PodRecord, port: u16) -> Result<std::net::TcpStream> {
        let _ = port;
        Err(Error::new(
            Kind::Unimplemented,
            format!("handler {} has no way to ports of pod {}", self.handler(), pod.id),
        ))
    }
    /// Whether a container that was made has been let run, as the runtime knows it: its monitor died while it was asked to.
    async fn has_started(&self, pod: &PodRecord, container: &ContainerId) -> Result<bool> {
        let _ = pod;
        Err(unoffered(self.handler(), &format!("telling whether container {container} was started")))
    }
    /// Kills and removes a container without its monitor; unknown is success.
    async fn remove_container(&self, pod: &PodRecord, container: &ContainerId) -> Result<()>;
    /// Takes down everything that the journal notes, network first; goes on after a failure and reports the first.
    /// What is gone is success. Called by StopPodSandbox and after a failed create.
    async fn teardown(&self, pod: &PodRecord, pod_dir: &Utf8Path) -> Result<()>;
    /// Whether pods can be connected now (for NetworkReady).
    async fn network_status(&self) -> std::result::Result<(), super::ports::NetworkNotReady>;
    /// Takes away what belongs to no pod or container of these; called at start, when nothing is in quarantine.
    async fn collect_garbage(&self, pods: &[PodRecord], containers: &[ContainerId]) -> Result<()>;
    /// Looks for units that carry this installation's mark and belong to no pod, and does with them what is configured; called
    /// again and again, when nothing is in quarantine. `pods`: those of now; `is_known` asks the disk whether a pod is on record.
    async fn look_for_orphans(&self, pods: &[PodRecord], is_known: &IsKnown) -> Result<()> {
        let _ = (pods, is_known);
        Ok(())
    }
    /// How often to do so; None: never.
    fn orphans_after(&self) -> Option<Duration> {
        None
    }
    /// What the targets use now, in their order. Starts no process, waits for no disk; what is gone is absent.
    async fn stats(&self, targets: Vec<StatsTarget>, wanted: StatsWanted) -> Result<Vec<PodSample>> {
        let _ = wanted;
        Ok(targets.iter().map(|_| PodSample::default()).collect())
    }
    /// Changes the limits of a container; refuses by name what it can't honour, before it changes anything.
    async fn update(&self, update: UpdateContext<'_>) -> Result<()> {
        Err(unoffered(self.handler(), &format!("new limits for container {}", update.container.id)))
    }
    /// Writes a running container's processes, `spec.dump` and `dump.log` into the folder of an archive; the container
    /// runs on, also after a failure.
    async fn checkpoint(&self, checkpoint: CheckpointContext<'_>) -> Result<()> {
        Err(unoffered(self.handler(), &format!("a checkpoint of container {}", checkpoint.container.id)))
    }
    /// Refuses a container, or its pod, that could be written down and not be restored.
    fn can_restore(&self, pod: &super::spec::SandboxConfig, container: &ContainerConfig) -> Result<()> {
        let _ = pod;
        Err(unoffered(self.handler(), &format!("restoring container {:?}", container.name)))
    }
    /// Changes a container's plan to one whose `create` makes its processes from a checkpoint: they run when it ends.
    async fn restore_plan(
        &self,
        restore: RestoreContext<'_>,
        plan: monitor_v1::CreateContainer,
    ) -> Result<monitor_v1::CreateContainer> {
        let _ = plan;
        Err(unoffered(self.handler(), &format!("restoring container {}", restore.id)))
    }
    /// Changes the limits of a pod as a whole (without its overhead, and that). Success without a change when
    /// somebody else keeps the pod's unit and has done it already.
    async fn update_sandbox(&self, pod: &PodRecord, resources: &Resources, overhead: &Resources) -> Result<()> {
        let _ = (resources, overhead);
        Err(unoffered(self.handler(), &format!("new limits for pod {}", pod.id)))
    }
    /// Stops all processes of a running container where they are, or lets them go on. Repeatable.
    async fn freeze(&self, pod: &PodRecord, container: &ContainerId, frozen: bool) -> Result<()> {
        let _ = (pod, frozen);
        Err(unoffered(self.handler(), &format!("freezing container {container}")))
    }
    /// The environment of a container's first process, as "NAME=value", from what the backend keeps in its folder. Records
    /// have no values.
    async fn environment(&self, pod: &PodRecord, run_dir: &Utf8Path) -> Result<Vec<String>> {
        let _ = run_dir;
        Err(unoffered(self.handler(), &format!("a look at environments of pod {}", pod.id)))
    }
    /// The node's pod networks, as the kubelet tells them ("10.1.0.0/24").
    async fn set_pod_cidrs(&self, cidrs: &[String]) -> Result<()> {
        let _ = cidrs;
        Ok(())
    }
}

fn unoffered(handler: &str, what: &str) -> Error {
    Error::new(Kind::Unimplemented, format!("{what}: handler {handler} does not offer it"))
}
