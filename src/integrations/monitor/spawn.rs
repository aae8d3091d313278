//! Starts a monitor's process: socket, record, descriptors 3 and 4, session, cgroup.
//!
//! Called by the supervisor. Fails with the step; what was made stays for the next spawn or the cleanup of that pod.
#![allow(unsafe_code)] // the hook between fork and exec

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::process::Stdio;

use camino::Utf8Path;
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::process::Child;

use super::error::MonitorError;
use crate::core::ids::PodId;

/// Name of the socket in a pod's folder.
pub(super) const SOCKET: &str = "monitor.sock";
/// Name of the file with what a monitor writes to stderr: nothing, or why it ended.
pub(super) const LOG: &str = "monitor.log";
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// A socket of the protocol's kind.
pub(super) fn socket() -> Result<OwnedFd, MonitorError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|e| MonitorError::host("make a socket", e))
}

/// Calls `with` with the address of the socket in `folder`. An address holds 107 bytes, a path may have more: the
/// folder is named by its descriptor.
pub(super) fn with_address<T>(folder: &Utf8Path, with: impl FnOnce(&SocketAddrUnix) -> io::Result<T>) -> io::Result<T> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(folder.as_std_path(), flags, Mode::empty())?;
    with(&SocketAddrUnix::new(format!("/proc/self/fd/{}/{SOCKET}", fd.as_raw_fd()))?)
}

/// The folder of a pod, private to root.
pub(super) fn make_folder(folder: &Utf8Path) -> Result<(), MonitorError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|e| MonitorError::host(format!("make folder {folder}"), e))
}

/// Binds the pod's socket in place of a dead one.
pub(super) fn listen(folder: &Utf8Path) -> Result<OwnedFd, MonitorError> {
    let path = folder.join(SOCKET);
    let failed = |e: io::Error| MonitorError::host(format!("listen on {path}"), e);
    let listener = socket()?;
    match rustix::fs::unlink(path.as_str()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(e) => return Err(failed(e.into())),
    }
    with_address(folder, |address| Ok(rustix::net::bind(&listener, address)?)).map_err(failed)?;
    // The folder is closed to others while this is not done yet.
    rustix::fs::chmod(path.as_str(), Mode::RUSR | Mode::WUSR).map_err(|e| failed(e.into()))?;
    rustix::net::listen(&listener, BACKLOG).map_err(|e| failed(e.into()))?;
    Ok(listener)
}

/// Starts `program` for the pod with a listening socket and the pod's record.
pub(super) fn start(
    program: &Utf8Path,
    pod: &PodId,
    folder: &Utf8Path,
    listener: &OwnedFd,
    pod_info: &[u8],
) -> Result<Child, MonitorError> {
    let failed = |e: io::Error| MonitorError::host(format!("pod {pod}: start {program}"), e);
    let record = record(pod_info).map_err(failed)?;
    // Above the numbers under which the monitor has them, so that neither can overwrite the other.
    let high = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 10).map_err(|e| failed(e.into()));
    let (listener, record) = (high(listener)?, high(&record)?);
    let (socket_number, record_number) = (listener.as_raw_fd(), record.as_raw_fd());
    let log = std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(folder.join(LOG));
    // Monitors outlive this process and all deadlines: they are not for utils::process, which kills on drop.
    #[allow(clippy::disallowed_methods)]
    let mut command = tokio::process::Command::new(program);
    command
        .args(["--pod", pod.as_str(), "--run-dir", folder.as_str()])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(log.map_err(failed)?))
        .kill_on_drop(false);
    #[cfg(feature = "failpoints")]
    command.envs(std::env::var_os("LXCRI_FAILPOINT_FILE").map(|file| ("LXCRI_FAILPOINT_FILE", file)));
    // SAFETY: only system calls on numbers that are open until spawn returns; no allocation.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            if libc::dup2(socket_number, 3) < 0 || libc::dup2(record_number, 4) < 0 {
                return Err(io::Error::last_os_error());
            }
            // Whatever else this process has open is not the monitor's; closed by exec.
            if libc::syscall(libc::SYS_close_range, 5u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    command.spawn().map_err(failed)
}

fn record(bytes: &[u8]) -> io::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create(c"pod-info", MemfdFlags::CLOEXEC)?;
    let mut done = 0;
    while done < bytes.len() {
        done += rustix::io::pwrite(&memfd, &bytes[done..], done as u64)?;
    }
    Ok(memfd)
}

/// Puts a process into a cgroup (v2) of the pod's own below `parent`.
pub(super) fn enter_cgroup(parent: &Utf8Path, pod: &PodId, pid: u32) -> Result<(), MonitorError> {
    let folder = parent.join(pod.as_str());
    let failed = |e: io::Error| MonitorError::host(format!("enter cgroup {folder}"), e);
    match std::fs::create_dir(&folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e)),
        _ => {}
    }
    let file = rustix::fs::open(folder.join("cgroup.procs").as_str(), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| failed(e.into()))?;
    rustix::io::write(&file, pid.to_string().as_bytes()).map_err(|e| failed(e.into()))?;
    Ok(())
}

/// The end of what the monitor wrote to its log.
pub(super) fn last_words(folder: &Utf8Path) -> String {
    let text = std::fs::read(folder.join(LOG)).unwrap_or_default();
    String::from_utf8_lossy(&text[text.len().saturating_sub(1024)..]).trim().to_owned()
}
