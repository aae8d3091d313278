//! The ends of image streams: what a client sends or takes, what a driver makes or takes. None of them may stand still for long.
//!
//! Called by the transfer, on blocking threads. Fails with TimedOut when one does, with BrokenPipe when nobody reads on. No state.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::sync::mpsc::{self, error::SendTimeoutError};

use crate::core::error::Result;

/// Largest piece of the whole that a client is waited for to take: one of a slow line, too, gets through in time.
pub(super) const SENT_PIECE: usize = 64 << 10;

/// Where pieces go, from a thread. Fails when nobody reads on, and when nobody takes one for long: a `zfs send` that waits has one
/// of few turns.
pub(super) struct Pieces {
    pub(super) out: mpsc::Sender<Result<Bytes>>,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) idle: Duration,
    /// Nobody took the last one. Not waited for again: a `BufWriter` tries once more when it is dropped.
    pub(super) stalled: bool,
}

impl Write for Pieces {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.stalled {
            return Err(stalled("nothing was taken", self.idle));
        }
        let piece = &buffer[..buffer.len().min(SENT_PIECE)];
        match self.runtime.block_on(self.out.send_timeout(Ok(Bytes::copy_from_slice(piece)), self.idle)) {
            Ok(()) => Ok(piece.len()),
            Err(SendTimeoutError::Closed(_)) => Err(io::Error::new(io::ErrorKind::BrokenPipe, "nobody reads on")),
            Err(SendTimeoutError::Timeout(_)) => {
                self.stalled = true;
                Err(stalled("nothing was taken", self.idle))
            }
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a client sends, read by a thread. From the time that something else waits for it, it may not pause for long.
pub(super) struct Incoming {
    pub(super) input: Box<dyn AsyncRead + Send + Unpin>,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) idle: Option<Duration>,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Self { input, runtime, idle } = self;
        runtime.block_on(async {
            match idle {
                None => input.read(buffer).await,
                Some(idle) => match tokio::time::timeout(*idle, input.read(buffer)).await {
                    Ok(read) => read,
                    Err(_) => Err(stalled("nothing came", *idle)),
                },
            }
        })
    }
}

/// A pipe whose reader may not pause for long.
pub(super) struct Outgoing {
    pipe: io::PipeWriter,
    pub(super) idle: Duration,
}

impl Outgoing {
    pub(super) fn new(pipe: io::PipeWriter, idle: Duration) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&pipe, true)?;
        Ok(Self { pipe, idle })
    }
}

impl Write for Outgoing {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let longest = rustix::time::Timespec::try_from(self.idle).map_err(io::Error::other)?;
        loop {
            match self.pipe.write(buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            let mut room = [rustix::event::PollFd::new(&self.pipe, rustix::event::PollFlags::OUT)];
            match rustix::event::poll(&mut room, Some(&longest)) {
                Ok(0) => return Err(stalled("nothing was taken", self.idle)),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a driver makes of a layer, for a client. Neither may stand still for long: a `zfs send` has one of few turns.
pub(super) struct Produced<'a> {
    pub(super) pipe: io::PipeReader,
    pub(super) idle: Duration,
    pub(super) client: &'a mpsc::Sender<Result<Bytes>>,
}

impl Read for Produced<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        const LOOK: Duration = Duration::from_secs(1);
        let begun = Instant::now();
        loop {
            let pause = LOOK.min(self.idle.saturating_sub(begun.elapsed()));
            let pause = rustix::time::Timespec::try_from(pause).map_err(io::Error::other)?;
            let mut there = [rustix::event::PollFd::new(&self.pipe, rustix::event::PollFlags::IN)];
            match rustix::event::poll(&mut there, Some(&pause)) {
                Ok(0) if self.client.is_closed() => {
                    return Err(io::Error::new(io::ErrorKind::BrokenPipe, "nobody reads on"));
                }
                Ok(0) if begun.elapsed() >= self.idle => return Err(stalled("nothing came of a layer", self.idle)),
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return self.pipe.read(buffer),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

fn stalled(what: &str, idle: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("{what} for {} s", idle.as_secs_f32()))
}
