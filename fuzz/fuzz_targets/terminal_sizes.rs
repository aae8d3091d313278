//! Terminal sizes: JSON one after another, in pieces.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::cri::streaming::process::Sizes;

fuzz_target!(|input: &[u8]| {
    let mut sizes = Sizes::default();
    for piece in input.chunks(7) {
        if let Some(size) = sizes.push(Bytes::copy_from_slice(piece)) {
            assert!(size.width > 0 && size.height > 0);
        }
    }
});
