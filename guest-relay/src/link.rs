//! The connection to the guest: made again and again while it is needed, until both sides know each other.
//!
//! Owned by the relay, which asks what is to be waited for and has done what can be done; nothing here waits. An attempt has little time,
//! for there are networks that accept a connection before the guest listens. What the guest says is not trusted: every failure ends
//! the connection, and the next one begins anew.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use lxcri_guest_proto::Event;
use lxcri_guest_proto::v1::{self, answer::Answer as Body, call::Call as Op};
use lxcri_monitor_proto::v1 as monitor_v1;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::session::{End, SILENCE, Session};
use crate::target::Target;

/// Time for a connection, until the guest has proved who it is.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Time for it to tell what runs in it.
const HELLO: Duration = Duration::from_secs(10);
/// First and longest pause between attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

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
            State::Meeting { session, .. } | State::Ready(session) => Some(session.interest()),
        }
    }

    /// When [`Self::step`] has work, whatever comes; `wanted`: a connection is needed.
    pub fn timer(&self, wanted: bool) -> Option<Instant> {
        match &self.state {
            State::Off { again } => wanted.then_some(*again),
            State::Connecting { until, .. } | State::Meeting { until, .. } => Some(*until),
            State::Ready(session) => Some(session.timer()),
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
            let was_up = session.is_up();
            session.receive(&mut Vec::new())?;
            if session.is_up() && !was_up {
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
