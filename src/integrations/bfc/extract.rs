//! Writes a container's entries to disk, never outside the folder that was named.
//!
//! Called by the command line, blocking. Before the first byte is written, the objects of everything that is wanted are
//! compared with the index and the key is tried. No link is followed: not one from the container (nothing can be below
//! one, see the reader) and not one that was there. A file gets its name when all of its content was right, a
//! folder its mode at the end (until then others can't enter it). Fails with [`ExtractError`] naming the entry; what was
//! extracted before stays.

use std::collections::HashSet;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rustix::fs::{AtFlags, FileType, Mode, Timespec, Timestamps};
use rustix::io::Errno;

use super::error::{Name, ReadError};
use super::format::{Entry, Kind};
use super::reader::Container;
use crate::core::error::{Error, Kind as ErrorKind};
use crate::utils::beneath::Root;
use crate::utils::newfile::{NewFile, rename, temporary_name};

/// Bytes that are copied at once.
const PIECE: usize = 256 << 10;
/// From so many bytes on, a file is written by a thread of its own.
const LARGE: u64 = 4 << 20;
/// Pieces that wait for it.
const QUEUE: usize = 8;

/// How to extract.
#[derive(Debug, Clone, Default)]
pub struct ExtractOptions {
    /// Replace files and links that are there.
    pub force: bool,
    /// Make the folders of each entry; else all files land in one folder, under their last names.
    pub keep_paths: bool,
    /// What to extract, with all below it; empty: everything.
    pub paths: Vec<Vec<u8>>,
}

/// Why extraction stopped.
#[derive(Debug, thiserror::Error)]
pub enum ExtractError {
    /// The container.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A step on disk.
    #[error("extracting {entry}: {what} failed")]
    Io {
        /// The entry.
        entry: Name,
        /// The step.
        what: &'static str,
        /// The failure.
        #[source]
        source: io::Error,
    },
    /// Something is there.
    #[error("extracting {0}: it is there already (force replaces it)")]
    Exists(Name),
    /// The way to it is not a folder.
    #[error("extracting {0}: a link is on the way, and nothing is written through links")]
    Link(Name),
    /// Two entries would be one file.
    #[error("extracting {0}: another entry has the same last name (keep paths to extract both)")]
    Twice(Name),
}

impl From<ExtractError> for Error {
    fn from(e: ExtractError) -> Self {
        let message = e.to_string();
        match e {
            ExtractError::Read(e) => e.into(),
            ExtractError::Io { source, .. } => Error::io(message, source),
            ExtractError::Exists(_) => Error::new(ErrorKind::AlreadyExists, message),
            ExtractError::Link(_) | ExtractError::Twice(_) => Error::precondition(message),
        }
    }
}

/// Extracts into the folder `directory`, which is there. `done` hears of each entry. Answers with how many there were.
pub fn extract(
    container: &Container,
    directory: &Path,
    options: &ExtractOptions,
    done: &mut dyn FnMut(&[u8], Kind),
) -> Result<u64, ExtractError> {
    let wanted = wanted(container, options)?;
    for entry in &wanted {
        container.check_object(entry)?;
    }
    if let Some(sealed) = wanted.iter().filter(|e| e.encrypted).min_by_key(|e| e.size) {
        container.content(sealed)?;
    }
    let root = Root::open(directory).map_err(|source| ExtractError::Io {
        entry: directory.as_os_str().as_bytes().into(),
        what: "opening the folder",
        source,
    })?;
    let mut extractor = Extractor {
        container,
        options,
        root,
        parent: None,
        names: HashSet::new(),
        folders: Vec::new(),
        buffer: vec![0; PIECE],
    };
    for entry in &wanted {
        extractor.entry(entry)?;
        done(&entry.path, entry.kind());
    }
    extractor.finish()?;
    Ok(wanted.len() as u64)
}

fn wanted<'a>(container: &'a Container, options: &'a ExtractOptions) -> Result<Vec<&'a Entry>, ExtractError> {
    if options.paths.is_empty() {
        return Ok(container.entries().iter().filter(|e| options.keep_paths || e.kind() != Kind::Folder).collect());
    }
    let mut all: Vec<&Entry> = Vec::new();
    for path in &options.paths {
        let path = path.strip_suffix(b"/").unwrap_or(path);
        let before = all.len();
        all.extend(container.below(path));
        if all.len() == before || path.is_empty() {
            return Err(ReadError::NoEntry(path.into()).into());
        }
    }
    all.sort_by(|a, b| a.path.cmp(&b.path));
    all.dedup_by(|a, b| a.path == b.path);
    Ok(all.into_iter().filter(|e| options.keep_paths || e.kind() != Kind::Folder).collect())
}

struct Extractor<'a> {
    container: &'a Container,
    options: &'a ExtractOptions,
    root: Root,
    /// The folder of the last entry.
    parent: Option<(PathBuf, OwnedFd)>,
    /// Without paths: last names that were given away.
    names: HashSet<Vec<u8>>,
    /// Folders whose modes and times are set at the end: until then they have to be writable.
    folders: Vec<&'a Entry>,
    buffer: Vec<u8>,
}

impl<'a> Extractor<'a> {
    fn entry(&mut self, entry: &'a Entry) -> Result<(), ExtractError> {
        let io = |what| io(entry, what);
        let path = Path::new(OsStr::from_bytes(&entry.path));
        if entry.kind() == Kind::Folder {
            // What a folder hides from others is hidden from the beginning, and stays so if all ends early.
            self.folder(entry, path.parent().unwrap_or(Path::new("")), 0o755)?;
            self.folder(entry, path, 0o700)?;
            self.folders.push(entry);
            return Ok(());
        }
        let last = path.file_name().unwrap_or_default().as_bytes().to_vec();
        let parent_path = if self.options.keep_paths { path.parent().unwrap_or(Path::new("")) } else { Path::new("") };
        if !self.options.keep_paths && !self.names.insert(last.clone()) {
            return Err(ExtractError::Twice(entry.name()));
        }
        let parent = match self.parent.take() {
            Some((known, fd)) if known == parent_path => fd,
            _ => self.folder(entry, parent_path, 0o755)?,
        };
        let name = CString::new(last).map_err(|e| io("reading its name")(e.into()))?;
        if !self.options.force && there(&parent, &name).map_err(io("looking for it"))?.is_some() {
            return Err(ExtractError::Exists(entry.name()));
        }
        match entry.kind() {
            Kind::Symlink => self.link(entry, &parent, &name)?,
            _ => self.file(entry, &parent, &name)?,
        }
        self.parent = Some((parent_path.to_path_buf(), parent));
        Ok(())
    }

    fn folder(&self, entry: &Entry, path: &Path, mode: u32) -> Result<OwnedFd, ExtractError> {
        self.root.folder_without_links(path, mode).map_err(|source| match source.raw_os_error() {
            Some(libc::ELOOP) => ExtractError::Link(entry.name()),
            _ => ExtractError::Io { entry: entry.name(), what: "making its folder", source },
        })
    }

    /// Makes a link, with its time.
    fn link(&self, entry: &Entry, parent: &OwnedFd, name: &CStr) -> Result<(), ExtractError> {
        let target = self.container.target(entry)?;
        let temporary = temporary_name().map_err(io(entry, "making a name"))?;
        rustix::fs::symlinkat(OsStr::from_bytes(&target), parent, &temporary)
            .map_err(|e| io(entry, "making the link")(e.into()))?;
        let done = rustix::fs::utimensat(parent, &temporary, &times(entry), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| io(entry, "setting its time")(e.into()))
            .and_then(|()| {
                rename(parent.as_fd(), &temporary, name, self.options.force).map_err(|e| not_placed(entry, e))
            });
        if done.is_err() {
            let _ = rustix::fs::unlinkat(parent, &temporary, AtFlags::empty());
        }
        done
    }

    /// Makes a file, with mode and time; it gets its name when all of its content was right.
    fn file(&mut self, entry: &Entry, parent: &OwnedFd, name: &CStr) -> Result<(), ExtractError> {
        let mut content = self.container.content(entry)?;
        let new = NewFile::create(parent.as_fd(), 0o600).map_err(io(entry, "making the file"))?;
        self.copy(entry, &mut content, new.file())?;
        // Neither setuid nor its like: whoever made the container is not who extracts it.
        rustix::fs::fchmod(new.file(), Mode::from_raw_mode(entry.mode & 0o777))
            .and_then(|()| rustix::fs::futimens(new.file(), &times(entry)))
            .map_err(|e| io(entry, "setting mode and time")(e.into()))?;
        new.place(name, self.options.force).map_err(|e| not_placed(entry, e))
    }

    fn copy(&mut self, entry: &Entry, content: &mut impl Read, mut file: &File) -> Result<(), ExtractError> {
        if entry.orig_size >= LARGE {
            return copy_beside(entry, content, file);
        }
        loop {
            let n = content.read(&mut self.buffer).map_err(|e| ReadError::of_stream(&entry.path, e))?;
            if n == 0 {
                return Ok(());
            }
            file.write_all(&self.buffer[..n]).map_err(|source| ExtractError::Io {
                entry: entry.name(),
                what: "writing it",
                source,
            })?;
        }
    }

    /// Modes and times of folders, the innermost first.
    fn finish(self) -> Result<(), ExtractError> {
        for entry in self.folders.iter().rev() {
            let io =
                |e: Errno| ExtractError::Io { entry: entry.name(), what: "setting mode and time", source: e.into() };
            let path = Path::new(OsStr::from_bytes(&entry.path));
            let fd = self.folder(entry, path, 0o700)?;
            // Through the folder itself: fchmod does not take a path descriptor.
            let fd = rustix::fs::openat(
                &fd,
                ".",
                rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
                Mode::empty(),
            );
            let fd = fd.map_err(io)?;
            rustix::fs::futimens(&fd, &times(entry)).map_err(io)?;
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(entry.mode & 0o777)).map_err(io)?;
        }
        Ok(())
    }
}

/// The same with a thread that writes while the next piece is decompressed.
fn copy_beside(entry: &Entry, content: &mut impl Read, mut file: &File) -> Result<(), ExtractError> {
    let (full, to_write) = mpsc::sync_channel::<(Vec<u8>, usize)>(QUEUE);
    let (empty, to_fill) = mpsc::sync_channel::<Vec<u8>>(QUEUE);
    let (read, written) = std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            for (piece, n) in to_write {
                file.write_all(&piece[..n])?;
                // Nobody may want it any more.
                let _ = empty.try_send(piece);
            }
            Ok(())
        });
        let read = loop {
            let mut piece = to_fill.try_recv().unwrap_or_else(|_| vec![0; PIECE]);
            match content.read(&mut piece) {
                Ok(0) => break Ok(()),
                Ok(n) => {
                    // A writer that failed says why.
                    if full.send((piece, n)).is_err() {
                        break Ok(());
                    }
                }
                Err(e) => break Err(ReadError::of_stream(&entry.path, e)),
            }
        };
        drop(full);
        (read, writer.join().unwrap_or_else(|_| Err(io::Error::other("the writing thread ended"))))
    });
    read?;
    written.map_err(|source| ExtractError::Io { entry: entry.name(), what: "writing it", source })
}

fn io(entry: &Entry, what: &'static str) -> impl FnOnce(io::Error) -> ExtractError + use<> {
    let entry = entry.name();
    move |source| ExtractError::Io { entry, what, source }
}

fn not_placed(entry: &Entry, e: io::Error) -> ExtractError {
    match e.kind() {
        io::ErrorKind::AlreadyExists => ExtractError::Exists(entry.name()),
        _ => io(entry, "giving it its name")(e),
    }
}

fn there(parent: &OwnedFd, name: &CString) -> io::Result<Option<FileType>> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn times(entry: &Entry) -> Timestamps {
    let time = Timespec {
        tv_sec: (entry.mtime_ns / 1_000_000_000).cast_signed(),
        tv_nsec: (entry.mtime_ns % 1_000_000_000) as _,
    };
    Timestamps { last_access: time, last_modification: time }
}
