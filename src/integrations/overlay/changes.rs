//! What a container has changed of its image: the overlay's upper folder, read as a list.
//!
//! Called on a blocking thread. Whiteouts are deletions; a folder that hides what the image has below it gets the marker
//! `.wh..wh..opq` that image layers have. Fails with the I/O error and the path; what goes away while we look is left out.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use camino::Utf8Path;

use crate::core::error::{Error, Result};
use crate::core::ports::RootfsChanges;

/// Marks a folder that hides the image's.
const OPAQUE: &str = "trusted.overlay.opaque";
/// More entries are refused: the list is kept in memory.
const ENTRIES_MAX: usize = 4_000_000;

/// Everything below `upper`.
pub(super) fn list(upper: &Utf8Path) -> Result<RootfsChanges> {
    let mut found = RootfsChanges { folder: upper.to_owned(), ..Default::default() };
    let (mut opaque, mut todo) = (BTreeSet::new(), vec![PathBuf::new()]);
    while let Some(relative) = todo.pop() {
        let folder = upper.as_std_path().join(&relative);
        let failed = |e| Error::io(format!("list {}", folder.display()), e);
        let mut entries = match std::fs::read_dir(&folder) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            other => other.map_err(failed)?.collect::<std::io::Result<Vec<_>>>().map_err(failed)?,
        };
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let relative = relative.join(entry.file_name());
            let Ok(meta) = entry.metadata() else { continue };
            if meta.file_type().is_char_device() && meta.rdev() == 0 {
                found.deleted.push(format!("/{}", relative.to_string_lossy()));
                continue;
            }
            if meta.is_dir() {
                if matches!(xattr::get(entry.path(), OPAQUE), Ok(Some(v)) if v == b"y") {
                    opaque.insert(relative.clone());
                }
                todo.push(relative.clone());
            }
            // A socket means nothing without who listens.
            if !meta.file_type().is_socket() {
                found.changed.push(bytes(&relative));
            }
            if found.changed.len() + found.deleted.len() > ENTRIES_MAX {
                return Err(Error::precondition(format!("more than {ENTRIES_MAX} changes in {upper}")));
            }
        }
    }
    found.opaque = opaque.iter().map(|p| format!("/{}", p.to_string_lossy())).collect();
    // A folder before what is in it.
    found.changed.sort();
    found.deleted.sort();
    Ok(found)
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;

    #[test]
    fn changes_deletions_and_hidden_folders() {
        let temp = tempfile::tempdir().unwrap();
        let upper = Utf8Path::from_path(temp.path()).unwrap();
        std::fs::create_dir_all(upper.join("a/b")).unwrap();
        std::fs::write(upper.join("a/new"), "x").unwrap();
        std::os::unix::fs::symlink("nowhere", upper.join("a/link")).unwrap();
        let whiteout = upper.join("a/gone");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            whiteout.as_std_path(),
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::empty(),
            0,
        )
        .unwrap();
        xattr::set(upper.join("a/b"), OPAQUE, b"y").unwrap();
        let found = list(upper).unwrap();
        assert_eq!(found.changed, ["a", "a/b", "a/link", "a/new"].map(|p| p.as_bytes().to_vec()));
        assert_eq!((&found.deleted[..], &found.opaque[..]), (&["/a/gone".to_owned()][..], &["/a/b".to_owned()][..]));
        assert!(list(&upper.join("none")).unwrap().changed.is_empty());
    }
}
