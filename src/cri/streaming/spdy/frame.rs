//! SPDY/3.1 frames: bytes to frames and back. Pure; hostile input ends in a [`FrameError`], never in a panic, and never
//! makes more than [`MAX_CONTROL`] bytes wait: data frames are handed on in pieces as they come.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Version of the protocol that is on the wire (3.1 differs by what WINDOW_UPDATE for stream 0 means).
const VERSION: u16 = 3;
/// Longest control frame in bytes, without its first 8.
pub const MAX_CONTROL: usize = 64 << 10;
/// Bytes before every frame.
pub const HEADER: usize = 8;
/// Longest data frame that the length field can express.
pub const MAX_DATA: usize = (1 << 24) - 1;

const FIN: u8 = 1;
const UNIDIRECTIONAL: u8 = 2;
const STREAM: u32 = 0x7fff_ffff;
const INITIAL_WINDOW_SIZE: u32 = 7;

/// Why a stream was reset (RST_STREAM), as far as we say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Reset {
    /// The stream does not fit the protocol.
    Protocol = 1,
    /// Data for a stream that is not there.
    InvalidStream = 2,
    /// More streams than we take.
    Refused = 3,
    /// The stream is not needed any more.
    Cancel = 5,
}

/// What can be wrong with bytes that should be frames.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Another version.
    #[error("a frame of SPDY version {0}, this is 3")]
    Version(u16),
    /// A control frame longer than [`MAX_CONTROL`].
    #[error("a control frame of {0} bytes")]
    TooLong(usize),
    /// A control frame whose length does not fit its type.
    #[error("a frame of type {kind} with {length} bytes")]
    Length {
        /// Type.
        kind: u16,
        /// Bytes after the header.
        length: usize,
    },
    /// Stream 0, where it names no stream.
    #[error("a frame of type {0} for stream 0")]
    NoStream(u16),
}

/// A control frame. Header blocks are compressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Opens a stream.
    SynStream {
        /// Odd from the client.
        stream: u32,
        /// The sender has nothing more to say.
        fin: bool,
        /// The receiver may not answer.
        unidirectional: bool,
        /// Headers.
        block: Bytes,
    },
    /// Accepts one.
    SynReply {
        /// Which.
        stream: u32,
        /// The sender has nothing more to say.
        fin: bool,
        /// Headers.
        block: Bytes,
    },
    /// Ends one at once.
    Rst {
        /// Which.
        stream: u32,
        /// Why.
        status: u32,
    },
    /// Settings; all but the initial window are of no use here.
    Settings {
        /// Bytes that may be sent on a new stream before a WINDOW_UPDATE.
        initial_window: Option<u32>,
    },
    /// To be sent back if its number is odd (the client's).
    Ping(u32),
    /// No more streams will be accepted.
    GoAway {
        /// Last stream that was.
        last: u32,
        /// 0: all is well.
        status: u32,
    },
    /// More headers.
    Headers {
        /// Of which stream.
        stream: u32,
        /// The sender has nothing more to say.
        fin: bool,
        /// Headers.
        block: Bytes,
    },
    /// More data may be sent.
    WindowUpdate {
        /// On which stream; 0: on all together.
        stream: u32,
        /// Bytes.
        delta: u32,
    },
    /// A type that SPDY/3 does not know: skipped.
    Unknown(u16),
}

/// What comes off the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A whole control frame.
    Control(Control),
    /// A piece of a data frame.
    Data {
        /// Its stream, never 0.
        stream: u32,
        /// May be empty with `fin`.
        bytes: Bytes,
        /// The last piece of the stream's last frame.
        fin: bool,
    },
}

/// Takes frames out of a buffer.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Stream, FIN and bytes to come of the data frame that is being read.
    data: Option<(u32, bool, usize)>,
}

impl Decoder {
    /// The next frame or piece of one; None: more bytes are needed.
    pub fn next(&mut self, from: &mut BytesMut) -> Result<Option<Event>, FrameError> {
        loop {
            if let Some((stream, fin, left)) = self.data {
                if left > 0 && from.is_empty() {
                    return Ok(None);
                }
                let taken = left.min(from.len());
                let last = taken == left;
                self.data = (!last).then_some((stream, fin, left - taken));
                let bytes = from.split_to(taken).freeze();
                if bytes.is_empty() && !fin {
                    continue;
                }
                return Ok(Some(Event::Data { stream, bytes, fin: fin && last }));
            }
            if from.len() < HEADER {
                return Ok(None);
            }
            let word = u32::from_be_bytes([from[0], from[1], from[2], from[3]]);
            let flags = from[4];
            let length = usize::from(from[5]) << 16 | usize::from(from[6]) << 8 | usize::from(from[7]);
            if word >> 31 == 0 {
                if word == 0 {
                    return Err(FrameError::NoStream(0));
                }
                from.advance(HEADER);
                self.data = Some((word, flags & FIN != 0, length));
                continue;
            }
            let (version, kind) = ((word >> 16) as u16 & 0x7fff, word as u16);
            if version != VERSION {
                return Err(FrameError::Version(version));
            }
            if length > MAX_CONTROL {
                return Err(FrameError::TooLong(length));
            }
            if from.len() < HEADER + length {
                from.reserve(HEADER + length - from.len());
                return Ok(None);
            }
            from.advance(HEADER);
            return control(kind, flags, from.split_to(length).freeze()).map(|c| Some(Event::Control(c)));
        }
    }
}

fn control(kind: u16, flags: u8, mut payload: Bytes) -> Result<Control, FrameError> {
    let length = payload.len();
    let exactly = |n: usize| if length == n { Ok(()) } else { Err(FrameError::Length { kind, length }) };
    let at_least = |n: usize| if length >= n { Ok(()) } else { Err(FrameError::Length { kind, length }) };
    let named = |stream: u32| match stream & STREAM {
        0 => Err(FrameError::NoStream(kind)),
        stream => Ok(stream),
    };
    let fin = flags & FIN != 0;
    Ok(match kind {
        1 => {
            at_least(10)?;
            let stream = named(payload.get_u32())?;
            payload.advance(6);
            Control::SynStream { stream, fin, unidirectional: flags & UNIDIRECTIONAL != 0, block: payload }
        }
        2 | 8 => {
            at_least(4)?;
            let stream = named(payload.get_u32())?;
            match kind {
                2 => Control::SynReply { stream, fin, block: payload },
                _ => Control::Headers { stream, fin, block: payload },
            }
        }
        3 => {
            exactly(8)?;
            Control::Rst { stream: named(payload.get_u32())?, status: payload.get_u32() }
        }
        4 => {
            at_least(4)?;
            let count = payload.get_u32() as usize;
            exactly(count.saturating_mul(8).saturating_add(4))?;
            let mut initial_window = None;
            for _ in 0..count {
                let (id, value) = (payload.get_u32() & 0x00ff_ffff, payload.get_u32());
                if id == INITIAL_WINDOW_SIZE {
                    initial_window = Some(value & STREAM);
                }
            }
            Control::Settings { initial_window }
        }
        6 => {
            exactly(4)?;
            Control::Ping(payload.get_u32())
        }
        7 => {
            exactly(8)?;
            Control::GoAway { last: payload.get_u32() & STREAM, status: payload.get_u32() }
        }
        9 => {
            exactly(8)?;
            Control::WindowUpdate { stream: payload.get_u32() & STREAM, delta: payload.get_u32() & STREAM }
        }
        other => Control::Unknown(other),
    })
}

/// The 8 bytes before `length` bytes of data, at most [`MAX_DATA`].
pub fn data_header(stream: u32, fin: bool, length: usize) -> [u8; HEADER] {
    let (s, l) = ((stream & STREAM).to_be_bytes(), (length.min(MAX_DATA) as u32).to_be_bytes());
    [s[0], s[1], s[2], s[3], u8::from(fin) * FIN, l[1], l[2], l[3]]
}

/// Appends a control frame. A block longer than [`MAX_CONTROL`] is the caller's mistake and would not be read.
pub fn encode(frame: &Control, into: &mut BytesMut) {
    let mut body = BytesMut::new();
    let (kind, flags) = match frame {
        Control::SynStream { stream, fin, unidirectional, block } => {
            body.put_u32(stream & STREAM);
            body.put_bytes(0, 6);
            body.put_slice(block);
            (1, (u8::from(*fin) * FIN) | (u8::from(*unidirectional) * UNIDIRECTIONAL))
        }
        Control::SynReply { stream, fin, block } => {
            body.put_u32(stream & STREAM);
            body.put_slice(block);
            (2, u8::from(*fin) * FIN)
        }
        Control::Rst { stream, status } => {
            body.put_u32(stream & STREAM);
            body.put_u32(*status);
            (3, 0)
        }
        Control::Settings { initial_window } => {
            body.put_u32(u32::from(initial_window.is_some()));
            if let Some(window) = initial_window {
                body.put_u32(INITIAL_WINDOW_SIZE);
                body.put_u32(*window);
            }
            (4, 0)
        }
        Control::Ping(id) => {
            body.put_u32(*id);
            (6, 0)
        }
        Control::GoAway { last, status } => {
            body.put_u32(last & STREAM);
            body.put_u32(*status);
            (7, 0)
        }
        Control::Headers { stream, fin, block } => {
            body.put_u32(stream & STREAM);
            body.put_slice(block);
            (8, u8::from(*fin) * FIN)
        }
        Control::WindowUpdate { stream, delta } => {
            body.put_u32(stream & STREAM);
            body.put_u32(delta & STREAM);
            (9, 0)
        }
        Control::Unknown(kind) => (*kind, 0),
    };
    into.put_u16(0x8000 | VERSION);
    into.put_u16(kind);
    into.put_u32(u32::from(flags) << 24 | body.len() as u32);
    into.put_slice(&body);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all() -> Vec<Control> {
        let block = Bytes::from_static(b"block");
        vec![
            Control::SynStream { stream: 1, fin: false, unidirectional: true, block: block.clone() },
            Control::SynReply { stream: 3, fin: true, block: block.clone() },
            Control::Rst { stream: 5, status: 7 },
            Control::Settings { initial_window: Some(65536) },
            Control::Settings { initial_window: None },
            Control::Ping(9),
            Control::GoAway { last: 11, status: 0 },
            Control::Headers { stream: 13, fin: false, block },
            Control::WindowUpdate { stream: 0, delta: 4096 },
            Control::Unknown(77),
        ]
    }

    fn decode(mut bytes: BytesMut) -> Result<Vec<Event>, FrameError> {
        let mut decoder = Decoder::default();
        let mut events = Vec::new();
        while let Some(event) = decoder.next(&mut bytes)? {
            events.push(event);
        }
        Ok(events)
    }

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = BytesMut::new();
        all().iter().for_each(|c| encode(c, &mut bytes));
        bytes.put_slice(&data_header(15, true, 3));
        bytes.put_slice(b"abc");
        let mut want: Vec<_> = all().into_iter().map(Event::Control).collect();
        want.push(Event::Data { stream: 15, bytes: Bytes::from_static(b"abc"), fin: true });
        assert_eq!(decode(bytes), Ok(want));
    }

    #[test]
    fn known_bytes() {
        // PING 1 and a data frame of stream 1 with FIN, as the draft draws them.
        let mut bytes =
            BytesMut::from(&b"\x80\x03\x00\x06\x00\x00\x00\x04\x00\x00\x00\x01\x00\x00\x00\x01\x01\x00\x00\x00"[..]);
        let mut decoder = Decoder::default();
        assert_eq!(decoder.next(&mut bytes), Ok(Some(Event::Control(Control::Ping(1)))));
        assert_eq!(decoder.next(&mut bytes), Ok(Some(Event::Data { stream: 1, bytes: Bytes::new(), fin: true })));
        assert_eq!(decoder.next(&mut bytes), Ok(None));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (bytes, error) in [
            (&b"\x80\x02\x00\x06\x00\x00\x00\x04\0\0\0\x01"[..], FrameError::Version(2)),
            (b"\x80\x03\x00\x06\x00\x00\x00\x05\0\0\0\x01\0", FrameError::Length { kind: 6, length: 5 }),
            (b"\x80\x03\x00\x01\x00\x02\x00\x00", FrameError::TooLong(0x20000)),
            (b"\0\0\0\0\0\0\0\x01x", FrameError::NoStream(0)),
            (b"\x80\x03\x00\x03\x00\x00\x00\x08\0\0\0\0\0\0\0\x01", FrameError::NoStream(3)),
            (b"\x80\x03\x00\x04\x00\x00\x00\x04\xff\xff\xff\xff", FrameError::Length { kind: 4, length: 4 }),
        ] {
            assert_eq!(decode(BytesMut::from(bytes)), Err(error), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = decode(BytesMut::from(bytes.as_slice()));
        }

        #[test]
        fn hostile_frames_never_panic(kind in 0u16..12, flags in any::<u8>(), body in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = control(kind, flags, Bytes::from(body));
        }

        #[test]
        fn pieces_make_the_same_whole(sizes in proptest::collection::vec(1usize..50, 1..40), data in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut wire = BytesMut::new();
            encode(&Control::Ping(1), &mut wire);
            wire.put_slice(&data_header(1, true, data.len()));
            wire.put_slice(&data);
            encode(&Control::Ping(3), &mut wire);
            let (mut decoder, mut buffer, mut pings, mut got, mut fins) = (Decoder::default(), BytesMut::new(), 0, Vec::new(), 0);
            let mut sizes = sizes.into_iter().cycle();
            while !wire.is_empty() {
                let n = sizes.next().unwrap_or(1).min(wire.len());
                buffer.extend_from_slice(&wire.split_to(n));
                while let Some(event) = decoder.next(&mut buffer).expect("frames") {
                    match event {
                        Event::Control(_) => pings += 1,
                        Event::Data { bytes, fin, .. } => {
                            got.extend_from_slice(&bytes);
                            fins += u32::from(fin);
                        }
                    }
                }
            }
            prop_assert_eq!((pings, got, fins), (2, data, 1));
        }
    }
}
