//! Files that hold secrets: who may read them decides whether what they hold still is one.
//!
//! Called by all that reads keys, passwords and tokens from files; asks nothing but the metadata it is given.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

/// Why others than root and this process's user know, or set, what the regular file holds; None when they can't. Pipes and the
/// like are no files that anybody else could open.
pub fn known_to_others(meta: &Metadata) -> Option<String> {
    if !meta.is_file() {
        return None;
    }
    if meta.mode() & 0o077 != 0 {
        return Some(format!("mode {:04o}: others may read or write it; chmod 600 it", meta.mode() & 0o7777));
    }
    let us = rustix::process::geteuid().as_raw();
    (meta.uid() != 0 && meta.uid() != us).then(|| format!("belongs to user {}, not to us or root", meta.uid()))
}
