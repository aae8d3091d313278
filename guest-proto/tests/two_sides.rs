//! Both sides of a connection against each other, over a wire that cuts bytes as it likes, and against peers that mean harm.

use std::collections::BTreeMap;

use lxcri_guest_proto::frame::Frame;
use lxcri_guest_proto::mux::{MAX_STREAMS, Mux, MuxError, WINDOW};
use lxcri_guest_proto::{Connection, ConnectionError, Event, Secret, Side, StreamId};
use proptest::prelude::*;

fn connection(side: Side, secret: u8) -> Connection {
    Connection::new(side, &Secret::new([secret; 32])).expect("a side")
}

/// Sends all that one side has to say to the other, in pieces of `piece` bytes.
fn carry(from: &mut Connection, to: &mut Connection, piece: usize) -> Result<Vec<Event>, ConnectionError> {
    let mut events = Vec::new();
    while let Some(record) = from.output()? {
        for piece in record.chunks(piece.max(1)) {
            events.extend(to.input(piece)?);
        }
    }
    Ok(events)
}

fn pair() -> (Connection, Connection) {
    let (mut node, mut guest) = (connection(Side::Node, 1), connection(Side::Guest, 1));
    for _ in 0..2 {
        carry(&mut node, &mut guest, 7).expect("the node's words");
        carry(&mut guest, &mut node, 7).expect("the guest's words");
    }
    assert!(node.is_up() && guest.is_up());
    (node, guest)
}

/// What is said before somebody has proved who he is.
#[test]
fn nobody_is_believed_before_he_has_proved_himself() {
    let (mut node, mut guest) = (connection(Side::Node, 1), connection(Side::Guest, 1));
    node.mux().write(StreamId::CONTROL, b"early");
    assert!(guest.output().expect("nothing").is_none(), "the node speaks first");
    let first = node.output().expect("a greeting").expect("a record");
    assert!(node.output().expect("nothing").is_none(), "it waits for the answer");
    assert!(guest.input(&first).expect("taken").is_empty() && !guest.is_up());
    guest.mux().write(StreamId::CONTROL, b"early");
    assert!(carry(&mut guest, &mut node, 9).expect("the answer").is_empty());
    assert!(node.is_up() && !guest.is_up());
    assert_eq!(carry(&mut node, &mut guest, 9).expect("early"), [Event::Data(StreamId::CONTROL, b"early".to_vec())]);
    assert!(guest.is_up());
    // The same first words again are answered, and lead nowhere: who says them has no key.
    let mut again = connection(Side::Guest, 1);
    again.input(&first).expect("taken");
    again.output().expect("an answer").expect("a record");
    assert!(!again.is_up());
    let sealed = connection(Side::Node, 1).output().expect("a greeting").expect("a record");
    assert!(matches!(again.input(&sealed), Err(ConnectionError::Secure(_))) && !again.is_up());
}

#[test]
fn who_has_another_secret_is_refused_by_both() {
    let (mut node, mut guest) = (connection(Side::Node, 1), connection(Side::Guest, 2));
    assert!(matches!(carry(&mut node, &mut guest, 100), Err(ConnectionError::Secure(_))));
    // One that answers with a secret of his own.
    let mut other = connection(Side::Node, 2);
    let mut liar = connection(Side::Guest, 2);
    carry(&mut other, &mut liar, 100).expect("his own greeting");
    let answer = liar.output().expect("an answer").expect("a record");
    assert!(matches!(node.input(&answer), Err(ConnectionError::Secure(_))) && !node.is_up());
    assert_eq!(format!("{:?}", Secret::new([7; 32])), "Secret");
}

#[test]
fn records_are_taken_once_and_as_they_were_sent() {
    let said = |node: &mut Connection| {
        node.mux().write(StreamId::CONTROL, b"some words");
        node.output().expect("a record").expect("words")
    };
    let (mut node, mut guest) = pair();
    let record = said(&mut node);
    assert!(!record.windows(4).any(|w| w == b"word"), "nobody reads it on the way");
    guest.input(&record).expect("the first time");
    assert!(guest.input(&record).is_err(), "again");
    for at in [2, 9, record.len() - 1] {
        let (mut node, mut guest) = pair();
        let mut record = said(&mut node);
        record[at] ^= 1;
        assert!(guest.input(&record).is_err(), "byte {at}");
        assert!(guest.input(&said(&mut node)).is_err(), "what failed stays so");
    }
    let (mut node, mut guest) = pair();
    said(&mut node);
    assert!(guest.input(&said(&mut node)).is_err(), "one was left out");
    assert!(guest.input(&[0xff, 0xff]).is_err(), "a record that nobody sends");
}

#[test]
fn streams_do_not_wait_for_one_another() {
    let (mut node, mut guest) = pair();
    let stuck = node.mux().open(b"stuck").expect("a stream");
    let other = node.mux().open(b"other").expect("a stream");
    let all = vec![7; 2 * WINDOW as usize];
    assert_eq!(node.mux().write(stuck, &all), WINDOW as usize);
    assert_eq!((node.mux().write(stuck, &all), node.mux().room(stuck)), (0, 0));
    node.mux().write(other, b"goes on");
    let events = carry(&mut node, &mut guest, 4096).expect("carried");
    let first = events.iter().position(|e| *e == Event::Data(other, b"goes on".to_vec())).expect("it came");
    let before = events[..first].iter().filter(|e| matches!(e, Event::Data(id, _) if *id == stuck)).count();
    assert!(before <= 1, "it had its turn after {before} of the other's");
    // A window that is given back is what was consumed, and no more.
    guest.mux().consumed(stuck, 1000);
    assert_eq!(carry(&mut guest, &mut node, 4096).expect("carried"), [Event::Acknowledged(stuck, 1000)]);
    assert_eq!(node.mux().room(stuck), 1000);
    guest.mux().consumed(stuck, u32::MAX);
    carry(&mut guest, &mut node, 4096).expect("carried");
    assert_eq!(node.mux().room(stuck), WINDOW as usize);
    // An end waits for what was written; a reset for nothing.
    node.mux().write(other, b"last");
    node.mux().end(other);
    assert_eq!(node.mux().write(other, b"more"), 0);
    node.mux().reset(stuck, 5);
    let events = carry(&mut node, &mut guest, 4096).expect("carried");
    assert_eq!(events, [Event::Reset(stuck, 5), Event::Data(other, b"last".to_vec()), Event::Ended(other)]);
    // What the other side sends before it knows is no offence.
    guest.mux().write(stuck, b"late");
    assert_eq!(carry(&mut guest, &mut node, 4096).expect("carried"), []);
}

#[test]
fn what_no_honest_peer_sends() {
    let node = || Mux::new(Side::Node);
    let tell = |mux: &mut Mux, frames: &[Frame]| {
        let mut bytes = Vec::new();
        frames.iter().for_each(|f| f.write(&mut bytes));
        mux.input(&bytes, &mut Vec::new())
    };
    let data = |id, n: usize| Frame::Data(id, vec![0; n]);
    let open = |id| Frame::Open(id, Vec::new());
    let cases: [(&[Frame], MuxError); 9] = [
        (&[data(2, 1)], MuxError::Unknown(2)),
        (&[open(0)], MuxError::Unknown(0)),
        (&[open(1)], MuxError::Unknown(1)),
        (&[open(4), open(4)], MuxError::Unknown(4)),
        (&[open(4), open(2)], MuxError::Unknown(2)),
        (&[Frame::Reset(0, 1)], MuxError::Unknown(0)),
        (&[open(2), Frame::End(2), data(2, 1)], MuxError::AfterEnd(2)),
        (&[open(2), Frame::End(2), Frame::End(2)], MuxError::AfterEnd(2)),
        (&[open(2), Frame::Window(2, 1)], MuxError::Window(2)),
    ];
    for (frames, expected) in cases {
        assert_eq!(tell(&mut node(), frames), Err(expected), "{frames:?}");
    }
    let mut full = vec![open(2)];
    full.extend((0..4).map(|_| data(2, WINDOW as usize / 4)));
    let mut mux = node();
    assert_eq!(tell(&mut mux, &full), Ok(()));
    assert_eq!(tell(&mut mux, &[data(2, 1)]), Err(MuxError::Overrun(2)));
    let many: Vec<Frame> = (1..=MAX_STREAMS as u32 + 1).map(|n| open(2 * n)).collect();
    assert_eq!(tell(&mut node(), &many), Err(MuxError::TooMany));
    assert_eq!(tell(&mut node(), &[(); 17].map(|()| Frame::Ping(1))), Err(MuxError::Pings));
}

/// What one side does.
#[derive(Debug, Clone)]
enum Act {
    Open(Side),
    /// To one of the streams that are there, so many bytes.
    Write(Side, usize, usize),
    /// Is done with so much of what came.
    Consume(Side, usize, u32),
    End(Side, usize),
    /// The wire carries all that waits, in pieces.
    Carry(Side, usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let side = || prop_oneof![Just(Side::Node), Just(Side::Guest)];
    let act = prop_oneof![
        side().prop_map(Act::Open),
        (side(), 0..8usize, 0..100_000usize).prop_map(|(s, i, n)| Act::Write(s, i, n)),
        (side(), 0..8usize, 0..100_000u32).prop_map(|(s, i, n)| Act::Consume(s, i, n)),
        (side(), 0..8usize).prop_map(|(s, i)| Act::End(s, i)),
        (side(), 1..5000usize).prop_map(|(s, n)| Act::Carry(s, n)),
    ];
    proptest::collection::vec(act, 0..60)
}

/// A side, what it has written and what it has got, by stream.
struct Party {
    connection: Connection,
    streams: Vec<StreamId>,
    wrote: BTreeMap<StreamId, Vec<u8>>,
    got: BTreeMap<StreamId, Vec<u8>>,
    ended: Vec<StreamId>,
    next: u8,
}

impl Party {
    fn new(connection: Connection) -> Self {
        let streams = vec![StreamId::CONTROL];
        Self { connection, streams, wrote: BTreeMap::new(), got: BTreeMap::new(), ended: Vec::new(), next: 0 }
    }

    fn stream(&self, index: usize) -> StreamId {
        self.streams[index % self.streams.len()]
    }

    fn take(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::Opened(id, _) => self.streams.push(id),
                Event::Data(id, data) => self.got.entry(id).or_default().extend(data),
                Event::Ended(id) => self.ended.push(id),
                _ => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_is_written_arrives_in_order_whatever_happens(acts in acts()) {
        let (node, guest) = pair();
        let mut parties = [Party::new(node), Party::new(guest)];
        let at = |side: Side| usize::from(side == Side::Guest);
        let mut finished: Vec<(usize, StreamId)> = Vec::new();
        for act in acts {
            match act {
                Act::Open(side) => {
                    let id = parties[at(side)].connection.mux().open(b"x");
                    parties[at(side)].streams.extend(id);
                }
                Act::Write(side, index, count) => {
                    let party = &mut parties[at(side)];
                    let id = party.stream(index);
                    let bytes: Vec<u8> = (0..count).map(|_| { party.next = party.next.wrapping_mul(5).wrapping_add(3); party.next }).collect();
                    let room = party.connection.mux().room(id);
                    let taken = party.connection.mux().write(id, &bytes);
                    prop_assert!(taken <= room && taken <= WINDOW as usize);
                    party.wrote.entry(id).or_default().extend(&bytes[..taken]);
                }
                Act::Consume(side, index, count) => {
                    let id = parties[at(side)].stream(index);
                    parties[at(side)].connection.mux().consumed(id, count);
                }
                Act::End(side, index) => {
                    let id = parties[at(side)].stream(index);
                    parties[at(side)].connection.mux().end(id);
                    finished.push((at(side), id));
                }
                Act::Carry(side, piece) => {
                    let [a, b] = &mut parties;
                    let (from, to) = if side == Side::Node { (a, b) } else { (b, a) };
                    let events = carry(&mut from.connection, &mut to.connection, piece).expect("honest");
                    to.take(events);
                }
            }
        }
        // In the end all of it is carried and consumed, and every window is whole again.
        for _ in 0..4 {
            for (from, to) in [(0, 1), (1, 0)] {
                let [a, b] = &mut parties;
                let (x, y) = if from == 0 { (&mut *a, &mut *b) } else { (&mut *b, &mut *a) };
                let events = carry(&mut x.connection, &mut y.connection, 1000).expect("honest");
                y.take(events);
                let streams = parties[to].streams.clone();
                streams.iter().for_each(|id| parties[to].connection.mux().consumed(*id, u32::MAX));
            }
        }
        for (from, to) in [(0, 1), (1, 0)] {
            let sent: BTreeMap<_, _> = parties[from].wrote.iter().filter(|(_, b)| !b.is_empty()).collect();
            prop_assert_eq!(sent, parties[to].got.iter().collect::<BTreeMap<_, _>>());
            for id in parties[from].streams.clone() {
                let ended = finished.contains(&(from, id));
                prop_assert_eq!(parties[from].connection.mux().room(id), if ended { 0 } else { WINDOW as usize });
                prop_assert_eq!(parties[to].ended.iter().filter(|e| **e == id).count(), usize::from(ended));
            }
            prop_assert!(!parties[from].connection.mux().has_output());
        }
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), piece in 1..50usize) {
        let (_, mut guest) = pair();
        for side in [&mut connection(Side::Node, 1), &mut connection(Side::Guest, 1), &mut guest] {
            let _ = bytes.chunks(piece).try_for_each(|p| side.input(p).map(drop));
            let _ = side.output();
        }
        let mut mux = Mux::new(Side::Guest);
        let _ = mux.input(&bytes, &mut Vec::new());
    }
}
