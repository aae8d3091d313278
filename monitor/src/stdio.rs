//! A container's standard streams: FIFOs that the monitor makes, or the pty that the runtime sends.
//!
//! Called by the server when a container is created and removed. Fails with the failing path. A crash leaves FIFOs in
//! the container's run folder, which the next CreateContainer of that id replaces.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use lxcri_monitor_proto::v1;
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::crilog::Stream;
use crate::failure::{Failure, Result};
use crate::program::Descriptors;

/// The monitor's and the container's ends of one container's streams.
#[derive(Default)]
pub struct Ends {
    /// For the program that creates the container; taken when it is started.
    pub container: Descriptors,
    /// Read ends of the output FIFOs; taken by the writer.
    pub outputs: Vec<(Stream, OwnedFd)>,
    /// Write end of stdin: as long as it is open, the container's stdin has no end. With a terminal: the FIFO
    /// that is copied to the pty.
    pub stdin: Option<OwnedFd>,
    /// Where the pty will come from.
    pub console: Option<Console>,
}

/// Whether the paths can be used.
pub fn check(stdio: &v1::Stdio) -> Result<()> {
    for path in [&stdio.stdin, &stdio.stdout, &stdio.stderr, &stdio.console_socket] {
        if !path.is_empty() && !Path::new(path).is_absolute() {
            return Err(Failure::invalid(format!("stdio: {path}: not an absolute path")));
        }
    }
    if stdio.terminal && stdio.console_socket.is_empty() {
        return Err(Failure::invalid("stdio: a terminal needs console_socket"));
    }
    Ok(())
}

/// Makes everything that the streams need.
pub fn make(stdio: &v1::Stdio) -> Result<Ends> {
    let mut ends = Ends::default();
    if stdio.terminal {
        ends.console = Some(Console::listen(&stdio.console_socket)?);
        ends.container.mute = true;
        if !stdio.stdin.is_empty() {
            make_fifo(&stdio.stdin, stdio)?;
            // Both ends: it has no end until CloseStdin says so.
            ends.stdin = Some(open(&stdio.stdin, OFlags::RDWR | OFlags::NONBLOCK)?);
        }
        return Ok(ends);
    }
    // Nobody gets SIGPIPE when a monitor dies: the container's own end reads, too.
    for (path, stream) in [(&stdio.stdout, Stream::Stdout), (&stdio.stderr, Stream::Stderr)] {
        if path.is_empty() {
            continue;
        }
        make_fifo(path, stdio)?;
        let reader = open(path, OFlags::RDONLY | OFlags::NONBLOCK)?;
        let writer = open(path, OFlags::RDWR)?;
        ends.outputs.push((stream, reader));
        match stream {
            Stream::Stdout => ends.container.stdout = Some(writer),
            Stream::Stderr => ends.container.stderr = Some(writer),
        }
    }
    // Without a FIFO for stderr the container's is /dev/null, and never ours.
    ends.container.mute = true;
    if !stdio.stdin.is_empty() {
        make_fifo(&stdio.stdin, stdio)?;
        let reader = open(&stdio.stdin, OFlags::RDONLY | OFlags::NONBLOCK)?;
        ends.stdin = Some(open(&stdio.stdin, OFlags::WRONLY | OFlags::NONBLOCK)?);
        let flags = rustix::fs::fcntl_getfl(&reader).map_err(|e| Failure::errno(&stdio.stdin, e))?;
        rustix::fs::fcntl_setfl(&reader, flags - OFlags::NONBLOCK).map_err(|e| Failure::errno(&stdio.stdin, e))?;
        ends.container.stdin = Some(reader);
    }
    Ok(ends)
}

/// Removes what [`make`] left in the file system.
pub fn remove(stdio: &v1::Stdio) {
    for path in [&stdio.stdin, &stdio.stdout, &stdio.stderr, &stdio.console_socket] {
        if !path.is_empty() {
            let _ = rustix::fs::unlink(path.as_str());
        }
    }
}

fn make_fifo(path: &str, stdio: &v1::Stdio) -> Result<()> {
    let failed = |e| Failure::errno(format_args!("make FIFO {path}"), e);
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::mkfifoat(CWD, path, mode) {
        Ok(()) => {}
        // Left by a monitor that died.
        Err(Errno::EXIST) => {
            rustix::fs::unlink(path).map_err(failed)?;
            rustix::fs::mkfifoat(CWD, path, mode).map_err(failed)?;
        }
        Err(e) => return Err(failed(e)),
    }
    if (stdio.uid, stdio.gid) != (0, 0) {
        let (uid, gid) = (Uid::from_raw(stdio.uid), Gid::from_raw(stdio.gid));
        rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    }
    Ok(())
}

/// Without O_NOFOLLOW, which the kernel keeps with the description: a checkpoint would hold it, and criu, which reopens
/// by a link in /proc, could not restore it. The FIFO was just made, in a folder that is root's alone.
fn open(path: &str, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Failure::errno(format_args!("open {path}"), e))
}

/// A socket on which a runtime sends the master of a container's pty.
pub struct Console {
    listener: OwnedFd,
}

impl Console {
    /// Binds it at `path`, of any length.
    pub fn listen(path: &str) -> Result<Self> {
        let failed = |e| Failure::errno(format_args!("console socket {path}"), e);
        let file = Path::new(path);
        let (Some(folder), Some(name)) = (file.parent(), file.file_name()) else {
            return Err(Failure::invalid(format!("console socket {path}: no file")));
        };
        let _ = rustix::fs::unlink(path);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        // A socket's address holds 107 bytes: name the folder by its descriptor.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(folder, flags, Mode::empty()).map_err(failed)?;
        let short = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
        let address = SocketAddrUnix::new(&short).map_err(failed)?;
        rustix::net::bind(&listener, &address).map_err(failed)?;
        rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        rustix::net::listen(&listener, 1).map_err(failed)?;
        Ok(Self { listener })
    }

    /// The master, non-blocking. Call it when the runtime has ended well: it has sent it by then.
    pub fn take(self) -> Result<OwnedFd> {
        let failed = |e| Failure::errno("the runtime sent no terminal", e);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let peer = rustix::net::accept_with(&self.listener, flags).map_err(failed)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        // With the master comes its name, which is of no use.
        let mut name = [0u8; 4096];
        let mut parts = [std::io::IoSliceMut::new(&mut name)];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        rustix::net::recvmsg(&peer, &mut parts, &mut control, flags).map_err(failed)?;
        let mut master = None;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut fds) = part {
                master = fds.next();
            }
        }
        let master = master.ok_or_else(|| failed(Errno::NOMSG))?;
        set_nonblocking(&master).map_err(failed)?;
        Ok(master)
    }
}

/// Makes reads and writes of `fd` return at once.
pub fn set_nonblocking(fd: &OwnedFd) -> rustix::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)
}
