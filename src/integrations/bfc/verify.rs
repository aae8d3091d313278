//! Looks whether a container is sound: quickly (its objects fit its index) or deeply (all content is read).
//!
//! Called by the command line. Reports what is wrong instead of stopping at it, up to a limit. Changes nothing.

use std::io::Read;

use super::error::ReadError;
use super::format::{Entry, Kind};
use super::reader::Container;

/// Problems that are told.
pub const MAX_PROBLEMS: usize = 100;

/// What was found.
#[derive(Debug, Default)]
pub struct Verified {
    /// Entries that were looked at.
    pub entries: u64,
    /// Bytes of content that were read and were right.
    pub bytes: u64,
    /// What is wrong; at most [`MAX_PROBLEMS`].
    pub problems: Vec<ReadError>,
}

/// Looks at each entry; `deep` reads the content, for which encrypted containers have to be unlocked. `seen` hears of each.
pub fn verify(container: &Container, deep: bool, seen: &mut dyn FnMut(&Entry)) -> Verified {
    let mut result = Verified::default();
    let mut buffer = vec![0; 256 << 10];
    for entry in container.entries() {
        let checked = match (deep, entry.kind()) {
            (true, Kind::File) => read(container, entry, &mut buffer),
            (true, Kind::Symlink) => container.target(entry).map(|target| target.len() as u64),
            _ => container.check_object(entry).map(|()| 0),
        };
        match checked {
            Ok(bytes) => result.bytes += bytes,
            Err(problem) => result.problems.push(problem),
        }
        result.entries += 1;
        seen(entry);
        if result.problems.len() >= MAX_PROBLEMS {
            break;
        }
    }
    result
}

fn read(container: &Container, entry: &Entry, buffer: &mut [u8]) -> Result<u64, ReadError> {
    let mut content = container.content(entry)?;
    let mut bytes = 0;
    loop {
        match content.read(buffer).map_err(|e| ReadError::of_stream(&entry.path, e))? {
            0 => return Ok(bytes),
            n => bytes += n as u64,
        }
    }
}
