//! The backends: each turns pods and containers into its own kind of unit. `oci` is shared by those that run
//! OCI containers, `pods` by those whose pods are namespaces of the node, `proxmox` by those whose
//! pods are guests of Proxmox.

pub mod crun;
pub mod lxc;
pub mod oci;
pub mod pods;
mod proxmox;
pub mod proxmox_lxc;
pub mod proxmox_vm;
