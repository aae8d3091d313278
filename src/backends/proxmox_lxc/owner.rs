//! Whose the CT of a number is, and where: the pod's that asked for it, or somebody else's, who is left alone.
//!
//! Its notes say so, on this node and, where an operator has migrated it, on another. Some CTs have none that we can read: one
//! that is being made, or was left half-made or half-deleted, and one that our token may not see. Then the record of the pod
//! counts, and Proxmox's record of tasks: creates of ours, since the pod is there. What can't be told now is an error, so that
//! the caller asks again: a CT that is taken for another's is never looked at again.

use std::time::Duration;

use super::ProxmoxLxcBackend;
use super::plan;
use crate::backends::proxmox::failed;
use crate::core::error::{Error, Kind, Result};
use crate::core::records::PodRecord;
use crate::integrations::proxmox_api::{ApiError, CtConfig, ErrorKind, Identity, Upid, Vmid};

/// Longest wait for a CT that is being made.
const MAKING: Duration = Duration::from_secs(30);

/// What Proxmox's tasks, and the pod's record, say of a number.
#[derive(Debug, Clone, PartialEq)]
enum Made {
    /// Our latest create goes on.
    Now(Upid),
    /// It has ended well.
    Well,
    /// It has died and left what it had begun.
    Died,
    /// There is none, or it has made nothing that is there still: Proxmox takes back what fails.
    No,
}

/// A CT without notes that we can read.
#[derive(Debug)]
enum Nameless {
    /// It has the lock of its making.
    Making,
    /// It has no root file system: it is what died of a making or a deletion, its lock gone or not.
    Husk,
    /// The token may not see it.
    Hidden(ApiError),
}

/// Whose a CT without notes is.
#[derive(Debug, PartialEq)]
enum Whose {
    Ours,
    /// Ours, and the token may not see it any more.
    Lost,
    /// What a create of ours has left, in no pool yet: nobody but an operator gets at it.
    Stuck,
    Others,
    /// The task that is its maker says, when it has ended.
    Ask(Upid),
}

/// Whose it is. Pure.
fn whose(made: Made, seen: &Nameless) -> Whose {
    match (made, seen) {
        (Made::Now(task), _) => Whose::Ask(task),
        (Made::Died, Nameless::Making) => Whose::Ours,
        // Of one that was made the notes would be there: the number was free again, and this is another.
        (Made::Well, Nameless::Making) => Whose::Others,
        // There is nothing in it to lose.
        (Made::Well | Made::Died, Nameless::Husk) => Whose::Ours,
        (Made::Well, Nameless::Hidden(_)) => Whose::Lost,
        (Made::Died, Nameless::Hidden(_)) => Whose::Stuck,
        (Made::No, _) => Whose::Others,
    }
}

/// A CT that is a pod's.
pub(super) struct Found {
    /// The node that it is on.
    pub(super) node: String,
    /// Its configuration is there; not of what is left of one that died while it was made or deleted.
    pub(super) whole: bool,
}

impl ProxmoxLxcBackend {
    /// A CT of that number which is this pod's; None: there is none.
    pub(super) async fn find_own(&self, pod: &PodRecord, vmid: Vmid) -> Result<Option<Found>> {
        if plan::CT.is_taken(pod, vmid) {
            return Ok(None);
        }
        let node = &self.config.node;
        let mut waited = false;
        loop {
            let seen = match self.api.ct_config(node, vmid).await {
                // It ended when it was migrated, and what runs there is its init alone.
                Err(e) if e.is_not_found() => {
                    let found = self.cts.elsewhere(pod, vmid).await?;
                    return Ok(found.map(|node| Found { node, whole: true }));
                }
                Err(e) if matches!(e.kind(), ErrorKind::Permission { .. }) => Nameless::Hidden(e),
                Err(e) => return Err(failed(e)),
                Ok(config) => match nameless(&config) {
                    Some(seen) => seen,
                    None if Identity::find(config.description()) == Some(self.cts.identity(pod)) => {
                        self.cts.is_made(vmid);
                        return Ok(Some(Found { node: node.clone(), whole: true }));
                    }
                    None => {
                        tracing::info!(pod = pod.id.as_str(), %vmid, "the CT of that number is somebody else's");
                        return Ok(None);
                    }
                },
            };
            // A pod that was ready had made it.
            let had_it = pod.facts.as_ref().is_some_and(|f| f.cgroup_parent == plan::cgroup(vmid));
            let made = if had_it { Made::Well } else { self.made(pod, vmid).await? };
            match (whose(made, &seen), seen) {
                (Whose::Ask(task), _) if !waited => {
                    tracing::info!(pod = pod.id.as_str(), %vmid, %task, "its CT is being made: waiting");
                    // However it ends, the configuration tells. One that hangs is not waited for: the caller asks again.
                    let _ = self.api.resume(task).wait_for(MAKING).await;
                    waited = true;
                }
                (Whose::Ask(task), _) => {
                    return Err(Error::new(Kind::Unavailable, format!("CT {vmid} is being made by task {task}")));
                }
                (Whose::Lost, Nameless::Hidden(e)) => return Err(e.into()),
                (Whose::Stuck, Nameless::Hidden(e)) => {
                    let hint = format!(
                        "a task that died has left half of CT {vmid}: `pct unlock {vmid}; pct destroy {vmid} \
                         --destroy-unreferenced-disks 1` removes it, and the volume that nothing names"
                    );
                    return Err(Error::from(e).context(hint));
                }
                (Whose::Ours | Whose::Lost | Whose::Stuck, _) => {
                    return Ok(Some(Found { node: node.clone(), whole: false }));
                }
                (Whose::Others, seen) => {
                    tracing::warn!(pod = pod.id.as_str(), %vmid, ?seen, "the CT of that number is taken for somebody else's");
                    return Ok(None);
                }
            }
        }
    }

    async fn made(&self, pod: &PodRecord, vmid: Vmid) -> Result<Made> {
        let mut ours = self.cts.tasks_since(pod, vmid, "vzcreate").await?;
        ours.sort_by_key(|t| t.upid.start_order());
        // The latest counts: an earlier one may be another pod's, of the same second.
        for task in ours.into_iter().rev() {
            return Ok(match task.outcome() {
                None => Made::Now(task.upid),
                Some(Ok(_)) => Made::Well,
                // The loser of two who wanted the number.
                Some(Err(e)) if *e.kind() == ErrorKind::AlreadyExists => continue,
                Some(Err(e)) if e.has_died() => Made::Died,
                Some(Err(_)) => Made::No,
            });
        }
        Ok(Made::No)
    }
}

/// What a CT is that has no notes of anybody; None: it has some, or is whole.
fn nameless(config: &CtConfig) -> Option<Nameless> {
    match config.get("lock") {
        _ if !config.description().is_empty() => None,
        Some("create") => Some(Nameless::Making),
        _ if !config.volumes.contains_key("rootfs") => Some(Nameless::Husk),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ct_without_notes_is_ours_only_if_our_task_has_left_it() {
        let upid: Upid = "UPID:pve1:00001000:00007000:65000000:vzcreate:9000:lxcri@pve!node1:".parse().expect("a task");
        let hidden = || Nameless::Hidden(ApiError::new(ErrorKind::Failed, "GET /x", "hidden"));
        for (made, making, husk, unseen) in [
            (Made::Well, Whose::Others, Whose::Ours, Whose::Lost),
            (Made::Died, Whose::Ours, Whose::Ours, Whose::Stuck),
            (Made::No, Whose::Others, Whose::Others, Whose::Others),
        ] {
            assert_eq!(whose(made.clone(), &Nameless::Making), making, "{made:?}");
            assert_eq!(whose(made.clone(), &Nameless::Husk), husk, "{made:?}");
            assert_eq!(whose(made.clone(), &hidden()), unseen, "{made:?}");
        }
        for seen in [Nameless::Making, Nameless::Husk, hidden()] {
            assert_eq!(whose(Made::Now(upid.clone()), &seen), Whose::Ask(upid.clone()));
        }
    }

    #[test]
    fn what_has_no_notes() {
        let config = |json: serde_json::Value| CtConfig::parse(&json).expect("a configuration");
        let of = |json| nameless(&config(json));
        assert!(matches!(of(serde_json::json!({"digest": "d", "lock": "create"})), Some(Nameless::Making)));
        assert!(matches!(of(serde_json::json!({"digest": "d", "lock": "destroyed"})), Some(Nameless::Husk)));
        assert!(matches!(of(serde_json::json!({"digest": "d"})), Some(Nameless::Husk)));
        let whole = serde_json::json!({"digest": "d", "rootfs": "local:subvol-9000-disk-0,size=1G", "lock": "backup"});
        assert!(of(whole).is_none());
        assert!(of(serde_json::json!({"digest": "d", "lock": "create", "description": "mine"})).is_none());
    }
}
