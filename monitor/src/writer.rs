//! The log writer: a thread of its own that reads containers' output and writes their logs.
//!
//! Only here are log files opened, written and closed, so that a file system that hangs stops this thread, which stops
//! reading, which stops the containers that write: nothing is lost and the pod's supervision goes on. A write that
//! fails pauses the container's streams and is tried again each second. The server gives orders and takes reports;
//! both queues are bounded by what the daemon asks for. A crash loses at most the one read in hand.

mod taps;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::crilog::{self, Stream};
use crate::fail_point;
use crate::logfile::LogFile;
use taps::Tap;

/// Names a log; chosen by the server, never used twice.
pub type LogId = u64;

/// One read takes at most this much, in bytes.
const READ: usize = 16 * 1024;
/// Before output that came in small pieces is looked at again: who writes line by line would wake us with each.
const GATHER: Duration = Duration::from_micros(100);
/// Formatted lines are written when this many bytes are there.
const BATCH: usize = 16 * 1024;
/// A paused log is tried again after this time.
const RETRY: Duration = Duration::from_secs(1);
/// Without data for this long, output that has no end is taken to be at its end.
const QUIET: Duration = Duration::from_secs(2);
/// The writer's stack in bytes; only what is touched takes memory.
const STACK: usize = 64 * 1024;
const WAKE: u64 = u64::MAX;

/// What the server wants done.
pub enum Order {
    /// Open the log file; "" discards output. Reported as Opened.
    Open {
        /// Its name from now on.
        id: LogId,
        /// Absolute path.
        path: PathBuf,
        /// Longest content of a line, bytes.
        line_max: usize,
        /// Largest file, bytes; 0: no limit.
        size_max: u64,
    },
    /// Open the log of a container of another monitor, which may have died in the middle of a line. One that can't be
    /// opened now is tried again like one that can't be written. Reported as Opened.
    TakeUp {
        /// Its name from now on.
        id: LogId,
        /// Absolute path.
        path: PathBuf,
        /// Longest content of a line, bytes.
        line_max: usize,
        /// Largest file, bytes; 0: no limit.
        size_max: u64,
    },
    /// Read from `from` (non-blocking) until its end.
    Follow {
        /// The log.
        id: LogId,
        /// As what it is logged.
        stream: Stream,
        /// A FIFO or the master of a pty.
        from: OwnedFd,
        /// It is a pty: EIO is its end, and may not be for good.
        tty: bool,
    },
    /// Give a copy of the output to an attached client, too, from now on. Reported as Attached, later as AttachOver.
    Attach {
        /// The log.
        id: LogId,
        /// The client.
        client: u64,
        /// Write ends of pipes, non-blocking, and what goes into each.
        to: Vec<(Stream, OwnedFd)>,
    },
    /// No client gets output of this log any more.
    Detach(LogId),
    /// The container has ended: read what is left. Reported as Drained.
    Drain(LogId),
    /// Open the file anew. Reported as Reopened.
    Reopen(LogId),
    /// Close the file and forget the log. Reported as Closed.
    Close(LogId),
}

/// What the writer has to say.
pub enum Report {
    /// The file is open, or why not.
    Opened(LogId, Result<(), std::io::Error>),
    /// The client gets output from now on.
    Attached(u64),
    /// It gets no more; true: because it took too little.
    AttachOver(u64, bool),
    /// All output is in the log.
    Drained(LogId),
    /// The file was swapped, or why not (the old one stays).
    Reopened(LogId, Result<(), std::io::Error>),
    /// The log is closed.
    Closed(LogId),
    /// Output can't be written, and why; "" : it can again.
    Trouble(LogId, String),
    /// So many bytes of a log that had become too large are no more.
    Dropped(LogId, u64),
}

struct Shared {
    orders: Mutex<Vec<Order>>,
    reports: Mutex<Vec<Report>>,
    ordered: OwnedFd,
    reported: OwnedFd,
}

/// The server's handle.
pub struct Writer {
    shared: Arc<Shared>,
}

impl Writer {
    /// Starts the thread.
    pub fn start() -> std::io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let shared = Arc::new(Shared {
            orders: Mutex::default(),
            reports: Mutex::default(),
            ordered: eventfd(0, flags)?,
            reported: eventfd(0, flags)?,
        });
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &shared.ordered, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        let mut thread = Thread {
            shared: shared.clone(),
            epoll,
            logs: BTreeMap::new(),
            next_token: 0,
            read: Vec::new(),
            batch: Vec::new(),
        };
        std::thread::Builder::new().name("log-writer".into()).stack_size(STACK).spawn(move || thread.run())?;
        Ok(Self { shared })
    }

    /// Readable when there are reports.
    pub fn reported(&self) -> &OwnedFd {
        &self.shared.reported
    }

    /// Gives an order; they are done in their order.
    pub fn order(&self, order: Order) {
        lock(&self.shared.orders).push(order);
        // EAGAIN means that the counter is full: the thread will wake all the same.
        let _ = rustix::io::write(&self.shared.ordered, &1u64.to_ne_bytes());
    }

    /// Takes what was reported.
    pub fn reports(&self) -> Vec<Report> {
        let _ = rustix::io::read(&self.shared.reported, &mut [0u8; 8]);
        std::mem::take(&mut *lock(&self.shared.reports))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Source {
    token: u64,
    stream: Stream,
    from: OwnedFd,
    tty: bool,
    watched: bool,
}

struct Log {
    file: LogFile,
    taps: Vec<Tap>,
    line_max: usize,
    sources: Vec<Source>,
    /// The rest of a read that has not been formatted because a write failed.
    held: Option<(Stream, Vec<u8>)>,
    trouble: bool,
    /// When the last data came, once draining.
    draining: Option<Instant>,
    retry_at: Option<Instant>,
}

impl Log {
    fn new(file: LogFile, line_max: usize) -> Self {
        let line_max = if line_max == 0 { crilog::LINE_MAX } else { line_max };
        Self {
            file,
            taps: Vec::new(),
            line_max,
            sources: Vec::new(),
            held: None,
            trouble: false,
            draining: None,
            retry_at: None,
        }
    }
}

/// What came of output that was said to be there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Came {
    Nothing,
    /// All that there was.
    All,
    /// As much as one read takes: there may be more.
    Full,
}

struct Thread {
    shared: Arc<Shared>,
    epoll: OwnedFd,
    logs: BTreeMap<LogId, Log>,
    next_token: u64,
    read: Vec<u8>,
    batch: Vec<u8>,
}

impl Thread {
    fn run(&mut self) {
        let mut events = Vec::with_capacity(8);
        loop {
            let timeout = self.next_timer().map(|at| {
                let left = at.saturating_duration_since(Instant::now());
                rustix::time::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
            });
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                // Nothing else can be wrong with an epoll that we hold; without it there is no output.
                Err(_) => return,
            }
            let mut most = Came::Nothing;
            for event in &events {
                match event.data.u64() {
                    WAKE => {
                        let _ = rustix::io::read(&self.shared.ordered, &mut [0u8; 8]);
                        let orders = std::mem::take(&mut *lock(&self.shared.orders));
                        orders.into_iter().for_each(|o| self.obey(o));
                    }
                    token => most = most.max(self.readable(token)),
                }
            }
            self.timers();
            if most == Came::All {
                std::thread::sleep(GATHER);
            }
        }
    }

    fn report(&self, report: Report) {
        lock(&self.shared.reports).push(report);
        let _ = rustix::io::write(&self.shared.reported, &1u64.to_ne_bytes());
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Open { id, path, line_max, size_max } => {
                let made = LogFile::open(path).map(|file| Log::new(file.limited(size_max), line_max));
                let result = made.map(|log| drop(self.logs.insert(id, log)));
                self.report(Report::Opened(id, result));
            }
            Order::TakeUp { id, path, line_max, size_max } => {
                self.logs.insert(id, Log::new(LogFile::take_up(path).limited(size_max), line_max));
                self.report(Report::Opened(id, Ok(())));
            }
            Order::Follow { id, stream, from, tty } => {
                let Some(log) = self.logs.get_mut(&id) else { return };
                let token = self.next_token;
                self.next_token += 1;
                let mut source = Source { token, stream, from, tty, watched: false };
                if !log.trouble {
                    watch(&self.epoll, &mut source);
                }
                log.sources.push(source);
            }
            Order::Attach { id, client, to } => self.attach(id, client, to),
            Order::Detach(id) => self.detach(id),
            Order::Drain(id) => {
                let Some(log) = self.logs.get_mut(&id) else { return };
                log.draining = Some(Instant::now());
                if !log.trouble {
                    log.retry_at = None;
                    log.sources.iter_mut().for_each(|s| watch(&self.epoll, s));
                }
                self.check_drained(id);
            }
            Order::Reopen(id) => {
                let result = match self.logs.get_mut(&id) {
                    Some(log) => log.file.reopen(),
                    None => Ok(()),
                };
                let trouble = self.logs.get(&id).is_some_and(|l| l.trouble);
                if result.is_ok() && trouble {
                    self.retry(id);
                }
                self.report(Report::Reopened(id, result));
            }
            Order::Close(id) => {
                if self.logs.get(&id).is_some_and(|l| l.trouble) {
                    self.retry(id);
                }
                if let Some(mut log) = self.logs.remove(&id) {
                    log.sources.iter_mut().for_each(|s| unwatch(&self.epoll, s));
                    self.end_taps(log.taps);
                }
                self.report(Report::Closed(id));
            }
        }
    }

    fn readable(&mut self, token: u64) -> Came {
        let Some((id, at)) = self
            .logs
            .iter()
            .find_map(|(id, log)| Some((*id, log.sources.iter().position(|s| s.token == token && s.watched)?)))
        else {
            self.left(token);
            return Came::Nothing;
        };
        let Some(log) = self.logs.get_mut(&id) else { return Came::Nothing };
        let source = &mut log.sources[at];
        self.read.clear();
        self.read.reserve_exact(READ);
        match rustix::io::read(&source.from, spare_capacity(&mut self.read)) {
            Ok(n) if n > 0 => {
                fail_point!("monitor.log.read");
                let stream = source.stream;
                if let Some(last) = &mut log.draining {
                    *last = Instant::now();
                }
                let input = std::mem::take(&mut self.read);
                self.copy(id, stream, &input);
                self.consume(id, stream, &input);
                fail_point!("monitor.log.written");
                self.read = input;
                return if n < READ { Came::All } else { Came::Full };
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            // A terminal that nobody has open now; until the container has ended somebody may open it again.
            Err(Errno::IO) if source.tty && log.draining.is_none() => {
                unwatch(&self.epoll, source);
                log.retry_at = Some(Instant::now() + RETRY);
            }
            Ok(_) | Err(_) => {
                unwatch(&self.epoll, source);
                log.sources.remove(at);
                self.end_dry_taps(id);
                self.check_drained(id);
            }
        }
        Came::Nothing
    }

    /// Writes `input` to the log, or holds what could not be written.
    fn consume(&mut self, id: LogId, stream: Stream, input: &[u8]) {
        let Some(log) = self.logs.get_mut(&id) else { return };
        if log.file.discards() {
            return;
        }
        let time = crate::clock::rfc3339(crate::clock::now_ns());
        let mut rest = input;
        while !rest.is_empty() {
            self.batch.clear();
            while !rest.is_empty() && self.batch.len() < BATCH {
                let taken = crilog::line(&time, stream, log.line_max, rest, &mut self.batch);
                rest = &rest[taken..];
            }
            let written = log.file.write(&self.batch);
            let dropped = log.file.take_dropped();
            if dropped > 0 {
                lock(&self.shared.reports).push(Report::Dropped(id, dropped));
                let _ = rustix::io::write(&self.shared.reported, &1u64.to_ne_bytes());
            }
            if let Err(error) = written {
                if !rest.is_empty() {
                    log.held = Some((stream, rest.to_vec()));
                }
                self.pause(id, &error);
                return;
            }
        }
    }

    fn pause(&mut self, id: LogId, error: &std::io::Error) {
        let Some(log) = self.logs.get_mut(&id) else { return };
        log.sources.iter_mut().for_each(|s| unwatch(&self.epoll, s));
        log.retry_at = Some(Instant::now() + RETRY);
        if !log.trouble {
            log.trouble = true;
            let message = format!("write {}: {error}", log.file.path().display());
            self.report(Report::Trouble(id, message));
        }
    }

    /// Tries to write what a failed write left, then reads on.
    fn retry(&mut self, id: LogId) {
        let Some(log) = self.logs.get_mut(&id) else { return };
        log.retry_at = None;
        if log.trouble {
            if let Err(error) = log.file.write_rest() {
                self.pause(id, &error);
                return;
            }
            if let Some((stream, held)) = log.held.take() {
                self.consume(id, stream, &held);
            }
        }
        let Some(log) = self.logs.get_mut(&id) else { return };
        // `consume` has paused it again.
        if log.retry_at.is_some() {
            return;
        }
        log.sources.iter_mut().for_each(|s| watch(&self.epoll, s));
        if let Some(last) = &mut log.draining {
            *last = Instant::now();
        }
        if std::mem::take(&mut log.trouble) {
            self.report(Report::Trouble(id, String::new()));
        }
        self.check_drained(id);
    }

    fn next_timer(&self) -> Option<Instant> {
        self.logs
            .values()
            .filter_map(|l| match (l.retry_at, l.draining) {
                (Some(at), _) => Some(at),
                (None, Some(last)) if !l.sources.is_empty() => Some(last + QUIET),
                _ => None,
            })
            .min()
    }

    fn timers(&mut self) {
        let now = Instant::now();
        let due: Vec<LogId> =
            self.logs.iter().filter(|(_, l)| l.retry_at.is_some_and(|at| at <= now)).map(|(id, _)| *id).collect();
        due.into_iter().for_each(|id| self.retry(id));
        let quiet = |l: &Log| !l.trouble && !l.sources.is_empty() && l.draining.is_some_and(|last| last + QUIET <= now);
        let due: Vec<LogId> = self.logs.iter().filter(|(_, l)| quiet(l)).map(|(id, _)| *id).collect();
        for id in due {
            if let Some(log) = self.logs.get_mut(&id) {
                log.sources.iter_mut().for_each(|s| unwatch(&self.epoll, s));
                log.sources.clear();
            }
            self.end_dry_taps(id);
            self.check_drained(id);
        }
    }

    fn check_drained(&mut self, id: LogId) {
        if let Some(log) = self.logs.get_mut(&id)
            && log.draining.is_some()
            && log.sources.is_empty()
            && !log.trouble
        {
            log.draining = None;
            self.report(Report::Drained(id));
        }
    }
}

fn watch(epoll: &OwnedFd, source: &mut Source) {
    if !source.watched {
        let data = epoll::EventData::new_u64(source.token);
        source.watched = epoll::add(epoll, source.from.as_fd(), data, epoll::EventFlags::IN).is_ok();
    }
}

fn unwatch(epoll: &OwnedFd, source: &mut Source) {
    if std::mem::take(&mut source.watched) {
        let _ = epoll::delete(epoll, source.from.as_fd());
    }
}
