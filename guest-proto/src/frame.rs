//! Frames: kind (1 byte), stream (4), length of the payload (2), payload; numbers big endian.
//!
//! Pure; called by [`crate::mux`]. Fails on frames that nobody sends: unknown kinds, wrong lengths.

/// Bytes before a payload.
pub const HEADER: usize = 7;
/// Most bytes of a payload.
pub const MAX_PAYLOAD: usize = 16 * 1024;

/// One frame. `Open`, `Data` and so on are of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A stream is opened; the payload says what it is for.
    Open(u32, Vec<u8>),
    /// Bytes of a stream; never none.
    Data(u32, Vec<u8>),
    /// The receiver is done with so many bytes of a stream: as many more may be sent.
    Window(u32, u32),
    /// The sender of this sends no more on the stream.
    End(u32),
    /// The stream is over for both sides; a code says why.
    Reset(u32, u32),
    /// Are you there?
    Ping(u32),
    /// The answer to a ping, with its number.
    Pong(u32),
}

/// Bytes that are no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadFrame(&'static str);

impl Frame {
    /// Appends its bytes. What is longer than [`MAX_PAYLOAD`] is the caller's mistake and is cut.
    pub fn write(&self, to: &mut Vec<u8>) {
        let number = |n: &u32| n.to_be_bytes();
        let mut put = |kind: u8, stream: u32, payload: &[u8]| {
            let payload = &payload[..payload.len().min(MAX_PAYLOAD)];
            to.push(kind);
            to.extend(stream.to_be_bytes());
            to.extend((payload.len() as u16).to_be_bytes());
            to.extend(payload);
        };
        match self {
            Self::Open(stream, payload) => put(1, *stream, payload),
            Self::Data(stream, payload) => put(2, *stream, payload),
            Self::Window(stream, n) => put(3, *stream, &number(n)),
            Self::End(stream) => put(4, *stream, &[]),
            Self::Reset(stream, code) => put(5, *stream, &number(code)),
            Self::Ping(n) => put(6, *n, &[]),
            Self::Pong(n) => put(7, *n, &[]),
        }
    }

    /// Takes the first frame off `bytes`; None: there are none.
    pub fn read(bytes: &mut &[u8]) -> Result<Option<Self>, BadFrame> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let cut = BadFrame("a frame is cut");
        let (header, rest) = bytes.split_first_chunk::<HEADER>().ok_or(cut)?;
        let [kind, a, b, c, d, high, low] = *header;
        let stream = u32::from_be_bytes([a, b, c, d]);
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length > MAX_PAYLOAD {
            return Err(BadFrame("a frame is too long"));
        }
        let (payload, rest) = rest.split_at_checked(length).ok_or(cut)?;
        let number =
            || payload.try_into().map(u32::from_be_bytes).map_err(|_| BadFrame("a frame's payload is no number"));
        let empty = |frame| if payload.is_empty() { Ok(frame) } else { Err(BadFrame("a frame has a payload")) };
        let frame = match kind {
            1 => Self::Open(stream, payload.to_vec()),
            2 if payload.is_empty() => return Err(BadFrame("a frame has no data")),
            2 => Self::Data(stream, payload.to_vec()),
            3 => Self::Window(stream, number()?),
            4 => empty(Self::End(stream))?,
            5 => Self::Reset(stream, number()?),
            6 => empty(Self::Ping(stream))?,
            7 => empty(Self::Pong(stream))?,
            _ => return Err(BadFrame("a frame is of no known kind")),
        };
        *bytes = rest;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames() -> impl Strategy<Value = Frame> {
        let bytes = |min: usize| proptest::collection::vec(any::<u8>(), min..64);
        prop_oneof![
            (any::<u32>(), bytes(0)).prop_map(|(s, b)| Frame::Open(s, b)),
            (any::<u32>(), bytes(1)).prop_map(|(s, b)| Frame::Data(s, b)),
            (any::<u32>(), any::<u32>()).prop_map(|(s, n)| Frame::Window(s, n)),
            any::<u32>().prop_map(Frame::End),
            (any::<u32>(), any::<u32>()).prop_map(|(s, n)| Frame::Reset(s, n)),
            any::<u32>().prop_map(Frame::Ping),
            any::<u32>().prop_map(Frame::Pong),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(all in proptest::collection::vec(frames(), 0..8)) {
            let mut bytes = Vec::new();
            all.iter().for_each(|f| f.write(&mut bytes));
            let (mut rest, mut read) = (bytes.as_slice(), Vec::new());
            while let Some(frame) = Frame::read(&mut rest).expect("whole frames") {
                read.push(frame);
            }
            prop_assert_eq!(read, all);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut rest = bytes.as_slice();
            while let Ok(Some(frame)) = Frame::read(&mut rest) {
                let mut again = Vec::new();
                frame.write(&mut again);
                let at = bytes.len() - rest.len();
                prop_assert_eq!(&bytes[at - again.len()..at], again.as_slice());
            }
        }
    }

    #[test]
    fn what_is_no_frame() {
        let bad: [&[u8]; 7] = [
            &[2, 0, 0, 0, 1],
            &[2, 0, 0, 0, 1, 0, 0],
            &[2, 0, 0, 0, 1, 0, 2, 9],
            &[2, 0, 0, 0, 1, 0xff, 0xff],
            &[3, 0, 0, 0, 1, 0, 3, 0, 0, 1],
            &[4, 0, 0, 0, 1, 0, 1, 0],
            &[0, 0, 0, 0, 1, 0, 0],
        ];
        for bytes in bad {
            let mut rest = bytes;
            assert!(Frame::read(&mut rest).is_err() && rest == bytes, "{bytes:?}");
        }
    }
}
