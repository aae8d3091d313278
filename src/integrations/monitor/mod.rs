//! Pod monitors: starting them, finding them again, and talking to them (`proto/monitor.proto`).
//!
//! `main` wires [`MonitorSupervisor`] to the engine's `Supervisor` port. Fails with [`MonitorError`], which turns into
//! the port's error. A crash of the daemon leaves every monitor running; [`Supervisor::connect`] finds it. A crash
//! between binding a socket and starting its monitor leaves a socket that refuses, which the next spawn replaces.
//!
//! [`Supervisor::connect`]: crate::core::ports::Supervisor::connect

mod client;
mod error;
mod runtime_copy;
mod spawn;
mod supervisor;

pub use error::MonitorError;
pub use supervisor::{MonitorConfig, MonitorSupervisor};

#[cfg(test)]
mod tests;
