//! `exec`: runs a process in a container and leaves it to whoever started this.
//!
//! The process is in the groups that this one enters first, has its streams, and is described by a plan as the first one
//! is. A crash leaves the process, or nothing.
#![allow(unsafe_code)] // what liblxc calls in the new process

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, OwnedFd};

use lxcri_lxc::become_it;
use lxcri_lxc::plan::Plan;
use lxcri_lxc::wire::{self, Packet};

use crate::create::{enter, enter_net, put, send_terminal, set_net};
use crate::liblxc::Library;
use crate::options::Options;

struct Payload {
    plan: Plan,
    tell: OwnedFd,
}

/// In the new process, inside of the container.
unsafe extern "C" fn inside(payload: *mut c_void) -> c_int {
    // SAFETY: it is the caller's, who waits.
    let payload = unsafe { &*payload.cast::<Payload>() };
    let trouble = match become_it::prepare(&payload.plan, payload.tell.as_fd()) {
        Ok(program) => become_it::Trouble::Program(format!("exec: {}", program.execute())),
        Err(trouble) => trouble,
    };
    trouble.tell(payload.tell.as_fd());
    127
}

/// `exec`.
pub fn exec(options: &Options) -> Result<(), String> {
    let text = std::fs::read(&options.plan).map_err(|e| format!("read {}: {e}", options.plan))?;
    let plan = Plan::decode(&text)?;
    let node = enter_net(&options.net)?;
    let library = Library::load(&options.library)?;
    library.log_to(&options.log, &options.name, &options.lxcpath)?;
    let container = library.container(&options.name, &options.lxcpath)?;
    // One that an earlier version has made listens in the node's.
    if let (None, Some(node)) = (container.init_pid(), node) {
        set_net(&node).map_err(|e| format!("enter the node's network: {e}"))?;
    }
    if container.init_pid().is_none() {
        return Err(format!("container {}: liblxc says that it does not run", options.name));
    }
    enter(&options.cgroups, false)?;
    let (ours, theirs) = wire::pair().map_err(|e| format!("socket pair: {e}"))?;
    let mut payload = Payload { plan, tell: theirs };
    let pid = container.attach(inside, (&raw mut payload).cast());
    drop(payload);
    let pid = pid.ok_or_else(|| format!("liblxc can't attach to container {}", options.name))?;
    let mut failed = None;
    while let Some(packet) = wire::receive(ours.as_fd()).map_err(|e| format!("the process: {e}"))? {
        match packet {
            Packet { kind: wire::TERMINAL, fd: Some(master), .. } => send_terminal(&options.console_socket, master)?,
            Packet { text, .. } => failed = Some(text),
        }
    }
    match failed {
        // Its end is ours to see: nobody was told of it.
        Some(why) => {
            // SAFETY: a plain call.
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
            Err(why)
        }
        None => put(&options.pid_file, &format!("{pid}\n")),
    }
}
