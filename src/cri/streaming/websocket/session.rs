//! A WebSocket connection with channels: one reader, one writer and the user's handler, all in one task.
//!
//! As `spdy::session`: bounded queues both ways, a peer that breaks the protocol or hangs up is gone, one that idles too long is
//! told so.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{SinkExt as _, Stream, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_util::sync::CancellationToken;

use super::protocol::{Protocol, Said};
use crate::cri::streaming::Peer;
use crate::cri::streaming::remote::{Activity, Gone, Incoming, Outgoing};

/// Messages that may wait to be written.
const QUEUE: usize = 8;
/// Longest message that is sent, in bytes of data.
const CHUNK: usize = 64 << 10;
/// What was sent last has so long to be written.
const CLOSE: Duration = Duration::from_secs(60);
/// The client has so long to answer our close.
const LINGER: Duration = Duration::from_secs(10);

/// The channels of a connection.
pub struct Channels {
    incoming: HashMap<u8, Incoming>,
    queue: mpsc::Sender<Message>,
    protocol: Protocol,
    /// Cancelled when the client is gone.
    pub gone: CancellationToken,
    /// Cancelled when we end the connection.
    pub ending: CancellationToken,
}

impl Channels {
    /// What the client says on a channel that was asked for in [`run`].
    pub fn incoming(&mut self, number: u8) -> Option<Incoming> {
        self.incoming.remove(&number)
    }

    /// Says something on a channel.
    pub fn outgoing(&self, number: u8) -> Box<dyn Outgoing> {
        let (queue, gone) = (self.queue.clone(), self.gone.clone());
        Box::new(Channel { number, queue, protocol: self.protocol, gone })
    }
}

struct Channel {
    number: u8,
    queue: mpsc::Sender<Message>,
    protocol: Protocol,
    gone: CancellationToken,
}

impl Channel {
    async fn put(&self, data: &[u8]) -> Result<(), Gone> {
        let message = self.protocol.encode(self.number, data);
        match self.gone.run_until_cancelled(self.queue.send(message)).await {
            Some(Ok(())) => Ok(()),
            _ => Err(Gone),
        }
    }
}

#[async_trait]
impl Outgoing for Channel {
    async fn send(&mut self, bytes: Bytes) -> Result<(), Gone> {
        if bytes.is_empty() {
            // Tells the client that the channel is there.
            return self.put(&[]).await;
        }
        for chunk in bytes.chunks(CHUNK) {
            self.put(chunk).await?;
        }
        Ok(())
    }

    /// A channel has no end but the connection's.
    async fn finish(&mut self) -> Result<(), Gone> {
        Ok(())
    }
}

/// Runs a connection as long as `handle` runs, then closes it in order. `listen`: channels on which the client talks.
pub async fn run<IO, F>(
    socket: WebSocketStream<IO>,
    protocol: Protocol,
    listen: &[u8],
    peer: &Peer,
    handle: impl FnOnce(Channels) -> F,
) where
    IO: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = ()>,
{
    let (mut sink, stream) = socket.split();
    let (queue, mut messages) = mpsc::channel(QUEUE);
    let nudges = queue.clone();
    let (gone, ending) = (CancellationToken::new(), peer.ending.child_token());
    let activity = Arc::new(Activity::default());
    let (mut puts, mut incoming) = (HashMap::new(), HashMap::new());
    for number in listen {
        let (put, end) = Incoming::new(None);
        puts.insert(*number, put);
        incoming.insert(*number, end);
    }
    let mut reader = pin!(async {
        read(stream, protocol, puts, peer, &activity, &nudges).await;
        gone.cancel();
    });
    let closing = CancellationToken::new();
    let mut writer = pin!(async {
        loop {
            let message = tokio::select! {
                biased;
                message = messages.recv() => message,
                () = closing.cancelled() => None,
            };
            let Some(message) = message else { break };
            if sink.send(message).await.is_err() {
                gone.cancel();
                return;
            }
            activity.touch();
        }
        let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        let _ = sink.send(Message::Close(Some(frame))).await;
    });
    let (mut read_done, mut written) = (false, false);
    {
        let channels = Channels { incoming, queue, protocol, gone: gone.clone(), ending: ending.clone() };
        let mut handler = pin!(handle(channels));
        let mut idle = pin!(activity.idle(peer.idle_timeout));
        let mut overdue = pin!(Peer::overdue(&ending));
        loop {
            tokio::select! {
                () = &mut handler => break,
                () = &mut reader, if !read_done => read_done = true,
                () = &mut writer, if !written => written = true,
                () = &mut idle, if !ending.is_cancelled() => ending.cancel(),
                () = &mut overdue, if !gone.is_cancelled() => gone.cancel(),
            }
        }
    }
    if !gone.is_cancelled() && !written {
        closing.cancel();
        let bye = async {
            while !written {
                tokio::select! {
                    () = &mut reader, if !read_done => read_done = true,
                    () = &mut writer => written = true,
                }
            }
        };
        if timeout(CLOSE, bye).await.is_ok() && !read_done {
            let _ = timeout(LINGER, reader).await;
        }
    }
}

async fn read<S, E>(
    mut stream: S,
    protocol: Protocol,
    mut puts: HashMap<u8, mpsc::Sender<Bytes>>,
    peer: &Peer,
    activity: &Activity,
    queue: &mpsc::Sender<Message>,
) where
    S: Stream<Item = Result<Message, E>> + Unpin,
    E: std::fmt::Display,
{
    while let Some(message) = stream.next().await {
        let data = match message {
            Ok(Message::Binary(data)) => data,
            Ok(Message::Text(text)) => text.into(),
            Ok(Message::Close(_)) => return,
            Ok(_) => continue,
            Err(error) => {
                tracing::debug!(%error, "a WebSocket connection broke");
                return;
            }
        };
        activity.touch();
        match protocol.decode(data) {
            Some(Said::Close(number)) => drop(puts.remove(&number)),
            Some(Said::Data(number, bytes)) if !bytes.is_empty() => {
                if let Some(put) = puts.get(&number) {
                    tokio::select! {
                        biased;
                        // An error: nobody reads it any more.
                        _ = put.send(bytes) => {}
                        () = peer.gone(|| drop(queue.try_send(Message::Pong(Bytes::new())))) => return,
                    }
                }
            }
            _ => {}
        }
    }
}
