//! One stream of the node and one descriptor, or two, of the guest: what a process reads or says, or a connection to a port.
//!
//! Owned by the session. Bytes of the node are acknowledged when the descriptor has taken them, and no more is read than the node
//! has room for, so that who is slow stops its own stream. A crash ends the process's streams.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use lxcri_guest_proto::StreamId;
use lxcri_guest_proto::mux::Mux;
use lxcri_guest_proto::v1::ResetCode;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;

/// Most bytes of one read.
const BUFFER: usize = 16 * 1024;
/// Reads of one descriptor before the others have their turn.
const READS: usize = 8;

/// What became of a step.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// There may be more.
    Going,
    /// Nothing more goes either way.
    Over,
    /// It can't go on.
    Broken(ResetCode),
}

/// A stream and its descriptors.
#[derive(Debug)]
pub struct Pump {
    /// The guest's bytes for the node.
    from: Option<OwnedFd>,
    /// Where the node's go.
    to: Option<OwnedFd>,
    /// Both are one socket.
    socket: bool,
    /// It is being connected; addresses to try after this one.
    connecting: Option<VecDeque<SocketAddr>>,
    waiting: VecDeque<u8>,
    node_ended: bool,
}

impl Pump {
    fn new(from: Option<OwnedFd>, to: Option<OwnedFd>) -> Self {
        Self { from, to, socket: false, connecting: None, waiting: VecDeque::new(), node_ended: false }
    }

    /// A pipe for a process in the guest; its end of it. `buffer`: 0, or the pipe's size.
    pub fn pipe(input: bool, buffer: u32) -> rustix::io::Result<(Self, OwnedFd)> {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        if buffer > 0 {
            rustix::pipe::fcntl_setpipe_size(&writer, buffer as usize)?;
        }
        let (own, other) = if input { (writer, reader) } else { (reader, writer) };
        let flags = rustix::fs::fcntl_getfl(&own)?;
        rustix::fs::fcntl_setfl(&own, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok((if input { Self::new(None, Some(own)) } else { Self::new(Some(own), None) }, other))
    }

    /// A connection to a port at the loopback address, begun by the first step.
    pub fn connect(port: u16) -> Self {
        let mut pump = Self::new(None, None);
        pump.socket = true;
        pump.connecting = Some([(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()].into());
        pump
    }

    fn begin(&mut self, address: SocketAddr) -> rustix::io::Result<()> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(e) => return Err(e),
        }
        self.from = Some(rustix::io::fcntl_dupfd_cloexec(&socket, 0)?);
        self.to = Some(socket);
        Ok(())
    }

    /// Takes bytes of the node. False: nobody here reads.
    pub fn input(&mut self, bytes: &[u8]) -> bool {
        self.waiting.extend(bytes);
        self.to.is_some() || self.connecting.is_some()
    }

    /// The node sends no more.
    pub fn end(&mut self) {
        self.node_ended = true;
    }

    /// What is to be waited for.
    pub fn interest<'a>(&'a self, id: StreamId, mux: &Mux, wanted: &mut Vec<(BorrowedFd<'a>, PollFlags)>) {
        if let Some(to) = &self.to
            && (self.connecting.is_some() || !self.waiting.is_empty())
        {
            wanted.push((to.as_fd(), PollFlags::OUT));
        }
        if let Some(from) = &self.from
            && self.connecting.is_none()
            && mux.room(id) > 0
        {
            wanted.push((from.as_fd(), PollFlags::IN));
        }
    }

    /// Moves what can be moved now.
    pub fn step(&mut self, id: StreamId, mux: &mut Mux) -> Step {
        match self.connected() {
            Ok(true) => {}
            Ok(false) => return Step::Going,
            Err(Errno::CONNREFUSED) => return Step::Broken(ResetCode::ResetRefused),
            Err(_) => return Step::Broken(ResetCode::ResetSystem),
        }
        if let Err(code) = self.write(id, mux).and_then(|()| self.read(id, mux)) {
            return Step::Broken(code);
        }
        if self.from.is_none() && self.to.is_none() { Step::Over } else { Step::Going }
    }

    fn connected(&mut self) -> rustix::io::Result<bool> {
        let mut failure = Errno::CONNREFUSED;
        while let Some(others) = &mut self.connecting {
            if let Some(socket) = &self.to {
                match rustix::net::sockopt::socket_error(socket)? {
                    Ok(()) if rustix::net::getpeername(socket).is_ok() => {
                        self.connecting = None;
                        break;
                    }
                    Ok(()) => return Ok(false),
                    Err(e) => failure = e,
                }
                (self.from, self.to) = (None, None);
            }
            let next = others.pop_front().ok_or(failure)?;
            // Refused at once, or no such family here: the next.
            if let Err(e @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM)) = self.begin(next) {
                return Err(e);
            }
        }
        Ok(true)
    }

    fn write(&mut self, id: StreamId, mux: &mut Mux) -> Result<(), ResetCode> {
        let Some(to) = &self.to else { return Ok(()) };
        while !self.waiting.is_empty() {
            match rustix::io::write(to, self.waiting.as_slices().0) {
                Ok(n) => {
                    self.waiting.drain(..n);
                    mux.consumed(id, n as u32);
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(_) => return Err(ResetCode::ResetBroken),
            }
        }
        self.waiting = VecDeque::new();
        if self.node_ended {
            if self.socket {
                let _ = rustix::net::shutdown(to, Shutdown::Write);
            } else {
                mux.end(id);
            }
            self.to = None;
        }
        Ok(())
    }

    fn read(&mut self, id: StreamId, mux: &mut Mux) -> Result<(), ResetCode> {
        let mut buffer = [0; BUFFER];
        for _ in 0..READS {
            let Some(from) = &self.from else { break };
            let room = mux.room(id).min(BUFFER);
            if room == 0 {
                break;
            }
            match rustix::io::read(from, &mut buffer[..room]) {
                Ok(0) => {
                    mux.end(id);
                    self.from = None;
                }
                Ok(n) => {
                    mux.write(id, &buffer[..n]);
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(_) => return Err(ResetCode::ResetBroken),
            }
        }
        Ok(())
    }
}
