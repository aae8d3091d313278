//! What the helper, the container's first process and the daemon have in common: how a process of a container is
//! described ([`plan`]), and how one becomes it ([`become_it`]).
//!
//! The daemon writes plans; the first process of a container and execs read them. Nothing here knows liblxc.

pub mod become_it;
pub mod plan;
pub mod terminal;
pub mod wire;
