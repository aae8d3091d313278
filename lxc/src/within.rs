//! `within` and `keep`: an OCI runtime's calls inside of a Proxmox container's PID namespace.
//!
//! What a runtime makes there ends with the Proxmox container, whoever stops it. A process in a PID namespace can only be
//! waited for from inside of it: `keep` leaves a process there, non-dumpable and with the node's credentials, that is the
//! parent of what the runtime has made and tells how it ended. `within` runs a program there and ends as it does.
//!
//! The namespace is that of the init that is named by pid and start time; when that is gone, so is all that was in it, and
//! both fail. A crash of the kept process leaves its child to the Proxmox container's init.
#![allow(unsafe_code)] // fork, setns and waitpid, in a process with one thread

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use lxcri_lxc::wire::{self, Packet};
use rustix::fs::CWD;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags};
use rustix::process::{Pid, PidfdFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::create::put;
use crate::options::Options;

/// Exit status where the program can't be run.
const CANNOT_RUN: i32 = 127;

/// Enters the init's PID namespace for children of this process.
pub fn enter(options: &Options) -> Result<(), String> {
    let (pid, start) = options.init.split_once(':').ok_or("--init is PID:START")?;
    let failed =
        |what: &'static str| move |e: rustix::io::Errno| format!("the Proxmox container's init {pid}: {what}: {e}");
    let number = pid.parse().ok().and_then(Pid::from_raw).ok_or_else(|| format!("--init {:?}", options.init))?;
    let pidfd = rustix::process::pidfd_open(number, PidfdFlags::empty()).map_err(failed("it is gone"))?;
    let namespace = File::open(format!("/proc/{pid}/ns/pid")).map_err(|e| format!("the init {pid}: {e}"))?;
    // Whose number it is now can be asked while the descriptor is open: it is not given away before.
    if start_time(number) != start.parse().ok() {
        return Err(format!("the Proxmox container's init {pid} is gone"));
    }
    drop(pidfd);
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::ProcessID))
        .map_err(failed("its PID namespace"))
}

pub fn start_time(pid: Pid) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // After the name, which may hold anything: state is the third field, the start the 22nd.
    text.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// In the child: a /proc that fits, in a mount namespace of its own, and out of the Proxmox container's reach.
pub fn settle() -> Result<(), String> {
    let failed = |what: &'static str| move |e: rustix::io::Errno| format!("{what}: {e}");
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .map_err(failed("dumpable"))?;
    // SAFETY: this process has one thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(failed("mount namespace"))?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave).map_err(failed("propagation"))?;
    let proc = rustix::mount::fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("proc"))?;
    rustix::mount::fsconfig_create(proc.as_fd()).map_err(failed("proc"))?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let proc =
        rustix::mount::fsmount(proc.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("proc"))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(proc.as_fd(), "", CWD, "/proc", flags).map_err(failed("mount /proc"))
}

pub fn command(options: &Options) -> Result<Command, String> {
    let (program, arguments) = options.rest.split_first().ok_or("no program")?;
    #[allow(clippy::disallowed_methods)] // the helper's purpose
    let mut command = Command::new(program);
    command.args(arguments);
    Ok(command)
}

pub fn wait(pid: i32) -> Option<i32> {
    let mut status = 0;
    loop {
        // SAFETY: a plain call, with a place for the status.
        match unsafe { libc::waitpid(pid, &raw mut status, 0) } {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return None,
            _ => return Some(status),
        }
    }
}

/// Ends this process as another one has ended.
fn end_as(status: i32) -> ! {
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        // SAFETY: plain calls; nothing of this process is needed any more.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
    let code = if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) };
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

/// `within --init PID:START -- PROGRAM...`.
pub fn within(options: &Options) -> Result<(), String> {
    match run_within(options)? {
        0 => Ok(()),
        status => end_as(status),
    }
}

/// Its status, as waitpid(2) has it.
fn run_within(options: &Options) -> Result<i32, String> {
    enter(options)?;
    let mut command = command(options)?;
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(format!("fork: {}", io::Error::last_os_error())),
        0 => {
            let why = match settle() {
                Ok(()) => format!("{}: {}", options.rest[0], command.exec()),
                Err(why) => why,
            };
            crate::fail(&options.log, &why);
            // SAFETY: ends the process.
            unsafe { libc::_exit(CANNOT_RUN) }
        }
        child => wait(child).ok_or_else(|| "the program was waited for by somebody else".into()),
    }
}

/// `forget --init PID:START --state FOLDER [--remove GROUP] -- PROGRAM...`: the program takes a container away. When the init is
/// gone, so is all that the runtime could kill: what it has written down is removed then.
pub fn forget(options: &Options) -> Result<(), String> {
    let known = std::fs::exists(&options.state).map_err(|e| format!("{}: {e}", options.state))?;
    let asked = match known.then(|| run_within(options)) {
        None | Some(Ok(0)) => Ok(()),
        Some(Ok(status)) => {
            Err(format!("{}: wait status {status:#x}", options.rest.first().map_or("", String::as_str)))
        }
        Some(Err(why)) => Err(why),
    };
    for group in &options.remove {
        crate::delete::remove_group(std::path::Path::new(group))?;
    }
    match asked {
        Err(why) if init_lives(options) => Err(why),
        _ => remove_state(&options.state).map_err(|e| format!("remove {}: {e}", options.state)),
    }
}

/// A runtime's folder of a container, which holds files alone.
fn remove_state(folder: &str) -> io::Result<()> {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        std::fs::remove_file(entry.path())?;
    }
    match std::fs::remove_dir(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn init_lives(options: &Options) -> bool {
    let named = options.init.split_once(':');
    let number = named.and_then(|(pid, _)| pid.parse().ok()).and_then(Pid::from_raw);
    number.zip(named).is_some_and(|(pid, (_, start))| start_time(pid) == start.parse().ok())
}

/// `keep --init PID:START --runtime-pid-file FILE --pid-file FILE [--status FILE] -- PROGRAM...`: the program writes the pid of
/// what it has made, as it is in the namespace. With a status file that is a container, whose parent's pid is written beside
/// its own; without, it is an exec, and the kept process stands for it.
pub fn keep(options: &Options) -> Result<(), String> {
    enter(options)?;
    let command = command(options)?;
    let (ours, theirs) = wire::pair().map_err(|e| format!("socket pair: {e}"))?;
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(format!("fork: {}", io::Error::last_os_error())),
        0 => {
            drop(ours);
            let done = kept(options, command, theirs);
            // SAFETY: ends the process.
            unsafe { libc::_exit(if done.is_ok() { 0 } else { CANNOT_RUN }) }
        }
        keeper => {
            drop(theirs);
            let text = made(&ours).and_then(|pidfd| match options.status.is_empty() {
                // It may have ended already, and the kept process with it.
                true => Ok(format!("{keeper}\n")),
                false => Ok(format!("{} {keeper}\n", pid_of(&pidfd)?)),
            });
            match text {
                Ok(text) => put(&options.pid_file, &text),
                Err(why) => {
                    wait(keeper);
                    Err(why)
                }
            }
        }
    }
}

/// The pid, as it is out here.
pub fn pid_of(pidfd: &OwnedFd) -> Result<i32, String> {
    let file = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let text = std::fs::read_to_string(&file).map_err(|e| format!("{file}: {e}"))?;
    let pid = text.lines().find_map(|l| l.strip_prefix("Pid:")?.trim().parse().ok());
    pid.filter(|pid| *pid > 0).ok_or_else(|| "it has ended already".to_owned())
}

/// What was made.
pub fn made(from: &OwnedFd) -> Result<OwnedFd, String> {
    match wire::receive(from.as_fd()).map_err(|e| format!("the kept process: {e}"))? {
        Some(Packet { kind: wire::READY, fd: Some(pidfd), .. }) => Ok(pidfd),
        Some(Packet { text, .. }) if !text.is_empty() => Err(text),
        _ => Err("it ended without a word".into()),
    }
}

/// In the kept process.
fn kept(options: &Options, mut command: Command, tell: OwnedFd) -> Result<(), ()> {
    let begun = settle().and_then(|()| begin(options, &mut command));
    let (pid, pidfd) = match begun {
        Ok(begun) => begun,
        Err(why) => {
            let _ = wire::send(tell.as_fd(), wire::FAILED, &why, None);
            return Err(());
        }
    };
    let told = wire::send(tell.as_fd(), wire::READY, "", Some(pidfd.as_fd()));
    drop((tell, pidfd));
    if told.is_err() {
        return Err(());
    }
    loop {
        let mut status = 0;
        // SAFETY: a plain call, with a place for the status.
        match unsafe { libc::waitpid(-1, &raw mut status, 0) } {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return Err(()),
            ended if ended != pid => {}
            _ if options.status.is_empty() => end_as(status),
            _ => {
                let (code, signal) = match libc::WIFSIGNALED(status) {
                    true => (128 + libc::WTERMSIG(status), libc::WTERMSIG(status)),
                    false => (libc::WEXITSTATUS(status), 0),
                };
                return put(&options.status, &format!("{code} {signal}\n")).map_err(drop);
            }
        }
    }
}

/// Runs the program as a subreaper; the pid of what it made, which is a child now.
pub fn begin(options: &Options, command: &mut Command) -> Result<(i32, OwnedFd), String> {
    let _ = std::fs::remove_file(&options.status);
    let _ = std::fs::remove_file(&options.runtime_pid_file);
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(|e| format!("subreaper: {e}"))?;
    // SAFETY: a plain call.
    unsafe { libc::setsid() };
    let program = &options.rest[0];
    let status = command.status().map_err(|e| format!("{program}: {e}"))?;
    // What the container's streams are is no longer ours to hold.
    let null = File::options().read(true).write(true).open("/dev/null").map_err(|e| format!("/dev/null: {e}"))?;
    for number in 0..3 {
        // SAFETY: plain calls on open descriptors.
        if unsafe { libc::dup2(null.as_raw_fd(), number) } < 0 {
            return Err(format!("streams: {}", io::Error::last_os_error()));
        }
    }
    if !status.success() {
        return Err(format!("{program}: {status}"));
    }
    let file = &options.runtime_pid_file;
    let text = std::fs::read_to_string(file).map_err(|e| format!("{file}: {e}"))?;
    let pid = text.trim().parse().ok().and_then(Pid::from_raw).ok_or_else(|| format!("{file}: {text:?}"))?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|e| format!("process {pid:?}: {e}"))?;
    Ok((pid.as_raw_nonzero().get(), pidfd))
}
