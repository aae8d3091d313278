//! Whose the VM of a number is, and where: the pod's that asked for it, or somebody else's, who is left alone.
//!
//! Its notes say so, on this node and, where an operator has migrated it, on another. One that is being cloned, or whose clone has
//! died, has none yet and is in no pool, so that our token may not see it: then Proxmox's record of our own clones counts. What
//! can't be told now is an error, so that the caller asks again: a VM that is taken for another's is never looked at again.

use super::ProxmoxVmBackend;
use super::plan::VM;
use crate::core::error::{Error, Kind, Result};
use crate::core::records::PodRecord;
use crate::integrations::proxmox_api::{ErrorKind, Identity, Vmid};

impl ProxmoxVmBackend {
    /// The node that has a VM of that number which is this pod's; None: there is none.
    pub(super) async fn find_own(&self, pod: &PodRecord, vmid: Vmid) -> Result<Option<String>> {
        if VM.is_taken(pod, vmid) {
            return Ok(None);
        }
        let node = &self.config.node;
        match self.api.vm_config(node, vmid).await {
            Ok(config) => match Identity::find(config.description()) {
                Some(found) if found == self.vms.identity(pod) => Ok(Some(node.clone())),
                None if config.get("lock") == Some("clone") => self.half_made(pod, vmid).await,
                _ => {
                    tracing::info!(pod = pod.id.as_str(), %vmid, "the VM of that number is somebody else's");
                    Ok(None)
                }
            },
            Err(e) if e.is_not_found() => self.vms.elsewhere(pod, vmid).await,
            // Of one that was made our token is not refused what a pool gives it, unless somebody has taken it away.
            Err(e) if matches!(e.kind(), ErrorKind::Permission { .. }) && pod.facts.is_some() => Err(e.into()),
            Err(e) if matches!(e.kind(), ErrorKind::Permission { .. }) => self.half_made(pod, vmid).await,
            Err(e) => Err(e.into()),
        }
    }

    /// A VM without notes that we can read: somebody else's, if no clone of ours can have made it.
    async fn half_made(&self, pod: &PodRecord, vmid: Vmid) -> Result<Option<String>> {
        // A clone's task is one of its template.
        let tasks = self.vms.tasks_since(pod, self.config.template, "qmclone").await?;
        if !tasks.iter().any(|t| matches!(t.outcome(), None | Some(Err(_)))) {
            tracing::warn!(pod = pod.id.as_str(), %vmid, "the VM of that number is taken for somebody else's");
            return Ok(None);
        }
        let hint = format!(
            "VM {vmid} is being cloned, or its clone has died: where `qm config {vmid}` shows the lock of a clone and no notes, \
             `qm unlock {vmid}; qm destroy {vmid}` removes what that has left"
        );
        Err(Error::new(Kind::Unavailable, hint))
    }
}
