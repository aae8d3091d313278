//! A daemon's connection: requests in, replies and events out.
//!
//! Owned by the server. A connection that fails, or whose peer does not read, is dropped; the containers do not care.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use lxcri_monitor_proto::v1::{Reply, Request};
use lxcri_monitor_proto::wire::{self, WireError};

/// Replies that may wait for a peer which does not read; with more it is dropped.
const QUEUE_MAX: usize = 1024;

/// Who asked: a connection's token and the request's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asker {
    /// The connection.
    pub connection: u64,
    /// The request.
    pub request: u64,
}

/// A connection.
pub struct Connection {
    socket: OwnedFd,
    queue: VecDeque<(Reply, Vec<OwnedFd>)>,
    /// It has said Hello: it gets events.
    pub greeted: bool,
}

impl Connection {
    /// Of an accepted, non-blocking socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, queue: VecDeque::new(), greeted: false }
    }

    /// The socket.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next request; None when there is none now.
    pub fn receive(&self) -> Result<Option<(Request, Vec<OwnedFd>)>, WireError> {
        match wire::recv(&self.socket) {
            Ok(request) => Ok(Some(request)),
            Err(WireError::NotReady) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Sends, or queues when the peer is slow.
    pub fn send(&mut self, reply: Reply, fds: Vec<OwnedFd>) -> Result<(), WireError> {
        if self.queue.len() >= QUEUE_MAX {
            return Err(WireError::NotReady);
        }
        self.queue.push_back((reply, fds));
        self.flush()
    }

    /// Sends what is queued, as far as the peer takes it.
    pub fn flush(&mut self) -> Result<(), WireError> {
        while let Some((reply, fds)) = self.queue.front() {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            match wire::send(&self.socket, reply, &fds) {
                Ok(()) => {
                    self.queue.pop_front();
                }
                Err(WireError::NotReady) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        // Gives the memory of a burst back.
        if self.queue.capacity() > 0 {
            self.queue = VecDeque::new();
        }
        Ok(())
    }

    /// Whether replies wait.
    pub fn waits(&self) -> bool {
        !self.queue.is_empty()
    }
}
