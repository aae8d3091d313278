//! liblxc's log as people want to be told of a failure: what it says, without when, where in its source, and of whom.
//!
//! Called by the helper when it has failed; what it fails by leaves the log as it was.

use std::io::{self, Read, Seek, Write};

/// A longer log stays as it is, in bytes.
const LOG_MAX: u64 = 256 << 10;

/// Leaves of its lines what they say.
pub fn make_plain(log: &str) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new().read(true).write(true).open(log)?;
    let meta = file.metadata()?;
    if !meta.is_file() || meta.len() > LOG_MAX {
        return Ok(());
    }
    let mut bytes = Vec::new();
    Read::by_ref(&mut file).take(LOG_MAX).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let text: String = text.lines().flat_map(|line| [said(line), "\n"]).collect();
    file.rewind()?;
    file.set_len(0)?;
    file.write_all(text.as_bytes())
}

/// `lxc NAME TIME LEVEL    PART - ../src/lxc/FILE.c:FUNCTION:LINE - WORDS`.
fn said(line: &str) -> &str {
    let words = || {
        let rest = line.strip_prefix("lxc ")?;
        let (_, rest) = rest.split_once(' ')?;
        let (time, rest) = rest.split_once(' ')?;
        let mut parts = rest.splitn(3, " - ");
        let (_, place, said) = (parts.next()?, parts.next()?, parts.next()?);
        let is_time = time.contains('.') && time.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        (is_time && place.split(':').count() == 3).then_some(said)
    };
    words().unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_liblxcs_lines_the_words_are_left() {
        let line = "lxc abc 20261201023623.167 ERROR    utils - ../src/lxc/utils.c:safe_mount:1334 - Not a directory - Failed to mount";
        assert_eq!(said(line), "Not a directory - Failed to mount");
        for other in ["", "lxc", "lxc a - b - c", "executable file `x` not found", "lxc a 1.2 x - y - z"] {
            assert_eq!(said(other), other);
        }
        let log = std::env::temp_dir().join(format!("lxcri-words-{}", std::process::id()));
        let path = log.to_str().expect("UTF-8");
        let mut file = std::fs::File::create(&log).expect("a file");
        write!(file, "{line}\nours\n").expect("written");
        make_plain(path).expect("done");
        assert_eq!(std::fs::read_to_string(&log).expect("read"), "Not a directory - Failed to mount\nours\n");
        std::fs::remove_file(&log).expect("removed");
        make_plain("/dev/null").expect("left alone");
    }
}
