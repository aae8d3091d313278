//! Messages on a stream, each with its length before it (4 bytes, big endian).
//!
//! Pure; used by both sides for stream 0. Fails on messages that nobody sends; the connection is of no use then.

use prost::Message;

/// Longest message in bytes.
pub const MAX_CALL: usize = 4 * 1024 * 1024;

/// Bytes that are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// Longer than [`MAX_CALL`].
    #[error("a message of {0} bytes is longer than {MAX_CALL}")]
    TooLong(usize),
    /// Not the message that has to come.
    #[error("what came is no message")]
    Garbage,
}

/// The bytes of a message, with their length.
pub fn frame(message: &impl Message) -> Result<Vec<u8>, CallError> {
    let length = message.encoded_len();
    let head = u32::try_from(length).ok().filter(|_| length <= MAX_CALL).ok_or(CallError::TooLong(length))?;
    let mut bytes = Vec::with_capacity(4 + length);
    bytes.extend(head.to_be_bytes());
    bytes.extend(message.encode_to_vec());
    Ok(bytes)
}

/// What came of messages.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
}

impl Reader {
    /// Takes bytes as they come.
    pub fn input(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// The next whole message; None: more has to come.
    pub fn take<M: Message + Default>(&mut self) -> Result<Option<M>, CallError> {
        let Some((head, rest)) = self.bytes.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*head) as usize;
        if length > MAX_CALL {
            return Err(CallError::TooLong(length));
        }
        let Some(message) = rest.get(..length) else { return Ok(None) };
        let message = M::decode(message).map_err(|_| CallError::Garbage)?;
        self.bytes.drain(..4 + length);
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1;

    #[test]
    fn messages_come_back_however_they_are_cut() {
        let call = |id, n| v1::Call {
            id,
            call: Some(v1::call::Call::Write(v1::Write { content: vec![7; n], ..Default::default() })),
        };
        let all = [call(1, 0), call(2, 5000), v1::Call::default(), call(3, 1)];
        let bytes: Vec<u8> = all.iter().flat_map(|c| frame(c).expect("a frame")).collect();
        for piece in [1, 3, 4096, bytes.len()] {
            let (mut reader, mut came) = (Reader::default(), Vec::new());
            for piece in bytes.chunks(piece) {
                reader.input(piece);
                while let Some(call) = reader.take::<v1::Call>().expect("a message") {
                    came.push(call);
                }
            }
            assert_eq!(came, all);
        }
    }

    #[test]
    fn what_is_no_message() {
        let big = v1::Write { content: vec![0; MAX_CALL], ..Default::default() };
        assert!(matches!(frame(&big), Err(CallError::TooLong(_))));
        let mut reader = Reader::default();
        reader.input(&(MAX_CALL as u32 + 1).to_be_bytes());
        assert_eq!(reader.take::<v1::Call>(), Err(CallError::TooLong(MAX_CALL + 1)));
        let mut reader = Reader::default();
        reader.input(&[0, 0, 0, 1, 0xff]);
        assert_eq!(reader.take::<v1::Call>(), Err(CallError::Garbage));
    }
}
