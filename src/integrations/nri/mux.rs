//! One connection to a plugin: two streams in it, each of ttrpc messages.
//!
//! A frame is the stream's number and a length (4 bytes each, most significant first), then so many bytes of the stream. A ttrpc
//! message is a length, its stream's number, a type and flags (10 bytes), then a protobuf message; it may be in several frames.
//! Nothing that comes is trusted: what no honest peer sends ends the connection.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Our calls, and the answers to them.
pub const PLUGIN: u32 = 1;
/// The plugin's calls, and our answers.
pub const RUNTIME: u32 = 2;
/// Type of a ttrpc message that asks.
pub const REQUEST: u8 = 1;
/// Type of one that answers.
pub const RESPONSE: u8 = 2;

const FRAME_HEADER: usize = 8;
const MESSAGE_HEADER: usize = 10;
/// Longest protobuf message of ttrpc.
pub const MESSAGE_MAX: usize = 4 << 20;
/// The reader at the other end has a buffer of this size, and takes a frame at once: only what fits, or what the message's rest is.
const CHUNK: usize = 4096;

/// A ttrpc message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// [`PLUGIN`] or [`RUNTIME`].
    pub connection: u32,
    /// Number of the call, chosen by who asks.
    pub stream: u32,
    /// [`REQUEST`] or [`RESPONSE`].
    pub kind: u8,
    /// Protobuf.
    pub body: Bytes,
}

/// What is wrong with what came.
#[derive(Debug, thiserror::Error)]
pub enum MuxError {
    /// Read or write failed, or the other end has closed.
    #[error("the connection is broken")]
    Io(#[from] std::io::Error),
    /// A frame or message is longer than allowed.
    #[error("{what} of {length} bytes, {max} are allowed")]
    TooLong {
        /// Frame or message.
        what: &'static str,
        /// Its length.
        length: usize,
        /// The longest.
        max: usize,
    },
}

/// The message in frames, as it goes over the wire.
pub fn encode(message: &Message) -> Bytes {
    let mut whole = BytesMut::with_capacity(MESSAGE_HEADER + message.body.len());
    whole.put_u32(u32::try_from(message.body.len()).unwrap_or(u32::MAX));
    whole.put_u32(message.stream);
    whole.put_u8(message.kind);
    whole.put_u8(0);
    whole.put_slice(&message.body);
    let (first, rest) = whole.split_at(whole.len().min(CHUNK));
    let mut out = BytesMut::with_capacity(2 * FRAME_HEADER + whole.len());
    for chunk in [first, rest].into_iter().filter(|c| !c.is_empty()) {
        out.put_u32(message.connection);
        out.put_u32(u32::try_from(chunk.len()).unwrap_or(u32::MAX));
        out.put_slice(chunk);
    }
    out.freeze()
}

/// Writes a message whole.
pub async fn write(to: &mut (impl AsyncWrite + Unpin), message: &Message) -> Result<(), MuxError> {
    to.write_all(&encode(message)).await?;
    Ok(to.flush().await?)
}

/// Reads messages.
pub struct Reader<R> {
    from: R,
    /// Bytes of both streams that are no whole message yet.
    parts: [BytesMut; 2],
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// Of a connection's readable half.
    pub fn new(from: R) -> Self {
        Self { from, parts: Default::default() }
    }

    /// The next message. Not to be dropped half-way: the connection is of no use then.
    pub async fn next(&mut self) -> Result<Message, MuxError> {
        loop {
            for (part, connection) in self.parts.iter_mut().zip([PLUGIN, RUNTIME]) {
                if let Some(message) = take(part, connection)? {
                    return Ok(message);
                }
            }
            let (connection, length) = (self.from.read_u32().await?, self.from.read_u32().await?);
            let (length, max) = (length as usize, MESSAGE_HEADER + MESSAGE_MAX);
            if length > max {
                return Err(MuxError::TooLong { what: "a frame", length, max });
            }
            let mut frame = vec![0; length];
            self.from.read_exact(&mut frame).await?;
            match connection {
                PLUGIN => self.parts[0].extend_from_slice(&frame),
                RUNTIME => self.parts[1].extend_from_slice(&frame),
                // Nobody listens there, as in the library of the plugins.
                _ => {}
            }
        }
    }
}

fn take(part: &mut BytesMut, connection: u32) -> Result<Option<Message>, MuxError> {
    if part.len() < MESSAGE_HEADER {
        return Ok(None);
    }
    let length = u32::from_be_bytes([part[0], part[1], part[2], part[3]]) as usize;
    if length > MESSAGE_MAX {
        return Err(MuxError::TooLong { what: "a message", length, max: MESSAGE_MAX });
    }
    if part.len() < MESSAGE_HEADER + length {
        return Ok(None);
    }
    let mut message = part.split_to(MESSAGE_HEADER + length).freeze();
    message.advance(4);
    let (stream, kind) = (message.get_u32(), message.get_u8());
    message.advance(1);
    Ok(Some(Message { connection, stream, kind, body: message }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: usize) -> Message {
        Message { connection: RUNTIME, stream: 7, kind: REQUEST, body: vec![5; length].into() }
    }

    #[tokio::test]
    async fn messages_survive_the_way() {
        for length in [0, 1, CHUNK - MESSAGE_HEADER, CHUNK, 3 * CHUNK, MESSAGE_MAX] {
            let sent = message(length);
            let wire = encode(&sent);
            let first = u32::from_be_bytes([wire[4], wire[5], wire[6], wire[7]]) as usize;
            assert!(first <= CHUNK, "{first}");
            assert_eq!(Reader::new(&wire[..]).next().await.expect("whole"), sent);
        }
    }

    #[tokio::test]
    async fn streams_do_not_mix() {
        let (one, two) = (message(20), Message { connection: PLUGIN, ..message(3) });
        let (a, b) = (encode(&one), encode(&two));
        // The first one's last bytes come in a frame of their own, after the other.
        let mut wire = BytesMut::new();
        wire.put_u32(RUNTIME);
        wire.put_u32(15);
        wire.put_slice(&a[8..23]);
        wire.put_slice(&b);
        wire.put_u32(9);
        wire.put_u32(1);
        wire.put_u8(0);
        wire.put_u32(RUNTIME);
        wire.put_u32(15);
        wire.put_slice(&a[23..]);
        let mut reader = Reader::new(&wire[..]);
        assert_eq!(reader.next().await.expect("the second"), two);
        assert_eq!(reader.next().await.expect("the first"), one);
        assert!(matches!(reader.next().await, Err(MuxError::Io(_))), "its end");
    }

    #[tokio::test]
    async fn what_is_too_long_ends_it() {
        let frame = [&2u32.to_be_bytes()[..], &u32::MAX.to_be_bytes()[..]].concat();
        assert!(matches!(Reader::new(&frame[..]).next().await, Err(MuxError::TooLong { what: "a frame", .. })));
        let mut inner = encode(&message(0)).to_vec();
        inner[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(matches!(Reader::new(&inner[..]).next().await, Err(MuxError::TooLong { what: "a message", .. })));
    }
}
