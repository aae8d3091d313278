//! The Proxmox VE API: a typed client of `https://NODE:8006/api2/json`.
//!
//! `transport` makes calls (authentication, certificates, failover, repetition), `lanes` and `retry` say how many and how
//! often, `task` waits for what goes on after an answer. Operations are in `guest` (what containers and VMs have in common),
//! `ct`, `vm`, `agent`, `cluster` and `access`; `property`, `ids`, `lenient` and `*_types` are what is sent and received.
//! Errors are [`ApiError`], with a kind that callers decide on.
//!
//! Used by the command line (`proxmox ...`) and the Proxmox backends. A crash leaves requests and tasks to their own ends
//! on the node; tasks are found again by [`Proxmox::active_tasks`].

mod access;
mod agent;
mod auth;
mod cluster;
mod ct;
mod ct_types;
mod error;
mod guest;
mod guest_types;
mod identity;
mod ids;
mod lanes;
mod lenient;
mod property;
mod retry;
mod task;
mod tls;
mod transport;
mod vm;
mod vm_types;

pub use access::{Need, missing, needs};
pub use agent::AgentOutput;
pub use cluster::{Content, Guest, Node, Storage, Version};
pub use ct_types::{CtConfig, CtSpec};
pub use error::{ApiError, ErrorKind};
pub use guest::Places;
pub use guest_types::{
    CloneSpec, GuestChange, GuestConfig, GuestId, GuestKind, GuestNet, GuestStatus, Interface, NewGuest, Pending,
    Snapshot,
};
pub use identity::Identity;
pub use ids::{BadId, Upid, Vmid};
pub use property::{Features, Net, Properties, PropertyError, Tags, Volume};
pub use task::{Ended, Running, Task};
pub use transport::{Form, Proxmox};
pub use vm_types::{VmConfig, VmNet, VmSpec};
