//! The guest's monitor: started once, found again by every agent that comes after.
//!
//! Called by the session, which has a connection of its own for each node that connects. Fails with the step. A crash of the agent
//! leaves the monitor; a crash of the monitor leaves the containers, and the next connection starts another one.
#![allow(unsafe_code)] // descriptors for the program

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use proxmox_lxcri_monitor::failure::{Failure, Result};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::settings::Settings;

/// argv[0] of this program as the monitor.
pub const NAME: &str = "lxcri-guest-monitor";

/// Connects to the monitor; starts it if there is none.
pub fn connect(settings: &Settings) -> Result<OwnedFd> {
    let path = settings.run_dir.join("monitor.sock");
    let failed = |e| Failure::errno(path.display(), e);
    let address = SocketAddrUnix::new(&path).map_err(failed)?;
    let socket = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(failed)
    };
    let connection = socket()?;
    match rustix::net::connect(&connection, &address) {
        Ok(()) => return Ok(connection),
        Err(Errno::NOENT) => {}
        // One that has died.
        Err(Errno::CONNREFUSED) => rustix::fs::unlink(&path).map_err(failed)?,
        Err(e) => return Err(failed(e)),
    }
    let listener = socket()?;
    rustix::net::bind(&listener, &address).map_err(failed)?;
    rustix::net::listen(&listener, 8).map_err(failed)?;
    start(settings, &listener)?;
    let connection = socket()?;
    rustix::net::connect(&connection, &address).map_err(failed)?;
    Ok(connection)
}

fn start(settings: &Settings, listener: &OwnedFd) -> Result<()> {
    // The pod's record is the node's.
    let record =
        rustix::fs::memfd_create(c"record", MemfdFlags::CLOEXEC).map_err(|e| Failure::errno("memfd_create", e))?;
    // Above the numbers under which the monitor gets them.
    let high = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 10).map_err(|e| Failure::errno("dup", e));
    let (socket, record) = (high(listener)?, high(&record)?);
    let (s, r) = (socket.as_raw_fd(), record.as_raw_fd());
    #[allow(clippy::disallowed_methods)] // the agent's one place where a program is started
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).arg("--pod").arg("guest").arg("--run-dir").arg(&settings.run_dir);
    command.env_clear().current_dir("/").stdin(Stdio::null());
    // SAFETY: dup2 only, on numbers that are open until spawn returns.
    unsafe {
        command.pre_exec(move || {
            for (fd, number) in [(s, 3), (r, 4)] {
                let fd = std::os::fd::BorrowedFd::borrow_raw(fd);
                let mut place = std::mem::ManuallyDrop::new(std::os::fd::FromRawFd::from_raw_fd(number));
                rustix::io::dup2(fd, &mut place)?;
            }
            Ok(())
        });
    }
    // Neither killed nor waited for with the handle: it outlives this agent. One that ends is reaped in the loop.
    command.spawn().map(drop).map_err(|e| Failure::io("start the monitor", &e))
}

/// Takes the status of monitors that have ended.
pub fn reap() {
    use rustix::process::{WaitOptions, wait};
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}
