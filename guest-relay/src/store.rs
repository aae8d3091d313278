//! What of containers has to outlive the relay: a file for each with what it is ([`Record`]), one with how far its log is ([`Position`]).
//!
//! Called by [`crate::container`] and [`crate::log`]. Fails with the I/O error; a crash leaves a whole file, the one before or the
//! new one, and at most a `.tmp` beside it, which the next write replaces.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use lxcri_monitor_proto::v1::Exit;
use prost::Message;
use proxmox_lxcri_monitor::logfile::Place;

const RECORD: &str = "guest-container";
const POSITION: &str = "guest-log";
/// Longest record, in bytes.
const MAX: u64 = 8 * 1024 * 1024;

/// Where a container is in its life, as far as it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Phase {
    /// The guest was asked to make it.
    Creating = 0,
    /// It is made.
    Created = 1,
    /// It was started.
    Running = 2,
    /// It has ended, and its log has not yet.
    Ended = 3,
    /// Its end was told.
    Told = 4,
}

/// A container.
#[derive(Clone, PartialEq, Message)]
pub struct Record {
    /// Its id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// `CreateContainer.info`.
    #[prost(bytes = "vec", tag = "2")]
    pub info: Vec<u8>,
    /// Its log on the node; "" discards.
    #[prost(string, tag = "3")]
    pub log_path: String,
    /// Where its exit record goes on the node.
    #[prost(string, tag = "4")]
    pub exit_path: String,
    /// See [`Phase`].
    #[prost(enumeration = "Phase", tag = "5")]
    pub phase: i32,
    /// Unix time in nanoseconds, of the node's clock; 0: not started.
    #[prost(int64, tag = "6")]
    pub started_at: i64,
    /// The guest's run in which it was made.
    #[prost(string, tag = "7")]
    pub boot_id: String,
    /// How it ended.
    #[prost(message, optional, tag = "8")]
    pub exit: Option<Exit>,
    /// Nothing more comes of its log.
    #[prost(bool, tag = "9")]
    pub log_over: bool,
    /// Largest log on the node, in bytes; 0: no limit.
    #[prost(uint64, tag = "10")]
    pub log_size_max: u64,
}

/// How far a log is: bytes of the guest's that are on the node for good, and the node's file at that time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// In the guest's log.
    pub guest: u64,
    /// None: what it says is discarded.
    pub node: Option<Place>,
}

fn path(folder: &Path, id: &str, kind: &str) -> PathBuf {
    folder.join(format!("{id}.{kind}"))
}

/// Whether an id can be a part of a file's name.
pub fn is_id(id: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=128).contains(&id.len()) && id.bytes().all(good) && !id.starts_with('.')
}

/// Puts `bytes` in the place of the file. Not synced: a node that loses its power loses the pod, too.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes).and_then(|()| std::fs::rename(&temporary, path))
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

impl Record {
    /// Writes it down.
    pub fn save(&self, folder: &Path) -> io::Result<()> {
        replace(&path(folder, &self.id, RECORD), &self.encode_to_vec())
    }

    /// All that are in the folder; one that can't be read is an error, for its container would be nobody's.
    pub fn load_all(folder: &Path) -> Result<Vec<Self>, String> {
        let failed = |path: &Path, e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let mut records = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(|e| failed(folder, &e))? {
            let path = entry.map_err(|e| failed(folder, &e))?.path();
            let Some(id) = path.file_name().and_then(|n| n.to_str()?.strip_suffix(RECORD)?.strip_suffix('.')) else {
                continue;
            };
            if std::fs::symlink_metadata(&path).map_err(|e| failed(&path, &e))?.len() > MAX {
                return Err(failed(&path, &"too long"));
            }
            let bytes = std::fs::read(&path).map_err(|e| failed(&path, &e))?;
            let record = Self::decode(bytes.as_slice()).map_err(|_| failed(&path, &"no record"))?;
            if record.id != id || !is_id(id) {
                return Err(failed(&path, &"another container's record"));
            }
            records.push(record);
        }
        Ok(records)
    }

    /// Removes both files of a container; not there is success.
    pub fn forget(folder: &Path, id: &str) -> io::Result<()> {
        remove(&path(folder, id, POSITION)).and_then(|()| remove(&path(folder, id, RECORD)))
    }
}

impl Position {
    /// Writes it down.
    pub fn save(&self, folder: &Path, id: &str) -> io::Result<()> {
        let node = self.node.map(|p| format!(" {} {} {}", p.device, p.inode, p.length)).unwrap_or_default();
        replace(&path(folder, id, POSITION), format!("{}{node}\n", self.guest).as_bytes())
    }

    /// What was written.
    pub fn load(folder: &Path, id: &str) -> io::Result<Self> {
        let text = std::fs::read_to_string(path(folder, id, POSITION))?;
        let numbers: Option<Vec<u64>> = text.split_whitespace().map(|n| n.parse().ok()).collect();
        match numbers.as_deref() {
            Some(&[guest]) => Ok(Self { guest, node: None }),
            Some(&[guest, device, inode, length]) => Ok(Self { guest, node: Some(Place { device, inode, length }) }),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().expect("a folder");
        assert_eq!(Record::load_all(dir.path()).expect("none"), []);
        let mut record = Record { id: "c-1".into(), info: vec![7; 1000], log_path: "/l".into(), ..Default::default() };
        record.set_phase(Phase::Running);
        record.exit = Some(Exit { code: 3, ..Default::default() });
        record.save(dir.path()).expect("saved");
        record.save(dir.path()).expect("again");
        for node in [None, Some(Place { device: 1, inode: u64::MAX, length: 3 })] {
            let position = Position { guest: 1 << 40, node };
            position.save(dir.path(), "c-1").expect("saved");
            assert_eq!(Position::load(dir.path(), "c-1").expect("read"), position);
        }
        assert_eq!(Record::load_all(dir.path()).expect("one"), [record]);
        replace(&dir.path().join("c-2.guest-container"), b"\xff").expect("written");
        assert!(Record::load_all(dir.path()).expect_err("refused").contains("c-2"));
        Record::forget(dir.path(), "c-2").expect("gone");
        Record::forget(dir.path(), "c-1").expect("gone");
        Record::forget(dir.path(), "c-1").expect("gone already");
        assert_eq!(std::fs::read_dir(dir.path()).expect("a folder").count(), 0);
        replace(&dir.path().join("c-1.guest-log"), b"1 2 x").expect("written");
        assert!(Position::load(dir.path(), "c-1").is_err());
    }

    #[test]
    fn ids() {
        assert!(is_id("0a-b_c.d"));
        for bad in ["", ".", "..", ".a", "a/b", "a b", "ä", &"a".repeat(129)] {
            assert!(!is_id(bad), "{bad:?}");
        }
    }
}
