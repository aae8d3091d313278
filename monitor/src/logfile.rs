//! A container's log file, with what a failed write left unwritten.
//!
//! Used by the writer thread alone, and by the relay of a guest. A write that fails keeps the rest; while a rest is there nothing else may be
//! written, so that lines never mix. A file that would outgrow its limit is replaced by an empty one, which begins with a line that says
//! so: who follows the log reads the old one to its end. Fails with the I/O error; a crash may leave the last line cut.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

/// No line of a log is longer, in bytes: content and head.
const MEND_MAX: u64 = 4 << 20;

/// A file, wherever it is renamed to, and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Of its file system.
    pub device: u64,
    /// Its number.
    pub inode: u64,
    /// In bytes.
    pub length: u64,
}

impl Place {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { device: meta.dev(), inode: meta.ino(), length: meta.len() })
    }

    /// Removes what was written to this log after it was as long as this. `path` is where it was; if it was renamed since, it is in
    /// the same folder. One that is not found is nobody's to mend.
    pub fn cut_back(self, path: &Path) -> io::Result<()> {
        if self.cut(path)? {
            return Ok(());
        }
        let Some(folder) = path.parent() else { return Ok(()) };
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.ino() == self.inode && self.cut(&entry.path())? {
                break;
            }
        }
        Ok(())
    }

    /// Whether this is the file.
    fn cut(self, path: &Path) -> io::Result<bool> {
        let file = match open(path, rustix::fs::OFlags::WRONLY) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e),
        };
        let now = Self::of(&file)?;
        let is = (now.device, now.inode) == (self.device, self.inode);
        if is && now.length > self.length {
            file.set_len(self.length)?;
        }
        Ok(is)
    }
}

/// The file, open for appending; nothing, for output that is discarded (no path), or for a file that can't be opened yet.
pub struct LogFile {
    path: PathBuf,
    file: Option<File>,
    /// Lines not written, from the beginning of the first one.
    rest: Vec<u8>,
    /// So many bytes of `rest` are in this file already.
    cut: usize,
    /// Bytes of this file.
    size: u64,
    /// It is never larger than this, but for one write; 0: no limit.
    limit: u64,
    /// Bytes that went with files that were replaced, of which nobody has heard yet.
    dropped: u64,
    /// Comes before the next lines.
    notice: Vec<u8>,
}

impl LogFile {
    /// Opens or makes the file; its folder must be there. An empty path discards.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let file = if path.as_os_str().is_empty() { None } else { Some(append(&path)?) };
        Ok(Self::of(path, file))
    }

    /// As [`LogFile::open`], where another writer has died: of a line that it left cut the beginning goes, since its rest is
    /// lost. A file that can't be opened is tried again by the next write.
    pub fn take_up(path: PathBuf) -> Self {
        let file = if path.as_os_str().is_empty() { None } else { append(&path).ok() };
        if let Some(file) = &file {
            // A log that can't be mended has one bad line, which its readers skip.
            let _ = mend(&path, file);
        }
        Self::of(path, file)
    }

    fn of(path: PathBuf, file: Option<File>) -> Self {
        let size = file.as_ref().map_or(0, length);
        Self { path, file, rest: Vec::new(), cut: 0, size, limit: 0, dropped: 0, notice: Vec::new() }
    }

    /// The same, with a limit of its size in bytes; 0: none.
    pub fn limited(mut self, limit: u64) -> Self {
        self.limit = limit;
        self
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether what is written goes nowhere.
    pub fn discards(&self) -> bool {
        self.path.as_os_str().is_empty()
    }

    /// Opens the file anew at the same path (it was renamed away). A line that was cut in the old file is
    /// written whole to the new one.
    pub fn reopen(&mut self) -> io::Result<()> {
        if !self.discards() {
            let file = append(&self.path)?;
            self.size = length(&file);
            self.file = Some(file);
            self.cut = 0;
        }
        Ok(())
    }

    /// Replaces a file that would be larger than its limit with `more` bytes; whether it did. Nothing is lost that another has renamed
    /// away: that one stays, and the new one begins without a word.
    pub fn make_room(&mut self, more: usize) -> io::Result<bool> {
        if self.limit == 0 || self.size == 0 || self.size.saturating_add(more as u64) <= self.limit {
            return Ok(false);
        }
        let Some(file) = &self.file else { return Ok(false) };
        let ours = Place::of(file)?;
        match open(&self.path, rustix::fs::OFlags::WRONLY).and_then(|there| Place::of(&there)) {
            Ok(there) if (there.device, there.inode) == (ours.device, ours.inode) => {
                rustix::fs::unlink(&self.path)?;
                self.dropped += ours.length;
                self.notice = notice(ours.length);
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        self.file = None;
        self.size = 0;
        self.ready()?;
        Ok(true)
    }

    /// Bytes that were dropped since it was asked last.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    /// Appends whole lines; on failure keeps those that are not written.
    pub fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.discards() {
            return Ok(());
        }
        let room = self.make_room(lines.len());
        let noticed: Vec<u8>;
        let lines = match self.notice.is_empty() {
            true => lines,
            false => {
                noticed = [std::mem::take(&mut self.notice).as_slice(), lines].concat();
                &noticed
            }
        };
        let mut done = 0;
        let result = room.and_then(|_| self.ready()).and_then(|file| write_from(file, lines, &mut done));
        self.size += done as u64;
        if result.is_err() {
            let line = lines[..done].iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
            self.rest = lines[line..].to_vec();
            self.cut = done - line;
        }
        result
    }

    /// Appends what an earlier write left.
    pub fn write_rest(&mut self) -> io::Result<()> {
        if self.discards() {
            return Ok(());
        }
        let rest = std::mem::take(&mut self.rest);
        let before = self.cut;
        let mut cut = before;
        let result = self.ready().and_then(|file| write_from(file, &rest, &mut cut));
        self.size += (cut - before) as u64;
        (self.rest, self.cut) = (rest, cut);
        result?;
        self.rest = Vec::new();
        self.cut = 0;
        Ok(())
    }
}

impl LogFile {
    /// Which file it is, and where the next line goes; None: it is discarded.
    pub fn place(&mut self) -> io::Result<Option<Place>> {
        if self.discards() {
            return Ok(None);
        }
        self.ready().and_then(|file| Place::of(file)).map(Some)
    }

    fn ready(&mut self) -> io::Result<&mut File> {
        match &mut self.file {
            Some(file) => Ok(file),
            file => {
                let new = append(&self.path)?;
                self.size = length(&new);
                Ok(file.insert(new))
            }
        }
    }
}

fn length(file: &File) -> u64 {
    file.metadata().map_or(0, |meta| meta.len())
}

/// What a log says of what is not in it.
fn notice(bytes: u64) -> Vec<u8> {
    let text = format!(
        "proxmox-lxcri: the {bytes} bytes of this log before this line were dropped: see runtime.log_size_max\n"
    );
    let (time, mut line) = (crate::clock::rfc3339(crate::clock::now_ns()), Vec::new());
    crate::crilog::line(&time, crate::crilog::Stream::Stderr, text.len(), text.as_bytes(), &mut line);
    line
}

/// Cuts the file behind its last whole line.
fn mend(path: &Path, file: &File) -> io::Result<()> {
    let length = file.metadata()?.len();
    let start = length.saturating_sub(MEND_MAX);
    let mut end = Vec::new();
    let mut reader = open(path, rustix::fs::OFlags::RDONLY)?;
    reader.seek(SeekFrom::Start(start))?;
    reader.read_to_end(&mut end)?;
    match end.iter().rposition(|b| *b == b'\n') {
        Some(at) if start + at as u64 + 1 < length => file.set_len(start + at as u64 + 1),
        None if start == 0 && length > 0 => file.set_len(0),
        _ => Ok(()),
    }
}

/// A container that has the node's log folder mounted may put a link to any file of the node in its log's place, or a
/// FIFO that nobody reads: neither the file nor its folder may be a link, and the file is a regular one.
fn open(path: &Path, how: rustix::fs::OFlags) -> io::Result<File> {
    use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let (above, inside) = match (folder.parent(), folder.file_name()) {
        (Some(above), Some(last)) => (above, Path::new(last).join(name)),
        _ => (folder, PathBuf::from(name)),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let above = rustix::fs::open(above, flags, Mode::empty())?;
    let flags = how | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(if how.contains(OFlags::CREATE) { 0o640 } else { 0 });
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    let file = loop {
        match rustix::fs::openat2(&above, &inside, flags, mode, resolve) {
            // A rename beside it: the kernel asks to try again.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            done => break done?,
        }
    };
    match FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
        FileType::RegularFile => Ok(file.into()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "the log is not a regular file")),
    }
}

fn append(path: &Path) -> io::Result<File> {
    use rustix::fs::OFlags;
    open(path, OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE)
}

/// Writes `bytes` from `done` on, which always says how far it came.
fn write_from(file: &mut File, bytes: &[u8], done: &mut usize) -> io::Result<()> {
    while *done < bytes.len() {
        match file.write(&bytes[*done..]) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
            Ok(n) => *done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_came_after_a_place_is_taken_back_wherever_the_file_is() {
        let dir = std::env::temp_dir().join(format!("lxcri-logfile-place-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("c")).expect("folders");
        let log = dir.join("c/0.log");
        let mut file = LogFile::open(log.clone()).expect("new");
        file.write(b"one\n").expect("a line");
        let place = file.place().expect("its place").expect("a file");
        assert_eq!(place.length, 4);
        file.write(b"two\n").expect("a line");
        place.cut_back(&log).expect("cut");
        assert_eq!(std::fs::read(&log).expect("the log"), b"one\n");
        file.write(b"three\n").expect("a line");
        std::fs::rename(&log, dir.join("c/0.log.1")).expect("renamed");
        std::fs::write(&log, "another file").expect("written");
        place.cut_back(&log).expect("cut");
        assert_eq!(std::fs::read(dir.join("c/0.log.1")).expect("the log"), b"one\n");
        assert_eq!(std::fs::read(&log).expect("the other"), b"another file");
        std::fs::remove_file(dir.join("c/0.log.1")).expect("removed");
        place.cut_back(&log).expect("nothing");
        assert!(LogFile::open(PathBuf::new()).expect("none").place().expect("none").is_none());
        std::fs::remove_dir_all(dir).expect("removed");
    }

    #[test]
    fn a_file_that_outgrows_its_limit_is_replaced_and_says_so() {
        let dir = std::env::temp_dir().join(format!("lxcri-logfile-limit-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("c")).expect("folders");
        let log = dir.join("c/0.log");
        let line = [b'x'; 99].iter().chain(b"\n").copied().collect::<Vec<u8>>();
        let mut file = LogFile::open(log.clone()).expect("new").limited(1000);
        for _ in 0..10 {
            file.write(&line).expect("a line");
        }
        assert_eq!((std::fs::read(&log).expect("the log").len(), file.take_dropped()), (1000, 0));
        let mut reader = std::fs::File::open(&log).expect("who follows it");
        file.write(&line).expect("a line");
        let text = String::from_utf8(std::fs::read(&log).expect("the log")).expect("UTF-8");
        let (first, rest) = text.split_once('\n').expect("lines");
        assert!(
            first.contains(" stderr F proxmox-lxcri: the 1000 bytes of this log before this line were dropped"),
            "{first}"
        );
        assert_eq!((rest.as_bytes(), file.take_dropped(), file.take_dropped()), (line.as_slice(), 1000, 0));
        let mut old = Vec::new();
        reader.read_to_end(&mut old).expect("the old file");
        assert_eq!(old.len(), 1000, "who followed it has all of it");
        // Of one that was renamed away nothing is dropped, and nothing said.
        for _ in 0..7 {
            file.write(&line).expect("a line");
        }
        std::fs::rename(&log, dir.join("c/0.log.old")).expect("renamed");
        file.write(&line).expect("a line");
        assert_eq!((std::fs::read(&log).expect("the log"), file.take_dropped()), (line.clone(), 0));
        // What another writer has left counts.
        let mut file = LogFile::take_up(log.clone()).limited(150);
        file.write(&line).expect("a line");
        assert_eq!(file.take_dropped(), 100);
        // A link in its place is none of ours, and nothing is written through it.
        std::fs::remove_file(&log).expect("removed");
        symlink(dir.join("c/0.log.old"), &log).expect("a link");
        let before = std::fs::read(dir.join("c/0.log.old")).expect("the old one");
        assert!(file.write(&line).is_err());
        assert_eq!(std::fs::read(dir.join("c/0.log.old")).expect("the old one"), before);
        std::fs::remove_file(&log).expect("removed");
        // The rest is the open file's, as what came before it; what follows has its place again.
        file.write_rest().expect("the rest");
        file.write(&line).expect("a line");
        assert_eq!((std::fs::read(&log).expect("the log"), file.take_dropped()), (line.clone(), 0));
        // One write is whole, whatever the limit is.
        let mut file = LogFile::open(dir.join("c/1.log")).expect("new").limited(10);
        file.write(&line).expect("a line");
        file.write(&line).expect("a line");
        assert!(std::fs::read(dir.join("c/1.log")).expect("the log").ends_with(&line) && file.take_dropped() == 100);
        std::fs::remove_dir_all(dir).expect("removed");
    }

    #[test]
    fn links_and_fifos_in_its_place_are_refused() {
        let dir = std::env::temp_dir().join(format!("lxcri-logfile-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("pod/c")).expect("folders");
        std::fs::write(dir.join("outside"), "").expect("a file");
        let log = dir.join("pod/c/0.log");
        LogFile::open(log.clone()).expect("new").write(b"one\n").expect("a line");
        LogFile::open(log.clone()).expect("there").write(b"two\n").expect("a line");
        assert_eq!(std::fs::read(&log).expect("the log"), b"one\ntwo\n");
        symlink(dir.join("outside"), dir.join("pod/c/link.log")).expect("a link");
        symlink(dir.join("nowhere"), dir.join("pod/c/new.log")).expect("a link");
        symlink(&dir, dir.join("pod/d")).expect("a link");
        let made = rustix::fs::mkfifoat(rustix::fs::CWD, dir.join("pod/c/fifo.log"), rustix::fs::Mode::RUSR);
        made.expect("a FIFO");
        for bad in ["pod/c/link.log", "pod/c/new.log", "pod/d/outside", "pod/c/fifo.log"] {
            assert!(LogFile::open(dir.join(bad)).is_err(), "{bad}");
        }
        assert_eq!(std::fs::read(dir.join("outside")).expect("the file"), b"");
        assert!(!dir.join("nowhere").exists());
        std::fs::remove_dir_all(dir).expect("removed");
    }
}
