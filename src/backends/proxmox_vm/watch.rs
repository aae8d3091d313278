//! What goes on for a pod beside its calls: its relay, the watch of its VM's process, its volumes.
//!
//! [`ProxmoxVmBackend::attend`] is told of each relay; one that is the first of an earlier daemon's pod begins all of it anew. A VM's end
//! is seen by its process on this node (a stop, a reboot or a migration ends that), and by asking the API where that does not tell it.
//! Nothing here outlives the daemon.

use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::plan::VM;
use super::{Live, ProxmoxVmBackend, locked};
use crate::core::ids::PodId;
use crate::core::ports::Monitor;
use crate::core::records::PodRecord;
use crate::core::state::PodPhase;
use crate::integrations::proxmox_api::{GuestId, Vmid};
use crate::utils::pidfd;

/// Between two looks at a VM whose process is not known.
const LOOK: Duration = Duration::from_secs(5);

impl ProxmoxVmBackend {
    /// The pod has this relay from now on.
    pub(super) fn attend(&self, pod: &PodRecord, monitor: Option<&Arc<dyn Monitor>>) {
        let mut live = locked(&self.live);
        // One without a process is no relay, but the engine's stand-in, which asks us.
        let Some(monitor) = monitor.filter(|m| m.pid() != 0) else {
            // Its successor may be under way.
            if let Some(entry) = live.get_mut(&pod.id) {
                entry.monitor = None;
            }
            return;
        };
        let is_new = !live.contains_key(&pod.id);
        let entry = live.entry(pod.id.clone()).or_default();
        entry.monitor = Some(monitor.clone());
        let cancel = entry.cancel.clone();
        drop(live);
        // One that is being made is watched when it is.
        if !is_new || pod.phase != PodPhase::Ready {
            return;
        }
        match VM.vmid(pod) {
            Ok(vmid) => {
                self.vms.keep(vmid);
                self.watch(&pod.id, vmid);
            }
            Err(e) => tracing::error!(pod = pod.id.as_str(), error = e.chain(), "its VM is not watched"),
        }
        match self.resume_volumes(&pod.id) {
            Ok(Some(watched)) => {
                if let Some(entry) = locked(&self.live).get_mut(&pod.id) {
                    entry.volumes = Some(watched.clone());
                }
                self.keep_in_sync(pod.id.clone(), watched, cancel);
            }
            Ok(None) => {}
            Err(e) => tracing::error!(pod = pod.id.as_str(), error = e.chain(), "its volumes are not kept in sync"),
        }
    }

    /// Nothing goes on for the pod any more.
    pub(super) fn give_up(&self, pod: &PodId) {
        if let Some(Live { cancel, .. }) = locked(&self.live).remove(pod) {
            cancel.cancel();
        }
    }

    /// Sees the VM's end.
    pub(super) fn watch(&self, pod: &PodId, vmid: Vmid) {
        let Some(cancel) = locked(&self.live).get(pod).map(|live| live.cancel.clone()) else { return };
        let (this, pod) = (self.clone(), pod.clone());
        self.tasks.spawn_cancellable("watch a VM", async move {
            let Some(why) = cancel.run_until_cancelled(this.end_of(vmid)).await else { return };
            tracing::warn!(pod = pod.as_str(), %vmid, why, "a pod's VM has ended");
            if let Some(live) = locked(&this.live).get(&pod) {
                live.ended.send_replace(Some(why));
            }
        });
    }

    async fn end_of(&self, vmid: Vmid) -> String {
        let ended = format!("VM {vmid} was stopped, started again, migrated or removed");
        loop {
            match self.api.guest_status(GuestId::vm(&self.config.node, vmid)).await {
                Ok(status) if !status.is_running() => return ended,
                Ok(status) => {
                    if i32::try_from(status.pid).is_ok_and(|pid| pid > 1) && process_ends(status.pid as i32).await {
                        return ended;
                    }
                }
                Err(e) if e.is_not_found() => return ended,
                Err(e) => tracing::debug!(%vmid, error = %e, "the state of a VM is not known"),
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Waits for a process's end; false: it can't be waited for.
async fn process_ends(pid: i32) -> bool {
    let Some(pid) = Pid::from_raw(pid) else { return false };
    match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(fd) => pidfd::ended(Arc::new(fd)).await.is_ok(),
        Err(rustix::io::Errno::SRCH) => true,
        Err(_) => false,
    }
}
