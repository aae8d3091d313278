//! A WebSocket client of the streaming server, for what crictl does not do: legacy protocols, vanishing, not reading.

use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;

/// No message for so long is a failure.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection.
pub struct Ws {
    /// The socket.
    pub socket: WebSocketStream<TcpStream>,
}

/// What came on the channels until the server closed.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Said {
    /// Channel 1.
    pub stdout: Vec<u8>,
    /// Channel 2.
    pub stderr: Vec<u8>,
    /// Channel 3.
    pub error: Vec<u8>,
}

impl Said {
    /// The status as JSON.
    pub fn status(&self) -> serde_json::Value {
        serde_json::from_slice(&self.error)
            .unwrap_or_else(|e| panic!("{e}: {:?}", String::from_utf8_lossy(&self.error)))
    }

    /// Stdout as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Ws {
    /// Connects; the answer's status and subprotocol when it is no upgrade.
    pub async fn try_connect(url: &str, protocols: &str) -> Result<Self, u16> {
        let mut request = url.replace("http://", "ws://").into_client_request().expect("a URL");
        let address = request.uri().authority().expect("an address").to_string();
        if !protocols.is_empty() {
            let value = HeaderValue::from_str(protocols).expect("a header");
            request.headers_mut().insert("sec-websocket-protocol", value);
        }
        let stream = TcpStream::connect(address).await.expect("the streaming server listens");
        match tokio_tungstenite::client_async(request, stream).await {
            Ok((socket, _)) => Ok(Self { socket }),
            Err(tokio_tungstenite::tungstenite::Error::Http(answer)) => Err(answer.status().as_u16()),
            Err(e) => panic!("{url}: {e}"),
        }
    }

    /// Connects.
    pub async fn connect(url: &str, protocols: &str) -> Self {
        Self::try_connect(url, protocols).await.unwrap_or_else(|code| panic!("{url}: HTTP {code}"))
    }

    /// Sends bytes on a channel.
    pub async fn send(&mut self, channel: u8, data: &[u8]) {
        let message = [&[channel], data].concat();
        self.socket.send(Message::binary(message)).await.expect("the server takes a message");
    }

    /// The next message with data: channel and bytes; None at the end.
    pub async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            let message = timeout(PATIENCE, self.socket.next()).await.expect("a message in time")?.ok()?;
            match message {
                Message::Binary(data) => return Some((data[0], data[1..].to_vec())),
                Message::Close(_) => return None,
                _ => {}
            }
        }
    }

    /// Reads to the end.
    pub async fn finish(&mut self) -> Said {
        let mut said = Said::default();
        while let Some((channel, data)) = self.next().await {
            match channel {
                1 => said.stdout.extend(data),
                2 => said.stderr.extend(data),
                3 => said.error.extend(data),
                other => panic!("channel {other}"),
            }
        }
        said
    }

    /// Reads stdout until it holds `text`; gives all of it.
    pub async fn until(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(text) {
            match self.next().await {
                Some((1, data)) => seen.push_str(&String::from_utf8_lossy(&data)),
                Some(_) => {}
                None => panic!("the end before {text:?}: {seen:?}"),
            }
        }
        seen
    }
}
