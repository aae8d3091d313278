//! What is wrong with values that are well formed: found by the checks of each section, all at once.
//!
//! A fault names its key; where it was written is added by [`super::load`]. Plain data, nothing fails here.

use std::fmt::Display;
use std::ops::RangeInclusive;

use camino::Utf8PathBuf;

use crate::core::error::Error;

/// A value that can't be, or not with another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// The key that has to change.
    pub key: String,
    /// The key that it does not go together with, which may be the one that was written.
    pub other: Option<String>,
    /// Why.
    pub why: String,
}

impl Fault {
    pub fn new(key: impl Into<String>, why: impl Display) -> Self {
        Self { key: key.into(), other: None, why: why.to_string() }
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Error::invalid(format!("{}: {}", fault.key, fault.why))
    }
}

/// All that was found.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<Fault>);

impl Faults {
    pub fn push(&mut self, fault: Fault) {
        self.0.push(fault);
    }

    /// `key` is wrong by itself.
    pub fn add(&mut self, key: impl Into<String>, why: impl Display) {
        self.push(Fault::new(key, why));
    }

    /// `key` does not go together with `other`.
    pub fn with(&mut self, key: impl Into<String>, other: &str, why: impl Display) {
        self.push(Fault { other: Some(other.to_owned()), ..Fault::new(key, why) });
    }

    /// Paths have to be absolute: what they mean must not depend on who starts us where.
    pub fn absolute<'a>(&mut self, key: &str, paths: impl IntoIterator<Item = &'a Utf8PathBuf>) {
        for path in paths.into_iter().filter(|p| !p.is_absolute()) {
            self.add(key, format!("{path:?} is not an absolute path"));
        }
    }

    /// Numbers have a range.
    pub fn range<T: PartialOrd + Display>(&mut self, key: &str, value: T, range: RangeInclusive<T>) {
        if !range.contains(&value) {
            self.add(key, format!("{value} is not in {} to {}", range.start(), range.end()));
        }
    }

    pub fn into_vec(self) -> Vec<Fault> {
        self.0
    }
}
