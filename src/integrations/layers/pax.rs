//! Values in pax headers (POSIX.1-2001, pax interchange format). Pure; None is what the format does not allow.

use super::tar::Time;

/// Keys and values.
pub(super) type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// "length key=value\n" records; the length counts itself, and values may hold anything.
pub(super) fn parse_pax(mut data: &[u8]) -> Option<Records> {
    let mut records = Vec::new();
    while !data.is_empty() {
        // Some writers pad with NULs.
        if data.iter().all(|b| *b == 0) {
            break;
        }
        let space = data.iter().take(20).position(|b| *b == b' ')?;
        let length = usize::try_from(decimal(&data[..space])?).ok()?;
        if length <= space + 2 || length > data.len() || data[length - 1] != b'\n' {
            return None;
        }
        let record = &data[space + 1..length - 1];
        let equals = record.iter().position(|b| *b == b'=')?;
        if equals == 0 || record[..equals].contains(&0) {
            return None;
        }
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        data = &data[length..];
    }
    Some(records)
}

pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with an optional sign and fraction.
pub(super) fn pax_time(text: &[u8]) -> Option<Time> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanos: u32 = digits.parse().ok()?;
    match (whole.starts_with('-'), nanos) {
        // -1.25 is 0.75 s after -2.
        (true, 1..) => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos)),
        _ => Some((seconds, nanos)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_records_may_hold_newlines() {
        let mut data = b"19 SCHILY.xattr.a=b\n".to_vec();
        data[..2].copy_from_slice(b"20");
        data.extend_from_slice(b"12 k=\n\0\nxyz\n");
        let records = parse_pax(&data).expect("records");
        assert_eq!(records[0], (b"SCHILY.xattr.a".to_vec(), b"b".to_vec()));
        assert_eq!(records[1], (b"k".to_vec(), b"\n\0\nxyz".to_vec()));
        for bad in ["5 a=b", "99 a=b\n", "6 ab=\n!", "x a=b\n", "4 =\n"] {
            assert!(parse_pax(bad.as_bytes()).is_none(), "{bad}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(pax_time(b"1.5"), Some((1, 500_000_000)));
        assert_eq!(pax_time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(pax_time(b"12"), Some((12, 0)));
        assert_eq!(pax_time(b"12x"), None);
    }
}
