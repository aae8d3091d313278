//! ChaCha20-Poly1305 (RFC 8439) over streams, and the keys for it: 32 raw bytes, or a password through Argon2id.
//!
//! Called by reader and writer. The crates' own AEAD needs a message whole in memory; here cipher and authenticator are
//! put together as the RFC says, so that a content of any size takes constant memory. Keys are wiped when dropped and
//! shown by nothing. A tag is compared before any plaintext is used: see the reader.

use std::fmt;
use std::io::Read;

use argon2::{Algorithm, Argon2, Params, Version};
use camino::Utf8Path;
use chacha20::ChaCha20;
use chacha20::cipher::{KeyIvInit, StreamCipher, StreamCipherSeek};
use poly1305::Poly1305;
use poly1305::universal_hash::{KeyInit, UniversalHash};
use zeroize::Zeroizing;

use crate::core::error::{Error, Kind, Result};
use crate::core::ports::KeyPath;
use crate::utils::secret_file;

/// Bytes of a key.
pub const KEY: usize = 32;
/// Bytes of a nonce.
pub const NONCE: usize = 12;
/// Bytes of a tag.
pub const TAG: usize = 16;
/// Most bytes of one message: the cipher's counter has 32 bits.
pub const MAX_MESSAGE: u64 = (u32::MAX as u64) * 64;
/// Longest password in bytes.
const MAX_PASSWORD: u64 = 4096;
/// Argon2id's memory in KiB, passes and lanes: libsodium's "moderate" passes with its "interactive" memory.
const ARGON: (u32, u32, u32) = (64 << 10, 3, 1);
/// Bytes of the salt that count.
const SALT: usize = 16;

/// A key for content.
#[derive(Clone)]
pub struct Key(Zeroizing<[u8; KEY]>);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// Where a key comes from.
#[derive(Clone)]
pub enum KeySource {
    /// The key itself.
    Raw(Key),
    /// A password, which needs the container's salt.
    Password(Zeroizing<String>),
}

impl fmt::Debug for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KeySource::Raw(_) => "Raw(..)",
            KeySource::Password(_) => "Password(..)",
        })
    }
}

impl KeySource {
    /// Reads what `path` names.
    pub fn load(path: &KeyPath) -> Result<Self> {
        match path {
            KeyPath::KeyFile(path) => Self::key_file(path),
            KeyPath::PasswordFile(path) => Self::password_file(path),
        }
    }

    /// Reads a key file: 32 bytes, nothing else.
    pub fn key_file(path: &Utf8Path) -> Result<Self> {
        let mut data = Zeroizing::new(Vec::new());
        read(path, KEY as u64 + 1, &mut data)?;
        let key: [u8; KEY] = data.as_slice().try_into().map_err(|_| {
            let told = std::fs::metadata(path).map_or(0, |m| m.len());
            let found = match data.len() {
                // Of a longer one the rest was not read, and of a pipe nothing is told.
                n if n > KEY => told.max(n as u64).to_string(),
                n => n.to_string(),
            };
            Error::invalid(format!("key file {path}: a key has {KEY} bytes, this file {found}"))
        })?;
        Ok(Self::raw(key))
    }

    /// A key as it is.
    pub fn raw(key: [u8; KEY]) -> Self {
        KeySource::Raw(Key(Zeroizing::new(key)))
    }

    /// Reads a password from a file; a line end at its end is none of it.
    pub fn password_file(path: &Utf8Path) -> Result<Self> {
        let mut data = Zeroizing::new(Vec::new());
        read(path, MAX_PASSWORD + 2, &mut data)?;
        let text =
            std::str::from_utf8(&data).map_err(|_| Error::invalid(format!("password file {path}: not UTF-8")))?;
        Self::password(text.trim_end_matches(['\n', '\r'])).map_err(|e| e.context(format!("password file {path}")))
    }

    /// A password as it is.
    pub fn password(text: &str) -> Result<Self> {
        if text.is_empty() || text.len() as u64 > MAX_PASSWORD {
            return Err(Error::invalid(format!("a password has 1 to {MAX_PASSWORD} bytes")));
        }
        Ok(KeySource::Password(Zeroizing::new(text.to_owned())))
    }

    /// The key for a container with this salt. A password takes a while and 64 MiB.
    pub fn key(&self, salt: &[u8; 32]) -> Result<Key> {
        let password = match self {
            KeySource::Raw(key) => return Ok(key.clone()),
            KeySource::Password(password) => password,
        };
        if salt.iter().all(|b| *b == 0) {
            return Err(Error::precondition("the container has no salt: it was made with a key file, not a password"));
        }
        let failed = |e: argon2::Error| Error::new(Kind::Internal, format!("deriving the key: {e}"));
        let params = Params::new(ARGON.0, ARGON.1, ARGON.2, Some(KEY)).map_err(failed)?;
        let mut key = Zeroizing::new([0; KEY]);
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into(password.as_bytes(), &salt[..SALT], &mut *key)
            .map_err(failed)?;
        Ok(Key(key))
    }
}

fn read(path: &Utf8Path, max: u64, into: &mut Vec<u8>) -> Result<()> {
    let failed = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound => Error::because(Kind::NotFound, format!("{path} is not there"), e),
        _ => Error::io(format!("reading {path}"), e),
    };
    // Room at once: what a growing buffer leaves behind is not wiped.
    into.reserve_exact(usize::try_from(max).unwrap_or(0));
    let file = std::fs::File::open(path).map_err(failed)?;
    if let Some(why) = secret_file::known_to_others(&file.metadata().map_err(failed)?) {
        return Err(Error::precondition(format!("{path}: {why}")));
    }
    file.take(max).read_to_end(into).map_err(failed)?;
    Ok(())
}

/// The authenticator of one message.
struct Mac {
    poly: Poly1305,
    /// What does not fill a block yet.
    rest: [u8; 16],
    used: usize,
    associated: u64,
    length: u64,
}

impl Mac {
    fn new(cipher: &mut ChaCha20, associated: &[u8]) -> Self {
        // Block 0 is the authenticator's key; the text begins with block 1.
        let mut block = Zeroizing::new([0_u8; 64]);
        cipher.apply_keystream(&mut *block);
        let mut key = Zeroizing::new([0; KEY]);
        key.copy_from_slice(&block[..KEY]);
        let mut poly = Poly1305::new((&*key).into());
        poly.update_padded(associated);
        Self { poly, rest: [0; 16], used: 0, associated: associated.len() as u64, length: 0 }
    }

    fn update(&mut self, mut data: &[u8]) {
        self.length += data.len() as u64;
        if self.used > 0 {
            let take = data.len().min(16 - self.used);
            self.rest[self.used..self.used + take].copy_from_slice(&data[..take]);
            self.used += take;
            data = &data[take..];
            if self.used < 16 {
                return;
            }
            self.poly.update_padded(&self.rest);
            self.used = 0;
        }
        let whole = data.len() / 16 * 16;
        self.poly.update_padded(&data[..whole]);
        self.used = data.len() - whole;
        self.rest[..self.used].copy_from_slice(&data[whole..]);
    }

    fn finish(mut self) -> Poly1305 {
        let used = self.used;
        self.poly.update_padded(&self.rest[..used]);
        let mut lengths = [0; 16];
        lengths[..8].copy_from_slice(&self.associated.to_le_bytes());
        lengths[8..].copy_from_slice(&self.length.to_le_bytes());
        self.poly.update_padded(&lengths);
        self.poly
    }
}

fn begin(key: &Key, nonce: &[u8; NONCE], associated: &[u8]) -> (ChaCha20, Mac) {
    let mut cipher = ChaCha20::new((&*key.0).into(), nonce.into());
    let mac = Mac::new(&mut cipher, associated);
    // Keys of either part are good for one message: both begin at a block's start.
    cipher.seek(64_u64);
    (cipher, mac)
}

/// Encrypts one message, piece by piece.
pub struct Sealer {
    cipher: ChaCha20,
    mac: Mac,
}

impl Sealer {
    /// `associated` is authenticated with it: the entry's path.
    pub fn new(key: &Key, nonce: &[u8; NONCE], associated: &[u8]) -> Self {
        let (cipher, mac) = begin(key, nonce, associated);
        Self { cipher, mac }
    }

    /// Encrypts the next piece where it is.
    pub fn update(&mut self, data: &mut [u8]) {
        self.cipher.apply_keystream(data);
        self.mac.update(data);
    }

    /// The tag that follows the last piece.
    pub fn finish(self) -> [u8; TAG] {
        let mut tag = [0; TAG];
        tag.copy_from_slice(&self.mac.finish().finalize());
        tag
    }
}

/// Decrypts one message, piece by piece, or only looks whether it is whole.
pub struct Opener {
    cipher: ChaCha20,
    mac: Mac,
}

impl Opener {
    /// As [`Sealer::new`].
    pub fn new(key: &Key, nonce: &[u8; NONCE], associated: &[u8]) -> Self {
        let (cipher, mac) = begin(key, nonce, associated);
        Self { cipher, mac }
    }

    /// The next piece of the encrypted text, to be authenticated only.
    pub fn look(&mut self, data: &[u8]) {
        self.mac.update(data);
    }

    /// Decrypts the next piece where it is.
    pub fn update(&mut self, data: &mut [u8]) {
        self.mac.update(data);
        self.cipher.apply_keystream(data);
    }

    /// Whether all pieces were what was sealed; compared in constant time.
    pub fn fits(self, tag: &[u8; TAG]) -> bool {
        self.mac.finish().verify(tag.into()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use camino::Utf8PathBuf;
    use proptest::prelude::*;

    fn key(byte: u8) -> Key {
        Key(Zeroizing::new([byte; KEY]))
    }

    #[test]
    fn the_rfcs_example() {
        // RFC 8439, 2.8.2.
        let mut bytes = [0; KEY];
        (0x80_u8..=0x9f).enumerate().for_each(|(n, b)| bytes[n] = b);
        let nonce = [7, 0, 0, 0, 0x40, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47];
        let associated = [0x50, 0x51, 0x52, 0x53, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7];
        let mut text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, \
            sunscreen would be it."
            .to_vec();
        let mut sealer = Sealer::new(&Key(Zeroizing::new(bytes)), &nonce, &associated);
        sealer.update(&mut text);
        assert_eq!(text[..8], [0xd3, 0x1a, 0x8d, 0x34, 0x64, 0x8e, 0x60, 0xdb]);
        let tag = [0x1a, 0xe1, 0x0b, 0x59, 0x4f, 0x09, 0xe2, 0x6a, 0x7e, 0x90, 0x2e, 0xcb, 0xd0, 0x60, 0x06, 0x91];
        assert_eq!(sealer.finish(), tag);
    }

    #[test]
    fn secrets_are_not_shown() {
        let source = KeySource::password("hunter2").expect("password");
        assert!(!format!("{source:?} {:?}", key(0x41)).contains("hunter2"));
        assert!(!format!("{:?}", key(0x41)).contains('A'));
    }

    #[test]
    fn key_files_have_32_bytes() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = Utf8PathBuf::from_path_buf(dir.path().join("k")).expect("UTF-8");
        for size in [0, 31, 33, 100] {
            crate::utils::atomic::write(
                path.as_std_path(),
                &vec![1; size],
                0o600,
                crate::utils::atomic::Durability::Process,
            )
            .expect("write");
            let e = KeySource::key_file(&path).expect_err("size").to_string();
            assert!(e.contains(&size.to_string()), "{e}");
        }
        assert!(KeySource::password("").is_err());
    }

    #[test]
    fn secrets_that_others_can_read_are_none() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("tempdir");
        let path = Utf8PathBuf::from_path_buf(dir.path().join("k")).expect("UTF-8");
        let durability = crate::utils::atomic::Durability::Process;
        crate::utils::atomic::write(path.as_std_path(), &[b'k'; 32], 0o600, durability).expect("write");
        for (mode, taken) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
            assert_eq!(KeySource::key_file(&path).is_ok(), taken, "{mode:o}");
            let password = KeySource::password_file(&path);
            assert_eq!(password.is_ok(), taken, "{mode:o}");
            if let Err(e) = password {
                assert!(e.to_string().contains("chmod 600"), "{e}");
            }
        }
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            text in prop::collection::vec(any::<u8>(), 0..600),
            cuts in prop::collection::vec(0_usize..64, 0..20),
            flip in any::<prop::sample::Index>(),
        ) {
            let (k, nonce) = (key(3), [5; NONCE]);
            let mut whole = text.clone();
            let mut sealer = Sealer::new(&k, &nonce, b"a/b");
            sealer.update(&mut whole);
            let tag = sealer.finish();
            let mut cut = whole.clone();
            let mut opener = Opener::new(&k, &nonce, b"a/b");
            let mut rest = cut.as_mut_slice();
            for n in cuts {
                let (piece, after) = rest.split_at_mut(n.min(rest.len()));
                opener.update(piece);
                rest = after;
            }
            opener.update(rest);
            prop_assert!(opener.fits(&tag));
            prop_assert_eq!(&cut, &text);
            if !whole.is_empty() {
                let at = flip.index(whole.len());
                whole[at] ^= 1;
                let mut opener = Opener::new(&k, &nonce, b"a/b");
                opener.look(&whole);
                prop_assert!(!opener.fits(&tag));
            }
            let mut opener = Opener::new(&k, &nonce, b"a/c");
            opener.look(&whole);
            prop_assert!(!opener.fits(&tag));
        }
    }
}
