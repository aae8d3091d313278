//! The subprotocols of `*.channel.k8s.io`: which one is spoken, and what a message of it says.
//!
//! Pure. A message that makes no sense is None and is skipped by the session.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use tokio_tungstenite::tungstenite::Message;

/// Channels of exec and attach.
pub mod channel {
    /// Client's input.
    pub const STDIN: u8 = 0;
    /// Output.
    pub const STDOUT: u8 = 1;
    /// Errors of the process.
    pub const STDERR: u8 = 2;
    /// What became of it.
    pub const ERROR: u8 = 3;
    /// Terminal sizes.
    pub const RESIZE: u8 = 4;
    /// From version 5 on: the next byte names a channel that the sender closes.
    pub const CLOSE: u8 = 255;
}

/// SPDY inside of WebSocket messages, for port-forward.
pub const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// A subprotocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocol {
    /// As the header names it; "" when the client names none.
    pub name: &'static str,
    /// Channel and data as text: a digit, then base64.
    pub base64: bool,
    /// The error channel carries a Status as JSON.
    pub json_status: bool,
    /// There are close messages.
    pub close: bool,
}

const fn protocol(name: &'static str, base64: bool, json_status: bool, close: bool) -> Protocol {
    Protocol { name, base64, json_status, close }
}

/// Those of exec and attach.
pub const REMOTE_COMMAND: [Protocol; 6] = [
    protocol("v5.channel.k8s.io", false, true, true),
    protocol("v4.channel.k8s.io", false, true, false),
    protocol("v4.base64.channel.k8s.io", true, true, false),
    protocol("channel.k8s.io", false, false, false),
    protocol("base64.channel.k8s.io", true, false, false),
    protocol("", false, false, false),
];

/// Those of port-forward with a pair of channels for each port.
pub const PORT_FORWARD: [Protocol; 3] = [
    protocol("v4.channel.k8s.io", false, true, false),
    protocol("v4.base64.channel.k8s.io", true, true, false),
    protocol("", false, false, false),
];

/// The first of `asked` that is among `known`; "" when nothing is asked for.
pub fn choose(asked: &[String], known: &[Protocol]) -> Option<Protocol> {
    let find = |name: &str| known.iter().find(|p| p.name == name).copied();
    if asked.is_empty() { find("") } else { asked.iter().filter(|a| !a.is_empty()).find_map(|a| find(a)) }
}

/// What a message says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// Bytes on a channel.
    Data(u8, Bytes),
    /// The client has nothing more to say on it.
    Close(u8),
}

impl Protocol {
    /// Reads a message.
    pub fn decode(&self, mut message: Bytes) -> Option<Said> {
        if message.is_empty() {
            return None;
        }
        let number = message.split_to(1)[0];
        if self.base64 {
            let number = number.checked_sub(b'0').filter(|n| *n < 10)?;
            return Some(Said::Data(number, BASE64_STANDARD.decode(&message).ok()?.into()));
        }
        match (number, message.len()) {
            (channel::CLOSE, 1) if self.close => Some(Said::Close(message[0])),
            (channel::CLOSE, _) if self.close => None,
            _ => Some(Said::Data(number, message)),
        }
    }

    /// Makes a message.
    pub fn encode(&self, number: u8, data: &[u8]) -> Message {
        if self.base64 {
            let mut text = String::with_capacity(1 + data.len().div_ceil(3) * 4);
            text.push(char::from(b'0' + number % 10));
            BASE64_STANDARD.encode_string(data, &mut text);
            return Message::text(text);
        }
        let mut message = BytesMut::with_capacity(1 + data.len());
        message.put_u8(number);
        message.put_slice(data);
        Message::Binary(message.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn asked(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn the_clients_first_choice_that_we_know() {
        let choose = |names: &[&str]| choose(&asked(names), &REMOTE_COMMAND).map(|p| p.name);
        assert_eq!(choose(&["v9.channel.k8s.io", "v4.channel.k8s.io", "v5.channel.k8s.io"]), Some("v4.channel.k8s.io"));
        assert_eq!(choose(&[]), Some(""));
        assert_eq!(choose(&["chat"]), None);
    }

    #[test]
    fn messages_of_every_kind() {
        let [v5, v4, b64, ..] = REMOTE_COMMAND;
        assert_eq!(v5.decode(Bytes::from_static(b"\xff\x00")), Some(Said::Close(0)));
        assert_eq!(v5.decode(Bytes::from_static(b"\xff")), None);
        assert_eq!(v4.decode(Bytes::from_static(b"\xff\x00")), Some(Said::Data(255, Bytes::from_static(b"\0"))));
        assert_eq!(v4.decode(Bytes::from_static(b"\x00")), Some(Said::Data(0, Bytes::new())));
        assert_eq!(v4.decode(Bytes::new()), None);
        assert_eq!(b64.decode(Bytes::from_static(b"0aGk=")), Some(Said::Data(0, Bytes::from_static(b"hi"))));
        for bad in [&b"0a"[..], b"x", b"/", b"0****"] {
            assert_eq!(b64.decode(Bytes::from_static(bad)), None, "{bad:?}");
        }
        assert_eq!(v4.encode(1, b"hi"), Message::Binary(Bytes::from_static(b"\x01hi")));
        assert_eq!(b64.encode(1, b"hi"), Message::text("1aGk="));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for protocol in REMOTE_COMMAND {
                let _ = protocol.decode(Bytes::from(bytes.clone()));
            }
        }

        #[test]
        fn what_is_written_is_read(number in 0u8..10, data in proptest::collection::vec(any::<u8>(), 0..300)) {
            for protocol in REMOTE_COMMAND {
                let message = protocol.encode(number, &data).into_data();
                prop_assert_eq!(protocol.decode(message), Some(Said::Data(number, data.clone().into())));
            }
        }
    }
}
