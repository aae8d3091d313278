//! Ctrl-C and SIGTERM for commands that have something to end or take back before they end themselves.

use std::future::Future;

use anyhow::{Result, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Ctrl-C or SIGTERM, from when it is made.
pub struct Interrupts {
    int: Signal,
    term: Signal,
    seen: u32,
}

impl Interrupts {
    /// From here on neither ends this process.
    pub fn catch() -> Result<Self> {
        Ok(Self { int: signal(SignalKind::interrupt())?, term: signal(SignalKind::terminate())?, seen: 0 })
    }

    /// The next one; how many there were.
    pub async fn next(&mut self) -> u32 {
        tokio::select! {
            _ = self.int.recv() => {}
            _ = self.term.recv() => {}
        }
        self.seen += 1;
        self.seen
    }
}

/// Runs `work`; an interrupt drops it, with whatever programs it waits for.
pub async fn unless_interrupted<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut interrupts = Interrupts::catch()?;
    tokio::select! {
        done = work => done,
        _ = interrupts.next() => bail!("interrupted"),
    }
}
