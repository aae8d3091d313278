//! The bytes of format version 1: header, object header, index entry and footer, and the two checksums of that name.
//!
//! Called by reader and writer. Pure: takes and gives bytes, fails with [`ReadError`] naming the part. All numbers are
//! little-endian and packed. Source: files written by the format's reference program; docs/bfc.md has it in words.

use super::error::{Name, ReadError};

/// Bytes of the header.
pub const HEADER: usize = 4096;
/// Bytes of the footer.
pub const FOOTER: usize = 56;
/// Bytes of an object's header, without its name.
pub const OBJECT: usize = 40;
/// Bytes of an index entry, without its path.
pub const INDEX_ENTRY: usize = 4 + 48;
/// Bytes before the index's first entry.
pub const INDEX_HEAD: usize = 8;
/// Longest name that is read or written, in bytes: what Linux takes for a path.
pub const MAX_NAME: usize = 4095;
/// Most folders in a path.
pub const MAX_DEPTH: usize = 256;
/// Longest target of a link, in bytes.
pub const MAX_TARGET: u64 = 4095;
/// Bytes that encryption adds: nonce and tag.
pub const SEAL: u64 = 12 + 16;

/// Feature bit: some content is compressed with zstd.
pub const FEATURE_ZSTD: u64 = 1;
/// Feature bit: some content is encrypted.
pub const FEATURE_AEAD: u64 = 2;

const MAGIC: &[u8; 8] = b"BFCFv1\0\0";
const INDEX_TAG: &[u8; 8] = b"BFCFIDX\0";
const END_TAG: &[u8; 8] = b"BFCFEND\0";
/// The block size that is written; nothing is aligned to it.
pub const BLOCK_SIZE: u32 = 4096;

/// Type bits of a mode.
pub const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFLNK: u32 = 0o120_000;

/// What is called CRC-32C in these files.
///
/// The reference program computes the sum without its initial and final inversion where the processor has an
/// instruction for it (SSE 4.2, ARMv8), and the standard one elsewhere. A file has one of both everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// Castagnoli's polynomial with initial value and final xor 0.
    Raw,
    /// CRC-32C as in RFC 3720.
    Standard,
}

/// A checksum on its way.
#[derive(Debug, Clone, Copy)]
pub struct Crc {
    kind: Checksum,
    state: u32,
}

impl Checksum {
    /// Begins.
    pub fn begin(self) -> Crc {
        // The crate inverts before and after: the complement of the state is what the raw sum goes on with.
        Crc { kind: self, state: if self == Checksum::Raw { !0 } else { 0 } }
    }

    /// Of all of `data`.
    pub fn of(self, data: &[u8]) -> u32 {
        let mut crc = self.begin();
        crc.update(data);
        crc.value()
    }
}

impl Crc {
    /// More data.
    pub fn update(&mut self, data: &[u8]) {
        self.state = crc32c::crc32c_append(self.state, data);
    }

    /// The sum of all data so far.
    pub fn value(&self) -> u32 {
        if self.kind == Checksum::Raw { !self.state } else { self.state }
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Symlink,
}

impl Kind {
    fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Kind::File),
            2 => Some(Kind::Folder),
            3 => Some(Kind::Symlink),
            _ => None,
        }
    }

    fn code(self) -> u8 {
        match self {
            Kind::File => 1,
            Kind::Folder => 2,
            Kind::Symlink => 3,
        }
    }

    /// Its type bits in a mode.
    pub fn mode_bits(self) -> u32 {
        match self {
            Kind::File => S_IFREG,
            Kind::Folder => S_IFDIR,
            Kind::Symlink => S_IFLNK,
        }
    }

    pub(super) fn of_mode(mode: u32) -> Option<Self> {
        match mode & S_IFMT {
            S_IFREG => Some(Kind::File),
            S_IFDIR => Some(Kind::Folder),
            S_IFLNK => Some(Kind::Symlink),
            _ => None,
        }
    }
}

/// The part of the header that says something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Written, read by nobody.
    pub block_size: u32,
    /// [`FEATURE_ZSTD`], [`FEATURE_AEAD`].
    pub features: u64,
    /// A version 4 UUID.
    pub uuid: [u8; 16],
    /// Salt of the password's key; zero without a password. Only the first half is used.
    pub salt: [u8; 32],
}

impl Header {
    /// As it stands in a file.
    pub fn encode(&self, checksum: Checksum) -> Vec<u8> {
        let mut out = vec![0; HEADER];
        out[..8].copy_from_slice(MAGIC);
        out[12..16].copy_from_slice(&self.block_size.to_le_bytes());
        out[16..24].copy_from_slice(&self.features.to_le_bytes());
        out[24..40].copy_from_slice(&self.uuid);
        out[40..72].copy_from_slice(&self.salt);
        let crc = checksum.of(&out[12..]);
        out[8..12].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads it, and finds out which checksum the file has.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<(Self, Checksum), ReadError> {
        if &bytes[..8] != MAGIC {
            return Err(ReadError::Malformed("it does not begin as one".into()));
        }
        let told = u32_at(bytes, 8);
        let checksum = [Checksum::Raw, Checksum::Standard].into_iter().find(|c| c.of(&bytes[12..]) == told);
        let checksum = checksum.ok_or_else(|| ReadError::Damaged("the header's checksum does not fit".into()))?;
        let mut header =
            Self { block_size: u32_at(bytes, 12), features: u64_at(bytes, 16), uuid: [0; 16], salt: [0; 32] };
        header.uuid.copy_from_slice(&bytes[24..40]);
        header.salt.copy_from_slice(&bytes[40..72]);
        let unknown = header.features & !(FEATURE_ZSTD | FEATURE_AEAD);
        if unknown != 0 {
            return Err(ReadError::Unsupported(format!("features {unknown:#x} of the header are not known")));
        }
        Ok((header, checksum))
    }
}

/// Where the index is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Bytes of the index.
    pub index_size: u64,
    /// Its checksum.
    pub index_crc: u32,
    /// Where it begins.
    pub index_offset: u64,
}

impl Footer {
    /// As it stands in a file.
    pub fn encode(&self) -> [u8; FOOTER] {
        let mut out = [0; FOOTER];
        out[..8].copy_from_slice(INDEX_TAG);
        out[8..16].copy_from_slice(&self.index_size.to_le_bytes());
        out[16..20].copy_from_slice(&self.index_crc.to_le_bytes());
        out[20..28].copy_from_slice(&self.index_offset.to_le_bytes());
        out[48..].copy_from_slice(END_TAG);
        out
    }

    /// Reads it.
    pub fn decode(bytes: &[u8; FOOTER]) -> Result<Self, ReadError> {
        if &bytes[..8] != INDEX_TAG || &bytes[48..] != END_TAG {
            return Err(ReadError::Malformed("it does not end as one (cut off, or not written to its end)".into()));
        }
        Ok(Self { index_size: u64_at(bytes, 8), index_crc: u32_at(bytes, 16), index_offset: u64_at(bytes, 20) })
    }
}

/// An entry of the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path from the container's root, without a leading slash; bytes as they are.
    pub path: Box<[u8]>,
    /// Where its object begins.
    pub offset: u64,
    /// Bytes of its object: header, name, padding, content.
    pub size: u64,
    /// Type and permissions, as in `stat`.
    pub mode: u32,
    /// Time of the last change, in nanoseconds since 1970.
    pub mtime_ns: u64,
    /// Its content is compressed (zstd).
    pub compressed: bool,
    /// Its content is encrypted (ChaCha20-Poly1305).
    pub encrypted: bool,
    /// Bytes of the content when it is read.
    pub orig_size: u64,
    /// Checksum of the content when it is read.
    pub crc: u32,
}

impl Entry {
    /// What it is.
    pub fn kind(&self) -> Kind {
        // Others don't get past the index's reader.
        Kind::of_mode(self.mode).unwrap_or(Kind::File)
    }

    /// Its name for messages.
    pub fn name(&self) -> Name {
        (&*self.path).into()
    }

    /// Bytes of header, name and padding before its content.
    pub fn content_at(&self) -> u64 {
        padded(OBJECT as u64 + self.path.len() as u64)
    }

    /// Bytes of the content as it is stored, without padding; None if the object is shorter than its own header.
    pub fn stored_size(&self) -> Option<u64> {
        match self.kind() {
            // The padding of a link is not content.
            Kind::Symlink => Some(self.orig_size),
            _ => self.size.checked_sub(self.content_at()),
        }
    }

    /// Appends it as it stands in an index.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.path.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.path);
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.size.to_le_bytes());
        out.extend_from_slice(&self.mode.to_le_bytes());
        out.extend_from_slice(&self.mtime_ns.to_le_bytes());
        out.extend_from_slice(&u32::from(self.compressed).to_le_bytes());
        out.extend_from_slice(&u32::from(self.encrypted).to_le_bytes());
        out.extend_from_slice(&self.orig_size.to_le_bytes());
        out.extend_from_slice(&self.crc.to_le_bytes());
    }

    /// The part that follows the path.
    pub fn decode(path: Box<[u8]>, fixed: &[u8; 48]) -> Result<Self, ReadError> {
        let name = || Name::from(&*path);
        let mode = u32_at(fixed, 16);
        if Kind::of_mode(mode).is_none() {
            return Err(ReadError::Malformed(format!("entry {}: mode {mode:#o} is no file, folder or link", name())));
        }
        let flag = |what: &str, value: u32| match value {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(ReadError::Unsupported(format!("entry {}: {what} {value}", name()))),
        };
        let compressed = flag("compression", u32_at(fixed, 28))?;
        let encrypted = flag("encryption", u32_at(fixed, 32))?;
        Ok(Self {
            offset: u64_at(fixed, 0),
            size: u64_at(fixed, 8),
            mode,
            mtime_ns: u64_at(fixed, 20),
            compressed,
            encrypted,
            orig_size: u64_at(fixed, 36),
            crc: u32_at(fixed, 44),
            path,
        })
    }

    /// The object's header, which says the same again.
    pub fn object_header(&self) -> [u8; OBJECT] {
        let mut out = [0; OBJECT];
        out[0] = self.kind().code();
        out[1] = u8::from(self.compressed);
        out[2] = u8::from(self.encrypted);
        out[4..6].copy_from_slice(&(self.path.len() as u16).to_le_bytes());
        out[8..12].copy_from_slice(&self.mode.to_le_bytes());
        out[12..20].copy_from_slice(&self.mtime_ns.to_le_bytes());
        out[20..28].copy_from_slice(&self.orig_size.to_le_bytes());
        out[28..36].copy_from_slice(&self.stored_size().unwrap_or(0).to_le_bytes());
        out[36..40].copy_from_slice(&self.crc.to_le_bytes());
        out
    }

    /// Compares an object's header and name with the entry. `bytes` are both, as read.
    pub fn compare_object(&self, bytes: &[u8]) -> Result<(), ReadError> {
        let differs =
            |what: &str| ReadError::Malformed(format!("entry {}: index and object differ in {what}", self.name()));
        let (head, name) = bytes.split_at_checked(OBJECT).ok_or_else(|| differs("length"))?;
        if Kind::from_code(head[0]) != Some(self.kind()) {
            return Err(differs("type"));
        }
        if usize::from(u16::from_le_bytes([head[4], head[5]])) != self.path.len() || name != &*self.path {
            return Err(differs("name"));
        }
        if u32::from(head[1]) != u32::from(self.compressed) || u32::from(head[2]) != u32::from(self.encrypted) {
            return Err(differs("compression or encryption"));
        }
        if u32_at(head, 8) != self.mode || u64_at(head, 12) != self.mtime_ns {
            return Err(differs("mode or time"));
        }
        if u64_at(head, 20) != self.orig_size || Some(u64_at(head, 28)) != self.stored_size() {
            return Err(differs("size"));
        }
        if u32_at(head, 36) != self.crc {
            return Err(differs("checksum"));
        }
        Ok(())
    }
}

/// `size` up to the next multiple of 16.
pub fn padded(size: u64) -> u64 {
    size.div_ceil(16) * 16
}

/// Whether a path may be in a container: relative, without empty parts, `.`, `..` and NUL, and not too long or deep.
pub fn is_path(path: &[u8]) -> bool {
    !path.is_empty()
        && path.len() <= MAX_NAME
        && !path.contains(&0)
        && path.iter().filter(|b| **b == b'/').count() <= MAX_DEPTH
        && path.split(|b| *b == b'/').all(|part| !matches!(part, b"" | b"." | b".."))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_checksums() {
        // RFC 3720, B.4; and what an instruction without inversions makes of zeros.
        assert_eq!(Checksum::Standard.of(&[0; 32]), 0x8a91_36aa);
        assert_eq!(Checksum::Standard.of(b"123456789"), 0xe306_9283);
        assert_eq!(Checksum::Raw.of(&[0; 100_000]), 0);
        // "hello\n" as the reference program sums it up.
        assert_eq!(Checksum::Raw.of(b"hello\n"), 0x6217_a434);
        for kind in [Checksum::Raw, Checksum::Standard] {
            let mut crc = kind.begin();
            crc.update(b"1234");
            crc.update(b"56789");
            assert_eq!(crc.value(), kind.of(b"123456789"));
        }
    }

    #[test]
    fn paths() {
        for good in ["a", "a/b", "foo.", "a..", "..a/b", "a b", "\u{e4}", ".hidden"] {
            assert!(is_path(good.as_bytes()), "{good}");
        }
        for bad in ["", "/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "./a", "a/./b", "a\0b"] {
            assert!(!is_path(bad.as_bytes()), "{bad:?}");
        }
        assert!(!is_path(&[b'a'; MAX_NAME + 1]));
        assert!(is_path(&[0xff, 0xfe]));
    }

    #[test]
    fn header_and_footer_say_what_they_were_told() {
        let header = Header { block_size: 4096, features: 3, uuid: [7; 16], salt: [9; 32] };
        for kind in [Checksum::Raw, Checksum::Standard] {
            let bytes: [u8; HEADER] = header.encode(kind).try_into().expect("4096 bytes");
            assert_eq!(Header::decode(&bytes).expect("header"), (header, kind));
        }
        let footer = Footer { index_size: 1, index_crc: 2, index_offset: 3 };
        assert_eq!(Footer::decode(&footer.encode()).expect("footer"), footer);
    }
}
