//! Plugins of the folder, as programs, and the socket that others connect to.
//!
//! A program gets one end of a pair of sockets and three variables, by which the plugins' library knows that it was started by a
//! runtime, and nothing else. It ends with its connection, and with the daemon.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{Mode, OFlags};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use crate::core::error::{Error, Result};
use crate::utils::process::Spawn;
use crate::utils::tasks::TaskSet;

/// Longest file of a plugin's settings, in bytes.
const SETTINGS_MAX: u64 = 1 << 20;
/// A program that is waited for as long as it runs has a deadline all the same.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// A program of the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// "10".
    pub index: String,
    /// "logger".
    pub base: String,
    /// The program.
    pub path: Utf8PathBuf,
}

impl Found {
    /// "10-logger".
    pub fn name(&self) -> String {
        format!("{}-{}", self.index, self.base)
    }
}

/// Refuses an index or a name that is none.
pub fn check(index: &str, base: &str) -> Result<()> {
    if index.len() != 2 || !index.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Error::invalid(format!("plugin index {index:?} is not two digits")));
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
    if base.is_empty() || base.len() > 255 || !base.chars().all(fits) {
        return Err(Error::invalid(format!(
            "plugin name {base:?} is empty, or has more than letters, digits, -, _, . and +"
        )));
    }
    Ok(())
}

/// The programs of a folder, in their order; a folder that is not there has none. Other files are left out, with a warning.
pub fn find(folder: &Utf8Path) -> Result<Vec<Found>> {
    use std::os::unix::fs::PermissionsExt;
    let failed = |e| Error::io(format!("read the plugins in {folder}"), e);
    let entries = match folder.read_dir_utf8() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.into_path();
        let meta = std::fs::metadata(&path).map_err(failed)?;
        let (index, base) = path.file_name().and_then(|n| n.split_once('-')).unwrap_or_default();
        if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 || check(index, base).is_err() {
            tracing::warn!(path = path.as_str(), "not a plugin: no program named NN-NAME");
            continue;
        }
        found.push(Found { index: index.into(), base: base.into(), path });
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// A plugin's own settings: `NN-NAME.conf`, else `NAME.conf`, else none.
pub fn settings(folder: &Utf8Path, of: &Found) -> Result<String> {
    for name in [of.name(), of.base.clone()] {
        let path = folder.join(format!("{name}.conf"));
        match crate::utils::beneath::read_file("/".as_ref(), path.as_std_path(), SETTINGS_MAX) {
            Ok(text) => {
                return String::from_utf8(text).map_err(|_| Error::precondition(format!("{path} is not UTF-8")));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(format!("read {path}"), e)),
        }
    }
    Ok(String::new())
}

/// Starts one: our end of its connection, and what ends it.
pub fn start(of: &Found, tasks: &TaskSet) -> Result<(UnixStream, CancellationToken)> {
    let failed = |e: std::io::Error| Error::io(format!("start plugin {:?}", of.name()), e);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    let ours = UnixStream::from_std(ours).map_err(failed)?;
    let nowhere = rustix::fs::open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    let nowhere = nowhere.map_err(|e| failed(e.into()))?;
    let theirs = OwnedFd::from(theirs);
    let program = Spawn::new(of.path.as_str(), Vec::<String>::new())
        .env("NRI_PLUGIN_NAME", &of.base)
        .env("NRI_PLUGIN_IDX", &of.index)
        .env("NRI_PLUGIN_SOCKET", theirs.as_raw_fd().to_string())
        .stdout_to(nowhere)
        .deadline(FOR_EVER)
        .pass(theirs);
    let end = CancellationToken::new();
    let (name, ended) = (of.name(), end.clone());
    tasks.spawn_cancellable(format!("nri: program {name}"), async move {
        // Our duplicate of its end goes with `program`: so its connection ends when it does.
        match ended.run_until_cancelled(program.run()).await {
            Some(Ok(out)) => {
                let said = out.stderr.lines().last().unwrap_or_default().to_owned();
                tracing::warn!(plugin = name, status = %out.status, said, "a plugin's program has ended");
            }
            Some(Err(e)) => tracing::error!(plugin = name, error = %e, "a plugin's program can't be run"),
            None => tracing::info!(plugin = name, "a plugin's program was ended"),
        }
    });
    Ok((ours, end))
}

/// Listens for plugins that connect; for root alone. What an earlier daemon has left there is replaced.
pub fn listen(path: &Utf8Path) -> Result<UnixListener> {
    let failed = |e: std::io::Error| Error::io(format!("listen on {path}"), e);
    if let Some(folder) = path.parent() {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(meta) if std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()) => {
            // Another runtime of the node may serve plugins there.
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(Error::precondition(format!("{path}: another runtime listens there")));
            }
            std::fs::remove_file(path).map_err(failed)?;
        }
        Ok(_) => return Err(Error::precondition(format!("{path} is there and no socket"))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    rustix::fs::chmod(path.as_std_path(), Mode::RUSR | Mode::WUSR).map_err(|e| failed(e.into()))?;
    Ok(listener)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // files of a test
mod tests {
    use super::*;

    #[test]
    fn programs_of_a_folder_have_an_order() {
        use std::os::unix::fs::PermissionsExt;
        let temp = tempfile::tempdir().expect("a folder");
        let folder = Utf8Path::from_path(temp.path()).expect("UTF-8");
        for (name, mode) in [("20-b", 0o755), ("10-a-b", 0o755), ("30-c", 0o644), ("4-d", 0o755), ("note", 0o755)] {
            std::fs::write(folder.join(name), "").expect("a file");
            std::fs::set_permissions(folder.join(name), std::fs::Permissions::from_mode(mode)).expect("a mode");
        }
        let found = find(folder).expect("read");
        let names: Vec<_> = found.iter().map(Found::name).collect();
        assert_eq!(names, ["10-a-b", "20-b"]);
        assert_eq!(find(&folder.join("none")).expect("none"), []);
        std::fs::write(folder.join("b.conf"), "plain").expect("a file");
        std::fs::write(folder.join("10-a-b.conf"), "own").expect("a file");
        std::fs::write(folder.join("a-b.conf"), "plain").expect("a file");
        let texts: Vec<_> = found.iter().map(|f| settings(folder, f).expect("read")).collect();
        assert_eq!(texts, ["own", "plain"]);
        for (index, base) in [("1", "a"), ("1a", "a"), ("10", ""), ("10", "a/b")] {
            assert!(check(index, base).is_err(), "{index} {base}");
        }
    }

    #[tokio::test]
    async fn the_socket_is_roots_and_nobody_elses() {
        use std::os::unix::fs::PermissionsExt;
        let temp = tempfile::tempdir().expect("a folder");
        let path = Utf8PathBuf::from_path_buf(temp.path().join("nri/nri.sock")).expect("UTF-8");
        let first = listen(&path).expect("bound");
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        assert!(listen(&path).expect_err("taken").chain().contains("another runtime"));
        drop(first);
        listen(&path).expect("what a dead one has left is replaced");
    }
}
