//! The connection between a node and the agent in a pod's virtual machine: one byte stream, of TCP or vsock, that carries many.
//!
//! [`secure`] authenticates both sides to each other and encrypts, [`frame`] has the bytes of frames, [`mux`] streams with a
//! window each. [`Connection`] puts them together, and [`Talk`] has messages on it besides. Nothing here does I/O or waits: bytes
//! that came go in, bytes that are to be sent come out, so that it fits an event loop on one side and a runtime on the other.
//!
//! What both say through it is `proto/guest.proto` ([`v1`], [`calls`]): the monitor's contract, passed on, and what a guest has besides.
//!
//! Used by both sides, so it holds no policy and depends on neither. Fails on what no honest peer sends; the connection is of no
//! use then. What a crash loses is what the peer has given no window back for.

/// The messages, generated from `proto/guest.proto`, which documents them.
#[allow(missing_docs, clippy::doc_lazy_continuation, clippy::large_enum_variant)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/lxcri.guest.v1.rs"));
}

pub mod calls;
mod connection;
pub mod frame;
pub mod mux;
pub mod secure;
mod talk;

pub use connection::{Connection, ConnectionError};
pub use mux::{Event, StreamId};
pub use secure::Secret;
pub use talk::Talk;

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
