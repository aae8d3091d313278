//! A pod's CT: made, started, entered for the pod's network and files, watched, and taken away.
//!
//! The number is in the journal before it is asked for; a CT is ours if its notes say so, whatever the journal says: of two who want
//! one number one gets it. The CT's end is seen by a process of the pod's monitor inside of its PID namespace, which ends with it.

use std::collections::BTreeSet;

use camino::Utf8Path;
use tokio_util::sync::CancellationToken;

use super::ProxmoxLxcBackend;
use super::plan::{self, CT, TAKEN};
use crate::backends::pods::sandbox::NETWORK;
use crate::core::backend::Journal;
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::{Monitor, monitor_v1};
use crate::core::records::{PodRecord, Resource, SandboxFacts};
use crate::core::spec::{NamespaceMode, Resources};
use crate::fail_point;
use crate::integrations::netns::{Wanted, Which};
use crate::integrations::proxmox_api::{ApiError, ErrorKind, GuestChange, GuestId, Vmid};
use crate::utils::pidfd::ProcessId;

/// The number of a pod's CT: the last that it has asked for.
pub(super) fn vmid(pod: &PodRecord) -> Result<Vmid> {
    let note = pod.resources.iter().rev().find(|note| note.kind == CT);
    let note = note.ok_or_else(|| Error::precondition(format!("pod {} has no CT", pod.id)))?;
    note.name.parse().map_err(|e| Error::internal(format!("pod {}: {e}", pod.id)))
}

impl ProxmoxLxcBackend {
    pub(super) async fn make_unit(
        &self,
        pod: &PodRecord,
        pod_dir: &Utf8Path,
        monitor: &dyn Monitor,
        journal: &mut dyn Journal,
        cancel: &CancellationToken,
    ) -> Result<SandboxFacts> {
        let vmid = self.create(pod, journal).await?;
        if cancel.is_cancelled() {
            return Err(Error::new(Kind::Aborted, format!("pod {} was stopped while it was made", pod.id)));
        }
        fail_point!("ct.created");
        let named = |e: Error| e.context(format!("CT {vmid} of pod {}", pod.id));
        let started = self.api.guest_start(GuestId::ct(&self.config.node, vmid)).await;
        started.inspect_err(|e| self.failed(vmid, e, false)).map_err(|e| named(e.into()))?;
        fail_point!("ct.started");
        let init = self.init_of(vmid).await.map_err(named)?;
        let mut inside = pod.clone();
        inside.config.cgroup_parent = plan::cgroup(vmid);
        let mut notes = self.pods.notes(&inside, pod_dir);
        if self.config.network.is_some() {
            // It goes with the CT.
            notes.retain(|note| note.kind != NETWORK);
        }
        journal.note(notes).await?;
        fail_point!("ct.noted");
        let pinned = self
            .pods
            .pins
            .pin_of(&pod.id, init.pid, &[Which::User, Which::Net, Which::Ipc, Which::Uts, Which::Pid])
            .await?;
        // The number may have been given to another process before the last of them was pinned.
        if !init.is_alive().unwrap_or(false) {
            return Err(named(Error::new(Kind::Aborted, "it ended while it was made")));
        }
        let wanted = Wanted {
            net: true,
            ipc: true,
            uts: true,
            hostname: pod.config.hostname.clone(),
            sysctls: self.pods.sysctls(pod),
            user: pod.config.security.namespaces.user.clone(),
        };
        self.pods.pins.create(&pod.id, wanted).await?;
        fail_point!("ct.pinned");
        let shm = self.pods.mount_shm(&inside, pod_dir).await?;
        let path = |p: &Option<camino::Utf8PathBuf>| p.as_ref().map(ToString::to_string).unwrap_or_default();
        let request = monitor_v1::StartInit {
            cgroups: Vec::new(),
            namespaces: vec![path(&pinned.user), path(&pinned.ipc), path(&pinned.uts), path(&pinned.net)],
            pid_namespace: path(&pinned.pid),
        };
        let watch = self.pods.begin_init(&inside, request, monitor, journal).await?;
        fail_point!("ct.watched");
        let network = self.pods.connect(&inside, cancel).await?;
        fail_point!("ct.connected");
        self.pods.write_files(&inside, pod_dir, &network).await?;
        let shares = pod.config.security.namespaces.pid == NamespaceMode::Pod;
        Ok(SandboxFacts {
            netns: pinned.net,
            ipcns: pinned.ipc,
            utsns: pinned.uts,
            pidns: pinned.pid.filter(|_| shares),
            init: Some(watch),
            userns: pinned.user,
            shm: Some(shm),
            cgroup_parent: plan::cgroup(vmid),
            network,
        })
    }

    /// Makes the CT; its number.
    async fn create(&self, pod: &PodRecord, journal: &mut dyn Journal) -> Result<Vmid> {
        let (node, config) = (&self.config.node, &self.config);
        let template = self.template().await?;
        let (resources, overhead) = (&pod.config.resources, &pod.config.overhead);
        let limits = plan::limits(resources, overhead, memory_of_the_node());
        let mut spec = plan::spec(&pod.config, &self.identity(pod), &template, &config.storage, &config.pool, limits)?;
        let taken: BTreeSet<u32> = self.api.guests().await.map_err(Error::from)?.iter().map(|g| g.vmid.get()).collect();
        let (first, last) = config.vmids;
        for number in first.get()..=last.get() {
            // Others of this node are under way with the same list.
            if taken.contains(&number) || !self.reserve(number) {
                continue;
            }
            let vmid = Vmid::new(number.into()).map_err(|e| Error::internal(e.to_string()))?;
            if let Err(e) = journal.note(vec![Resource { kind: CT.into(), name: vmid.to_string() }]).await {
                self.release(vmid);
                return Err(e);
            }
            fail_point!("ct.noted_number");
            spec.nets = config.network.as_ref().map(|n| n.of(number - first.get())).unwrap_or_default();
            let made = match self.api.ct_create(node, vmid, &spec).await {
                Ok(task) => task.wait().await.map(drop),
                Err(e) => {
                    self.failed(vmid, &e, true);
                    Err(e)
                }
            };
            match made {
                Ok(()) => return Ok(vmid),
                Err(e) if *e.kind() == ErrorKind::AlreadyExists => {
                    tracing::info!(pod = pod.id.as_str(), vmid = number, "the number is taken: the next one");
                    journal.note(vec![Resource { kind: TAKEN.into(), name: vmid.to_string() }]).await?;
                }
                Err(e) if e.is_not_found() => {
                    self.forget_template().await;
                    let what = format!("make a CT for pod {}: {e}", pod.id);
                    return Err(Error::new(Kind::FailedPrecondition, what));
                }
                Err(e) => return Err(Error::from(e).context(format!("make a CT for pod {}", pod.id))),
            }
        }
        Err(Error::new(
            Kind::ResourceExhausted,
            format!("no number from {first} to {last} is free for a CT (handlers.proxmox-lxc.vmids)"),
        ))
    }

    /// Keeps the number from all others of this node; false: it is taken, or may not be given yet.
    pub(super) fn reserve(&self, number: u32) -> bool {
        !self.rests(number) && self.numbers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(number)
    }

    pub(super) fn release(&self, vmid: Vmid) {
        self.numbers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&vmid.get());
    }

    /// The CT's init, which has to have the ids that were configured.
    async fn init_of(&self, vmid: Vmid) -> Result<ProcessId> {
        let status = self.api.guest_status(GuestId::ct(&self.config.node, vmid)).await.map_err(Error::from)?;
        let pid = i32::try_from(status.pid).unwrap_or_default();
        if pid <= 1 {
            return Err(Error::precondition(format!("it is {} and has no init", status.status)));
        }
        let identity = ProcessId::of(pid).map_err(|e| Error::io(format!("its init (pid {pid})"), e))?;
        let (host, count) = self.config.ids;
        let wanted = [0, host, count].map(|n| n.to_string());
        for map in ["uid_map", "gid_map"] {
            let path = format!("/proc/{pid}/{map}");
            let text = std::fs::read_to_string(&path).map_err(|e| Error::io(path, e))?;
            if text.split_whitespace().ne(wanted.iter().map(String::as_str)) {
                return Err(Error::precondition(format!(
                    "its {map} is {:?}, not 0 {host} {count} (handlers.proxmox-lxc.first_id, ids)",
                    text.split_whitespace().collect::<Vec<_>>().join(" ")
                )));
            }
        }
        Ok(identity)
    }

    /// Takes down what the journal notes: the network first, the CT last.
    pub(super) async fn end_unit(&self, pod: &PodRecord, pod_dir: &Utf8Path) -> Result<()> {
        let ours = pod.resources.iter().filter(|n| n.kind != TAKEN).cloned();
        let (units, others): (Vec<Resource>, Vec<Resource>) = ours.partition(|n| n.kind == CT);
        let mut rest = pod.clone();
        rest.resources = others;
        if let Some(vmid) = units.last().and_then(|n| n.name.parse().ok()) {
            rest.config.cgroup_parent = plan::cgroup(vmid);
        }
        let mut first = self.pods.take_down(&rest, pod_dir).await;
        for unit in units {
            let vmid: Vmid = unit.name.parse().map_err(|e| Error::internal(format!("pod {}: {e}", pod.id)))?;
            match self.remove(pod, vmid).await {
                Ok(()) => self.release(vmid),
                Err(e) => {
                    tracing::error!(pod = pod.id.as_str(), %vmid, error = e.chain(), "can't remove its CT");
                    first = first.and(Err(e.context(format!("remove CT {vmid} of pod {}", pod.id))));
                }
            }
        }
        first
    }

    /// Stops and deletes a CT that is this pod's, where it is.
    async fn remove(&self, pod: &PodRecord, vmid: Vmid) -> Result<()> {
        match self.find_own(pod, vmid).await? {
            Some(node) => self.delete_ct(&node, vmid).await,
            None => Ok(()),
        }
    }

    /// Stops and deletes a CT of ours.
    pub(super) async fn delete_ct(&self, node: &str, vmid: Vmid) -> Result<()> {
        let failed = |e: &ApiError| self.failed(vmid, e, false);
        match self.api.guest_stop(GuestId::ct(node, vmid)).await {
            // Deleting it stops it, too.
            Err(e) if matches!(e.kind(), ErrorKind::Permission { .. }) => {
                tracing::warn!(%vmid, error = %e, "the CT can't be stopped before it is deleted");
            }
            stopped => stopped.inspect_err(failed).map_err(|e| locked(vmid, e))?,
        }
        fail_point!("ct.stopped");
        self.api.guest_delete(GuestId::ct(node, vmid), true).await.inspect_err(failed).map_err(|e| locked(vmid, e))
    }

    pub(super) async fn change_unit(&self, pod: &PodRecord, resources: &Resources, overhead: &Resources) -> Result<()> {
        let limits = plan::limits(resources, overhead, memory_of_the_node());
        let set = [("memory", limits.memory.to_string()), ("cpulimit", limits.cpus.to_string())];
        let set = set.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        let change = GuestChange { set, ..GuestChange::default() };
        self.api.guest_update(GuestId::ct(&self.config.node, vmid(pod)?), &change).await.map(drop).map_err(Error::from)
    }
}

/// Says what a lock means for whoever waits: most go by themselves, two are what died of a making or a deletion.
fn locked(vmid: Vmid, e: ApiError) -> Error {
    let hint = match e.kind() {
        ErrorKind::Locked(lock) if matches!(lock.as_str(), "create" | "destroyed") => {
            format!("what has locked it may have died: `pct unlock {vmid}` lets it be deleted")
        }
        ErrorKind::Locked(lock) => format!("CT {vmid} can't be removed as long as it has the lock {lock:?}"),
        _ => return e.into(),
    };
    Error::from(e).context(hint)
}

/// Bytes of memory that this node has.
fn memory_of_the_node() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(info.mem_unit.into())
}
