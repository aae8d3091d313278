//! The tar reader: whatever the archive says, entries come one after another, their data is never more than was said, and
//! no size is believed before it was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::integrations::layers::tar::TarReader;

fuzz_target!(|input: &[u8]| {
    let mut reader = TarReader::new(input);
    let mut buffer = [0; 700];
    let mut at = 0;
    while let Ok(Some(entry)) = reader.next_entry() {
        assert!(entry.offset >= at && reader.position() <= input.len() as u64);
        at = entry.offset;
        if let Some(runs) = &entry.runs {
            let total: u64 = runs.iter().map(|(_, length)| length).sum();
            assert_eq!(total, entry.size);
            assert!(runs.iter().all(|(offset, length)| offset + length <= entry.real_size));
        }
        // Of every other entry some data is left for the reader to skip.
        if entry.size % 2 == 0 {
            let mut read = 0;
            while let Ok(n) = reader.read_data(&mut buffer) {
                if n == 0 {
                    break;
                }
                read += n as u64;
            }
            assert!(read <= entry.size);
        }
    }
});
