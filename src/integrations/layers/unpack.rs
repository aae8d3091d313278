//! Unpacks a layer's tar into a folder, trusting nothing in it.
//!
//! Called by the layer stores on a blocking thread. Names can't leave the folder (`utils::beneath`), links are kept as
//! they are and never followed out, counts and sizes are capped. Whiteouts become what overlayfs wants, or are carried
//! out on the spot where layers are clones of their parent. Fails with [`UnpackError`] naming the entry; what was
//! unpacked until then stays for the caller to remove.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::CString;
use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode};
use rustix::io::Errno;

use super::tar::{Entry, Kind, TarError, TarReader, Time};
use super::whiteout::is_whiteout;
use super::write;
use crate::core::error::{Error, Kind as ErrorKind};
use crate::core::ports::Usage;
use crate::utils::beneath::{Root, remove_at};

/// Marks what the parent layers have and this one has not.
const WHITEOUT: &[u8] = b".wh.";
/// Marks a folder whose content in the parent layers is hidden.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Bookkeeping of an old storage driver that got into some layers; means nothing.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// Bytes of names kept in memory for what is done at the end: of folders, and where layers are clones of their parents of all
/// that the layer made.
const MAX_REMEMBERED: usize = 32 << 20;
const MAX_REMEMBERED_ALL: usize = 256 << 20;
/// Bytes that may follow the archive's end: padding, of which some tools write a mebibyte.
const MAX_TAIL: u64 = 64 << 20;

/// What to do with whiteouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whiteouts {
    /// Write overlayfs's own: character devices 0/0 and `trusted.overlay.opaque`. For a folder per layer.
    Overlay,
    /// Remove what they name, unless this layer made it. For a folder that began as a copy of the parent.
    Apply,
}

/// What a layer may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries, with folders made for entries whose own is missing.
    pub entries: u64,
    /// Bytes of file data.
    pub bytes: u64,
    /// Bytes of a name with its folders.
    pub path: usize,
    /// Folders in a name.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 2_000_000, bytes: 128 << 30, path: 4096, depth: 256 }
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Unpacked {
    /// File data and inodes.
    pub usage: Usage,
    /// Folders that had no entry of their own, parents first: their attributes are the parent layers' to tell.
    pub implicit: BTreeSet<PathBuf>,
    /// The root folder had an entry.
    pub root_given: bool,
}

/// Why a layer can't be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The archive can't be read.
    #[error("layer can't be read")]
    Archive(#[from] TarError),
    /// An entry that no layer may have.
    #[error("layer entry {entry}: {why}")]
    Refused {
        /// Its name, quoted.
        entry: Name,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The file system refused.
    #[error("layer entry {entry}: {what} failed")]
    Io {
        /// Its name, quoted.
        entry: Name,
        /// The step.
        what: &'static str,
        /// The failure.
        #[source]
        source: io::Error,
    },
    /// More than a layer may hold.
    #[error("layer has more than {limit} {what}")]
    Limit {
        /// The limit.
        limit: u64,
        /// Of what.
        what: &'static str,
    },
}

/// An entry's name for messages: quoted, control characters escaped, cut at 200 characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(String);

impl From<&[u8]> for Name {
    fn from(name: &[u8]) -> Self {
        Self(String::from_utf8_lossy(name).chars().take(200).collect())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl From<UnpackError> for Error {
    fn from(e: UnpackError) -> Self {
        let kind = match &e {
            UnpackError::Archive(TarError::Io { source, .. })
                if !matches!(source.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData) =>
            {
                ErrorKind::Internal
            }
            UnpackError::Io { source, .. } => match source.raw_os_error() {
                Some(code) => Error::io("", io::Error::from_raw_os_error(code)).kind(),
                None => ErrorKind::Internal,
            },
            _ => ErrorKind::InvalidArgument,
        };
        Error::because(kind, "unpacking failed", e)
    }
}

/// Unpacks `source` into the folder `root`, reading it to its end. See the module's words.
pub fn unpack(root: &Path, source: impl Read, whiteouts: Whiteouts, limits: &Limits) -> Result<Unpacked, UnpackError> {
    let root = Root::open(root).map_err(|source| UnpackError::Io {
        entry: Name("/".into()),
        what: "opening the layer's folder",
        source,
    })?;
    unpack_in(root, source, whiteouts, limits, None).map(|(unpacked, _)| unpacked)
}

/// What an unpacker without CAP_SYS_ADMIN and /proc leaves to the one who asked it.
#[derive(Debug, Default)]
pub(super) struct Later {
    /// Folders to be marked opaque for overlayfs.
    pub opaque: BTreeSet<PathBuf>,
    /// Extended attributes to be set.
    pub attributes: BTreeMap<PathBuf, write::Refused>,
}

/// The work of [`unpack`]; with `later` what needs more than the capabilities for files is noted and not done.
pub(super) fn unpack_in(
    root: Root,
    source: impl Read,
    whiteouts: Whiteouts,
    limits: &Limits,
    later: Option<Later>,
) -> Result<(Unpacked, Option<Later>), UnpackError> {
    let mut unpacker = Unpacker {
        root,
        whiteouts,
        later,
        limits: *limits,
        result: Unpacked::default(),
        entries: 0,
        remembered: 0,
        parent: None,
        replaced: false,
        folders: Vec::new(),
        made: HashSet::new(),
        buffer: vec![0; 256 << 10],
    };
    let left = limits.bytes.saturating_mul(2).saturating_add(2 * MAX_TAIL);
    let mut reader = TarReader::new(Capped { inner: source, left });
    while let Some(entry) = reader.next_entry()? {
        unpacker.count(1)?;
        unpacker.entry(&mut reader, &entry)?;
    }
    unpacker.finish_folders()?;
    drain(reader, &mut unpacker.buffer)?;
    Ok((unpacker.result, unpacker.later))
}

/// What follows the archive's end is padding, but digests count it.
fn drain<R: Read>(reader: TarReader<R>, buffer: &mut [u8]) -> Result<(), UnpackError> {
    let end = reader.position();
    let (mut at, mut source) = (end, reader.into_inner());
    loop {
        match source.read(buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => at += n as u64,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(TarError::Io { at, source }.into()),
        }
        if at - end > MAX_TAIL {
            return Err(UnpackError::Limit { limit: MAX_TAIL, what: "bytes behind its end" });
        }
    }
}

/// A layer's archive up to the largest size that one can have: extension headers are bytes without entries.
struct Capped<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Capped<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        match self.left.checked_sub(n as u64) {
            Some(left) => self.left = left,
            None => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the archive is too large for what may be in it",
                ));
            }
        }
        Ok(n)
    }
}

pub(super) struct Unpacker {
    pub(super) root: Root,
    pub(super) whiteouts: Whiteouts,
    pub(super) later: Option<Later>,
    limits: Limits,
    pub(super) result: Unpacked,
    entries: u64,
    remembered: usize,
    /// The folder of the last entry: most entries follow their siblings.
    parent: Option<(PathBuf, OwnedFd)>,
    /// The present entry removed something.
    pub(super) replaced: bool,
    /// Folders whose times are set at the end, when nothing touches them any more.
    folders: Vec<(PathBuf, Option<Time>, Time)>,
    /// With [`Whiteouts::Apply`]: what this layer made.
    pub(super) made: HashSet<PathBuf>,
    buffer: Vec<u8>,
}

impl Unpacker {
    fn count(&mut self, more: u64) -> Result<(), UnpackError> {
        self.entries += more;
        if self.entries > self.limits.entries {
            return Err(UnpackError::Limit { limit: self.limits.entries, what: "entries" });
        }
        Ok(())
    }

    fn remember(&mut self, path: &Path) -> Result<(), UnpackError> {
        self.remembered += path.as_os_str().len() + 64;
        self.not_too_much()
    }

    fn not_too_much(&self) -> Result<(), UnpackError> {
        let limit = match self.whiteouts {
            Whiteouts::Overlay => MAX_REMEMBERED,
            Whiteouts::Apply => MAX_REMEMBERED_ALL,
        };
        if self.remembered > limit {
            return Err(UnpackError::Limit { limit: limit as u64, what: "bytes of names to be kept in mind" });
        }
        Ok(())
    }

    fn entry<R: Read>(&mut self, reader: &mut TarReader<R>, entry: &Entry) -> Result<(), UnpackError> {
        let path = clean(&entry.path, &self.limits)
            .map_err(|why| UnpackError::Refused { entry: entry.path.as_slice().into(), why })?;
        let Some(name) = path.file_name().map(|n| n.as_bytes().to_vec()) else { return self.root_entry(entry) };
        let io = |what| move |source: io::Error| UnpackError::Io { entry: entry.path.as_slice().into(), what, source };
        let refuse = |why| UnpackError::Refused { entry: entry.path.as_slice().into(), why };
        if name.starts_with(WHITEOUT_META) && name != OPAQUE {
            return Ok(());
        }
        let parent_path = path.parent().unwrap_or(Path::new("")).to_path_buf();
        let parent = match self.parent.take() {
            Some((cached, fd)) if cached == parent_path => fd,
            _ => self.make_parents(&parent_path).map_err(io("making its folder"))?,
        };
        self.count(0)?;
        self.not_too_much()?;
        if name == OPAQUE {
            self.opaque(&parent_path, &parent).map_err(io("making its folder opaque"))?;
        } else if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(refuse("a whiteout of no name"));
            }
            self.whiteout(&parent_path, &parent, hidden).map_err(io("writing the whiteout"))?;
        } else {
            let name = CString::new(name).map_err(|_| refuse("its name holds a NUL"))?;
            self.place(reader, entry, &path, &parent, &name)?;
            if self.whiteouts == Whiteouts::Apply {
                self.remember(&path)?;
                self.made.insert(path);
            }
            self.result.usage.inodes += u64::from(entry.kind != Kind::HardLink);
        }
        // What was replaced may have been part of the way to that folder.
        if !std::mem::take(&mut self.replaced) {
            self.parent = Some((parent_path, parent));
        }
        Ok(())
    }

    /// The entry `./`: attributes of the layer's root.
    fn root_entry(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        let name = || Name::from(entry.path.as_slice());
        if entry.kind != Kind::Folder {
            return Err(UnpackError::Refused { entry: name(), why: "the root can only be a folder" });
        }
        let io = |source| UnpackError::Io { entry: name(), what: "setting its attributes", source };
        let fd = self.root.open_at(".", fs::OFlags::RDONLY | fs::OFlags::DIRECTORY, Mode::empty()).map_err(io)?;
        let refused = write::attributes_fd(fd.as_fd(), entry).map_err(|e| e.at(entry))?;
        self.leave(Path::new(""), refused)?;
        self.result.root_given = true;
        self.folders.push((PathBuf::new(), entry.atime, entry.mtime));
        Ok(())
    }

    /// Opens the folder for an entry, making what is missing.
    fn make_parents(&mut self, path: &Path) -> io::Result<OwnedFd> {
        loop {
            let mut made = Vec::new();
            let done = self.root.mkdir_all(path, 0o755, &mut |p| made.push(p.to_path_buf()));
            for folder in made {
                self.entries += 1;
                self.remembered += folder.as_os_str().len() + 64;
                self.result.usage.inodes += 1;
                let fd = self.root.open_at(&folder, fs::OFlags::RDONLY | fs::OFlags::DIRECTORY, Mode::empty())?;
                fs::fchmod(&fd, Mode::from_raw_mode(0o755))?;
                if self.whiteouts == Whiteouts::Apply {
                    self.made.insert(folder.clone());
                }
                self.result.implicit.insert(folder);
            }
            match done {
                Err(e) if e.kind() == io::ErrorKind::NotADirectory && self.unhide(path)? => {}
                done => return done,
            }
        }
    }

    /// Makes what the entry says in the open folder `parent`, over whatever is there.
    fn place<R: Read>(
        &mut self,
        reader: &mut TarReader<R>,
        entry: &Entry,
        path: &Path,
        parent: &OwnedFd,
        name: &CString,
    ) -> Result<(), UnpackError> {
        let io = |what| move |source: io::Error| UnpackError::Io { entry: entry.path.as_slice().into(), what, source };
        match entry.kind {
            Kind::Folder => {
                self.folder(path, parent, name).map_err(io("making the folder"))?;
                let refused = write::folder_attributes(parent.as_fd(), name, entry).map_err(|e| e.at(entry))?;
                self.leave(path, refused)?;
                self.result.implicit.remove(path);
                self.remember(path)?;
                self.folders.push((path.to_path_buf(), entry.atime, entry.mtime));
            }
            Kind::File => {
                let left = self.limits.bytes.saturating_sub(self.result.usage.bytes);
                // A hole takes no space here, but in every copy that knows none.
                if entry.size.max(entry.real_size) > left {
                    return Err(UnpackError::Limit { limit: self.limits.bytes, what: "bytes of files" });
                }
                let file = self
                    .over(parent, name, || crate::utils::beneath::create_file_at(parent.as_fd(), name, 0o600))
                    .map_err(io("making the file"))?;
                write::data(&file, reader, entry, &mut self.buffer)?;
                self.result.usage.bytes += entry.size;
                let refused = write::attributes_fd(file.as_fd(), entry).map_err(|e| e.at(entry))?;
                self.leave(path, refused)?;
                write::times_fd(file.as_fd(), entry.atime, entry.mtime).map_err(io("setting its times"))?;
            }
            Kind::HardLink => {
                let target = clean(&entry.link, &self.limits).map_err(|_| UnpackError::Refused {
                    entry: entry.path.as_slice().into(),
                    why: "its hard link leads out of the layer",
                })?;
                if target == path {
                    return Ok(());
                }
                let (from, from_name) = self.root.open_parent(&target).map_err(io("finding its hard link's target"))?;
                let stat = fs::statat(&from, &from_name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|e| io("finding its hard link's target")(e.into()))?;
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    return Err(UnpackError::Refused {
                        entry: entry.path.as_slice().into(),
                        why: "a hard link to a folder",
                    });
                }
                self.over(parent, name, || Ok(fs::linkat(&from, &from_name, parent, name, AtFlags::empty())?))
                    .map_err(io("making the hard link"))?;
            }
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.contains(&0) || entry.link.len() > self.limits.path {
                    return Err(UnpackError::Refused {
                        entry: entry.path.as_slice().into(),
                        why: "a symbolic link to no possible name",
                    });
                }
                self.over(parent, name, || Ok(fs::symlinkat(entry.link.as_slice(), parent, name)?))
                    .map_err(io("making the symbolic link"))?;
                self.node(entry, path, parent, name)?;
            }
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                let kind = match entry.kind {
                    Kind::CharDevice => FileType::CharacterDevice,
                    Kind::BlockDevice => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = fs::makedev(entry.device.0, entry.device.1);
                self.over(parent, name, || Ok(fs::mknodat(parent, name, kind, Mode::from_raw_mode(0o600), device)?))
                    .map_err(io("making the node"))?;
                self.node(entry, path, parent, name)?;
            }
        }
        Ok(())
    }

    fn node(&mut self, entry: &Entry, path: &Path, parent: &OwnedFd, name: &CString) -> Result<(), UnpackError> {
        let later = self.later.is_some();
        let refused = write::node_attributes(parent.as_fd(), name, entry, later).map_err(|e| e.at(entry))?;
        self.leave(path, refused)
    }

    /// Notes attributes for the one who may set them; without one they are lost, as with other tools.
    fn leave(&mut self, path: &Path, refused: write::Refused) -> Result<(), UnpackError> {
        let size: usize = refused.iter().map(|(name, value)| name.len() + value.len() + 64).sum();
        let Some(later) = &mut self.later else { return Ok(()) };
        // What an earlier entry of this name had is gone with it.
        later.attributes.remove(path);
        if refused.is_empty() {
            return Ok(());
        }
        later.attributes.insert(path.to_path_buf(), refused);
        self.remembered += size;
        self.remember(path)
    }

    /// Makes something new with `make`; what is there under its name goes first.
    fn over<T>(&mut self, parent: &OwnedFd, name: &CString, make: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match make() {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                self.replaced = true;
                remove_at(parent.as_fd(), name)?;
                make()
            }
            done => done,
        }
    }

    fn folder(&mut self, path: &Path, parent: &OwnedFd, name: &CString) -> io::Result<()> {
        match fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
            Err(Errno::EXIST) => {}
            done => return Ok(done?),
        }
        let stat = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Ok(());
        }
        if self.whiteouts == Whiteouts::Overlay && is_whiteout(parent, name)? {
            return self.folder_over_whiteout(path, parent, name);
        }
        self.replaced = true;
        fs::unlinkat(parent, name, AtFlags::empty())?;
        Ok(fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?)
    }

    fn finish_folders(&mut self) -> Result<(), UnpackError> {
        for (path, atime, mtime) in std::mem::take(&mut self.folders) {
            let io = |source| UnpackError::Io {
                entry: path.as_os_str().as_bytes().into(),
                what: "setting its times",
                source,
            };
            let flags = fs::OFlags::RDONLY | fs::OFlags::DIRECTORY | fs::OFlags::NOFOLLOW;
            match self.root.open_at(&path, flags, Mode::empty()) {
                Ok(fd) => write::times_fd(fd.as_fd(), atime, mtime).map_err(io)?,
                // A later entry put something else in its place.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => {}
                Err(e) => return Err(io(e)),
            }
        }
        Ok(())
    }
}

/// A name as a path inside the layer; empty is the layer's root. A leading slash means that root: some builders
/// write all their names so.
fn clean(name: &[u8], limits: &Limits) -> Result<PathBuf, &'static str> {
    if name.is_empty() {
        return Err("it has no name");
    }
    if name.contains(&0) {
        return Err("its name holds a NUL");
    }
    if name.len() > limits.path {
        return Err("its name is too long");
    }
    let mut path = PathBuf::new();
    let mut depth = 0;
    for part in name.split(|b| *b == b'/') {
        match part {
            b"" | b"." => continue,
            b".." => return Err("its name leads out with '..'"),
            _ if part.len() > 255 => return Err("a part of its name is longer than 255 bytes"),
            _ => path.push(std::ffi::OsStr::from_bytes(part)),
        }
        depth += 1;
        if depth > limits.depth {
            return Err("it lies too deep");
        }
    }
    Ok(path)
}
