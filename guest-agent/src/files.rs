//! Single files for the node: those in the run folder, and the kernel's that it reads.
//!
//! Called by the session. Fails with the path.

use std::io::Read;
use std::path::{Component, Path};

use lxcri_guest_proto::v1;
use proxmox_lxcri_monitor::failure::{Failure, Result};
use rustix::fs::{Mode, OFlags};

use crate::beneath::{self, Access};
use crate::settings::Settings;

/// Most bytes of one file that is read.
const READ_MAX: u64 = 64 * 1024;
/// Most bytes of one call's: the answer has to fit a message.
const READ_ALL: usize = 2 * 1024 * 1024;
/// Most files of one call.
const READ_FILES: usize = 256;

/// Write.
pub fn write(settings: &Settings, call: &v1::Write) -> Result<()> {
    let root = beneath::folder(&settings.run_dir)?;
    let access = Access { mode: call.mode, uid: call.uid, gid: call.gid };
    beneath::write(root, &call.path, &call.content, access, 0o700)
}

/// Remove of something in the run folder.
pub fn remove(settings: &Settings, path: &str) -> Result<()> {
    beneath::relative(path)?;
    beneath::remove(&settings.run_dir.join(path))
}

/// Read.
pub fn read(settings: &Settings, call: &v1::Read) -> Result<v1::Contents> {
    if call.paths.len() > READ_FILES {
        return Err(Failure::invalid(format!("more than {READ_FILES} files at once")));
    }
    let mut contents = Vec::new();
    let mut length = 0;
    for path in &call.paths {
        let one = read_one(settings, Path::new(path))?;
        length += one.content.len();
        if length > READ_ALL {
            return Err(Failure::invalid(format!("more than {READ_ALL} bytes at once")));
        }
        contents.push(one);
    }
    Ok(v1::Contents { contents })
}

fn read_one(settings: &Settings, path: &Path) -> Result<v1::Content> {
    let plain = path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    let below = [Path::new("/proc"), Path::new("/sys/fs/cgroup"), settings.run_dir.as_path()];
    if !plain || !below.iter().any(|folder| path.starts_with(folder)) {
        return Err(Failure::invalid(format!("{}: not a file of the kernel, or of a run", path.display())));
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => std::fs::File::from(file),
        Err(e) => return Ok(v1::Content { content: Vec::new(), errno: e.raw_os_error() }),
    };
    let mut content = Vec::new();
    match file.take(READ_MAX).read_to_end(&mut content) {
        Ok(_) => Ok(v1::Content { content, errno: 0 }),
        Err(e) => Ok(v1::Content { content: Vec::new(), errno: e.raw_os_error().unwrap_or(errno_of_nothing()) }),
    }
}

/// For an error without a number.
fn errno_of_nothing() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(paths: &[&str]) -> v1::Read {
        v1::Read { paths: paths.iter().map(|p| p.to_string()).collect() }
    }

    #[test]
    fn the_kernels_files_and_no_others() {
        let dir = tempfile::tempdir().expect("a folder");
        let settings = Settings {
            listen: ([127, 0, 0, 1], 0).into(),
            secret: "/".into(),
            run_dir: dir.path().to_owned(),
            data_dir: "/".into(),
            block_devices: "/".into(),
        };
        let own = dir.path().join("a/b");
        write(&settings, &v1::Write { path: "a/b".into(), content: b"1".to_vec(), mode: 0o600, ..Default::default() })
            .expect("written");
        let all = paths(&["/proc/uptime", "/proc/none", "/proc", own.to_str().expect("text")]);
        let read = super::read(&settings, &all).expect("read").contents;
        assert!(read[0].errno == 0 && !read[0].content.is_empty());
        assert_eq!((read[1].errno, read[2].errno), (2, 21));
        assert_eq!(read[3].content, b"1");
        for bad in ["/etc/passwd", "/proc/../etc/passwd", "proc/uptime", ""] {
            assert!(super::read(&settings, &paths(&[bad])).is_err(), "{bad:?}");
        }
    }
}
