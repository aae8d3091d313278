//! What containers have said, kept until the node has it.
//!
//! The monitor writes a container's log, a [`Follower`] sends it from a byte on and gives back the room of what the node has
//! acknowledged: the file keeps its length, and has a hole where that was. So positions stay what they are, and nothing but the file
//! has to be remembered. Called by the session. A crash loses nothing: the node asks again, from where it is.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use lxcri_guest_proto::StreamId;
use lxcri_guest_proto::mux::Mux;
use lxcri_guest_proto::v1::{self, ResetCode};
use proxmox_lxcri_monitor::failure::{Failure, Result};
use rustix::fs::inotify::{self, WatchFlags};
use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::beneath;
use crate::settings::Settings;

/// Acknowledged bytes that are given back together.
const PIECE: u64 = 256 * 1024;
/// Holes begin and end at blocks of the file system.
const BLOCK: u64 = 4096;
/// Most bytes of one read.
const BUFFER: usize = 16 * 1024;

/// The folder of logs.
pub fn folder(settings: &Settings) -> PathBuf {
    settings.data_dir.join("logs")
}

fn name(container: &str) -> Result<String> {
    Ok(format!("{}.log", beneath::component(container)?))
}

/// ForgetLog.
pub fn forget(settings: &Settings, container: &str) -> Result<()> {
    beneath::remove(&folder(settings).join(name(container)?))
}

/// One log on its way to the node.
#[derive(Debug)]
pub struct Follower {
    file: File,
    /// Positions in the file: what was sent, what of it the node has, and up to where that was given back.
    sent: u64,
    acknowledged: u64,
    given_back: u64,
    /// No more will be written; and the node was told.
    ending: bool,
    ended: bool,
}

impl Follower {
    /// Opens a log, which need not be there yet; fails with the code for the stream's reset. Has `changes` (inotify) tell of what is written.
    pub fn open(
        settings: &Settings,
        log: &v1::Log,
        changes: &impl std::os::fd::AsFd,
    ) -> std::result::Result<Self, ResetCode> {
        let system = |_: Errno| ResetCode::ResetSystem;
        let name = name(&log.container_id).map_err(|_| ResetCode::ResetInvalid)?;
        let folder = folder(settings);
        let above = rustix::fs::open(&folder, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let file =
            beneath::open(above.map_err(system)?, &name, OFlags::RDWR | OFlags::CREATE, 0o640).map_err(system)?;
        inotify::add_watch(changes, folder.join(&name), WatchFlags::MODIFY).map_err(system)?;
        let length = rustix::fs::fstat(&file).map_err(system)?.st_size as u64;
        let kept = match rustix::fs::seek(&file, SeekFrom::Data(0)) {
            Ok(kept) => kept,
            // Not a byte.
            Err(Errno::NXIO) => length,
            Err(e) => return Err(system(e)),
        };
        if log.from > length {
            return Err(ResetCode::ResetInvalid);
        }
        if log.from < kept {
            return Err(ResetCode::ResetGone);
        }
        let (sent, acknowledged) = (log.from, log.from);
        Ok(Self { file: file.into(), sent, acknowledged, given_back: 0, ending: false, ended: false })
    }

    /// Sends as much as there is, and room for.
    pub fn step(&mut self, id: StreamId, mux: &mut Mux) -> std::io::Result<()> {
        let mut buffer = [0; BUFFER];
        while !self.ended {
            let room = mux.room(id).min(BUFFER);
            if room == 0 {
                break;
            }
            match self.file.read_at(&mut buffer[..room], self.sent)? {
                0 if self.ending => {
                    self.ended = true;
                    mux.end(id);
                }
                0 => break,
                n => self.sent += mux.write(id, &buffer[..n]) as u64,
            }
        }
        Ok(())
    }

    /// No more will be written.
    pub fn end(&mut self) {
        self.ending = true;
    }

    /// The node has so many bytes more for good.
    pub fn acknowledged(&mut self, count: u32) {
        self.acknowledged += u64::from(count);
        let whole = self.acknowledged / BLOCK * BLOCK;
        if whole >= self.given_back + PIECE || self.is_over() && whole > self.given_back {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // A file system that can't gives the room back with the file.
            let _ = rustix::fs::fallocate(&self.file, flags, 0, whole);
            self.given_back = whole;
        }
    }

    /// All of it is the node's.
    pub fn is_over(&self) -> bool {
        self.ended && self.acknowledged == self.sent
    }
}

/// Where changes of logs are told.
pub fn changes() -> Result<std::os::fd::OwnedFd> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    inotify::init(flags).map_err(|e| Failure::errno("inotify", e))
}

/// Takes what was told.
pub fn drain(changes: &std::os::fd::OwnedFd) {
    let mut buffer = [0u8; 4096];
    while rustix::io::read(changes, &mut buffer).is_ok_and(|n| n > 0) {}
}

/// Makes the folder of logs.
pub fn prepare(settings: &Settings) -> Result<()> {
    let folder: &Path = &folder(settings);
    std::fs::create_dir_all(folder).map_err(|e| Failure::io(folder.display(), &e))
}

#[cfg(test)]
mod tests {
    use lxcri_guest_proto::Side;

    use super::*;

    struct Test {
        settings: Settings,
        dir: tempfile::TempDir,
    }

    impl Test {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a folder");
            let none = PathBuf::new();
            let settings = Settings {
                listen: ([127, 0, 0, 1], 0).into(),
                secret: none.clone(),
                run_dir: none.clone(),
                data_dir: dir.path().to_owned(),
                block_devices: none,
            };
            prepare(&settings).expect("prepared");
            Self { settings, dir }
        }

        fn write(&self, bytes: &[u8]) {
            use std::io::Write;
            let path = self.dir.path().join("logs/c.log");
            let mut file = File::options().append(true).create(true).open(path).expect("the log");
            file.write_all(bytes).expect("written");
        }

        fn open(&self, from: u64) -> std::result::Result<(Follower, Mux, StreamId), ResetCode> {
            let log = v1::Log { container_id: "c".into(), from };
            let follower = Follower::open(&self.settings, &log, &changes().expect("inotify"))?;
            let mut mux = Mux::new(Side::Guest);
            let id = mux.open(b"").expect("a stream");
            Ok((follower, mux, id))
        }
    }

    /// What was written to the stream and is taken from it now.
    fn sent(mux: &mut Mux) -> usize {
        use lxcri_guest_proto::frame::Frame;
        let mut bytes = Vec::new();
        mux.output(&mut bytes, usize::MAX);
        let (mut rest, mut count) = (bytes.as_slice(), 0);
        while let Some(frame) = Frame::read(&mut rest).expect("frames") {
            if let Frame::Data(_, data) = frame {
                count += data.len();
            }
        }
        count
    }

    #[test]
    fn what_is_not_acknowledged_is_kept_and_what_is_makes_room() {
        let test = Test::new();
        let blocks = || {
            let meta = std::fs::metadata(test.dir.path().join("logs/c.log")).expect("the log");
            std::os::unix::fs::MetadataExt::blocks(&meta) * 512
        };
        test.write(&vec![b'x'; 2 * PIECE as usize + 10]);
        let before = blocks();
        let (mut follower, mut mux, id) = test.open(100).expect("followed");
        follower.step(id, &mut mux).expect("a step");
        assert_eq!(mux.room(id), 0, "as much as is under way at once");
        follower.acknowledged(PIECE as u32);
        assert_eq!(blocks() + PIECE, before, "the room of whole blocks is given back");
        // Again, from what the node has; no earlier, and no later than there is.
        let (mut follower, ..) = test.open(100 + PIECE).expect("followed");
        follower.acknowledged(0);
        let refused = |from| test.open(from).map(|_| ()).expect_err("refused");
        assert_eq!(refused(100), ResetCode::ResetGone);
        assert_eq!(refused(2 * PIECE + 11), ResetCode::ResetInvalid);
        assert!(test.open(2 * PIECE + 10).is_ok());
    }

    #[test]
    fn the_end_comes_when_it_is_said_and_all_was_sent() {
        let test = Test::new();
        let (mut follower, mut mux, id) = test.open(0).expect("a log that is not there yet");
        follower.step(id, &mut mux).expect("a step");
        assert!(!mux.has_output() || sent(&mut mux) == 0);
        test.write(b"a line\n");
        follower.end();
        follower.step(id, &mut mux).expect("a step");
        while mux.has_output() {
            sent(&mut mux);
        }
        assert!(follower.ended && !follower.is_over());
        follower.acknowledged(7);
        assert!(follower.is_over());
        forget(&test.settings, "c").expect("removed");
        forget(&test.settings, "c").expect("gone already");
        assert!(forget(&test.settings, "../x").is_err());
    }
}
