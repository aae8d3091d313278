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
use crate::backends::proxmox::Orphan;
use crate::core::backend::IsKnown;
use crate::core::error::{Error, Result};
use crate::core::records::PodRecord;
use crate::integrations::proxmox_api::{ErrorKind, GuestChange, GuestId, GuestKind, Vmid};

impl ProxmoxVmBackend {
    pub(super) async fn sweep_orphans(&self, pods: &[PodRecord], is_known: &IsKnown) -> Result<()> {
        let claimed = VM.claimed(pods);
        let mut used: Option<BTreeSet<String>> = None;
        let mut seen = BTreeMap::new();
        for vmid in self.vms.unclaimed(&claimed).await? {
            let Some(of) = self.vms.nobodys(vmid, is_known).await? else { continue };
            if !of.starts_with(OF_IMAGE) {
                let delete = self.delete_vm(&self.config.node, vmid);
                seen.extend(self.vms.tidy(vmid, of, is_known, delete).await.map(|orphan| (vmid.get(), orphan)));
                continue;
            }
            if used.is_none() {
                used = Some(self.volumes_of(&claimed).await?);
            }
            if self.is_used(vmid, used.as_ref()).await? {
                continue;
            }
            let orphan = self.vms.orphan(vmid, &of).unwrap_or_else(|| Orphan { of, since: Instant::now() });
            let due = orphan.since.elapsed() >= self.config.images_after;
            if !due || !self.drop_image(vmid, &orphan.of).await {
                seen.insert(vmid.get(), orphan);
            }
        }
        self.vms.keep_orphans(seen);
        Ok(())
    }

    /// Volumes that pods' VMs have.
    async fn volumes_of(&self, vms: &BTreeSet<Vmid>) -> Result<BTreeSet<String>> {
        let mut volumes = BTreeSet::new();
        for vmid in vms {
            match self.api.vm_config(&self.config.node, *vmid).await {
                Ok(config) => volumes.extend(config.volumes.into_values().map(|d| d.volume)),
                // A clone that is not in its pool yet has none of them; neither has one whose number is somebody else's.
                Err(e) if e.is_not_found() || matches!(e.kind(), ErrorKind::Permission { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(volumes)
    }

    async fn is_used(&self, vmid: Vmid, volumes: Option<&BTreeSet<String>>) -> Result<bool> {
        match self.api.vm_config(&self.config.node, vmid).await {
            Ok(config) => Ok(config.volumes.values().any(|d| volumes.is_some_and(|v| v.contains(&d.volume)))),
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
                self.vms.release(vmid);
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
