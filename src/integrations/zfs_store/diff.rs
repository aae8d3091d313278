//! What differs between two states of one file system, by walking both.
//!
//! Called by the store on a blocking thread. A clone keeps inode numbers and times of change, so a file is the same when
//! its inode and its time of change are: no content is read. (zfs-fuse has times in whole seconds: what changes within
//! one and keeps its size is not seen.) Links are not followed. Fails with the I/O error of a folder
//! that can't be read; what vanishes under the walk is gone.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::core::ports::{ChangeKind, FileChange};

/// Everything below `after` that is not as below `before`, sorted by path; of what was deleted only the topmost.
pub(super) fn compare(before: &Path, after: &Path) -> io::Result<Vec<FileChange>> {
    let mut changes = Vec::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(folder) = pending.pop() {
        let old = entries(&before.join(&folder))?;
        let new = entries(&after.join(&folder))?;
        for name in old.keys().filter(|n| !new.contains_key(*n)) {
            changes.push(FileChange { path: folder.join(name), kind: ChangeKind::Deleted });
        }
        for (name, meta) in &new {
            let path = folder.join(name);
            match old.get(name) {
                Some(was) if kind(was) == kind(meta) => {
                    if !same(was, meta) {
                        changes.push(FileChange { path: path.clone(), kind: ChangeKind::Changed });
                    }
                    // What is in a folder may have changed without it, but an untouched one holds what it did.
                    if meta.is_dir() {
                        pending.push(path);
                    }
                }
                _ => {
                    changes.push(FileChange { path: path.clone(), kind: ChangeKind::Added });
                    if meta.is_dir() {
                        all_new(after, path, &mut changes)?;
                    }
                }
            }
        }
    }
    changes.sort();
    Ok(changes)
}

fn all_new(root: &Path, folder: PathBuf, changes: &mut Vec<FileChange>) -> io::Result<()> {
    let mut pending = vec![folder];
    while let Some(folder) = pending.pop() {
        for (name, meta) in entries(&root.join(&folder))? {
            let path = folder.join(name);
            changes.push(FileChange { path: path.clone(), kind: ChangeKind::Added });
            if meta.is_dir() {
                pending.push(path);
            }
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> io::Result<BTreeMap<OsString, Metadata>> {
    let mut list = BTreeMap::new();
    let read = match std::fs::read_dir(folder) {
        // Gone, or another kind of thing on the other side or by now: a link, which a guarded mount does not follow.
        Err(e)
            if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
                || e.raw_os_error() == Some(libc::ELOOP) =>
        {
            return Ok(list);
        }
        read => read?,
    };
    for entry in read {
        let entry = entry?;
        // Not followed.
        match entry.metadata() {
            Ok(meta) => {
                list.insert(entry.file_name(), meta);
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(list)
}

fn kind(meta: &Metadata) -> u8 {
    let t = meta.file_type();
    [t.is_dir(), t.is_file(), t.is_symlink(), t.is_fifo(), t.is_socket(), t.is_char_device(), t.is_block_device()]
        .iter()
        .position(|b| *b)
        .map_or(u8::MAX, |n| u8::try_from(n).unwrap_or(u8::MAX))
}

fn same(a: &Metadata, b: &Metadata) -> bool {
    a.ino() == b.ino()
        && (a.ctime(), a.ctime_nsec()) == (b.ctime(), b.ctime_nsec())
        && (a.mode(), a.uid(), a.gid(), a.rdev()) == (b.mode(), b.uid(), b.gid(), b.rdev())
        && a.size() == b.size()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_change() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for (root, files) in [
            (&a, ["same", "gone/x", "kind", "deep/er/file"].as_slice()),
            (&b, ["same", "new/x/y", "kind/z", "deep/er/file"].as_slice()),
        ] {
            for file in files {
                let path = root.join(file);
                std::fs::create_dir_all(path.parent().expect("parent")).expect("folder");
                let made = std::fs::File::create(&path).expect("file");
                made.set_len(1).expect("length");
            }
        }
        // One inode, so one time of change: what a clone has.
        std::fs::remove_file(b.join("same"))
            .and_then(|()| std::fs::hard_link(a.join("same"), b.join("same")))
            .expect("link");
        let changes = compare(&a, &b).expect("compared");
        let told: Vec<_> = changes.iter().map(|c| (c.path.to_str().unwrap_or(""), c.kind)).collect();
        use ChangeKind::{Added, Changed, Deleted};
        let expected = [
            ("deep", Changed),
            ("deep/er", Changed),
            ("deep/er/file", Changed),
            ("gone", Deleted),
            ("kind", Added),
            ("kind/z", Added),
            ("new", Added),
            ("new/x", Added),
            ("new/x/y", Added),
        ];
        assert_eq!(told, expected);
        assert_eq!(compare(&a, &a).expect("compared"), []);
    }
    #[test]
    fn a_folder_that_is_a_link_by_now_is_gone() {
        crate::integrations::mounts::tests::in_private_mounts(|dir| {
            std::fs::create_dir_all(dir.join("out")).unwrap();
            std::fs::create_dir(dir.join("in")).unwrap();
            std::fs::File::create(dir.join("out/secret")).unwrap();
            std::os::unix::fs::symlink("../out", dir.join("in/link")).unwrap();
            let view = crate::integrations::mountattr::view(&dir.join("in")).unwrap();
            let root = super::super::path_of(&view);
            assert!(entries(&root.join("link")).unwrap().is_empty());
            assert_eq!(entries(&root).unwrap().len(), 1);
        });
    }
}
