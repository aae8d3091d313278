//! What the helper, the container's first process and the daemon have in common: how a process of a container is
//! described ([`plan`]), how one becomes it ([`become_it`], [`successor`]), and where liblxc leaves things.
//!
//! The daemon writes plans; the first process of a container and execs read them. Nothing here knows liblxc.

pub mod become_it;
pub mod foreign;
pub mod plan;
pub mod successor;
pub mod terminal;
pub mod wire;

/// File of the lock that liblxc takes as root for a container, and never removes.
pub fn lock_file(lxcpath: &str, name: &str) -> std::path::PathBuf {
    format!("/run/lxc/lock{lxcpath}/.{name}").into()
}
