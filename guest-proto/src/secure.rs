//! Who is there, and nobody else reads it: the Noise protocol with a secret of the pod that both sides have.
//!
//! `NNpsk0`: each side makes a key for this connection alone, and both are bound to the pod's secret. So who has not the secret is
//! neither node nor guest, the guest of one pod is not that of another, and a secret that is lost later opens no old recording.
//! (A recorded first message can be sent again; its sender then knows no key, so that nothing it sends further is accepted. A guest
//! believes in the node with the first record, which [`crate::Connection`] sends at once.)
//!
//! A record is a length (2 bytes, big endian) and a message of Noise. Fails on every record that is not the peer's next one; the
//! connection is of no use then.

use std::fmt;

use snow::{Builder, HandshakeState, TransportState};
use zeroize::Zeroizing;

use crate::{Side, VERSION};

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_SHA256";
/// Bytes that encryption adds to a record.
const TAG: usize = 16;
/// Most bytes that one record holds for who sends it.
pub const MAX_RECORD: usize = 32 * 1024;

/// What the node and the agent of one pod have in common.
#[derive(Clone)]
pub struct Secret(Zeroizing<[u8; 32]>);

impl Secret {
    /// Of 32 random bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Why nothing more can come of a connection.
#[derive(Debug, thiserror::Error)]
pub enum SecureError {
    /// The peer has another secret or version, or the record is not its next one.
    #[error("the peer is not who it has to be, or its words were changed on the way")]
    Peer,
    /// A record that nobody sends.
    #[error("a record of {0} bytes")]
    Length(usize),
    /// The library refuses what we do.
    #[error("Noise")]
    Noise(#[source] snow::Error),
}

enum State {
    Greeting(Box<HandshakeState>),
    Up(Box<TransportState>),
    /// After a failure.
    Gone,
}

/// The encryption of one connection.
pub struct Secure(State);

impl fmt::Debug for Secure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            State::Greeting(_) => "Greeting",
            State::Up(_) => "Up",
            State::Gone => "Gone",
        })
    }
}

impl Secure {
    /// A side of a new connection.
    pub fn new(side: Side, secret: &Secret) -> Result<Self, SecureError> {
        let words = format!("lxcri-guest {VERSION}");
        let make = || {
            let builder = Builder::new(PATTERN.parse()?).psk(0, &secret.0)?.prologue(words.as_bytes())?;
            match side {
                Side::Node => builder.build_initiator(),
                Side::Guest => builder.build_responder(),
            }
        };
        Ok(Self(State::Greeting(Box::new(make().map_err(SecureError::Noise)?))))
    }

    /// Whether both sides have their keys.
    pub fn is_up(&self) -> bool {
        matches!(self.0, State::Up(_))
    }

    /// The next record of the greeting, if it is our turn.
    pub fn greeting(&mut self) -> Result<Option<Vec<u8>>, SecureError> {
        let State::Greeting(noise) = &mut self.0 else { return Ok(None) };
        if !noise.is_my_turn() {
            return Ok(None);
        }
        let mut message = [0; 128];
        let length = noise.write_message(&[], &mut message).map_err(SecureError::Noise)?;
        self.settle()?;
        Ok(Some(record(&message[..length])))
    }

    /// Both have said what they have to: from now on there is data.
    fn settle(&mut self) -> Result<(), SecureError> {
        self.0 = match std::mem::replace(&mut self.0, State::Gone) {
            State::Greeting(noise) if noise.is_handshake_finished() => {
                State::Up(Box::new(noise.into_transport_mode().map_err(SecureError::Noise)?))
            }
            state => state,
        };
        Ok(())
    }

    /// A record of `data`, at most [`MAX_RECORD`] bytes.
    pub fn seal(&mut self, data: &[u8]) -> Result<Vec<u8>, SecureError> {
        let State::Up(noise) = &mut self.0 else { return Err(SecureError::Peer) };
        if data.len() > MAX_RECORD {
            return Err(SecureError::Length(data.len()));
        }
        let mut message = vec![0; data.len() + TAG];
        let length = noise.write_message(data, &mut message).map_err(SecureError::Noise)?;
        Ok(record(&message[..length]))
    }

    /// What is in the peer's next message, without its length; nothing of those of the greeting.
    pub fn open(&mut self, message: &[u8]) -> Result<Vec<u8>, SecureError> {
        let mut data = vec![0; message.len()];
        let read = match &mut self.0 {
            State::Greeting(noise) if !noise.is_my_turn() => noise.read_message(message, &mut data),
            State::Up(noise) => noise.read_message(message, &mut data),
            State::Greeting(_) | State::Gone => return Err(SecureError::Peer),
        };
        let Ok(length) = read else {
            self.0 = State::Gone;
            return Err(SecureError::Peer);
        };
        self.settle()?;
        data.truncate(length);
        Ok(data)
    }
}

/// With its length.
fn record(message: &[u8]) -> Vec<u8> {
    let mut all = Vec::with_capacity(2 + message.len());
    all.extend((message.len() as u16).to_be_bytes());
    all.extend(message);
    all
}

/// Takes the first whole message off what came; None: more has to come.
pub fn take(bytes: &mut Vec<u8>) -> Result<Option<Vec<u8>>, SecureError> {
    let Some((head, rest)) = bytes.split_first_chunk::<2>() else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes(*head));
    if !(TAG..=MAX_RECORD + TAG).contains(&length) {
        return Err(SecureError::Length(length));
    }
    let Some(message) = rest.get(..length) else { return Ok(None) };
    let message = message.to_vec();
    bytes.drain(..2 + length);
    Ok(Some(message))
}
