//! The streaming server: Exec, Attach and PortForward of the CRI are answered with a URL; whoever comes to it is
//! connected with a process or a port, over SPDY/3.1 or WebSocket.
//!
//! ```text
//! server ── upgrade ──> spdy::session | websocket::session ── connect ──> process (exec, attach)
//!                                                          └────────────> portforward
//! ```
//! The RPCs issue tokens ([`Streaming::url`]), `daemon` binds and starts it. A crash of the daemon ends all streams;
//! their execs are killed by the monitors, containers run on.

pub mod connect;
pub mod hangup;
pub mod portforward;
pub mod process;
pub mod remote;
mod server;
pub mod spdy;
pub mod status;
mod tls;
pub mod token;
pub mod websocket;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::core::config::Stream;
use crate::core::engine::Engine;
use crate::core::error::{Error, Result};
use crate::utils::tasks::TaskSet;
use token::{Request, Tokens};

/// Connections that may be there besides those that are streams: in TLS, or before their request.
const UNDECIDED: usize = 100;

/// Where we end a connection, its handler has so long to say why.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How often a client that is not read from is nudged.
const NUDGE: Duration = Duration::from_secs(5);

/// What a session knows of the other side.
pub struct Peer {
    /// Tells of its end while nobody reads.
    pub hangup: hangup::Hangup,
    /// Nothing goes over the connection for so long: it is closed.
    pub idle_timeout: Duration,
    /// Cancelled when the daemon ends.
    pub ending: CancellationToken,
}

impl Peer {
    /// Ends [`LAST_WORDS`] after we decided to end the connection.
    async fn overdue(ending: &CancellationToken) {
        ending.cancelled().await;
        tokio::time::sleep(LAST_WORDS).await;
    }

    /// Waits until the client, from whom nobody reads now, is gone. An end that waits behind bytes for which we have no
    /// room can't be seen; so `nudge` sends something now and then, which a client that is gone answers with a reset.
    async fn gone(&self, mut nudge: impl FnMut()) {
        let mut hangup = std::pin::pin!(self.hangup.wait());
        while tokio::time::timeout(NUDGE, &mut hangup).await.is_err() {
            nudge();
        }
    }
}

/// The server.
pub struct Streaming {
    engine: Engine,
    tokens: Tokens,
    /// `http://127.0.0.1:1234`.
    base: String,
    idle_timeout: Duration,
    streams: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    tls: Option<TlsAcceptor>,
    tasks: TaskSet,
}

impl Streaming {
    /// Binds the address and serves as tasks of `tasks`.
    pub async fn start(config: &Stream, engine: Engine, tasks: TaskSet) -> Result<Arc<Self>> {
        let tls = tls::acceptor(config)?;
        let wanted = SocketAddr::new(config.address, config.port);
        let failed = |e| Error::io(format!("listen on {wanted} (server.stream)"), e);
        let listener = TcpListener::bind(wanted).await.map_err(failed)?;
        let mut address = listener.local_addr().map_err(failed)?;
        if address.ip().is_unspecified() {
            // The kubelet is on this node.
            address.set_ip(if address.is_ipv4() {
                [127, 0, 0, 1].into()
            } else {
                std::net::Ipv6Addr::LOCALHOST.into()
            });
        }
        let scheme = if tls.is_some() { "https" } else { "http" };
        let this = Arc::new(Self {
            engine,
            tokens: Tokens::default(),
            base: format!("{scheme}://{address}"),
            idle_timeout: config.idle_timeout.get(),
            streams: Arc::new(Semaphore::new(config.max_streams)),
            connections: Arc::new(Semaphore::new(config.max_streams.saturating_add(UNDECIDED))),
            tls,
            tasks,
        });
        this.tasks.spawn_cancellable("streaming server", server::accept(this.clone(), listener));
        tracing::info!(url = this.base, "streaming");
        Ok(this)
    }

    /// A URL at which the request is served, once and within a minute.
    pub fn url(&self, request: Request) -> Result<String> {
        let path = request.path();
        Ok(format!("{}/{path}/{}", self.base, self.tokens.issue(request)?))
    }
}
