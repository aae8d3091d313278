//! Notices that a client has closed its connection while nobody reads from it, because its input is not taken.
//!
//! Used by the sessions' readers in exactly that case; for reading itself an end is an end. Does nothing (the end is then
//! noticed by the next write) where the socket can't be watched.

use std::io;

use tokio::io::Interest;
use tokio::net::TcpStream;

/// A second handle of a connection's socket.
pub struct Hangup {
    socket: Option<TcpStream>,
}

impl Hangup {
    /// Of a connection.
    pub fn of(connection: &TcpStream) -> Self {
        let copy = || {
            let fd = rustix::io::fcntl_dupfd_cloexec(connection, 3)?;
            TcpStream::from_std(std::net::TcpStream::from(fd))
        };
        let socket =
            copy().inspect_err(|e: &io::Error| tracing::debug!(error = %e, "a connection can't be watched")).ok();
        Self { socket }
    }

    /// Of no socket: it never hangs up.
    pub fn never() -> Self {
        Self { socket: None }
    }

    /// Waits until the client has closed the connection.
    pub async fn wait(&self) {
        let Some(socket) = &self.socket else { return std::future::pending().await };
        loop {
            match socket.ready(Interest::READABLE).await {
                Ok(ready) if !ready.is_read_closed() => {
                    // Bytes that nobody reads now: wait for the next change.
                    let unread = || Err::<(), _>(io::Error::from(io::ErrorKind::WouldBlock));
                    let _ = socket.try_io(Interest::READABLE, unread);
                }
                Ok(_) | Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn an_end_behind_unread_bytes_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let mut client = TcpStream::connect(listener.local_addr().expect("address")).await.expect("connect");
        let (server, _) = listener.accept().await.expect("accept");
        let hangup = Hangup::of(&server);
        client.write_all(b"unread").await.expect("write");
        assert!(timeout(Duration::from_millis(50), hangup.wait()).await.is_err());
        client.write_all(b"more").await.expect("write");
        drop(client);
        timeout(Duration::from_secs(10), hangup.wait()).await.expect("seen");
    }
}
