//! Names of images: what is taken is written and taken to be the same again, and never names a folder elsewhere.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::core::reference::Reference;

fuzz_target!(|input: &str| {
    let Ok(reference) = Reference::parse(input, "docker.io") else { return };
    let text = reference.to_string();
    let again = Reference::parse(&text, "docker.io").expect("our own text");
    assert_eq!(again.to_string(), text);
    let (registry, repository) = (reference.registry(), reference.repository());
    assert!(!registry.contains('/') && !registry.is_empty() && registry != ".." && registry != ".");
    assert!(!repository.is_empty() && repository.split('/').all(|part| !part.is_empty() && part != ".." && part != "."));
    assert!(text.bytes().all(|b| b.is_ascii_graphic()));
});
