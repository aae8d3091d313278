//! Copies bytes between a terminal and whoever holds its other end.
//!
//! Owned by the server. One direction each; at any time either the source is watched or, while bytes wait, the target.
//! A relay that fails is over. A crash hangs the terminal up.

use std::os::fd::OwnedFd;

use rustix::buffer::spare_capacity;
use rustix::io::Errno;

use crate::poll::{EventFlags, Poll};

/// Bytes that may wait for the target.
const BUFFER: usize = 4096;

/// Whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// A container's stdin.
    Container(String),
    /// An exec's input: over when the exec is.
    ExecInput(String),
    /// An exec's output: goes on until its end.
    ExecOutput(String),
    /// The input of an attached client: container, client.
    Attach(String, u64),
}

/// One direction.
pub struct Relay {
    /// Whose it is.
    pub owner: Owner,
    token: u64,
    from: OwnedFd,
    to: OwnedFd,
    waiting: Vec<u8>,
    watching: Option<bool>,
    /// Whoever fills the source is gone: what the target does not take at once is not waited for.
    last: bool,
}

impl Relay {
    /// Copies from `from` to `to`, both non-blocking.
    pub fn new(owner: Owner, token: u64, from: OwnedFd, to: OwnedFd) -> Self {
        Self { owner, token, from, to, waiting: Vec::new(), watching: None, last: false }
    }

    /// Copies what can be copied now. False: it is over.
    pub fn step(&mut self, poll: &Poll) -> bool {
        // A bound, so that a source without end leaves the others their turn.
        for _ in 0..8 {
            if self.waiting.is_empty() {
                self.waiting.reserve_exact(BUFFER);
                match rustix::io::read(&self.from, spare_capacity(&mut self.waiting)) {
                    Ok(n) if n > 0 => {}
                    Err(Errno::AGAIN) => return self.watch(poll, false),
                    Err(Errno::INTR) => continue,
                    // EIO: nobody has the terminal open any more.
                    Ok(_) | Err(_) => return false,
                }
            }
            match rustix::io::write(&self.to, &self.waiting) {
                Ok(n) => drop(self.waiting.drain(..n)),
                Err(Errno::AGAIN) => return self.watch(poll, true),
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        self.watch(poll, !self.waiting.is_empty())
    }

    /// Nobody waits for it any more: it goes on only as long as the target takes what comes.
    pub fn set_last(&mut self) {
        self.last = true;
    }

    fn watch(&mut self, poll: &Poll, target: bool) -> bool {
        if target && self.last {
            return false;
        }
        if self.watching == Some(target) {
            return true;
        }
        self.unwatch(poll);
        self.watching = Some(target);
        if target {
            poll.watch(&self.to, self.token, EventFlags::OUT).is_ok()
        } else {
            self.waiting = Vec::new();
            poll.watch(&self.from, self.token, EventFlags::IN).is_ok()
        }
    }

    /// Ends watching, before it is dropped.
    pub fn unwatch(&mut self, poll: &Poll) {
        match self.watching.take() {
            Some(true) => poll.unwatch(&self.to),
            Some(false) => poll.unwatch(&self.from),
            None => {}
        }
    }
}
