//! Turns a connection into the client of an exec or attach: waits for its streams (SPDY) or names its channels
//! (WebSocket).

use std::time::Duration;

use tokio::time::timeout;

use super::remote::{Gone, Remote};
use super::spdy::stream::{Acceptor, Stream};
use super::websocket::protocol::{Protocol, channel};
use super::websocket::session::Channels;
use crate::core::engine::Wanted;

/// A client has so long to open its streams.
const STREAMS: Duration = Duration::from_secs(30);

/// Protocols of exec and attach over SPDY, and from which version on there is what.
pub const SPDY_PROTOCOLS: [&str; 4] = ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];

fn resizes(protocol: &str) -> bool {
    matches!(protocol, "v4.channel.k8s.io" | "v3.channel.k8s.io")
}

/// Waits for the streams that `wanted` and the protocol ask for.
pub async fn spdy(mut acceptor: Acceptor, protocol: &'static str, wanted: Wanted) -> Result<Remote, Gone> {
    let resize = wanted.tty && resizes(protocol);
    let names = [
        ("error", true),
        ("stdin", wanted.stdin),
        ("stdout", wanted.stdout),
        ("stderr", wanted.stderr && !wanted.tty),
        ("resize", resize),
    ];
    let mut streams: [Option<Stream>; 5] = Default::default();
    let collect = async {
        while names.iter().zip(&streams).any(|((_, wanted), stream)| *wanted && stream.is_none()) {
            let mut stream = acceptor.next().await.ok_or(Gone)?;
            let kind = stream.headers.get("streamtype").unwrap_or_default();
            // One that nobody asked for is dropped, which resets it.
            if let Some(at) = names.iter().position(|(name, wanted)| *name == kind && *wanted)
                && streams[at].is_none()
            {
                stream.accept().await?;
                streams[at] = Some(stream);
            }
        }
        Ok(())
    };
    timeout(STREAMS, collect).await.map_err(|_| Gone)??;
    let [Some(error), stdin, stdout, stderr, resize] = streams else { return Err(Gone) };
    let outgoing = |s: Stream| Box::new(s.outgoing) as _;
    Ok(Remote {
        stdin: stdin.map(keep_half),
        stdout: stdout.map(outgoing),
        stderr: stderr.map(outgoing),
        error: Box::new(error.outgoing),
        resize: resize.map(keep_half),
        gone: acceptor.gone,
        ending: acceptor.ending,
        json_status: protocol == "v4.channel.k8s.io",
    })
}

/// A stream that only the client writes to: our half is left to the end of the connection.
fn keep_half(stream: Stream) -> super::remote::Incoming {
    let mut outgoing = stream.outgoing;
    outgoing.leave();
    stream.incoming
}

/// Channels on which the client talks.
pub const TALKS: [u8; 2] = [channel::STDIN, channel::RESIZE];

/// Takes the channels of a WebSocket.
pub fn websocket(mut channels: Channels, protocol: Protocol, wanted: Wanted) -> Remote {
    let outgoing = |number: u8, wanted: bool| wanted.then(|| channels.outgoing(number));
    let mut remote = Remote {
        stdout: outgoing(channel::STDOUT, wanted.stdout),
        stderr: outgoing(channel::STDERR, wanted.stderr && !wanted.tty),
        error: channels.outgoing(channel::ERROR),
        stdin: None,
        resize: None,
        gone: channels.gone.clone(),
        ending: channels.ending.clone(),
        json_status: protocol.json_status,
    };
    let (stdin, resize) = (channels.incoming(channel::STDIN), channels.incoming(channel::RESIZE));
    remote.stdin = stdin.filter(|_| wanted.stdin);
    remote.resize = resize.filter(|_| wanted.tty);
    remote
}
