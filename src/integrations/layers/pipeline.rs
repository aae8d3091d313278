//! A layer's bytes on their way: digest of what was downloaded, decompression, diff id of what comes out.
//!
//! Called by the image store; read by a layer store on a blocking thread. Memory is bounded by the decoder's window.
//! Reading fails with plain I/O errors; [`Verifier::verify`] then says whether everything is what was promised. Nothing
//! is kept on disk here.

use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest as _, Sha256};

use super::confined::Unpacker;
use super::window;
use crate::core::error::{Error, Kind};
use crate::core::ids::Digest;

/// Bytes that tell how a layer is compressed, with the head of a frame of zstd.
const START: usize = 18;

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, possibly of several members.
    Gzip,
    /// zstd, possibly of several frames.
    Zstd,
    /// As its first bytes say.
    Detect,
}

/// A layer that is not what it was said to be.
#[derive(Debug, thiserror::Error)]
pub enum Mismatch {
    /// Other content.
    #[error("layer {want}: got {got}")]
    Blob {
        /// As promised.
        want: Digest,
        /// As read.
        got: Digest,
    },
    /// Other content after decompression.
    #[error("layer {blob}: its content is {got}, the image's config says {want}")]
    DiffId {
        /// The layer as downloaded.
        blob: String,
        /// As promised.
        want: Digest,
        /// As read.
        got: Digest,
    },
    /// Not all of it, or more.
    #[error("layer {blob}: got {got} of {want} bytes")]
    Size {
        /// The layer.
        blob: Digest,
        /// As promised.
        want: u64,
        /// As read.
        got: u64,
    },
    /// The source failed.
    #[error("layer {blob}: reading failed")]
    Io {
        /// The layer.
        blob: String,
        /// The failure.
        #[source]
        source: io::Error,
    },
}

impl From<Mismatch> for Error {
    fn from(e: Mismatch) -> Self {
        let message = e.to_string();
        match e {
            Mismatch::Io { source, .. } => Error::because(Kind::Internal, message, source),
            _ => Error::new(Kind::Internal, message),
        }
    }
}

/// What a layer has to be.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Digest and bytes as stored; None where only the content is known (docker archives).
    pub blob: Option<(Digest, u64)>,
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
}

struct Raw {
    source: Box<dyn Read + Send>,
    sum: Sha256,
    read: u64,
    limit: Option<u64>,
}

impl Raw {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read(buffer)?;
        self.read += n as u64;
        if self.limit.is_some_and(|limit| self.read > limit) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "layer is longer than its descriptor says"));
        }
        self.sum.update(&buffer[..n]);
        Ok(n)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct RawReader(Arc<Mutex<Raw>>);

impl Read for RawReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        locked(&self.0).read(buffer)
    }
}

/// The uncompressed tar; the decoder is chosen at the first read.
pub struct LayerReader {
    start: Option<(RawReader, Compression, Unpacker)>,
    decoder: Option<Box<dyn Read + Send>>,
    sum: Arc<Mutex<Sha256>>,
}

/// Tells whether a layer that was read is the one that was promised.
pub struct Verifier {
    raw: Arc<Mutex<Raw>>,
    sum: Arc<Mutex<Sha256>>,
    expected: Expected,
}

/// Begins: the tar to unpack, and what to ask when it was read. `unpacker` decompresses.
pub fn open(
    source: Box<dyn Read + Send>,
    compression: Compression,
    expected: Expected,
    unpacker: &Unpacker,
) -> (LayerReader, Verifier) {
    let limit = expected.blob.as_ref().map(|(_, size)| *size);
    let raw = Arc::new(Mutex::new(Raw { source, sum: Sha256::new(), read: 0, limit }));
    let sum = Arc::new(Mutex::new(Sha256::new()));
    let start = Some((RawReader(raw.clone()), compression, unpacker.clone()));
    let reader = LayerReader { start, decoder: None, sum: sum.clone() };
    (reader, Verifier { raw, sum, expected })
}

/// What `magic`, the first bytes (four at least), say.
pub fn detect(magic: &[u8]) -> Compression {
    match magic {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        // A skippable frame may come first.
        [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        _ => Compression::None,
    }
}

/// Decompresses in this process; `window` is the largest one of zstd, as a power of two.
pub(super) fn decode(
    how: Compression,
    window: u32,
    input: impl BufRead + Send + 'static,
) -> io::Result<Box<dyn Read + Send>> {
    Ok(match how {
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(window)?;
            Box::new(decoder)
        }
        Compression::None | Compression::Detect => Box::new(input),
    })
}

fn decoder(mut raw: RawReader, told: Compression, unpacker: &Unpacker) -> io::Result<Box<dyn Read + Send>> {
    let mut magic = Vec::with_capacity(START);
    (&mut raw).take(START as u64).read_to_end(&mut magic)?;
    let found = detect(&magic);
    if told != Compression::Detect && told != found {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the media type says {told:?}, the first bytes say {found:?}"),
        ));
    }
    let start = magic.clone();
    let input = Cursor::new(magic).chain(raw);
    match found {
        Compression::Gzip => unpacker.decompress(found, 0, Box::new(input)),
        Compression::Zstd => window::decoder(&start, |log| unpacker.decompress(found, log, Box::new(input))),
        Compression::None | Compression::Detect => Ok(Box::new(BufReader::with_capacity(128 << 10, input))),
    }
}

impl Read for LayerReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some((raw, compression, unpacker)) = self.start.take() {
            self.decoder = Some(decoder(raw, compression, &unpacker)?);
        }
        let Some(decoder) = &mut self.decoder else {
            return Err(io::Error::other("the layer's decoder failed before"));
        };
        let n = decoder.read(buffer)?;
        locked(&self.sum).update(&buffer[..n]);
        Ok(n)
    }
}

impl Verifier {
    /// Reads what the decoder left and compares. Call when the reader is at its end, on a blocking thread.
    pub fn verify(&self) -> Result<(), Mismatch> {
        self.verify_blob()?;
        let got = digest(&locked(&self.sum));
        if got != self.expected.diff_id {
            return Err(Mismatch::DiffId { blob: self.name(), want: self.expected.diff_id.clone(), got });
        }
        Ok(())
    }

    /// The part of [`Verifier::verify`] that also holds for content that could not be unpacked: tells a damaged
    /// download from a bad layer.
    pub fn verify_blob(&self) -> Result<(), Mismatch> {
        let mut raw = locked(&self.raw);
        let mut buffer = [0; 16 << 10];
        loop {
            match raw.read(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Mismatch::Io { blob: self.name(), source }),
            }
        }
        let Some((want, size)) = &self.expected.blob else { return Ok(()) };
        if raw.read != *size {
            return Err(Mismatch::Size { blob: want.clone(), want: *size, got: raw.read });
        }
        let got = digest(&raw.sum);
        if got != *want {
            return Err(Mismatch::Blob { want: want.clone(), got });
        }
        Ok(())
    }

    fn name(&self) -> String {
        self.expected.blob.as_ref().map_or(&self.expected.diff_id, |(digest, _)| digest).to_string()
    }
}

fn digest(sum: &Sha256) -> Digest {
    Digest::from_sha256(&sum.clone().finalize().into())
}

/// The digest of `data`.
pub fn digest_of(data: &[u8]) -> Digest {
    Digest::from_sha256(&Sha256::digest(data).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut e = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        e.write_all(data).expect("gzip");
        e.finish().expect("gzip")
    }

    fn run(blob: Vec<u8>, compression: Compression, content: &[u8]) -> Result<Vec<u8>, String> {
        let expected = Expected { blob: Some((digest_of(&blob), blob.len() as u64)), diff_id: digest_of(content) };
        let (mut reader, verifier) = open(Box::new(Cursor::new(blob)), compression, expected, &Unpacker::Here);
        let mut out = Vec::new();
        reader.read_to_end(&mut out).map_err(|e| e.to_string())?;
        verifier.verify().map_err(|e| e.to_string())?;
        Ok(out)
    }

    #[test]
    fn every_compression() {
        let (a, b) = (vec![7; 300_000], b"second".to_vec());
        let both = [a.clone(), b.clone()].concat();
        assert_eq!(run(a.clone(), Compression::None, &a).expect("none"), a);
        assert_eq!(run([gzip(&a), gzip(&b)].concat(), Compression::Gzip, &both).expect("members"), both);
        let z = |d: &[u8]| zstd::encode_all(d, 1).expect("zstd");
        assert_eq!(run([z(&a), z(&b)].concat(), Compression::Zstd, &both).expect("frames"), both);
        assert_eq!(run(gzip(&a), Compression::Detect, &a).expect("detect"), a);
    }

    #[test]
    fn what_is_wrong_is_told() {
        let data = vec![1; 5000];
        assert!(run(data.clone(), Compression::Gzip, &data).expect_err("magic").contains("says Gzip"));
        assert!(run(gzip(&data), Compression::None, &data).expect_err("magic").contains("says None"));
        assert!(run(gzip(&data), Compression::Gzip, b"other").expect_err("diff").contains("config says"));
        let mut broken = gzip(&data);
        broken.truncate(20);
        assert!(run(broken, Compression::Gzip, &data).is_err());

        let expected = Expected { blob: Some((digest_of(b"x"), 3)), diff_id: digest_of(&data) };
        let (mut reader, _) =
            open(Box::new(Cursor::new(data.clone())), Compression::None, expected.clone(), &Unpacker::Here);
        assert!(reader.read_to_end(&mut Vec::new()).expect_err("long").to_string().contains("longer"));
        let (mut reader, verifier) =
            open(Box::new(Cursor::new(vec![1; 3])), Compression::None, expected, &Unpacker::Here);
        reader.read_to_end(&mut Vec::new()).expect("read");
        assert!(matches!(verifier.verify(), Err(Mismatch::Blob { .. })));
    }
}
