//! Image layers: reading tar archives, decompressing them with their digests checked, unpacking them safely, in
//! processes that can touch nothing else.
//!
//! Called by the layer stores (unpack) and the image store (pipeline). Layers are hostile input: everything here is
//! capped. A crash leaves half-unpacked folders, which belong to the layer store that made them.

pub mod compare;
pub mod confined;
pub mod export;
mod pax;
pub mod pipeline;
mod sparse;
pub mod sum;
pub mod tar;
pub mod unpack;
mod whiteout;
mod window;
mod write;
