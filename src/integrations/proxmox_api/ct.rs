//! Containers of Proxmox: what `guest` has not in common with VMs.
//!
//! Called by the command line and the backend. Fails with [`ApiError`].

use super::ct_types::{CtConfig, CtSpec};
use super::error::ApiError;
use super::guest::Places;
use super::guest_types::{GuestId, GuestKind, Interface};
use super::ids::Vmid;
use super::task::Running;
use super::transport::{Form, Proxmox};

impl Proxmox {
    /// A container's configuration as it is now.
    pub async fn ct_config(&self, node: &str, vmid: Vmid) -> Result<CtConfig, ApiError> {
        self.config(node, vmid).await
    }

    /// Makes one. `AlreadyExists`, here or from the task, means that the number is taken.
    pub async fn ct_create(&self, node: &str, vmid: Vmid, spec: &CtSpec) -> Result<Running, ApiError> {
        let places = self.place(GuestKind::Ct, node, spec.storage()).await?;
        self.ct_create_in(places, node, vmid, spec).await
    }

    /// The same with places that were waited for.
    pub async fn ct_create_in(
        &self,
        places: Places,
        node: &str,
        vmid: Vmid,
        spec: &CtSpec,
    ) -> Result<Running, ApiError> {
        self.make(places, GuestId::ct(node, vmid), spec.form(vmid)).await
    }

    /// Interfaces of a running container; none of a stopped one.
    pub async fn ct_interfaces(&self, node: &str, vmid: Vmid) -> Result<Vec<Interface>, ApiError> {
        let list: Option<Vec<Interface>> =
            self.get(&GuestId::ct(node, vmid).path(&["interfaces"]), Form::new()).await?;
        Ok(list.unwrap_or_default())
    }
}
