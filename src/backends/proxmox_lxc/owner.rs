//! Whose the CT of a number is: the pod's that asked for it, or somebody else's, who is left alone.
//!
//! Its notes say so. Two CTs have none that we can read: one that is being made, or was left half-made (Proxmox writes its
//! configuration last), and one that our token may not see. Then the record of the pod counts, and Proxmox's record of tasks: a
//! create of ours, since the pod is there, made it. What can't be told now is an error, so that the caller asks again: a CT that
//! is taken for another's is never looked at again.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::ProxmoxLxcBackend;
use super::plan;
use crate::core::error::{Error, Kind, Result};
use crate::core::records::PodRecord;
use crate::integrations::proxmox_api::{ApiError, ErrorKind, Identity, Upid, Vmid};

/// What Proxmox's tasks say of a number.
enum Made {
    /// A create of ours goes on.
    Now(Upid),
    /// One of ours has ended well.
    Well,
    /// One of ours has ended badly, and may have left something.
    Badly,
    /// None is ours.
    No,
}

impl ProxmoxLxcBackend {
    pub(super) fn identity(&self, pod: &PodRecord) -> Identity {
        Identity { installation: self.config.installation.clone(), pod: pod.id.to_string() }
    }

    /// A CT of that number may be made after we have given up on the answer: for as long as Proxmox may take to begin.
    pub(super) fn doubt(&self, vmid: Vmid) {
        let until = Instant::now() + self.api.patience();
        self.doubts.lock().unwrap_or_else(PoisonError::into_inner).insert(vmid.get(), until);
    }

    /// A change of that number's CT of which no answer came may meet the next CT of that number: there is none for as long.
    pub(super) fn rest(&self, vmid: Vmid, e: &ApiError) {
        if e.is_uncertain() {
            let until = Instant::now() + self.api.patience();
            self.resting.lock().unwrap_or_else(PoisonError::into_inner).insert(vmid.get(), until);
        }
    }

    fn in_doubt(&self, vmid: Vmid) -> Option<Duration> {
        let mut doubts = self.doubts.lock().unwrap_or_else(PoisonError::into_inner);
        let left = doubts.get(&vmid.get())?.saturating_duration_since(Instant::now());
        if left.is_zero() {
            doubts.remove(&vmid.get());
            return None;
        }
        Some(left)
    }

    /// Whether there is a CT of that number and it is this pod's.
    pub(super) async fn is_ours(&self, pod: &PodRecord, vmid: Vmid) -> Result<bool> {
        if pod.resources.iter().any(|n| n.kind == plan::TAKEN && n.name == vmid.to_string()) {
            return Ok(false);
        }
        let node = &self.config.node;
        let mut waited = false;
        loop {
            let hidden: Option<ApiError> = match self.api.ct_config(node, vmid).await {
                Err(e) if e.is_not_found() => match self.in_doubt(vmid) {
                    None => return Ok(false),
                    Some(left) => {
                        let what = format!("whether Proxmox makes CT {vmid} yet is known in {} s", left.as_secs() + 1);
                        return Err(Error::new(Kind::Unavailable, what));
                    }
                },
                Err(e) if matches!(e.kind(), ErrorKind::Permission { .. }) => Some(e),
                Err(e) => return Err(e.into()),
                Ok(config) => match Identity::find(config.description()) {
                    Some(found) if found == self.identity(pod) => return Ok(true),
                    None if config.get("lock") == Some("create") => None,
                    _ => {
                        tracing::info!(pod = pod.id.as_str(), %vmid, "the CT of that number is somebody else's");
                        return Ok(false);
                    }
                },
            };
            // A pod that was ready had made it.
            let had_it = pod.facts.as_ref().is_some_and(|f| f.cgroup_parent == plan::cgroup(vmid));
            let made = if had_it { Made::Well } else { self.made(pod, vmid).await? };
            match (made, hidden) {
                (Made::Now(task), _) if !waited => {
                    tracing::info!(pod = pod.id.as_str(), %vmid, %task, "its CT is being made: waiting");
                    // However it ends, the configuration tells.
                    let _ = self.api.resume(task).wait().await;
                    waited = true;
                }
                (Made::Now(task), _) => {
                    return Err(Error::new(Kind::Unavailable, format!("CT {vmid} is being made by task {task}")));
                }
                (Made::Well, Some(e)) => return Err(e.into()),
                (Made::Well | Made::Badly, None) => return Ok(true),
                (Made::Badly | Made::No, hidden) => {
                    let why = hidden.map(|e| e.to_string());
                    tracing::warn!(pod = pod.id.as_str(), %vmid, error = why, "the CT of that number is taken for somebody else's");
                    return Ok(false);
                }
            }
        }
    }

    async fn made(&self, pod: &PodRecord, vmid: Vmid) -> Result<Made> {
        let tasks = self.api.own_tasks(&self.config.node, vmid, "vzcreate").await.map_err(Error::from)?;
        // Both are of this node's clock; tasks have whole seconds.
        let since = u64::try_from(pod.created_at / 1_000_000_000).unwrap_or_default();
        let mut made = Made::No;
        for task in tasks.into_iter().filter(|t| t.starttime >= since) {
            match task.outcome() {
                None => return Ok(Made::Now(task.upid)),
                Some(Ok(_)) => made = Made::Well,
                // The loser of two who wanted the number.
                Some(Err(e)) if *e.kind() == ErrorKind::AlreadyExists => {}
                Some(Err(_)) if matches!(made, Made::No) => made = Made::Badly,
                Some(Err(_)) => {}
            }
        }
        Ok(made)
    }
}
