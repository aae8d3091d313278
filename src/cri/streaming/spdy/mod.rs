//! SPDY/3.1, the server's side: what kubelets and crictl speak to the streaming server.
//!
//! [`frame`] and [`headers`] are the codec, [`session`] runs a connection, [`stream`] is what its user has of it.
//!
//! Flow control: we tell the peer what we have taken (WINDOW_UPDATE). The clients of Kubernetes never send such a frame
//! and would stop us for good after 64 KiB; so a peer's window binds us from its first WINDOW_UPDATE or SETTINGS on.

mod dictionary;
pub mod frame;
pub mod headers;
pub mod session;
pub mod stream;
#[cfg(test)]
mod tests;
mod window;
