//! Virtual machines of Proxmox: what `guest` has not in common with containers.
//!
//! Called by the command line. Fails with [`ApiError`].

use super::error::ApiError;
use super::guest_types::{GuestId, GuestKind};
use super::ids::Vmid;
use super::task::Running;
use super::transport::Proxmox;
use super::vm_types::{VmConfig, VmSpec};

impl Proxmox {
    /// A VM's configuration as it is now.
    pub async fn vm_config(&self, node: &str, vmid: Vmid) -> Result<VmConfig, ApiError> {
        self.config(node, vmid).await
    }

    /// Makes one. `AlreadyExists`, here or from the task, means that the number is taken.
    pub async fn vm_create(&self, node: &str, vmid: Vmid, spec: &VmSpec) -> Result<Running, ApiError> {
        let places = self.place(GuestKind::Vm, node, spec.storage()).await?;
        self.make(places, GuestId::vm(node, vmid), spec.form(vmid)).await
    }
}
