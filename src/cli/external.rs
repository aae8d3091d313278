//! `proxmox-lxcri NAME` for a program `proxmox-lxcri-NAME` on PATH, where no registered command has that name.
//!
//! The program takes our place: its output, signals and exit code are its own. It is told by its environment how to reach the
//! daemon: `PROXMOX_LXCRI` (this program), `PROXMOX_LXCRI_SOCKET` (the local socket), `PROXMOX_LXCRI_CONFIG` (with `--config`).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use camino::Utf8Path;

use super::PROGRAM;

/// The program of that name; None: there is none.
pub(super) fn find(name: &str, path: Option<&OsStr>) -> Option<PathBuf> {
    if name.is_empty() || name.contains('/') {
        return None;
    }
    let file = format!("{PROGRAM}-{name}");
    // An empty or relative entry is the working directory's: whatever lies there is nobody's command.
    let folders = std::env::split_paths(path?).filter(|folder| folder.is_absolute());
    folders.map(|folder| folder.join(&file)).find(|p| is_program(p))
}

fn is_program(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Becomes the program; comes back when it can't be started.
pub(super) fn become_it(
    program: &Path,
    arguments: impl Iterator<Item = OsString>,
    socket: &Utf8Path,
    config: Option<&Utf8Path>,
) -> Result<u8> {
    // Nobody waits for it: this process is its.
    #[allow(clippy::disallowed_methods)]
    let mut command = std::process::Command::new(program);
    command.args(arguments).env("PROXMOX_LXCRI_SOCKET", socket);
    if let Ok(us) = std::env::current_exe() {
        command.env("PROXMOX_LXCRI", us);
    }
    match config {
        Some(config) => command.env("PROXMOX_LXCRI_CONFIG", config),
        None => command.env_remove("PROXMOX_LXCRI_CONFIG"),
    };
    let error = command.exec();
    anyhow::bail!("{}: {error}", program.as_os_str().as_bytes().escape_ascii())
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files plainly
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_by_name_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let empty = tempfile::tempdir().expect("a folder");
        for (name, mode) in [("a", 0o755), ("plain", 0o644)] {
            let path = folder.path().join(format!("proxmox-lxcri-{name}"));
            std::fs::write(&path, "").expect("a file");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("its mode");
        }
        std::fs::create_dir(folder.path().join("proxmox-lxcri-folder")).expect("a folder");
        let path = std::env::join_paths([empty.path(), folder.path()]).expect("a PATH");
        assert_eq!(find("a", Some(&path)), Some(folder.path().join("proxmox-lxcri-a")));
        for name in ["plain", "folder", "none", "", "../a"] {
            assert_eq!(find(name, Some(&path)), None, "{name}");
        }
        assert_eq!(find("a", None), None);
        assert_eq!(find("a", Some(OsStr::new(".:"))), None, "the working directory");
    }
}
