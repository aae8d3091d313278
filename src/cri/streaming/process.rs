//! Exec and attach: copies between a client and a process until the process has ended or the client is gone.
//!
//! Called by the server with a client of any protocol. A client that goes takes the process of its exec with it (the
//! engine's future is dropped), and so does our end of the connection. What goes wrong is told on the error stream, not logged.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;

use super::remote::{Incoming, Outgoing, Remote};
use super::status::Outcome;
use crate::core::engine::{Process, ProcessEnd, Terminal};
use crate::core::error::Result;

/// Bytes read from a process at once.
const READ: usize = 64 << 10;
/// Without output for so long after the end of a process, what still holds its output open is not waited for.
const DRAIN: Duration = Duration::from_secs(2);
/// What a client is told whose connection we end.
const ENDED: &str = "the stream was ended by the node: nothing went over it for too long, or the daemon was stopped";
/// Longest unfinished terminal size.
const SIZE: usize = 4096;

/// Serves `remote` with the process that `start` gives.
pub async fn run(start: impl Future<Output = Result<Process>>, remote: Remote, what: &'static str) {
    let Remote { stdin, mut stdout, mut stderr, mut error, resize, gone, ending, json_status } = remote;
    let work = async {
        let process = match start.await {
            Ok(process) => process,
            Err(e) => return Outcome::failed(what, &e),
        };
        greet(&mut stdout, &mut stderr, &mut error).await;
        let over = CancellationToken::new();
        let ended = async {
            let ended = process.ended.await;
            over.cancel();
            ended
        };
        let outputs = async {
            tokio::join!(output(process.stdout, &mut stdout, &over), output(process.stderr, &mut stderr, &over))
        };
        tokio::select! {
            biased;
            // First, so that the process is asked for before its terminal's size.
            (ended, _) = futures::future::join(ended, outputs) => match ended {
                Ok(ProcessEnd::Exit(0) | ProcessEnd::Detached) => Outcome::Success,
                Ok(ProcessEnd::Exit(code)) => Outcome::Exit(code),
                Ok(ProcessEnd::Lagged) => Outcome::Failed(
                    "the client was cut off: it was more than 1 MiB behind the container's output".into(),
                ),
                Err(e) => Outcome::failed(what, &e),
            },
            never = input(stdin, process.stdin) => match never {},
            never = sizes(resize, process.terminal) => match never {},
        }
    };
    let outcome = tokio::select! {
        biased;
        outcome = work => outcome,
        () = gone.cancelled() => {
            tracing::debug!(what, "the client is gone");
            return;
        }
        // The process ends with it; a client that saw its streams end without a word would call that success.
        () = ending.cancelled() => Outcome::Failed(ENDED.into()),
    };
    let status = outcome.to_wire(json_status);
    let said = async {
        for stream in [&mut stdout, &mut stderr].into_iter().flatten() {
            stream.finish().await?;
        }
        if !status.is_empty() {
            error.send(status).await?;
        }
        error.finish().await
    };
    // Who is gone need not be told.
    let _ = gone.run_until_cancelled(said).await;
}

/// Tells a WebSocket's client that it is connected: by nothing on each stream for output, or on the one for errors. SPDY's
/// clients know it by the replies to their streams.
async fn greet(
    stdout: &mut Option<Box<dyn Outgoing>>,
    stderr: &mut Option<Box<dyn Outgoing>>,
    error: &mut Box<dyn Outgoing>,
) {
    if stdout.is_none() && stderr.is_none() {
        let _ = error.send(Bytes::new()).await;
    }
    for stream in [stdout, stderr].into_iter().flatten() {
        let _ = stream.send(Bytes::new()).await;
    }
}

/// From the client to the process; the process's input ends with the client's.
async fn input(from: Option<Incoming>, to: Option<pipe::Sender>) -> std::convert::Infallible {
    if let Some(mut from) = from {
        if let Some(mut to) = to {
            while let Some(bytes) = from.next().await {
                if to.write_all(&bytes).await.is_err() {
                    break;
                }
            }
        }
        // A process that reads no more must not stop the connection.
        while from.next().await.is_some() {}
    }
    std::future::pending().await
}

/// From the process to the client, to the end; when `over`, until there is nothing for a while.
async fn output(from: Option<pipe::Receiver>, to: &mut Option<Box<dyn Outgoing>>, over: &CancellationToken) {
    if let Some(mut from) = from {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(READ);
            let quiet = async {
                over.cancelled().await;
                tokio::time::sleep(DRAIN).await;
            };
            let read = tokio::select! {
                biased;
                read = from.read_buf(&mut buffer) => read,
                () = quiet => break,
            };
            match read {
                Ok(0) | Err(_) => break,
                Ok(_) => {
                    let bytes = buffer.split().freeze();
                    // One who wants no more of it does not stop the process.
                    if let Some(stream) = to
                        && stream.send(bytes).await.is_err()
                    {
                        *to = None;
                    }
                }
            }
        }
    }
    if let Some(stream) = to {
        let _ = stream.finish().await;
    }
}

async fn sizes(from: Option<Incoming>, terminal: Terminal) -> std::convert::Infallible {
    if let Some(mut from) = from {
        let mut parser = Sizes::default();
        while let Some(bytes) = from.next().await {
            // Only the newest counts.
            if let Some(size) = parser.push(bytes) {
                terminal.resize(size.width, size.height).await;
            }
        }
    }
    std::future::pending().await
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// JSON objects one after another, cut anywhere.
#[derive(Debug, Default)]
pub struct Sizes {
    rest: Vec<u8>,
    broken: bool,
}

impl Sizes {
    /// Takes a piece; the newest size that is whole. After something that is none, nothing is read any more.
    pub fn push(&mut self, bytes: Bytes) -> Option<Size> {
        if self.broken {
            return None;
        }
        self.rest.extend_from_slice(&bytes);
        let mut objects = serde_json::Deserializer::from_slice(&self.rest).into_iter::<Size>();
        let (mut newest, mut done) = (None, 0);
        loop {
            match objects.next() {
                Some(Ok(size)) => (newest, done) = (Some(size), objects.byte_offset()),
                Some(Err(e)) => {
                    self.broken = !e.is_eof();
                    break;
                }
                None => break,
            }
        }
        self.rest.drain(..done.min(self.rest.len()));
        self.broken |= self.rest.len() > SIZE;
        newest.filter(|s| s.width > 0 && s.height > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_come_in_any_pieces() {
        let text = br#"{"Width":80,"Height":24}{"Width":100,"Height":30}
            {"Width":0,"Height":0} {"Width":7,"Height":9}"#;
        for piece in 1..text.len() {
            let mut sizes = Sizes::default();
            let newest = text.chunks(piece).filter_map(|c| sizes.push(Bytes::copy_from_slice(c))).last();
            assert_eq!(newest, Some(Size { width: 7, height: 9 }), "in pieces of {piece}");
        }
        let mut sizes = Sizes::default();
        assert_eq!(sizes.push(Bytes::from_static(b"what")), None);
        assert_eq!(sizes.push(Bytes::from_static(br#"{"Width":7,"Height":9}"#)), None);
        let mut sizes = Sizes::default();
        assert_eq!(sizes.push(Bytes::from(vec![b' '; SIZE * 2])), None);
    }

    proptest! {
        #[test]
        fn hostile_sizes_never_panic(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..10)) {
            let mut sizes = Sizes::default();
            for piece in pieces {
                let _ = sizes.push(piece.into());
                prop_assert!(sizes.rest.len() <= SIZE + 60);
            }
        }
    }
}
