//! The client of an exec or attach as those see it, whatever protocol it speaks: bytes from it ([`Incoming`]), bytes to
//! it ([`Outgoing`]), and whether it is still there.
//!
//! Made by `spdy` and `websocket`. Both directions are bounded: who reads slowly is waited for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Pieces that may wait for who takes them.
const QUEUE: usize = 16;

/// The client is gone, or wants no more of this stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client is gone")]
pub struct Gone;

/// Called with the number of bytes that were taken.
pub type Credit = Box<dyn FnMut(usize) + Send + Sync>;

/// Bytes from the client.
pub struct Incoming {
    queue: mpsc::Receiver<Bytes>,
    credit: Option<Credit>,
}

impl Incoming {
    /// An empty one, and where to put bytes in.
    pub fn new(credit: Option<Credit>) -> (mpsc::Sender<Bytes>, Self) {
        let (put, queue) = mpsc::channel(QUEUE);
        (put, Self { queue, credit })
    }

    /// The next piece; None when the client has nothing more to say.
    pub async fn next(&mut self) -> Option<Bytes> {
        let bytes = self.queue.recv().await?;
        if let Some(credit) = &mut self.credit {
            credit(bytes.len());
        }
        Some(bytes)
    }
}

/// Bytes to the client.
#[async_trait]
pub trait Outgoing: Send {
    /// Sends; waits as long as the client does not take what was sent before. Nothing, sent, tells a WebSocket's client
    /// that the channel is there.
    async fn send(&mut self, bytes: Bytes) -> Result<(), Gone>;
    /// Says that there is nothing more to come.
    async fn finish(&mut self) -> Result<(), Gone>;
}

/// The client of an exec or attach.
pub struct Remote {
    /// Its input.
    pub stdin: Option<Incoming>,
    /// Takes the output.
    pub stdout: Option<Box<dyn Outgoing>>,
    /// Takes the errors of the process.
    pub stderr: Option<Box<dyn Outgoing>>,
    /// Takes what became of it all.
    pub error: Box<dyn Outgoing>,
    /// Sizes of its terminal, JSON one after another.
    pub resize: Option<Incoming>,
    /// Cancelled when it is gone.
    pub gone: CancellationToken,
    /// Cancelled when we end the connection: it was idle for too long, or the daemon ends.
    pub ending: CancellationToken,
    /// It wants a Status as JSON on the error stream (version 4 on), not a text.
    pub json_status: bool,
}

/// When something last went over a connection.
#[derive(Debug)]
pub struct Activity {
    start: Instant,
    /// Milliseconds after `start`.
    last: AtomicU64,
}

impl Default for Activity {
    fn default() -> Self {
        Self { start: Instant::now(), last: AtomicU64::new(0) }
    }
}

impl Activity {
    /// Something went over it now.
    pub fn touch(&self) {
        self.last.store(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Waits until nothing has gone over it for so long.
    pub async fn idle(&self, limit: Duration) {
        loop {
            let until = self.start + Duration::from_millis(self.last.load(Ordering::Relaxed)) + limit;
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}
