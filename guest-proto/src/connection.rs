//! Records, frames and streams together.
//!
//! Called by whoever has the socket: [`Connection::input`] with what came, [`Connection::output`] for what is to be sent. Fails
//! once and for all, when the peer is not who it has to be or does what no honest peer does.

use crate::Side;
use crate::mux::{Event, Mux, MuxError};
use crate::secure::{MAX_RECORD, Secret, Secure, SecureError, take};

/// The number of the ping with which a node shows itself to a guest.
const HERE: u32 = 0;

/// Why nothing more can come of a connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The peer is not the one, or records were changed.
    #[error("authentication")]
    Secure(#[from] SecureError),
    /// The peer does not keep to the protocol.
    #[error("protocol")]
    Mux(#[from] MuxError),
}

/// One side of a connection.
#[derive(Debug)]
pub struct Connection {
    secure: Secure,
    mux: Mux,
    /// What came and is no whole record yet.
    incoming: Vec<u8>,
    /// The peer has proved that it has the secret.
    up: bool,
    side: Side,
}

impl Connection {
    /// A side of a new connection. The node speaks first.
    pub fn new(side: Side, secret: &Secret) -> Result<Self, ConnectionError> {
        let secure = Secure::new(side, secret)?;
        Ok(Self { secure, mux: Mux::new(side), incoming: Vec::new(), up: false, side })
    }

    /// Whether the peer has proved who it is. No event comes before, and nothing that was written is sent.
    pub fn is_up(&self) -> bool {
        self.up
    }

    /// The streams.
    pub fn mux(&mut self) -> &mut Mux {
        &mut self.mux
    }

    /// Takes bytes that came, in pieces as they come.
    pub fn input(&mut self, bytes: &[u8]) -> Result<Vec<Event>, ConnectionError> {
        self.incoming.extend(bytes);
        let mut events = Vec::new();
        while let Some(message) = take(&mut self.incoming)? {
            let greeting = !self.secure.is_up();
            let data = self.secure.open(&message)?;
            if !greeting {
                self.up = true;
                self.mux.input(&data, &mut events)?;
            } else if self.secure.is_up() && self.side == Side::Node {
                // The guest has answered with our secret, and is to see that we have it now.
                self.up = true;
                self.mux.ping(HERE);
            }
        }
        self.incoming.shrink_to(MAX_RECORD);
        Ok(events)
    }

    /// The next record to send; None: there is nothing now.
    pub fn output(&mut self) -> Result<Option<Vec<u8>>, ConnectionError> {
        if let Some(record) = self.secure.greeting()? {
            return Ok(Some(record));
        }
        if !self.up || !self.mux.has_output() {
            return Ok(None);
        }
        let mut frames = Vec::new();
        self.mux.output(&mut frames, MAX_RECORD);
        Ok(Some(self.secure.seal(&frames)?))
    }
}
