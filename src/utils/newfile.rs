//! Large files that appear whole or not at all: they have no name until they are placed.
//!
//! Called by the writer and the extractor of containers. Fails with the plain I/O error of the step. However the process
//! ends, nothing is left of a file that was not placed; only on file systems without nameless files (NFS, some of FUSE) a
//! crash leaves a `.tmp-` file.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

/// A file on its way.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    folder: OwnedFd,
    /// The name that it has meanwhile, where it needs one.
    temporary: Option<CString>,
}

impl NewFile {
    /// Begins a file in `folder`, to be written and read, with permission bits `mode` less the umask.
    pub fn create(folder: BorrowedFd<'_>, mode: u32) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        match fs::openat(folder, ".", flags, Mode::from_raw_mode(mode)) {
            Ok(fd) => Ok(Self { file: fd.into(), folder: folder.try_clone_to_owned()?, temporary: None }),
            // What file systems say that have no such files.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Self::named(folder, mode),
            Err(e) => Err(e.into()),
        }
    }

    fn named(folder: BorrowedFd<'_>, mode: u32) -> io::Result<Self> {
        let temporary = temporary_name()?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = folder.try_clone_to_owned()?;
        let file = fs::openat(&folder, &temporary, flags, Mode::from_raw_mode(mode))?.into();
        Ok(Self { file, folder, temporary: Some(temporary) })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives it its name in its folder. Without `replace` whatever has that name is an error (EEXIST).
    pub fn place(mut self, name: &CStr, replace: bool) -> io::Result<()> {
        if self.temporary.is_none() {
            match self.link(name) {
                Err(Errno::EXIST) if replace => {}
                linked => return Ok(linked?),
            }
            // A link replaces nothing, a rename does.
            let temporary = temporary_name()?;
            self.link(&temporary)?;
            self.temporary = Some(temporary);
        }
        if let Some(temporary) = &self.temporary {
            rename(self.folder.as_fd(), temporary, name, replace)?;
            self.temporary = None;
        }
        Ok(())
    }

    fn link(&self, name: &CStr) -> Result<(), Errno> {
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        fs::linkat(CWD, own, &self.folder, name, AtFlags::SYMLINK_FOLLOW)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::unlinkat(&self.folder, temporary, AtFlags::empty());
        }
    }
}

/// A name that nothing has: what is left under one was not finished.
pub fn temporary_name() -> io::Result<CString> {
    CString::new(format!(".tmp-{}", uuid::Uuid::new_v4().simple())).map_err(io::Error::other)
}

/// Renames within a folder. Without `replace` whatever is called `to` is an error (EEXIST).
pub fn rename(folder: BorrowedFd<'_>, from: &CStr, to: &CStr, replace: bool) -> io::Result<()> {
    if !replace {
        match fs::renameat_with(folder, from, folder, to, RenameFlags::NOREPLACE) {
            // Not every file system knows it; then a look has to do.
            Err(Errno::INVAL) => match fs::statat(folder, to, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(_) => return Err(Errno::EXIST.into()),
                Err(Errno::NOENT) => {}
                Err(e) => return Err(e.into()),
            },
            renamed => return Ok(renamed?),
        }
    }
    Ok(fs::renameat(folder, from, folder, to)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    type Begin = fn(BorrowedFd<'_>, u32) -> io::Result<NewFile>;

    #[test]
    fn appears_whole_or_not_at_all() {
        for begin in [NewFile::create as Begin, NewFile::named as Begin] {
            let dir = tempfile::tempdir().expect("tempdir");
            let folder = File::open(dir.path()).expect("open");
            let count = || std::fs::read_dir(dir.path()).expect("list").count();
            let new = |text: &str| {
                let new = begin(folder.as_fd(), 0o600).expect("create");
                new.file().write_all(text.as_bytes()).expect("write");
                new
            };
            drop(new("lost"));
            assert_eq!(count(), 0);
            new("one").place(c"f", false).expect("place");
            let e = new("two").place(c"f", false).expect_err("it is there");
            assert_eq!(e.kind(), io::ErrorKind::AlreadyExists);
            let read = || std::fs::read_to_string(dir.path().join("f")).expect("read");
            assert_eq!((read().as_str(), count()), ("one", 1));
            new("three").place(c"f", true).expect("replace");
            assert_eq!((read().as_str(), count()), ("three", 1));
            std::fs::create_dir(dir.path().join("d")).expect("mkdir");
            assert!(new("four").place(c"d", true).is_err());
            assert_eq!(count(), 2);
        }
    }
}
