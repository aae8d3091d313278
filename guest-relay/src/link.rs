//! The connection to the guest: made again and again while it is needed, until both sides know each other.
//!
//! Owned by the relay, which asks what is to be waited for and has done what can be done; nothing here waits. An attempt has little time,
//! for there are networks that accept a connection before the guest listens. What the guest says is not trusted: every failure ends
//! the connection, and the next one begins anew.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use lxcri_guest_proto::v1::{self, answer::Answer as Body, call::Call as Op};
use lxcri_guest_proto::{Connection, Event, Side, StreamId, calls, mux::Mux};
use lxcri_monitor_proto::v1 as monitor_v1;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

use crate::target::Target;

/// Time for a connection, until the guest has proved who it is.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Time for it to tell what runs in it.
const HELLO: Duration = Duration::from_secs(10);
/// First and longest pause between attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// A guest that says nothing for so long is asked whether it is there, and is given up after as much again without an answer.
const SILENCE: Duration = Duration::from_secs(20);
/// Bytes read at once, and so often before others have their turn.
const BUFFER: usize = 16 * 1024;
const READS: usize = 16;
/// Bytes of calls that wait to be sent.
const CALLS_MAX: usize = 16 * 1024 * 1024;

/// Why a connection is over.
pub type End = String;

/// What a guest says of itself.
pub struct Greeting {
    /// Of its run and its folders.
    pub hello: v1::HelloAnswer,
    /// Its containers.
    pub monitor: monitor_v1::HelloReply,
}

enum State {
    Off {
        again: Instant,
    },
    Connecting {
        socket: OwnedFd,
        until: Instant,
    },
    /// Until it has told what runs in it.
    Meeting {
        session: Box<Session>,
        until: Instant,
        hello: Option<v1::HelloAnswer>,
    },
    Ready(Box<Session>),
}

/// The connection, or the way to it.
pub struct Link {
    state: State,
    failures: u32,
    /// Why the last one ended.
    why: End,
}

/// What has happened.
pub enum News {
    /// Both know each other.
    Ready(Greeting),
    /// Of a stream.
    Stream(Event),
    /// An answer, or an event of the monitor.
    Answer(v1::Answer),
    /// It is over, and was ready.
    Lost(End),
}

impl Link {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { state: State::Off { again: Instant::now() }, failures: 0, why: "not tried yet".into() }
    }

    /// Calls can be made, and streams opened.
    pub fn session(&mut self) -> Option<&mut Session> {
        match &mut self.state {
            State::Ready(session) => Some(session),
            _ => None,
        }
    }

    /// Why there is none.
    pub fn why(&self) -> &str {
        &self.why
    }

    /// The next attempt is made later: there is nothing to connect to now.
    pub fn postpone(&mut self, why: End) {
        if let State::Off { again } = &mut self.state {
            *again = Instant::now() + PAUSE.1;
            self.why = why;
        }
    }

    /// Ends it, for a reason on this side; the next attempt is made at once. True: it was ready.
    pub fn drop_it(&mut self, why: End) -> bool {
        let was = matches!(self.state, State::Ready(_));
        self.state = State::Off { again: Instant::now() };
        (self.failures, self.why) = (0, why);
        was
    }

    fn failed(&mut self, why: End) -> Option<News> {
        let was_ready = matches!(self.state, State::Ready(_));
        let pause = if was_ready {
            self.failures = 0;
            Duration::ZERO
        } else {
            let pause = PAUSE.0 * 2u32.saturating_pow(self.failures.min(10));
            self.failures += 1;
            pause.min(PAUSE.1)
        };
        self.state = State::Off { again: Instant::now() + pause };
        self.why.clone_from(&why);
        was_ready.then_some(News::Lost(why))
    }

    /// What is to be waited for.
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match &self.state {
            State::Off { .. } => None,
            State::Connecting { socket, .. } => Some((socket.as_fd(), PollFlags::OUT)),
            State::Meeting { session, .. } | State::Ready(session) => {
                let out = if session.done < session.out.len() { PollFlags::OUT } else { PollFlags::empty() };
                Some((session.socket.as_fd(), PollFlags::IN | out))
            }
        }
    }

    /// When [`Self::step`] has work, whatever comes; `wanted`: a connection is needed.
    pub fn timer(&self, wanted: bool) -> Option<Instant> {
        match &self.state {
            State::Off { again } => wanted.then_some(*again),
            State::Connecting { until, .. } | State::Meeting { until, .. } => Some(*until),
            State::Ready(session) => Some(session.heard + if session.asked { 2 * SILENCE } else { SILENCE }),
        }
    }

    /// The next attempt is due.
    pub fn is_due(&self) -> bool {
        matches!(self.state, State::Off { again } if again <= Instant::now())
    }

    /// Begins an attempt.
    pub fn begin(&mut self, target: &Target) {
        match connect(target.address) {
            Ok(socket) => self.state = State::Connecting { socket, until: Instant::now() + ATTEMPT },
            Err(e) => drop(self.failed(format!("connect to {}: {e}", target.address))),
        }
    }

    /// Does all that can be done now with what came.
    pub fn step(&mut self, target: &Target, news: &mut Vec<News>) {
        if let Err(why) = self.try_step(target, news) {
            news.extend(self.failed(format!("the guest at {}: {why}", target.address)));
        }
    }

    fn try_step(&mut self, target: &Target, news: &mut Vec<News>) -> Result<(), End> {
        let now = Instant::now();
        if let State::Connecting { socket, until } = &self.state {
            if !is_connected(socket).map_err(|e| e.to_string())? {
                return if *until <= now { Err("no connection in time".into()) } else { Ok(()) };
            }
            let (until, old) = (*until, std::mem::replace(&mut self.state, State::Off { again: now }));
            let State::Connecting { socket, .. } = old else { return Ok(()) };
            keep_alive(&socket).map_err(|e| e.to_string())?;
            let session = Box::new(Session::new(socket, target)?);
            self.state = State::Meeting { session, until, hello: None };
        }
        if let State::Meeting { session, until, hello } = &mut self.state {
            let was_up = session.connection.is_up();
            session.receive(&mut Vec::new())?;
            if session.connection.is_up() && !was_up {
                *until = now + HELLO;
                session.call(Op::Hello(v1::Hello {}))?;
                session
                    .ask(monitor_v1::request::Op::Hello(monitor_v1::Hello { version: lxcri_monitor_proto::VERSION }))?;
            }
            while let Some(answer) = session.answer()? {
                match answer.answer {
                    Some(Body::Hello(said)) if answer.id == 1 && hello.is_none() => *hello = Some(checked(said)?),
                    Some(Body::Monitor(reply)) if answer.id == 2 => {
                        let Some(monitor_v1::reply::Body::Hello(monitor)) = reply.body else {
                            return Err("its monitor does not say what runs".into());
                        };
                        let hello = hello.take().ok_or("it does not say who it is")?;
                        let old = std::mem::replace(&mut self.state, State::Off { again: now });
                        let State::Meeting { session, .. } = old else { return Ok(()) };
                        self.state = State::Ready(session);
                        self.failures = 0;
                        news.push(News::Ready(Greeting { hello, monitor }));
                        break;
                    }
                    Some(Body::Error(error)) => {
                        return Err(format!("it refuses to say what runs: {}", short(&error.message)));
                    }
                    // Events of before.
                    _ => {}
                }
            }
            if let State::Meeting { session, until, .. } = &mut self.state {
                session.send()?;
                return if *until <= now { Err("it does not answer".into()) } else { Ok(()) };
            }
        }
        let State::Ready(session) = &mut self.state else { return Ok(()) };
        let mut events = Vec::new();
        session.receive(&mut events)?;
        news.extend(events.into_iter().map(News::Stream));
        while let Some(answer) = session.answer()? {
            news.push(News::Answer(answer));
        }
        session.look_for_life(now)
    }

    /// Sends what there is. True: something was sent.
    pub fn send(&mut self, target: &Target, news: &mut Vec<News>) -> bool {
        let State::Ready(session) = &mut self.state else { return false };
        match session.send() {
            Ok(sent) => sent,
            Err(why) => {
                news.extend(self.failed(format!("the guest at {}: {why}", target.address)));
                false
            }
        }
    }
}

/// What a guest says is shown to people.
pub fn short(text: &str) -> &str {
    &text[..text.floor_char_boundary(1024)]
}

/// Its words are put into paths of requests that go back to it, and compared.
fn checked(hello: v1::HelloAnswer) -> Result<v1::HelloAnswer, End> {
    let path = |p: &str| Path::new(p).is_absolute() && p.len() <= 1024;
    let boot = (1..=64).contains(&hello.boot_id.len())
        && hello.boot_id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if path(&hello.run_dir) && path(&hello.data_dir) && boot {
        Ok(hello)
    } else {
        Err("what it says of itself is nonsense".into())
    }
}

fn connect(address: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(e) => Err(e),
    }
}

fn is_connected(socket: &OwnedFd) -> rustix::io::Result<bool> {
    sockopt::socket_error(socket)??;
    match rustix::net::getpeername(socket) {
        Ok(_) => Ok(true),
        Err(Errno::NOTCONN) => Ok(false),
        Err(e) => Err(e),
    }
}

fn keep_alive(socket: &OwnedFd) -> rustix::io::Result<()> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_tcp_user_timeout(socket, 3 * u32::try_from(SILENCE.as_millis()).unwrap_or(u32::MAX / 3))
}

/// A connection to a guest.
pub struct Session {
    socket: OwnedFd,
    connection: Connection,
    /// A record on its way out, and how much of it is out.
    out: Vec<u8>,
    done: usize,
    answers: calls::Reader,
    /// Bytes of answers that came and are not taken yet.
    held: u32,
    calls: VecDeque<u8>,
    last: u64,
    heard: Instant,
    /// It was asked whether it is there.
    asked: bool,
}

impl Session {
    fn new(socket: OwnedFd, target: &Target) -> Result<Self, End> {
        Ok(Self {
            socket,
            connection: Connection::new(Side::Node, &target.secret).map_err(|e| e.to_string())?,
            out: Vec::new(),
            done: 0,
            answers: calls::Reader::default(),
            held: 0,
            calls: VecDeque::new(),
            last: 0,
            heard: Instant::now(),
            asked: false,
        })
    }

    /// The streams.
    pub fn mux(&mut self) -> &mut Mux {
        self.connection.mux()
    }

    /// Whether more calls can wait.
    pub fn has_room(&self) -> bool {
        self.calls.len() < CALLS_MAX
    }

    /// Makes a call; its id.
    pub fn call(&mut self, op: Op) -> Result<u64, End> {
        let call = v1::Call { id: self.last + 1, call: Some(op) };
        self.calls.extend(calls::frame(&call).map_err(|e| e.to_string())?);
        self.last += 1;
        Ok(self.last)
    }

    /// Asks the guest's monitor.
    pub fn ask(&mut self, op: monitor_v1::request::Op) -> Result<u64, End> {
        self.ask_with(op, Vec::new())
    }

    /// The same, with streams in the place of descriptors.
    pub fn ask_with(&mut self, op: monitor_v1::request::Op, descriptors: Vec<u32>) -> Result<u64, End> {
        let request = Some(monitor_v1::Request { id: self.last + 1, op: Some(op) });
        self.call(Op::Monitor(v1::MonitorCall { request, descriptors }))
    }

    fn receive(&mut self, all: &mut Vec<Event>) -> Result<(), End> {
        let mut buffer = [0; BUFFER];
        for _ in 0..READS {
            let count = match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err("closed by the guest".into()),
                Ok((n, _)) => n,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e.to_string()),
            };
            (self.heard, self.asked) = (Instant::now(), false);
            for event in self.connection.input(&buffer[..count]).map_err(|e| format!("{e}: {}", innermost(&e)))? {
                match event {
                    Event::Data(StreamId::CONTROL, data) => {
                        self.held += u32::try_from(data.len()).unwrap_or_default();
                        self.answers.input(&data);
                    }
                    // Only the node opens streams; each would have to be refused by a frame that waits to be sent.
                    Event::Opened(..) => return Err("it opens a stream".into()),
                    Event::Ended(StreamId::CONTROL) => return Err("it has nothing more to say".into()),
                    event => all.push(event),
                }
            }
        }
        Ok(())
    }

    fn answer(&mut self) -> Result<Option<v1::Answer>, End> {
        let answer = self.answers.take::<v1::Answer>().map_err(|e| e.to_string())?;
        if answer.is_none() {
            // One that is not whole yet is longer than what may be under way.
            self.connection.mux().consumed(StreamId::CONTROL, std::mem::take(&mut self.held));
        }
        Ok(answer)
    }

    fn look_for_life(&mut self, now: Instant) -> Result<(), End> {
        let silent = now.saturating_duration_since(self.heard);
        if silent >= 2 * SILENCE {
            return Err(format!("it says nothing for {} s", silent.as_secs()));
        }
        if silent >= SILENCE && !std::mem::replace(&mut self.asked, true) {
            self.connection.mux().ping(1);
        }
        Ok(())
    }

    /// Whether something was sent.
    fn send(&mut self) -> Result<bool, End> {
        let mut sent = false;
        loop {
            while !self.calls.is_empty() {
                let count = self.connection.mux().write(StreamId::CONTROL, self.calls.as_slices().0);
                if count == 0 {
                    break;
                }
                self.calls.drain(..count);
            }
            if self.calls.is_empty() && self.calls.capacity() > 0 {
                self.calls = VecDeque::new();
            }
            if self.done == self.out.len() {
                self.done = 0;
                self.out = match self.connection.output().map_err(|e| e.to_string())? {
                    Some(record) => record,
                    None => {
                        self.out = Vec::new();
                        return Ok(sent);
                    }
                };
            }
            match rustix::net::send(&self.socket, &self.out[self.done..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => self.done += n,
                Err(Errno::AGAIN) => return Ok(sent),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.to_string()),
            }
            sent = true;
        }
    }
}

/// The innermost reason.
fn innermost(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |e| e.source()).last().map(ToString::to_string).unwrap_or_default()
}
