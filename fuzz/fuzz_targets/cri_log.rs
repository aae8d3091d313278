//! Lines of a CRI log, as our own command line reads them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::cli::crilog::parse;

fuzz_target!(|input: &[u8]| {
    for text in input.split(|b| *b == b'\n') {
        if let Some(line) = parse(text) {
            let stream = if line.stderr { "stderr" } else { "stdout" };
            let tag = if line.partial { "P" } else { "F" };
            let again = [format!("t {stream} {tag} ").as_bytes(), line.content].concat();
            assert_eq!(parse(&again), Some(line));
            assert!(text.ends_with(parse(&again).expect("a line").content));
        }
    }
});
