//! What a process on its way into a container tells the helper that waits for it: that it is ready, why it can't be,
//! and its terminal. One packet of a socket pair each.
//!
//! Used by the first process and by execs on one side, by the helper on the other. The sender's pid comes from the
//! kernel, in the receiver's PID namespace.
#![allow(unsafe_code)] // control messages with credentials

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// All is done but exec(2).
pub const READY: u8 = b'R';
/// The rest says what went wrong.
pub const FAILED: u8 = b'F';
/// As FAILED; the program of the container can't be run.
pub const NO_PROGRAM: u8 = b'P';
/// With it comes the master of the process' terminal.
pub const TERMINAL: u8 = b'T';

/// A packet that came.
#[derive(Debug)]
pub struct Packet {
    /// What it is.
    pub kind: u8,
    /// In words.
    pub text: String,
    /// Who sent it; 0: unknown.
    pub pid: i32,
    /// What came with it.
    pub fd: Option<OwnedFd>,
}

/// A connected pair of packet sockets; the first end learns who sends.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0i32; 2];
    // SAFETY: the array has room for the two descriptors, which nobody else owns.
    let (ours, theirs) = unsafe {
        if libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    };
    rustix::net::sockopt::set_socket_passcred(&ours, true)?;
    Ok((ours, theirs))
}

/// Sends a packet.
pub fn send(to: BorrowedFd<'_>, kind: u8, text: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut bytes = vec![kind];
    bytes.extend_from_slice(text.as_bytes());
    bytes.truncate(2000);
    let Some(fd) = fd else {
        rustix::io::write(to, &bytes)?;
        return Ok(());
    };
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds));
    let parts = [io::IoSlice::new(&bytes)];
    rustix::net::sendmsg(to, &parts, &mut control, rustix::net::SendFlags::empty())?;
    Ok(())
}

/// The next packet; None: nobody can send any more.
pub fn receive(from: BorrowedFd<'_>) -> io::Result<Option<Packet>> {
    let mut bytes = [0u8; 2048];
    let mut control = [0u64; 16];
    let mut packet = Packet { kind: 0, text: String::new(), pid: 0, fd: None };
    // SAFETY: all pointers are to this frame and the lengths are theirs; what the kernel wrote is walked by its own
    // macros, and a descriptor that came is owned by nobody else.
    let count = unsafe {
        let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let mut message: libc::msghdr = zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of::<[u64; 16]>() as _;
        let count = loop {
            let count = libc::recvmsg(from.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC);
            if count >= 0 {
                break count;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        };
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            match ((*header).cmsg_level, (*header).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                    packet.pid = std::ptr::read_unaligned(libc::CMSG_DATA(header).cast::<libc::ucred>()).pid;
                }
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    let fd = std::ptr::read_unaligned(libc::CMSG_DATA(header).cast::<i32>());
                    packet.fd = Some(OwnedFd::from_raw_fd(fd));
                }
                _ => {}
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
        count
    };
    let Some((kind, text)) = bytes[..count.unsigned_abs()].split_first() else { return Ok(None) };
    packet.kind = *kind;
    packet.text = String::from_utf8_lossy(text).into_owned();
    Ok(Some(packet))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn packets_come_with_their_sender() {
        let (ours, theirs) = pair().unwrap();
        send(theirs.as_fd(), FAILED, "because", None).unwrap();
        send(theirs.as_fd(), TERMINAL, "", Some(std::io::stdin().as_fd())).unwrap();
        drop(theirs);
        let packet = receive(ours.as_fd()).unwrap().unwrap();
        assert_eq!((packet.kind, packet.text.as_str(), packet.fd.is_some()), (FAILED, "because", false));
        assert_eq!(packet.pid, std::process::id() as i32);
        assert!(receive(ours.as_fd()).unwrap().unwrap().fd.is_some());
        assert!(receive(ours.as_fd()).unwrap().is_none());
    }
}
