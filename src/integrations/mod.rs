//! The world outside, one noun each: what is done on the host and how it can fail; no policy.

pub mod apparmor;
pub mod bfc;
pub mod blockio;
pub mod cdi;
pub mod cgroup;
pub mod cni;
pub mod fdstore;
pub mod host;
pub mod idmap;
pub mod images;
pub mod layers;
pub mod monitor;
pub(crate) mod mountattr;
pub mod mounts;
pub mod netns;
pub mod nri;
pub mod oci_hooks;
pub mod overlay;
pub mod proxmox_api;
pub mod rdt;
pub mod registry;
pub mod zfs;
pub mod zfs_store;
