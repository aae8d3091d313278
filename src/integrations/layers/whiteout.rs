//! Whiteouts: what a layer removes from those below it, in overlayfs's way or on the spot.
//!
//! Called by the unpacker; part of it. Fails with the I/O error of the step.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode};
use rustix::io::Errno;

use super::unpack::{Unpacker, Whiteouts};
use super::write;
use crate::utils::beneath::remove_at;

impl Unpacker {
    /// What is in the way of the folder `path` goes. A whiteout becomes an opaque folder: the layer removed a name and
    /// made a folder of it. A file of the parent layers (never one of this layer) is hidden by the folder.
    pub(super) fn unhide(&mut self, path: &Path) -> io::Result<bool> {
        if self.whiteouts == Whiteouts::Apply {
            return self.remove_file_before(path);
        }
        let mut prefix = PathBuf::new();
        for part in path.components() {
            prefix.push(part);
            let (parent, name) = self.root.open_parent(&prefix)?;
            if is_whiteout(&parent, &name)? {
                self.folder_over_whiteout(&prefix, &parent, &name)?;
                self.result.implicit.insert(prefix);
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn remove_file_before(&mut self, path: &Path) -> io::Result<bool> {
        let mut prefix = PathBuf::new();
        for part in path.components() {
            prefix.push(part);
            let (parent, name) = self.root.open_parent(&prefix)?;
            let kind = match fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                Err(Errno::NOENT) => return Ok(false),
                Err(e) => return Err(e.into()),
            };
            if !matches!(kind, FileType::Directory | FileType::Symlink) {
                if self.made.contains(&prefix) {
                    return Ok(false);
                }
                fs::unlinkat(&parent, &name, AtFlags::empty())?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) fn folder_over_whiteout(&mut self, path: &Path, parent: &OwnedFd, name: &CStr) -> io::Result<()> {
        fs::unlinkat(parent, name, AtFlags::empty())?;
        fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
        self.mark_opaque(path, parent, name)
    }

    /// Marks the folder `name` in `parent`; a process that may not set the mark notes it for one that may.
    fn mark_opaque(&mut self, path: &Path, parent: &OwnedFd, name: &CStr) -> io::Result<()> {
        match &mut self.later {
            Some(later) => {
                later.opaque.insert(path.to_path_buf());
                Ok(())
            }
            None => set_opaque(parent.as_fd(), name),
        }
    }

    pub(super) fn opaque(&mut self, path: &Path, folder: &OwnedFd) -> io::Result<()> {
        if self.whiteouts == Whiteouts::Overlay {
            return self.mark_opaque(path, folder, c".");
        }
        let folder =
            fs::openat(folder, ".", fs::OFlags::RDONLY | fs::OFlags::DIRECTORY | fs::OFlags::CLOEXEC, Mode::empty())?;
        for entry in fs::Dir::read_from(&folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let child = path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
            if !matches!(name.to_bytes(), b"." | b"..") && !self.made.contains(&child) {
                self.replaced = true;
                remove_at(folder.as_fd(), name)?;
            }
        }
        Ok(())
    }

    pub(super) fn whiteout(&mut self, parent_path: &Path, parent: &OwnedFd, hidden: &[u8]) -> io::Result<()> {
        let name = CString::new(hidden).map_err(|_| io::Error::from(Errno::INVAL))?;
        if self.whiteouts == Whiteouts::Apply {
            if !self.made.contains(&parent_path.join(std::ffi::OsStr::from_bytes(hidden))) {
                self.replaced = true;
                remove_at(parent.as_fd(), &name)?;
            }
            return Ok(());
        }
        match fs::mknodat(parent, &name, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => self.result.usage.inodes += 1,
            // This layer has it anew: a folder hides the parents' by being opaque, all else by being there.
            Err(Errno::EXIST) => {
                let stat = fs::statat(parent, &name, AtFlags::SYMLINK_NOFOLLOW)?;
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    let path = parent_path.join(std::ffi::OsStr::from_bytes(hidden));
                    self.mark_opaque(&path, parent, &name)?;
                }
            }
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}

/// overlayfs's mark of a folder that hides the parent layers' of its name.
pub(super) fn set_opaque(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    write::set_xattr_at(parent, name, "trusted.overlay.opaque", b"y")
}

pub(super) fn is_whiteout(parent: &OwnedFd, name: &CString) -> io::Result<bool> {
    match fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
