//! The kubelet's log format: `<time> <stdout|stderr> <F|P> <content>\n`, P when the line goes on.
//!
//! Pure; the writer thread calls it with what it has read. Every read is written at once: a line that has no end yet
//! gets tag P, and its rest follows with the next read. Contents joined, with a newline after each F, are the input.

/// Longest content of one log line unless the plan says otherwise, in bytes.
pub const LINE_MAX: usize = 16 * 1024;

/// Where output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Stdout => b" stdout ",
            Self::Stderr => b" stderr ",
        }
    }
}

/// Appends one log line for the beginning of `input` (not empty) and returns how much of the input it took:
/// up to a newline, `max` bytes, or the input's end.
pub fn line(time: &[u8], stream: Stream, max: usize, input: &[u8], out: &mut Vec<u8>) -> usize {
    let window = &input[..input.len().min(max.max(1))];
    let (content, tag, taken) = match window.iter().position(|b| *b == b'\n') {
        Some(end) => (&window[..end], b"F ", end + 1),
        // A newline right behind a full window ends this line: no empty line for it.
        None if input.get(window.len()) == Some(&b'\n') => (window, b"F ", window.len() + 1),
        None => (window, b"P ", window.len()),
    };
    out.extend_from_slice(time);
    out.extend_from_slice(stream.name());
    out.extend_from_slice(tag);
    out.extend_from_slice(content);
    out.push(b'\n');
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn format(reads: &[Vec<u8>], max: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for read in reads {
            let mut rest = read.as_slice();
            while !rest.is_empty() {
                let n = line(b"T", Stream::Stderr, max, rest, &mut out);
                rest = &rest[n..];
            }
        }
        out
    }

    /// What a reader of the log makes of it.
    fn reassemble(log: &[u8], max: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for line in log.split_inclusive(|b| *b == b'\n') {
            let body = line.strip_prefix(b"T stderr ").expect("prefix").strip_suffix(b"\n").expect("newline");
            assert!(body.len() - 2 <= max.max(1), "line too long");
            out.extend_from_slice(&body[2..]);
            match &body[..2] {
                b"F " => out.push(b'\n'),
                b"P " => {}
                tag => panic!("tag {tag:?}"),
            }
        }
        out
    }

    #[test]
    fn examples() {
        assert_eq!(
            format(&[b"a\nbc".to_vec(), b"d\n\n".to_vec()], 100),
            b"T stderr F a\nT stderr P bc\nT stderr F d\nT stderr F \n"
        );
        assert_eq!(format(&[b"abcdef\n".to_vec()], 3), b"T stderr P abc\nT stderr F def\n");
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_added(
            reads in prop::collection::vec(prop::collection::vec(prop_oneof![Just(b'\n'), Just(b'x'), any::<u8>()], 1..200), 0..20),
            max in 0usize..50,
        ) {
            prop_assert_eq!(reassemble(&format(&reads, max), max), reads.concat());
        }
    }
}
