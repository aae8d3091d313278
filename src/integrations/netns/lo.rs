//! The loopback interface, brought up without a plugin: one netlink message.
//!
//! Called by `netns` on a thread that is inside the namespace. Fails with the errno of the kernel; repeatable.

use std::io;

/// Brings `lo` (always interface 1) of the calling thread's network namespace up, over rtnetlink(7).
pub(super) fn set_lo_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
    const HEADER: usize = 16;
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None, // NETLINK_ROUTE is 0
    )?;
    let mut message = Vec::with_capacity(32);
    message.extend_from_slice(&32u32.to_ne_bytes());
    message.extend_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());
    message.extend_from_slice(&((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence, port
    message.extend_from_slice(&[0; 4]); // ifinfomsg: AF_UNSPEC, padding, type
    message.extend_from_slice(&1i32.to_ne_bytes()); // index
    message.extend_from_slice(&(libc::IFF_UP as u32).to_ne_bytes()); // flags
    message.extend_from_slice(&(libc::IFF_UP as u32).to_ne_bytes()); // which of them change
    rustix::net::send(&socket, &message, SendFlags::empty())?;
    let mut answer = [0u8; 256];
    let (n, _) = rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty())?;
    let field = |at: usize| answer[..n].get(at..at + 4).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
    match field(HEADER) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(error.wrapping_neg())),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "short netlink answer")),
    }
}
