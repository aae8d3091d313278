//! A tar reader for hostile archives: ustar, pax, GNU long names and all sparse forms, with every size capped.
//!
//! Called by the unpacker and by the archive loader. Header fields are parsed by the `tar` crate; the walk over the
//! entries is ours because that crate reads extension headers of any size into memory and splits binary pax values
//! (security.capability) at newlines. Fails with [`TarError`]; keeps nothing on disk.

use std::io::{self, Read};

use tar::{EntryType, Header};

use super::pax::{decimal, parse_pax, pax_time};

/// Largest pax header or GNU long name in bytes.
pub const MAX_EXTENSION: u64 = 1 << 20;
/// Archives are made of blocks of so many bytes.
pub(super) const BLOCK: u64 = 512;

/// Why an archive can't be read on.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The source failed, or ended too early.
    #[error("reading the archive at byte {at} failed")]
    Io {
        /// Where in the uncompressed archive.
        at: u64,
        /// The failure.
        #[source]
        source: io::Error,
    },
    /// The archive breaks its own rules.
    #[error("archive is malformed at byte {at}: {why}")]
    Malformed {
        /// Where in the uncompressed archive.
        at: u64,
        /// What is wrong.
        why: String,
    },
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// Another name of a file.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A folder.
    Folder,
    /// A FIFO.
    Fifo,
}

/// A point in time: seconds since 1970 and nanoseconds.
pub type Time = (i64, u32);

/// One entry, with its extensions applied.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Kind.
    pub kind: Kind,
    /// Name as it stands in the archive.
    pub path: Vec<u8>,
    /// Target of a link, else empty.
    pub link: Vec<u8>,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Bytes of data in the archive.
    pub size: u64,
    /// Bytes of the file: more than `size` in sparse files.
    pub real_size: u64,
    /// Where the data goes (offset, length); None: all at once.
    pub runs: Option<Vec<(u64, u64)>>,
    /// Modification time.
    pub mtime: Time,
    /// Access time, if told.
    pub atime: Option<Time>,
    /// Major and minor of devices.
    pub device: (u32, u32),
    /// Extended attributes: names and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the data begins in the archive.
    pub offset: u64,
}

/// Reads entries one after another; their data through [`TarReader::read_data`].
pub struct TarReader<R> {
    inner: R,
    pub(super) at: u64,
    /// Data of the present entry that was not read yet, then padding.
    pub(super) left: u64,
    padding: u64,
}

/// Extensions that describe the next entry.
#[derive(Default)]
pub(super) struct Extensions {
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pub(super) pax: Vec<(Vec<u8>, Vec<u8>)>,
    seen: bool,
}

impl Extensions {
    pub(super) fn pax(&self, key: &str) -> Option<&[u8]> {
        self.pax.iter().rev().find(|(k, _)| k == key.as_bytes()).map(|(_, v)| v.as_slice())
    }
}

impl<R: Read> TarReader<R> {
    /// Starts at the first header.
    pub fn new(inner: R) -> Self {
        Self { inner, at: 0, left: 0, padding: 0 }
    }

    /// Bytes read from the source so far.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The source, positioned after what was read.
    pub fn into_inner(self) -> R {
        self.inner
    }

    pub(super) fn malformed(&self, why: impl Into<String>) -> TarError {
        TarError::Malformed { at: self.at, why: why.into() }
    }

    /// Reads `buffer` full; false at a clean end before its first byte.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<bool, TarError> {
        let mut got = 0;
        while got < buffer.len() {
            match self.inner.read(&mut buffer[got..]) {
                Ok(0) if got == 0 => return Ok(false),
                Ok(0) => {
                    return Err(TarError::Io { at: self.at, source: io::ErrorKind::UnexpectedEof.into() });
                }
                Ok(n) => {
                    got += n;
                    self.at += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TarError::Io { at: self.at, source }),
            }
        }
        Ok(true)
    }

    pub(super) fn fill_all(&mut self, buffer: &mut [u8]) -> Result<(), TarError> {
        if buffer.is_empty() || self.fill(buffer)? {
            Ok(())
        } else {
            Err(TarError::Io { at: self.at, source: io::ErrorKind::UnexpectedEof.into() })
        }
    }

    /// Next piece of the present entry's data; 0 at its end.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        loop {
            match self.inner.read(&mut buffer[..want]) {
                Ok(0) => return Err(TarError::Io { at: self.at, source: io::ErrorKind::UnexpectedEof.into() }),
                Ok(n) => {
                    self.at += n as u64;
                    self.left -= n as u64;
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TarError::Io { at: self.at, source }),
            }
        }
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        let mut buffer = [0_u8; 8192];
        self.left = self.left.checked_add(self.padding).ok_or_else(|| self.malformed("sizes overflow"))?;
        self.padding = 0;
        while self.read_data(&mut buffer)? > 0 {}
        Ok(())
    }

    fn begin_data(&mut self, size: u64) {
        self.left = size;
        self.padding = (BLOCK - size % BLOCK) % BLOCK;
    }

    fn read_extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENSION {
            return Err(self.malformed(format!("an extension header of {size} bytes (limit {MAX_EXTENSION})")));
        }
        let mut data = vec![0; usize::try_from(size).unwrap_or(usize::MAX)];
        self.begin_data(size);
        self.left = 0;
        self.fill_all(&mut data)?;
        self.skip_rest()?;
        Ok(data)
    }

    /// The next entry; None at the end of the archive. The former entry's unread data is skipped.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_rest()?;
        let mut extensions = Extensions::default();
        loop {
            let mut header = Header::new_old();
            if !self.fill(header.as_mut_bytes())? || header.as_bytes().iter().all(|b| *b == 0) {
                if extensions.seen {
                    return Err(self.malformed("it ends after an extension header"));
                }
                return Ok(None);
            }
            self.check_sum(&header)?;
            let kind = header.entry_type();
            let size = header.entry_size().map_err(|e| self.malformed(e.to_string()))?;
            match kind {
                EntryType::GNULongName | EntryType::GNULongLink => {
                    let mut name = self.read_extension(size)?;
                    if name.last() == Some(&0) {
                        name.pop();
                    }
                    let slot = if kind == EntryType::GNULongName {
                        &mut extensions.long_path
                    } else {
                        &mut extensions.long_link
                    };
                    if slot.replace(name).is_some() {
                        return Err(self.malformed("two long names for one entry"));
                    }
                    extensions.seen = true;
                }
                EntryType::XHeader => {
                    if !extensions.pax.is_empty() {
                        return Err(self.malformed("two pax headers for one entry"));
                    }
                    let data = self.read_extension(size)?;
                    extensions.pax = parse_pax(&data).ok_or_else(|| self.malformed("a pax header is malformed"))?;
                    extensions.seen = true;
                }
                // Comments, for instance a git commit; other tools apply nothing of it to layers either.
                EntryType::XGlobalHeader => {
                    self.read_extension(size)?;
                }
                _ => return self.entry(&header, &extensions).map(Some),
            }
        }
    }

    fn check_sum(&self, header: &Header) -> Result<(), TarError> {
        let bytes = header.as_bytes();
        let told = header.cksum().map_err(|e| self.malformed(e.to_string()))?;
        let outside = bytes[..148].iter().chain(&bytes[156..]);
        let unsigned: u32 = outside.clone().map(|b| u32::from(*b)).sum::<u32>() + 8 * 32;
        // Some old tars summed signed bytes.
        let signed: i64 = outside.map(|b| i64::from(*b as i8)).sum::<i64>() + 8 * 32;
        if told == unsigned || i64::from(told) == signed {
            Ok(())
        } else {
            Err(self.malformed("a header's checksum does not fit"))
        }
    }

    fn entry(&mut self, header: &Header, extensions: &Extensions) -> Result<Entry, TarError> {
        let path = match (&extensions.long_path, extensions.pax("path")) {
            (Some(path), _) => path.clone(),
            (None, Some(path)) => path.to_vec(),
            (None, None) => header.path_bytes().into_owned(),
        };
        let link = match (&extensions.long_link, extensions.pax("linkpath")) {
            (Some(link), _) => link.clone(),
            (None, Some(link)) => link.to_vec(),
            (None, None) => header.link_name_bytes().unwrap_or_default().into_owned(),
        };
        let sparse = header.entry_type() == EntryType::GNUSparse;
        let kind = match header.entry_type() {
            // Before POSIX a folder was a file whose name ends in a slash.
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => Kind::Folder,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
            EntryType::Link => Kind::HardLink,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Char => Kind::CharDevice,
            EntryType::Block => Kind::BlockDevice,
            EntryType::Directory => Kind::Folder,
            EntryType::Fifo => Kind::Fifo,
            other => return Err(self.malformed(format!("an entry of the unknown type {:#04x}", other.as_byte()))),
        };
        let number = |key: &str, own: io::Result<u64>| match extensions.pax(key) {
            Some(text) => decimal(text).ok_or_else(|| self.malformed(format!("pax value {key} is no number"))),
            None => own.map_err(|e| self.malformed(e.to_string())),
        };
        // Only files have data; sizes that other kinds claim are ignored, as other readers of layers do.
        let size = if kind == Kind::File { number("size", header.entry_size())? } else { 0 };
        let time = |key: &str| match extensions.pax(key) {
            Some(text) => pax_time(text).map(Some).ok_or_else(|| self.malformed(format!("pax value {key} is no time"))),
            None => Ok(None),
        };
        let mtime = time("mtime")?
            .unwrap_or_else(|| header.mtime().ok().and_then(|s| s.try_into().ok()).map_or((0, 0), |s| (s, 0)));
        let device = if matches!(kind, Kind::CharDevice | Kind::BlockDevice) {
            let part = |own: io::Result<Option<u32>>| {
                own.map(Option::unwrap_or_default).map_err(|e| self.malformed(e.to_string()))
            };
            (part(header.device_major())?, part(header.device_minor())?)
        } else {
            (0, 0)
        };
        let xattrs = extensions
            .pax
            .iter()
            .filter_map(|(k, v)| k.strip_prefix(b"SCHILY.xattr.").map(|name| (name.to_vec(), v.clone())))
            .collect();
        let mut entry = Entry {
            kind,
            path,
            link,
            mode: header.mode().map_err(|e| self.malformed(e.to_string()))? & 0o7777,
            uid: number("uid", header.uid())?,
            gid: number("gid", header.gid())?,
            size,
            real_size: size,
            runs: None,
            mtime,
            atime: time("atime")?,
            device,
            xattrs,
            offset: self.at,
        };
        self.begin_data(size);
        if sparse {
            self.gnu_sparse(header, &mut entry)?;
        } else if kind == Kind::File && extensions.pax.iter().any(|(k, _)| k.starts_with(b"GNU.sparse.")) {
            self.pax_sparse(extensions, &mut entry)?;
        }
        entry.offset = self.at;
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn garbage_never_panics(data in prop::collection::vec(any::<u8>(), 0..2048)) {
            let mut reader = TarReader::new(data.as_slice());
            while let Ok(Some(_)) = reader.next_entry() {}
        }

        /// Headers that pass their checksum reach the code behind it.
        #[test]
        fn mutated_headers_never_panic(changes in prop::collection::vec((0_usize..512, any::<u8>()), 0..12), kind in any::<u8>()) {
            let mut header = Header::new_gnu();
            header.set_path("a").expect("path");
            header.set_size(3);
            for (at, value) in changes {
                header.as_mut_bytes()[at] = value;
            }
            header.as_mut_bytes()[156] = kind;
            header.set_cksum();
            let mut data = header.as_bytes().to_vec();
            data.extend_from_slice(&[b'1'; 1024]);
            let mut reader = TarReader::new(data.as_slice());
            while let Ok(Some(_)) = reader.next_entry() {}
        }
    }
}
