//! CTs that carry this installation's identity and belong to no pod: told in the log, and deleted where that is configured.
//!
//! Called by the engine, at start and again and again. Only CTs of our own range of numbers are looked at, and only the identity
//! in the notes counts. One is deleted when it was nobody's at two looks and for the configured time in between, and is so still;
//! its number is kept from pods of this node meanwhile. A crash leaves what the next look finds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;
use std::time::Instant;

use super::ProxmoxLxcBackend;
use super::plan::CT;
use crate::core::backend::IsKnown;
use crate::core::config::Orphans;
use crate::core::error::{Error, Result};
use crate::core::ids::PodId;
use crate::core::records::PodRecord;
use crate::integrations::proxmox_api::{CtConfig, ErrorKind, GuestKind, Identity, Vmid};

/// A CT that was nobody's at the last look.
#[derive(Debug, Clone)]
pub(super) struct Orphan {
    /// The pod that it was made for.
    pod: String,
    since: Instant,
}

impl ProxmoxLxcBackend {
    pub(super) async fn sweep_orphans(&self, pods: &[PodRecord], is_known: &IsKnown) -> Result<()> {
        let notes = pods.iter().flat_map(|p| &p.resources).filter(|note| note.kind == CT);
        let claimed: BTreeSet<Vmid> = notes.filter_map(|note| note.name.parse().ok()).collect();
        let (first, last) = self.config.vmids;
        let mut seen = BTreeMap::new();
        for ct in self.api.guest_list(GuestKind::Ct, &self.config.node).await.map_err(Error::from)? {
            if !(first..=last).contains(&ct.vmid) || claimed.contains(&ct.vmid) {
                continue;
            }
            let Some(pod) = self.nobodys(ct.vmid, is_known).await? else { continue };
            let orphan = self.orphan(ct.vmid, pod);
            let due = self.config.orphans == Orphans::Remove && orphan.since.elapsed() >= self.config.orphans_after;
            if !due || !self.remove_orphan(ct.vmid, &orphan.pod, is_known).await {
                seen.insert(ct.vmid.get(), orphan);
            }
        }
        *self.orphans.lock().unwrap_or_else(PoisonError::into_inner) = seen;
        Ok(())
    }

    /// The pod that a CT was made for, if it is ours and that pod is not on record.
    async fn nobodys(&self, vmid: Vmid, is_known: &IsKnown) -> Result<Option<String>> {
        // The configuration before the record: a CT that is there was made after its pod's record.
        match self.api.ct_config(&self.config.node, vmid).await {
            Ok(config) => unclaimed(&config, &self.config.installation, is_known),
            Err(e) if e.is_not_found() || matches!(e.kind(), ErrorKind::Permission { .. }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// What is known of it; what was not, is told.
    fn orphan(&self, vmid: Vmid, pod: String) -> Orphan {
        let known = self.orphans.lock().unwrap_or_else(PoisonError::into_inner).get(&vmid.get()).cloned();
        known.filter(|o| o.pod == pod).unwrap_or_else(|| {
            tracing::warn!(
                %vmid,
                pod,
                "a CT of this installation belongs to no pod (proxmox orphans; handlers.proxmox-lxc.orphans)"
            );
            Orphan { pod, since: Instant::now() }
        })
    }

    /// Deletes one that is nobody's still; whether it is gone.
    async fn remove_orphan(&self, vmid: Vmid, pod: &str, is_known: &IsKnown) -> bool {
        if !self.reserve(vmid.get()) {
            return false;
        }
        let removed = async {
            if self.nobodys(vmid, is_known).await?.as_deref() != Some(pod) {
                return Ok(false);
            }
            self.delete_ct(&self.config.node, vmid).await.map(|()| true)
        };
        let removed: Result<bool> = removed.await;
        self.release(vmid);
        match removed {
            Ok(true) => {
                tracing::warn!(%vmid, pod, "deleted a CT of this installation that belonged to no pod");
                true
            }
            Ok(false) => false,
            Err(e) => {
                tracing::warn!(%vmid, pod, error = e.chain(), "a CT that belongs to no pod can't be deleted yet");
                false
            }
        }
    }
}

fn unclaimed(config: &CtConfig, installation: &str, is_known: &IsKnown) -> Result<Option<String>> {
    let Some(identity) = Identity::find(config.description()).filter(|i| i.installation == installation) else {
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
            let id = Identity { installation: installation.into(), pod: pod.into() };
            let other = [("description".to_owned(), id.notes("Pod a/b").expect("notes"))].into();
            CtConfig { digest: "d".into(), other, ..CtConfig::default() }
        };
        let known = mine.clone();
        let is_known = move |id: &PodId| Ok(*id == known);
        let find = |config: &CtConfig| unclaimed(config, "i", &is_known).expect("an answer");
        assert_eq!(find(&of("i", mine.as_str())), None, "a pod has it");
        assert_eq!(find(&of("other", theirs.as_str())), None, "another installation's");
        assert_eq!(find(&CtConfig::default()), None, "no notes");
        assert_eq!(find(&of("i", theirs.as_str())), Some(theirs.to_string()));
        assert_eq!(find(&of("i", "no-pod")), Some("no-pod".into()));
        let unreadable = |_: &PodId| Err(Error::precondition("quarantine"));
        unclaimed(&of("i", theirs.as_str()), "i", &unreadable).expect_err("nobody can say");
    }
}
