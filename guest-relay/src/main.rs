//! The relay of a pod whose containers run in a virtual machine: to the daemon it is the pod's monitor (monitor.proto), and it passes on
//! what is asked to the agent in the machine (guest.proto).
//!
//! Started by the daemon as a monitor is, with a listening socket as descriptor 3 and the pod's record as descriptor 4; where the guest
//! is, the backend tells it by a file ([`target`]). Fails at once, with a line on stderr, or runs until Shutdown. A crash leaves the
//! containers running in their machine, and what has to outlive it in files ([`store`]): the daemon starts another one, which
//! asks the guest what has become of them, and for their logs from where it has them.
//!
//! A guest may say anything: its sizes, ids, texts and lines are checked, its paths are never followed, what it may make wait is
//! bounded.

mod answers;
mod container;
mod group;
mod lines;
mod link;
mod log;
mod logs;
mod meeting;
mod pump;
mod requests;
mod server;
mod session;
mod store;
mod target;

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let given = proxmox_lxcri_monitor::setup::take(c"lxcri-relay");
    match given.and_then(server::Relay::new).and_then(|mut relay| relay.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            let _ = writeln!(std::io::stderr(), "proxmox-lxcri-guest-relay: {message}");
            ExitCode::FAILURE
        }
    }
}
