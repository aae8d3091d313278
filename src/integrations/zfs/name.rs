//! Names of datasets, snapshots, holds and properties, checked once at the edge.
//!
//! Called by everything that names something of ZFS. A name that was made here can be given to `zfs` as one argument: it
//! never begins with a dash and holds no character that ZFS itself refuses. Fails with [`BadName`]. No state.

use std::fmt;
use std::str::FromStr;

/// Longest full name of a dataset or snapshot in bytes (ZFS_MAX_DATASET_NAME_LEN is 256 with its NUL).
const MAX_NAME: usize = 255;

/// Not a name that ZFS takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {name:?}: {why}")]
pub struct BadName {
    kind: &'static str,
    name: String,
    why: &'static str,
}

fn bad(kind: &'static str, name: &str, why: &'static str) -> BadName {
    BadName { kind, name: name.chars().take(MAX_NAME).collect(), why }
}

/// What one part of a name may hold (zfs(8); `:` too, and spaces, which we refuse).
fn is_part(part: &str) -> bool {
    !part.is_empty()
        && part != "."
        && part != ".."
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':'))
}

/// A file system or volume: "rpool/lxcri/layers".
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dataset(String);

impl Dataset {
    /// The pool that it is in.
    pub fn pool(&self) -> &str {
        self.0.split('/').next().unwrap_or(&self.0)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its last part.
    pub fn leaf(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }

    /// A dataset below this one; `part` may have several parts.
    pub fn child(&self, part: &str) -> Result<Self, BadName> {
        format!("{}/{part}", self.0).parse()
    }

    /// A snapshot of it.
    pub fn snapshot(&self, name: &str) -> Result<Snapshot, BadName> {
        format!("{}@{name}", self.0).parse()
    }

    /// The parts below `root`: "layers/x" of "rpool/lxcri/layers/x" below "rpool/lxcri". None: it is not below.
    pub fn below(&self, root: &Self) -> Option<&str> {
        self.0.strip_prefix(root.as_str())?.strip_prefix('/')
    }
}

impl FromStr for Dataset {
    type Err = BadName;
    fn from_str(name: &str) -> Result<Self, BadName> {
        if name.len() > MAX_NAME {
            return Err(bad("dataset", name, "longer than 255 bytes"));
        }
        if !name.split('/').all(is_part) {
            return Err(bad("dataset", name, "parts are made of letters, digits, '-', '_', '.' and ':'"));
        }
        if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return Err(bad("dataset", name, "a pool's name begins with a letter"));
        }
        Ok(Self(name.to_owned()))
    }
}

/// A snapshot: "rpool/lxcri/layers/x@ready".
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Snapshot {
    dataset: Dataset,
    name: String,
}

impl Snapshot {
    /// What it is a snapshot of.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// The part after the `@`.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FromStr for Snapshot {
    type Err = BadName;
    fn from_str(text: &str) -> Result<Self, BadName> {
        let (dataset, name) = text.split_once('@').ok_or_else(|| bad("snapshot", text, "has no '@'"))?;
        if text.len() > MAX_NAME {
            return Err(bad("snapshot", text, "longer than 255 bytes"));
        }
        if !is_part(name) {
            return Err(bad("snapshot", text, "its name is made of letters, digits, '-', '_', '.' and ':'"));
        }
        Ok(Self { dataset: dataset.parse()?, name: name.to_owned() })
    }
}

impl fmt::Display for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.dataset, self.name)
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A hold's tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag(String);

impl Tag {
    /// The tag.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Tag {
    type Err = BadName;
    fn from_str(name: &str) -> Result<Self, BadName> {
        match is_part(name) && !name.starts_with('-') && name.len() <= MAX_NAME {
            true => Ok(Self(name.to_owned())),
            false => Err(bad("hold", name, "a tag is made of letters, digits, '-', '_', '.' and ':'")),
        }
    }
}

/// Longest token to go on with a stream, in bytes. OpenZFS's have some 300 (a name, five numbers, compressed, in hex).
const MAX_TOKEN: usize = 4096;

/// What `receive_resume_token` says: where a stream was cut (zfs-receive(8), `-s`). What is in it is told by the pool that sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumeToken(String);

impl ResumeToken {
    /// The token.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ResumeToken {
    type Err = BadName;
    fn from_str(text: &str) -> Result<Self, BadName> {
        let fits = text.split('-').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit()));
        match fits && text.contains('-') && text.len() <= MAX_TOKEN {
            true => Ok(Self(text.to_owned())),
            false => Err(bad("resume token", text, "it is made of hexadecimal digits and '-'")),
        }
    }
}

/// A property and what it is set to: `name=value` is one argument, so the value needs no quotes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Property {
    name: String,
    value: String,
}

impl Property {
    /// Native names are lower-case letters; a user property has a ':' as well (zfsprops(7)).
    pub fn new(name: &str, value: impl Into<String>) -> Result<Self, BadName> {
        let value = value.into();
        let fits =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.' | b':' | b'+');
        if name.is_empty() || name.starts_with('-') || name.len() > 255 || !name.bytes().all(fits) {
            return Err(bad(
                "property",
                name,
                "a name is made of lower-case letters, digits, '-', '_', '.', '+' and ':'",
            ));
        }
        if value.len() > 8191 || value.bytes().any(|b| b.is_ascii_control()) {
            return Err(bad("property", name, "its value is too long or has control characters"));
        }
        Ok(Self { name: name.to_owned(), value })
    }

    /// `name=value`.
    pub fn argument(&self) -> String {
        format!("{}={}", self.name, self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_zfs_takes_and_some_that_it_does_not() {
        for good in ["tank", "rpool/lxcri", "a/b-c_d.e:f/0"] {
            assert_eq!(good.parse::<Dataset>().expect(good).as_str(), good);
        }
        let long = format!("a/{}", "x".repeat(254));
        for wrong in ["", "-r", "/a", "a/", "a//b", "a b", "a/$(x)", "a@b", "a/..", "a/.", "1a", "ä", "a\0", &long] {
            assert!(wrong.parse::<Dataset>().is_err(), "{wrong:?}");
        }
        let snap: Snapshot = "tank/a@ready".parse().expect("snapshot");
        assert_eq!((snap.dataset().leaf(), snap.name()), ("a", "ready"));
        for wrong in ["tank", "tank@", "tank@a@b", "tank@a/b", "@a", "tank@a b"] {
            assert!(wrong.parse::<Snapshot>().is_err(), "{wrong:?}");
        }
        let root: Dataset = "tank/l".parse().expect("root");
        assert_eq!(root.child("x/y").expect("child").below(&root), Some("x/y"));
        assert_eq!("tank/lx".parse::<Dataset>().expect("other").below(&root), None);
        assert!(Property::new("-o", "x").is_err() && Property::new("a", "x\n").is_err());
        assert_eq!(Property::new("lxcri:owner", "a b").expect("property").argument(), "lxcri:owner=a b");
        assert!("-x".parse::<Tag>().is_err() && "x".parse::<Tag>().is_ok());
        assert!("1-c740b4779-11f-789c6364".parse::<ResumeToken>().is_ok());
        for wrong in ["", "-", "-t", "1", "1-", "1--2", "1-x", "1-2 3", &"1-2".repeat(2000)] {
            assert!(wrong.parse::<ResumeToken>().is_err(), "{wrong:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_taken_is_one_plain_argument(text in "\\PC{0,40}|[a-z@/. -]{0,20}") {
            if let Ok(name) = text.parse::<Dataset>() {
                proptest::prop_assert_eq!(name.as_str(), text.as_str());
                proptest::prop_assert!(!text.starts_with('-') && !text.contains([' ', '@', '%', '#', '\0']));
            }
            if let Ok(snap) = text.parse::<Snapshot>() {
                proptest::prop_assert_eq!(snap.to_string(), text);
            }
        }
    }
}
