//! The init of a Proxmox container that becomes the container's program: it waits for somebody of the node who says what that is,
//! and where.
//!
//! What comes by its socket, a packet each: its streams, the mount namespace and the cgroup namespace that it goes into, its plan,
//! the filter of its system calls, and what it reads a byte from before it runs. It keeps its PID, its users, its network and
//! whatever else the Proxmox container is. Who breaks off before [`GO`] has changed nothing, and another may come; what fails after
//! it is told, and is the Proxmox container's end.
#![allow(unsafe_code)] // signals, dup2, setns

use std::io::Read;
use std::mem::zeroed;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::thread::LinkNameSpaceType;

use crate::become_it::{self, Filter, Program, Trouble};
use crate::plan::Plan;
use crate::wire;

/// What makes an init wait, as its argument.
pub const WORD: &str = "native";
/// Where it listens, in its root file system.
pub const SOCKET: &str = "/run/native";

/// Its streams; which one is what it says.
pub const STREAM: u8 = b'D';
/// The mount namespace.
pub const MOUNTS: u8 = b'M';
/// The cgroup namespace; need not come.
pub const GROUPS: u8 = b'C';
/// The plan.
pub const PLAN: u8 = b'L';
/// The filter, as the kernel has it; need not come.
pub const FILTER: u8 = b'B';
/// What it reads a byte from.
pub const START: u8 = b'S';
/// That is all.
pub const GO: u8 = b'G';

/// What it was told.
#[derive(Default)]
struct Orders {
    streams: [Option<OwnedFd>; 3],
    mounts: Option<OwnedFd>,
    groups: Option<OwnedFd>,
    plan: Option<OwnedFd>,
    filter: Option<OwnedFd>,
    start: Option<OwnedFd>,
}

/// Signals that tell an init to end. liblxc asks one that blocks SIGRTMIN+3 by that, since systemd's does; by glibc's numbers, which
/// are liblxc's: the C library that this program has begins one higher.
pub const ENDS: [i32; 4] = [libc::SIGPWR, libc::SIGTERM, libc::SIGINT, 34 + 3];

/// Blocks all signals; those in the set are [`ENDS`] and SIGCHLD.
pub fn block_signals() -> libc::sigset_t {
    // SAFETY: plain calls; the set is made before it is used.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigfillset(&raw mut set);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::sigemptyset(&raw mut set);
        for signal in ENDS.into_iter().chain([libc::SIGCHLD]) {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

/// Reaps whoever has ended.
pub fn reap() {
    // SAFETY: a plain call that needs no place for a status.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}

/// Waits until there is something to read; false: it was told to end.
fn wait_for(fd: &OwnedFd, signals: &OwnedFd) -> Result<bool, String> {
    loop {
        let mut fds = [PollFd::new(fd, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            polled => polled.map_err(|e| format!("wait: {e}"))?,
        };
        let (ready, signalled) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if signalled {
            let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
            rustix::io::read(signals, &mut info[..]).map_err(|e| format!("signals: {e}"))?;
            // The number is its first field.
            let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            if ENDS.contains(&number) {
                return Ok(false);
            }
            reap();
        }
        if ready {
            return Ok(true);
        }
    }
}

/// Waits, and becomes what it is told; returns when it was told to end instead, or why it can't.
pub fn serve() -> Result<(), String> {
    let set = block_signals();
    // SAFETY: a plain call, with a set that lives longer.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC) };
    if fd < 0 {
        return Err(format!("signals: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: it is new, and nobody else owns it.
    let signals = unsafe { OwnedFd::from_raw_fd(fd) };
    let failed = |e: rustix::io::Errno| format!("{SOCKET}: {e}");
    let socket = || {
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(failed)
    };
    let listener = socket()?;
    let _ = std::fs::remove_file(SOCKET);
    rustix::net::bind(&listener, &SocketAddrUnix::new(SOCKET).map_err(failed)?).map_err(failed)?;
    rustix::net::listen(&listener, 1).map_err(failed)?;
    let (orders, tell) = loop {
        if !wait_for(&listener, &signals)? {
            return Ok(());
        }
        let peer = rustix::net::accept_with(&listener, SocketFlags::CLOEXEC).map_err(failed)?;
        if let Some(orders) = listen_to(&peer) {
            break (orders, peer);
        }
    };
    // Nobody else is heard.
    drop(listener);
    let _ = std::fs::remove_file(SOCKET);
    let (program, start) = prepare(orders, &tell).inspect_err(|trouble| trouble.tell(tell.as_fd())).map_err(said)?;
    wire::send(tell.as_fd(), wire::READY, "", None).map_err(|e| format!("tell: {e}"))?;
    drop(tell);
    if !wait_for(&start, &signals)? {
        return Ok(());
    }
    if !matches!(std::fs::File::from(start).read(&mut [0]), Ok(1)) {
        return Err("it is not let run".into());
    }
    Err(format!("exec: {}", program.execute()))
}

fn said(trouble: Trouble) -> String {
    match trouble {
        Trouble::Program(text) | Trouble::Step(text) => text,
    }
}

/// What the peer says; None: it has gone before it was done.
fn listen_to(peer: &OwnedFd) -> Option<Orders> {
    let mut orders = Orders::default();
    loop {
        let packet = wire::receive(peer.as_fd()).ok()??;
        match packet.kind {
            STREAM => *orders.streams.get_mut(packet.text.parse::<usize>().ok()?)? = packet.fd,
            MOUNTS => orders.mounts = packet.fd,
            GROUPS => orders.groups = packet.fd,
            PLAN => orders.plan = packet.fd,
            FILTER => orders.filter = packet.fd,
            START => orders.start = packet.fd,
            GO => return Some(orders),
            _ => return None,
        }
    }
}

fn read(fd: OwnedFd, what: &str) -> Result<Vec<u8>, Trouble> {
    let mut bytes = Vec::new();
    std::fs::File::from(fd).read_to_end(&mut bytes).map_err(|e| Trouble::Step(format!("{what}: {e}")))?;
    Ok(bytes)
}

/// All but the start.
fn prepare(orders: Orders, tell: &OwnedFd) -> Result<(Program, OwnedFd), Trouble> {
    let step = |what: &'static str| move |e: rustix::io::Errno| Trouble::Step(format!("{what}: {e}"));
    let lacks = |what: &str| Trouble::Step(format!("it was told no {what}"));
    let plan = read(orders.plan.ok_or_else(|| lacks("plan"))?, "the plan")?;
    let plan = Plan::decode(&plan).map_err(Trouble::Step)?;
    let filter = orders.filter.map(|fd| read(fd, "the filter")).transpose()?;
    let filter = filter.map(|bytes| Filter::parse(&bytes)).transpose().map_err(Trouble::Step)?;
    for (number, stream) in (0..).zip(&orders.streams) {
        let stream = stream.as_ref().ok_or_else(|| lacks("stream"))?;
        // SAFETY: a plain call on an open descriptor.
        if unsafe { libc::dup2(stream.as_raw_fd(), number) } < 0 {
            return Err(Trouble::Step(format!("streams: {}", std::io::Error::last_os_error())));
        }
    }
    if let Some(groups) = orders.groups {
        rustix::thread::move_into_link_name_space(groups.as_fd(), Some(LinkNameSpaceType::ControlGroup))
            .map_err(step("cgroup namespace"))?;
    }
    let mounts = orders.mounts.ok_or_else(|| lacks("mount namespace"))?;
    // Its root is this process' root from here on.
    rustix::thread::move_into_link_name_space(mounts.as_fd(), Some(LinkNameSpaceType::Mount))
        .map_err(step("mount namespace"))?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let program = become_it::prepare_filtered(&plan, filter, tell.as_fd())?;
    Ok((program, orders.start.ok_or_else(|| lacks("start"))?))
}
