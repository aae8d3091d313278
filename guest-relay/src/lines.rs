//! Lines of a log in the kubelet's format, as a guest sends them: what is none is left out.
//!
//! Pure; called by [`crate::log`]. A guest may send anything: nothing that it says makes the node's log one that its readers can't
//! read, or holds more memory than the longest line takes.

/// Longest line in bytes, its end included. What may be under way of a stream has to have room for one.
pub const LONGEST: usize = 56 * 1024;
/// Longest content of a line that a container's plan may ask for, in bytes.
pub const CONTENT_MAX: u32 = 48 * 1024;
/// `2026-01-02T03:04:05.123456789Z`: digits where this has zeros.
const TIME: &[u8; 30] = b"0000-00-00T00:00:00.000000000Z";

/// Whether it is a line (without its end) that the kubelet reads.
pub fn is_line(line: &[u8]) -> bool {
    let Some((time, rest)) = line.split_first_chunk::<30>() else { return false };
    let fits = |(byte, want): (&u8, &u8)| if *want == b'0' { byte.is_ascii_digit() } else { byte == want };
    if !time.iter().zip(TIME).all(fits) {
        return false;
    }
    let number = |from: usize| (time[from] - b'0') * 10 + (time[from + 1] - b'0');
    let ranges = [(5, 1, 12), (8, 1, 31), (11, 0, 23), (14, 0, 59), (17, 0, 60)];
    let in_range = ranges.iter().all(|(at, least, most)| (*least..=*most).contains(&number(*at)));
    let tag = rest.strip_prefix(b" stdout ").or_else(|| rest.strip_prefix(b" stderr "));
    in_range && tag.is_some_and(|tag| tag.starts_with(b"F ") || tag.starts_with(b"P "))
}

/// What came of a log and is not written yet.
#[derive(Debug, Default)]
pub struct Lines {
    bytes: Vec<u8>,
    /// In the middle of a line that is too long.
    skipping: bool,
}

/// Whole lines that came.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Those that are lines of a log, with their ends.
    pub lines: Vec<u8>,
    /// Bytes that they were, with those that are left out.
    pub count: usize,
    /// Something was left out.
    pub refused: bool,
}

impl Lines {
    /// Takes bytes as they come.
    pub fn input(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Forgets what is no whole line.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Takes all whole lines, and what can't become one.
    pub fn take(&mut self) -> Taken {
        let mut taken = Taken::default();
        while let Some(end) = self.bytes[taken.count..].iter().position(|b| *b == b'\n') {
            let line = &self.bytes[taken.count..=taken.count + end];
            taken.count += line.len();
            if !std::mem::take(&mut self.skipping) && line.len() <= LONGEST && is_line(&line[..end]) {
                taken.lines.extend_from_slice(line);
            } else {
                taken.refused = true;
            }
        }
        if self.bytes.len() - taken.count >= LONGEST || self.skipping && self.bytes.len() > taken.count {
            (self.skipping, taken.refused, taken.count) = (true, true, self.bytes.len());
        }
        if taken.count == self.bytes.len() {
            self.bytes = Vec::new();
        } else {
            self.bytes.drain(..taken.count);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEAD: &str = "2026-01-02T03:04:05.123456789Z stdout F ";

    #[test]
    fn what_is_a_line() {
        for good in ["x", "", "with spaces", "\0\u{1b}[31m"] {
            assert!(is_line(format!("{HEAD}{good}").as_bytes()), "{good:?}");
        }
        for (from, to) in [
            ("stdout", "stdin"),
            (" F ", " F"),
            (" F ", " X "),
            ("2026", "20x6"),
            ("Z", "+"),
            ("-01-", "-13-"),
            ("-01-", "-00-"),
            ("T03", "T24"),
            ("2026", "12026"),
            ("2026", " 2026"),
        ] {
            assert!(!is_line(HEAD.replace(from, to).as_bytes()), "{from} {to}");
        }
    }

    #[test]
    fn what_is_too_long_holds_nothing_up() {
        let mut lines = Lines::default();
        let good = format!("{HEAD}good\n");
        lines.input(good.as_bytes());
        lines.input(HEAD.as_bytes());
        let taken = lines.take();
        assert_eq!((taken.lines.as_slice(), taken.count, taken.refused), (good.as_bytes(), good.len(), false));
        let mut under_way = HEAD.len();
        for _ in 0..100 {
            lines.input(&[b'x'; 16 * 1024]);
            under_way += 16 * 1024;
            let taken = lines.take();
            assert!(taken.lines.is_empty());
            under_way -= taken.count;
            assert!(under_way < LONGEST);
        }
        lines.input(b"its end\n");
        lines.input(good.as_bytes());
        let taken = lines.take();
        assert_eq!(taken.lines, good.as_bytes());
        assert!(taken.refused);
        let longest = format!("{HEAD}{}\n", "x".repeat(CONTENT_MAX as usize));
        lines.input(longest.as_bytes());
        assert_eq!(lines.take().lines, longest.as_bytes());
    }

    proptest! {
        #[test]
        fn all_bytes_are_taken_and_only_lines_are_kept(
            pieces in prop::collection::vec(prop_oneof![
                Just(format!("{HEAD}content\n").into_bytes()),
                Just(HEAD.as_bytes().to_vec()),
                Just(b"\n".to_vec()),
                prop::collection::vec(any::<u8>(), 0..200),
            ], 0..30),
            cut in 1usize..100,
        ) {
            let all = pieces.concat();
            let (mut lines, mut kept, mut count) = (Lines::default(), Vec::new(), 0);
            for piece in all.chunks(cut) {
                lines.input(piece);
                let taken = lines.take();
                kept.extend(taken.lines);
                count += taken.count;
            }
            let whole = all.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
            prop_assert_eq!(count, whole);
            let want: Vec<u8> =
                all[..whole].split_inclusive(|b| *b == b'\n').filter(|l| is_line(&l[..l.len() - 1])).flatten().copied().collect();
            prop_assert_eq!(kept, want);
        }
    }
}
