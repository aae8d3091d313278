//! The init of a pod's shared PID namespace: starting it, and being it.
//!
//! It runs from a sealed copy of this program in memory (so that what shares the namespace can't reach a file of the
//! host through /proc/1/exe), in an empty root, as nobody, without capabilities, not dumpable. It reaps, and ends on
//! SIGTERM. The server starts it by [`Server::start_init`]; `main` comes here when it is started under that name.
//! Fails with the step; a crash of the monitor leaves it running as a child of the host's init.
#![allow(unsafe_code)] // fork, signal masks, close_range

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::ExitCode;

use lxcri_monitor_proto::v1::{self, reply::Body};
use rustix::fs::{Gid, MemfdFlags, Mode, OFlags, Uid};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Pid, PidfdFlags, WaitOptions, pidfd_open};
use rustix::thread::{CapabilitySet, CapabilitySets, LinkNameSpaceType, UnshareFlags};

use crate::connection::Asker;
use crate::fail_point;
use crate::failure::{Failure, Result};
use crate::process::Process;
use crate::proctree;
use crate::program::{self, Descriptors, Running};
use crate::reaper::{Ended, Fate};
use crate::server::{Purpose, Server};

/// The name under which this program is an init.
pub const NAME: &str = "pod-init";
/// User and group of the init.
const NOBODY: u32 = 65_534;
/// The init is as unlikely an OOM victim as a sandbox is: its end is the end of all containers that share with it.
const OOM_SCORE: i32 = -998;

/// The pod's init, as the server knows it.
#[derive(Default)]
pub enum Init {
    /// There is none.
    #[default]
    None,
    /// It is being started; its pid will be in the file.
    Starting(OwnedFd),
    /// It runs.
    Running(Process),
}

impl Server {
    /// StartInit. One that runs already is the answer.
    pub fn start_init(&mut self, asker: Asker, request: &v1::StartInit) -> Result<()> {
        match &self.init {
            Init::Running(process) => {
                let body = Body::InitStarted(v1::InitStarted { pid: process.pid, pid_start_time: process.start_time });
                self.reply(asker, Ok(body));
                return Ok(());
            }
            Init::Starting(_) => return Err(Failure::state("the init is being started")),
            Init::None => {}
        }
        if let Some(bad) = request.cgroups.iter().find(|p| !p.starts_with('/')) {
            return Err(Failure::invalid(format!("cgroup {bad:?}: not an absolute path")));
        }
        let namespaces = request.namespaces.iter().chain([&request.pid_namespace]);
        if let Some(bad) = namespaces.into_iter().find(|p| !p.is_empty() && !p.starts_with('/')) {
            return Err(Failure::invalid(format!("namespace {bad:?}: not an absolute path")));
        }
        let failed = |e| Failure::errno("memory for the init", e);
        let program = sealed_self().map_err(|e| Failure::io("a copy of this program", &e))?;
        let plan = rustix::fs::memfd_create(c"plan", MemfdFlags::CLOEXEC).map_err(failed)?;
        // Told by stdin and not by arguments, which everybody in the namespace can read.
        let mut text = String::new();
        let (user, others) = request.namespaces.split_at(request.namespaces.len().min(1));
        let own = std::slice::from_ref(&request.pid_namespace);
        for (kind, paths) in [('c', &request.cgroups[..]), ('u', user), ('n', others), ('p', own)] {
            paths
                .iter()
                .filter(|p| !p.is_empty())
                .for_each(|p| text.extend([kind, '\0'].into_iter().chain(p.chars()).chain(['\0'])));
        }
        rustix::io::pwrite(&plan, text.as_bytes(), 0).map_err(failed)?;
        let answer = rustix::fs::memfd_create(c"answer", MemfdFlags::CLOEXEC).map_err(failed)?;
        let stdout = answer.try_clone().map_err(|e| Failure::io("dup", &e))?;
        let fds = Descriptors { stdin: Some(plan), stdout: Some(stdout), argv0: Some(NAME), ..Descriptors::default() };
        let program = v1::Program {
            path: format!("/proc/self/fd/{}", program.as_raw_fd()),
            deadline_ms: 10_000,
            oom_score_adj: OOM_SCORE,
            ..v1::Program::default()
        };
        let running = program::spawn(&self.kept, &program, fds)?;
        fail_point!("monitor.init.spawned");
        self.programs.insert(running.pid, (Purpose::Init(asker), running));
        self.init = Init::Starting(answer);
        Ok(())
    }

    /// What starts the init has ended.
    pub fn init_program_ended(&mut self, asker: Asker, running: Running, ended: Ended) {
        let since = running.since;
        let Init::Starting(answer) = std::mem::take(&mut self.init) else { return };
        let result = running.outcome(ended).and_then(|()| {
            let mut text = [0u8; 16];
            let n = rustix::io::pread(&answer, &mut text, 0).map_err(|e| Failure::errno("the init's answer", e))?;
            let text = std::str::from_utf8(&text[..n]).unwrap_or_default();
            let pid = text.trim().parse().ok().and_then(Pid::from_raw);
            let pid = pid.ok_or_else(|| Failure::invalid("the init told no pid"))?;
            if let Fate::Ended(_) | Fate::Foreign = self.reaper.fate(pid, since) {
                return Err(Failure::state("the init ended at once"));
            }
            let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| Failure::errno("the init's pidfd", e))?;
            let pid = pid.as_raw_pid();
            let start_time = proctree::stat(pid).map_or(0, |s| s.start_time);
            Ok(Process { pid, start_time, pidfd: Some(pidfd), session: 0 })
        });
        fail_point!("monitor.init.known");
        let answer = result.map(|process| {
            let body = Body::InitStarted(v1::InitStarted { pid: process.pid, pid_start_time: process.start_time });
            self.init = Init::Running(process);
            body
        });
        self.reply(asker, answer);
    }

    /// The init has ended.
    pub fn init_over(&mut self, ended: Ended) {
        self.init = Init::None;
        self.broadcast(&Body::InitExited(v1::InitExited { exit: Some(ended.to_wire()) }));
    }
}

/// A copy of this program that nobody can change.
fn sealed_self() -> std::io::Result<OwnedFd> {
    lxcri_monitor_proto::sealed::copy("pod-init", std::fs::File::open("/proc/self/exe")?)
}

/// `main` of the program under [`NAME`]: enters cgroups and namespaces, forks the init, tells its pid, ends.
pub fn run() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            let _ = std::io::stderr().write_all(message.as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn start() -> std::result::Result<(), String> {
    let mut plan = String::new();
    std::io::stdin().read_to_string(&mut plan).map_err(|e| format!("plan: {e}"))?;
    let mut namespaces = Vec::new();
    let mut words = plan.split('\0');
    while let (Some(kind), Some(path)) = (words.next(), words.next()) {
        if kind == "c" {
            let open = std::fs::OpenOptions::new().write(true).open(format!("{path}/cgroup.procs"));
            open.and_then(|mut f| f.write_all(b"0")).map_err(|e| format!("enter cgroup {path}: {e}"))?;
        } else {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| format!("open {path}: {e}"))?;
            namespaces.push((kind, path, fd));
        }
    }
    let joins = namespaces.iter().any(|(kind, ..)| *kind == "p");
    for (kind, path, fd) in namespaces {
        use std::os::fd::AsFd;
        rustix::thread::move_into_link_name_space(fd.as_fd(), None::<LinkNameSpaceType>)
            .map_err(|e| format!("enter {path}: {e}"))?;
        if kind == "u" {
            become_its_root().map_err(|e| format!("become root of {path}: {e}"))?;
        }
    }
    if !joins {
        // SAFETY: a PID namespace for children; no descriptor table is unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }
            .map_err(|e| format!("new PID namespace: {e}"))?;
    }
    let (mut ready, tell) = std::io::pipe().map_err(|e| format!("pipe: {e}"))?;
    // SAFETY: this process has one thread, so that the child may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(format!("fork: {}", std::io::Error::last_os_error())),
        0 => {
            drop(ready);
            let result = be_nobody();
            let _ = (&tell).write_all(result.as_ref().map_or_else(|e| e.as_bytes(), |()| b"ok"));
            drop(tell);
            if result.is_ok() {
                serve();
            }
            // SAFETY: ends this process and runs nothing of the parent's.
            unsafe { libc::_exit(1) }
        }
        pid => {
            drop(tell);
            let mut word = String::new();
            ready.read_to_string(&mut word).map_err(|e| format!("pipe: {e}"))?;
            if word != "ok" {
                return Err(if word.is_empty() { "the init died".into() } else { word });
            }
            std::io::stdout().write_all(pid.to_string().as_bytes()).map_err(|e| format!("answer: {e}"))
        }
    }
}

/// In a user namespace: until now this is the host's root, who has no number here.
fn become_its_root() -> rustix::io::Result<()> {
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
}

/// In the init: gives up everything.
fn be_nobody() -> std::result::Result<(), String> {
    let step = |what: &'static str| move |e: rustix::io::Errno| format!("{what}: {e}");
    rustix::thread::set_name(c"pod-init").map_err(step("name"))?;
    // An empty root: /proc/1/root leads nowhere, whoever may follow it.
    // SAFETY: this process has one thread and no paths open.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(step("new mount namespace"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(step("private mounts"))?;
    let flags = MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::RDONLY;
    rustix::mount::mount("none", "/proc", "tmpfs", flags, c"size=4k,nr_inodes=2,mode=555").map_err(step("tmpfs"))?;
    rustix::process::chdir("/proc").map_err(step("chdir"))?;
    rustix::process::pivot_root(".", ".").map_err(step("pivot_root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(step("leave the old root"))?;
    rustix::process::chdir("/").map_err(step("chdir"))?;
    // In a user namespace groups may be fixed and nobody may have no number: then there is nothing to give up.
    let _ = rustix::thread::set_thread_groups(&[]);
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
    }
    let _ = rustix::thread::set_thread_gid(Gid::from_raw(NOBODY));
    let _ = rustix::thread::set_thread_uid(Uid::from_raw(NOBODY));
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).map_err(step("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("not dumpable"))
}

/// In the init: reaps until SIGTERM or SIGINT.
fn serve() {
    // SAFETY: the descriptors belong to nobody who will use or close them: this process never returns to the code
    // that owns them. The set is made by sigfillset before it is used.
    unsafe {
        libc::syscall(libc::SYS_close_range, 0u32, u32::MAX, 0u32);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] {
            libc::sigaddset(&raw mut set, signal);
        }
        loop {
            match libc::sigwaitinfo(&raw const set, std::ptr::null_mut()) {
                libc::SIGCHLD => while rustix::process::wait(WaitOptions::NOHANG).is_ok_and(|r| r.is_some()) {},
                libc::SIGTERM | libc::SIGINT => libc::_exit(0),
                _ => {}
            }
        }
    }
}
