//! Volumes whose files the node keeps in sync, changed at once as the kubelet does it (its AtomicWriter).
//!
//! ```text
//! VOLUME/key            -> ..data/key        what a container reads
//! VOLUME/..data         -> ..<number>        exchanged by rename(2)
//! VOLUME/..<number>/key                      one state, never changed
//! ```
//! So who reads several files through one descriptor of `..data` reads one state, and who watches `..data` sees a change once.
//! Called by the session. Fails with the path; a crash leaves the old state or the new one, and a folder that the next change
//! removes.

use std::collections::BTreeSet;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use lxcri_guest_proto::v1;
use proxmox_lxcri_monitor::failure::{Failure, Result};
use rustix::fs::{AtFlags, Dir, FileType, OFlags};
use rustix::io::Errno;

use crate::beneath::{self, Access};
use crate::settings::Settings;

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";
/// Folders in a volume: everybody may go through them, what they may read is the files' own matter.
const FOLDER_MODE: u32 = 0o755;

fn path(settings: &Settings, volume: &str) -> Result<PathBuf> {
    Ok(settings.data_dir.join("volumes").join(beneath::component(volume)?))
}

/// Remove of a volume.
pub fn remove(settings: &Settings, volume: &str) -> Result<()> {
    beneath::remove(&path(settings, volume)?)
}

/// Sync.
pub fn sync(settings: &Settings, call: &v1::Sync) -> Result<()> {
    if let Some(folder) = &call.folder {
        if !call.files.is_empty() {
            return Err(Failure::invalid(format!("volume {}: a folder to write into, and files", call.volume)));
        }
        return make_folder(&path(settings, &call.volume)?, folder);
    }
    let mut names = BTreeSet::new();
    for file in &call.files {
        let (folders, name) = beneath::relative(&file.path)?;
        let first = folders.first().copied().unwrap_or(name);
        if first.starts_with("..") {
            return Err(Failure::invalid(format!("{}: a name of our own", file.path)));
        }
        names.insert(first);
    }
    let path = path(settings, &call.volume)?;
    std::fs::create_dir_all(&path).map_err(|e| Failure::io(path.display(), &e))?;
    rustix::fs::chmod(&path, FOLDER_MODE.into()).map_err(|e| Failure::errno(path.display(), e))?;
    let volume = beneath::folder(&path)?;
    let failed = |what: &str, e| Failure::errno(path.join(what).display(), e);
    let old = match rustix::fs::readlinkat(&volume, DATA, Vec::new()) {
        Ok(target) => target.into_string().ok(),
        Err(Errno::NOENT) => None,
        Err(e) => return Err(failed(DATA, e)),
    };
    let mut now = old.clone();
    if !old.as_deref().is_some_and(|state| is_same(&volume, state, &call.files)) {
        let new = new_state(&volume, old.as_deref(), &call.files)?;
        remove_link(&volume, DATA_NEW).map_err(|e| failed(DATA_NEW, e))?;
        rustix::fs::symlinkat(new.as_str(), &volume, DATA_NEW).map_err(|e| failed(DATA_NEW, e))?;
        rustix::fs::renameat(&volume, DATA_NEW, &volume, DATA).map_err(|e| failed(DATA, e))?;
        now = Some(new);
    }
    for name in &names {
        match rustix::fs::symlinkat(format!("{DATA}/{name}"), &volume, *name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(failed(name, e)),
        }
    }
    // What is not any more, and what a crash has left.
    for name in list(&volume).map_err(|e| failed(".", e))? {
        if name != DATA && Some(&name) != now.as_ref() && !names.contains(name.as_str()) {
            beneath::remove(&path.join(&name))?;
        }
    }
    Ok(())
}

/// A folder that containers write into. One that is there is theirs.
fn make_folder(path: &Path, folder: &v1::Folder) -> Result<()> {
    let failed = |e| Failure::io(path.display(), &e);
    if path.try_exists().map_err(failed)? {
        return Ok(());
    }
    // Whole when it has its name.
    let new = path.with_extension("new");
    beneath::remove(&new)?;
    std::fs::create_dir_all(&new).map_err(failed)?;
    std::os::unix::fs::chown(&new, Some(folder.uid), Some(folder.gid)).map_err(failed)?;
    rustix::fs::chmod(&new, (folder.mode & 0o7777).into()).map_err(|e| Failure::errno(new.display(), e))?;
    std::fs::rename(&new, path).map_err(failed)
}

/// Makes a folder with these files; its name.
fn new_state(volume: &OwnedFd, old: Option<&str>, files: &[v1::File]) -> Result<String> {
    let number = |state: &str| state.strip_prefix("..").and_then(|n| n.parse::<u64>().ok());
    let taken = list(volume).map_err(|e| Failure::errno("list a volume", e))?;
    let last = taken.iter().map(String::as_str).chain(old).filter_map(number).max().unwrap_or(0);
    let name = format!("..{}", last.saturating_add(1));
    let folder = beneath::make_folder(volume, &name, FOLDER_MODE)?;
    // Whatever the umask.
    rustix::fs::fchmod(&folder, FOLDER_MODE.into()).map_err(|e| Failure::errno(&name, e))?;
    for file in files {
        let access = Access { mode: file.mode, uid: file.uid, gid: file.gid };
        beneath::write(&folder, &file.path, &file.content, access, FOLDER_MODE)?;
    }
    Ok(name)
}

/// Whether a state has these files and no others. What can't be read is not the same.
fn is_same(volume: &OwnedFd, state: &str, files: &[v1::File]) -> bool {
    let Ok(folder) = beneath::open(volume, state, OFlags::DIRECTORY | OFlags::RDONLY, 0) else { return false };
    let mut paths = Vec::new();
    if collect(&folder, "", &mut paths).is_err() || paths.len() != files.len() {
        return false;
    }
    let same = |file: &v1::File| {
        let fd = beneath::open(&folder, &file.path, OFlags::RDONLY | OFlags::NONBLOCK, 0).ok()?;
        let stat = rustix::fs::fstat(&fd).ok()?;
        let access = (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid, stat.st_size as usize);
        // Before it is read: a container may have made something huge of it.
        if access != (file.mode & 0o7777, file.uid, file.gid, file.content.len()) {
            return Some(false);
        }
        let mut content = Vec::with_capacity(file.content.len());
        std::fs::File::from(fd).take(file.content.len() as u64 + 1).read_to_end(&mut content).ok()?;
        Some(content == file.content)
    };
    files.iter().all(|file| same(file) == Some(true))
}

/// Paths of all files below a folder.
fn collect(folder: &OwnedFd, above: &str, paths: &mut Vec<String>) -> rustix::io::Result<()> {
    for name in list(folder)? {
        let path = format!("{above}{name}");
        match FileType::from_raw_mode(rustix::fs::statat(folder, &name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode) {
            FileType::Directory => {
                let inner = beneath::open(folder, &name, OFlags::DIRECTORY | OFlags::RDONLY, 0)?;
                collect(&inner, &format!("{path}/"), paths)?;
            }
            _ => paths.push(path),
        }
    }
    Ok(())
}

fn list(folder: &OwnedFd) -> rustix::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

fn remove_link(folder: &OwnedFd, name: &str) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(dir: &Path) -> Settings {
        let (path, none) = (|name: &str| dir.join(name), PathBuf::new());
        Settings {
            listen: ([127, 0, 0, 1], 0).into(),
            secret: none.clone(),
            run_dir: path("run"),
            data_dir: path("data"),
            block_devices: none,
        }
    }

    fn file(path: &str, content: &str) -> v1::File {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        v1::File { path: path.into(), content: content.into(), mode: 0o444, uid, gid }
    }

    fn names(volume: &Path) -> Vec<String> {
        let all = std::fs::read_dir(volume).expect("the volume");
        let mut names: Vec<String> =
            all.map(|e| e.expect("an entry").file_name().into_string().expect("text")).collect();
        names.sort();
        names
    }

    #[test]
    fn a_volume_goes_from_state_to_state_at_once() {
        let dir = tempfile::tempdir().expect("a folder");
        let settings = settings(dir.path());
        let volume = dir.path().join("data/volumes/config");
        let sync = |files: &[v1::File]| {
            super::sync(&settings, &v1::Sync { volume: "config".into(), files: files.into(), folder: None })
        };
        let read = |name: &str| std::fs::read_to_string(volume.join(name)).ok();
        sync(&[file("a", "1"), file("deep/b", "2")]).expect("the first");
        assert_eq!(names(&volume), ["..1", "..data", "a", "deep"]);
        assert_eq!((read("a").as_deref(), read("deep/b").as_deref()), (Some("1"), Some("2")));
        assert_eq!(std::fs::read_link(volume.join("a")).expect("a link"), Path::new("..data/a"));
        // Who holds a state keeps it whole; others see the new one.
        let held = std::fs::File::open(volume.join("a")).expect("opened");
        sync(&[file("a", "1"), file("deep/b", "2")]).expect("the same");
        assert_eq!(names(&volume), ["..1", "..data", "a", "deep"], "nothing has changed");
        sync(&[file("a", "new"), file("c", "3")]).expect("the second");
        assert_eq!(names(&volume), ["..2", "..data", "a", "c"]);
        assert_eq!((read("a").as_deref(), read("c").as_deref(), read("deep/b")), (Some("new"), Some("3"), None));
        assert_eq!(std::io::read_to_string(held).expect("read"), "1");
        // Other rights are another state; a crash's leavings go.
        std::fs::create_dir_all(volume.join("..9/x")).expect("left");
        std::os::unix::fs::symlink("..9", volume.join(DATA_NEW)).expect("left");
        let mut private = file("a", "new");
        private.mode = 0o400;
        sync(&[private, file("c", "3")]).expect("the third");
        assert_eq!(names(&volume), ["..10", "..data", "a", "c"]);
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(volume.join("a")).expect("the file"));
        assert_eq!(mode & 0o7777, 0o400);
        sync(&[]).expect("nothing at all");
        assert_eq!(names(&volume), ["..11", "..data"]);
        for bad in ["../x", "/x", "..data/x", "..x", ""] {
            assert!(sync(&[file(bad, "")]).is_err(), "{bad:?}");
        }
        remove(&settings, "config").expect("removed");
        remove(&settings, "config").expect("gone already");
        assert!(std::fs::symlink_metadata(&volume).is_err() && remove(&settings, "..").is_err());
    }
    #[test]
    fn a_folder_to_write_into_is_made_once() {
        let dir = tempfile::tempdir().expect("a folder");
        let settings = settings(dir.path());
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let sync = |mode, files| {
            let folder = Some(v1::Folder { mode, uid, gid });
            super::sync(&settings, &v1::Sync { volume: "scratch".into(), files, folder })
        };
        sync(0o2777, Vec::new()).expect("made");
        let volume = dir.path().join("data/volumes/scratch");
        std::fs::create_dir(volume.join("a")).expect("written into");
        sync(0o700, Vec::new()).expect("it is there");
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&volume).expect("the folder"));
        assert_eq!((mode & 0o7777, names(&volume)), (0o2777, vec!["a".to_owned()]));
        assert!(sync(0o700, vec![file("a", "1")]).is_err());
        remove(&settings, "scratch").expect("removed");
        assert!(!volume.try_exists().expect("looked at"));
    }
}
