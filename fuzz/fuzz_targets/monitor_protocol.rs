//! Packets between daemon and monitor, as either side receives them, and the same bytes through a memfd.
#![no_main]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use lxcri_monitor_proto::v1;
use lxcri_monitor_proto::wire::{MAX_PACKET, WireError, recv, send};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};

fn sockets() -> &'static (OwnedFd, OwnedFd) {
    static SOCKETS: OnceLock<(OwnedFd, OwnedFd)> = OnceLock::new();
    SOCKETS.get_or_init(|| {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a pair of sockets")
    })
}

fn both<M: prost::Message + Default + PartialEq>(input: &[u8]) {
    let (a, b) = sockets();
    rustix::net::send(a, input, SendFlags::NOSIGNAL).expect("a packet");
    if let Ok((message, fds)) = recv::<M>(b) {
        assert!(fds.is_empty());
        // What was understood is said and understood again, unless it is empty or has grown too long.
        if send(a, &message, &[a.as_fd()]).is_ok() {
            let (again, fds) = recv::<M>(b).expect("our own message");
            assert!(again == message && fds.len() == 1);
        }
    }
    assert!(matches!(recv::<M>(b), Err(WireError::NotReady)));
}

fuzz_target!(|input: &[u8]| {
    if input.is_empty() || input.len() > MAX_PACKET {
        return;
    }
    both::<v1::Request>(input);
    both::<v1::Reply>(input);
});
