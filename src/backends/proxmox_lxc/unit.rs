//! A pod's CT: made, started, entered for the pod's network and files, watched, and taken away; those that are nobody's, too.
//!
//! The number is in the journal before it is asked for; a CT is ours if its notes say so, whatever the journal says: of two who want
//! one number one gets it. The CT's end is seen by a process of the pod's monitor inside of its PID namespace, which ends with it.

use std::collections::BTreeMap;

use camino::Utf8Path;
use tokio_util::sync::CancellationToken;

use super::plan::{self, CT};
use super::{ProxmoxLxcBackend, native};
use crate::backends::pods::sandbox::NETWORK;
use crate::core::backend::{IsKnown, Journal};
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::{Monitor, monitor_v1};
use crate::core::records::{PodRecord, Resource, SandboxFacts};
use crate::core::spec::{NamespaceMode, Resources};
use crate::fail_point;
use crate::integrations::netns::{Wanted, Which};
use crate::integrations::proxmox_api::{ApiError, CtSpec, ErrorKind, GuestChange, GuestId, NewGuest, Vmid};
use crate::utils::pidfd::ProcessId;

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
        started.inspect_err(|e| self.cts.failed(vmid, e, false)).map_err(|e| named(e.into()))?;
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
        // Its one container is the first of the CT's own processes.
        let shares = self.config.native || pod.config.security.namespaces.pid == NamespaceMode::Pod;
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
        let limits = plan::limits(&pod.config.resources, &pod.config.overhead, memory_of_the_node());
        let identity = self.cts.identity(pod);
        let mut spec = plan::spec(&pod.config, &identity, &template, &config.storage, &config.pool, limits)?;
        if config.native {
            journal.note(vec![native::note()]).await?;
            spec.guest.extra.extend(native::keys());
        }
        let make = |vmid: Vmid| {
            fail_point!("ct.noted_number");
            let n = vmid.get() - config.vmids.0.get();
            let nets = config.network.as_ref().map(|network| network.of(n)).unwrap_or_default();
            let guest = NewGuest { nets, ..spec.guest.clone() };
            let spec = CtSpec { guest, ..spec.clone() };
            async move {
                let begun = self.api.ct_create(node, vmid, &spec).await;
                begun.inspect_err(|e| self.cts.failed(vmid, e, true))?.wait().await.map(drop)
            }
        };
        match self.cts.claim(pod, journal, make).await? {
            Ok(vmid) => Ok(vmid),
            Err(e) if e.is_not_found() => {
                self.forget_template().await;
                Err(Error::new(Kind::FailedPrecondition, format!("make a CT for pod {}: {e}", pod.id)))
            }
            Err(e) => Err(Error::from(e).context(format!("make a CT for pod {}", pod.id))),
        }
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
        let ours = pod.resources.iter().filter(|n| n.kind != CT.taken && **n != native::note()).cloned();
        let (units, others): (Vec<Resource>, Vec<Resource>) = ours.partition(|n| n.kind == CT.note);
        let mut rest = pod.clone();
        rest.resources = others;
        if let Some(vmid) = units.last().and_then(|n| n.name.parse().ok()) {
            rest.config.cgroup_parent = plan::cgroup(vmid);
        }
        let mut first = self.pods.take_down(&rest, pod_dir).await;
        for unit in units {
            let vmid: Vmid = unit.name.parse().map_err(|e| Error::internal(format!("pod {}: {e}", pod.id)))?;
            match self.remove(pod, vmid).await {
                Ok(()) => self.cts.release(vmid),
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
    async fn delete_ct(&self, node: &str, vmid: Vmid) -> Result<()> {
        let failed = |e: &ApiError| self.cts.failed(vmid, e, false);
        match self.api.guest_stop(GuestId::ct(node, vmid)).await {
            // Deleting it stops it, too.
            Err(e) if matches!(e.kind(), ErrorKind::Permission { .. }) => {
                tracing::warn!(%vmid, error = %e, "the CT can't be stopped before it is deleted");
            }
            stopped => stopped.inspect_err(failed).map_err(|e| CT.locked(vmid, e))?,
        }
        fail_point!("ct.stopped");
        self.api.guest_delete(GuestId::ct(node, vmid), true).await.inspect_err(failed).map_err(|e| CT.locked(vmid, e))
    }

    pub(super) async fn sweep_orphans(&self, pods: &[PodRecord], is_known: &IsKnown) -> Result<()> {
        let mut seen = BTreeMap::new();
        for vmid in self.cts.unclaimed(&CT.claimed(pods)).await? {
            let Some(pod) = self.cts.nobodys(vmid, is_known).await? else { continue };
            let delete = self.delete_ct(&self.config.node, vmid);
            seen.extend(self.cts.tidy(vmid, pod, is_known, delete).await.map(|orphan| (vmid.get(), orphan)));
        }
        self.cts.keep_orphans(seen);
        Ok(())
    }

    pub(super) async fn change_unit(&self, pod: &PodRecord, resources: &Resources, overhead: &Resources) -> Result<()> {
        let limits = plan::limits(resources, overhead, memory_of_the_node());
        let set = [("memory", limits.memory.to_string()), ("cpulimit", limits.cpus.to_string())];
        let set = set.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        let change = GuestChange { set, ..GuestChange::default() };
        self.api
            .guest_update(GuestId::ct(&self.config.node, CT.vmid(pod)?), &change)
            .await
            .map(drop)
            .map_err(Error::from)
    }
}

/// Bytes of memory that this node has.
fn memory_of_the_node() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(info.mem_unit.into())
}
