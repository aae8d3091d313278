//! The connection between a node and the agent in a pod's virtual machine: one byte stream, of TCP or vsock, that carries many.
//!
//! [`secure`] authenticates both sides to each other and encrypts, [`frame`] has the bytes of frames, [`mux`] streams with a
//! window each. [`Connection`] puts them together. Nothing here does I/O or waits: bytes that came go in, bytes that are to be
//! sent come out, so that it fits an event loop on one side and a runtime on the other.
//!
//! Used by both sides, so it holds no policy and depends on neither. Fails on what no honest peer sends; the connection is of no
//! use then. What a crash loses is what the peer has given no window back for.

mod connection;
pub mod frame;
pub mod mux;
pub mod secure;

pub use connection::{Connection, ConnectionError};
pub use mux::{Event, StreamId};
pub use secure::Secret;

/// Version of all that; both sides have to have the same. It is a part of the handshake, which fails otherwise.
pub const VERSION: u32 = 1;

/// Which side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The node, which connects. Its streams have odd numbers.
    Node,
    /// The guest, which is connected to. Its streams have even ones.
    Guest,
}
