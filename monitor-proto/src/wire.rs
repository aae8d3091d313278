//! Framing: one SOCK_SEQPACKET packet is one message, with the descriptors that belong to it.
//!
//! Called by both sides, from an event loop or a readiness-driven task: nothing here waits. A message longer than
//! [`MAX_PACKET`] (a pod's record with large annotations) travels in a memfd, named by a packet that can't be a
//! message. Fails on oversize, cut and undecodable packets; a crash leaves nothing behind, since descriptors in
//! flight are closed by the kernel with the socket.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use prost::Message;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

/// Longest packet in bytes.
pub const MAX_PACKET: usize = 64 * 1024;
/// Longest message in bytes; what is longer than a packet goes through a memfd.
pub const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// Most descriptors that a message can carry.
pub const MAX_FDS: usize = 64;
/// Opens a packet that says "the message is in the last descriptor": no protobuf message starts with a field
/// number of 0. The message's length follows, 8 bytes little endian.
const IN_MEMFD: u8 = 0;
/// One descriptor more than a message can have: the memfd.
const FDS_ON_WIRE: usize = MAX_FDS + 1;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The socket has no packet, or no room for one, right now.
    #[error("the socket is not ready")]
    NotReady,
    /// The other side closed the connection.
    #[error("the connection is closed")]
    Closed,
    /// More bytes than a message may have.
    #[error("a message of {0} bytes is longer than {MAX_MESSAGE}")]
    TooLong(usize),
    /// More descriptors than a message may have.
    #[error("{0} descriptors are more than {MAX_FDS}")]
    TooManyFds(usize),
    /// The kernel cut the packet or its descriptors.
    #[error("a packet was cut")]
    Cut,
    /// The packet is not a message, or an empty one.
    #[error("a packet is no message")]
    Garbage,
    /// Any other failure of the socket.
    #[error("socket")]
    Socket(#[source] Errno),
}

impl From<Errno> for WireError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::AGAIN => Self::NotReady,
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => Self::Closed,
            other => Self::Socket(other),
        }
    }
}

/// Sends one message with `fds`, which stay the caller's. [`WireError::NotReady`]: nothing was sent.
pub fn send(socket: impl AsFd, message: &impl Message, fds: &[BorrowedFd<'_>]) -> Result<(), WireError> {
    if fds.len() > MAX_FDS {
        return Err(WireError::TooManyFds(fds.len()));
    }
    let bytes = message.encode_to_vec();
    if bytes.is_empty() {
        // A packet of length 0 looks like the end of the connection.
        return Err(WireError::Garbage);
    }
    if bytes.len() > MAX_MESSAGE {
        return Err(WireError::TooLong(bytes.len()));
    }
    if bytes.len() <= MAX_PACKET {
        return send_packet(socket.as_fd(), &bytes, fds);
    }
    let memfd = to_memfd(&bytes)?;
    let mut head = [IN_MEMFD; 9];
    head[1..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    let mut all = fds.to_vec();
    all.push(memfd.as_fd());
    send_packet(socket.as_fd(), &head, &all)
}

/// A memfd that holds `bytes`.
pub fn to_memfd(bytes: &[u8]) -> Result<OwnedFd, WireError> {
    let memfd = rustix::fs::memfd_create(c"message", MemfdFlags::CLOEXEC)?;
    let mut done = 0;
    while done < bytes.len() {
        done += rustix::io::pwrite(&memfd, &bytes[done..], done as u64)?;
    }
    Ok(memfd)
}

/// All bytes of a memfd that came with a message, at most [`MAX_MESSAGE`].
pub fn from_memfd(memfd: impl AsFd) -> Result<Vec<u8>, WireError> {
    let length = rustix::fs::fstat(&memfd)?.st_size;
    read_memfd(memfd.as_fd(), usize::try_from(length).map_err(|_| WireError::Garbage)?)
}

fn send_packet(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), WireError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_ON_WIRE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(WireError::TooManyFds(fds.len()));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?;
    if sent == bytes.len() { Ok(()) } else { Err(WireError::Cut) }
}

/// Receives one message and its descriptors (close-on-exec). The buffer is as long as the packet and is given back
/// at once, so that a connection at rest holds no memory.
pub fn recv<M: Message + Default>(socket: impl AsFd) -> Result<(M, Vec<OwnedFd>), WireError> {
    let socket = socket.as_fd();
    let peek = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
    let mut probe = [0u8; 1];
    let (_, length) = rustix::net::recv(socket, &mut probe, peek)?;
    if length == 0 {
        return Err(WireError::Closed);
    }
    // A packet that is too long is taken off the socket all the same (cut, and said so below).
    let mut bytes = vec![0u8; length.min(MAX_PACKET)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_ON_WIRE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(WireError::Cut);
    }
    bytes.truncate(got.bytes);
    match bytes.first() {
        None => return Err(WireError::Closed),
        Some(&IN_MEMFD) => bytes = take_memfd(&bytes, &mut fds)?,
        Some(_) => {}
    }
    if fds.len() > MAX_FDS {
        return Err(WireError::TooManyFds(fds.len()));
    }
    let message = M::decode(bytes.as_slice()).map_err(|_| WireError::Garbage)?;
    Ok((message, fds))
}

/// The bytes of a message that came in the last descriptor.
fn take_memfd(head: &[u8], fds: &mut Vec<OwnedFd>) -> Result<Vec<u8>, WireError> {
    let length: [u8; 8] = head.get(1..).and_then(|b| b.try_into().ok()).ok_or(WireError::Garbage)?;
    let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
    let memfd = fds.pop().ok_or(WireError::Garbage)?;
    read_memfd(memfd.as_fd(), length)
}

fn read_memfd(memfd: BorrowedFd<'_>, length: usize) -> Result<Vec<u8>, WireError> {
    if length > MAX_MESSAGE {
        return Err(WireError::TooLong(length));
    }
    // Only a regular file answers at once; a pipe in its place could hold the reader up.
    if !rustix::fs::fstat(memfd).is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_file()) {
        return Err(WireError::Garbage);
    }
    let mut bytes = vec![0u8; length];
    let mut done = 0;
    while done < length {
        match rustix::io::pread(memfd, &mut bytes[done..], done as u64)? {
            0 => return Err(WireError::Cut),
            n => done += n,
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("socketpair")
    }

    fn request(id: u64, info: usize) -> v1::Request {
        v1::Request {
            id,
            op: Some(v1::request::Op::SetPodInfo(v1::SetPodInfo { pod_info: (0..info).map(|i| i as u8).collect() })),
        }
    }

    #[test]
    fn messages_of_every_length_come_back_with_their_descriptors() {
        let (a, b) = pair();
        for length in [0, 1, 1000, MAX_PACKET - 20, MAX_PACKET, 3 * MAX_PACKET, 1 << 20] {
            for count in [0, 1, MAX_FDS] {
                let null = std::fs::File::open("/dev/null").expect("null");
                let fds = vec![null.as_fd(); count];
                send(&a, &request(7, length), &fds).expect("send");
                let (got, got_fds): (v1::Request, _) = recv(&b).expect("recv");
                assert_eq!(got, request(7, length));
                assert_eq!(got_fds.len(), count);
                for fd in &got_fds {
                    assert!(rustix::io::fcntl_getfd(fd).expect("getfd").contains(rustix::io::FdFlags::CLOEXEC));
                }
            }
        }
        assert!(matches!(recv::<v1::Request>(&b), Err(WireError::NotReady)));
        drop(a);
        assert!(matches!(recv::<v1::Request>(&b), Err(WireError::Closed)));
    }

    #[test]
    fn what_is_no_message_is_an_error_and_the_next_message_is_read() {
        let (a, b) = pair();
        let raw = |bytes: &[u8]| rustix::net::send(&a, bytes, SendFlags::NOSIGNAL).expect("send");
        for bad in [&b"\xff\xff\xff"[..], b"\x00", b"\x00\xff\xff\xff\xff\xff\xff\xff\xff", b"\x00\x01\0\0\0\0\0\0\0"] {
            raw(bad);
            assert!(recv::<v1::Request>(&b).is_err(), "{bad:?}");
        }
        raw(&vec![1u8; MAX_PACKET + 1]);
        assert!(matches!(recv::<v1::Request>(&b), Err(WireError::Cut)));
        send(&a, &request(1, 5), &[]).expect("send");
        assert_eq!(recv::<v1::Request>(&b).expect("recv").0, request(1, 5));
    }

    #[test]
    fn memfds_are_read_whole_and_nothing_else_is() {
        for length in [0, 1, 100_000] {
            let bytes = vec![7; length];
            assert_eq!(from_memfd(to_memfd(&bytes).expect("a memfd")).expect("its bytes"), bytes);
        }
        let (a, _b) = pair();
        assert!(matches!(from_memfd(&a), Err(WireError::Garbage)));
        let sparse = to_memfd(b"x").expect("a memfd");
        rustix::fs::ftruncate(&sparse, MAX_MESSAGE as u64 + 1).expect("longer");
        assert!(matches!(from_memfd(&sparse), Err(WireError::TooLong(_))));
    }

    #[test]
    fn too_much_is_refused_before_it_is_sent() {
        let (a, b) = pair();
        let null = std::fs::File::open("/dev/null").expect("null");
        let fds = vec![null.as_fd(); MAX_FDS + 1];
        assert!(matches!(send(&a, &request(1, 1), &fds), Err(WireError::TooManyFds(n)) if n == MAX_FDS + 1));
        assert!(matches!(send(&a, &request(1, MAX_MESSAGE), &[]), Err(WireError::TooLong(_))));
        assert!(matches!(send(&a, &v1::Request::default(), &[]), Err(WireError::Garbage)));
        // More descriptors than we would ever send: cut by the kernel, and none leaks into this process.
        const MANY: usize = 3 * FDS_ON_WIRE;
        let many = vec![null.as_fd(); MANY];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MANY))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
        rustix::net::sendmsg(&a, &[IoSlice::new(b"\x08\x01")], &mut control, SendFlags::NOSIGNAL).expect("send");
        assert!(matches!(recv::<v1::Request>(&b), Err(WireError::Cut)));
    }
}
