//! proxmox-lxcri: a Kubernetes CRI runtime for Proxmox nodes.
//!
//! Layers (an arrow may only point left): `utils <- core <- integrations <- backends`, `cri` and `cli`
//! see `core` and `api` only, `main` wires. `tests/layering.rs` holds this. `docs/ARCHITECTURE.md` walks through it.

pub mod api;
pub mod backends;
pub mod cli;
pub mod core;
pub mod cri;
pub mod daemon;
pub mod integrations;
pub mod utils;
