//! Calls over one connection, in both directions. A task reads, another writes; both end with the connection.
//!
//! A call that is not answered in time leaves the connection as it is: what is to become of it is for the caller to say.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::mux::{self, Message};
use super::wire::{Request, Response, Status};
use crate::utils::tasks::TaskSet;

/// Service that plugins serve.
const PLUGIN_SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
/// Service that we serve.
const RUNTIME_SERVICE: &str = "nri.pkg.api.v1alpha1.Runtime";
/// Messages that may wait to be written before calls wait.
const QUEUE: usize = 64;
/// Calls of a plugin that may wait for us.
const CALLS: usize = 16;
/// gRPC's code of what a plugin does not know.
pub const UNIMPLEMENTED: i32 = 12;
const RESOURCE_EXHAUSTED: i32 = 8;
const UNKNOWN: i32 = 2;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It came too late, or never.
    #[error("no answer within {} ms", .0.as_millis())]
    Late(Duration),
    /// The connection has ended.
    #[error("the connection has ended")]
    Broken,
    /// What came is not the message that it should be.
    #[error("the answer is not understood")]
    Garbled(#[from] prost::DecodeError),
    /// The request is too long for a message.
    #[error("a request of {0} bytes is too long")]
    TooLong(usize),
    /// The plugin says no.
    #[error("{message}")]
    Refused {
        /// gRPC's code.
        code: i32,
        /// Its words.
        message: String,
    },
}

/// A call of the plugin.
#[derive(Debug)]
pub struct Incoming {
    /// Method of our service.
    pub method: String,
    /// Encoded message.
    pub payload: Vec<u8>,
    stream: u32,
}

/// A connection; dropping it does not end it.
pub struct Connection {
    out: mpsc::Sender<Message>,
    waiting: Mutex<HashMap<u32, oneshot::Sender<Response>>>,
    next: AtomicU32,
    closed: CancellationToken,
}

impl Connection {
    /// Begins to read and write; calls of the plugin come by the receiver.
    pub fn start(stream: UnixStream, tasks: &TaskSet) -> (Arc<Self>, mpsc::Receiver<Incoming>) {
        let (read, mut write) = stream.into_split();
        let (out, mut to_write) = mpsc::channel::<Message>(QUEUE);
        let (calls, incoming) = mpsc::channel(CALLS);
        let (waiting, next, closed) = (Mutex::default(), AtomicU32::new(1), CancellationToken::new());
        let this = Arc::new(Self { out, waiting, next, closed });
        let of = this.clone();
        tasks.spawn_cancellable("nri: reads", async move {
            let mut reader = mux::Reader::new(read);
            let why = loop {
                let message = tokio::select! {
                    message = reader.next() => message,
                    () = of.closed.cancelled() => break None,
                };
                match message {
                    Ok(message) => of.take(message, &calls),
                    Err(e) => break Some(e),
                }
            };
            if let Some(e) = why {
                tracing::debug!(error = %e, "a plugin's connection has ended");
            }
            of.close();
        });
        let of = this.clone();
        tasks.spawn_cancellable("nri: writes", async move {
            let work = async {
                while let Some(message) = to_write.recv().await {
                    if mux::write(&mut write, &message).await.is_err() {
                        break;
                    }
                }
            };
            tokio::select! {
                () = work => of.close(),
                () = of.closed.cancelled() => {}
            }
        });
        (this, incoming)
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<Response>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it; every call that waits fails.
    pub fn close(&self) {
        self.closed.cancel();
        self.waiting().clear();
    }

    /// Whether it has ended.
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Waits for its end.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    fn take(&self, message: Message, calls: &mpsc::Sender<Incoming>) {
        match (message.connection, message.kind) {
            (mux::PLUGIN, mux::RESPONSE) => {
                // One whose caller has given up has nobody here.
                let Some(waits) = self.waiting().remove(&message.stream) else { return };
                // Who waits learns of it by that its place is gone.
                let Ok(answer) = Response::decode(message.body) else { return self.close() };
                let _ = waits.send(answer);
            }
            (mux::RUNTIME, mux::REQUEST) => {
                let stream = message.stream;
                let refuse = |code, message: &str| {
                    // With a full queue the plugin does not read its answers.
                    let _ = self.out.try_send(answer(stream, Err((code, message.to_owned()))));
                };
                match Request::decode(message.body) {
                    Ok(asked) if asked.service == RUNTIME_SERVICE => {
                        let incoming = Incoming { method: asked.method, payload: asked.payload, stream };
                        if calls.try_send(incoming).is_err() {
                            refuse(RESOURCE_EXHAUSTED, "too many calls at once");
                        }
                    }
                    Ok(asked) => refuse(UNIMPLEMENTED, &format!("no service {:?}", asked.service)),
                    Err(e) => refuse(UNKNOWN, &e.to_string()),
                }
            }
            _ => tracing::debug!(kind = message.kind, "a message that is neither question nor answer"),
        }
    }

    /// Calls a method of the plugin.
    pub async fn call<A: prost::Message + Default>(
        &self,
        method: &str,
        request: &impl prost::Message,
        within: Duration,
    ) -> Result<A, CallError> {
        let asked = Request {
            service: PLUGIN_SERVICE.into(),
            method: method.into(),
            payload: request.encode_to_vec(),
            timeout_nano: i64::try_from(within.as_nanos()).unwrap_or(i64::MAX),
        };
        let body = Bytes::from(asked.encode_to_vec());
        if body.len() > mux::MESSAGE_MAX {
            return Err(CallError::TooLong(body.len()));
        }
        // Odd numbers are the caller's.
        let stream = self.next.fetch_add(2, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.waiting().insert(stream, sender);
        if self.is_closed() {
            self.waiting().remove(&stream);
            return Err(CallError::Broken);
        }
        let ask = async {
            let message = Message { connection: mux::PLUGIN, stream, kind: mux::REQUEST, body };
            self.out.send(message).await.map_err(|_| CallError::Broken)?;
            receiver.await.map_err(|_| CallError::Broken)
        };
        let done = tokio::select! {
            done = tokio::time::timeout(within, ask) => done,
            () = self.closed.cancelled() => Ok(Err(CallError::Broken)),
        };
        let Ok(done) = done else {
            self.waiting().remove(&stream);
            return Err(CallError::Late(within));
        };
        let answer = done?;
        match answer.status {
            Some(Status { code, message }) if code != 0 => Err(CallError::Refused { code, message }),
            _ => Ok(A::decode(answer.payload.as_slice())?),
        }
    }

    /// Answers a call of the plugin.
    pub async fn answer(&self, call: &Incoming, done: Result<Vec<u8>, String>) {
        let message = answer(call.stream, done.map_err(|message| (UNKNOWN, message)));
        tokio::select! {
            _ = self.out.send(message) => {}
            () = self.closed.cancelled() => {}
        }
    }
}

fn answer(stream: u32, done: Result<Vec<u8>, (i32, String)>) -> Message {
    let response = match done {
        Ok(payload) => Response { status: None, payload },
        Err((code, message)) => Response { status: Some(Status { code, message }), payload: Vec::new() },
    };
    Message { connection: mux::RUNTIME, stream, kind: mux::RESPONSE, body: response.encode_to_vec().into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::integrations::nri::wire::{ConfigureResponse, Empty, RegisterPluginRequest};

    const SOON: Duration = Duration::from_millis(200);

    #[tokio::test]
    async fn calls_go_both_ways_and_end_with_the_connection() {
        let tasks = TaskSet::new("test");
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let (connection, mut incoming) = Connection::start(ours, &tasks);
        let (read, mut write) = theirs.into_split();
        let mut reader = mux::Reader::new(read);
        let plugin = async {
            let asked = reader.next().await.expect("a call");
            let request = Request::decode(asked.body.clone()).expect("a request");
            assert_eq!((request.service.as_str(), request.method.as_str()), (PLUGIN_SERVICE, "Configure"));
            let payload = ConfigureResponse { events: 5, ..Default::default() }.encode_to_vec();
            let body = Response { status: None, payload }.encode_to_vec().into();
            // Something that nobody asked for does no harm.
            for stream in [99, asked.stream] {
                let body = Bytes::clone(&body);
                let message = Message { connection: mux::PLUGIN, kind: mux::RESPONSE, stream, body };
                mux::write(&mut write, &message).await.expect("written");
            }
        };
        let call = connection.call::<ConfigureResponse>("Configure", &Empty {}, SOON);
        let (answer, ()) = tokio::join!(call, plugin);
        assert_eq!(answer.expect("an answer").events, 5);
        let payload = RegisterPluginRequest { plugin_name: "a".into(), ..Default::default() }.encode_to_vec();
        for (service, method) in [("other", "x"), (RUNTIME_SERVICE, "RegisterPlugin")] {
            let (service, method, payload) = (service.to_owned(), method.to_owned(), payload.clone());
            let body = Request { service, method, payload, timeout_nano: 0 }.encode_to_vec().into();
            let message = Message { connection: mux::RUNTIME, stream: 1, kind: mux::REQUEST, body };
            mux::write(&mut write, &message).await.expect("written");
        }
        let asked = incoming.recv().await.expect("a call");
        assert_eq!(asked.method, "RegisterPlugin");
        connection.answer(&asked, Ok(Vec::new())).await;
        let refused = Response::decode(reader.next().await.expect("an answer").body).expect("a response");
        assert_eq!(refused.status.map(|s| s.code), Some(UNIMPLEMENTED));
        let good = Response::decode(reader.next().await.expect("an answer").body).expect("a response");
        assert_eq!(good.status, None);
        let late = connection.call::<Empty>("Shutdown", &Empty {}, SOON).await;
        assert!(matches!(late, Err(CallError::Late(_))), "{late:?}");
        assert!(!connection.is_closed());
        drop((reader, write));
        let broken = connection.call::<Empty>("Shutdown", &Empty {}, Duration::from_secs(10)).await;
        assert!(matches!(broken, Err(CallError::Broken)), "{broken:?}");
        connection.closed().await;
        tasks.shutdown().await;
    }

    #[tokio::test]
    async fn one_that_does_not_read_holds_nobody_up() {
        let tasks = TaskSet::new("test");
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let (connection, _incoming) = Connection::start(ours, &tasks);
        let big = RegisterPluginRequest { plugin_name: "x".repeat(1 << 20), ..Default::default() };
        for _ in 0..3 {
            let late = connection.call::<Empty>("Configure", &big, SOON).await;
            assert!(matches!(late, Err(CallError::Late(_))), "{late:?}");
        }
        let long = RegisterPluginRequest { plugin_name: "x".repeat(5 << 20), ..Default::default() };
        let long = connection.call::<Empty>("Configure", &long, SOON).await;
        assert!(matches!(long, Err(CallError::TooLong(_))), "{long:?}");
        tasks.shutdown().await;
    }
}
