//! BFC, the Binary File Container, format version 1: a single file with an index, compressed and encrypted per entry.
//!
//! `reader` opens, `writer` writes, `create`, `extract` and `verify` do what the command line's verbs do, `rootfs` makes a
//! layer of a plain root file system, `format` has the bytes and `crypt` the keys. Called by the command line and, for
//! images in containers, by `integrations::images`. docs/bfc.md describes the format. Containers are hostile input.

pub mod create;
pub mod crypt;
pub mod error;
pub mod extract;
pub mod format;
pub mod reader;
pub mod rootfs;
pub mod verify;
pub mod writer;

#[cfg(test)]
mod tests;

pub use create::{Created, create};
pub use crypt::KeySource;
pub use error::{ReadError, WriteError};
pub use extract::{ExtractError, ExtractOptions, extract};
pub use format::{Entry, Kind};
pub use reader::{Container, Content};
pub use verify::{Verified, verify};
pub use writer::{Compress, WriteOptions, Writer};
