//! Whole layers onto a real folder, with both kinds of whiteouts: nothing beside the folder is made, changed or removed.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::integrations::layers::unpack::{Limits, Whiteouts, unpack};
use proxmox_lxcri::utils::beneath::remove_tree;

fn place() -> &'static PathBuf {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = std::env::temp_dir().join(format!("lxcri-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&place).expect("a folder");
        std::fs::write(place.join("outside"), "outside").expect("a file");
        place
    })
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, tar)) = input.split_first() else { return };
    let place = place();
    let root = place.join("root");
    std::fs::create_dir_all(&root).expect("a folder");
    let whiteouts = if kind % 2 == 0 { Whiteouts::Overlay } else { Whiteouts::Apply };
    let limits = Limits { entries: 200, bytes: 1 << 20, ..Limits::default() };
    let _ = unpack(&root, tar, whiteouts, &limits);
    let mut names: Vec<_> = std::fs::read_dir(place).expect("a folder").map(|e| e.expect("entry").file_name()).collect();
    names.sort();
    assert_eq!(names, ["outside", "root"]);
    assert_eq!(std::fs::read(place.join("outside")).expect("a file"), b"outside");
    remove_tree(&root).expect("what was unpacked can be removed");
});
