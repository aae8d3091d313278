//! The verbs of `bfc` that only tell: list and info. Names are bytes: what would break a line is escaped.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::ffi::OsStringExt;

use anyhow::{Result, anyhow};
use clap::ArgMatches;

use super::path;
use super::work::open;
use crate::integrations::bfc::error::Name;
use crate::integrations::bfc::format::Checksum;
use crate::integrations::bfc::{Container, Entry, Kind};
use crate::utils::time::rfc3339;

/// The entry that is asked for, without a slash at its end.
fn entry_path(matches: &ArgMatches) -> Option<Vec<u8>> {
    let mut path = matches.get_one::<OsString>("PATH")?.clone().into_vec();
    while path.last() == Some(&b'/') {
        path.pop();
    }
    Some(path)
}

/// The entry that is asked for, which is there with what is below it; empty for all.
fn wanted(container: &Container, matches: &ArgMatches) -> Result<Vec<u8>> {
    let path = entry_path(matches).unwrap_or_default();
    match container.below(&path).next().is_none() && !path.is_empty() {
        true => Err(anyhow!("there is no entry {}", Name::from(&*path))),
        false => Ok(path),
    }
}

pub(super) fn list(matches: &ArgMatches) -> Result<u8> {
    let container = open(matches)?;
    let flag = |name| matches.get_flag(name);
    let (long, size, checksum) = (flag("long"), flag("size"), flag("checksum"));
    let mut out = String::new();
    for entry in container.below(&wanted(&container, matches)?) {
        if long {
            let _ = write!(out, "{} {:>8} {} ", mode(entry), short(entry.orig_size), time(entry.mtime_ns));
        } else if size {
            let _ = write!(out, "{:>8} ", short(entry.orig_size));
        }
        if checksum && entry.kind() == Kind::File {
            let _ = write!(out, "{:#010x} ", entry.crc);
        }
        let _ = write!(out, "{}", name(&entry.path));
        if long && entry.kind() == Kind::Symlink {
            let _ = write!(out, " -> {}", name(&container.target(entry).map_err(super::work::plain)?));
        }
        out.push('\n');
    }
    print(&out)
}

pub(super) fn info(matches: &ArgMatches) -> Result<u8> {
    let container = open(matches)?;
    let mut out = String::new();
    match entry_path(matches) {
        Some(path) => {
            let entry = container.find(&path).ok_or_else(|| anyhow!("there is no entry {}", Name::from(&*path)))?;
            about_entry(&mut out, entry);
        }
        None => about(&mut out, &container, &path(matches, "FILE"), matches.get_flag("detailed")),
    }
    print(&out)
}

/// A pipe that nobody reads any more is no failure.
pub(super) fn print(text: &str) -> Result<u8> {
    if crate::utils::stdout::was_closed() && !text.is_empty() {
        return Err(anyhow!("writing to standard output: it is closed"));
    }
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(anyhow!("writing to standard output: {e}")),
        _ => Ok(0),
    }
}

fn about(out: &mut String, container: &Container, file: &camino::Utf8Path, detailed: bool) {
    let entries = container.entries();
    let count = |kind| entries.iter().filter(|e| e.kind() == kind).count();
    let _ = writeln!(out, "Container: {file}");
    let _ = writeln!(out, "Container size: {} bytes", container.size());
    let _ = writeln!(out, "UUID: {}", uuid::Uuid::from_bytes(container.header().uuid));
    let checksum = match container.checksum() {
        Checksum::Raw => "Castagnoli without inversion",
        Checksum::Standard => "CRC-32C",
    };
    let _ = writeln!(out, "Checksum: {checksum}");
    if detailed {
        out.push_str("\nEntries:\n");
        for e in entries {
            let _ = writeln!(
                out,
                "  {} {:>8} {} {:#010x} {}",
                mode(e),
                short(e.orig_size),
                time(e.mtime_ns),
                e.crc,
                name(&e.path)
            );
        }
    }
    let _ = writeln!(out, "\nSummary:\n  Total entries: {}", entries.len());
    let _ = writeln!(out, "  Files: {}\n  Directories: {}", count(Kind::File), count(Kind::Folder));
    let _ = writeln!(out, "  Symlinks: {}", count(Kind::Symlink));
    let _ = writeln!(out, "  Compressed: {}", entries.iter().filter(|e| e.compressed).count());
    if container.is_encrypted() {
        let by = if container.header().salt == [0; 32] { "key file" } else { "password" };
        let _ = writeln!(out, "  Encryption: ChaCha20-Poly1305, {by}");
    }
    let sum = |of: fn(&Entry) -> u64| entries.iter().map(of).fold(0_u64, u64::saturating_add);
    let (whole, stored) = (sum(|e| e.orig_size), sum(|e| e.size));
    let _ = writeln!(out, "  Uncompressed size: {whole} bytes\n  Stored size: {stored} bytes");
    if whole > 0 {
        let _ = writeln!(out, "  Storage ratio: {:.1}%", stored as f64 / whole as f64 * 100.0);
    }
}

fn about_entry(out: &mut String, entry: &Entry) {
    let kind = match entry.kind() {
        Kind::File => "Regular file",
        Kind::Folder => "Directory",
        Kind::Symlink => "Symlink",
    };
    let _ = writeln!(out, "Entry: {}\nType: {kind}", name(&entry.path));
    let _ = writeln!(out, "Mode: {} (0{:04o})", mode(entry), entry.mode & 0o7777);
    let _ = writeln!(out, "Size: {} bytes", entry.orig_size);
    if entry.kind() == Kind::File {
        let _ = writeln!(out, "Compression: {}", if entry.compressed { "zstd" } else { "none" });
        let _ = writeln!(out, "Encryption: {}", if entry.encrypted { "ChaCha20-Poly1305" } else { "none" });
        let _ = writeln!(out, "Stored size: {} bytes", entry.size);
        let _ = writeln!(out, "CRC32C: {:#010x}\nObject offset: {}", entry.crc, entry.offset);
    }
    let _ = writeln!(out, "Modified: {}", time(entry.mtime_ns));
}

/// A name for a terminal: text as it is, control characters and what is no text escaped.
pub(super) fn name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => bytes.escape_ascii().to_string(),
    }
}

fn mode(entry: &Entry) -> String {
    let kind = match entry.kind() {
        Kind::File => '-',
        Kind::Folder => 'd',
        Kind::Symlink => 'l',
    };
    let mut text: Vec<char> = std::iter::once(kind)
        .chain((0..9).map(|n| if entry.mode & (0o400 >> n) != 0 { ['r', 'w', 'x'][n % 3] } else { '-' }))
        .collect();
    for (bit, at, set, unset) in [(0o4000, 3, 's', 'S'), (0o2000, 6, 's', 'S'), (0o1000, 9, 't', 'T')] {
        if entry.mode & bit != 0 {
            text[at] = if text[at] == 'x' { set } else { unset };
        }
    }
    text.into_iter().collect()
}

fn short(size: u64) -> String {
    let units = ["B", "K", "M", "G", "T"];
    let (mut value, mut unit) = (size as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    if unit == 0 { format!("{size}B") } else { format!("{value:.1}{}", units[unit]) }
}

/// Date and time in UTC, to the minute.
fn time(ns: u64) -> String {
    rfc3339(ns)[..16].replace('T', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_to_the_minute() {
        assert_eq!(time(1_700_000_000_000_000_000), "2023-11-14 22:13");
    }

    #[test]
    fn names_break_no_line() {
        assert_eq!(name("\u{e4} b".as_bytes()), "\u{e4} b");
        assert_eq!(name(b"a\nb\x1b"), "a\\nb\\x1b");
        assert_eq!(name(&[b'a', 0xff]), "a\\xff");
        assert_eq!((short(1023), short(1536)), ("1023B".to_owned(), "1.5K".to_owned()));
    }
}
