//! Writes tar archives with the host's GNU tar (Debian's base has it): links, sparse files and extended attributes are kept.
//!
//! Called for checkpoints. Fails with the program's own words. A crash leaves the archive half written: the caller gives
//! it a name that does not count.

use std::path::Path;
use std::time::Duration;

use super::process::{Spawn, SpawnError};

/// Debian has it on every system.
const PROGRAM: &str = "/bin/tar";

/// Writes the files named by `names` (relative to `folder`; folders without what is in them) into `archive`, which is
/// made anew or written over. With `xattrs`, extended attributes go along, but for the overlay's own.
pub async fn create(
    archive: &Path,
    folder: &Path,
    names: &[Vec<u8>],
    xattrs: bool,
    deadline: Duration,
) -> Result<(), SpawnError> {
    let mut args = vec!["--create".to_owned(), "--sparse".into(), "--numeric-owner".into(), "--format=posix".into()];
    // A file that changes while it is read is in the archive as it was read: status 1, and no failure.
    args.extend(["--warning=no-file-changed".into(), "--warning=no-file-ignored".into()]);
    if xattrs {
        args.extend(["--xattrs".into(), "--xattrs-include=*".into(), "--xattrs-exclude=trusted.overlay.*".into()]);
    }
    args.extend(["--file".into(), archive.to_string_lossy().into_owned()]);
    args.extend(["--directory".into(), folder.to_string_lossy().into_owned()]);
    args.extend(["--no-recursion".into(), "--null".into(), "--verbatim-files-from".into(), "--files-from=-".into()]);
    let list: Vec<u8> = names.iter().flat_map(|n| n.iter().copied().chain([0])).collect();
    let spawn = Spawn::new(PROGRAM, args).stdin(list).deadline(deadline).env("LC_ALL", "C.UTF-8");
    let output = spawn.run().await?;
    match output.code() {
        Some(0 | 1) => Ok(()),
        _ => Err(SpawnError::Failed { command: spawn.command(), status: output.status, stderr: output.stderr }),
    }
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
        create(&archive, &folder, &names, true, Duration::from_secs(20)).await.unwrap();
        let mut found = tar::Archive::new(std::fs::File::open(&archive).unwrap());
        let found: Vec<_> =
            found.entries().unwrap().map(|e| e.unwrap().path().unwrap().display().to_string()).collect();
        assert_eq!(found, ["-a", "sub/", "sub/c"]);
        let missing = [b"none".to_vec()];
        assert!(create(&archive, &folder, &missing, false, Duration::from_secs(20)).await.is_err());
    }
}
