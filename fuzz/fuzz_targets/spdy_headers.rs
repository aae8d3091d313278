//! SPDY header blocks: several after one another, as they are and after a good beginning.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::cri::streaming::spdy::headers::{Deflater, Headers, Inflater};

fuzz_target!(|input: &[u8]| {
    let _ = Headers::parse(Bytes::copy_from_slice(input));
    let _ = Inflater::default().inflate(input);
    let mut inflater = Inflater::default();
    let good = Deflater::default().deflate(&Headers::new([("streamtype", "error"), ("port", "80")]));
    inflater.inflate(&good).expect("a good block");
    for block in input.split(|b| *b == 0xff) {
        if inflater.inflate(block).is_err() {
            return;
        }
    }
});
