//! Parts of files as streams: what can be read anywhere, and a stretch of it.
//!
//! Called by readers of archives and containers, several streams of one file at a time. Fails with the plain I/O error; a
//! source that has become shorter is an unexpected end.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Something that can be read anywhere: a file, or bytes in memory.
pub trait ReadAt: Send + Sync {
    /// Reads at `offset`; 0 at the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Bytes there are.
    fn size(&self) -> io::Result<u64>;
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|at| self.get(at..)).unwrap_or_default();
        let n = rest.len().min(buffer.len());
        buffer[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// A part of a source as a stream.
pub struct Section<S: ?Sized> {
    source: Arc<S>,
    at: u64,
    left: u64,
}

impl<S: ReadAt + ?Sized> Section<S> {
    /// `size` bytes from `at` on.
    pub fn new(source: Arc<S>, at: u64, size: u64) -> Self {
        Self { source, at, left: size }
    }

    /// Bytes that were not read yet.
    pub fn left(&self) -> u64 {
        self.left
    }
}

impl<S: ReadAt + ?Sized> Read for Section<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        let n = self.source.read_at(&mut buffer[..want], self.at)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_ends_where_it_should_and_a_short_source_is_an_error() {
        let source = Arc::new(b"0123456789".to_vec());
        let mut text = String::new();
        let mut section = Section::new(source.clone(), 3, 4);
        section.read_to_string(&mut text).expect("read");
        assert_eq!((text.as_str(), section.left()), ("3456", 0));
        let e = Section::new(source, 8, 4).read_to_end(&mut Vec::new()).expect_err("too short");
        assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof);
    }
}
