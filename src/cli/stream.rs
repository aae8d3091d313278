//! A client of the streaming server, over WebSocket: our stdin, stdout and stderr are those of a process in a container.
//!
//! Used by `exec`, `attach` and `run -i`. Ends with the process; when we end before it, the daemon kills an exec.

use std::io::{Read, Write};

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;

use super::terminal::{self, DetachKeys, Raw};

const PROTOCOL: &str = "v5.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;
/// Bytes read from stdin at once.
const READ: usize = 32 << 10;

/// What is passed on besides output.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Our stdin.
    pub stdin: bool,
    /// Our terminal.
    pub tty: bool,
    /// Ctrl-P Ctrl-Q ends the connection and leaves the process.
    pub detach_keys: bool,
}

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code; 0 as well for an attach.
    Exit(u8),
    /// By the keys.
    Detached,
}

/// A connection that nothing has gone over yet.
pub struct Connected {
    socket: WebSocketStream<TcpStream>,
    options: Options,
}

/// Comes to a URL that the daemon gave.
pub async fn connect(url: &str, options: Options) -> Result<Connected> {
    let Some(rest) = url.strip_prefix("http://") else {
        bail!(
            "the streaming server speaks TLS (server.stream.tls_cert_file): use a client that trusts its certificate"
        );
    };
    let mut request = format!("ws://{rest}").into_client_request().with_context(|| format!("URL {url}"))?;
    let address = request.uri().authority().map(ToString::to_string).unwrap_or_default();
    request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static(PROTOCOL));
    let stream = TcpStream::connect(&address).await.with_context(|| format!("streaming server {address}"))?;
    let _ = stream.set_nodelay(true);
    let (socket, _) = tokio_tungstenite::client_async(request, stream).await.context("the streaming server")?;
    Ok(Connected { socket, options })
}

impl Connected {
    /// Waits until the other side is connected with the process: it says so by an empty message.
    pub async fn ready(mut self) -> Result<Self> {
        match self.socket.next().await {
            Some(Ok(Message::Binary(data))) if data.first() == Some(&ERROR) && data.len() > 1 => {
                exit_code(&data[1..])?;
                bail!("the connection ended at once")
            }
            Some(Ok(Message::Binary(_))) => Ok(self),
            _ => bail!("the connection to the daemon ended at once"),
        }
    }

    /// Passes everything on until the end.
    pub async fn run(self) -> Result<Ended> {
        let Self { socket, options } = self;
        let _raw = options.tty.then(Raw::enter).transpose()?;
        let (mut sink, mut messages) = socket.split();
        let mut typed = options.stdin.then(read_stdin);
        let mut keys = DetachKeys::default();
        let mut resized = signal(SignalKind::window_change())?;
        if options.tty {
            sink.send(size_message()).await?;
        }
        let mut status = Vec::new();
        loop {
            tokio::select! {
                message = messages.next() => match message {
                    Some(Ok(Message::Binary(data))) => take(&data, &mut status)?,
                    None | Some(Ok(Message::Close(_))) => break,
                    Some(Ok(_)) => {}
                    Some(Err(e)) => return Err(e).context("the connection to the daemon"),
                },
                bytes = next(&mut typed) => match bytes {
                    Some(bytes) => {
                        let (send, detach) = match options.detach_keys {
                            true => keys.filter(&bytes),
                            false => (bytes, false),
                        };
                        if !send.is_empty() {
                            sink.send(message_of(STDIN, &send)).await?;
                        }
                        if detach {
                            return Ok(Ended::Detached);
                        }
                    }
                    None => {
                        typed = None;
                        sink.send(message_of(CLOSE, &[STDIN])).await?;
                    }
                },
                _ = resized.recv(), if options.tty => sink.send(size_message()).await?,
            }
        }
        exit_code(&status).map(Ended::Exit)
    }
}

fn message_of(channel: u8, data: &[u8]) -> Message {
    let mut message = BytesMut::with_capacity(1 + data.len());
    message.put_u8(channel);
    message.put_slice(data);
    Message::Binary(message.freeze())
}

fn size_message() -> Message {
    let (width, height) = terminal::size().unwrap_or((80, 24));
    message_of(RESIZE, format!("{{\"Width\":{width},\"Height\":{height}}}").as_bytes())
}

/// Prints output, keeps the status.
fn take(data: &Bytes, status: &mut Vec<u8>) -> Result<()> {
    let Some((channel, data)) = data.split_first() else { return Ok(()) };
    match *channel {
        STDOUT => {
            let mut out = std::io::stdout().lock();
            out.write_all(data).and_then(|()| out.flush()).context("stdout")
        }
        STDERR => std::io::stderr().write_all(data).context("stderr"),
        ERROR => {
            status.extend_from_slice(data);
            Ok(())
        }
        _ => Ok(()),
    }
}

/// From a thread that nobody waits for: a read from a terminal can't be interrupted.
fn read_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (tell, told) = mpsc::channel(2);
    std::thread::spawn(move || {
        let mut buffer = vec![0; READ];
        while let Ok(n @ 1..) = std::io::stdin().lock().read(&mut buffer) {
            if tell.blocking_send(buffer[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    told
}

/// What is typed next; waits for ever where nothing will be.
async fn next(typed: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match typed {
        Some(typed) => typed.recv().await,
        None => std::future::pending().await,
    }
}

/// Reads the Status of the error channel.
fn exit_code(status: &[u8]) -> Result<u8> {
    let status: Value = serde_json::from_slice(status)
        .map_err(|_| anyhow!("the connection ended without a result: the daemon may have been stopped"))?;
    if status["status"] == "Success" {
        return Ok(0);
    }
    if status["reason"] == "NonZeroExitCode" {
        let causes = status["details"]["causes"].as_array();
        let code = causes.into_iter().flatten().find(|c| c["reason"] == "ExitCode");
        let code = code.and_then(|c| c["message"].as_str()?.parse::<i32>().ok());
        return Ok(code.map_or(1, |c| c.clamp(0, 255) as u8));
    }
    bail!("{}", status["message"].as_str().unwrap_or("failed without a reason"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_an_exit_code_or_a_failure() {
        assert_eq!(exit_code(br#"{"status":"Success"}"#).expect("success"), 0);
        let seven = br#"{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#;
        assert_eq!(exit_code(seven).expect("an exit code"), 7);
        assert!(
            exit_code(br#"{"status":"Failure","message":"no such file"}"#)
                .expect_err("a failure")
                .to_string()
                .contains("no such")
        );
        assert!(exit_code(b"").is_err());
    }
}
