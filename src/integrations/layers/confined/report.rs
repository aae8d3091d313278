//! What an unpacking process tells the daemon at its end, and what the daemon believes of it.
//!
//! Written by the child, taken in by [`Report::accept`]. A report comes from a process that a hostile layer may have
//! taken over: names are resolved beneath the layer's folder, and only attributes that a layer may have are set, on
//! files that this process could have written anyway. Numbers are what an image's size is told from, and nothing else.

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::core::error::{Error, Kind, Result};
use crate::core::ports::Usage;
use crate::integrations::layers::unpack::{Later, Unpacked};
use crate::integrations::layers::{whiteout, write};
use crate::utils::beneath::Root;

/// Longest text of a failure that is believed.
const MAX_TEXT: usize = 4096;

/// See the module's words.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Report {
    #[prost(message, optional, tag = "1")]
    pub failure: Option<Failure>,
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
    #[prost(uint64, tag = "3")]
    pub inodes: u64,
    #[prost(bool, tag = "4")]
    pub root_given: bool,
    #[prost(bytes = "vec", repeated, tag = "5")]
    pub implicit: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    pub opaque: Vec<Vec<u8>>,
    #[prost(message, repeated, tag = "7")]
    pub attributes: Vec<Attribute>,
    #[prost(uint32, tag = "8")]
    pub landlock: u32,
}

/// Why the layer was not unpacked.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Failure {
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    #[prost(string, tag = "2")]
    pub message: String,
}

/// An extended attribute that the daemon has to set.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Attribute {
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub value: Vec<u8>,
}

/// Kinds that unpacking fails with; their places in the list are their numbers.
const KINDS: [Kind; 4] = [Kind::Internal, Kind::InvalidArgument, Kind::ResourceExhausted, Kind::PermissionDenied];

/// Text of a stranger as it may stand in a log: one line, no control characters, not long.
pub(super) fn printable(text: &str) -> String {
    text.chars().take(MAX_TEXT).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

impl Report {
    pub(super) fn failed(kind: Kind, message: String) -> Self {
        let kind = KINDS.iter().position(|k| *k == kind).unwrap_or(0);
        Self { failure: Some(Failure { kind: u32::try_from(kind).unwrap_or(0), message }), ..Self::default() }
    }

    pub(super) fn done(unpacked: Unpacked, later: Later) -> Self {
        let bytes = |set: BTreeSet<PathBuf>| set.into_iter().map(|p| p.into_os_string().into_vec()).collect();
        let attributes = later.attributes.into_iter().flat_map(|(path, list)| {
            let path = path.into_os_string().into_vec();
            list.into_iter().map(move |(name, value)| Attribute { path: path.clone(), name, value })
        });
        Self {
            failure: None,
            bytes: unpacked.usage.bytes,
            inodes: unpacked.usage.inodes,
            root_given: unpacked.root_given,
            implicit: bytes(unpacked.implicit),
            opaque: bytes(later.opaque),
            attributes: attributes.collect(),
            landlock: 0,
        }
    }

    /// Sets what the process could not, in the folder `layer`, and gives what came of the layer.
    pub(super) fn accept(self, layer: OwnedFd) -> Result<Unpacked> {
        if let Some(failure) = self.failure {
            let kind = KINDS.get(failure.kind as usize).copied().unwrap_or(Kind::Internal);
            return Err(Error::because(kind, "unpacking failed", printable(&failure.message)));
        }
        let root = Root::from_fd(layer);
        for path in &self.opaque {
            set(&root, path, whiteout::set_opaque).map_err(|e| Error::io("marking a folder of the layer opaque", e))?;
        }
        for a in &self.attributes {
            if a.name.starts_with(write::OVERLAY) || a.name.is_empty() || a.name.len() > 255 || a.name.contains(&0) {
                return Err(Error::invalid("an unpacking process asked for an attribute that no layer may have"));
            }
            set(&root, &a.path, |parent, name| write::set_xattr_at(parent, name, a.name.as_slice(), &a.value))
                .map_err(|e| Error::io("setting an extended attribute of the layer", e))?;
        }
        Ok(Unpacked {
            usage: Usage { bytes: self.bytes, inodes: self.inodes },
            implicit: self.implicit.into_iter().map(|p| PathBuf::from(std::ffi::OsString::from_vec(p))).collect(),
            root_given: self.root_given,
        })
    }
}

/// Does `work` on what `path` names in the layer; not there is success: a later entry has taken its place.
fn set(
    root: &Root,
    path: &[u8],
    work: impl Fn(std::os::fd::BorrowedFd<'_>, &std::ffi::CStr) -> io::Result<()>,
) -> io::Result<()> {
    let path = Path::new(OsStr::from_bytes(path));
    let found = match path.as_os_str().is_empty() {
        true => root.open_dir(".").map(|folder| (folder, CString::from(c"."))),
        false => root.open_parent(path),
    };
    let done = found.and_then(|(parent, name)| work(parent.as_fd(), &name));
    match done {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(()),
        // The file system has no such attributes.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM)) => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_keep_their_kind_and_lose_control_characters() {
        let report = Report::failed(Kind::ResourceExhausted, "a\nb\x1b[31m".into());
        let dir = tempfile::tempdir().expect("tempdir");
        let folder = || std::fs::File::open(dir.path()).expect("open").into();
        let e = report.accept(folder()).expect_err("a failure");
        assert_eq!((e.kind(), e.chain().as_str()), (Kind::ResourceExhausted, "unpacking failed: a b [31m"));
        let forged = Attribute { path: b"x".into(), name: b"trusted.overlay.redirect".into(), value: b"/".into() };
        let report = Report { attributes: vec![forged], ..Report::default() };
        assert_eq!(report.accept(folder()).expect_err("refused").kind(), Kind::InvalidArgument);
        let out = Attribute { path: b"../x".into(), name: b"user.x".into(), value: b"1".into() };
        let report = Report { attributes: vec![out], ..Report::default() };
        report.accept(folder()).expect("resolved inside, where there is no x");
    }
}
