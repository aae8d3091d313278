//! Bytes into and out of a confined process, with an eye on whether it goes on.
//!
//! Called by the parent's side. Writes and reads wait by poll(2), so that a process that hangs is noticed and not waited
//! for. The thread that feeds a decompressor ends with its source or its process. Nothing is kept.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Timespec;
use rustix::io::Errno;

use super::{Running, ended};

/// Bytes moved at once.
const CHUNK: usize = 256 << 10;
/// Stack of a feeding thread.
const STACK: usize = 256 << 10;
/// Between looks at whether a decompressor still goes on.
const LOOK: Duration = Duration::from_secs(1);

/// Why not all was fed.
#[derive(Debug)]
pub(super) enum Fed {
    /// The source failed.
    Source(io::Error),
    /// The process does not read any more.
    Gone,
    /// It took nothing for too long.
    Stalled,
}

fn ready(fd: &OwnedFd, flags: PollFlags, wait: Duration) -> io::Result<bool> {
    let until = Instant::now() + wait;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left =
            Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&fd.as_fd(), flags)], Some(&left)) {
            Ok(n) => return Ok(n > 0),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Copies `source` to its end into the (non-blocking) pipe. `idle` is set while the source is waited for.
pub(super) fn feed(
    source: &mut dyn Read,
    pipe: &OwnedFd,
    patience: Duration,
    idle: Option<&AtomicBool>,
) -> Result<(), Fed> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let note = |waits| idle.into_iter().for_each(|idle| idle.store(waits, Ordering::Relaxed));
        note(true);
        let got = source.read(&mut buffer);
        note(false);
        let mut rest = match got {
            Ok(0) => return Ok(()),
            Ok(n) => &buffer[..n],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Fed::Source(e)),
        };
        while !rest.is_empty() {
            match rustix::io::write(pipe, rest) {
                Ok(n) => rest = &rest[n..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => match ready(pipe, PollFlags::OUT, patience) {
                    Ok(true) => {}
                    Ok(false) => return Err(Fed::Stalled),
                    Err(e) => return Err(Fed::Source(e)),
                },
                Err(_) => return Err(Fed::Gone),
            }
        }
    }
}

/// What a decompressing process writes.
pub(super) struct Decompressed {
    output: OwnedFd,
    running: Running,
    feeder: Option<JoinHandle<Result<(), Fed>>>,
    /// The source is waited for: that nothing comes out is no fault of the process.
    idle: Arc<AtomicBool>,
    patience: Duration,
    ended: bool,
}

impl Decompressed {
    /// Begins to feed `source` into `input`.
    pub(super) fn new(
        mut source: Box<dyn Read + Send>,
        input: OwnedFd,
        output: OwnedFd,
        running: Running,
        patience: Duration,
    ) -> io::Result<Self> {
        let idle = Arc::new(AtomicBool::new(false));
        let feeder = {
            let idle = idle.clone();
            std::thread::Builder::new()
                .name("layer-feed".into())
                .stack_size(STACK)
                .spawn(move || feed(&mut *source, &input, patience, Some(&idle)))?
        };
        Ok(Self { output, running, feeder: Some(feeder), idle, patience, ended: false })
    }

    /// All that it wrote was read: whether it was all.
    fn finish(&mut self) -> io::Result<()> {
        self.ended = true;
        // The process has ended: nobody else had the pipe's other end.
        let done = self.running.wait(self.patience);
        let fed = match self.feeder.take().map(JoinHandle::join) {
            Some(Ok(fed)) => fed,
            _ => Err(Fed::Source(io::Error::other("the thread that feeds a decompressor panicked"))),
        };
        if let Err(Fed::Source(e)) = fed {
            return Err(e);
        }
        let done = done.ok_or_else(|| io::Error::other("a decompressing process does not end"))?;
        let invalid = |e: crate::core::error::Error| io::Error::new(io::ErrorKind::InvalidData, e.chain());
        ended(done).map(drop).map_err(invalid)
    }
}

impl Read for Decompressed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended || buffer.is_empty() {
            return Ok(0);
        }
        let mut since = Instant::now();
        loop {
            match rustix::io::read(&self.output, &mut *buffer) {
                Ok(0) => return self.finish().map(|()| 0),
                Ok(n) => return Ok(n),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if ready(&self.output, PollFlags::IN, LOOK.min(self.patience))? {
                        continue;
                    }
                    if self.idle.load(Ordering::Relaxed) {
                        since = Instant::now();
                    }
                    if since.elapsed() >= self.patience {
                        let waited = self.patience.as_secs_f32();
                        let why = format!("a decompressing process gave nothing for {waited} s, killed");
                        return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                    }
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}
