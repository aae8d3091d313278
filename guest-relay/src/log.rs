//! One container's log: lines of the guest's are appended to the node's file, then the position is written down, and only then the
//! guest hears that they are here for good.
//!
//! Called by [`crate::container`]. A file that can't be written is tried again each second; until then nothing more is taken from the
//! guest, which keeps it. A crash between file and position leaves lines that the next relay takes back ([`Log::take_up`]), since
//! the guest sends them again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proxmox_lxcri_monitor::logfile::LogFile;

use crate::lines::Lines;
use crate::store::Position;

/// A log in trouble is tried again after this time.
const RETRY: Duration = Duration::from_secs(1);

/// What is to be done before anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stuck {
    /// Lines wait in the file's rest; else they are in the file, and the position is not written down.
    lines: bool,
    /// So many bytes of the guest's.
    count: usize,
    /// They came on the stream that there is now, which hears of them.
    own: bool,
    /// When it is tried again.
    again: Instant,
}

/// What became of writing.
#[derive(Debug, PartialEq, Eq)]
pub enum Wrote {
    /// So many bytes of the guest's are here for good.
    Good(usize),
    /// It can't be written, and why. Told once.
    Trouble(String),
    /// It still can't.
    Waiting,
}

/// A log.
pub struct Log {
    folder: PathBuf,
    id: String,
    file: LogFile,
    position: Position,
    lines: Lines,
    stuck: Option<Stuck>,
    /// Lines of the guest's were left out: said once.
    refused: bool,
    /// Trouble was told, and not its end.
    told: bool,
}

impl Log {
    /// A new container's; a file that is there is gone on with.
    pub fn create(folder: &Path, id: &str, path: &Path, size_max: u64) -> std::io::Result<Self> {
        let mut file = LogFile::open(path.to_owned())?.limited(size_max);
        let position = Position { guest: 0, node: file.place()? };
        position.save(folder, id)?;
        Ok(Self::new(folder, id, file, position))
    }

    /// One of a relay that is gone: what it wrote after its last position is taken back.
    pub fn take_up(folder: &Path, id: &str, path: &Path, size_max: u64) -> std::io::Result<Self> {
        let position = Position::load(folder, id)?;
        match position.node.map_or(Ok(()), |place| place.cut_back(path)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut log = Self::new(folder, id, LogFile::take_up(path.to_owned()).limited(size_max), position);
        // It may be another file by now, or one that can't be opened now.
        log.note_place();
        Ok(log)
    }

    fn new(folder: &Path, id: &str, file: LogFile, position: Position) -> Self {
        let (folder, id, lines) = (folder.to_owned(), id.to_owned(), Lines::default());
        Self { folder, id, file, position, lines, stuck: None, refused: false, told: false }
    }

    /// Bytes of the guest's log that need not come again.
    pub fn position(&self) -> u64 {
        self.position.guest + self.stuck.map_or(0, |stuck| stuck.count as u64)
    }

    /// Takes bytes as they come.
    pub fn input(&mut self, bytes: &[u8]) {
        self.lines.input(bytes);
    }

    /// The connection is gone, or the log's end is here: what is no whole line comes again, or never.
    pub fn forget_partial(&mut self) {
        self.lines.clear();
        if let Some(stuck) = &mut self.stuck {
            stuck.own = false;
        }
    }

    /// Writes whole lines that have come, to be called until nothing more is good.
    pub fn flush(&mut self, now: Instant) -> Wrote {
        if let Some(stuck) = self.stuck {
            if stuck.again > now {
                return Wrote::Waiting;
            }
            if let Err(error) = self.go_on(stuck) {
                return self.trouble(now, &error);
            }
            self.stuck = None;
            if stuck.own && stuck.count > 0 {
                return Wrote::Good(stuck.count);
            }
        }
        let taken = self.lines.take();
        self.refused |= taken.refused;
        if taken.count == 0 {
            return Wrote::Good(0);
        }
        let stuck = Stuck { lines: true, count: taken.count, own: true, again: now };
        // Written down before there are lines in it: those of a file that nobody finds again could not be taken back. What fails here is
        // tried again, and told, by what follows.
        if self.file.make_room(taken.lines.len()).unwrap_or(false) {
            let _ = self.write_down(0);
        }
        if let Err(error) = self.file.write(&taken.lines) {
            self.stuck = Some(stuck);
            return self.trouble(now, &error);
        }
        match self.write_down(taken.count) {
            Ok(()) => Wrote::Good(taken.count),
            Err(error) => {
                self.stuck = Some(Stuck { lines: false, ..stuck });
                self.trouble(now, &error)
            }
        }
    }

    fn go_on(&mut self, stuck: Stuck) -> std::io::Result<()> {
        if stuck.lines {
            self.file.write_rest()?;
            self.stuck = Some(Stuck { lines: false, ..stuck });
        }
        self.write_down(stuck.count)
    }

    fn write_down(&mut self, more: usize) -> std::io::Result<()> {
        let position = Position { guest: self.position.guest + more as u64, node: self.file.place()? };
        position.save(&self.folder, &self.id)?;
        self.position = position;
        Ok(())
    }

    fn trouble(&mut self, now: Instant, error: &std::io::Error) -> Wrote {
        if let Some(stuck) = &mut self.stuck {
            stuck.again = now + RETRY;
        }
        match std::mem::replace(&mut self.told, true) {
            true => Wrote::Waiting,
            false => Wrote::Trouble(format!("write {}: {error}", self.file.path().display())),
        }
    }

    /// Trouble that was told is over: said once.
    pub fn recovered(&mut self) -> bool {
        self.stuck.is_none() && std::mem::take(&mut self.told)
    }

    /// Bytes that went with a log that had become too large: said once.
    pub fn take_dropped(&mut self) -> u64 {
        self.file.take_dropped()
    }

    /// Lines of the guest's were left out: said once.
    pub fn has_refused(&mut self) -> bool {
        std::mem::take(&mut self.refused)
    }

    /// When it is to be tried again.
    pub fn again(&self) -> Option<Instant> {
        self.stuck.map(|stuck| stuck.again)
    }

    /// ReopenLog.
    pub fn reopen(&mut self) -> std::io::Result<()> {
        self.file.reopen()?;
        match &mut self.stuck {
            // It may be well with the new file; its place is written down with what waits.
            Some(stuck) => {
                stuck.again = Instant::now();
                Ok(())
            }
            None => {
                self.note_place();
                Ok(())
            }
        }
    }

    /// Writes down which file it is now; what can't be written now is tried again before the next lines are written.
    fn note_place(&mut self) {
        if self.write_down(0).is_err() {
            self.stuck = Some(Stuck { lines: false, count: 0, own: false, again: Instant::now() });
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;

    fn line(n: usize) -> String {
        format!("2026-01-02T03:04:05.123456789Z stdout F line {n}\n")
    }

    struct Test {
        dir: tempfile::TempDir,
    }

    impl Test {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a folder");
            std::fs::create_dir_all(dir.path().join("pod/c")).expect("folders");
            std::fs::create_dir(dir.path().join("state")).expect("a folder");
            Self { dir }
        }
        fn path(&self) -> PathBuf {
            self.dir.path().join("pod/c/0.log")
        }
        fn state(&self) -> PathBuf {
            self.dir.path().join("state")
        }
        fn text(&self) -> String {
            std::fs::read_to_string(self.path()).expect("the log")
        }
    }

    #[test]
    fn a_log_that_is_too_large_begins_anew_and_is_found_by_the_next_relay() {
        let test = Test::new();
        let limit = 10 * line(10).len() as u64;
        let mut log = Log::create(&test.state(), "c", &test.path(), limit).expect("a log");
        for n in 10..=20 {
            log.input(line(n).as_bytes());
            assert_eq!(log.flush(Instant::now()), Wrote::Good(line(n).len()));
        }
        assert_eq!((log.take_dropped(), log.take_dropped()), (limit, 0));
        assert!(test.text().contains("were dropped") && test.text().ends_with(&line(20)), "{}", test.text());
        let before = test.text();
        log.input(line(21).as_bytes());
        // As if it had been killed before the line was written down.
        let position = std::fs::read(test.state().join("c.guest-log")).expect("the position");
        log.flush(Instant::now());
        std::fs::write(test.state().join("c.guest-log"), position).expect("the old position");
        let log = Log::take_up(&test.state(), "c", &test.path(), limit).expect("taken up");
        assert_eq!((test.text(), log.position()), (before, 11 * line(10).len() as u64));
    }

    #[test]
    fn lines_that_were_written_and_not_written_down_are_taken_back() {
        let test = Test::new();
        let mut log = Log::create(&test.state(), "c", &test.path(), 0).expect("a log");
        log.input(line(1).as_bytes());
        log.input(b"2026-01-02T03:04:05.12");
        assert_eq!(log.flush(Instant::now()), Wrote::Good(line(1).len()));
        let before = std::fs::read(test.state().join("c.guest-log")).expect("the position");
        log.forget_partial();
        log.input(line(2).as_bytes());
        assert_eq!(log.flush(Instant::now()), Wrote::Good(line(2).len()));
        drop(log);
        // As if it had been killed before the second line was written down.
        std::fs::write(test.state().join("c.guest-log"), &before).expect("the old position");
        let log = Log::take_up(&test.state(), "c", &test.path(), 0).expect("taken up");
        assert_eq!((test.text(), log.position()), (line(1), line(1).len() as u64));
        drop(log);
        // The same when the kubelet has renamed the file meanwhile.
        let mut log = Log::take_up(&test.state(), "c", &test.path(), 0).expect("taken up");
        log.input(line(2).as_bytes());
        log.flush(Instant::now());
        std::fs::write(test.state().join("c.guest-log"), &before).expect("the old position");
        std::fs::rename(test.path(), test.path().with_extension("log.old")).expect("renamed");
        let mut log = Log::take_up(&test.state(), "c", &test.path(), 0).expect("taken up");
        log.input(line(2).as_bytes());
        log.flush(Instant::now());
        assert_eq!(std::fs::read_to_string(test.path().with_extension("log.old")).expect("the old file"), line(1));
        assert_eq!(test.text(), line(2));
    }

    #[test]
    fn a_log_that_is_renamed_goes_on_in_a_new_file() {
        let test = Test::new();
        let mut log = Log::create(&test.state(), "c", &test.path(), 0).expect("a log");
        log.input(line(1).as_bytes());
        log.flush(Instant::now());
        std::fs::rename(test.path(), test.path().with_extension("old")).expect("renamed");
        log.reopen().expect("opened anew");
        log.input(line(2).as_bytes());
        log.input(b"garbage\n");
        assert_eq!(log.flush(Instant::now()), Wrote::Good(line(2).len() + 8));
        assert_eq!(test.text(), line(2));
        assert!(log.has_refused() && !log.has_refused());
        let log = Log::take_up(&test.state(), "c", &test.path(), 0).expect("taken up");
        assert_eq!((log.position(), test.text()), ((line(1).len() + line(2).len() + 8) as u64, line(2)));
        // Opened anew where that can't be written down: nothing is written until it can be.
        let mut log = log;
        std::fs::rename(test.state(), test.dir.path().join("away")).expect("renamed");
        log.reopen().expect("opened anew");
        log.input(line(3).as_bytes());
        assert!(matches!(log.flush(Instant::now()), Wrote::Trouble(_)));
        assert_eq!(test.text(), line(2));
        std::fs::rename(test.dir.path().join("away"), test.state()).expect("renamed");
        assert_eq!(log.flush(Instant::now() + RETRY), Wrote::Good(line(3).len()));
        assert_eq!(test.text(), line(2) + &line(3));
    }

    #[test]
    fn what_can_not_be_written_is_not_acknowledged_and_tried_again() {
        let test = Test::new();
        let mut log = Log::create(&test.state(), "c", &test.path(), 0).expect("a log");
        // No place for the position: the lines are there, and are not written twice.
        std::fs::rename(test.state(), test.dir.path().join("away")).expect("renamed");
        log.input(line(1).as_bytes());
        let now = Instant::now();
        assert!(matches!(log.flush(now), Wrote::Trouble(_)));
        log.input(line(2).as_bytes());
        assert_eq!(log.flush(now), Wrote::Waiting);
        assert_eq!(log.flush(now + RETRY), Wrote::Waiting);
        assert!(!log.recovered());
        // A connection that is lost meanwhile: what waits here is not asked for again, nor acknowledged on the next stream.
        log.forget_partial();
        assert_eq!(log.position(), line(1).len() as u64);
        log.input(line(2).as_bytes());
        std::fs::rename(test.dir.path().join("away"), test.state()).expect("renamed");
        assert_eq!(log.flush(now + 3 * RETRY), Wrote::Good(line(2).len()));
        assert_eq!(log.flush(now + 3 * RETRY), Wrote::Good(0));
        assert!(log.recovered() && !log.recovered());
        assert_eq!((test.text(), log.position()), (line(1) + &line(2), 2 * line(1).len() as u64));
    }

    #[test]
    fn what_is_discarded_is_acknowledged() {
        let test = Test::new();
        let mut log = Log::create(&test.state(), "c", Path::new(""), 0).expect("a log");
        log.input(line(1).as_bytes());
        assert_eq!(log.flush(Instant::now()), Wrote::Good(line(1).len()));
        let log = Log::take_up(&test.state(), "c", Path::new(""), 0).expect("taken up");
        assert_eq!(log.position(), line(1).len() as u64);
    }
}
