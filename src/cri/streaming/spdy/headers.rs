//! SPDY/3 header blocks: names and values, compressed with one zlib state per direction of a connection.
//!
//! A block that does not fit ends the connection (the zlib state is lost with it): [`HeaderError`]. Never more than
//! [`MAX_BLOCK`] bytes are inflated.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::dictionary::DICTIONARY;

/// Longest block in bytes, inflated.
pub const MAX_BLOCK: usize = 64 << 10;
/// Most names in a block.
pub const MAX_NAMES: usize = 128;

/// What can be wrong with a header block.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// Not zlib, or not after what came before.
    #[error("a header block can't be inflated")]
    Zlib(#[source] flate2::DecompressError),
    /// More than [`MAX_BLOCK`] or [`MAX_NAMES`].
    #[error("a header block is too long")]
    TooLong,
    /// Lengths that do not fit, or text that is not UTF-8.
    #[error("a header block makes no sense")]
    Garbage,
}

/// Names (lower case) and values.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// Of pairs; names are made lower case.
    pub fn new<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(pairs.into_iter().map(|(n, v)| (n.to_ascii_lowercase(), v.to_owned())).collect())
    }

    /// The first value of a name, which is asked for in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| v.split('\0').next().unwrap_or_default())
    }

    /// Parses an inflated block.
    pub fn parse(mut block: Bytes) -> Result<Self, HeaderError> {
        let text = |block: &mut Bytes| -> Result<String, HeaderError> {
            let length = block.try_get_u32().map_err(|_| HeaderError::Garbage)? as usize;
            if length > block.len() {
                return Err(HeaderError::Garbage);
            }
            String::from_utf8(block.split_to(length).to_vec()).map_err(|_| HeaderError::Garbage)
        };
        let count = block.try_get_u32().map_err(|_| HeaderError::Garbage)? as usize;
        if count > MAX_NAMES {
            return Err(HeaderError::TooLong);
        }
        let mut pairs = Vec::with_capacity(count);
        for _ in 0..count {
            let name = text(&mut block)?.to_ascii_lowercase();
            pairs.push((name, text(&mut block)?));
        }
        if block.is_empty() { Ok(Self(pairs)) } else { Err(HeaderError::Garbage) }
    }

    fn write(&self) -> BytesMut {
        let mut block = BytesMut::new();
        block.put_u32(self.0.len() as u32);
        for (name, value) in &self.0 {
            for text in [name, value] {
                block.put_u32(text.len() as u32);
                block.put_slice(text.as_bytes());
            }
        }
        block
    }
}

/// Inflates the blocks that come in, in their order.
pub struct Inflater(Decompress);

impl Default for Inflater {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Inflater {
    /// Headers of a block.
    pub fn inflate(&mut self, block: &[u8]) -> Result<Headers, HeaderError> {
        Headers::parse(self.raw(block)?)
    }

    fn raw(&mut self, block: &[u8]) -> Result<Bytes, HeaderError> {
        let mut out = Vec::with_capacity(1024);
        let start = self.0.total_in();
        loop {
            let taken = (self.0.total_in() - start) as usize;
            let input = block.get(taken..).unwrap_or_default();
            let before = out.len();
            match self.0.decompress_vec(input, &mut out, FlushDecompress::Sync) {
                Ok(Status::StreamEnd) => return Err(HeaderError::Garbage),
                Ok(_) => {}
                Err(e) if e.needs_dictionary().is_some() => {
                    self.0.set_dictionary(DICTIONARY).map_err(HeaderError::Zlib)?;
                    continue;
                }
                Err(e) => return Err(HeaderError::Zlib(e)),
            }
            let all_in = (self.0.total_in() - start) as usize == block.len();
            if out.len() < out.capacity() {
                if all_in {
                    return Ok(out.into());
                }
                if out.len() == before && input.len() == block.len() - (self.0.total_in() - start) as usize {
                    return Err(HeaderError::Garbage);
                }
                continue;
            }
            if out.len() >= MAX_BLOCK {
                return Err(HeaderError::TooLong);
            }
            out.reserve(out.len().min(MAX_BLOCK - out.len()));
        }
    }
}

/// Deflates the blocks that go out, in their order.
pub struct Deflater(Compress);

impl Default for Deflater {
    fn default() -> Self {
        let mut compress = Compress::new(Compression::fast(), true);
        // Before any input it can't fail; without it the peer inflates all the same.
        let _ = compress.set_dictionary(DICTIONARY);
        Self(compress)
    }
}

impl Deflater {
    /// The block of some headers.
    pub fn deflate(&mut self, headers: &Headers) -> Bytes {
        let plain = headers.write();
        let mut out = Vec::with_capacity(plain.len() + 64);
        let start = self.0.total_in();
        loop {
            let taken = (self.0.total_in() - start) as usize;
            let input = plain.get(taken..).unwrap_or_default();
            let done = self.0.compress_vec(input, &mut out, FlushCompress::Sync);
            if done.is_err() || out.len() < out.capacity() {
                return out.into();
            }
            out.reserve(64.max(out.len()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_state_per_direction_goes_through_many_blocks() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        let mut lengths = Vec::new();
        for round in 0..50 {
            let port = (8000 + round).to_string();
            let headers = Headers::new([("streamType", "data"), ("port", port.as_str()), ("requestID", "17")]);
            let block = deflater.deflate(&headers);
            lengths.push(block.len());
            let got = inflater.inflate(&block).expect("inflate");
            assert_eq!(got, headers);
            assert_eq!((got.get("streamtype"), got.get("port")), (Some("data"), Some(port.as_str())));
        }
        assert!(lengths[49] < lengths[0], "the state is not kept: {lengths:?}");
        assert_eq!(inflater.inflate(&deflater.deflate(&Headers::default())).expect("empty"), Headers::default());
    }

    #[test]
    fn the_dictionary_is_the_drafts() {
        // A block made by zlib itself with the draft's dictionary: {"method": "GET", "version": "HTTP/1.1"}.
        let mut deflater = Deflater::default();
        let block = deflater.deflate(&Headers::new([("method", "GET"), ("version", "HTTP/1.1")]));
        // CMF, FLG with FDICT, then the dictionary's Adler-32.
        assert_eq!(block[1] & 0x20, 0x20);
        assert_eq!(block[2..6], [0xe3, 0xc6, 0xa7, 0xc2]);
    }

    #[test]
    fn bombs_and_garbage_are_refused() {
        let mut deflater = Deflater::default();
        let long = "x".repeat(MAX_BLOCK);
        let block = deflater.deflate(&Headers::new([("a", long.as_str())]));
        assert!(block.len() < 1000);
        assert!(matches!(Inflater::default().inflate(&block), Err(HeaderError::TooLong)));
        let many: Vec<_> = (0..MAX_NAMES + 1).map(|_| ("a", "b")).collect();
        let block = Deflater::default().deflate(&Headers::new(many));
        assert!(matches!(Inflater::default().inflate(&block), Err(HeaderError::TooLong)));
        assert!(matches!(Inflater::default().inflate(b"not zlib"), Err(HeaderError::Zlib(_))));
        for bad in
            [&b""[..], b"\0\0\0\x01", b"\0\0\0\x01\0\0\0\x09a", b"\0\0\0\0x", b"\0\0\0\x01\0\0\0\x01\xff\0\0\0\0"]
        {
            assert!(Headers::parse(Bytes::from_static(bad)).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn hostile_blocks_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..500), cut in 0usize..40) {
            let _ = Headers::parse(Bytes::from(bytes.clone()));
            let _ = Inflater::default().inflate(&bytes);
            // After a good beginning.
            let mut good = Deflater::default().deflate(&Headers::new([("streamtype", "error")])).to_vec();
            good.truncate(good.len().saturating_sub(cut));
            good.extend(bytes);
            let _ = Inflater::default().inflate(&good);
        }

        #[test]
        fn all_headers_come_back(pairs in proptest::collection::vec(("[a-z:-]{1,20}", "[ -~]{0,300}"), 0..20)) {
            let headers = Headers::new(pairs.iter().map(|(n, v)| (n.as_str(), v.as_str())));
            let block = Deflater::default().deflate(&headers);
            prop_assert_eq!(Inflater::default().inflate(&block).expect("inflate"), headers);
        }
    }
}
