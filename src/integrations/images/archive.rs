//! Reads named files out of a folder, a tar archive or a BFC container, in any order, without unpacking it.
//!
//! Called by the loader, blocking. A compressed archive is expanded into a nameless temporary file first. Folders are
//! read beneath their root; archives are capped in entries. Fails with [`Error`] naming the archive and file.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{Mode, OFlags};

use crate::core::error::{Error, Kind, Result};
use crate::integrations::bfc::{Container, Kind as BfcKind};
use crate::integrations::layers::confined::Unpacker;
use crate::integrations::layers::pipeline::{Compression, detect};
use crate::integrations::layers::tar::{Kind as EntryKind, TarReader};
use crate::utils::beneath::Root;
use crate::utils::section::Section;

/// Most entries in an archive.
const MAX_ENTRIES: usize = 200_000;
/// Largest window of zstd of an archive, as a power of two: the one that its tool has if nobody says more.
const ARCHIVE_WINDOW: u32 = 27;
/// Most links from one name to another.
const MAX_LINKS: usize = 8;

/// A folder, archive or container with named files.
pub(super) enum Files {
    Folder(Utf8PathBuf, Root),
    Archive(Utf8PathBuf, Arc<File>, HashMap<String, Member>),
    /// With the folder in it that is the root, and a slash; or nothing.
    Bfc(Utf8PathBuf, Arc<Container>, String),
}

/// Where a file is in an archive.
pub(super) enum Member {
    Data(u64, u64),
    Link(String),
}

impl Files {
    /// Opens a folder.
    pub(super) fn folder(path: &Utf8Path) -> Result<Self> {
        let root = Root::open(path.as_std_path()).map_err(|e| open_error(path, e))?;
        Ok(Self::Folder(path.to_owned(), root))
    }

    /// Opens an archive; `scratch` is for expanding it.
    pub(super) fn archive(path: &Utf8Path, scratch: &Utf8Path, unpacker: &Unpacker) -> Result<Self> {
        let mut file = File::open(path).map_err(|e| open_error(path, e))?;
        let mut magic = [0; 4];
        let got = read_start(&mut file, &mut magic).map_err(|e| Error::io(path, e))?;
        let expanding = |e| Error::io(format!("expanding {path}"), e);
        let file = match detect(&magic[..got]) {
            how @ (Compression::Gzip | Compression::Zstd) => {
                let expanded = unpacker.decompress(how, ARCHIVE_WINDOW, Box::new(file));
                expanded.and_then(|data| expand(data, scratch)).map_err(expanding)?
            }
            _ => file,
        };
        let members = index(&file).map_err(|e| match e {
            IndexError::Io(e) => Error::io(format!("reading {path}"), e),
            IndexError::Bad(why) => Error::invalid(format!("{path} is no archive of images: {why}")),
        })?;
        Ok(Self::Archive(path.to_owned(), Arc::new(file), members))
    }

    /// The folder, archive or container.
    pub(super) fn path(&self) -> &Utf8Path {
        match self {
            Self::Folder(path, _) | Self::Archive(path, ..) | Self::Bfc(path, ..) => path,
        }
    }

    /// Opens a file: its size and its content.
    pub(super) fn open(&self, name: &str) -> Result<(u64, Box<dyn Read + Send>)> {
        let missing = || Error::not_found(format!("{} has no file {name}", self.path()));
        match self {
            Self::Folder(path, root) => {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK;
                let file = match root.open_at(name, flags, Mode::empty()) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(missing()),
                    opened => File::from(opened.map_err(|e| Error::io(format!("{path}: {name}"), e))?),
                };
                let meta = file.metadata().map_err(|e| Error::io(format!("{path}: {name}"), e))?;
                if !meta.is_file() {
                    return Err(Error::invalid(format!("{path}: {name} is not a file")));
                }
                Ok((meta.len(), Box::new(file)))
            }
            Self::Archive(_, file, members) => {
                let mut name = normal(name);
                for _ in 0..=MAX_LINKS {
                    match members.get(&name) {
                        Some(Member::Data(at, size)) => {
                            let section = Section::new(file.clone(), *at, *size);
                            return Ok((*size, Box::new(section)));
                        }
                        Some(Member::Link(target)) => name = target.clone(),
                        None => return Err(missing()),
                    }
                }
                Err(missing())
            }
            Self::Bfc(path, container, prefix) => {
                let inside = format!("{prefix}{}", normal(name));
                let entry = container.find(inside.as_bytes()).filter(|e| e.kind() == BfcKind::File);
                let entry = entry.ok_or_else(missing)?;
                // The index is not authenticated: whoever can write the file could put their own content in plain.
                if container.is_encrypted() && !entry.encrypted {
                    let why = format!("{path}: {name} is not encrypted, though the container is");
                    return Err(Error::new(Kind::PermissionDenied, why));
                }
                let content = container.content(entry).map_err(|e| Error::from(e).context(path.to_string()))?;
                Ok((entry.orig_size, Box::new(content)))
            }
        }
    }

    /// Reads a small file whole.
    pub(super) fn read(&self, name: &str, max: u64) -> Result<Vec<u8>> {
        let (size, reader) = self.open(name)?;
        if size > max {
            return Err(Error::invalid(format!("{}: {name} has {size} bytes (limit {max})", self.path())));
        }
        let mut data = Vec::new();
        reader.take(max).read_to_end(&mut data).map_err(|e| Error::io(format!("{}: {name}", self.path()), e))?;
        Ok(data)
    }
}

fn open_error(path: &Utf8Path, e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::NotFound => Error::because(Kind::NotFound, format!("{path} is not there"), e),
        _ => Error::io(format!("opening {path}"), e),
    }
}

fn read_start(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read(&mut buffer[got..])? {
            0 => break,
            n => got += n,
        }
    }
    file.seek(SeekFrom::Start(0))?;
    Ok(got)
}

/// Copies into a file without a name, which vanishes with its descriptor.
fn expand(mut source: impl Read, scratch: &Utf8Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::open(scratch.as_std_path(), flags, Mode::RUSR | Mode::WUSR)?);
    io::copy(&mut source, &mut file)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

enum IndexError {
    Io(io::Error),
    Bad(String),
}

fn index(file: &File) -> Result<HashMap<String, Member>, IndexError> {
    use crate::integrations::layers::tar::TarError;
    let mut members = HashMap::new();
    let mut input = file;
    input.seek(SeekFrom::Start(0)).map_err(IndexError::Io)?;
    let mut reader = TarReader::new(io::BufReader::with_capacity(256 << 10, input));
    loop {
        let entry = match reader.next_entry() {
            Ok(Some(entry)) => entry,
            Ok(None) => return Ok(members),
            Err(TarError::Io { source, .. }) if source.kind() != io::ErrorKind::UnexpectedEof => {
                return Err(IndexError::Io(source));
            }
            Err(e) => return Err(IndexError::Bad(e.to_string())),
        };
        if members.len() >= MAX_ENTRIES {
            return Err(IndexError::Bad(format!("more than {MAX_ENTRIES} entries")));
        }
        // Names that are no text are none that images refer to.
        let Ok(name) = String::from_utf8(entry.path.clone()) else { continue };
        let name = normal(&name);
        let member = match entry.kind {
            EntryKind::File if entry.runs.is_some() => return Err(IndexError::Bad(format!("{name:?} is sparse"))),
            EntryKind::File => Member::Data(entry.offset, entry.size),
            EntryKind::Symlink => {
                let Ok(target) = std::str::from_utf8(&entry.link) else { continue };
                let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
                Member::Link(if target.starts_with('/') {
                    normal(target)
                } else {
                    normal(&format!("{folder}/{target}"))
                })
            }
            EntryKind::HardLink => {
                let Ok(target) = std::str::from_utf8(&entry.link) else { continue };
                Member::Link(normal(target))
            }
            _ => continue,
        };
        members.insert(name, member);
    }
}

/// A name without `.`, `..` and empty parts. Names are only looked up, never opened.
fn normal(name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}
