//! Reads a container's CRI log: `<time> <stdout|stderr> <F|P> <content>`; P lines go on in the next one.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};

use camino::Utf8Path;

/// One line of the log, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// Which stream: standard error, else standard output.
    pub stderr: bool,
    /// The line goes on in the next one.
    pub partial: bool,
    /// What was written.
    pub content: &'a [u8],
}

/// Parses a line without its newline; None if it is none.
pub fn parse(line: &[u8]) -> Option<Line<'_>> {
    let mut fields = line.splitn(4, |b| *b == b' ');
    let (_time, stream, tag) = (fields.next()?, fields.next()?, fields.next()?);
    let content = fields.next()?;
    let stderr = match stream {
        b"stdout" => false,
        b"stderr" => true,
        _ => return None,
    };
    let partial = match tag.split(|b| *b == b':').next()? {
        b"F" => false,
        b"P" => true,
        _ => return None,
    };
    Some(Line { stderr, partial, content })
}

/// A log that is read as it grows.
pub struct Follower {
    reader: BufReader<File>,
    line: Vec<u8>,
}

impl Follower {
    /// From its beginning.
    pub fn open(path: &Utf8Path) -> io::Result<Self> {
        Ok(Self { reader: BufReader::new(File::open(path)?), line: Vec::new() })
    }

    /// Prints what is there now; a line that is still being written waits for its end.
    pub fn print_available(&mut self) -> io::Result<()> {
        let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
        loop {
            self.reader.read_until(b'\n', &mut self.line)?;
            if self.line.last() != Some(&b'\n') {
                break;
            }
            self.line.pop();
            if let Some(line) = parse(&self.line) {
                let to: &mut dyn Write = if line.stderr { &mut err } else { &mut out };
                to.write_all(line.content)?;
                if !line.partial {
                    to.write_all(b"\n")?;
                }
            }
            self.line.clear();
        }
        out.flush()?;
        err.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_taken_apart() {
        let line = parse(b"2026-01-02T03:04:05.000000006Z stderr P a b ").expect("a line");
        assert_eq!(line, Line { stderr: true, partial: true, content: b"a b " });
        assert_eq!(parse(b"t stdout F ").expect("empty").content, b"");
        for bad in [&b""[..], b"t stdin F x", b"t stdout Q x", b"no"] {
            assert!(parse(bad).is_none());
        }
    }
}
