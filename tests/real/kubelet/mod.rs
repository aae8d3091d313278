//! Kubernetes on the daemon. `harness` runs groups of scenarios, `node` is a daemon with its kubelet, `cluster` a control
//! plane with nodes, `ctx` what a scenario works with; the other files hold scenarios.

pub mod cluster;
pub mod ctx;
pub mod harness;
pub mod node;
pub mod process;

mod disk;
mod gates;
mod handlers;
mod lifecycle;
mod load;
mod logs;
mod multi;
mod network;
mod nodeops;
mod one;
mod probes;
mod resources;
mod security;
mod shutdown;
mod standalone;
mod stats;
mod streams;
mod volumes;
