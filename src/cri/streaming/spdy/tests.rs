//! The session against a client made of the codec alone, for what the clients of Kubernetes do not do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::frame::{self, Control, Decoder, Event, Reset};
use super::headers::{Deflater, Headers, Inflater};
use super::session;
use super::stream::Acceptor;
use crate::cri::streaming::Peer;
use crate::cri::streaming::hangup::Hangup;
use crate::cri::streaming::remote::Outgoing;

const LONG: Duration = Duration::from_secs(10);

struct Client {
    io: DuplexStream,
    decoder: Decoder,
    buffer: BytesMut,
    deflater: Deflater,
    inflater: Inflater,
}

impl Client {
    /// A client, and a server that runs `handle`.
    fn start<F>(handle: impl FnOnce(Acceptor) -> F + Send + 'static) -> (Self, JoinHandle<()>)
    where
        F: Future<Output = ()> + Send,
    {
        Self::start_with(Duration::from_secs(3600), handle)
    }

    fn start_with<F>(
        idle_timeout: Duration,
        handle: impl FnOnce(Acceptor) -> F + Send + 'static,
    ) -> (Self, JoinHandle<()>)
    where
        F: Future<Output = ()> + Send,
    {
        let (io, server) = duplex(1 << 20);
        #[allow(clippy::disallowed_methods)] // a test's own task
        let server = tokio::spawn(async move {
            let peer = Arc::new(Peer { hangup: Hangup::never(), idle_timeout, ending: CancellationToken::new() });
            session::run(server, &peer, handle).await;
        });
        let (decoder, buffer) = (Decoder::default(), BytesMut::new());
        (Self { io, decoder, buffer, deflater: Deflater::default(), inflater: Inflater::default() }, server)
    }

    async fn send(&mut self, control: &Control) {
        let mut bytes = BytesMut::new();
        frame::encode(control, &mut bytes);
        self.io.write_all(&bytes).await.expect("write");
    }

    async fn open(&mut self, stream: u32, headers: &[(&str, &str)]) {
        let block = self.deflater.deflate(&Headers::new(headers.iter().copied()));
        self.send(&Control::SynStream { stream, fin: false, unidirectional: false, block }).await;
    }

    async fn data(&mut self, stream: u32, bytes: &[u8], fin: bool) {
        self.io.write_all(&frame::data_header(stream, fin, bytes.len())).await.expect("write");
        self.io.write_all(bytes).await.expect("write");
    }

    /// The next frame; None at the end of the connection.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.decoder.next(&mut self.buffer).expect("frames") {
                if let Event::Control(Control::SynReply { block, .. }) = &event {
                    self.inflater.inflate(block).expect("headers");
                }
                return Some(event);
            }
            if timeout(LONG, self.io.read_buf(&mut self.buffer)).await.expect("a frame in time").expect("read") == 0 {
                return None;
            }
        }
    }

    async fn control(&mut self) -> Control {
        match self.next().await {
            Some(Event::Control(control)) => control,
            other => panic!("{other:?}"),
        }
    }

    /// Bytes on each stream, those that have ended, and whether there was a GOAWAY, until the end of the connection.
    async fn drain(&mut self) -> (BTreeMap<u32, Vec<u8>>, Vec<u32>, bool) {
        let (mut bytes, mut ended, mut away) = (BTreeMap::<u32, Vec<u8>>::new(), Vec::new(), false);
        while let Some(event) = self.next().await {
            match event {
                Event::Data { stream, bytes: data, fin } => {
                    bytes.entry(stream).or_default().extend_from_slice(&data);
                    ended.extend(fin.then_some(stream));
                }
                Event::Control(Control::GoAway { .. }) => away = true,
                Event::Control(_) => {}
            }
        }
        (bytes, ended, away)
    }
}

/// Accepts one stream and gives back what comes on it.
async fn echo(mut acceptor: Acceptor) {
    let Some(mut stream) = acceptor.next().await else { return };
    stream.accept().await.expect("accept");
    while let Some(bytes) = stream.incoming.next().await {
        if stream.outgoing.send(bytes).await.is_err() {
            return;
        }
    }
    let _ = stream.outgoing.finish().await;
}

#[tokio::test]
async fn a_stream_there_and_back_and_a_tidy_end() {
    let (mut client, server) = Client::start(echo);
    client.open(1, &[("streamType", "data")]).await;
    assert!(matches!(client.control().await, Control::SynReply { stream: 1, fin: false, .. }));
    client.send(&Control::Ping(77)).await;
    assert_eq!(client.control().await, Control::Ping(77));
    client.data(1, b"hello ", false).await;
    client.data(1, b"world", true).await;
    let (bytes, ended, away) = client.drain().await;
    assert_eq!((bytes[&1].as_slice(), ended, away), (&b"hello world"[..], vec![1], true));
    drop(client);
    timeout(LONG, server).await.expect("the end").expect("no panic");
}

#[tokio::test]
async fn a_peer_with_windows_is_never_overrun() {
    let (mut client, server) = Client::start(|mut acceptor: Acceptor| async move {
        let mut stream = acceptor.next().await.expect("a stream");
        stream.accept().await.expect("accept");
        // The client says this when its window is known.
        stream.incoming.next().await;
        stream.outgoing.send(Bytes::from(vec![7; 300_000])).await.expect("send");
        stream.outgoing.finish().await.expect("finish");
    });
    client.send(&Control::Settings { initial_window: Some(1000) }).await;
    client.open(1, &[]).await;
    assert!(matches!(client.control().await, Control::SynReply { .. }));
    client.data(1, b"go", false).await;
    let (mut got, mut allowed, mut allowed_in_all) = (0, 1000, 65536);
    loop {
        match client.next().await.expect("more") {
            Event::Data { bytes, fin, .. } => {
                got += bytes.len();
                assert!(got <= allowed && got <= allowed_in_all, "{got} of {allowed} and {allowed_in_all}");
                if fin {
                    break;
                }
            }
            Event::Control(other) => panic!("{other:?}"),
        }
        if got == allowed {
            allowed += 50_000;
            client.send(&Control::WindowUpdate { stream: 1, delta: 50_000 }).await;
        }
        if got == allowed_in_all {
            allowed_in_all += 100_000;
            client.send(&Control::WindowUpdate { stream: 0, delta: 100_000 }).await;
        }
    }
    assert_eq!(got, 300_000);
    drop(client);
    timeout(LONG, server).await.expect("the end").expect("no panic");
}

#[tokio::test]
async fn what_was_taken_is_told() {
    let (mut client, _server) = Client::start(|mut acceptor: Acceptor| async move {
        let mut stream = acceptor.next().await.expect("a stream");
        while stream.incoming.next().await.is_some() {}
        stream.outgoing.finish().await.expect("finish");
    });
    client.open(1, &[]).await;
    client.data(1, &[0; 100_000], true).await;
    let mut told = BTreeMap::<u32, u32>::new();
    loop {
        match client.next().await {
            Some(Event::Control(Control::WindowUpdate { stream, delta })) => *told.entry(stream).or_default() += delta,
            Some(Event::Data { fin: true, .. }) => break,
            other => panic!("{other:?}"),
        }
    }
    for stream in [0, 1] {
        assert!((100_000 - 32_768..=100_000).contains(&told[&stream]), "{told:?}");
    }
}

#[tokio::test]
async fn streams_that_can_not_be() {
    let (mut client, _server) = Client::start(|mut acceptor: Acceptor| async move {
        let kept = acceptor.next().await;
        drop(acceptor.next().await);
        let gone = acceptor.gone.clone();
        drop(acceptor);
        gone.cancelled().await;
        drop(kept);
    });
    let rst = |stream, why: Reset| Control::Rst { stream, status: why as u32 };
    client.open(3, &[]).await;
    // Not the client's, used, older than the newest; data for none.
    for stream in [2, 3, 1] {
        client.open(stream, &[]).await;
        assert_eq!(client.control().await, rst(stream, Reset::Protocol));
    }
    client.data(9, b"x", false).await;
    assert_eq!(client.control().await, rst(9, Reset::InvalidStream));
    // Not wanted; and one after the handler has stopped to accept.
    for stream in [5, 7] {
        client.open(stream, &[]).await;
        assert_eq!(client.control().await, rst(stream, Reset::Cancel));
    }
}

#[tokio::test]
async fn too_many_streams_are_refused() {
    let (mut client, _server) = Client::start(|mut acceptor: Acceptor| async move {
        let mut all = Vec::new();
        while let Some(stream) = acceptor.next().await {
            all.push(stream);
        }
    });
    for n in 0..512 {
        client.open(n * 2 + 1, &[]).await;
    }
    client.open(1025, &[]).await;
    assert_eq!(client.control().await, Control::Rst { stream: 1025, status: Reset::Refused as u32 });
}

#[tokio::test]
async fn a_reset_ends_its_stream_alone() {
    let (mut client, server) = Client::start(|mut acceptor: Acceptor| async move {
        let (mut first, second) = (acceptor.next().await.expect("one"), acceptor.next().await.expect("two"));
        second.reset.cancelled().await;
        assert!(!first.reset.is_cancelled());
        let bytes = first.incoming.next().await.expect("data");
        first.outgoing.send(bytes).await.expect("send");
        first.outgoing.finish().await.expect("finish");
        let mut outgoing = second.outgoing;
        assert!(outgoing.send(Bytes::from_static(b"x")).await.is_err());
    });
    client.open(1, &[]).await;
    client.open(3, &[]).await;
    client.send(&Control::Rst { stream: 3, status: 5 }).await;
    client.data(1, b"still", false).await;
    let (bytes, ended, _) = client.drain().await;
    assert_eq!((bytes[&1].as_slice(), ended), (&b"still"[..], vec![1]));
    drop(client);
    timeout(LONG, server).await.expect("the end").expect("no panic");
}

#[tokio::test]
async fn nonsense_and_silence_end_the_connection() {
    for nonsense in [
        &b"\x80\x02\x00\x01\x00\x00\x00\x00"[..],
        b"\x80\x03\x00\x01\xff\xff\xff\xff",
        b"\x80\x03\x00\x01\x00\x00\x00\x0e\0\0\0\x01\0\0\0\0\0\0zlib",
    ] {
        let (mut client, server) = Client::start(|acceptor: Acceptor| async move { acceptor.gone.cancelled().await });
        client.io.write_all(nonsense).await.expect("write");
        timeout(LONG, server).await.expect("the end").expect("no panic");
    }
    let silent = |acceptor: Acceptor| async move { acceptor.gone.cancelled().await };
    let (_client, server) = Client::start_with(Duration::from_millis(50), silent);
    timeout(LONG, server).await.expect("the end").expect("no panic");
}
