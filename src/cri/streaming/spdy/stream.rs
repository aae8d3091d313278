//! The streams of a SPDY session: how its user gets them, reads from them and writes to them.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::frame::{Control, Reset};
use super::headers::Headers;
use super::session::{Out, Shared};
use super::window::SendWindow;
use crate::cri::streaming::remote::{Gone, Incoming, Outgoing};

/// Longest data frame that is sent.
const CHUNK: usize = 64 << 10;

/// A stream that the client has opened.
pub struct Stream {
    /// What it is for.
    pub headers: Headers,
    /// From the client.
    pub incoming: Incoming,
    /// To the client. Dropped unfinished, it resets the stream.
    pub outgoing: Writer,
    /// Cancelled when the client resets the stream or is gone.
    pub reset: CancellationToken,
}

impl Stream {
    /// Accepts it (SYN_REPLY).
    pub async fn accept(&mut self) -> Result<(), Gone> {
        self.outgoing.shared.control.send(Out::Reply { stream: self.outgoing.id }).await.map_err(|_| Gone)
    }
}

/// Streams that the client opens. Dropping it refuses all further ones.
pub struct Acceptor {
    pub(super) streams: mpsc::Receiver<Stream>,
    /// Cancelled when the client is gone.
    pub gone: CancellationToken,
    /// Cancelled when we end the connection.
    pub ending: CancellationToken,
}

impl Acceptor {
    /// The next stream; None when the client is gone.
    pub async fn next(&mut self) -> Option<Stream> {
        self.gone.run_until_cancelled(self.streams.recv()).await.flatten()
    }
}

/// The sending half of a stream.
pub struct Writer {
    pub(super) id: u32,
    pub(super) shared: Arc<Shared>,
    pub(super) window: Arc<SendWindow>,
    pub(super) reset: CancellationToken,
    pub(super) finished: bool,
}

impl Writer {
    /// Lets the half be as it is until the connection ends, although nothing will be written.
    pub fn leave(&mut self) {
        self.finished = true;
    }

    async fn put(&self, bytes: Bytes, fin: bool) -> Result<(), Gone> {
        let out = Out::Data { stream: self.id, fin, bytes };
        tokio::select! {
            biased;
            () = self.reset.cancelled() => Err(Gone),
            sent = self.shared.data.send(out) => sent.map_err(|_| Gone),
        }
    }

    /// How much of `want` may be sent now.
    async fn room(&self, want: usize) -> usize {
        let binding = &self.shared.peer_flow;
        let n = self.window.take(want, binding).await;
        let m = self.shared.window.take(n, binding).await;
        if m < n {
            self.window.add((n - m) as i64);
        }
        m
    }
}

#[async_trait]
impl Outgoing for Writer {
    async fn send(&mut self, mut bytes: Bytes) -> Result<(), Gone> {
        while !bytes.is_empty() {
            let n = tokio::select! {
                biased;
                () = self.reset.cancelled() => return Err(Gone),
                n = self.room(bytes.len().min(CHUNK)) => n,
            };
            self.put(bytes.split_to(n), false).await?;
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), Gone> {
        if self.finished {
            return Ok(());
        }
        self.finished = true;
        self.put(Bytes::new(), true).await?;
        self.shared.closed_here(self.id);
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished {
            let rst = Control::Rst { stream: self.id, status: Reset::Cancel as u32 };
            // A session that is over, or a peer that reads nothing, need not know.
            let _ = self.shared.control.try_send(Out::Frame(rst));
            self.shared.forget(self.id);
        }
    }
}
