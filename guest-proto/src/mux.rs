//! Streams within one: each with an order of its own, a window for each direction, and an end for each direction.
//!
//! A sender has at most [`WINDOW`] bytes of a stream under way. A byte is under way until its receiver has called
//! [`Mux::consumed`] for it, which it does when the byte is where it belongs, in a log or a pipe: so a window that is given back
//! is an acknowledgement, and a receiver that stalls stops this stream's sender and nobody else. What is accepted by
//! [`Mux::write`] can be sent as soon as the connection takes it, and is little: there are no queues that grow.
//!
//! Stream 0 is there from the beginning, for what both sides have to say of the connection. Streams of both sides are told by
//! their numbers: odd ones are opened by the node, even ones by the guest. A number is never used again.
//!
//! Called by [`crate::Connection`]. Fails on what no honest peer does.

use std::collections::{BTreeMap, VecDeque};

use crate::Side;
use crate::frame::{BadFrame, Frame, HEADER, MAX_PAYLOAD};

/// Bytes of one stream and direction that may be under way.
pub const WINDOW: u32 = 64 * 1024;
/// Most streams at a time that a peer may have opened.
pub const MAX_STREAMS: usize = 1024;
/// Most answers to pings that wait to be sent.
const MAX_PONGS: usize = 16;

/// A stream's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(u32);

impl StreamId {
    /// The stream that is there from the beginning.
    pub const CONTROL: Self = Self(0);

    /// As frames have it, and messages that speak of the stream.
    pub fn number(self) -> u32 {
        self.0
    }
}

/// What the peer has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It has opened a stream; the bytes say what for.
    Opened(StreamId, Vec<u8>),
    /// Bytes, to be told as [`Mux::consumed`] when they are where they belong.
    Data(StreamId, Vec<u8>),
    /// It is done with so many bytes that we have sent.
    Acknowledged(StreamId, u32),
    /// It sends no more on this stream.
    Ended(StreamId),
    /// The stream is over in both directions.
    Reset(StreamId, u32),
    /// It has answered a ping.
    Pong(u32),
}

/// What no honest peer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MuxError {
    /// Bytes that are no frame.
    #[error("the peer sent no frame")]
    Frame(#[from] BadFrame),
    /// A frame of a stream that was never opened, or opened by the wrong side.
    #[error("stream {0} is not one of the peer's")]
    Unknown(u32),
    /// More streams than [`MAX_STREAMS`].
    #[error("the peer opened too many streams")]
    TooMany,
    /// More bytes than the window of the stream had room for.
    #[error("the peer sent more on stream {0} than it has a window for")]
    Overrun(u32),
    /// A window was given back that was never taken.
    #[error("the peer gave back more of stream {0} than was sent")]
    Window(u32),
    /// Data, or an end, after the end.
    #[error("the peer went on after the end of stream {0}")]
    AfterEnd(u32),
    /// Pings faster than their answers can be sent.
    #[error("the peer sent too many pings")]
    Pings,
}

#[derive(Debug, Default)]
struct Stream {
    /// What waits to be sent; never more than its window has room for.
    queue: VecDeque<u8>,
    /// Bytes that were sent and are under way.
    sent: u32,
    /// Bytes that came and were not consumed.
    received: u32,
    /// Bytes that were consumed and not told yet.
    owed: u32,
    /// We are to send no more; and whether the peer knows.
    ending: bool,
    ended: bool,
    /// The peer sends no more.
    peer_ended: bool,
}

impl Stream {
    /// Nobody sends anything more, and all is acknowledged.
    fn is_over(&self) -> bool {
        self.ended && self.peer_ended && self.sent == 0 && self.received == 0 && self.owed == 0
    }
}

/// One side of all streams of a connection.
#[derive(Debug)]
pub struct Mux {
    side: Side,
    streams: BTreeMap<u32, Stream>,
    /// The last stream that each side opened; 0: none.
    own: u32,
    peers: u32,
    /// Frames without flow control: few.
    urgent: VecDeque<Frame>,
    pongs: usize,
    /// The stream that had its turn last.
    turn: u32,
}

impl Mux {
    /// A side with nothing but stream 0.
    pub fn new(side: Side) -> Self {
        let streams = [(0, Stream::default())].into();
        Self { side, streams, own: 0, peers: 0, urgent: VecDeque::new(), pongs: 0, turn: 0 }
    }

    /// Opens a stream for what `purpose` says, of which at most [`MAX_PAYLOAD`] bytes. None: there are too many, or more words.
    pub fn open(&mut self, purpose: &[u8]) -> Option<StreamId> {
        let opened = self.streams.keys().filter(|id| **id != 0 && self.is_own(**id)).count();
        if purpose.len() > MAX_PAYLOAD || opened >= MAX_STREAMS {
            return None;
        }
        let first = if self.side == Side::Node { 1 } else { 2 };
        let id = if self.own == 0 { first } else { self.own.checked_add(2)? };
        self.own = id;
        self.streams.insert(id, Stream::default());
        self.urgent.push_back(Frame::Open(id, purpose.to_vec()));
        Some(StreamId(id))
    }

    /// How many bytes [`Self::write`] takes now.
    pub fn room(&self, id: StreamId) -> usize {
        let room = |s: &Stream| if s.ending { 0 } else { (WINDOW - s.sent) as usize - s.queue.len() };
        self.streams.get(&id.0).map_or(0, room)
    }

    /// Takes bytes to send, as many as there is room for; the answer is how many.
    pub fn write(&mut self, id: StreamId, bytes: &[u8]) -> usize {
        let count = self.room(id).min(bytes.len());
        if let Some(stream) = self.streams.get_mut(&id.0) {
            stream.queue.extend(&bytes[..count]);
        }
        count
    }

    /// Nothing more is written to the stream; what was is sent first.
    pub fn end(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id.0) {
            stream.ending = true;
        }
    }

    /// Ends the stream in both directions, whatever waits.
    pub fn reset(&mut self, id: StreamId, code: u32) {
        if id.0 != 0 && self.streams.remove(&id.0).is_some() {
            self.urgent.push_back(Frame::Reset(id.0, code));
        }
    }

    /// So many bytes of the stream's data are where they belong.
    pub fn consumed(&mut self, id: StreamId, count: u32) {
        if let Some(stream) = self.streams.get_mut(&id.0) {
            let count = count.min(stream.received);
            stream.received -= count;
            stream.owed += count;
        }
    }

    /// Asks whether the peer is there.
    pub fn ping(&mut self, number: u32) {
        self.urgent.push_back(Frame::Ping(number));
    }

    /// Whether there is something to send.
    pub fn has_output(&self) -> bool {
        !self.urgent.is_empty()
            || self.streams.values().any(|s| s.owed > 0 || !s.queue.is_empty() || s.ending && !s.ended)
    }

    /// Appends whole frames of at most `limit` bytes, or of one frame if that alone is longer: first what has no window, then a
    /// part of each stream in turn.
    pub fn output(&mut self, to: &mut Vec<u8>, limit: usize) {
        let start = to.len();
        let room = |to: &Vec<u8>| limit.saturating_sub(to.len() - start);
        while let Some(frame) = self.urgent.front() {
            let length = HEADER + if let Frame::Open(_, purpose) = frame { purpose.len() } else { 4 };
            if room(to) < length && to.len() > start {
                return;
            }
            if let Some(frame) = self.urgent.pop_front() {
                self.pongs -= usize::from(matches!(frame, Frame::Pong(_)));
                frame.write(to);
            }
        }
        let turns: Vec<u32> = self.after_turn().collect();
        for id in turns {
            // A frame of acknowledgement, one of data, one of the end.
            if room(to) < 3 * HEADER + 8 && to.len() > start {
                return;
            }
            self.turn = id;
            let most = room(to).saturating_sub(3 * HEADER + 4).clamp(1, MAX_PAYLOAD);
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            if stream.owed > 0 {
                Frame::Window(id, std::mem::take(&mut stream.owed)).write(to);
            }
            let count = stream.queue.len().min(most);
            if count > 0 {
                stream.sent += count as u32;
                Frame::Data(id, stream.queue.drain(..count).collect()).write(to);
            }
            if stream.ending && !stream.ended && stream.queue.is_empty() {
                stream.ended = true;
                Frame::End(id).write(to);
            }
            self.forget_if_over(id);
        }
    }

    /// Streams in the order in which they have their turn.
    fn after_turn(&self) -> impl Iterator<Item = u32> {
        let (early, late): (Vec<u32>, Vec<u32>) = self.streams.keys().partition(|id| **id <= self.turn);
        late.into_iter().chain(early)
    }

    /// Takes whole frames that came.
    pub fn input(&mut self, mut bytes: &[u8], events: &mut Vec<Event>) -> Result<(), MuxError> {
        while let Some(frame) = Frame::read(&mut bytes)? {
            events.extend(self.frame(frame)?);
        }
        Ok(())
    }

    fn frame(&mut self, frame: Frame) -> Result<Option<Event>, MuxError> {
        match frame {
            Frame::Open(id, purpose) => self.opened(id, purpose).map(Some),
            Frame::Data(id, data) => {
                let count = data.len() as u32;
                let Some(stream) = self.known(id)? else { return Ok(None) };
                if stream.peer_ended {
                    return Err(MuxError::AfterEnd(id));
                }
                // What is consumed and not told yet is under way for the peer.
                if stream.received + stream.owed + count > WINDOW {
                    return Err(MuxError::Overrun(id));
                }
                stream.received += count;
                Ok(Some(Event::Data(StreamId(id), data)))
            }
            Frame::Window(id, count) => {
                let Some(stream) = self.known(id)? else { return Ok(None) };
                stream.sent = stream.sent.checked_sub(count).ok_or(MuxError::Window(id))?;
                self.forget_if_over(id);
                Ok(Some(Event::Acknowledged(StreamId(id), count)))
            }
            Frame::End(id) => {
                let Some(stream) = self.known(id)? else { return Ok(None) };
                if std::mem::replace(&mut stream.peer_ended, true) {
                    return Err(MuxError::AfterEnd(id));
                }
                self.forget_if_over(id);
                Ok(Some(Event::Ended(StreamId(id))))
            }
            Frame::Reset(0, _) => Err(MuxError::Unknown(0)),
            Frame::Reset(id, code) => {
                if self.known(id)?.is_none() {
                    return Ok(None);
                }
                self.streams.remove(&id);
                Ok(Some(Event::Reset(StreamId(id), code)))
            }
            Frame::Ping(number) => {
                self.pongs += 1;
                if self.pongs > MAX_PONGS {
                    return Err(MuxError::Pings);
                }
                self.urgent.push_back(Frame::Pong(number));
                Ok(None)
            }
            Frame::Pong(number) => Ok(Some(Event::Pong(number))),
        }
    }

    fn opened(&mut self, id: u32, purpose: Vec<u8>) -> Result<Event, MuxError> {
        if id == 0 || self.is_own(id) || id <= self.peers {
            return Err(MuxError::Unknown(id));
        }
        if self.streams.keys().filter(|id| **id != 0 && !self.is_own(**id)).count() >= MAX_STREAMS {
            return Err(MuxError::TooMany);
        }
        self.peers = id;
        self.streams.insert(id, Stream::default());
        Ok(Event::Opened(StreamId(id), purpose))
    }

    fn is_own(&self, id: u32) -> bool {
        id.is_multiple_of(2) == (self.side == Side::Guest)
    }

    /// The stream, or None where it is over: the peer did not know when it sent this.
    fn known(&mut self, id: u32) -> Result<Option<&mut Stream>, MuxError> {
        let was = id == 0 || id <= if self.is_own(id) { self.own } else { self.peers };
        if was { Ok(self.streams.get_mut(&id)) } else { Err(MuxError::Unknown(id)) }
    }

    fn forget_if_over(&mut self, id: u32) {
        if id != 0 && self.streams.get(&id).is_some_and(Stream::is_over) {
            self.streams.remove(&id);
        }
    }
}
