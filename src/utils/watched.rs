//! Descriptors that tokio waits for.
//!
//! Called by whoever waits for a socket, a pipe or inotify. Fails when the runtime's epoll takes no more. A crash leaves nothing behind.
#![allow(unsafe_code)] // tokio wants a promise that an OwnedFd keeps by its type

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a non-blocking descriptor with the current runtime.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and names the same file until it is dropped, which AsyncFd does after it has
    // deregistered it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
