//! BFC containers: golden files with some bytes changed, and objects and index as they come, each with checksums that fit,
//! so that the code behind those is reached. Every entry that opens is read, and the whole as a layer.
#![no_main]

use std::io::Read;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::integrations::bfc::format::Checksum;
use proxmox_lxcri::integrations::bfc::rootfs::RootfsTar;
use proxmox_lxcri::integrations::bfc::{Container, KeySource};

const GOLDEN: [&[u8]; 4] = [
    include_bytes!("../../tests/bfc/plain.bfc"),
    include_bytes!("../../tests/bfc/zstd.bfc"),
    include_bytes!("../../tests/bfc/zstd-standard-crc.bfc"),
    include_bytes!("../../tests/bfc/key-zstd.bfc"),
];
const HEADER: usize = 4096;
const FOOTER: usize = 56;
/// Most bytes that are read of a content: a bomb is no finding.
const ENOUGH: u64 = 4 << 20;

/// Changes bytes after the header: three bytes say where, one what.
fn changed(golden: &[u8], changes: &[u8]) -> Vec<u8> {
    let mut bytes = golden.to_vec();
    let room = bytes.len() - HEADER;
    for change in changes.chunks_exact(4) {
        let at = usize::from(change[0]) << 16 | usize::from(change[1]) << 8 | usize::from(change[2]);
        bytes[HEADER + at % room] = change[3];
    }
    bytes
}

/// A container of these objects and this index.
fn made(objects: &[u8], index: &[u8]) -> Vec<u8> {
    let mut bytes = GOLDEN[0][..HEADER].to_vec();
    bytes.extend_from_slice(objects);
    let at = bytes.len() as u64;
    bytes.extend_from_slice(index);
    let mut footer = GOLDEN[0][GOLDEN[0].len() - FOOTER..].to_vec();
    footer[8..16].copy_from_slice(&(index.len() as u64).to_le_bytes());
    footer[20..28].copy_from_slice(&at.to_le_bytes());
    bytes.extend_from_slice(&footer);
    bytes
}

fn mend(bytes: &mut [u8], checksum: Checksum) {
    let end = bytes.len() - FOOTER;
    let at = u64::from_le_bytes(bytes[end + 20..end + 28].try_into().expect("8 bytes"));
    if let Some(index) = usize::try_from(at).ok().filter(|at| *at <= end).map(|at| &bytes[at..end]) {
        let crc = checksum.of(index);
        bytes[end + 16..end + 20].copy_from_slice(&crc.to_le_bytes());
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((how, rest)) = input.split_first() else { return };
    let mut bytes = match usize::from(*how) {
        n if n < 128 => changed(GOLDEN[n % GOLDEN.len()], rest),
        _ => {
            let Some((cut, rest)) = rest.split_at_checked(2) else { return };
            let cut = usize::from(u16::from_le_bytes([cut[0], cut[1]])).min(rest.len());
            made(&rest[..cut], &rest[cut..])
        }
    };
    let standard = *how < 128 && usize::from(*how) % GOLDEN.len() == 2;
    mend(&mut bytes, if standard { Checksum::Standard } else { Checksum::Raw });
    let Ok(mut container) = Container::read(Arc::new(bytes)) else { return };
    if container.is_encrypted() {
        let _ = container.unlock(&KeySource::raw(*include_bytes!("../../tests/bfc/key")));
    }
    for entry in container.entries() {
        assert_eq!(container.find(&entry.path), Some(entry));
        if let Ok(content) = container.content(entry) {
            let _ = std::io::copy(&mut content.take(ENOUGH), &mut std::io::sink());
        }
    }
    let _ = std::io::copy(&mut RootfsTar::new(Arc::new(container), b"").take(ENOUGH), &mut std::io::sink());
});
