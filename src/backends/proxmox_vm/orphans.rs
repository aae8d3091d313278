//! VMs that carry this installation's identity and belong to no pod: told in the log, and deleted where that is configured; and images'
//! disks that no pod has used for a while, which are deleted always.
//!
//! Called by the engine, at start and again and again. Only VMs of our own range of numbers are looked at, and only the identity in the
//! notes counts. One is deleted when it was nobody's at two looks and for the configured time in between, and is so still. A crash
//! leaves what the next look finds.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::image::OF_IMAGE;
use super::plan::VM;
use super::{ProxmoxVmBackend, locked};
use crate::core::backend::IsKnown;
use crate::core::config::Orphans;
use crate::core::error::{Error, Result};
use crate::core::ids::PodId;
use crate::core::records::PodRecord;
use crate::integrations::proxmox_api::{ErrorKind, GuestChange, GuestId, GuestKind, Identity, Vmid};

/// A VM that was nobody's at the last look.
#[derive(Debug, Clone)]
pub(super) struct Orphan {
    /// The pod or image that it was made for.
    of: String,
    since: Instant,
}

impl ProxmoxVmBackend {
    pub(super) async fn sweep_orphans(&self, pods: &[PodRecord], is_known: &IsKnown) -> Result<()> {
        let notes = pods.iter().flat_map(|p| &p.resources).filter(|note| note.kind == VM);
        let claimed: BTreeSet<Vmid> = notes.filter_map(|note| note.name.parse().ok()).collect();
        let (first, last) = self.config.vmids;
        let all = self.api.guest_list(GuestKind::Vm, &self.config.node).await.map_err(Error::from)?;
        let ours: Vec<Vmid> = all.iter().map(|g| g.vmid).filter(|vmid| (first..=last).contains(vmid)).collect();
        let mut used: Option<BTreeSet<String>> = None;
        let mut seen = BTreeMap::new();
        for vmid in ours.iter().copied().filter(|vmid| !claimed.contains(vmid)) {
            let Some(of) = self.nobodys(vmid, is_known).await? else { continue };
            if of.starts_with(OF_IMAGE) {
                if used.is_none() {
                    used = Some(self.volumes_of(&claimed).await?);
                }
                let in_use = self.is_used(vmid, used.as_ref()).await?;
                let orphan = self.orphan(vmid, of);
                let due = orphan.since.elapsed() >= self.config.images_after;
                if in_use {
                    continue;
                }
                if !due || !self.drop_image(vmid, &orphan.of).await {
                    seen.insert(vmid.get(), orphan);
                }
                continue;
            }
            let orphan = self.orphan(vmid, of);
            let due = self.config.orphans == Orphans::Remove && orphan.since.elapsed() >= self.config.orphans_after;
            if !due || !self.remove_orphan(vmid, &orphan.of, is_known).await {
                seen.insert(vmid.get(), orphan);
            }
        }
        *locked(&self.orphans) = seen;
        Ok(())
    }

    /// What a VM was made for, if it is ours: an image, or a pod that is not on record.
    async fn nobodys(&self, vmid: Vmid, is_known: &IsKnown) -> Result<Option<String>> {
        // The configuration before the record: a VM that is there was made after its pod's record.
        let config = match self.api.vm_config(&self.config.node, vmid).await {
            Ok(config) => config,
            Err(e) if e.is_not_found() || matches!(e.kind(), ErrorKind::Permission { .. }) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let found = Identity::find(config.description()).filter(|i| i.installation == self.config.installation);
        let Some(found) = found else { return Ok(None) };
        // Notes are anybody's to write: what is no pod's id names no record.
        let known = match found.pod.parse::<PodId>() {
            Ok(pod) => is_known(&pod)?,
            Err(_) => false,
        };
        Ok((!known).then_some(found.pod))
    }

    /// What is known of it; what was not, is told.
    fn orphan(&self, vmid: Vmid, of: String) -> Orphan {
        let known = locked(&self.orphans).get(&vmid.get()).cloned();
        known.filter(|o| o.of == of).unwrap_or_else(|| {
            if !of.starts_with(OF_IMAGE) {
                tracing::warn!(%vmid, pod = of, "a VM of this installation belongs to no pod (handlers.proxmox-vm.orphans)");
            }
            Orphan { of, since: Instant::now() }
        })
    }

    /// Deletes one that is nobody's still; whether it is gone.
    async fn remove_orphan(&self, vmid: Vmid, pod: &str, is_known: &IsKnown) -> bool {
        if !self.reserve(vmid.get()) {
            return false;
        }
        let removed: Result<bool> = async {
            if self.nobodys(vmid, is_known).await?.as_deref() != Some(pod) {
                return Ok(false);
            }
            self.delete_vm(&self.config.node, vmid).await.map(|()| true)
        }
        .await;
        self.release(vmid);
        match removed {
            Ok(true) => tracing::warn!(%vmid, pod, "deleted a VM of this installation that belonged to no pod"),
            Ok(false) => {}
            Err(ref e) => {
                tracing::warn!(%vmid, pod, error = e.chain(), "a VM that belongs to no pod can't be deleted yet")
            }
        }
        removed.unwrap_or(false)
    }

    /// Volumes that pods' VMs have.
    async fn volumes_of(&self, vms: &BTreeSet<Vmid>) -> Result<BTreeSet<String>> {
        let mut volumes = BTreeSet::new();
        for vmid in vms {
            match self.api.vm_config(&self.config.node, *vmid).await {
                Ok(config) => volumes.extend(config.disks.into_values().map(|d| d.volume)),
                // A clone that is not in its pool yet has none of them; neither has one whose number is somebody else's.
                Err(e) if e.is_not_found() || matches!(e.kind(), ErrorKind::Permission { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(volumes)
    }

    async fn is_used(&self, vmid: Vmid, volumes: Option<&BTreeSet<String>>) -> Result<bool> {
        match self.api.vm_config(&self.config.node, vmid).await {
            Ok(config) => Ok(config.disks.values().any(|d| volumes.is_some_and(|v| v.contains(&d.volume)))),
            Err(e) if e.is_not_found() => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Deletes an image's disk that nobody uses still; whether it is gone.
    async fn drop_image(&self, vmid: Vmid, image: &str) -> bool {
        // Nobody is given one meanwhile; whoever is, does not wait for us.
        let Ok(_alone) = self.giving.try_write() else { return false };
        let dropped: Result<bool> = async {
            // Pods may have been made since.
            let all = self.api.guest_list(GuestKind::Vm, &self.config.node).await.map_err(Error::from)?;
            let volumes = self.volumes_of(&all.iter().map(|g| g.vmid).filter(|other| *other != vmid).collect()).await?;
            if self.is_used(vmid, Some(&volumes)).await? {
                return Ok(false);
            }
            let off = GuestChange { set: [("protection".to_owned(), "0".to_owned())].into(), ..GuestChange::default() };
            self.api.guest_update(GuestId::vm(&self.config.node, vmid), &off).await.map_err(Error::from)?;
            self.delete_vm(&self.config.node, vmid).await.map(|()| true)
        }
        .await;
        match dropped {
            Ok(true) => {
                locked(&self.images).retain(|_, one| one.try_lock().is_ok_and(|known| *known != Some(vmid)));
                self.release(vmid);
                tracing::info!(%vmid, image, "deleted the disk of an image that no pod uses");
                true
            }
            Ok(false) => false,
            Err(e) => {
                tracing::warn!(%vmid, image, error = e.chain(), "the disk of an image that no pod uses can't be deleted yet");
                false
            }
        }
    }
}
