//! Whose a guest is, as far as its notes say so here or on the node that it was migrated to.
//!
//! One whose notes can't be read is another matter for each kind: the backends' own `owner`. What can't be told now is an error, so
//! that the caller asks again.

use super::Guests;
use crate::core::error::{Error, Kind, Result};
use crate::core::records::PodRecord;
use crate::integrations::proxmox_api::{Identity, Task, Vmid};

impl Guests {
    /// What the notes of a pod's guest say.
    pub fn identity(&self, pod: &PodRecord) -> Identity {
        Identity { installation: self.installation.clone(), pod: pod.id.to_string() }
    }

    /// The node that has the pod's guest of that number, which this one has not: where an operator has migrated it to. None: there
    /// is none.
    pub async fn elsewhere(&self, pod: &PodRecord, vmid: Vmid) -> Result<Option<String>> {
        let word = self.unit.word;
        if let Some(left) = self.in_doubt(pod, vmid) {
            let what = format!("whether Proxmox makes {word} {vmid} yet is known in {} s", left.as_secs() + 1);
            return Err(Error::new(Kind::Unavailable, what));
        }
        let guests = self.api.guests().await.map_err(Error::from)?;
        let kind = self.unit.kind.name();
        let other = guests.iter().find(|g| g.vmid == vmid && g.kind == kind && !g.node.is_empty());
        let Some(node) = other.map(|g| g.node.clone()) else { return Ok(None) };
        if node == self.node {
            return Err(Error::new(Kind::Unavailable, format!("{word} {vmid} is there since a moment ago")));
        }
        match self.notes(&node, vmid).await {
            Ok(notes) if Identity::find(&notes) == Some(self.identity(pod)) => {
                tracing::warn!(pod = pod.id.as_str(), %vmid, node, "its {word} was migrated: it is removed there");
                Ok(Some(node))
            }
            Ok(_) => Ok(None),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(Error::from(e).context(format!("{word} {vmid} was migrated to node {node}"))),
        }
    }

    /// Tasks of ours of that kind, of the guest `of`, since the pod is there.
    pub async fn tasks_since(&self, pod: &PodRecord, of: Vmid, kind: &str) -> Result<Vec<Task>> {
        let tasks = self.api.own_tasks(&self.node, of, kind).await.map_err(Error::from)?;
        // Both are of this node's clock; tasks have whole seconds.
        let since = u64::try_from(pod.created_at / 1_000_000_000).unwrap_or_default();
        Ok(tasks.into_iter().filter(|t| t.starttime >= since).collect())
    }
}
