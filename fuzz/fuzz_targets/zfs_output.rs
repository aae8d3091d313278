//! What `zfs` and `zpool` print, and the names that come with it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::integrations::zfs::{Dataset, parse};

fuzz_target!(|input: &str| {
    if let Ok(all) = parse::properties(input) {
        assert!(all.values().flat_map(|p| p.values()).all(|v| v.text != "-"));
    }
    let _ = parse::holds(input);
    let _ = parse::pool_state(input);
    let _ = parse::version(input);
    if let Ok(changes) = parse::diff(input) {
        assert!(changes.len() <= input.lines().count());
    }
    for line in input.lines() {
        if let Ok(dataset) = line.parse::<Dataset>() {
            let name = dataset.as_str();
            assert!(name == line && !name.starts_with(['-', '/']) && !name.contains(['@', ' ', '\0']));
        }
    }
});
