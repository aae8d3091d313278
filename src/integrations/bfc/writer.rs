//! Writes containers: objects one after another, then index, footer and, last, the header.
//!
//! Called by [`super::create`] and by the image packer. Everything goes into a file without a name in the target's folder,
//! which is synced and gets its name when it is whole: until then, and after any failure, the target is what it was. Memory
//! is that of the entries' names and of one compression. Fails with [`WriteError`]; a crash leaves what `utils::newfile`
//! says.

use std::ffi::CString;
use std::fs::{File, Metadata, Permissions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use camino::{Utf8Path, Utf8PathBuf};
use sha2::{Digest as _, Sha256};

use super::crypt::{Key, KeySource, MAX_MESSAGE, NONCE, Sealer};
use super::error::{Name, WriteError};
use super::format::{
    BLOCK_SIZE, Checksum, Entry, FEATURE_AEAD, FEATURE_ZSTD, FOOTER, Footer, HEADER, Header, Kind, MAX_TARGET, is_path,
    padded,
};
use super::reader::MAX_ENTRIES;
use crate::utils::newfile::NewFile;

/// Bytes that are read and written at once.
const PIECE: usize = 256 << 10;
/// Files up to so many bytes are compressed in one go.
const SMALL: u64 = 256 << 10;
/// Of a larger file, so much is tried in mode `auto`.
const SAMPLE: usize = 64 << 10;

/// What is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compress {
    /// Nothing.
    #[default]
    Never,
    /// Everything that gets smaller by it.
    Always,
    /// What gets smaller by a twentieth at least, judged by a file's beginning.
    Auto,
}

/// How a container is written.
#[derive(Debug, Clone)]
pub struct WriteOptions {
    /// What is compressed.
    pub compress: Compress,
    /// zstd's level, 1 to 22.
    pub level: i32,
    /// Smaller files are stored as they are, in bytes.
    pub threshold: u64,
    /// Written into the header; nothing depends on it.
    pub block_size: u32,
    /// Encrypt all content of files.
    pub key: Option<KeySource>,
    /// The same content gives the same bytes: all times are this one (nanoseconds since 1970), the UUID comes from the
    /// content.
    pub deterministic: Option<u64>,
    /// Replace a file that is there.
    pub force: bool,
    /// Which checksum is written; the reference program on today's processors knows only `Raw`.
    pub checksum: Checksum,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            compress: Compress::Never,
            level: 3,
            threshold: 64,
            block_size: BLOCK_SIZE,
            key: None,
            deterministic: None,
            force: false,
            checksum: Checksum::Raw,
        }
    }
}

/// The file on its way, written in large pieces.
struct Out {
    new: NewFile,
    buffer: Vec<u8>,
    at: u64,
}

impl Out {
    fn position(&self) -> u64 {
        self.at + self.buffer.len() as u64
    }

    fn put(&mut self, data: &[u8]) -> io::Result<()> {
        if self.buffer.len() + data.len() > PIECE {
            self.flush()?;
        }
        if data.len() >= PIECE {
            self.new.file().write_all_at(data, self.at)?;
            self.at += data.len() as u64;
        } else {
            self.buffer.extend_from_slice(data);
        }
        Ok(())
    }

    fn pad(&mut self, count: u64) -> io::Result<()> {
        self.put(&[0; 16][..usize::try_from(count).unwrap_or(16).min(16)])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.new.file().write_all_at(&self.buffer, self.at)?;
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Goes back to `at`: what was written from there on is written over.
    fn back_to(&mut self, at: u64) -> io::Result<()> {
        self.flush()?;
        self.new.file().set_len(at)?;
        self.at = at;
        Ok(())
    }
}

/// A container that is being written.
pub struct Writer {
    out: Out,
    target: Utf8PathBuf,
    folder: File,
    name: CString,
    /// Device and inode of the file that is written, and of the one that it replaces.
    own: Vec<(u64, u64)>,
    options: WriteOptions,
    key: Option<Key>,
    salt: [u8; 32],
    entries: Vec<Entry>,
    features: u64,
    compressor: Option<zstd::bulk::Compressor<'static>>,
}

impl Writer {
    /// Begins a container that becomes `target` when [`Writer::finish`] is called.
    pub fn create(target: &Utf8Path, options: WriteOptions) -> Result<Self, WriteError> {
        if !(1..=22).contains(&options.level) {
            return Err(WriteError::Refused(format!("compression level {}: 1 to 22", options.level)));
        }
        if options.deterministic.is_some() && options.key.is_some() {
            let why = "an encrypted container can't be deterministic: the same nonce twice would give its content away";
            return Err(WriteError::Refused(why.into()));
        }
        let name = target.file_name().ok_or_else(|| WriteError::Refused(format!("{target} names no file")))?;
        let there = target.symlink_metadata();
        if there.as_ref().is_ok_and(|m| !m.is_file()) {
            return Err(WriteError::Refused(format!("{target} is there and no file")));
        }
        if there.is_ok() && !options.force {
            return Err(WriteError::Exists(target.to_string()));
        }
        let mut salt = [0; 32];
        let key = match &options.key {
            None => None,
            Some(source) => {
                if matches!(source, KeySource::Password(_)) {
                    random(&mut salt)?;
                }
                Some(source.key(&salt).map_err(|e| WriteError::Refused(e.chain()))?)
            }
        };
        let folder = match target.parent() {
            Some(folder) if !folder.as_str().is_empty() => folder,
            _ => Utf8Path::new("."),
        };
        let name = CString::new(name).map_err(|_| WriteError::Refused(format!("{target:?} is no name of a file")))?;
        let failed = || WriteError::io(format!("making a file in {folder}"));
        // Opened for the sync at the end: what can't be synced is better said now.
        let folder = File::open(folder).map_err(failed())?;
        let new = NewFile::create(folder.as_fd(), 0o666).map_err(failed())?;
        let mut own = vec![identity(&new.file().metadata().map_err(failed())?)];
        if let Ok(there) = &there {
            own.push(identity(there));
            // What only some may read does not become everybody's by being replaced.
            let mode = Permissions::from_mode(there.mode() & 0o777);
            new.file().set_permissions(mode).map_err(failed())?;
        }
        let features = if key.is_some() { FEATURE_AEAD } else { 0 };
        let features = if options.compress == Compress::Never { features } else { features | FEATURE_ZSTD };
        Ok(Self {
            out: Out { new, buffer: Vec::with_capacity(PIECE), at: HEADER as u64 },
            target: target.to_owned(),
            folder,
            name,
            own,
            options,
            key,
            salt,
            entries: Vec::new(),
            features,
            compressor: None,
        })
    }

    /// Whether this is the container itself, as it is written or as it was before.
    pub fn is_own(&self, file: &Metadata) -> bool {
        self.own.contains(&identity(file))
    }

    fn io(&self) -> impl FnOnce(io::Error) -> WriteError + use<> {
        WriteError::io(format!("writing {}", self.target))
    }

    fn entry(&self, path: &[u8], kind: Kind, mode: u32, mtime_ns: u64) -> Result<Entry, WriteError> {
        if !is_path(path) {
            return Err(WriteError::Refused(format!("{} is no path inside a container", Name::from(path))));
        }
        if self.entries.len() >= MAX_ENTRIES as usize {
            return Err(WriteError::Refused(format!("more than {MAX_ENTRIES} entries")));
        }
        Ok(Entry {
            path: path.into(),
            offset: self.out.position(),
            size: padded((super::format::OBJECT + path.len()) as u64),
            mode: (mode & 0o7777) | kind.mode_bits(),
            mtime_ns: self.options.deterministic.unwrap_or(mtime_ns),
            compressed: false,
            encrypted: false,
            orig_size: 0,
            crc: 0,
        })
    }

    /// Object header, name and padding.
    fn put_head(&mut self, entry: &Entry) -> Result<(), WriteError> {
        let used = (super::format::OBJECT + entry.path.len()) as u64;
        let io = self.io();
        self.out
            .put(&entry.object_header())
            .and_then(|()| self.out.put(&entry.path))
            .and_then(|()| self.out.pad(entry.content_at() - used))
            .map_err(io)
    }

    /// Adds a folder.
    pub fn add_folder(&mut self, path: &[u8], mode: u32, mtime_ns: u64) -> Result<(), WriteError> {
        let entry = self.entry(path, Kind::Folder, mode, mtime_ns)?;
        self.put_head(&entry)?;
        self.entries.push(entry);
        Ok(())
    }

    /// Adds a symbolic link that holds `target` as it is.
    pub fn add_symlink(&mut self, path: &[u8], target: &[u8], mode: u32, mtime_ns: u64) -> Result<(), WriteError> {
        let mut entry = self.entry(path, Kind::Symlink, mode, mtime_ns)?;
        let length = target.len() as u64;
        if length == 0 || length > MAX_TARGET || target.contains(&0) {
            return Err(WriteError::Refused(format!("{}: a link to {length} bytes", entry.name())));
        }
        entry.orig_size = length;
        entry.crc = self.options.checksum.of(target);
        entry.size += padded(length);
        self.put_head(&entry)?;
        let io = self.io();
        self.out.put(target).and_then(|()| self.out.pad(padded(length) - length)).map_err(io)?;
        self.entries.push(entry);
        Ok(())
    }

    /// Adds a file from something that can be read again: compressed where the options say so and it helps.
    /// `size` is what it is expected to have; a source that turns out to be shorter or longer is an error.
    pub fn add_file(
        &mut self,
        path: &[u8],
        mode: u32,
        mtime_ns: u64,
        size: u64,
        source: &mut (impl Read + Seek),
    ) -> Result<(), WriteError> {
        let wanted = self.options.compress != Compress::Never && size >= self.options.threshold.max(1);
        if size <= SMALL {
            return self.add_small(path, mode, mtime_ns, size, source, wanted);
        }
        let worth = match (wanted, self.options.compress) {
            (true, Compress::Auto) => {
                let mut sample = Vec::new();
                source.by_ref().take(SAMPLE as u64).read_to_end(&mut sample).map_err(of(path))?;
                source.seek(SeekFrom::Start(0)).map_err(of(path))?;
                let small = zstd::bulk::compress(&sample, 1).map_err(self.io())?;
                small.len() < sample.len() - sample.len() / 20
            }
            (wanted, _) => wanted,
        };
        if worth && self.stream(path, mode, mtime_ns, Some(size), source, true)? {
            return Ok(());
        }
        if worth {
            source.seek(SeekFrom::Start(0)).map_err(of(path))?;
        }
        self.stream(path, mode, mtime_ns, Some(size), source, false).map(drop)
    }

    /// Adds a file from a stream of unknown length, as it is. A source that fails leaves nothing of it: another one may be
    /// tried.
    pub fn add_stream(
        &mut self,
        path: &[u8],
        mode: u32,
        mtime_ns: u64,
        source: &mut dyn Read,
    ) -> Result<(), WriteError> {
        let at = self.out.position();
        let done = self.stream(path, mode, mtime_ns, None, source, false);
        if done.is_err() {
            let io = self.io();
            self.out.back_to(at).map_err(io)?;
        }
        done.map(drop)
    }

    fn add_small(
        &mut self,
        path: &[u8],
        mode: u32,
        mtime_ns: u64,
        size: u64,
        source: &mut impl Read,
        compress: bool,
    ) -> Result<(), WriteError> {
        let mut entry = self.entry(path, Kind::File, mode, mtime_ns)?;
        let mut data = Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1);
        source.take(size + 1).read_to_end(&mut data).map_err(of(path))?;
        if data.len() as u64 != size {
            return Err(changed(path));
        }
        entry.orig_size = size;
        entry.crc = self.options.checksum.of(&data);
        if compress {
            let level = self.options.level;
            let io = self.io();
            let compressor = match &mut self.compressor {
                Some(compressor) => compressor,
                none => none.insert(zstd::bulk::Compressor::new(level).map_err(self_io(&self.target))?),
            };
            let small = compressor.compress(&data).map_err(io)?;
            let enough = match self.options.compress {
                Compress::Auto => small.len() < data.len() - data.len() / 20,
                _ => small.len() < data.len(),
            };
            if enough {
                (entry.compressed, data) = (true, small);
            }
        }
        let mut nonce = [0; NONCE];
        let mut tag = None;
        if let Some(key) = &self.key {
            random(&mut nonce)?;
            let mut sealer = Sealer::new(key, &nonce, path);
            sealer.update(&mut data);
            tag = Some(sealer.finish());
            entry.encrypted = true;
        }
        entry.size += data.len() as u64 + if entry.encrypted { super::format::SEAL } else { 0 };
        self.put_head(&entry)?;
        let io = self.io();
        let out = &mut self.out;
        let done = (|| {
            if entry.encrypted {
                out.put(&nonce)?;
            }
            out.put(&data)?;
            tag.map_or(Ok(()), |tag| out.put(&tag))
        })();
        done.map_err(io)?;
        self.entries.push(entry);
        Ok(())
    }

    /// Content of any size. False: compressed it was not smaller, and nothing of it is in the container.
    fn stream(
        &mut self,
        path: &[u8],
        mode: u32,
        mtime_ns: u64,
        size: Option<u64>,
        source: &mut dyn Read,
        compress: bool,
    ) -> Result<bool, WriteError> {
        let mut entry = self.entry(path, Kind::File, mode, mtime_ns)?;
        entry.compressed = compress;
        entry.encrypted = self.key.is_some();
        // A place for the header, which is written when sizes and checksum are known.
        self.put_head(&entry)?;
        let mut nonce = [0; NONCE];
        let mut sealer = None;
        if let Some(key) = &self.key {
            random(&mut nonce)?;
            sealer = Some(Sealer::new(key, &nonce, path));
            let io = self.io();
            self.out.put(&nonce).map_err(io)?;
        }
        let io = || self_io(&self.target);
        let mut encoder = None;
        if compress {
            let mut made = zstd::stream::raw::Encoder::new(self.options.level).map_err(io())?;
            made.set_pledged_src_size(size).map_err(io())?;
            encoder = Some(made);
        }
        let mut sink = Sink { out: &mut self.out, sealer, text: 0 };
        let mut crc = self.options.checksum.begin();
        let mut buffer = vec![0; PIECE];
        let mut packed = vec![0; if compress { PIECE } else { 0 }];
        let mut read = 0_u64;
        loop {
            let n = match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(of(path)(e)),
            };
            read += n as u64;
            if size.is_some_and(|size| read > size) {
                return Err(changed(path));
            }
            crc.update(&buffer[..n]);
            match &mut encoder {
                None => sink.put(&mut buffer[..n]).map_err(io())?,
                Some(encoder) => compress_piece(encoder, &buffer[..n], &mut packed, &mut sink).map_err(io())?,
            }
            if compress && sink.text >= size.unwrap_or(u64::MAX) {
                break;
            }
            if sink.sealer.is_some() && sink.text > MAX_MESSAGE {
                return Err(WriteError::Refused(format!(
                    "{}: more than {MAX_MESSAGE} bytes can't be encrypted",
                    Name::from(path)
                )));
            }
        }
        let too_large = |text: u64| compress && text >= size.unwrap_or(u64::MAX);
        if !too_large(sink.text) {
            if size.is_some_and(|size| read != size) {
                return Err(changed(path));
            }
            if let Some(encoder) = &mut encoder {
                finish_frame(encoder, &mut packed, &mut sink).map_err(io())?;
            }
        }
        let (text, sealer) = (sink.text, sink.sealer.take());
        if too_large(text) {
            let at = entry.offset;
            self.out.back_to(at).map_err(io())?;
            return Ok(false);
        }
        if let Some(sealer) = sealer {
            self.out.put(&sealer.finish()).map_err(io())?;
        }
        entry.size = self.out.position() - entry.offset;
        entry.orig_size = read;
        entry.crc = crc.value();
        self.out
            .flush()
            .and_then(|()| self.out.new.file().write_all_at(&entry.object_header(), entry.offset))
            .map_err(io())?;
        self.entries.push(entry);
        Ok(true)
    }

    /// Writes index, footer and header, syncs, and puts the file in its place. Answers with its size in bytes.
    pub fn finish(mut self) -> Result<u64, WriteError> {
        self.entries.sort_by(|a, b| a.path.cmp(&b.path));
        if let Some(pair) = self.entries.windows(2).find(|pair| pair[0].path == pair[1].path) {
            return Err(WriteError::Refused(format!("{} would be in it twice", pair[0].name())));
        }
        let index_offset = self.out.position();
        let mut crc = self.options.checksum.begin();
        let mut content = Sha256::new();
        let mut piece = Vec::with_capacity(PIECE);
        piece.extend_from_slice(&1_u32.to_le_bytes());
        piece.extend_from_slice(&(self.entries.len() as u32).to_le_bytes());
        let io = || self_io(&self.target);
        for entry in &self.entries {
            entry.encode(&mut piece);
            if piece.len() >= PIECE / 2 {
                crc.update(&piece);
                content.update(&piece);
                self.out.put(&piece).map_err(io())?;
                piece.clear();
            }
        }
        crc.update(&piece);
        content.update(&piece);
        self.out.put(&piece).map_err(io())?;
        let index_size = self.out.position() - index_offset;
        let footer = Footer { index_size, index_crc: crc.value(), index_offset };
        self.out.put(&footer.encode()).and_then(|()| self.out.flush()).map_err(io())?;
        let mut uuid = *uuid::Uuid::new_v4().as_bytes();
        if self.options.deterministic.is_some() {
            // Of the index, which has a checksum of every content.
            uuid.copy_from_slice(&content.finalize()[..16]);
            uuid[6] = (uuid[6] & 0x0f) | 0x40;
            uuid[8] = (uuid[8] & 0x3f) | 0x80;
        }
        let header = Header { block_size: self.options.block_size, features: self.features, uuid, salt: self.salt };
        self.out.new.file().write_all_at(&header.encode(self.options.checksum), 0).map_err(io())?;
        self.out.new.file().sync_all().map_err(WriteError::io(format!("syncing {}", self.target)))?;
        let failed = WriteError::io(format!("giving {} its name", self.target));
        self.out.new.place(&self.name, self.options.force).map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => WriteError::Exists(self.target.to_string()),
            _ => failed(e),
        })?;
        self.folder.sync_all().map_err(WriteError::io(format!("syncing the folder of {}", self.target)))?;
        Ok(index_offset + index_size + FOOTER as u64)
    }
}

fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Where content goes: encrypted on its way, if it is to be.
struct Sink<'a> {
    out: &'a mut Out,
    sealer: Option<Sealer>,
    /// Bytes so far, without nonce.
    text: u64,
}

impl Sink<'_> {
    fn put(&mut self, data: &mut [u8]) -> io::Result<()> {
        if let Some(sealer) = &mut self.sealer {
            sealer.update(data);
        }
        self.text += data.len() as u64;
        self.out.put(data)
    }
}

fn compress_piece(
    encoder: &mut zstd::stream::raw::Encoder<'_>,
    mut data: &[u8],
    packed: &mut [u8],
    sink: &mut Sink<'_>,
) -> io::Result<()> {
    use zstd::stream::raw::Operation;
    while !data.is_empty() {
        let status = encoder.run_on_buffers(data, packed)?;
        data = &data[status.bytes_read..];
        sink.put(&mut packed[..status.bytes_written])?;
    }
    Ok(())
}

fn finish_frame(
    encoder: &mut zstd::stream::raw::Encoder<'_>,
    packed: &mut [u8],
    sink: &mut Sink<'_>,
) -> io::Result<()> {
    use zstd::stream::raw::{Operation, OutBuffer};
    loop {
        let mut output = OutBuffer::around(&mut *packed);
        let left = encoder.finish(&mut output, true)?;
        let n = output.pos();
        sink.put(&mut packed[..n])?;
        if left == 0 {
            return Ok(());
        }
    }
}

fn self_io(target: &Utf8Path) -> impl FnOnce(io::Error) -> WriteError + use<> {
    WriteError::io(format!("writing {target}"))
}

/// A failure of what is being packed.
fn of(path: &[u8]) -> impl FnOnce(io::Error) -> WriteError + use<> {
    WriteError::io(format!("reading {}", Name::from(path)))
}

fn changed(path: &[u8]) -> WriteError {
    WriteError::Refused(format!("{} has changed its size while it was read", Name::from(path)))
}

fn random(bytes: &mut [u8]) -> Result<(), WriteError> {
    let mut got = 0;
    while got < bytes.len() {
        let n = rustix::rand::getrandom(&mut bytes[got..], rustix::rand::GetRandomFlags::empty());
        got += n.map_err(|e| WriteError::io("reading random bytes")(e.into()))?;
    }
    Ok(())
}
