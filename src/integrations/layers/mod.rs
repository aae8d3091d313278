//! Image layers: reading tar archives, decompressing them with their digests checked, unpacking them safely.
//!
//! Called by the layer stores (unpack) and the image store (pipeline). Layers are hostile input: everything here is
//! capped. A crash leaves half-unpacked folders, which belong to the layer store that made them.

pub mod pipeline;
pub mod tar;
pub mod unpack;
mod write;
