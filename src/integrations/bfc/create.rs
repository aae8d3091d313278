//! Packs files and folders from disk into a container, as `bfc create` does.
//!
//! Called by the command line, blocking. Folders are read in the order of their names; links are packed as links and
//! never followed. What the format can't hold (devices, FIFOs, sockets) is left out of folders and told, and so is the
//! container; named as an input it is refused. Owners, extended attributes and hard links are lost. Fails with [`WriteError`]
//! naming the file.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use camino::Utf8Path;

use super::error::WriteError;
use super::format::Kind;
use super::writer::{WriteOptions, Writer};

/// What was packed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Created {
    /// Entries of it.
    pub entries: u64,
    /// Bytes of the container.
    pub size: u64,
    /// What was left out of folders: devices, FIFOs, sockets.
    pub skipped: Vec<PathBuf>,
    /// Where the container itself is among what was to be packed: left out, too.
    pub own: Vec<PathBuf>,
}

/// Packs `inputs`, each under its last name, into `target`. `added` hears of each entry.
pub fn create(
    target: &Utf8Path,
    inputs: &[PathBuf],
    options: WriteOptions,
    added: &mut dyn FnMut(&[u8], Kind),
) -> Result<Created, WriteError> {
    let mut writer = Writer::create(target, options)?;
    let mut created = Created::default();
    // Depth first, in order of names: a stack with the next one on top.
    let mut pending: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    for input in inputs.iter().rev() {
        pending.push((input.clone(), last_name(input)?));
    }
    while let Some((path, name)) = pending.pop() {
        let failed = || WriteError::io(format!("reading {path:?}"));
        let meta = std::fs::symlink_metadata(&path).map_err(failed())?;
        let mtime = mtime_ns(&meta);
        let kind = meta.file_type();
        let kind = if kind.is_dir() {
            writer.add_folder(&name, meta.mode(), mtime)?;
            let mut names = Vec::new();
            for entry in std::fs::read_dir(&path).map_err(failed())? {
                names.push(entry.map_err(failed())?.file_name());
            }
            names.sort_unstable_by(|a, b| b.cmp(a));
            pending.extend(names.into_iter().map(|n| {
                let inside = [name.as_slice(), b"/", n.as_bytes()].concat();
                (path.join(n), inside)
            }));
            Kind::Folder
        } else if kind.is_symlink() {
            let link = std::fs::read_link(&path).map_err(failed())?;
            writer.add_symlink(&name, link.as_os_str().as_bytes(), meta.mode(), mtime)?;
            Kind::Symlink
        } else if kind.is_file() && writer.is_own(&meta) {
            not_another_name(target, &path, inputs)?;
            created.own.push(path);
            continue;
        } else if kind.is_file() {
            let mut open = std::fs::OpenOptions::new();
            // It may be another kind of thing by now.
            let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
            let mut file = open.read(true).custom_flags(flags.bits().cast_signed()).open(&path).map_err(failed())?;
            let meta = file.metadata().map_err(failed())?;
            if !meta.is_file() {
                return Err(WriteError::Refused(format!("{path:?} has become another kind of file")));
            }
            writer.add_file(&name, meta.mode(), mtime_ns(&meta), meta.len(), &mut file)?;
            Kind::File
        } else if inputs.contains(&path) {
            return Err(WriteError::Refused(format!("{path:?}: no container can hold a device, FIFO or socket")));
        } else {
            created.skipped.push(path);
            continue;
        };
        created.entries += 1;
        added(&name, kind);
    }
    created.size = writer.finish()?;
    Ok(created)
}

/// The container that is replaced may lie among what is packed; an input that is the same file under another name would be lost.
fn not_another_name(target: &Utf8Path, path: &Path, inputs: &[PathBuf]) -> Result<(), WriteError> {
    let real = |path: &Path| std::fs::canonicalize(path).map_err(WriteError::io(format!("reading {path:?}")));
    let input = inputs.iter().any(|i| i == path);
    match input || real(path)? != real(target.as_std_path())? {
        true => {
            Err(WriteError::Refused(format!("{path:?} is the container {target} itself: it can't be packed into it")))
        }
        false => Ok(()),
    }
}

fn mtime_ns(meta: &std::fs::Metadata) -> u64 {
    let ns = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
    u64::try_from(ns).unwrap_or(0)
}

/// What an input is called inside: the last part of its path.
fn last_name(input: &Path) -> Result<Vec<u8>, WriteError> {
    let name = match input.file_name() {
        Some(name) => Some(name.to_owned()),
        // "." and "dir/..": by their real names.
        None => std::fs::canonicalize(input).ok().and_then(|p| p.file_name().map(OsStr::to_owned)),
    };
    let name = name.ok_or_else(|| WriteError::Refused(format!("{input:?} has no name of its own")))?;
    Ok(name.as_bytes().to_vec())
}
