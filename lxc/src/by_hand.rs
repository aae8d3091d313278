//! Containers that people make by hand, with a template or a root file system of their own: the library's verbs, one call
//! each, as `backend lxc ...` wants them. Nothing of ours stays with such a container: it runs its own init under liblxc's own
//! monitor.
//!
//! Whoever calls this has checked the name and says what is wrong with a state. A crash leaves what liblxc leaves.
#![allow(unsafe_code)] // what liblxc calls in the new process, and waiting for that

use std::ffi::{c_int, c_void};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use lxcri_lxc::become_it::{self, Trouble};
use lxcri_lxc::plan::Plan;
use lxcri_lxc::wire;
use lxcri_monitor_proto::null::own_null;

use crate::create::enter_net;
use crate::liblxc::{Container, Library};
use crate::options::Options;

/// How long a killed container may take to be gone.
const KILL: Duration = Duration::from_secs(10);
/// How long a container's process may take to say its state.
const ANSWER: Duration = Duration::from_secs(2);
/// When so many have not said it, the others have less time: all of that is one call.
const PATIENT: usize = 8;
const HURRY: Duration = Duration::from_millis(100);
/// What templates are told to take for their configuration, if nothing else is said and it is there.
const DEFAULT: &str = "/etc/lxc/default.conf";
/// What a container with a root file system of its own needs at least.
const LEAST: [(&str, &str); 3] =
    [("lxc.mount.auto", "proc:mixed sys:mixed cgroup:mixed"), ("lxc.tty.max", "4"), ("lxc.pty.max", "1024")];

fn open(options: &Options) -> Result<(Library, Container), String> {
    let library = Library::load(&options.library)?;
    library.log_to(&options.log, &options.name, &options.lxcpath)?;
    let container = library.container(&options.name, &options.lxcpath)?;
    Ok((library, container))
}

/// `make`: a template and its arguments, or `--root`.
pub fn make(options: &Options) -> Result<(), String> {
    let library = Library::load(&options.library)?;
    library.log_to(&options.log, &options.name, &options.lxcpath)?;
    let container = library.container_or_none(&options.name, &options.lxcpath)?;
    if container.is_defined() {
        return Err(format!("container {}: it is there already", options.name));
    }
    let file = if options.config.is_empty() { DEFAULT } else { &options.config };
    if !options.config.is_empty() || Path::new(file).is_file() {
        container.load(file)?;
    }
    if !options.root.is_empty() {
        container.set("lxc.uts.name", &options.name)?;
        for (key, value) in LEAST {
            container.set(key, value)?;
        }
    }
    for line in &options.set {
        let (key, value) = line.split_once('=').ok_or_else(|| format!("{line:?} is not of the form KEY=VALUE"))?;
        container.set(key.trim(), value.trim())?;
    }
    if !options.root.is_empty() {
        // Last, so that no file that was read or is included says otherwise. No tool of liblxc's may remove the folder, nor
        // the container's own end.
        container.set("lxc.rootfs.path", &format!("dir:{}", options.root))?;
        container.set("lxc.rootfs.managed", "0")?;
        container.set("lxc.ephemeral", "0")?;
    }
    match options.rest.split_first() {
        Some((template, arguments)) => {
            // liblxc would let the template write there, and remove it with the container.
            let root = container.get("lxc.rootfs.path")?;
            if !root.is_empty() {
                return Err(format!(
                    "lxc.rootfs.path is {root:?} in what it is to begin with, and a template makes a root file system of its own"
                ));
            }
            container.create(template, arguments)
        }
        None => container.save(),
    }
}

/// `run`: starts it. `--root` is what it was made with.
pub fn run(options: &Options) -> Result<(), String> {
    let (_library, container) = open(options)?;
    // With none liblxc takes the node's own, and makes all of its mounts private.
    let root = container.get("lxc.rootfs.path")?;
    if root.is_empty() {
        return Err(
            "lxc.rootfs.path is not in its configuration, which is not whole: delete it, or write that again".into()
        );
    }
    // With its kind before it or without, as versions have it.
    if !options.root.is_empty() && root.strip_prefix("dir:").unwrap_or(&root) != options.root {
        return Err(format!(
            "lxc.rootfs.path is {root:?} in its configuration, and it was made with {:?}",
            options.root
        ));
    }
    if container.start_beside() { Ok(()) } else { Err("liblxc could not start the container".into()) }
}

/// `halt SECONDS`: its init is asked to end, and killed then.
pub fn halt(options: &Options) -> Result<(), String> {
    let seconds = options.rest.first().and_then(|s| s.parse().ok()).ok_or("halt: how many seconds")?;
    let (_library, container) = open(options)?;
    if seconds > 0 {
        container.shut_down(seconds);
    }
    // An init that reboots is STOPPED for a moment, and liblxc starts it again for as long as its monitor is there.
    let until = Instant::now() + KILL;
    let mut monitors = Vec::new();
    loop {
        let state = container.state();
        let late = Instant::now() > until;
        if state != "STOPPED" {
            if late {
                return Err(format!("liblxc could not stop the container: it is {state}"));
            }
            container.stop();
        } else {
            monitors = monitors_of(options, &monitors);
            // Late, it is at a hook of the container's.
            if monitors.is_empty() || late {
                return Ok(());
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The processes, among `known` if there are any, in which liblxc watches over the container: as it calls itself there.
fn monitors_of(options: &Options, known: &[i32]) -> Vec<i32> {
    let title = format!("[lxc monitor] {} {}", options.lxcpath, options.name);
    let is_one = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|b| *b == 0).next() == Some(title.as_bytes())
    };
    if !known.is_empty() {
        return known.iter().copied().filter(is_one).collect();
    }
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_one).collect()
}

/// `destroy`: with its root file system, if that is the container's own.
pub fn destroy(options: &Options) -> Result<(), String> {
    let (_library, container) = open(options)?;
    // "0": it removes none.
    if container.get("lxc.rootfs.managed")? != "0" {
        let root = container.get("lxc.rootfs.path")?;
        let folder = Path::new(&options.lxcpath).join(&options.name);
        if let Some(foreign) = outside(&root, &folder)? {
            return Err(format!(
                "lxc.rootfs.path is {foreign:?}, which is not in the container's folder, and would be removed with it: let it be \
                 kept by lxc.rootfs.managed = 0 in {}/config, or say otherwise where the root file system is",
                folder.display()
            ));
        }
    }
    if container.destroy() { Ok(()) } else { Err("liblxc could not remove the container".into()) }
}

/// `states NAME...`: "NAME STATE PID" of each that is there, a line.
pub fn states(options: &Options) -> Result<(), String> {
    enter_net(&options.net)?;
    let library = Library::load(&options.library)?;
    let mut out = std::io::stdout().lock();
    let (mut names, mut silent) = (&options.rest[..], 0);
    while !names.is_empty() {
        let time = if silent < PATIENT { ANSWER } else { HURRY };
        let mut asked = Asked::begin(&library, options, names)?;
        let mut told = 0;
        while let Some(name) = names.get(told) {
            let Some(answer) = asked.answer(time) else { break };
            // It is gone meanwhile.
            if !answer.is_empty() {
                writeln!(out, "{name} {answer}").map_err(|e| e.to_string())?;
            }
            told += 1;
        }
        // Neither one that does not answer nor one that is unreadable may hide the others.
        if let Some(name) = names.get(told) {
            silent += 1;
            writeln!(out, "{name} UNKNOWN 0").map_err(|e| e.to_string())?;
        }
        names = names.get(told + 1..).unwrap_or_default();
    }
    Ok(())
}

fn state(library: &Library, options: &Options, name: &str) -> String {
    match library.container(name, &options.lxcpath) {
        Ok(container) => format!("{} {}", container.state(), container.init_pid().unwrap_or(0)),
        Err(_) if Path::new(&options.lxcpath).join(name).join("config").try_exists().is_ok_and(|there| !there) => {
            String::new()
        }
        Err(_) => "BROKEN 0".to_owned(),
    }
}

/// A process that asks liblxc, which may wait for somebody for ever.
struct Asked {
    pid: i32,
    answers: std::fs::File,
    read: Vec<u8>,
}

impl Asked {
    fn begin(library: &Library, options: &Options, names: &[String]) -> Result<Self, String> {
        let (ours, theirs) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| format!("pipe: {e}"))?;
        let parent = std::process::id();
        // SAFETY: this process has one thread.
        match unsafe { libc::fork() } {
            -1 => Err(format!("fork: {}", std::io::Error::last_os_error())),
            0 => {
                let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
                let mut theirs = std::fs::File::from(theirs);
                for name in names {
                    // Its parent may have died before that.
                    if std::os::unix::process::parent_id() != parent
                        || writeln!(theirs, "{}", state(library, options, name)).is_err()
                    {
                        break;
                    }
                }
                // SAFETY: ends this process and runs nothing of the parent's.
                unsafe { libc::_exit(0) }
            }
            pid => Ok(Self { pid, answers: ours.into(), read: Vec::new() }),
        }
    }

    /// The next line; None: there is none within that time, or for ever.
    fn answer(&mut self, time: Duration) -> Option<String> {
        let until = Instant::now() + time;
        loop {
            if let Some(end) = self.read.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return Some(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            let left = until.saturating_duration_since(Instant::now()).as_millis();
            let mut poll = libc::pollfd { fd: self.answers.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one struct, which outlives the call.
            if unsafe { libc::poll(&raw mut poll, 1, i32::try_from(left).unwrap_or(i32::MAX)) } <= 0 {
                return None;
            }
            let mut part = [0; 4096];
            match self.answers.read(&mut part) {
                Ok(0) | Err(_) => return None,
                Ok(n) => self.read.extend_from_slice(&part[..n]),
            }
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        // SAFETY: plain calls; it is our child, whose end nobody else waits for.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

/// The file or folder that liblxc would remove for a root file system, if it is not below `folder`, wherever links lead.
fn outside(root: &str, folder: &Path) -> Result<Option<PathBuf>, String> {
    let path = match root.split_once(':') {
        // Volumes of a pool or a group have names of their own.
        Some(("dir" | "loop" | "btrfs", path)) => path,
        // What has been written is in the last one.
        Some(("overlay" | "overlayfs", paths)) => paths.rsplit(':').next().unwrap_or(paths),
        _ if root.starts_with('/') => root,
        _ => return Ok(None),
    };
    match Path::new(path).canonicalize() {
        // There is nothing to remove.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(format!("lxc.rootfs.path {path}: {e}")),
        Ok(real) => {
            let folder = folder.canonicalize().map_err(|e| format!("{}: {e}", folder.display()))?;
            Ok((!real.starts_with(&folder) || real == folder).then_some(real))
        }
    }
}

struct Payload {
    plan: Plan,
    tell: OwnedFd,
    /// The other end, which is the parent's.
    parents: i32,
}

unsafe extern "C" fn inside(payload: *mut c_void) -> c_int {
    // SAFETY: it is the caller's, who waits.
    let payload = unsafe { &*payload.cast::<Payload>() };
    let trouble = match become_it::plainly(&payload.plan) {
        Ok(program) => {
            // Whoever kills the helper means the command. Not earlier: a change of user would undo it.
            let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
            let mut poll = libc::pollfd { fd: payload.tell.as_raw_fd(), events: 0, revents: 0 };
            // SAFETY: plain calls; the number is this process' copy, and nobody's here. The struct outlives its call.
            unsafe {
                libc::close(payload.parents);
                libc::poll(&raw mut poll, 1, 0);
            }
            if poll.revents & libc::POLLHUP != 0 {
                // It has been killed before.
                return 128 + libc::SIGKILL;
            }
            Trouble::Program(format!("exec: {}", program.execute()))
        }
        Err(trouble) => trouble,
    };
    trouble.tell(payload.tell.as_fd());
    127
}

/// Streams that are the node's /dev/null become another one: liblxc and the container's root may change mode and owner of what they
/// have.
fn leave_the_nodes_null() -> Result<(), String> {
    let failed = |e: std::io::Error| format!("streams: {e}");
    for number in 0..3 {
        // SAFETY: it is open, or the call fails.
        let stream = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        let is_null = rustix::fs::fstat(stream).is_ok_and(|s| {
            rustix::fs::FileType::from_raw_mode(s.st_mode) == rustix::fs::FileType::CharacterDevice
                && s.st_rdev == rustix::fs::makedev(1, 3)
        });
        if is_null {
            let own = own_null().map_err(|e| failed(e.into()))?;
            // SAFETY: a plain call on an open descriptor.
            if unsafe { libc::dup2(own.as_raw_fd(), number) } < 0 {
                return Err(failed(std::io::Error::last_os_error()));
            }
        }
    }
    Ok(())
}

/// The command of `attach`.
static COMMAND: AtomicI32 = AtomicI32::new(0);

/// A signal that was meant for the command.
extern "C" fn pass_on(signal: c_int) {
    // SAFETY: a call that signal handlers may make; the pid is our child's, which is not waited for yet.
    unsafe { libc::kill(COMMAND.load(Ordering::Relaxed), signal) };
}

/// `attach COMMAND...`: with this process' streams; its exit code, as shells have it. SIGTERM and SIGHUP are the command's (those that
/// a terminal's keys make it has by itself), and it is killed when this process is.
pub fn attach(options: &Options) -> Result<u8, String> {
    let (_library, container) = open(options)?;
    if container.init_pid().is_none() {
        return Err(format!("container {}: liblxc says that it does not run", options.name));
    }
    let cwd = if options.cwd.is_empty() { "/" } else { &options.cwd };
    let plan = Plan { args: options.rest.clone(), env: options.env.clone(), cwd: cwd.to_owned(), ..Plan::default() };
    leave_the_nodes_null()?;
    let (ours, theirs) = wire::pair().map_err(|e| format!("socket pair: {e}"))?;
    let mut payload = Payload { plan, tell: theirs, parents: ours.as_raw_fd() };
    let pid = container.attach_as_its_tool(inside, (&raw mut payload).cast());
    drop(payload);
    let pid = pid.ok_or_else(|| format!("liblxc can't attach to container {}", options.name))?;
    COMMAND.store(pid, Ordering::Relaxed);
    for signal in [libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler makes one call, which handlers may make.
        unsafe { libc::signal(signal, pass_on as extern "C" fn(c_int) as libc::sighandler_t) };
    }
    let failed = wire::receive(ours.as_fd()).map_err(|e| format!("the process: {e}"))?;
    let mut status = 0;
    // SAFETY: a plain call; the number lives in this frame.
    while unsafe { libc::waitpid(pid, &raw mut status, 0) } < 0 {
        let e = std::io::Error::last_os_error();
        if e.kind() != std::io::ErrorKind::Interrupted {
            return Err(format!("wait for the process: {e}"));
        }
    }
    COMMAND.store(0, Ordering::Relaxed);
    match failed {
        Some(packet) => Err(packet.text),
        None if libc::WIFSIGNALED(status) => Ok((128 + libc::WTERMSIG(status)) as u8),
        None => Ok(libc::WEXITSTATUS(status) as u8),
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;

    #[test]
    fn a_root_file_system_is_its_own_below_its_folder_alone() {
        let dir = std::env::temp_dir().join(format!("lxcri-outside-{}", std::process::id()));
        let folder = dir.join("c");
        std::fs::create_dir_all(folder.join("rootfs")).expect("a folder");
        std::fs::create_dir_all(dir.join("precious")).expect("a folder");
        std::os::unix::fs::symlink("../precious", folder.join("link")).expect("a link");
        let at =
            |kind: &str, path: &str| outside(&format!("{kind}{}/{path}", dir.display()), &folder).expect("looked at");
        for kind in ["", "dir:", "loop:", "overlay:/below:"] {
            assert_eq!(at(kind, "c/rootfs"), None, "{kind}");
            for foreign in ["precious", "c/../precious", "c/link", "c"] {
                assert!(at(kind, foreign).is_some(), "{kind} {foreign}");
            }
        }
        assert_eq!(at("dir:", "none"), None);
        for other in ["", "zfs:pool/c", "lvm:/dev/group/c"] {
            assert_eq!(outside(other, &folder), Ok(None), "{other}");
        }
        std::fs::remove_dir_all(&dir).expect("removed");
    }
}
