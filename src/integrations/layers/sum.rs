//! One number for an unpacked layer: its names, attributes and content, so that a later look tells whether it is still what was
//! unpacked.
//!
//! Called by a layer store, blocking. Attributes go into a SHA-256, content as its CRC-32C: this is against disks and mistakes,
//! not against people, who could write the sum anew. Access times and inode numbers are left out. Fails with the I/O error; a
//! caller who does not want to wait any longer says so by `go_on`.

use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::core::ids::Digest;

/// Bytes that are read at once.
const PIECE: usize = 256 << 10;

/// The sum of everything below `root`, itself included; None: `go_on` said no.
pub fn of(root: &Path, go_on: &dyn Fn() -> bool) -> io::Result<Option<Digest>> {
    let (mut sum, mut buffer) = (Sha256::new(), vec![0; PIECE]);
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        if !go_on() {
            return Ok(None);
        }
        let meta = path.symlink_metadata()?;
        let kind = meta.file_type();
        let name = path.strip_prefix(root).unwrap_or(&path).as_os_str().as_bytes().to_vec();
        let mut line = format!("{} {} {} ", meta.mode(), meta.uid(), meta.gid());
        line.push_str(&format!("{}.{:09} ", meta.mtime(), meta.mtime_nsec()));
        let content = if kind.is_file() {
            format!("{} {} {:08x}", meta.nlink(), meta.size(), content(&path, &mut buffer)?).into_bytes()
        } else if kind.is_symlink() {
            std::fs::read_link(&path)?.as_os_str().as_bytes().to_vec()
        } else if kind.is_char_device() || kind.is_block_device() {
            meta.rdev().to_string().into_bytes()
        } else {
            Vec::new()
        };
        // Attributes that the file system keeps for itself are none of the layer's.
        let mut attributes: Vec<_> =
            xattr::list(&path)?.filter(|key| !key.as_bytes().starts_with(b"system.")).collect();
        attributes.sort();
        for part in [name.as_slice(), line.as_bytes(), &content] {
            put(&mut sum, part);
        }
        for key in attributes {
            put(&mut sum, key.as_bytes());
            put(&mut sum, &xattr::get(&path, &key)?.unwrap_or_default());
        }
        if kind.is_dir() {
            let mut names = std::fs::read_dir(&path)?.map(|e| Ok(e?.path())).collect::<io::Result<Vec<_>>>()?;
            names.sort_by(|a, b| b.cmp(a));
            todo.extend(names);
        }
    }
    Ok(Some(Digest::from_sha256(&sum.finalize().into())))
}

fn put(sum: &mut Sha256, part: &[u8]) {
    sum.update((part.len() as u64).to_be_bytes());
    sum.update(part);
}

fn content(path: &Path, buffer: &mut [u8]) -> io::Result<u32> {
    let mut file = std::fs::File::open(path)?;
    let mut crc = 0;
    loop {
        match file.read(buffer)? {
            0 => return Ok(crc),
            n => crc = crc32c::crc32c_append(crc, &buffer[..n]),
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn every_change_is_another_sum() {
        let dir = tempfile::tempdir().expect("a folder");
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("d")).expect("folder");
        std::fs::write(at("d/f"), "content").expect("file");
        symlink("f", at("d/l")).expect("link");
        let sum = || of(dir.path(), &|| true).expect("a sum").expect("not ended");
        let mut seen = vec![sum()];
        assert_eq!(seen[0], sum());
        let time = std::fs::metadata(at("d/f")).expect("file").modified().expect("a time");
        let changes: [&dyn Fn(); 5] = [
            &|| {
                // The same size and times.
                std::fs::write(at("d/f"), "c0ntent").expect("file");
                std::fs::File::options()
                    .write(true)
                    .open(at("d/f"))
                    .expect("file")
                    .set_modified(time)
                    .expect("its time");
            },
            &|| std::fs::set_permissions(at("d/f"), std::fs::Permissions::from_mode(0o600)).expect("mode"),
            &|| xattr::set(at("d"), "user.x", b"1").expect("attribute"),
            &|| std::fs::rename(at("d/l"), at("d/m")).expect("name"),
            &|| std::fs::remove_file(at("d/m")).expect("link"),
        ];
        for change in changes {
            change();
            let now = sum();
            assert!(!seen.contains(&now));
            seen.push(now);
        }
        assert_eq!(of(dir.path(), &|| false).expect("no failure"), None);
    }
}
