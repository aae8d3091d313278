//! A pod's CT: made, started, entered for the pod's network and files, watched, and taken away; those that are nobody's, too.
//!
//! The number is in the journal before it is asked for; a CT is ours if its notes say so, whatever the journal says: of two who want
//! one number one gets it. The CT's end is seen by a process of the pod's monitor inside of its PID namespace, which ends with it.

use std::collections::BTreeMap;

use camino::Utf8Path;
use tokio_util::sync::CancellationToken;

use super::owner::Found;
use super::plan::{self, CT};
use super::{ProxmoxLxcBackend, native};
use crate::backends::pods::sandbox::NETWORK;
use crate::backends::proxmox::failed;
use crate::core::backend::{IsKnown, Journal};
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::{Monitor, monitor_v1};
use crate::core::records::{PodRecord, Resource, SandboxFacts};
use crate::core::spec::{NamespaceMode, Resources};
use crate::fail_point;
use crate::integrations::netns::{Wanted, Which};
use crate::integrations::proxmox_api::{ApiError, CtSpec, ErrorKind, GuestChange, GuestId, GuestKind, NewGuest, Vmid};
use crate::utils::pidfd::ProcessId;

/// How often a CT is looked for that is to be deleted.
const LOOKS: usize = 3;

impl ProxmoxLxcBackend {
    pub(super) async fn make_unit(
        &self,
        pod: &PodRecord,
        pod_dir: &Utf8Path,
        monitor: &dyn Monitor,
        journal: &mut dyn Journal,
        cancel: &CancellationToken,
    ) -> Result<SandboxFacts> {
        let stopped = || Error::new(Kind::Aborted, format!("pod {} was stopped while it was made", pod.id));
        let made = self.create(pod, journal, cancel).await;
        if cancel.is_cancelled() {
            return Err(stopped());
        }
        let vmid = made?;
        fail_point!("ct.created");
        let named = |e: Error| e.context(format!("CT {vmid} of pod {}", pod.id));
        let start = self.api.guest_start(GuestId::ct(&self.config.node, vmid));
        let Some(started) = cancel.run_until_cancelled(start).await else {
            self.cts.doubt(vmid, false);
            return Err(stopped());
        };
        started.inspect_err(|e| self.cts.failed(vmid, e, false)).map_err(|e| named(failed(e)))?;
        fail_point!("ct.started");
        self.pods.copy_process_limit(&pod.config, &pod.id, plan::cgroup(vmid)).await.map_err(named)?;
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
    async fn create(&self, pod: &PodRecord, journal: &mut dyn Journal, cancel: &CancellationToken) -> Result<Vmid> {
        let (node, config) = (&self.config.node, &self.config);
        let stopped = || Error::new(Kind::Aborted, "its pod was stopped");
        let template = cancel.run_until_cancelled(self.template()).await.ok_or_else(stopped)??;
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
                let stopped = || ApiError::new(ErrorKind::Failed, format!("CT {vmid}"), "its pod was stopped");
                let places = self.api.place(GuestKind::Ct, node, spec.storage());
                let places = cancel.run_until_cancelled(places).await.ok_or_else(stopped)??;
                // Whether it is asked for has to be known: that takes as long as one request.
                let begun = self.api.ct_create_in(places, node, vmid, &spec).await;
                let running = begun.inspect_err(|e| self.cts.failed(vmid, e, true))?;
                fail_point!("ct.asked");
                cancel.run_until_cancelled(running.wait()).await.ok_or_else(stopped)?.map(drop)
            }
        };
        match self.cts.claim(pod, journal, make).await? {
            Ok(vmid) => Ok(vmid),
            Err(e) if e.is_not_found() => {
                self.forget_template().await;
                Err(Error::new(Kind::FailedPrecondition, format!("make a CT for pod {}: {e}", pod.id)))
            }
            Err(e) => Err(failed(e).context(format!("make a CT for pod {}", pod.id))),
        }
    }

    /// The CT's init, which has to have the ids that were configured.
    async fn init_of(&self, vmid: Vmid) -> Result<ProcessId> {
        let status = self.api.guest_status(GuestId::ct(&self.config.node, vmid)).await.map_err(failed)?;
        let pid = i32::try_from(status.pid).unwrap_or_default();
        if pid <= 1 {
            return Err(Error::precondition(format!("it is {} and has no init", status.status)));
        }
        let identity = ProcessId::of(pid).map_err(|e| Error::io(format!("its init (pid {pid})"), e))?;
        // All CTs have the same ids, and pids are given again: its cgroup says which CT it is of.
        let path = format!("/proc/{pid}/cgroup");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(path, e))?;
        if !is_in(&text, &plan::cgroup(vmid)) {
            let what = format!("pid {pid}, which node {} says is its init, is no process of it here", self.config.node);
            return Err(Error::precondition(what));
        }
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
        for _ in 0..LOOKS {
            let Some(Found { node, whole }) = self.find_own(pod, vmid).await? else { return Ok(()) };
            if self.delete_ct(&node, vmid, whole).await? {
                return Ok(());
            }
            // Somebody has deleted it meanwhile, or it was migrated.
        }
        Err(Error::new(Kind::Unavailable, format!("CT {vmid} is elsewhere each time that it is looked for")))
    }

    /// Stops and deletes a CT of ours; not `whole`: what is left of one, whose volumes nothing names. False: it is not there any more.
    async fn delete_ct(&self, node: &str, vmid: Vmid, whole: bool) -> Result<bool> {
        let uncertain = |e: &ApiError| self.cts.failed(vmid, e, false);
        let ct = GuestId::ct(node, vmid);
        match self.api.guest_stop(ct).await {
            // Deleting it stops it, too.
            Err(e) if matches!(e.kind(), ErrorKind::Permission { .. }) => {
                tracing::warn!(%vmid, error = %e, "the CT can't be stopped before it is deleted");
            }
            // Deleted at the same moment; deleting it asks whether that is so.
            Err(e) if e.is_not_found() => {}
            stopped => stopped.inspect_err(uncertain).map_err(|e| CT.locked(vmid, e))?,
        }
        fail_point!("ct.stopped");
        let deleted = self.api.guest_destroy(ct, true, !whole).await;
        deleted.inspect_err(uncertain).map_err(|e| CT.locked(vmid, e))
    }

    pub(super) async fn sweep_orphans(&self, pods: &[PodRecord], is_known: &IsKnown) -> Result<()> {
        let mut seen = BTreeMap::new();
        for vmid in self.cts.unclaimed(&CT.claimed(pods)).await? {
            let Some(pod) = self.cts.nobodys(vmid, is_known).await? else { continue };
            let delete = async { self.delete_ct(&self.config.node, vmid, true).await.map(drop) };
            seen.extend(self.cts.tidy(vmid, pod, is_known, delete).await.map(|orphan| (vmid.get(), orphan)));
        }
        self.cts.keep_orphans(seen);
        Ok(())
    }

    pub(super) async fn change_unit(&self, pod: &PodRecord, resources: &Resources, overhead: &Resources) -> Result<()> {
        let limits = plan::limits(resources, overhead, memory_of_the_node());
        let set = limits.keys().into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        let change = GuestChange { set, ..GuestChange::default() };
        let vmid = CT.vmid(pod)?;
        self.api.guest_update(GuestId::ct(&self.config.node, vmid), &change).await.map_err(failed)?;
        self.pods.copy_process_limit(&pod.config, &pod.id, plan::cgroup(vmid)).await
    }
}

/// Bytes of memory and of swap that this node has.
fn memory_of_the_node() -> (u64, u64) {
    let info = rustix::system::sysinfo();
    let bytes = |units: u64| units.saturating_mul(info.mem_unit.into());
    (bytes(info.totalram as u64), bytes(info.totalswap as u64))
}

/// Whether a process with this `/proc/PID/cgroup` is in that cgroup or below it.
fn is_in(text: &str, cgroup: &str) -> bool {
    let paths = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths.filter_map(|path| path.strip_prefix(cgroup)).any(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_tells_cts_apart() {
        assert!(is_in("0::/lxc/9000/ns\n", "/lxc/9000") && is_in("0::/lxc/9000", "/lxc/9000"));
        assert!(is_in("3:pids:/lxc/9000/ns/init.scope\n1:name=systemd:/lxc/9000/ns\n", "/lxc/9000"));
        for other in ["0::/lxc/90001/ns", "0::/lxc.monitor/9000", "0::/system.slice/a:/lxc/9000", "0::/", ""] {
            assert!(!is_in(other, "/lxc/9000"), "{other}");
        }
    }
}
