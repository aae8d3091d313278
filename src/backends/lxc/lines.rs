//! Lines of a liblxc configuration that say what was meant, whatever is in their values.
//!
//! Used by `plan`. Pure. liblxc reads line by line, strips blanks around a value and quotes that enclose it, and has no
//! escapes but in mount entries (fstab(5)): a value that can't be written so that it is read again is refused by name.

use crate::core::error::{Error, Result};

/// Longest mount entry in bytes: of a longer one liblxc drops the end (getmntent_r(3) with a buffer of PATH_MAX), which are its
/// options.
const MAX_ENTRY: usize = 4000;

/// A configuration under construction.
#[derive(Debug, Default)]
pub struct Lines(String);

impl Lines {
    /// One line. The key is ours, or was checked by [`is_key`].
    pub fn put(&mut self, key: &str, value: &str) -> Result<()> {
        if let Some(bad) = value.chars().find(|c| c.is_control()) {
            return Err(Error::invalid(format!("{key}: {bad:?} can't be in a liblxc configuration")));
        }
        let quoted = |q| value.len() > 1 && value.starts_with(q) && value.ends_with(q);
        if value.trim() != value || quoted('"') || quoted('\'') {
            return Err(Error::invalid(format!("{key}: blanks or quotes around {value:?} would be lost in liblxc")));
        }
        self.0.extend([key, " = ", value, "\n"]);
        Ok(())
    }

    /// A mount: source, place from the container's root on, type, options.
    pub fn mount(&mut self, source: &str, place: &str, kind: &str, options: &[&str]) -> Result<()> {
        let at = escaped(place.trim_start_matches('/'));
        let options = if options.is_empty() { "defaults".to_owned() } else { options.join(",") };
        let entry = format!("{} {at} {kind} {options} 0 0", escaped(source));
        if entry.len() > MAX_ENTRY {
            let what = format!("mount {place:?}: {} bytes with its source and options", entry.len());
            return Err(Error::invalid(format!("{what}, liblxc reads {MAX_ENTRY} (a blank counts four times)")));
        }
        self.put("lxc.mount.entry", &entry)
    }

    /// The text.
    pub fn finish(self) -> String {
        self.0
    }
}

/// Whether a name may be part of a key.
pub fn is_key(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// As getmntent(3) reads it: octal for what would end a field or a line, and nothing else.
fn escaped(path: &str) -> String {
    let mut out = String::new();
    for c in path.chars() {
        match c {
            ' ' | '\t' | '\n' | '\\' => out.push_str(&format!("\\{:03o}", c as u32)),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As liblxc and getmntent(3) read it.
    fn read(line: &str) -> (String, String) {
        let (key, value) = line.split_once('=').expect("a key");
        (key.trim().to_owned(), value.trim().to_owned())
    }

    fn unescaped(text: &str) -> String {
        let (mut out, mut rest) = (String::new(), text);
        while let Some(at) = rest.find('\\') {
            out.push_str(&rest[..at]);
            out.push(match &rest[at + 1..at + 4] {
                "040" => ' ',
                "011" => '\t',
                "012" => '\n',
                "134" => '\\',
                other => panic!("getmntent does not read \\{other}"),
            });
            rest = &rest[at + 4..];
        }
        out + rest
    }

    proptest! {
        #[test]
        fn no_value_forges_a_line(value in "(?s).*") {
            let mut lines = Lines::default();
            match lines.put("lxc.uts.name", &value) {
                Err(_) => prop_assert_eq!(lines.finish(), ""),
                Ok(()) => {
                    let text = lines.finish();
                    prop_assert_eq!(text.lines().count(), 1);
                    prop_assert_eq!(read(text.trim_end_matches('\n')), ("lxc.uts.name".into(), value));
                }
            }
        }

        #[test]
        fn a_mount_is_six_fields_whatever_its_paths(source in "/[^\0]*", place in "/[^\0/][^\0]*") {
            let mut lines = Lines::default();
            if lines.mount(&source, &place, "none", &["rbind", "ro"]).is_err() {
                // Other control characters have no octal form.
                let beyond = |s: &str| s.chars().any(|c| c.is_control() && !matches!(c, '\t' | '\n'));
                prop_assert!(beyond(&source) || beyond(&place));
                return Ok(());
            }
            let text = lines.finish();
            prop_assert_eq!(text.lines().count(), 1);
            let (key, value) = read(text.trim_end_matches('\n'));
            prop_assert_eq!(key, "lxc.mount.entry");
            let fields: Vec<&str> = value.split([' ', '\t']).collect();
            prop_assert_eq!(fields.len(), 6);
            prop_assert_eq!(unescaped(fields[0]), source);
            prop_assert_eq!(unescaped(fields[1]), place.trim_start_matches('/'));
            prop_assert_eq!(fields[3], "rbind,ro");
        }
    }

    #[test]
    fn an_entry_is_never_cut() {
        let path = |blanks: usize| format!("/v/{}", " ".repeat(blanks));
        assert!(Lines::default().mount("/tmp", &path(900), "none", &["rbind", "ro"]).is_ok());
        let e = Lines::default().mount("/tmp", &path(1000), "none", &["rbind", "ro"]).expect_err("too long");
        assert!(e.to_string().contains("liblxc reads 4000"), "{e}");
    }

    #[test]
    fn what_liblxc_would_change_is_refused() {
        for bad in ["a\nlxc.hook.start = /x", "a\r", " a", "a ", "\"a\"", "'a'", "\u{85}", "\0"] {
            assert!(Lines::default().put("lxc.uts.name", bad).is_err(), "{bad:?}");
        }
        assert!(is_key("memory.max") && !is_key("a b") && !is_key("") && !is_key("x=1") && !is_key("a\nb"));
    }
}
