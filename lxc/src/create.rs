//! `create`: makes a container and leaves its first process waiting; `start`: lets it run.
//!
//! The process that was started tells its caller how it went and ends; a child of it runs liblxc until the container has
//! ended. What a crash leaves, `delete` takes away.
#![allow(unsafe_code)] // fork, in a process with one thread

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use lxcri_lxc::wire::{self, Packet};
use lxcri_monitor_proto::null::own_null;
use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags};
use rustix::io::FdFlags;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags};
use rustix::thread::UnshareFlags;

use crate::liblxc::Library;
use crate::options::{Options, Stage};

/// Enters groups, one folder each, which are made; so that this process and all that it starts are in them.
pub fn enter(cgroups: &[String], make: bool) -> Result<(), String> {
    for folder in cgroups {
        if make {
            make_group(folder).map_err(|e| format!("make cgroup {folder}: {e}"))?;
        }
        let open = File::options().write(true).open(format!("{folder}/cgroup.procs"));
        match open.and_then(|mut f| f.write_all(b"0")) {
            // v1's cpuset wants CPUs first, which liblxc gives its own groups. This one is there all the same.
            Err(e) if make && e.raw_os_error() == Some(libc::ENOSPC) => {}
            done => done.map_err(|e| format!("enter cgroup {folder}: {e}"))?,
        }
    }
    Ok(())
}

/// With those above it, which another container's end may take away meanwhile.
fn make_group(folder: &str) -> io::Result<()> {
    for _ in 0..100 {
        match std::fs::create_dir_all(folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            done => return done,
        }
    }
    std::fs::create_dir_all(folder)
}

/// Writes a file whole, by rename.
pub fn put(path: &str, text: &str) -> Result<(), String> {
    let (new, failed) = (format!("{path}.new"), |e: io::Error| format!("write {path}: {e}"));
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    std::fs::rename(&new, path).map_err(failed)
}

/// Hands the master of a terminal to whoever listens.
pub fn send_terminal(socket: &str, master: OwnedFd) -> Result<(), String> {
    let failed = |e: io::Error| format!("send the terminal to {socket}: {e}");
    let stream = std::os::unix::net::UnixStream::connect(socket).map_err(failed)?;
    wire::send(stream.as_fd(), wire::TERMINAL, "", Some(master.as_fd())).map_err(failed)
}

/// The program that becomes the first process, by a mount that can't be written through: whoever is root in the container
/// may reach it by /proc/1/exe.
pub fn read_only(path: &str) -> Result<OwnedFd, String> {
    let failed = |e: rustix::io::Errno| format!("open {path}: {e}");
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, path, flags).map_err(failed)?;
    set_attributes(&tree, libc::MOUNT_ATTR_RDONLY, false, None)
        .map_err(|e| format!("a read-only mount of {path}: {e}"))?;
    let again = format!("/proc/self/fd/{}", tree.as_raw_fd());
    rustix::fs::open(again, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)
}

/// Goes on as the same program by a mount that can't be written through, unless it is so already: a process of this program
/// that enters a container can be reached from inside by /proc/PID/exe, and whoever is root there could write into the node's
/// file. Everything else stays: arguments, environment, streams, pid.
pub fn out_of_reach() -> Result<(), String> {
    const SELF: &str = "/proc/self/exe";
    let failed = |e: rustix::io::Errno| format!("{SELF}: {e}");
    if rustix::fs::statvfs(SELF).map_err(failed)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Ok(());
    }
    let program = read_only(SELF)?;
    let mut args = std::env::args_os();
    #[allow(clippy::disallowed_methods)] // becomes this very program again, and starts none
    let mut again = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    let e = again.arg0(args.next().unwrap_or_default()).args(args).exec();
    Err(format!("starting again from a read-only mount: {e}"))
}

/// mount_setattr(2) of a detached mount, or of all in it.
fn set_attributes(tree: &OwnedFd, attributes: u64, recursive: bool, users: Option<&OwnedFd>) -> io::Result<()> {
    // Times of access are one field: what is set has to be cleared first.
    let clear = if attributes & libc::MOUNT_ATTR__ATIME == 0 { 0 } else { libc::MOUNT_ATTR__ATIME };
    let idmap = if users.is_some() { libc::MOUNT_ATTR_IDMAP } else { 0 };
    let users = users.map_or(0, |fd| fd.as_raw_fd().unsigned_abs());
    let attributes: [u64; 4] = [attributes | idmap, clear, 0, users.into()];
    let below = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `struct mount_attr` is four numbers of 64 bits, and the path is empty.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | below,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Enters the network namespace in which liblxc listens for its tools, and ours; the one before, if this is another one. Sockets are
/// all that belongs to it: a container's network is told to liblxc by path.
pub fn enter_net(path: &str) -> Result<Option<OwnedFd>, String> {
    if path.is_empty() {
        return Ok(None);
    }
    let open = |path: &str| {
        let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        fd.map_err(|e| format!("open {path}: {e}"))
    };
    let (before, net) = (open("/proc/self/ns/net")?, open(path)?);
    set_net(&net).map_err(|e| format!("enter {path}: {e}"))?;
    Ok(Some(before))
}

/// setns(2) to a network namespace.
pub fn set_net(net: &OwnedFd) -> io::Result<()> {
    let net = net.as_fd();
    Ok(rustix::thread::move_into_link_name_space(net, Some(rustix::thread::LinkNameSpaceType::Network))?)
}

/// Makes mounts with the flags that liblxc would not set, in a mount namespace of this process' own, which gets the
/// node's mounts and gives none back.
fn stage(stages: &[Stage]) -> Result<(), String> {
    if stages.is_empty() {
        return Ok(());
    }
    let failed = |what: &str| {
        let what = what.to_owned();
        move |e: rustix::io::Errno| format!("mount {what}: {e}")
    };
    // SAFETY: this process has one thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(failed("namespace"))?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave).map_err(failed("propagation"))?;
    for stage in stages {
        let folder = std::fs::metadata(&stage.source).map_err(|e| format!("mount {}: {e}", stage.source))?.is_dir();
        let made = match (folder, std::path::Path::new(&stage.at).parent()) {
            (true, _) => std::fs::create_dir_all(&stage.at),
            (false, Some(parent)) => std::fs::create_dir_all(parent).and_then(|()| File::create(&stage.at).map(drop)),
            (false, None) => Ok(()),
        };
        made.map_err(|e| format!("make {}: {e}", stage.at))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let tree = rustix::mount::open_tree(CWD, stage.source.as_str(), flags).map_err(failed(&stage.source))?;
        let users = match stage.users.as_str() {
            "" => None,
            path => {
                let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
                Some(fd.map_err(failed(path))?)
            }
        };
        set_attributes(&tree, stage.attributes, stage.recursive, users.as_ref())
            .map_err(|e| format!("flags of mount {}: {e}", stage.source))?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&tree, "", CWD, stage.at.as_str(), flags).map_err(failed(&stage.at))?;
    }
    Ok(())
}

/// `create`.
pub fn create(options: &Options) -> Result<(), String> {
    enter(&options.cgroups, true)?;
    stage(&options.stages)?;
    enter_net(&options.net)?;
    let library = Library::load(&options.library)?;
    let (ours, theirs) = wire::pair().map_err(|e| format!("socket pair: {e}"))?;
    let init = read_only(&options.init)?;
    let plan = File::open(&options.plan).map_err(|e| format!("open {}: {e}", options.plan))?;
    let _ = std::fs::remove_file(&options.start);
    let _ = std::fs::remove_file(&options.status);
    let _ = std::fs::remove_file(&options.kills);
    let fifo = |e: rustix::io::Errno| format!("FIFO {}: {e}", options.start);
    rustix::fs::mkfifoat(CWD, options.start.as_str(), Mode::RUSR | Mode::WUSR).map_err(fifo)?;
    // Both ends, so that it has no end before the byte comes.
    let start =
        rustix::fs::open(options.start.as_str(), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(fifo)?;
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(format!("fork: {}", io::Error::last_os_error())),
        0 => {
            drop(ours);
            let done = hold(options, &library, &init, &plan.into(), &theirs, &start);
            if let Err(why) = done {
                let _ = wire::send(theirs.as_fd(), wire::FAILED, &why, None);
            }
            // SAFETY: ends this process and runs nothing of the parent's.
            unsafe { libc::_exit(0) }
        }
        holder => {
            drop(theirs);
            let pid = wait_until_ready(options, &ours).inspect_err(|_| {
                // SAFETY: a plain call; the child ends, since the container has not begun.
                unsafe { libc::waitpid(holder, std::ptr::null_mut(), 0) };
            })?;
            put(&options.pid_file, &format!("{pid} {holder}\n"))
        }
    }
}

/// The container's streams under other numbers, for its first process: what liblxc has to say later must not be among the
/// container's output.
fn put_aside() -> Result<[OwnedFd; 3], String> {
    let failed = |e: io::Error| format!("streams: {e}");
    let streams = [io::stdin().as_fd(), io::stdout().as_fd(), io::stderr().as_fd()].map(|fd| fd.try_clone_to_owned());
    let [stdin, stdout, stderr] = streams;
    let streams = [stdin.map_err(failed)?, stdout.map_err(failed)?, stderr.map_err(failed)?];
    // Whose mode and owner liblxc changes when the container has something else at /dev/null.
    let null = own_null().map_err(|e| failed(e.into()))?;
    for number in 0..3 {
        // SAFETY: plain calls on open descriptors.
        if unsafe { libc::dup2(null.as_raw_fd(), number) } < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
    }
    for fd in &streams {
        rustix::io::fcntl_setfd(fd, FdFlags::empty()).map_err(|e| failed(e.into()))?;
    }
    Ok(streams)
}

/// In the child: liblxc, until the container has ended.
fn hold(
    options: &Options,
    library: &Library,
    init: &OwnedFd,
    plan: &OwnedFd,
    tell: &OwnedFd,
    start: &OwnedFd,
) -> Result<(), String> {
    // A terminal's or caller's signals are not the container's.
    // SAFETY: a plain call.
    unsafe { libc::setsid() };
    let streams = put_aside()?;
    library.log_to(&options.log, &options.name, &options.lxcpath)?;
    let container = library.container(&options.name, &options.lxcpath)?;
    let mut argv = vec![format!("/proc/self/fd/{}", init.as_raw_fd())];
    for fd in [init, plan, tell, start] {
        rustix::io::fcntl_setfd(fd, FdFlags::empty()).map_err(|e| format!("descriptor: {e}"))?;
    }
    argv.extend([plan, tell, start].map(|fd| fd.as_raw_fd().to_string()));
    argv.extend(streams.iter().map(|fd| fd.as_raw_fd().to_string()));
    let argv: Vec<CString> = argv.into_iter().filter_map(|a| CString::new(a).ok()).collect();
    let (ran, status) = container.run(&argv);
    // A failed start has no process that could have ended; why is in the log.
    if !ran {
        return Err(String::new());
    }
    // Not as wait(2) has it: killed is 0x7f below the signal's number.
    let (code, signal) = match (status >> 8 & 0xff, status & 0x7f) {
        (signal, 0x7f) => (128 + signal, signal),
        (code, _) => (code, 0),
    };
    let kills = crate::kills::noted(&options.kills).map_or(String::new(), |kills| format!(" {kills}"));
    put(&options.status, &format!("{code} {signal}{kills}\n"))
}

/// The first process' pid, when all is done but its program.
fn wait_until_ready(options: &Options, from: &OwnedFd) -> Result<i32, String> {
    loop {
        let packet = wire::receive(from.as_fd()).map_err(|e| format!("the container's first process: {e}"))?;
        match packet {
            Some(Packet { kind: wire::READY, pid, .. }) if pid > 0 => return Ok(pid),
            Some(Packet { kind: wire::TERMINAL, fd: Some(master), .. }) => {
                send_terminal(&options.console_socket, master)?;
            }
            Some(Packet { kind: wire::FAILED | wire::NO_PROGRAM, text, .. }) if !text.is_empty() => return Err(text),
            _ => return Err("liblxc could not start the container".into()),
        }
    }
}

/// `start FIFO`.
pub fn start(options: &Options) -> Result<(), String> {
    let [fifo] = options.rest.as_slice() else { return Err("start: one FIFO".into()) };
    let failed = |e: io::Error| format!("{fifo}: {e}");
    // Without a reader the container is gone.
    let mut file = match File::options().write(true).custom_flags(libc::O_NONBLOCK).open(fifo) {
        // Somebody has let it run, and was killed before that was known.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened.map_err(failed)?,
    };
    file.write_all(&[1]).map_err(failed)?;
    drop(file);
    let _ = std::fs::remove_file(fifo);
    Ok(())
}
