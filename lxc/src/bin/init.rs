//! The first process of a liblxc container until it becomes the container's program: `init PLAN TELL START STDIN STDOUT
//! STDERR`, six descriptors by number.
//!
//! liblxc executes it, by descriptor and from a read-only mount, in the finished container. It tells the helper by TELL
//! when all is done but exec(2), waits for a byte from START, and becomes the program with the same PID. A failure is
//! told, and ends the container with 127; a crash is the end of the container. Without those, it is the init of a Proxmox container:
//! one that stays, or with the argument `native` one that becomes a program ([`successor`]).
#![allow(unsafe_code)] // taking over inherited descriptors

use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

use lxcri_lxc::become_it::{self, Trouble};
use lxcri_lxc::plan::Plan;
use lxcri_lxc::{successor, wire};

/// Status of a program that can't be executed (as shells have it).
const CANNOT_RUN: u8 = 127;
/// Status of one that ended by SIGHUP.
const HANGUP: u8 = 128 + 1;

fn main() -> ExitCode {
    match std::env::args_os().nth(1) {
        None => return serve(),
        Some(word) if word == successor::WORD => return succeed(),
        Some(_) => {}
    }
    let numbers: Vec<i32> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let [plan, tell, start, streams @ ..] = &numbers[..] else { return ExitCode::from(CANNOT_RUN) };
    for (number, fd) in (0..).zip(streams) {
        // SAFETY: as below; what is left open goes with exec.
        unsafe { libc::dup2(*fd, number) };
    }
    // SAFETY: whoever started this says that these descriptors are open and ours; each is taken once.
    let [plan, tell, start] = [plan, tell, start].map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
    let mut text = Vec::new();
    let mut plan = std::fs::File::from(plan);
    let read = plan.read_to_end(&mut text);
    if read.as_ref().is_ok_and(|n| *n == 0) {
        // It was read before: a program that was killed by SIGHUP is taken for a reboot, and liblxc starts anew.
        return ExitCode::from(HANGUP);
    }
    let prepared = read
        .map_err(|e| e.to_string())
        .and_then(|_| Plan::decode(&text))
        .map_err(Trouble::Step)
        .and_then(|plan| become_it::prepare(&plan, tell.as_fd()));
    text.fill(0);
    let program = match prepared {
        Ok(program) => program,
        Err(trouble) => {
            trouble.tell(tell.as_fd());
            return ExitCode::from(CANNOT_RUN);
        }
    };
    if wire::send(tell.as_fd(), wire::READY, "", None).is_err() {
        return ExitCode::from(CANNOT_RUN);
    }
    drop((tell, plan));
    let mut start = std::fs::File::from(start);
    if !matches!(start.read(&mut [0]), Ok(1)) {
        return ExitCode::from(CANNOT_RUN);
    }
    drop(start);
    let e = program.execute();
    // In one piece: the log has a record for each.
    let _ = std::io::stderr().write_all(format!("exec: {e}\n").as_bytes());
    ExitCode::from(CANNOT_RUN)
}

/// Without arguments: the init of a Proxmox container that others put their processes into. It reaps, and ends when it is told to.
fn serve() -> ExitCode {
    let set = successor::block_signals();
    loop {
        // SAFETY: a plain call; nobody asks for more than the number.
        match unsafe { libc::sigwaitinfo(&raw const set, std::ptr::null_mut()) } {
            libc::SIGCHLD => successor::reap(),
            signal if successor::ENDS.contains(&signal) => return ExitCode::SUCCESS,
            _ => {}
        }
    }
}

/// The init of a Proxmox container that becomes a program of somebody's.
fn succeed() -> ExitCode {
    match successor::serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let _ = std::io::stderr().write_all(format!("{why}\n").as_bytes());
            ExitCode::from(CANNOT_RUN)
        }
    }
}
