//! Guests that carry this installation's identity and belong to no pod: told in the log, and deleted where that is configured.
//!
//! Called by the backends, at start and again and again. Only guests of our own range of numbers are looked at, and only the identity
//! in the notes counts. One is deleted when it was nobody's at two looks and for the configured time in between, and is so still;
//! its number is kept from pods of this node meanwhile. A crash leaves what the next look finds.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::{Guests, locked};
use crate::core::backend::IsKnown;
use crate::core::error::{Error, Result};
use crate::core::ids::PodId;
use crate::integrations::proxmox_api::{ErrorKind, Identity, Vmid};

/// A guest that was nobody's at the last look.
#[derive(Debug, Clone)]
pub struct Orphan {
    /// What it was made for, as its notes say.
    pub of: String,
    /// When it was seen first.
    pub since: Instant,
}

impl Guests {
    /// Guests of our numbers on this node that are not among those that pods have claimed.
    pub async fn unclaimed(&self, claimed: &BTreeSet<Vmid>) -> Result<Vec<Vmid>> {
        let (first, last) = self.vmids;
        let all = self.api.guest_list(self.unit.kind, &self.node).await.map_err(Error::from)?;
        let ours = all.iter().map(|g| g.vmid).filter(|vmid| (first..=last).contains(vmid) && !claimed.contains(vmid));
        Ok(ours.collect())
    }

    /// What a guest was made for, if it is ours and that is no pod on record.
    pub async fn nobodys(&self, vmid: Vmid, is_known: &IsKnown) -> Result<Option<String>> {
        // The notes before the record: a guest that is there was made after its pod's record.
        match self.notes(&self.node, vmid).await {
            Ok(notes) => nobodys(&notes, &self.installation, is_known),
            Err(e) if e.is_not_found() || matches!(e.kind(), ErrorKind::Permission { .. }) => Ok(None),
            // Somebody's that we do not understand is not to hide the others.
            Err(e) if *e.kind() == ErrorKind::Protocol => {
                tracing::debug!(%vmid, error = %e, "whose it is can't be told");
                Ok(None)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// What is known of it since an earlier look.
    pub fn orphan(&self, vmid: Vmid, of: &str) -> Option<Orphan> {
        locked(&self.orphans).get(&vmid.get()).filter(|o| o.of == of).cloned()
    }

    /// Those that the next look is to know.
    pub fn keep_orphans(&self, seen: BTreeMap<u32, Orphan>) {
        *locked(&self.orphans) = seen;
    }

    /// Tells of a guest whose pod is nobody's when it is new, and has it deleted by `delete` when that is due; None: it is gone.
    pub async fn tidy(
        &self,
        vmid: Vmid,
        pod: String,
        is_known: &IsKnown,
        delete: impl Future<Output = Result<()>>,
    ) -> Option<Orphan> {
        let orphan = self.orphan(vmid, &pod).unwrap_or_else(|| {
            let (word, see) = (self.unit.word, self.unit.orphans);
            tracing::warn!(%vmid, pod, "a {word} of this installation belongs to no pod ({see})");
            Orphan { of: pod, since: Instant::now() }
        });
        let due = self.remove_after.is_some_and(|after| orphan.since.elapsed() >= after);
        match due && self.remove_orphan(vmid, &orphan.of, is_known, delete).await {
            true => None,
            false => Some(orphan),
        }
    }

    /// Deletes one that is nobody's still; whether it is gone.
    async fn remove_orphan(
        &self,
        vmid: Vmid,
        pod: &str,
        is_known: &IsKnown,
        delete: impl Future<Output = Result<()>>,
    ) -> bool {
        if !self.reserve(vmid) {
            return false;
        }
        let removed: Result<bool> = async {
            if self.nobodys(vmid, is_known).await?.as_deref() != Some(pod) {
                return Ok(false);
            }
            delete.await.map(|()| true)
        }
        .await;
        self.release(vmid);
        let word = self.unit.word;
        match &removed {
            Ok(true) => tracing::warn!(%vmid, pod, "deleted a {word} of this installation that belonged to no pod"),
            Ok(false) => {}
            Err(e) => {
                tracing::warn!(%vmid, pod, error = e.chain(), "a {word} that belongs to no pod can't be deleted yet");
            }
        }
        removed.unwrap_or(false)
    }
}

fn nobodys(notes: &str, installation: &str, is_known: &IsKnown) -> Result<Option<String>> {
    let Some(identity) = Identity::find(notes).filter(|i| i.installation == installation) else {
        return Ok(None);
    };
    // Notes are anybody's to write: what is no pod's id names no record.
    let known = match identity.pod.parse::<PodId>() {
        Ok(pod) => is_known(&pod)?,
        Err(_) => false,
    };
    Ok((!known).then_some(identity.pod))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_without_a_record_are_nobodys() {
        let (mine, theirs) = (PodId::new(), PodId::new());
        let of = |installation: &str, pod: &str| {
            Identity { installation: installation.into(), pod: pod.into() }.notes("Pod a/b").expect("notes")
        };
        let known = mine.clone();
        let is_known = move |id: &PodId| Ok(*id == known);
        let find = |notes: &str| nobodys(notes, "i", &is_known).expect("an answer");
        assert_eq!(find(&of("i", mine.as_str())), None, "a pod has it");
        assert_eq!(find(&of("other", theirs.as_str())), None, "another installation's");
        assert_eq!(find(""), None, "no notes");
        assert_eq!(find(&of("i", theirs.as_str())), Some(theirs.to_string()));
        assert_eq!(find(&of("i", "no-pod")), Some("no-pod".into()));
        let unreadable = |_: &PodId| Err(Error::precondition("quarantine"));
        nobodys(&of("i", theirs.as_str()), "i", &unreadable).expect_err("nobody can say");
    }
}
