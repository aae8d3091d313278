//! Windows of zstd: what a decoder keeps in memory. The format allows terabytes; builders' strongest levels take 32 MiB, and several
//! layers are decompressed at once.
//!
//! Called by the pipeline. Windows up to 8 MiB, which the format asks every decoder to have, are decoded side by side; larger ones, up
//! to 32 MiB, one at a time in this process. Whoever waits has downloaded no more than its queue holds.

use std::io::{self, Read};
use std::sync::{Condvar, Mutex, PoisonError};

/// Windows up to this power of two are decoded side by side.
pub(super) const SMALL: u32 = 23;
/// The largest one.
pub(super) const LARGE: u32 = 25;

/// Somebody decodes with a large window.
static TAKEN: Mutex<bool> = Mutex::new(false);
static GIVEN_BACK: Condvar = Condvar::new();

/// The right to a large window.
struct Permit;

impl Permit {
    fn wait() -> Self {
        let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = GIVEN_BACK.wait_while(taken, |taken| *taken).unwrap_or_else(PoisonError::into_inner);
        *taken = true;
        Self
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *TAKEN.lock().unwrap_or_else(PoisonError::into_inner) = false;
        GIVEN_BACK.notify_one();
    }
}

/// A decoder that may have a large window. The right to it ends with the content: what follows may wait for another layer.
struct Gated {
    inner: Box<dyn Read + Send>,
    permit: Option<Permit>,
}

impl Read for Gated {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let done = self.inner.read(buffer);
        if !buffer.is_empty() && !matches!(&done, Ok(1..)) {
            self.permit = None;
        }
        done
    }
}

/// Makes a decoder for a stream that begins with `start`, when it may be made.
pub(super) fn decoder(
    start: &[u8],
    make: impl FnOnce(u32) -> io::Result<Box<dyn Read + Send>>,
) -> io::Result<Box<dyn Read + Send>> {
    match of_frame(start) {
        Some(bytes) if bytes <= 1 << SMALL => make(SMALL),
        // What begins with a frame to be skipped may go on with anything.
        _ => {
            let permit = Some(Permit::wait());
            Ok(Box::new(Gated { inner: make(LARGE)?, permit }))
        }
    }
}

/// Bytes of the window that the first frame asks for (RFC 8878, section 3.1.1.1).
fn of_frame(start: &[u8]) -> Option<u64> {
    let rest = start.strip_prefix(&[0x28, 0xb5, 0x2f, 0xfd])?;
    let (descriptor, rest) = rest.split_first()?;
    if descriptor & 0x20 == 0 {
        let window = rest.first()?;
        let base = 1_u64 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    // Without a window of its own the content is one.
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let size = 1 << (descriptor >> 6);
    let field = rest.get(dictionary..dictionary + size)?;
    let value = field.iter().rev().fold(0_u64, |sum, byte| (sum << 8) | u64::from(*byte));
    Some(if size == 2 { value + 256 } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn frame(log: u32, content: &[u8]) -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).expect("an encoder");
        encoder.window_log(log).expect("a window");
        encoder.write_all(content).expect("content");
        encoder.finish().expect("a frame")
    }

    #[test]
    fn what_frames_say_of_their_window() {
        for log in [10, 17, 23, 24, 27] {
            assert_eq!(of_frame(&frame(log, &[7; 100])), Some(1 << log), "{log}");
        }
        for size in [10, 300, 100_000] {
            let whole = zstd::bulk::compress(&vec![7; size], 3).expect("a frame");
            assert_eq!(of_frame(&whole), Some(size as u64), "{size}");
        }
        for bad in [&b""[..], b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\x20", b"\x50\x2a\x4d\x18\0\0\0\0"] {
            assert_eq!(of_frame(bad), None);
        }
    }

    #[test]
    fn large_ones_wait_for_each_other_until_the_content_ends() {
        let open = |data: &'static [u8]| {
            decoder(b"\x50\x2a\x4d\x18", |log| {
                assert_eq!(log, LARGE);
                Ok(Box::new(data) as _)
            })
        };
        let mut first = open(b"content").expect("a decoder");
        let second = std::thread::spawn(move || open(b"").expect("a decoder").read(&mut [0]).expect("an end"));
        let small = decoder(&frame(20, b"x"), |log| Ok(Box::new(io::repeat(log as u8)) as _)).expect("a decoder");
        drop(small);
        let mut content = Vec::new();
        first.read_to_end(&mut content).expect("content");
        // Still there, and no longer in anybody's way.
        assert_eq!(second.join().expect("no panic"), 0);
        assert_eq!(content, b"content");
        drop(first);
    }
}
