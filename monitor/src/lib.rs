//! The monitor of one pod: keeps its containers' output, exit codes and main processes while daemons come and go.
//!
//! A library, so that the agent in a virtual machine has it inside, by [`main`]. What the relay needs, which stands for the monitor on
//! the node of such a machine, is public, too. Started by the daemon with a listening socket as descriptor 3 and the pod's record as descriptor 4, or by itself
//! as the pod's init. Fails at once, with a line on stderr, or runs until Shutdown. A crash leaves the containers
//! running: their output waits in the FIFOs and their exit codes are the kernel's to tell.

mod attach;
mod cgroup;
pub mod clock;
pub mod connection;
mod container;
mod crilog;
mod exec;
mod execgroup;
pub mod exit_record;
mod failpoint;
pub mod failure;
mod held;
mod init;
mod kept;
mod lifecycle;
pub mod logfile;
mod mounts;
mod ops;
mod poll;
mod process;
mod proctree;
mod program;
mod reaper;
mod relay;
mod server;
pub mod setup;
mod stdio;
mod takeover;
mod trim;
mod writer;

use std::io::Write;
use std::process::ExitCode;

/// The monitor's program, or what it starts of itself: argv[0] tells. The pod's init has a name of its own, and so runs what has
/// this code inside: [`is_init`].
pub fn main() -> ExitCode {
    if is_init() {
        return init::run();
    }
    match setup::server().and_then(|mut server| server.run().map_err(|e| format!("epoll: {e}"))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            let _ = writeln!(std::io::stderr(), "proxmox-lxcri-monitor: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Whether this process was started as a pod's init.
pub fn is_init() -> bool {
    std::env::args_os().next().is_some_and(|name| name == init::NAME)
}
