//! One descriptor of the daemon's and one stream: what a process in the guest reads, or says.
//!
//! Owned by the relay. Bytes of the guest are acknowledged when the descriptor has taken them, and no more is read than the guest has
//! room for, so that who is slow stops its own stream. A crash closes the descriptor.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use lxcri_guest_proto::StreamId;
use lxcri_guest_proto::mux::Mux;
use lxcri_guest_proto::v1::ResetCode;
use rustix::event::PollFlags;
use rustix::io::Errno;

/// Most bytes of one read, and so many reads before others have their turn.
const BUFFER: usize = 16 * 1024;
const READS: usize = 8;

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// There may be more; so many bytes were moved.
    Going(usize),
    /// Nothing more goes this way.
    Over,
}

/// A descriptor and what waits for it.
pub struct Pump {
    fd: OwnedFd,
    /// The guest reads what comes from the descriptor; else it is written to.
    pub input: bool,
    waiting: VecDeque<u8>,
    ended: bool,
}

impl Pump {
    /// Of a descriptor that came with a request.
    pub fn new(fd: OwnedFd, input: bool) -> rustix::io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self { fd, input, waiting: VecDeque::new(), ended: false })
    }

    /// Bytes that whoever reads the descriptor may lag behind, for one that is written to.
    pub fn buffer(&self) -> u32 {
        let size = rustix::pipe::fcntl_getpipe_size(&self.fd)
            .or_else(|_| rustix::net::sockopt::socket_send_buffer_size(&self.fd))
            .unwrap_or_default();
        u32::try_from(size.min(1 << 20)).unwrap_or_default()
    }

    /// Takes bytes of the guest.
    pub fn take(&mut self, bytes: &[u8]) {
        self.waiting.extend(bytes);
    }

    /// The guest sends no more.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// What is to be waited for, with so much `room` for what the guest reads. That nobody reads any more is told all the same.
    pub fn interest(&self, room: usize) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let flags = match (self.input, self.waiting.is_empty()) {
            (true, _) if room == 0 => return None,
            (true, _) => PollFlags::IN,
            (false, false) => PollFlags::OUT,
            (false, true) => PollFlags::empty(),
        };
        Some((self.fd.as_fd(), flags))
    }

    /// Moves what can be moved now. One that is over has told its stream so.
    pub fn step(&mut self, id: StreamId, mux: &mut Mux) -> Step {
        if self.input { self.read(id, mux) } else { self.write(id, mux) }
    }

    fn read(&mut self, id: StreamId, mux: &mut Mux) -> Step {
        let (mut buffer, mut moved) = ([0; BUFFER], 0);
        for _ in 0..READS {
            let room = mux.room(id).min(BUFFER);
            if room == 0 {
                break;
            }
            match rustix::io::read(&self.fd, &mut buffer[..room]) {
                Ok(n @ 1..) => moved += mux.write(id, &buffer[..n]),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                // EIO: a terminal that nobody has open. Whatever it is, nothing more comes.
                Ok(_) | Err(_) => {
                    mux.end(id);
                    return Step::Over;
                }
            }
        }
        Step::Going(moved)
    }

    fn write(&mut self, id: StreamId, mux: &mut Mux) -> Step {
        let mut moved = 0;
        while !self.waiting.is_empty() {
            match rustix::io::write(&self.fd, self.waiting.as_slices().0) {
                Ok(n) => {
                    self.waiting.drain(..n);
                    mux.consumed(id, u32::try_from(n).unwrap_or_default());
                    moved += n;
                }
                Err(Errno::AGAIN) => return Step::Going(moved),
                Err(Errno::INTR) => {}
                Err(_) => {
                    mux.reset(id, ResetCode::ResetBroken as u32);
                    return Step::Over;
                }
            }
        }
        self.waiting = VecDeque::new();
        if self.ended { Step::Over } else { Step::Going(moved) }
    }
}
