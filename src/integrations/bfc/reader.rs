//! Opens containers and reads their entries, trusting nothing in them.
//!
//! Called by the command line, by the image store and by extraction. Opening reads header, footer and index (not the
//! objects), checks every offset and length against the file, and refuses paths that lead out, entries below what is no
//! folder, entries of one name and objects that overlap. Memory grows with entries that are really there and with nothing
//! that the file says. Content is a stream in constant memory; what is encrypted is authenticated whole before its first
//! byte is handed out. Fails with [`ReadError`]; keeps nothing on disk.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;

use camino::Utf8Path;

use super::crypt::{Key, KeySource, MAX_MESSAGE, NONCE, Opener, TAG};
use super::error::{Name, ReadError};
use super::format::{
    Checksum, Crc, Entry, FEATURE_AEAD, FOOTER, Footer, HEADER, Header, INDEX_ENTRY, INDEX_HEAD, Kind, MAX_NAME,
    MAX_TARGET, OBJECT, SEAL, is_path, padded,
};
use crate::core::error::{Error, Kind as ErrorKind, Result as CoreResult};
use crate::utils::section::{ReadAt, Section};

/// Most entries of a container.
pub const MAX_ENTRIES: u32 = 4_000_000;
/// Bytes that are read at once.
const PIECE: usize = 256 << 10;
/// Largest window of a compressed content, as a power of two: 128 MiB, the most that zstd uses without being told.
const MAX_WINDOW: u32 = 27;

fn fill_at(source: &dyn ReadAt, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match source.read_at(buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buffer = &mut buffer[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// An open container.
pub struct Container {
    source: Arc<dyn ReadAt>,
    header: Header,
    checksum: Checksum,
    size: u64,
    entries: Vec<Entry>,
    key: Option<Key>,
}

impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Container").field("entries", &self.entries.len()).finish_non_exhaustive()
    }
}

impl Container {
    /// Opens the file `path`.
    pub fn open(path: &Utf8Path) -> CoreResult<Self> {
        let failed = |e: io::Error| match e.kind() {
            io::ErrorKind::NotFound => Error::because(ErrorKind::NotFound, format!("{path} is not there"), e),
            _ => Error::io(format!("opening {path}"), e),
        };
        let file = rustix::fs::open(
            path.as_std_path(),
            // Opening a FIFO must not wait for a writer.
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK,
            rustix::fs::Mode::empty(),
        );
        let file = File::from(file.map_err(|e| failed(e.into()))?);
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(Error::invalid(format!("{path} is not a file")));
        }
        Self::read(Arc::new(file)).map_err(|e| Error::from(e).context(path.to_string()))
    }

    /// Opens what `source` holds.
    pub fn read(source: Arc<dyn ReadAt>) -> Result<Self, ReadError> {
        let size = source.size().map_err(ReadError::io("the file's size"))?;
        if size < (HEADER + FOOTER) as u64 {
            return Err(ReadError::Malformed(format!("{size} bytes are too few")));
        }
        let mut head = [0; HEADER];
        fill_at(&*source, &mut head, 0).map_err(ReadError::io("the header"))?;
        let (header, checksum) = Header::decode(&head)?;
        let footer_at = size - FOOTER as u64;
        let mut foot = [0; FOOTER];
        fill_at(&*source, &mut foot, footer_at).map_err(ReadError::io("the footer"))?;
        let footer = Footer::decode(&foot)?;
        let entries = read_index(&source, &footer, footer_at, checksum)?;
        check_tree(&entries)?;
        check_objects(&entries, footer.index_offset)?;
        Ok(Self { source, header, checksum, size, entries, key: None })
    }

    /// Gives the key for encrypted content. Whether it fits shows when content is read: see [`Container::try_key`]. Who has
    /// a key wants what was made with it: see [`Container::all_encrypted`].
    pub fn unlock(&mut self, source: &KeySource) -> CoreResult<()> {
        self.all_encrypted()?;
        self.key = Some(source.key(&self.header.salt)?);
        Ok(())
    }

    /// Refuses a container in which a file is not encrypted.
    pub fn all_encrypted(&self) -> CoreResult<()> {
        let Some(plain) = self.entries.iter().find(|e| e.kind() == Kind::File && !e.encrypted) else { return Ok(()) };
        let what = if self.is_encrypted() { plain.name().to_string() } else { "the container".into() };
        Err(Error::new(ErrorKind::PermissionDenied, format!("{what} is not encrypted, though a key is given")))
    }

    /// Looks whether the key fits, at the smallest encrypted entry.
    pub fn try_key(&self) -> Result<(), ReadError> {
        let smallest = self.entries.iter().filter(|e| e.encrypted).min_by_key(|e| e.size);
        smallest.map_or(Ok(()), |entry| self.content(entry).map(drop))
    }

    /// All entries, sorted by path.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Which checksum the file has.
    pub fn checksum(&self) -> Checksum {
        self.checksum
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether any content is encrypted, or the header says so.
    pub fn is_encrypted(&self) -> bool {
        self.header.features & FEATURE_AEAD != 0 || self.entries.iter().any(|e| e.encrypted)
    }

    /// The entry of this path.
    pub fn find(&self, path: &[u8]) -> Option<&Entry> {
        let at = self.entries.binary_search_by(|e| (*e.path).cmp(path)).ok()?;
        self.entries.get(at)
    }

    /// Entries that are `path` or below it; all for the empty path.
    pub fn below<'a>(&'a self, path: &'a [u8]) -> impl Iterator<Item = &'a Entry> {
        let start = self.entries.partition_point(|e| &*e.path < path);
        let within = move |e: &&Entry| {
            path.is_empty() || e.path.strip_prefix(path).is_some_and(|rest| matches!(rest, [] | [b'/', ..]))
        };
        // Between "a" and "a/b" sorts "a-b".
        self.entries[start..].iter().take_while(move |e| e.path.starts_with(path)).filter(within)
    }

    /// Reads an object's header and compares it with the index.
    pub fn check_object(&self, entry: &Entry) -> Result<(), ReadError> {
        let mut bytes = vec![0; OBJECT + entry.path.len()];
        fill_at(&*self.source, &mut bytes, entry.offset)
            .map_err(ReadError::io(format!("the object header of {}", entry.name())))?;
        entry.compare_object(&bytes)
    }

    /// The content of a file or the target of a link, as a stream that fails at its end if it is not what the checksum
    /// says. What is encrypted has been authenticated when this returns.
    pub fn content(&self, entry: &Entry) -> Result<Content, ReadError> {
        self.check_object(entry)?;
        let stored = entry.stored_size().unwrap_or(0);
        let plain: Stored = if entry.encrypted {
            Stored::Sealed(Box::new(self.open_sealed(entry, stored)?))
        } else {
            Stored::Plain(Section::new(self.source.clone(), entry.offset + entry.content_at(), stored))
        };
        let body = if entry.compressed {
            let failed = ReadError::io(format!("the compressed content of {}", entry.name()));
            let input = BufReader::with_capacity(usize::try_from(stored).unwrap_or(PIECE).clamp(1, PIECE), plain);
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input).map_err(failed)?.single_frame();
            decoder.window_log_max(MAX_WINDOW).map_err(ReadError::io("zstd's window"))?;
            Body::Zstd(Box::new(decoder))
        } else {
            Body::Stored(plain)
        };
        Ok(Content {
            body,
            crc: self.checksum.begin(),
            left: entry.orig_size,
            expected: entry.crc,
            name: entry.path.clone(),
        })
    }

    fn open_sealed(&self, entry: &Entry, stored: u64) -> Result<Sealed, ReadError> {
        let key = self.key.as_ref().ok_or_else(|| ReadError::NoKey(entry.name()))?;
        let io = || ReadError::io(format!("the content of {}", entry.name()));
        let at = entry.offset + entry.content_at();
        let text = stored - SEAL;
        let (mut nonce, mut tag) = ([0; NONCE], [0; TAG]);
        fill_at(&*self.source, &mut nonce, at).map_err(io())?;
        fill_at(&*self.source, &mut tag, at + NONCE as u64 + text).map_err(io())?;
        let section = || Section::new(self.source.clone(), at + NONCE as u64, text);
        let mut opener = Opener::new(key, &nonce, &entry.path);
        let mut first = section();
        let mut buffer = vec![0; usize::try_from(text).unwrap_or(PIECE).clamp(1, PIECE)];
        loop {
            match first.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => opener.look(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(io()(e)),
            }
        }
        if !opener.fits(&tag) {
            return Err(ReadError::Sealed(entry.name()));
        }
        // Read a second time: it may have become another file meanwhile, so the tag is compared again at the end.
        let opener = Some(Opener::new(key, &nonce, &entry.path));
        Ok(Sealed { section: section(), opener, tag, name: entry.path.clone() })
    }

    /// A small content, whole. Larger than `max` is refused.
    pub fn read_small(&self, entry: &Entry, max: u64) -> Result<Vec<u8>, ReadError> {
        if entry.orig_size > max {
            let why = format!("entry {} has {} bytes (limit {max})", entry.name(), entry.orig_size);
            return Err(ReadError::Malformed(why));
        }
        let mut data = Vec::new();
        self.content(entry)?.read_to_end(&mut data).map_err(|e| ReadError::of_stream(&entry.path, e))?;
        Ok(data)
    }

    /// A link's target, which a link can have.
    pub fn target(&self, entry: &Entry) -> Result<Vec<u8>, ReadError> {
        let target = self.read_small(entry, MAX_TARGET)?;
        match target.contains(&0) {
            true => Err(ReadError::Malformed(format!("link {}: a NUL in its target", entry.name()))),
            false => Ok(target),
        }
    }
}

fn read_index(
    source: &Arc<dyn ReadAt>,
    footer: &Footer,
    footer_at: u64,
    checksum: Checksum,
) -> Result<Vec<Entry>, ReadError> {
    let end = footer.index_offset.checked_add(footer.index_size);
    if footer.index_offset < HEADER as u64 || end != Some(footer_at) {
        return Err(ReadError::Malformed(format!(
            "an index of {} bytes at {} does not lie between objects and footer",
            footer.index_size, footer.index_offset
        )));
    }
    if footer.index_size < INDEX_HEAD as u64 {
        return Err(ReadError::Malformed("the index has no head".into()));
    }
    let section =
        || BufReader::with_capacity(PIECE, Section::new(source.clone(), footer.index_offset, footer.index_size));
    let failed = || ReadError::io("the index");
    let (mut crc, mut input) = (checksum.begin(), section());
    loop {
        let piece = input.fill_buf().map_err(failed())?;
        if piece.is_empty() {
            break;
        }
        crc.update(piece);
        let n = piece.len();
        input.consume(n);
    }
    if crc.value() != footer.index_crc {
        return Err(ReadError::Damaged("the index's checksum does not fit".into()));
    }
    let mut input = section();
    let mut left = footer.index_size - INDEX_HEAD as u64;
    let version = read_u32(&mut input).map_err(failed())?;
    if version != 1 {
        return Err(ReadError::Unsupported(format!("index version {version}")));
    }
    let count = read_u32(&mut input).map_err(failed())?;
    if u64::from(count) > left / (INDEX_ENTRY as u64 + 1) {
        return Err(ReadError::Malformed(format!("{count} entries do not fit into the index")));
    }
    if count > MAX_ENTRIES {
        return Err(ReadError::Unsupported(format!("{count} entries (limit {MAX_ENTRIES})")));
    }
    let mut entries: Vec<Entry> = Vec::new();
    for n in 0..count {
        let malformed = |why: &str| ReadError::Malformed(format!("entry {n} of the index: {why}"));
        let length = if left < 4 { 0 } else { read_u32(&mut input).map_err(failed())? as usize };
        if length == 0 || length > MAX_NAME {
            return Err(malformed(&format!("a path of {length} bytes")));
        }
        let all = (INDEX_ENTRY + length) as u64;
        left = left.checked_sub(all).ok_or_else(|| malformed("it goes beyond the index's end"))?;
        let mut path = vec![0; length];
        input.read_exact(&mut path).map_err(failed())?;
        let mut fixed = [0; 48];
        input.read_exact(&mut fixed).map_err(failed())?;
        if !is_path(&path) {
            return Err(malformed(&format!("{} is no path inside a container", Name::from(path.as_slice()))));
        }
        let entry = Entry::decode(path.into(), &fixed)?;
        check_sizes(&entry)?;
        entries.push(entry);
    }
    if left != 0 {
        return Err(ReadError::Malformed(format!("{left} bytes follow the index's last entry")));
    }
    // Written sorted; the order is not promised anywhere.
    if !entries.is_sorted_by(|a, b| a.path < b.path) {
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        if let Some(pair) = entries.windows(2).find(|pair| pair[0].path == pair[1].path) {
            return Err(ReadError::Malformed(format!("two entries are called {}", pair[0].name())));
        }
    }
    Ok(entries)
}

fn read_u32(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Whether the sizes of an entry fit to each other.
fn check_sizes(entry: &Entry) -> Result<(), ReadError> {
    let malformed = |why: String| Err(ReadError::Malformed(format!("entry {}: {why}", entry.name())));
    let Some(stored) = entry.size.checked_sub(entry.content_at()) else {
        return malformed(format!("an object of {} bytes is shorter than its own header", entry.size));
    };
    match entry.kind() {
        Kind::File => {
            let text = if entry.encrypted { stored.checked_sub(SEAL) } else { Some(stored) };
            match text {
                None => malformed(format!("{stored} bytes are no encrypted content")),
                Some(text) if entry.encrypted && text > MAX_MESSAGE => {
                    malformed(format!("{text} encrypted bytes are more than the cipher can have made"))
                }
                Some(text) if !entry.compressed && text != entry.orig_size => {
                    malformed(format!("{text} bytes are stored of {}", entry.orig_size))
                }
                Some(_) => Ok(()),
            }
        }
        _ if entry.compressed || entry.encrypted => malformed("only files are compressed or encrypted".into()),
        Kind::Folder if entry.orig_size != 0 || stored != 0 => malformed("a folder has no content".into()),
        Kind::Folder => Ok(()),
        Kind::Symlink if entry.orig_size == 0 || entry.orig_size > MAX_TARGET => {
            malformed(format!("a link to {} bytes", entry.orig_size))
        }
        Kind::Symlink if stored != padded(entry.orig_size) => {
            malformed(format!("{stored} bytes are stored of a link to {} bytes", entry.orig_size))
        }
        Kind::Symlink => Ok(()),
    }
}

/// Whether everything above an entry is a folder (or has no entry of its own).
fn check_tree(entries: &[Entry]) -> Result<(), ReadError> {
    let mut child = Vec::new();
    for (n, entry) in entries.iter().enumerate().filter(|(_, e)| e.kind() != Kind::Folder) {
        // What is below an entry begins as it does, and so does all that is sorted between.
        let after = entries.get(n + 1..).unwrap_or_default();
        if !after.first().is_some_and(|next| next.path.starts_with(&entry.path)) {
            continue;
        }
        child.clear();
        child.extend_from_slice(&entry.path);
        child.push(b'/');
        let at = after.partition_point(|e| *e.path < *child);
        if let Some(below) = after.get(at).filter(|e| e.path.starts_with(&child)) {
            let (below, above) = (below.name(), entry.name());
            return Err(ReadError::Malformed(format!("entry {below} is below {above}, which is no folder")));
        }
    }
    Ok(())
}

/// Whether all objects lie between header and index, and none over another.
fn check_objects(entries: &[Entry], end: u64) -> Result<(), ReadError> {
    let mut order: Vec<u32> = (0..entries.len() as u32).collect();
    order.sort_unstable_by_key(|n| entries[*n as usize].offset);
    let (mut free, mut before) = (HEADER as u64, None);
    for entry in order.iter().map(|n| &entries[*n as usize]) {
        let after = entry.offset.checked_add(entry.size).filter(|after| *after <= end && entry.offset >= HEADER as u64);
        let after = after.ok_or_else(|| {
            ReadError::Malformed(format!(
                "entry {}: an object of {} bytes at {} is not between header and index",
                entry.name(),
                entry.size,
                entry.offset
            ))
        })?;
        if entry.offset < free {
            let other = before.map_or_else(|| Name::from(&b""[..]), Entry::name);
            return Err(ReadError::Malformed(format!("the objects of {other} and {} overlap", entry.name())));
        }
        (free, before) = (after, Some(entry));
    }
    Ok(())
}

/// Encrypted content that was authenticated.
struct Sealed {
    section: Section<dyn ReadAt>,
    opener: Option<Opener>,
    tag: [u8; TAG],
    name: Box<[u8]>,
}

impl Read for Sealed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.section.read(buffer)?;
        if let Some(opener) = &mut self.opener {
            opener.update(&mut buffer[..n]);
        }
        if self.section.left() == 0
            && let Some(opener) = self.opener.take()
            && !opener.fits(&self.tag)
        {
            return Err(ReadError::Sealed((&*self.name).into()).into());
        }
        Ok(n)
    }
}

/// What is stored, without its encryption.
enum Stored {
    Plain(Section<dyn ReadAt>),
    Sealed(Box<Sealed>),
}

impl Read for Stored {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stored::Plain(section) => section.read(buffer),
            Stored::Sealed(sealed) => sealed.read(buffer),
        }
    }
}

type Zstd = zstd::stream::read::Decoder<'static, BufReader<Stored>>;

enum Body {
    Stored(Stored),
    Zstd(Box<Zstd>),
    End,
}

/// An entry's content as a stream.
pub struct Content {
    body: Body,
    crc: Crc,
    left: u64,
    expected: u32,
    name: Box<[u8]>,
}

impl Content {
    fn damaged(&self, why: &str) -> io::Error {
        ReadError::Damaged(format!("the content of {}: {why}", Name::from(&*self.name))).into()
    }

    /// At the end of the body: whether all of it came, and nothing more.
    fn end(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.body, Body::End) {
            Body::Zstd(decoder) => {
                let mut rest = decoder.finish();
                if !rest.fill_buf()?.is_empty() {
                    return Err(self.damaged("more follows the compressed frame"));
                }
            }
            Body::Stored(_) => {}
            Body::End => return Ok(()),
        }
        if self.left != 0 {
            return Err(self.damaged(&format!("{} bytes are missing", self.left)));
        }
        if self.crc.value() != self.expected {
            return Err(self.damaged("its checksum does not fit"));
        }
        Ok(())
    }
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let n = loop {
            let read = match &mut self.body {
                Body::Stored(stored) => stored.read(buffer),
                Body::Zstd(decoder) => decoder.read(buffer),
                Body::End => return Ok(0),
            };
            match read {
                Ok(n) => break n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let zstd = matches!(self.body, Body::Zstd(_));
                    self.body = Body::End;
                    // The decoder's own words; what the source said passes as it is.
                    let own = e.get_ref().is_some_and(|inner| inner.is::<ReadError>());
                    return Err(match zstd && !own && e.raw_os_error().is_none() {
                        true => self.damaged(&format!("it can't be decompressed ({e})")),
                        false => e,
                    });
                }
            }
        };
        if n == 0 {
            self.end()?;
            return Ok(0);
        }
        self.left = self.left.checked_sub(n as u64).ok_or_else(|| self.damaged("it is longer than it says"))?;
        self.crc.update(&buffer[..n]);
        Ok(n)
    }
}
