//! Manifests, indexes and configs of images, under every media type that they may come with.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::integrations::images::manifest::{Manifest, chain_ids, choose, parse, parse_config};
use proxmox_lxcri::integrations::images::platform::Platform;

const TYPES: [&str; 5] = [
    "",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

fuzz_target!(|input: &[u8]| {
    let host = Platform::host();
    for media_type in TYPES {
        match parse(input, media_type) {
            Ok(Manifest::Index(entries)) => {
                if let Ok(chosen) = choose(&entries, &host) {
                    assert!(entries.iter().any(|e| e.descriptor.digest == chosen.descriptor.digest));
                }
            }
            Ok(Manifest::Image(_, layers)) => assert!(!layers.is_empty()),
            Err(e) => assert!(e.to_string().chars().count() < 10_000, "an error as long as its input"),
        }
    }
    for layers in 0..3 {
        if let Ok((_, diff_ids)) = parse_config(input, layers, &host) {
            assert_eq!((diff_ids.len(), chain_ids(&diff_ids).len()), (layers, layers));
        }
    }
});
