//! A container that holds a plain root file system, as the tar of a layer.
//!
//! Called by the image store. The tar is made while it is read and is the same each time: entries in their order, owners
//! 0:0 (the format keeps none), times in seconds. Fails like reading the content does.

use std::io::{self, Read};
use std::sync::Arc;

use super::format::Kind;
use super::reader::{Container, Content};

/// Block of a tar.
const BLOCK: u64 = 512;

/// The tar as a stream.
pub struct RootfsTar {
    container: Arc<Container>,
    /// The folder that is the root, with a slash at its end; or nothing.
    prefix: Vec<u8>,
    next: usize,
    /// Headers, padding, or the end.
    pending: io::Cursor<Vec<u8>>,
    content: Option<Content>,
    padding: u64,
    ended: bool,
}

impl RootfsTar {
    /// From the beginning; what is not below `prefix` is left out.
    pub fn new(container: Arc<Container>, prefix: &[u8]) -> Self {
        let prefix = prefix.to_vec();
        Self { container, prefix, next: 0, pending: io::Cursor::default(), content: None, padding: 0, ended: false }
    }

    /// The headers of the next entry, or the end.
    fn advance(&mut self) -> io::Result<()> {
        let Some(entry) = self.container.entries().get(self.next) else {
            self.ended = true;
            self.pending = io::Cursor::new(vec![0; 2 * BLOCK as usize]);
            return Ok(());
        };
        self.next += 1;
        let Some(path) = entry.path.strip_prefix(self.prefix.as_slice()) else { return Ok(()) };
        let mut out = Vec::with_capacity(BLOCK as usize);
        let mut header = tar::Header::new_gnu();
        header.set_mode(entry.mode & 0o7777);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(entry.mtime_ns / 1_000_000_000);
        header.set_size(0);
        let mut path = path.to_vec();
        match entry.kind() {
            Kind::File => {
                header.set_entry_type(tar::EntryType::Regular);
                header.set_size(entry.orig_size);
                self.content = Some(self.container.content(entry)?);
                self.padding = (BLOCK - entry.orig_size % BLOCK) % BLOCK;
            }
            Kind::Folder => {
                header.set_entry_type(tar::EntryType::Directory);
                path.push(b'/');
            }
            Kind::Symlink => {
                header.set_entry_type(tar::EntryType::Symlink);
                let target = self.container.target(entry)?;
                put_name(&mut out, &mut header.as_old_mut().linkname, &target, tar::EntryType::GNULongLink)?;
            }
        }
        put_name(&mut out, &mut header.as_old_mut().name, &path, tar::EntryType::GNULongName)?;
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        self.pending = io::Cursor::new(out);
        Ok(())
    }
}

/// Puts a name into its field; one that does not fit goes before, as GNU tar does it.
fn put_name(out: &mut Vec<u8>, field: &mut [u8; 100], name: &[u8], long: tar::EntryType) -> io::Result<()> {
    let fits = name.len().min(field.len());
    field[..fits].copy_from_slice(&name[..fits]);
    if name.len() <= field.len() {
        return Ok(());
    }
    let mut header = tar::Header::new_gnu();
    header.set_path("././@LongLink")?;
    header.set_entry_type(long);
    header.set_mode(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(name.len() as u64 + 1);
    header.set_cksum();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(name);
    let padded = (name.len() as u64 + 1).div_ceil(BLOCK) * BLOCK;
    out.resize(out.len() + (padded as usize - name.len()), 0);
    Ok(())
}

impl Read for RootfsTar {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            let n = self.pending.read(buffer)?;
            if n > 0 {
                return Ok(n);
            }
            if let Some(content) = &mut self.content {
                let n = content.read(buffer)?;
                if n > 0 {
                    return Ok(n);
                }
                self.content = None;
                self.pending = io::Cursor::new(vec![0; self.padding as usize]);
                continue;
            }
            if self.ended {
                return Ok(0);
            }
            self.advance()?;
        }
    }
}
