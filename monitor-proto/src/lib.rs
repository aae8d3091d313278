//! The contract between the daemon and a pod's monitor: the messages of `proto/monitor.proto` and
//! their framing ([`wire`]: one SEQPACKET packet is one message, with descriptors beside it).
//!
//! Used by both sides, so it holds no policy and depends on neither. Fails only at the socket or on
//! bytes that are no message; a crash here leaves nothing behind.

/// The messages, generated from `proto/monitor.proto`, which documents them.
#[allow(missing_docs, clippy::doc_lazy_continuation, clippy::large_enum_variant)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/lxcri.monitor.v1.rs"));
}

pub mod null;
pub mod sealed;
pub mod wire;

/// Newest protocol version that this build speaks.
pub const VERSION: u32 = 1;
