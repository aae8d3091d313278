//! A SPDY connection, from the upgrade to its end: one reader, one writer and the user's handler, all in one task.
//!
//! [`run`] is called by the server with an upgraded connection. The reader hands data to streams' bounded queues and
//! waits when one is full (the clients of Kubernetes know no windows, see `spdy`); the writer serializes what streams
//! send through a bounded queue. A peer that breaks the protocol or hangs up is *gone*: the handler sees its token cancelled
//! and ends. One that idles for too long, or the daemon's end, is *ending*: the handler has a moment to tell the client why,
//! or it would take the end of its streams for success. Nothing is left behind.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::frame::{self, Control, Decoder, Event, FrameError, Reset};
use super::headers::{Deflater, HeaderError, Headers, Inflater};
use super::stream::{Acceptor, Stream, Writer};
use super::window::{INITIAL, SendWindow};
use crate::cri::streaming::Peer;
use crate::cri::streaming::remote::{Activity, Credit, Incoming};

/// Most streams of a connection at a time.
const MAX_STREAMS: usize = 512;
/// Streams that may wait to be accepted.
const ACCEPT: usize = 16;
/// Data frames (of at most 64 KiB) that may wait to be written.
const DATA: usize = 8;
/// Control frames that may wait to be written.
const CONTROL: usize = 256;
/// The peer is told of taken bytes when there are so many.
const UPDATE: u32 = 32 << 10;
/// Bytes read at once.
const READ: usize = 64 << 10;
/// What was sent last has so long to be written.
const CLOSE: Duration = Duration::from_secs(60);
/// The client has so long to close its side, then it is closed. Closing with bytes unread would take back what we sent.
const LINGER: Duration = Duration::from_secs(10);

/// Something for the writer.
pub(super) enum Out {
    Reply { stream: u32 },
    Frame(Control),
    Data { stream: u32, fin: bool, bytes: Bytes },
    Bye,
}

struct Entry {
    incoming: Option<mpsc::Sender<Bytes>>,
    window: Arc<SendWindow>,
    reset: CancellationToken,
    open_here: bool,
}

/// What reader, writer and streams share.
pub(super) struct Shared {
    pub(super) data: mpsc::Sender<Out>,
    pub(super) control: mpsc::Sender<Out>,
    pub(super) window: SendWindow,
    pub(super) peer_flow: AtomicBool,
    streams: Mutex<HashMap<u32, Entry>>,
    initial_window: AtomicI64,
    /// Bytes that were taken and the peer has not been told of.
    taken: AtomicU32,
    activity: Activity,
    gone: CancellationToken,
}

#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("connection")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Headers(#[from] HeaderError),
    #[error("the client hung up")]
    HungUp,
}

impl Shared {
    fn streams(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Our side of a stream has ended; without the other side it is over.
    pub(super) fn closed_here(&self, id: u32) {
        let mut streams = self.streams();
        if let Some(entry) = streams.get_mut(&id) {
            entry.open_here = false;
            if entry.incoming.is_none() {
                streams.remove(&id);
            }
        }
    }

    pub(super) fn forget(&self, id: u32) {
        self.streams().remove(&id);
    }

    fn reset(&self, stream: u32, why: Reset) {
        let _ = self.control.try_send(Out::Frame(Control::Rst { stream, status: why as u32 }));
    }

    /// Tells the peer of bytes that were taken, once they are worth it. What can't be told now is told with the next.
    fn took(&self, stream: u32, pending: &mut u32, n: usize) {
        let n = u32::try_from(n).unwrap_or(u32::MAX);
        *pending = pending.saturating_add(n);
        if *pending >= UPDATE && self.update(stream, *pending) {
            *pending = 0;
        }
        self.took_any(n);
    }

    fn took_any(&self, n: u32) {
        let all = self.taken.fetch_add(n, Ordering::Relaxed).saturating_add(n);
        if all >= UPDATE && self.update(0, all) {
            self.taken.fetch_sub(all, Ordering::Relaxed);
        }
    }

    fn update(&self, stream: u32, delta: u32) -> bool {
        self.control.try_send(Out::Frame(Control::WindowUpdate { stream, delta })).is_ok()
    }
}

/// Runs a connection as long as `handle` runs, then closes it in order.
pub async fn run<IO, F>(io: IO, peer: &Peer, handle: impl FnOnce(Acceptor) -> F)
where
    IO: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = ()>,
{
    let (read, write) = tokio::io::split(io);
    let (data, data_queue) = mpsc::channel(DATA);
    let (control, control_queue) = mpsc::channel(CONTROL);
    let (accept, streams) = mpsc::channel(ACCEPT);
    let (gone, ending) = (CancellationToken::new(), peer.ending.child_token());
    let shared = Arc::new(Shared {
        data,
        control,
        window: SendWindow::new(INITIAL),
        peer_flow: AtomicBool::new(false),
        streams: Mutex::default(),
        initial_window: AtomicI64::new(INITIAL),
        taken: AtomicU32::new(0),
        activity: Activity::default(),
        gone: gone.clone(),
    });
    let reader = Reader { shared: shared.clone(), accept, inflater: Inflater::default(), last: 0, peer };
    let mut reader = pin!(async {
        let why = reader.run(read).await;
        gone.cancel();
        let resets: Vec<_> = shared.streams().drain().map(|(_, e)| e.reset).collect();
        resets.iter().for_each(CancellationToken::cancel);
        if let Err(error) = why {
            tracing::debug!(error = %error, "a SPDY connection broke");
        }
    });
    let mut writer = pin!(async {
        if write_all(write, control_queue, data_queue, &shared.activity).await.is_err() {
            gone.cancel();
        }
    });
    let (mut read_done, mut written) = (false, false);
    {
        let mut handler = pin!(handle(Acceptor { streams, gone: gone.clone(), ending: ending.clone() }));
        let mut idle = pin!(shared.activity.idle(peer.idle_timeout));
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
        let bye = async {
            let mut bye = pin!(shared.data.send(Out::Bye));
            let mut said = false;
            while !written {
                tokio::select! {
                    _ = &mut bye, if !said => said = true,
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

async fn write_all<W: AsyncWrite + Unpin>(
    mut io: W,
    mut control: mpsc::Receiver<Out>,
    mut data: mpsc::Receiver<Out>,
    activity: &Activity,
) -> std::io::Result<()> {
    let mut deflater = Deflater::default();
    let mut head = BytesMut::new();
    loop {
        let out = tokio::select! {
            biased;
            Some(out) = control.recv() => out,
            Some(out) = data.recv() => out,
            else => return Ok(()),
        };
        head.clear();
        match out {
            Out::Reply { stream } => {
                let block = deflater.deflate(&Headers::default());
                frame::encode(&Control::SynReply { stream, fin: false, block }, &mut head);
                io.write_all(&head).await?;
            }
            Out::Frame(control) => {
                frame::encode(&control, &mut head);
                io.write_all(&head).await?;
            }
            Out::Data { stream, fin, bytes } => {
                head.extend_from_slice(&frame::data_header(stream, fin, bytes.len()));
                io.write_all_buf(&mut Buf::chain(&head[..], bytes)).await?;
                activity.touch();
            }
            Out::Bye => {
                frame::encode(&Control::GoAway { last: 0, status: 0 }, &mut head);
                io.write_all(&head).await?;
                io.flush().await?;
                return io.shutdown().await;
            }
        }
        io.flush().await?;
    }
}

struct Reader<'a> {
    shared: Arc<Shared>,
    accept: mpsc::Sender<Stream>,
    inflater: Inflater,
    /// The newest stream of the client.
    last: u32,
    peer: &'a Peer,
}

impl Reader<'_> {
    async fn run<R: AsyncRead + Unpin>(mut self, mut io: R) -> Result<(), Broken> {
        let mut decoder = Decoder::default();
        let mut buffer = BytesMut::new();
        loop {
            while let Some(event) = decoder.next(&mut buffer)? {
                match event {
                    Event::Data { stream, bytes, fin } => self.data(stream, bytes, fin).await?,
                    Event::Control(control) => self.control(control).await?,
                }
            }
            if buffer.capacity() - buffer.len() < 4096 {
                buffer.reserve(READ);
            }
            if io.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
    }

    async fn data(&mut self, stream: u32, bytes: Bytes, fin: bool) -> Result<(), Broken> {
        self.shared.activity.touch();
        let found = self.shared.streams().get(&stream).map(|e| (e.incoming.clone(), e.reset.clone()));
        let Some((incoming, reset)) = found else {
            self.shared.took_any(bytes.len() as u32);
            if stream > self.last {
                self.shared.reset(stream, Reset::InvalidStream);
            }
            return Ok(());
        };
        let n = bytes.len() as u32;
        // One without settings: valid, and ignored by all. A PING would have to be answered by a client that can't write.
        let nudge = || drop(self.shared.control.try_send(Out::Frame(Control::Settings { initial_window: None })));
        let taken = match incoming {
            Some(incoming) if n > 0 => tokio::select! {
                biased;
                // An error: nobody reads it any more.
                sent = incoming.send(bytes) => sent.is_ok(),
                () = reset.cancelled() => false,
                () = self.peer.gone(nudge) => return Err(Broken::HungUp),
            },
            _ => false,
        };
        if !taken {
            self.shared.took_any(n);
        }
        if fin {
            self.closed_there(stream);
        }
        Ok(())
    }

    /// The client's side of a stream has ended.
    fn closed_there(&self, stream: u32) {
        let mut streams = self.shared.streams();
        if let Some(entry) = streams.get_mut(&stream) {
            entry.incoming = None;
            if !entry.open_here {
                streams.remove(&stream);
            }
        }
    }

    async fn control(&mut self, control: Control) -> Result<(), Broken> {
        let shared = &self.shared;
        match control {
            Control::SynStream { stream, fin, unidirectional, block } => {
                // Inflated in any case: the state goes on with the next block.
                let headers = self.inflater.inflate(&block)?;
                self.open(stream, fin, unidirectional, headers).await;
            }
            Control::SynReply { block, .. } => {
                self.inflater.inflate(&block)?;
            }
            Control::Headers { stream, fin, block } => {
                self.inflater.inflate(&block)?;
                if fin {
                    self.closed_there(stream);
                }
            }
            Control::Rst { stream, .. } => {
                let entry = shared.streams().remove(&stream);
                if let Some(entry) = entry {
                    entry.reset.cancel();
                }
            }
            Control::Settings { initial_window: Some(window) } => {
                shared.peer_flow.store(true, Ordering::Relaxed);
                let window = i64::from(window);
                let before = shared.initial_window.swap(window, Ordering::Relaxed);
                shared.streams().values().for_each(|e| e.window.add(window - before));
            }
            Control::WindowUpdate { stream, delta } => {
                shared.peer_flow.store(true, Ordering::Relaxed);
                match stream {
                    0 => shared.window.add(delta.into()),
                    stream => {
                        if let Some(entry) = shared.streams().get(&stream) {
                            entry.window.add(delta.into());
                        }
                    }
                }
            }
            // One that floods us without reading gets no answer.
            Control::Ping(id) if id % 2 == 1 => drop(shared.control.try_send(Out::Frame(Control::Ping(id)))),
            Control::Ping(_) | Control::Settings { .. } | Control::GoAway { .. } | Control::Unknown(_) => {}
        }
        Ok(())
    }

    async fn open(&mut self, id: u32, fin: bool, unidirectional: bool, headers: Headers) {
        let shared = &self.shared;
        shared.activity.touch();
        if id.is_multiple_of(2) || id <= self.last {
            return shared.reset(id, Reset::Protocol);
        }
        self.last = id;
        if shared.streams().len() >= MAX_STREAMS {
            return shared.reset(id, Reset::Refused);
        }
        let credit: Credit = {
            let (shared, mut pending) = (shared.clone(), 0);
            Box::new(move |n| shared.took(id, &mut pending, n))
        };
        let (put, incoming) = Incoming::new(Some(credit));
        let window = Arc::new(SendWindow::new(shared.initial_window.load(Ordering::Relaxed)));
        let reset = shared.gone.child_token();
        let entry = Entry {
            incoming: (!fin).then_some(put),
            window: window.clone(),
            reset: reset.clone(),
            open_here: !unidirectional,
        };
        shared.streams().insert(id, entry);
        let outgoing = Writer { id, shared: shared.clone(), window, reset: reset.clone(), finished: unidirectional };
        let stream = Stream { headers, incoming, outgoing, reset };
        tokio::select! {
            // When nobody accepts streams any more it is dropped, which resets it.
            _ = self.accept.send(stream) => {}
            () = self.peer.hangup.wait() => {}
        }
    }
}
