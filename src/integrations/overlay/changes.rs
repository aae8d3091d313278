//! What a container has changed of its image: the overlay's upper folder, read as a list.
//!
//! Called on a blocking thread. Whiteouts are deletions; a folder that hides what the image has below it gets the marker
//! `.wh..wh..opq` that image layers have. The container's processes go on meanwhile: what goes away is left out, and a link
//! that they put in a folder's place leads nowhere. Fails with the I/O error and the path.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use camino::Utf8Path;

use crate::core::error::{Error, Result};
use crate::core::ports::RootfsChanges;
use crate::integrations::mountattr;

/// Marks a folder that hides the image's.
const OPAQUE: &str = "trusted.overlay.opaque";
/// More entries are refused: the list is kept in memory.
const ENTRIES_MAX: usize = 4_000_000;

/// Everything below `upper`.
pub(super) fn list(upper: &Utf8Path) -> Result<RootfsChanges> {
    let folder = mountattr::view(upper.as_std_path()).map_err(|e| Error::io(format!("a view of {upper}"), e.into()))?;
    let base = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string());
    let mut found = RootfsChanges { folder, changed: Vec::new(), deleted: Vec::new(), opaque: Vec::new(), user: None };
    let (mut opaque, mut todo) = (BTreeSet::new(), vec![PathBuf::new()]);
    while let Some(relative) = todo.pop() {
        let folder = base.join(&relative);
        let failed = |e| Error::io(format!("list {upper}/{}", relative.display()), e);
        let mut entries = match std::fs::read_dir(&folder) {
            // Something else is there by now.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => continue,
            other => other.map_err(failed)?.collect::<std::io::Result<Vec<_>>>().map_err(failed)?,
        };
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let relative = relative.join(entry.file_name());
            let Ok(meta) = entry.metadata() else { continue };
            if meta.file_type().is_char_device() && meta.rdev() == 0 {
                found.deleted.push(absolute(&relative));
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
    found.opaque = opaque.iter().map(|p| absolute(p)).collect();
    // A folder before what is in it.
    found.changed.sort();
    found.deleted.sort();
    Ok(found)
}

fn absolute(path: &Path) -> Vec<u8> {
    [b"/", path.as_os_str().as_bytes()].concat()
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
        assert_eq!((&found.deleted[..], &found.opaque[..]), (&[b"/a/gone".to_vec()][..], &[b"/a/b".to_vec()][..]));
        assert!(list(&upper.join("none")).is_err());
    }

    #[test]
    fn a_link_in_the_place_of_a_folder_leads_nowhere() {
        use crate::utils::tar::{Files, create};
        let temp = tempfile::tempdir().unwrap();
        let upper = Utf8Path::from_path(temp.path()).unwrap().join("upper");
        for folder in ["upper/sub", "outside"] {
            std::fs::create_dir_all(temp.path().join(folder)).unwrap();
            std::fs::write(temp.path().join(folder).join("file"), folder).unwrap();
        }
        let found = list(&upper).unwrap();
        // What a container does between the list and the archive.
        std::fs::rename(upper.join("sub"), upper.join("aside")).unwrap();
        std::os::unix::fs::symlink(temp.path().join("outside"), upper.join("sub")).unwrap();
        let (archive, from) =
            (temp.path().join("x.tar"), format!("/proc/{}/fd/{}", std::process::id(), found.folder.as_raw_fd()));
        let work = create(&archive, from.as_ref(), &found.changed, Files::InUse, std::time::Duration::from_secs(20));
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work).unwrap();
        let mut archive = tar::Archive::new(std::fs::File::open(&archive).unwrap());
        let entry = |e: std::io::Result<tar::Entry<'_, std::fs::File>>| {
            let entry = e.unwrap();
            (entry.path().unwrap().display().to_string(), entry.header().entry_type())
        };
        let found: Vec<_> = archive.entries().unwrap().map(entry).collect();
        assert_eq!(found, [("sub".to_owned(), tar::EntryType::Symlink)]);
    }
}
