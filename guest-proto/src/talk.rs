//! A connection on whose stream 0 both sides send messages ([`calls`]), with what came of them and what is on its way out.
//!
//! Called by whoever has the socket: what was received goes into [`Talk::input`], what can be sent is [`Talk::output`]. Fails as
//! [`Connection`] and [`calls`] do.

use std::collections::VecDeque;

use prost::Message;

use crate::calls::{self, CallError};
use crate::connection::{Connection, ConnectionError};
use crate::mux::{Event, Mux, StreamId};
use crate::{Secret, Side};

/// One side of it.
#[derive(Debug)]
pub struct Talk {
    connection: Connection,
    reader: calls::Reader,
    /// Bytes of messages that came and are not taken yet.
    held: u32,
    /// Messages that wait to be sent.
    waiting: VecDeque<u8>,
    /// A record on its way out, and how much of it is out.
    out: Vec<u8>,
    done: usize,
}

impl Talk {
    /// A side of a new connection.
    pub fn new(side: Side, secret: &Secret) -> Result<Self, ConnectionError> {
        Ok(Self {
            connection: Connection::new(side, secret)?,
            reader: calls::Reader::default(),
            held: 0,
            waiting: VecDeque::new(),
            out: Vec::new(),
            done: 0,
        })
    }

    /// Whether the peer has proved who it is.
    pub fn is_up(&self) -> bool {
        self.connection.is_up()
    }

    /// The streams.
    pub fn mux(&mut self) -> &mut Mux {
        self.connection.mux()
    }

    /// Takes bytes that came; what they say of other streams than messages.
    pub fn input(&mut self, bytes: &[u8]) -> Result<Vec<Event>, ConnectionError> {
        let mut events = self.connection.input(bytes)?;
        events.retain(|event| match event {
            Event::Data(StreamId::CONTROL, data) => {
                self.held += data.len() as u32;
                self.reader.input(data);
                false
            }
            _ => true,
        });
        Ok(events)
    }

    /// The next message. The peer may send more when all are taken.
    pub fn take<M: Message + Default>(&mut self) -> Result<Option<M>, CallError> {
        let message = self.reader.take()?;
        if message.is_none() {
            // One that is not whole yet is longer than what may be under way.
            self.connection.mux().consumed(StreamId::CONTROL, std::mem::take(&mut self.held));
        }
        Ok(message)
    }

    /// Sends a message, after those that wait.
    pub fn say(&mut self, message: &impl Message) -> Result<(), CallError> {
        self.waiting.extend(calls::frame(message)?);
        Ok(())
    }

    /// Bytes of messages that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether a record was not sent as a whole.
    pub fn is_sending(&self) -> bool {
        self.done < self.out.len()
    }

    /// Bytes that can be sent now; none: there are none.
    pub fn output(&mut self) -> Result<&[u8], ConnectionError> {
        while !self.waiting.is_empty() {
            let count = self.connection.mux().write(StreamId::CONTROL, self.waiting.as_slices().0);
            if count == 0 {
                break;
            }
            self.waiting.drain(..count);
        }
        if self.waiting.is_empty() && self.waiting.capacity() > 0 {
            self.waiting = VecDeque::new();
        }
        if !self.is_sending() {
            (self.out, self.done) = (self.connection.output()?.unwrap_or_default(), 0);
        }
        Ok(&self.out[self.done..])
    }

    /// So many of them were sent.
    pub fn sent(&mut self, count: usize) {
        self.done += count;
    }
}
