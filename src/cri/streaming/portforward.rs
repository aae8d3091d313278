//! Port-forward: pairs a client's streams, connects each pair with a port of the pod, copies both ways.
//!
//! Called by the server. What goes wrong with one connection is told on its error stream and ends that one alone.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::remote::{Incoming, Outgoing};
use super::spdy::stream::{Acceptor, Stream};
use super::websocket::session::Channels;
use crate::core::engine::{Engine, Scope};

/// The protocol over SPDY.
pub const SPDY_PROTOCOL: &str = "portforward.k8s.io";
/// The second stream of a pair has so long to come.
const PAIR: Duration = Duration::from_secs(30);
/// Bytes read from the pod at once.
const READ: usize = 32 << 10;

/// The pod whose ports are asked for.
pub struct Target {
    /// Knows the way.
    pub engine: Engine,
    /// Whose pods are seen.
    pub scope: Scope,
    /// The pod.
    pub pod: String,
}

/// A connection of which not both streams are there.
struct Half {
    /// `requestID`; None: paired by order.
    id: Option<String>,
    port: u16,
    data: Option<Stream>,
    error: Option<Stream>,
    since: Instant,
}

/// Serves a SPDY connection until the client is gone.
pub async fn spdy(target: Target, mut acceptor: Acceptor) {
    let mut halves: Vec<Half> = Vec::new();
    let mut connections = FuturesUnordered::new();
    loop {
        let oldest = halves.iter().map(|h| h.since + PAIR).min();
        let late = async {
            match oldest {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            stream = acceptor.next() => {
                let Some(stream) = stream else { return };
                if let Some((port, data, error)) = pair(&mut halves, stream).await {
                    let reset = data.reset.clone();
                    let work = connection(&target, port, data.incoming, Box::new(data.outgoing), Box::new(error.outgoing));
                    connections.push(async move { reset.run_until_cancelled(work).await });
                }
            }
            Some(_) = connections.next() => {}
            // Dropped, its stream is reset.
            () = late => halves.retain(|h| h.since.elapsed() < PAIR),
        }
    }
}

/// Takes a stream; when its pair is whole, that.
async fn pair(halves: &mut Vec<Half>, mut stream: Stream) -> Option<(u16, Stream, Stream)> {
    let is_data = match stream.headers.get("streamtype") {
        Some("data") => true,
        Some("error") => false,
        _ => return None,
    };
    let port: u16 = stream.headers.get("port").and_then(|p| p.parse().ok()).filter(|p| *p > 0)?;
    let id = stream.headers.get("requestid").filter(|id| !id.is_empty()).map(str::to_owned);
    stream.accept().await.ok()?;
    let fits = |h: &Half| h.id == id && h.port == port && if is_data { h.data.is_none() } else { h.error.is_none() };
    let at = halves.iter().position(fits).unwrap_or_else(|| {
        halves.push(Half { id: id.clone(), port, data: None, error: None, since: Instant::now() });
        halves.len() - 1
    });
    let half = halves.get_mut(at)?;
    if is_data {
        half.data = Some(stream)
    } else {
        half.error = Some(stream)
    }
    if half.data.is_none() || half.error.is_none() {
        return None;
    }
    let Half { data, error, .. } = halves.remove(at);
    Some((port, data?, error?))
}

/// Serves a WebSocket with a pair of channels for each port until all connections are over or the client is gone.
pub async fn websocket(target: Target, ports: Vec<u16>, mut channels: Channels) {
    let mut connections = FuturesUnordered::new();
    for (port, number) in ports.iter().copied().zip((0u8..).step_by(2)) {
        let (mut data, mut error) = (channels.outgoing(number), channels.outgoing(number + 1));
        // Both channels begin with the port.
        for stream in [&mut data, &mut error] {
            if stream.send(Bytes::copy_from_slice(&port.to_le_bytes())).await.is_err() {
                return;
            }
        }
        if let Some(incoming) = channels.incoming(number) {
            connections.push(connection(&target, port, incoming, data, error));
        }
    }
    let gone = channels.gone.clone();
    gone.run_until_cancelled(async { while connections.next().await.is_some() {} }).await;
}

/// One connection, from dialling to the end of both directions.
async fn connection(
    target: &Target,
    port: u16,
    mut incoming: Incoming,
    mut data: Box<dyn Outgoing>,
    mut error: Box<dyn Outgoing>,
) {
    let Target { engine, scope, pod } = target;
    let what = |why: String| Bytes::from(format!("error forwarding port {port} to pod {pod}: {why}"));
    let socket = match engine.dial(*scope, pod, port).await {
        Ok(socket) => socket,
        Err(e) => {
            let _ = error.send(what(e.chain())).await;
            let _ = error.finish().await;
            let _ = data.finish().await;
            return;
        }
    };
    let (mut from, mut to) = socket.into_split();
    let broken = CancellationToken::new();
    let up = async {
        while let Some(bytes) = incoming.next().await {
            if to.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = to.shutdown().await;
        // What the pod does not take must not stop the other connections.
        while incoming.next().await.is_some() {}
    };
    let down = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(READ);
            match from.read_buf(&mut buffer).await {
                Ok(0) => break,
                Ok(_) => {
                    if data.send(buffer.split().freeze()).await.is_err() {
                        broken.cancel();
                        break;
                    }
                }
                // The pod's program has ended the connection so: an end. Told as an error, it would have kubectl end all.
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {
                    broken.cancel();
                    break;
                }
                Err(e) => {
                    let _ = error.send(what(e.to_string())).await;
                    broken.cancel();
                    break;
                }
            }
        }
        // The error stream ends with the output: clients wait for it before they close their side.
        let _ = data.finish().await;
        let _ = error.finish().await;
    };
    tokio::join!(broken.run_until_cancelled(up), down);
}
