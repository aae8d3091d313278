//! A pod on the node: pinned namespaces, /dev/shm, its files, its cgroup, its network, and for a shared PID namespace its
//! init. Each is noted in the journal before it is made; [`NodePods::take_down`] works from those notes.

use std::collections::BTreeMap;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use tokio_util::sync::CancellationToken;

use super::{NodePods, files};
use crate::core::backend::Journal;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, PodId};
use crate::core::ports::{Monitor, NetworkRequest, NetworkResult, monitor_v1};
use crate::core::records::{PodRecord, Resource, SandboxFacts};
use crate::core::spec::NamespaceMode;
use crate::fail_point;
use crate::integrations::cgroup::Parent;
use crate::integrations::mounts;
use crate::integrations::netns::{Pinned, Wanted};
use crate::utils::atomic::{self, Durability};
use crate::utils::pidfd::ProcessId;
use crate::utils::process::Spawn;

/// Size of a pod's /dev/shm in bytes.
const SHM: u64 = 64 << 20;
/// How long the start waits for programs that take garbage away.
const SWEEP: Duration = Duration::from_secs(3);
/// How long killed processes may take to leave a cgroup.
pub(in crate::backends) const KILL: Duration = Duration::from_secs(10);

const CGROUP: &str = "cgroup";
const NAMESPACES: &str = "namespaces";
const SHM_MOUNT: &str = "shm";
const INIT: &str = "init";
/// Kind of the journal's notes of networks that a [`PodNetwork`](crate::core::ports::PodNetwork) has to disconnect.
pub(in crate::backends) const NETWORK: &str = "network";

fn resource(kind: &str, name: impl Into<String>) -> Resource {
    Resource { kind: kind.into(), name: name.into() }
}

/// What the pod has of its own.
struct Shape {
    net: bool,
    ipc: bool,
    shared_pids: bool,
}

impl Shape {
    fn of(pod: &PodRecord) -> Self {
        let n = &pod.config.security.namespaces;
        Self {
            net: n.network == NamespaceMode::Pod,
            ipc: n.ipc == NamespaceMode::Pod,
            shared_pids: n.pid == NamespaceMode::Pod,
        }
    }
}

impl NodePods {
    pub(in crate::backends) async fn make_sandbox(
        &self,
        pod: &PodRecord,
        pod_dir: &Utf8Path,
        monitor: &dyn Monitor,
        journal: &mut dyn Journal,
        cancel: &CancellationToken,
    ) -> Result<SandboxFacts> {
        let shape = Shape::of(pod);
        root_of(pod)?;
        let parent = self.parent(pod)?;
        let shm = pod_dir.join("shm");
        let mut notes = vec![resource(CGROUP, &pod.config.cgroup_parent)];
        notes.extend(self.notes(pod, pod_dir));
        journal.note(notes).await?;
        fail_point!("sandbox.noted");
        let (hierarchy, parent_in, id) = (self.hierarchy.clone(), parent.clone(), pod.id.clone());
        blocking(move || Ok(hierarchy.create_parent(&parent_in, &id)?)).await?;
        fail_point!("sandbox.cgroup");
        let (resources, overhead) = (&pod.config.resources, &pod.config.overhead);
        self.change_pod_limits(pod, resources, overhead)
            .await
            .map_err(|e| e.context("limits of the pod as a whole"))?;
        let pinned = self
            .pins
            .create(
                &pod.id,
                Wanted {
                    net: shape.net,
                    ipc: shape.ipc,
                    uts: shape.net,
                    hostname: pod.config.hostname.clone(),
                    sysctls: self.sysctls(pod),
                    user: pod.config.security.namespaces.user.clone(),
                },
            )
            .await?;
        fail_point!("sandbox.pinned");
        if shape.ipc {
            self.mount_shm(pod, pod_dir).await?;
        }
        fail_point!("sandbox.shm");
        let (pidns, init) = match shape.shared_pids {
            true => Some(self.start_init(pod, &parent, &pinned, monitor, journal).await?).unzip(),
            false => (None, None),
        };
        let network = match shape.net {
            true => self.connect(pod, cancel).await?,
            false => NetworkResult::default(),
        };
        fail_point!("sandbox.connected");
        self.write_files(pod, pod_dir, &network).await?;
        fail_point!("sandbox.files");
        Ok(SandboxFacts {
            netns: pinned.net,
            ipcns: pinned.ipc,
            utsns: pinned.uts,
            pidns,
            init,
            userns: pinned.user,
            shm: shape.ipc.then_some(shm),
            cgroup_parent: parent.relative().to_string(),
            network,
        })
    }

    /// What the journal says of a pod's namespaces and network.
    pub(in crate::backends) fn notes(&self, pod: &PodRecord, pod_dir: &Utf8Path) -> Vec<Resource> {
        let shape = Shape::of(pod);
        let mut notes = vec![resource(NAMESPACES, pod.id.as_str())];
        if shape.ipc {
            notes.push(resource(SHM_MOUNT, pod_dir.join("shm").as_str()));
        }
        if shape.net {
            notes.push(resource(NETWORK, self.pins.netns_path(&pod.id)));
        }
        notes
    }

    /// Mounts what the pod's containers have as /dev/shm.
    pub(in crate::backends) async fn mount_shm(&self, pod: &PodRecord, pod_dir: &Utf8Path) -> Result<Utf8PathBuf> {
        let (path, owner) = (pod_dir.join("shm"), root_of(pod)?);
        let at = path.clone();
        blocking(move || Ok(mounts::mount_shm(at.as_std_path(), SHM, owner)?)).await?;
        Ok(path)
    }

    /// Writes the files that the pod's containers see as theirs.
    pub(in crate::backends) async fn write_files(
        &self,
        pod: &PodRecord,
        pod_dir: &Utf8Path,
        network: &NetworkResult,
    ) -> Result<()> {
        let (pod, pod_dir, network, owner) = (pod.clone(), pod_dir.to_owned(), network.clone(), root_of(pod)?);
        blocking(move || write_files(&pod, &pod_dir, owner, &network)).await
    }

    /// What is asked for, and beside it what lets programs without capabilities serve and ping, as containers elsewhere.
    pub(in crate::backends) fn sysctls(&self, pod: &PodRecord) -> BTreeMap<String, String> {
        let mut all = pod.config.sysctls.clone();
        if !Shape::of(pod).net {
            return all;
        }
        let slashes = |name: &str| name.replace('.', "/");
        let mut default = |wanted: bool, name: &str, value: &str| {
            if wanted && !pod.config.sysctls.contains_key(name) && !pod.config.sysctls.contains_key(&slashes(name)) {
                all.insert(name.into(), value.into());
            }
        };
        default(self.config.unprivileged_ports, "net.ipv4.ip_unprivileged_port_start", "0");
        // A user namespace maps no such range of groups.
        let own_users = pod.config.security.namespaces.user.is_some();
        default(self.config.unprivileged_icmp && !own_users, "net.ipv4.ping_group_range", "0 2147483647");
        all
    }

    async fn start_init(
        &self,
        pod: &PodRecord,
        parent: &Parent,
        pinned: &Pinned,
        monitor: &dyn Monitor,
        journal: &mut dyn Journal,
    ) -> Result<(Utf8PathBuf, ProcessId)> {
        let (hierarchy, parent, id) = (self.hierarchy.clone(), parent.clone(), pod.id.clone());
        let cgroups = blocking(move || Ok(hierarchy.create_init(&parent, &id)?)).await?;
        let path = |p: &Option<Utf8PathBuf>| p.as_ref().map(ToString::to_string).unwrap_or_default();
        let request = monitor_v1::StartInit {
            cgroups: cgroups.iter().map(ToString::to_string).collect(),
            namespaces: vec![path(&pinned.user), path(&pinned.ipc), path(&pinned.uts), path(&pinned.net)],
            pid_namespace: String::new(),
        };
        fail_point!("sandbox.init_cgroup");
        let identity = self.begin_init(pod, request, monitor, journal).await?;
        Ok((self.pins.pin_pid(&pod.id, identity.pid).await?, identity))
    }

    /// Has the monitor start the pod's init, and notes it.
    pub(in crate::backends) async fn begin_init(
        &self,
        pod: &PodRecord,
        request: monitor_v1::StartInit,
        monitor: &dyn Monitor,
        journal: &mut dyn Journal,
    ) -> Result<ProcessId> {
        let pid = monitor.start_init(request).await?;
        fail_point!("sandbox.init_started");
        let identity =
            ProcessId::of(pid).map_err(|e| Error::io(format!("the init of pod {} (pid {pid})", pod.id), e))?;
        journal
            .note(vec![resource(INIT, format!("{}:{}:{}", identity.pid, identity.start_time, identity.boot_id))])
            .await?;
        fail_point!("sandbox.init_noted");
        Ok(identity)
    }

    pub(in crate::backends) async fn connect(
        &self,
        pod: &PodRecord,
        cancel: &CancellationToken,
    ) -> Result<NetworkResult> {
        let request = self.network_request(pod)?;
        match cancel.run_until_cancelled(self.network.add(&request)).await {
            Some(result) => result.map_err(|e| e.context(format!("connect pod {}", pod.id))),
            None => Err(Error::new(Kind::Aborted, format!("pod {} was stopped while it was connected", pod.id))),
        }
    }

    fn network_request(&self, pod: &PodRecord) -> Result<NetworkRequest> {
        let (ingress_bps, egress_bps) = files::bandwidth(&pod.config.annotations)?;
        let m = &pod.config.metadata;
        Ok(NetworkRequest {
            pod: pod.id.clone(),
            name: m.name.clone(),
            namespace: m.namespace.clone(),
            uid: m.uid.clone(),
            netns: self.pins.netns_path(&pod.id),
            port_mappings: pod.config.port_mappings.iter().filter(|p| p.host_port != 0).cloned().collect(),
            ingress_bps,
            egress_bps,
            dns: pod.config.dns.clone(),
            cgroup_path: format!("/{}", self.parent(pod)?.relative()),
        })
    }

    /// Takes down what the notes name, the network first (its plugins need the netns); goes on after a failure.
    pub(in crate::backends) async fn take_down(&self, pod: &PodRecord, _pod_dir: &Utf8Path) -> Result<()> {
        let mut first = Ok(());
        for note in pod.resources.iter().rev() {
            fail_point!("teardown.step");
            let done = match note.kind.as_str() {
                NETWORK => self.network.del(&self.network_request(pod)?).await,
                INIT => end_init(&note.name),
                SHM_MOUNT => {
                    let path = Utf8PathBuf::from(&note.name);
                    blocking(move || Ok(mounts::unmount(path.as_std_path())?)).await
                }
                NAMESPACES => self.pins.unpin(&pod.id).await.map_err(Error::from),
                CGROUP => {
                    let (hierarchy, parent, id) = (self.hierarchy.clone(), self.parent(pod)?, pod.id.clone());
                    blocking(move || Ok(hierarchy.remove_parent(&parent, &id, KILL)?)).await
                }
                other => {
                    Err(Error::internal(format!("pod {} owns a {other:?}, which this version does not know", pod.id)))
                }
            };
            if let Err(e) = done {
                tracing::error!(pod = pod.id.as_str(), kind = note.kind, error = e.chain(), "can't take it down");
                first = first.and(Err(e.context(format!("take down the {} of pod {}", note.kind, pod.id))));
            }
        }
        first
    }

    /// Kills what is in a container's groups, known to its runtime or not: one that was killed over making it has written
    /// nothing down.
    pub(in crate::backends) async fn kill_container(&self, parent: &Parent, container: &ContainerId) -> Result<()> {
        let (hierarchy, at, id) = (self.hierarchy.clone(), parent.clone(), container.clone());
        blocking(move || Ok(hierarchy.kill_container(&at, &id, KILL)?)).await
    }

    /// Removes a container's groups, where its runtime has left them empty.
    pub(in crate::backends) async fn remove_groups(&self, parent: &Parent, container: &ContainerId) -> Result<()> {
        let (hierarchy, at, id) = (self.hierarchy.clone(), parent.clone(), container.clone());
        blocking(move || Ok(hierarchy.remove_container(&at, &id)?)).await
    }

    /// Removes what no pod of `pods` and no container of `containers` claims; `deletes`: containers of the runtime's, and the
    /// calls that remove them.
    pub(in crate::backends) async fn sweep(
        &self,
        pods: &[PodRecord],
        containers: &[ContainerId],
        deletes: Vec<(Spawn, ContainerId)>,
    ) -> Result<()> {
        let live: Vec<PodId> = pods.iter().map(|p| p.id.clone()).collect();
        // Groups of execs that an earlier daemon had made and not begun.
        let (hierarchy, claimed) = (self.hierarchy.clone(), containers.to_vec());
        let parents: Vec<_> = pods.iter().filter_map(|p| self.parent(p).ok()).collect();
        blocking(move || Ok(hierarchy.end_idle_execs(&parents, &claimed)?)).await?;
        let gone = self.gone_networks(&live).await?;
        let (network, pins, state) = (self.network.clone(), self.pins.clone(), self.config.state.clone());
        self.outside(async move {
            let first = run_deletes(deletes).await;
            network.gc(&live).await?;
            for pod in gone {
                tracing::info!(pod = pod.as_str(), "removing namespaces that nobody claims");
                let shm = state.join("pods").join(pod.as_str()).join("shm");
                blocking(move || Ok(mounts::unmount(shm.as_std_path())?)).await?;
                pins.unpin(&pod).await.map_err(Error::from)?;
            }
            first
        })
        .await
    }

    /// The same for a second runtime: its containers alone.
    pub(in crate::backends) async fn sweep_containers(&self, deletes: Vec<(Spawn, ContainerId)>) -> Result<()> {
        self.outside(run_deletes(deletes)).await
    }

    /// Pods whose namespaces are pinned and that are not `live`.
    async fn gone_networks(&self, live: &[PodId]) -> Result<Vec<PodId>> {
        let pinned = self.pins.list().await.map_err(Error::from)?;
        Ok(pinned.into_iter().map(|(pod, _)| pod).filter(|pod| !live.contains(pod)).collect())
    }

    /// What needs programs: containers of the runtime's that nobody claims, networks of pods that are gone, then their
    /// namespaces. A runtime or a plugin that hangs (a node whose network's own pods are not up yet) has a minute for each,
    /// and they may need this daemon to come up: beyond [`SWEEP`] this goes on beside all else. Pods that are made meanwhile
    /// are the network's to spare; their containers and namespaces are not listed.
    async fn outside(&self, work: impl Future<Output = Result<()>> + Send + 'static) -> Result<()> {
        let (tell, told) = tokio::sync::oneshot::channel();
        self.tasks.spawn_cancellable("garbage outside", async move {
            // Nobody waits any more: it is said here.
            if let Err(Err(e)) = tell.send(work.await) {
                let e: Error = e;
                tracing::warn!(why = e.chain(), "garbage is kept");
            }
        });
        match tokio::time::timeout(SWEEP, told).await {
            Ok(Ok(done)) => done,
            Ok(Err(_)) => Err(Error::internal("the daemon ends while garbage is collected")),
            Err(_) => {
                tracing::warn!("collecting garbage takes long and goes on while pods are served");
                Ok(())
            }
        }
    }
}

/// Containers of a runtime that nobody claims; `folder` has one entry for each that it knows, and is made.
pub(in crate::backends) async fn unclaimed(folder: Utf8PathBuf, claimed: &[ContainerId]) -> Result<Vec<ContainerId>> {
    let known = blocking(move || {
        std::fs::create_dir_all(&folder).map_err(|e| Error::io(format!("make {folder}"), e))?;
        let entries = folder.read_dir_utf8().map_err(|e| Error::io(format!("list {folder}"), e))?;
        Ok(entries.flatten().filter_map(|e| e.file_name().parse::<ContainerId>().ok()).collect::<Vec<_>>())
    })
    .await?;
    Ok(known.into_iter().filter(|id| !claimed.contains(id)).collect())
}

async fn run_deletes(deletes: Vec<(Spawn, ContainerId)>) -> Result<()> {
    let mut first = Ok(());
    for (delete, id) in deletes {
        tracing::info!(container = id.as_str(), "removing a container of the runtime's that nobody claims");
        if let Err(e) = delete.run_ok().await {
            first = first.and(Err(Error::from(e)));
        }
    }
    first
}

/// The pod's own files; `owner`: whose they are, so that the pod's root may change them. Blocks.
fn write_files(pod: &PodRecord, pod_dir: &Utf8Path, owner: (u32, u32), network: &NetworkResult) -> Result<()> {
    let node_file = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let own_network = Shape::of(pod).net;
    let hostname = match pod.config.hostname.as_str() {
        "" => node_file("/proc/sys/kernel/hostname").trim().to_string(),
        name => name.to_string(),
    };
    let hosts = if own_network { files::hosts(&hostname, &network.ips) } else { node_file("/etc/hosts") };
    let resolv = match &pod.config.dns {
        Some(dns) if *dns != Default::default() => files::resolv_conf(dns),
        _ => node_file("/etc/resolv.conf"),
    };
    for (name, text) in [("hostname", format!("{hostname}\n")), ("hosts", hosts), ("resolv.conf", resolv)] {
        let path = pod_dir.join(name);
        atomic::write(path.as_std_path(), text.as_bytes(), 0o644, Durability::Process)
            .and_then(|()| std::os::unix::fs::chown(&path, Some(owner.0), Some(owner.1)))
            .map_err(|e| Error::io(format!("write {path}"), e))?;
    }
    Ok(())
}

/// The host's ids of who is root in the pod.
fn root_of(pod: &PodRecord) -> Result<(u32, u32)> {
    let Some(user) = &pod.config.security.namespaces.user else { return Ok((0, 0)) };
    user.host_uid(0).zip(user.host_gid(0)).ok_or_else(|| Error::invalid("user namespace: 0 is not mapped"))
}

/// Kills the init that a note names; one that is gone is success.
fn end_init(note: &str) -> Result<()> {
    let mut parts = note.split(':');
    let identity = (|| {
        let (pid, start, boot) = (parts.next()?, parts.next()?, parts.next()?);
        Some(ProcessId { pid: pid.parse().ok()?, start_time: start.parse().ok()?, boot_id: boot.to_string() })
    })();
    let Some(identity) = identity else {
        return Err(Error::internal(format!("the note of an init {note:?} can't be read")));
    };
    let failed = |e| Error::io(format!("end the pod's init (pid {})", identity.pid), e);
    match identity.open().map_err(failed)? {
        Some(fd) => crate::utils::pidfd::signal(&fd, libc::SIGKILL).map_err(failed),
        None => Ok(()),
    }
}
