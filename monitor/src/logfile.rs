//! A container's log file, with what a failed write left unwritten.
//!
//! Used by the writer thread alone. A write that fails keeps the rest; while a rest is there nothing else may be
//! written, so that lines never mix. Fails with the I/O error; a crash may leave the last line cut.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The file, open for appending; or nothing, for output that is discarded.
pub struct LogFile {
    path: PathBuf,
    file: Option<File>,
    /// Lines not written, from the beginning of the first one.
    rest: Vec<u8>,
    /// So many bytes of `rest` are in this file already.
    cut: usize,
}

impl LogFile {
    /// Opens or makes the file; its folder must be there. An empty path discards.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let file = if path.as_os_str().is_empty() { None } else { Some(append(&path)?) };
        Ok(Self { path, file, rest: Vec::new(), cut: 0 })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether what is written goes nowhere.
    pub fn discards(&self) -> bool {
        self.file.is_none()
    }

    /// Opens the file anew at the same path (it was renamed away). A line that was cut in the old file is
    /// written whole to the new one.
    pub fn reopen(&mut self) -> io::Result<()> {
        if self.file.is_some() {
            self.file = Some(append(&self.path)?);
            self.cut = 0;
        }
        Ok(())
    }

    /// Appends whole lines; on failure keeps those that are not written.
    pub fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut done = 0;
        let result = write_from(file, lines, &mut done);
        if result.is_err() {
            let line = lines[..done].iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
            self.rest = lines[line..].to_vec();
            self.cut = done - line;
        }
        result
    }

    /// Appends what an earlier write left.
    pub fn write_rest(&mut self) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        write_from(file, &self.rest, &mut self.cut)?;
        self.rest = Vec::new();
        self.cut = 0;
        Ok(())
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

/// Writes `bytes` from `done` on, which always says how far it came.
fn write_from(file: &mut File, bytes: &[u8], done: &mut usize) -> io::Result<()> {
    while *done < bytes.len() {
        match file.write(&bytes[*done..]) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
            Ok(n) => *done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
