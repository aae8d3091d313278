//! WebSocket frames from a client, in pieces: the limits hold, and what is said on channels is understood or refused.
#![no_main]

use std::io::{self, Cursor, Read, Write};

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::cri::streaming::websocket::protocol::REMOTE_COMMAND;
use proxmox_lxcri::cri::streaming::websocket::{MAX_MESSAGE, config};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocket};

/// A client that sends the input a few bytes at a time and takes every answer.
struct Client<'a>(Cursor<&'a [u8]>);

impl Read for Client<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = buffer.len().min(13);
        self.0.read(&mut buffer[..n])
    }
}

impl Write for Client<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|input: &[u8]| {
    let mut socket = WebSocket::from_raw_socket(Client(Cursor::new(input)), Role::Server, Some(config()));
    while let Ok(message) = socket.read() {
        assert!(message.len() <= MAX_MESSAGE);
        if message.is_binary() || message.is_text() {
            for protocol in &REMOTE_COMMAND {
                let _ = protocol.decode(message.clone().into_data());
            }
        }
    }
});
