//! `inherit`: the init of a Proxmox container becomes the container that an OCI runtime has made.
//!
//! The runtime makes it as any other, inside of the Proxmox container's PID namespace, with all of its mounts and limits, and its
//! first process waits to be let run. It never is: the Proxmox container's own init, which waits for this, takes its place (see
//! `lxcri_lxc::successor`), and the runtime's state names that one from then on, so that its other calls meet it. Fails before
//! anything is made where that init is somebody else by now. A crash on the way leaves an init that waits still, or one that ends.
#![allow(unsafe_code)] // fork, prlimit, kill and waitpid, in a process with one thread

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use lxcri_lxc::plan::Plan;
use lxcri_lxc::successor::{FILTER, GO, GROUPS, MOUNTS, PLAN, SOCKET, START, STREAM};
use lxcri_lxc::wire::{self, Packet};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags};

use crate::create::{put, send_terminal};
use crate::options::Options;
use crate::within;

/// The init, in its own PID namespace.
const INIT: i32 = 1;
/// Files of a runtime's state: what a container that is made waits at, who it is, and the filter of its system calls.
const FIFO: &str = "exec.fifo";
const STATUS: &str = "status";
const COMPILED: &str = "seccomp.bpf";

/// `inherit --init PID:START --runtime-pid-file FILE --pid-file FILE --plan FILE --state FOLDER [--console-socket SOCKET]
/// [--cgroup FOLDER...] -- PROGRAM...`.
pub fn inherit(options: &Options) -> Result<(), String> {
    within::enter(options)?;
    let (ours, theirs) = wire::pair().map_err(|e| format!("socket pair: {e}"))?;
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(format!("fork: {}", io::Error::last_os_error())),
        0 => {
            drop(ours);
            let told = match inside(options) {
                Ok(init) => wire::send(theirs.as_fd(), wire::READY, "", Some(init.as_fd())),
                Err(why) => wire::send(theirs.as_fd(), wire::FAILED, &why, None),
            };
            // SAFETY: ends the process.
            unsafe { libc::_exit(i32::from(told.is_err())) }
        }
        child => {
            drop(theirs);
            let made = within::made(&ours);
            within::wait(child);
            put(&options.pid_file, &format!("{}\n", within::pid_of(&made?)?))
        }
    }
}

/// In the PID namespace: a descriptor of the init, which has become the container.
fn inside(options: &Options) -> Result<OwnedFd, String> {
    within::settle()?;
    let copy = |e: io::Error| format!("streams: {e}");
    let [stdin, stdout, stderr] =
        [io::stdin().as_fd(), io::stdout().as_fd(), io::stderr().as_fd()].map(|fd| fd.try_clone_to_owned());
    let streams = [stdin.map_err(copy)?, stdout.map_err(copy)?, stderr.map_err(copy)?];
    let init = Pid::from_raw(INIT).ok_or("no init")?;
    let pidfd = rustix::process::pidfd_open(init, PidfdFlags::empty()).map_err(|e| format!("its init: {e}"))?;
    let socket = connect()?;
    let mut command = within::command(options)?;
    let (first, _) = within::begin(options, &mut command)?;
    let namespaces = move_in(options, first);
    // It would run as soon as anybody opened what it waits at.
    // SAFETY: a plain call; it is our child, so that nobody else has its number.
    unsafe { libc::kill(first, libc::SIGKILL) };
    within::wait(first);
    hand_over(options, &socket, &streams, &namespaces?)?;
    name_init(&format!("{}/{STATUS}", options.state), init)?;
    Ok(pidfd)
}

/// Says something to the init that waits.
fn connect() -> Result<OwnedFd, String> {
    let path = format!("/proc/{INIT}/root{SOCKET}");
    let failed = |e: rustix::io::Errno| {
        format!(
            "the Proxmox container's init waits for nothing ({e}): it is a container's already, and has no place for another"
        )
    };
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let socket = socket.map_err(|e| format!("socket: {e}"))?;
    let address = SocketAddrUnix::new(path.as_str()).map_err(|e| format!("{path}: {e}"))?;
    rustix::net::connect(&socket, &address).map_err(failed)?;
    Ok(socket)
}

fn open(path: &str, access: OFlags) -> Result<OwnedFd, String> {
    rustix::fs::open(path, access | OFlags::CLOEXEC, Mode::empty()).map_err(|e| format!("open {path}: {e}"))
}

/// Limits and groups of the container for the init, and the namespaces that it is to go into: of mounts and, if it has its own, of groups.
fn move_in(options: &Options, first: i32) -> Result<(OwnedFd, Option<OwnedFd>), String> {
    let text = std::fs::read(&options.plan).map_err(|e| format!("read {}: {e}", options.plan))?;
    let plan = Plan::decode(&text)?;
    // With the node's privileges; the init does it once more with its own, which then changes nothing.
    for limit in &plan.limits {
        let value = libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard };
        // SAFETY: the struct lives longer than the call.
        if unsafe { libc::prlimit64(INIT, limit.resource as _, &raw const value, std::ptr::null_mut()) } != 0 {
            return Err(format!("resource limit {}: {}", limit.resource, io::Error::last_os_error()));
        }
    }
    if let Some(score) = plan.oom_score_adj {
        let file = open(&format!("/proc/{INIT}/oom_score_adj"), OFlags::WRONLY)?;
        rustix::io::write(&file, score.to_string().as_bytes()).map_err(|e| format!("oom_score_adj {score}: {e}"))?;
    }
    for group in &options.cgroups {
        // The runtime makes none where it has no use for one.
        if !std::fs::exists(group).map_err(|e| format!("cgroup {group}: {e}"))? {
            continue;
        }
        let procs = open(&format!("{group}/cgroup.procs"), OFlags::WRONLY)?;
        rustix::io::write(&procs, INIT.to_string().as_bytes()).map_err(|e| format!("enter cgroup {group}: {e}"))?;
    }
    let mounts = open(&format!("/proc/{first}/ns/mnt"), OFlags::RDONLY)?;
    let of = |pid: &str| {
        let path = format!("/proc/{pid}/ns/cgroup");
        std::fs::read_link(&path).map_err(|e| format!("{path}: {e}"))
    };
    let own = of(&first.to_string())? != of("self")?;
    let groups = own.then(|| open(&format!("/proc/{first}/ns/cgroup"), OFlags::RDONLY)).transpose()?;
    Ok((mounts, groups))
}

/// Tells the init all that it has to know, and waits until it is ready to run.
fn hand_over(
    options: &Options,
    socket: &OwnedFd,
    streams: &[OwnedFd; 3],
    (mounts, groups): &(OwnedFd, Option<OwnedFd>),
) -> Result<(), String> {
    let plan = open(&options.plan, OFlags::RDONLY)?;
    // Both ends, so that it has no end before the byte comes.
    let start = open(&format!("{}/{FIFO}", options.state), OFlags::RDWR)?;
    let compiled = format!("{}/{COMPILED}", options.state);
    let filter = match File::open(&compiled) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        opened => {
            let file = opened.map_err(|e| format!("open {compiled}: {e}"))?;
            // Without a profile the file is empty.
            let length = file.metadata().map_err(|e| format!("{compiled}: {e}"))?.len();
            (length > 0).then(|| OwnedFd::from(file))
        }
    };
    let tell = |kind: u8, text: &str, fd: Option<&OwnedFd>| {
        let sent = wire::send(socket.as_fd(), kind, text, fd.map(AsFd::as_fd));
        sent.map_err(|e| format!("the Proxmox container's init does not listen: {e}"))
    };
    for (number, stream) in streams.iter().enumerate() {
        tell(STREAM, &number.to_string(), Some(stream))?;
    }
    tell(MOUNTS, "", Some(mounts))?;
    tell(PLAN, "", Some(&plan))?;
    tell(START, "", Some(&start))?;
    for (kind, fd) in [(GROUPS, groups), (FILTER, &filter)] {
        if fd.is_some() {
            tell(kind, "", fd.as_ref())?;
        }
    }
    tell(GO, "", None)?;
    loop {
        match wire::receive(socket.as_fd()).map_err(|e| format!("the Proxmox container's init: {e}"))? {
            Some(Packet { kind: wire::READY, .. }) => return Ok(()),
            Some(Packet { kind: wire::TERMINAL, fd: Some(master), .. }) => {
                send_terminal(&options.console_socket, master)?;
            }
            Some(Packet { text, .. }) if !text.is_empty() => return Err(text),
            _ => return Err("the Proxmox container's init ended on the way".into()),
        }
    }
}

/// Has the runtime's state name the init.
fn name_init(file: &str, init: Pid) -> Result<(), String> {
    let failed = |e: io::Error| format!("{file}: {e}");
    let text = std::fs::read_to_string(file).map_err(failed)?;
    let began = within::start_time(init).ok_or("the Proxmox container's init has ended")?;
    let text = with_number(&text, "pid", INIT.unsigned_abs().into());
    let text = text.and_then(|text| with_number(&text, "process-start-time", began));
    put(file, &text.ok_or_else(|| format!("{file}: this is not how crun writes it"))?)
}

/// JSON with another number in its one field of that name.
fn with_number(json: &str, name: &str, value: u64) -> Option<String> {
    let key = format!("\"{name}\"");
    let (before, after) = json.split_once(&key)?;
    let digits = after.trim_start().strip_prefix(':')?.trim_start();
    let rest = digits.trim_start_matches(|c: char| c.is_ascii_digit());
    (rest.len() < digits.len() && !rest.contains(&key)).then(|| format!("{before}{key}: {value}{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_names_another_process() {
        let json = "{\n    \"pid\": 14563,\n    \"process-start-time\": 57960,\n    \"owner\": \"root\"\n}";
        let named = with_number(json, "pid", 1).and_then(|json| with_number(&json, "process-start-time", 7));
        assert_eq!(
            named.as_deref(),
            Some("{\n    \"pid\": 1,\n    \"process-start-time\": 7,\n    \"owner\": \"root\"\n}")
        );
        assert_eq!(with_number("{\"pid\":5}", "pid", 1).as_deref(), Some("{\"pid\": 1}"));
        for other in ["", "{}", "{\"pid\":\"5\"}", "{\"pid\":1,\"pid\":2}", "{\"pid\"}"] {
            assert_eq!(with_number(other, "pid", 1), None, "{other}");
        }
    }
}
