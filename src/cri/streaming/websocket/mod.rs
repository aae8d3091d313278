//! WebSocket, the server's side: channels of an exec, attach or legacy port-forward, and SPDY tunnelled in messages.
//!
//! [`protocol`] chooses the subprotocol and turns messages to channels and back, [`session`] runs a connection,
//! [`tunnel`] makes a byte stream of one. The frames themselves are tungstenite's.

pub mod protocol;
pub mod session;
pub mod tunnel;

use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

/// Longest message in bytes that a client may send.
pub const MAX_MESSAGE: usize = 4 << 20;

/// Limits of a connection; nothing is held back before it is written.
pub fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
        .write_buffer_size(0)
        .max_write_buffer_size(1 << 20)
}
