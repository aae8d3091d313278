//! Writes tar archives with the host's GNU tar (Debian's base has it): links, sparse files and extended attributes are kept.
//!
//! Called for checkpoints. Fails with the program's own words. A crash leaves the archive half written: the caller gives
//! it a name that does not count.

use std::path::Path;
use std::time::Duration;

use super::process::{Spawn, SpawnError};

/// Debian has it on every system.
const PROGRAM: &str = "/bin/tar";
/// Most bytes of complaints about files that went away.
const WORDS_MAX: usize = 4 << 20;
/// Of what the program said, so much goes into an error, in bytes.
const WORDS_KEPT: usize = 8 << 10;

/// Whose files go into an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// Nobody else changes them: all of them have to be there.
    Ours,
    /// Running programs', which may go away or become others meanwhile: those that do are left out. Extended attributes
    /// go along, but for the overlay's own. A link can take a folder's place: `folder` must be a view that follows none.
    InUse,
}

/// Writes the files named by `names` (relative to `folder`; folders without what is in them) into `archive`, which is
/// made anew or written over.
pub async fn create(
    archive: &Path,
    folder: &Path,
    names: &[Vec<u8>],
    files: Files,
    deadline: Duration,
) -> Result<(), SpawnError> {
    let mut args = vec!["--create".to_owned(), "--sparse".into(), "--numeric-owner".into(), "--format=posix".into()];
    // A file that changes while it is read is in the archive as it was read: status 1, and no failure.
    args.extend(["--warning=no-file-changed".into(), "--warning=no-file-ignored".into()]);
    if files == Files::InUse {
        args.extend(["--xattrs".into(), "--xattrs-include=*".into(), "--xattrs-exclude=trusted.overlay.*".into()]);
    }
    args.extend(["--file".into(), archive.to_string_lossy().into_owned()]);
    args.extend(["--directory".into(), folder.to_string_lossy().into_owned()]);
    args.extend(["--no-recursion".into(), "--null".into(), "--verbatim-files-from".into(), "--files-from=-".into()]);
    let list: Vec<u8> = names.iter().flat_map(|n| n.iter().copied().chain([0])).collect();
    let spawn = Spawn::new(PROGRAM, args).stdin(list).deadline(deadline).env("LC_ALL", "C.UTF-8").stderr_cap(WORDS_MAX);
    let output = spawn.run().await?;
    match output.code() {
        Some(0 | 1) => Ok(()),
        Some(2) if files == Files::InUse && only_gone(&output.stderr) => Ok(()),
        _ => {
            let from = output.stderr.ceil_char_boundary(output.stderr.len().saturating_sub(WORDS_KEPT));
            let stderr = output.stderr[from..].to_owned();
            Err(SpawnError::Failed { command: spawn.command(), status: output.status, stderr })
        }
    }
}

/// Whether it failed because there is no room for the archive.
pub fn is_full(error: &SpawnError) -> bool {
    // The last one of a write that took a part: what came of the next is not told.
    const FULL: [&str; 3] = [": No space left on device", ": Disk quota exceeded", ": Wrote only "];
    matches!(error, SpawnError::Failed { stderr, .. } if FULL.iter().any(|why| stderr.contains(why)))
}

/// Whether the program complains of nothing but files that are not any more what they were when they were listed. What
/// makes it stop ends in a line of its own; nothing is believed of words that were cut.
fn only_gone(words: &str) -> bool {
    const END: &str = "/bin/tar: Exiting with failure status due to previous errors";
    const GONE: [&str; 3] = [": No such file or directory", ": Not a directory", ": Too many levels of symbolic links"];
    let gone = |line: &str| line.contains(": Cannot ") && GONE.iter().any(|why| line.ends_with(why));
    let harmless = |line: &str| line == END || gone(line) || line.ends_with(": File removed before we read it");
    words.len() < WORDS_MAX - 16 && words.lines().all(harmless)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_named_is_in_it() {
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().join("in");
        std::fs::create_dir_all(folder.join("sub")).unwrap();
        for name in ["-a", "b", "sub/c"] {
            std::fs::write(folder.join(name), name).unwrap();
        }
        let archive = temp.path().join("x.tar");
        let names = ["-a", "sub", "sub/c"].map(|n| n.as_bytes().to_vec());
        create(&archive, &folder, &names, Files::InUse, Duration::from_secs(20)).await.unwrap();
        let mut found = tar::Archive::new(std::fs::File::open(&archive).unwrap());
        let found: Vec<_> =
            found.entries().unwrap().map(|e| e.unwrap().path().unwrap().display().to_string()).collect();
        assert_eq!(found, ["-a", "sub/", "sub/c"]);
        let missing = [b"none".to_vec(), b"b".to_vec(), b"b/c".to_vec()];
        let of = async |files| create(&archive, &folder, &missing, files, Duration::from_secs(20)).await;
        assert!(of(Files::Ours).await.is_err());
        of(Files::InUse).await.unwrap();
        let mut found = tar::Archive::new(std::fs::File::open(&archive).unwrap());
        assert_eq!(found.entries().unwrap().count(), 1);
        let nowhere = temp.path().join("no/x.tar");
        assert!(create(&nowhere, &folder, &[b"b".to_vec()], Files::InUse, Duration::from_secs(20)).await.is_err());
    }
}
