//! Turns the process that the daemon started into a monitor.
//!
//! Called by `main` once. Fails with the step in words; a crash here leaves the socket, which the daemon removes.
#![allow(unsafe_code)] // taking over inherited descriptors

use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use rustix::io::FdFlags;
use rustix::process::DumpableBehavior;
use rustix::thread::UnshareFlags;

use crate::fail_point;
use crate::program::set_oom_score;
use crate::reaper::Reaper;
use crate::server::Server;

/// The listening socket.
const SOCKET: RawFd = 3;
/// The pod's record, read to its end.
const POD_INFO: RawFd = 4;
/// Longest record in bytes.
const POD_INFO_MAX: u64 = 2 * 1024 * 1024;

/// What the daemon gives to whatever it starts for a pod.
pub struct Given {
    /// The pod's folder.
    pub run_dir: PathBuf,
    /// Listens at `monitor.sock` in there.
    pub listener: OwnedFd,
    /// The pod's record.
    pub pod_info: Vec<u8>,
}

/// Takes it, and makes the process one that outlives the daemon and is nobody's to look into. Once, before anything is opened.
pub fn take(name: &std::ffi::CStr) -> Result<Given, String> {
    let run_dir = arguments()?;
    let listener = inherited(SOCKET)?;
    if rustix::net::sockopt::socket_acceptconn(&listener) != Ok(true) {
        return Err("descriptor 3 is not a listening socket".into());
    }
    let mut pod_info = Vec::new();
    let file = std::fs::File::from(inherited(POD_INFO)?);
    file.take(POD_INFO_MAX).read_to_end(&mut pod_info).map_err(|e| format!("descriptor 4: {e}"))?;
    // EPERM: it leads its session already.
    let _ = rustix::process::setsid();
    let _ = rustix::process::chdir("/");
    let _ = rustix::thread::set_name(name);
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|e| format!("dumpable: {e}"))?;
    set_oom_score("-999");
    Ok(Given { run_dir, listener, pod_info })
}

/// A server, ready to run.
pub(crate) fn server() -> Result<Server, String> {
    let Given { run_dir, listener, pod_info } = take(c"lxcri-monitor")?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(|e| format!("subreaper: {e}"))?;
    // Propagation stays as it is: what containers mount for the host must reach it.
    // SAFETY: no thread has been made yet and no descriptor table is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(|e| format!("mount namespace: {e}"))?;
    let reaper = Reaper::start().map_err(|e| format!("signalfd: {e}"))?;
    fail_point!("monitor.begins");
    Server::new(listener, run_dir.join("monitor.sock"), pod_info, reaper).map_err(|e| format!("start: {e}"))
}

/// `--pod <id> --run-dir <folder>`; the id is for whoever looks at the list of processes.
fn arguments() -> Result<PathBuf, String> {
    let mut arguments = std::env::args_os().skip(1);
    let mut run_dir = None;
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{}: no value", name.display()))?;
        match name.to_str() {
            Some("--run-dir") => run_dir = Some(PathBuf::from(value)),
            Some("--pod") => {}
            _ => return Err(format!("{}: unknown argument", name.display())),
        }
    }
    run_dir.filter(|path| path.is_absolute()).ok_or_else(|| "--run-dir: an absolute path is needed".into())
}

fn inherited(number: RawFd) -> Result<OwnedFd, String> {
    // SAFETY: nothing in this process has opened or owns the descriptors that the daemon passed, and each is taken
    // once. If it passed none, the first use says so.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    match rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC) {
        Ok(()) => Ok(fd),
        Err(e) => {
            std::mem::forget(fd);
            Err(format!("descriptor {number}: {e}"))
        }
    }
}
