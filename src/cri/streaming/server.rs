//! HTTP/1.1 of the streaming server: takes connections, looks tokens up, upgrades to SPDY or WebSocket.
//!
//! Every connection is a task of the server's set. Refusals: 404 for a token that is not good (any more), 405, 400 for
//! no upgrade or no protocol, 403 for no protocol that we speak, 503 when as many streams run as the node allows.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming as Body;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::{Method, Request as HttpRequest, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::hangup::Hangup;
use super::portforward::{self, Target};
use super::token::Request;
use super::websocket::protocol::{self, Protocol};
use super::websocket::{session, tunnel};
use super::{Peer, Streaming, connect, process, spdy, websocket};

/// A client has so long for TLS, and for each request's head.
const PATIENCE: Duration = Duration::from_secs(30);
/// After a failure to accept (no descriptors, for example) there is a pause.
const PAUSE: Duration = Duration::from_millis(200);
/// When the daemon ends, streams have so long to tell their clients and to be closed.
const LAST: Duration = Duration::from_secs(2);
/// A pair of channels each, named by one digit.
const MAX_BASE64_PORTS: usize = 5;
const PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");

/// Takes connections until the set of tasks is shut down.
pub async fn accept(this: Arc<Streaming>, listener: TcpListener) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the streaming server can't accept");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // One too many is closed: it has no answer to wait for.
        let Ok(permit) = this.connections.clone().try_acquire_owned() else { continue };
        let that = this.clone();
        this.tasks.spawn_cancellable("streaming connection", async move {
            let _permit = permit;
            that.connection(stream).await;
        });
    }
}

/// What is spoken after the upgrade.
enum Upgrade {
    Spdy(&'static str),
    WebSocket(Protocol),
    Tunnel,
}

impl Streaming {
    async fn connection(self: Arc<Self>, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let _ = rustix::net::sockopt::set_socket_keepalive(&stream, true);
        let _ = rustix::net::sockopt::set_tcp_keepidle(&stream, PATIENCE);
        let _ = rustix::net::sockopt::set_tcp_keepintvl(&stream, PATIENCE / 3);
        let peer = Arc::new(Peer {
            hangup: Hangup::of(&stream),
            idle_timeout: self.idle_timeout,
            ending: self.tasks.token().clone(),
        });
        match self.tls.clone() {
            None => self.http(stream, peer).await,
            Some(tls) => match tokio::time::timeout(PATIENCE, tls.accept(stream)).await {
                Ok(Ok(stream)) => self.http(stream, peer).await,
                Ok(Err(error)) => tracing::debug!(%error, "no TLS with a client of the streaming server"),
                Err(_) => {}
            },
        }
    }

    async fn http<IO: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self: Arc<Self>, io: IO, peer: Arc<Peer>) {
        let service = hyper::service::service_fn(|request| {
            let answer = self.clone().answer(request, peer.clone());
            async { Ok::<_, Infallible>(answer) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(PATIENCE)
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades()
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "a connection to the streaming server broke");
        }
    }

    fn answer(self: Arc<Self>, mut request: HttpRequest<Body>, peer: Arc<Peer>) -> Response<String> {
        let mut parts = request.uri().path().trim_start_matches('/').splitn(2, '/');
        let (path, token) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        if !matches!(path, "exec" | "attach" | "portforward") {
            return refuse(StatusCode::NOT_FOUND, "no such path");
        }
        if !matches!(*request.method(), Method::GET | Method::POST) {
            return refuse(StatusCode::METHOD_NOT_ALLOWED, "GET or POST");
        }
        let unknown =
            || refuse(StatusCode::NOT_FOUND, "no such token: it was used, is older than a minute, or never was");
        // Used up only by what is served: who is to try again later, or with another protocol, can.
        if !self.tokens.has(path, token) {
            // At another path than its own, it is.
            let _ = self.tokens.take(path, token);
            return unknown();
        }
        let (upgrade, mut answer) = match negotiate(request.headers(), path == "portforward") {
            Ok(chosen) => chosen,
            Err(refusal) => return *refusal,
        };
        let Ok(permit) = self.streams.clone().try_acquire_owned() else {
            answer = refuse(StatusCode::SERVICE_UNAVAILABLE, "as many streams run as this node allows");
            answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            return answer;
        };
        let Some(wanted) = self.tokens.take(path, token) else { return unknown() };
        if let (Request::PortForward { ports, .. }, Upgrade::WebSocket(protocol)) = (&wanted, &upgrade)
            && protocol.base64
            && ports.len() > MAX_BASE64_PORTS
        {
            return refuse(StatusCode::BAD_REQUEST, "base64 channels have one digit: five ports at most");
        }
        let upgraded = hyper::upgrade::on(&mut request);
        let this = self.clone();
        self.tasks.spawn("stream", async move {
            let overdue = this.tasks.clone();
            let work = async {
                match upgraded.await {
                    Ok(io) => this.serve(TokioIo::new(io), upgrade, wanted, peer, permit).await,
                    Err(error) => tracing::debug!(%error, "no upgrade"),
                }
            };
            tokio::select! {
                () = work => {}
                () = overdue.overdue(LAST) => {}
            }
        });
        answer
    }

    async fn serve<IO: AsyncRead + AsyncWrite + Unpin + Send>(
        &self,
        io: IO,
        upgrade: Upgrade,
        wanted: Request,
        peer: Arc<Peer>,
        _permit: OwnedSemaphorePermit,
    ) {
        let engine = self.engine.clone();
        let open = async |io: IO| WebSocketStream::from_raw_socket(io, Role::Server, Some(websocket::config())).await;
        match (wanted, upgrade) {
            (Request::PortForward { scope, pod, .. }, Upgrade::Spdy(_)) => {
                let target = Target { engine, scope, pod };
                spdy::session::run(io, &peer, |acceptor| portforward::spdy(target, acceptor)).await;
            }
            (Request::PortForward { scope, pod, .. }, Upgrade::Tunnel) => {
                let target = Target { engine, scope, pod };
                let io = tunnel::Tunnel::new(open(io).await);
                spdy::session::run(io, &peer, |acceptor| portforward::spdy(target, acceptor)).await;
            }
            (Request::PortForward { scope, pod, ports }, Upgrade::WebSocket(protocol)) => {
                let target = Target { engine, scope, pod };
                let listen: Vec<u8> = (0u8..).step_by(2).take(ports.len()).collect();
                let socket = open(io).await;
                session::run(socket, protocol, &listen, &peer, |c| portforward::websocket(target, ports, c)).await;
            }
            (wanted, Upgrade::Spdy(protocol)) => {
                spdy::session::run(io, &peer, |acceptor| async {
                    if let Ok(remote) = connect::spdy(acceptor, protocol, streams_of(&wanted)).await {
                        self.process(wanted, remote).await;
                    }
                })
                .await;
            }
            (wanted, Upgrade::WebSocket(protocol)) => {
                let socket = open(io).await;
                session::run(socket, protocol, &connect::TALKS, &peer, |channels| async {
                    let remote = connect::websocket(channels, protocol, streams_of(&wanted));
                    self.process(wanted, remote).await;
                })
                .await;
            }
            // Not negotiated for these.
            (_, Upgrade::Tunnel) => {}
        }
    }

    async fn process(&self, wanted: Request, remote: super::remote::Remote) {
        let engine = &self.engine;
        match wanted {
            Request::Exec { scope, container, command, wanted } => {
                let start = engine.exec_stream(scope, &container, &command, wanted);
                process::run(start, remote, "error executing command in container").await;
            }
            Request::Attach { scope, container, wanted } => {
                process::run(engine.attach(scope, &container, wanted), remote, "error attaching to container").await;
            }
            Request::PortForward { .. } => {}
        }
    }
}

fn streams_of(request: &Request) -> crate::core::engine::Wanted {
    match request {
        Request::Exec { wanted, .. } | Request::Attach { wanted, .. } => *wanted,
        Request::PortForward { .. } => crate::core::engine::Wanted::default(),
    }
}

fn refuse(code: StatusCode, why: &str) -> Response<String> {
    let mut answer = Response::new(format!("{why}\n"));
    *answer.status_mut() = code;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// The words of a header that may be repeated and hold several each.
fn words(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    let lines = headers.get_all(name).iter().filter_map(|v| v.to_str().ok());
    lines.flat_map(|l| l.split(',')).map(|w| w.trim().to_owned()).filter(|w| !w.is_empty()).take(64).collect()
}

fn has(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    words(headers, name).iter().any(|w| w.eq_ignore_ascii_case(word))
}

/// What will be spoken, and the answer that says so.
fn negotiate(headers: &HeaderMap, port_forward: bool) -> Result<(Upgrade, Response<String>), Box<Response<String>>> {
    let no = |code, why: &str| Err(Box::new(refuse(code, why)));
    if !has(headers, &header::CONNECTION, "upgrade") {
        return no(StatusCode::BAD_REQUEST, "an upgrade to SPDY/3.1 or websocket is needed");
    }
    let mut answer = Response::new(String::new());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let out = answer.headers_mut();
    out.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    if has(headers, &header::UPGRADE, "SPDY/3.1") {
        let asked = words(headers, &PROTOCOL);
        if asked.is_empty() {
            return no(StatusCode::BAD_REQUEST, "X-Stream-Protocol-Version is missing");
        }
        let known: &[&str] = if port_forward { &[portforward::SPDY_PROTOCOL] } else { &connect::SPDY_PROTOCOLS };
        let Some(chosen) = asked.iter().find_map(|a| known.iter().find(|k| *k == a)) else {
            return no(
                StatusCode::FORBIDDEN,
                &format!("of the protocols asked for none is spoken here: {}", known.join(", ")),
            );
        };
        out.insert(header::UPGRADE, HeaderValue::from_static("SPDY/3.1"));
        out.insert(PROTOCOL, HeaderValue::from_static(chosen));
        return Ok((Upgrade::Spdy(chosen), answer));
    }
    if !has(headers, &header::UPGRADE, "websocket") {
        return no(StatusCode::BAD_REQUEST, "an upgrade to SPDY/3.1 or websocket is needed");
    }
    let Some(key) = headers.get(header::SEC_WEBSOCKET_KEY) else {
        return no(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key is missing");
    };
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|v| v != "13") {
        return no(StatusCode::UPGRADE_REQUIRED, "Sec-WebSocket-Version: 13 is spoken here");
    }
    if let Ok(accept) = HeaderValue::try_from(derive_accept_key(key.as_bytes())) {
        out.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    out.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    let asked = words(headers, &header::SEC_WEBSOCKET_PROTOCOL);
    if port_forward && asked.iter().any(|a| a == protocol::TUNNEL) {
        out.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol::TUNNEL));
        return Ok((Upgrade::Tunnel, answer));
    }
    let known: &[Protocol] = if port_forward { &protocol::PORT_FORWARD } else { &protocol::REMOTE_COMMAND };
    let Some(chosen) = protocol::choose(&asked, known) else {
        return no(StatusCode::BAD_REQUEST, "of the WebSocket protocols asked for none is spoken here");
    };
    if !chosen.name.is_empty() {
        out.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(chosen.name));
    }
    Ok((Upgrade::WebSocket(chosen), answer))
}
