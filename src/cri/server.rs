//! Serves the CRI on a unix socket (mode 0600), and on the second socket the CRI and LocalService,
//! to root alone.
//!
//! A stale socket (nobody listens) is replaced; the lock that keeps a second daemon out is `main`'s.

use std::os::unix::fs::PermissionsExt;

use camino::Utf8Path;
use futures::StreamExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use super::Front;
use super::around::layer;
use super::deadline::Deadline;
use super::measure::Measure;
use super::spans::Spans;
use crate::api::local::local_service_server::LocalServiceServer;
use crate::api::v1::image_service_server::ImageServiceServer;
use crate::api::v1::runtime_service_server::RuntimeServiceServer;
use crate::core::error::{Error, Kind, Result};

/// Binds `path` with mode 0600, in place of a stale socket.
pub fn bind(path: &Utf8Path) -> Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(format!("make folder {folder}"), e))?;
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => {
            return Err(Error::new(Kind::AlreadyExists, format!("socket {path}: another program listens on it")));
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|e| Error::io(format!("replace the stale socket {path}"), e))?;
        }
        Err(e) => return Err(Error::io(format!("socket {path}"), e)),
    }
    // Bound under another name and renamed: nobody sees it with other permissions.
    let hidden = camino::Utf8PathBuf::from(format!("{path}.new"));
    let _ = std::fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden).map_err(|e| Error::io(format!("listen on {path}"), e))?;
    std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| std::fs::rename(&hidden, path))
        .map_err(|e| Error::io(format!("listen on {path}"), e))?;
    Ok(listener)
}

/// Serves until `stop`, then lets requests under way end, however long they take.
pub async fn serve(front: Front, listener: UnixListener, local: bool, stop: CancellationToken) -> Result<()> {
    let max = front.config.server.grpc_max_message_size;
    let runtime =
        RuntimeServiceServer::new(front.clone()).max_decoding_message_size(max).max_encoding_message_size(max);
    let image = ImageServiceServer::new(front.clone()).max_decoding_message_size(max).max_encoding_message_size(max);
    // Streams of events have no end of their own, and the server waits for every answer's end.
    let engine = front.engine.clone();
    let stop = async move {
        stop.cancelled_owned().await;
        engine.close_events();
    };
    let mut router = Server::builder()
        .layer(layer::<Spans>())
        .layer(layer::<Measure>())
        .layer(layer::<Deadline>())
        .add_service(runtime)
        .add_service(image);
    if local {
        router = router.add_service(LocalServiceServer::new(front));
    }
    // Whatever becomes of the socket's mode, the local one is root's: what it makes runs as root.
    let incoming = UnixListenerStream::new(listener)
        .filter(move |accepted| std::future::ready(!local || accepted.as_ref().map_or(true, is_ours)));
    router
        .serve_with_incoming_shutdown(incoming, stop)
        .await
        .map_err(|e| Error::because(Kind::Internal, "serve gRPC", e))
}

/// Whether the peer is root, or whoever runs this daemon.
fn is_ours(stream: &UnixStream) -> bool {
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == rustix::process::geteuid().as_raw() => true,
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), pid = peer.pid(), "a connection to the local socket was refused");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "a connection to the local socket has no credentials");
            false
        }
    }
}
