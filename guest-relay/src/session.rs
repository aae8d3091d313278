//! One connection to a guest: records out and in, calls and their answers.
//!
//! Owned by the link. Fails on whatever no honest guest does, and when it says nothing for too long; the connection is of no use then.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use lxcri_guest_proto::v1::{self, call::Call as Op};
use lxcri_guest_proto::{Event, Side, StreamId, Talk, mux::Mux};
use lxcri_monitor_proto::v1 as monitor_v1;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::target::Target;

/// A guest that says nothing for so long is asked whether it is there, and is given up after as much again without an answer.
pub const SILENCE: Duration = Duration::from_secs(20);
/// Bytes read at once, and so often before others have their turn.
const BUFFER: usize = 16 * 1024;
const READS: usize = 16;
/// Bytes of calls that wait to be sent.
const CALLS_MAX: usize = 16 * 1024 * 1024;

/// Why a connection is over.
pub type End = String;

/// A connection to a guest.
pub struct Session {
    socket: OwnedFd,
    talk: Talk,
    /// The last call's id.
    last: u64,
    heard: Instant,
    /// It was asked whether it is there.
    asked: bool,
}

impl Session {
    /// Of a connected socket.
    pub fn new(socket: OwnedFd, target: &Target) -> Result<Self, End> {
        Ok(Self {
            socket,
            talk: Talk::new(Side::Node, &target.secret).map_err(|e| e.to_string())?,
            last: 0,
            heard: Instant::now(),
            asked: false,
        })
    }

    /// The guest has proved who it is.
    pub fn is_up(&self) -> bool {
        self.talk.is_up()
    }

    /// What is to be waited for.
    pub fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        let out = if self.talk.is_sending() { PollFlags::OUT } else { PollFlags::empty() };
        (self.socket.as_fd(), PollFlags::IN | out)
    }

    /// When [`Self::look_for_life`] has work.
    pub fn timer(&self) -> Instant {
        self.heard + if self.asked { 2 * SILENCE } else { SILENCE }
    }

    /// The streams.
    pub fn mux(&mut self) -> &mut Mux {
        self.talk.mux()
    }

    /// Whether more calls can wait.
    pub fn has_room(&self) -> bool {
        self.talk.waiting() < CALLS_MAX
    }

    /// Makes a call; its id.
    pub fn call(&mut self, op: Op) -> Result<u64, End> {
        let call = v1::Call { id: self.last + 1, call: Some(op) };
        self.talk.say(&call).map_err(|e| e.to_string())?;
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

    /// Takes what came; events of streams go into `all`.
    pub fn receive(&mut self, all: &mut Vec<Event>) -> Result<(), End> {
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
            for event in self.talk.input(&buffer[..count]).map_err(|e| format!("{e}: {}", innermost(&e)))? {
                match event {
                    // Only the node opens streams; each would have to be refused by a frame that waits to be sent.
                    Event::Opened(..) => return Err("it opens a stream".into()),
                    Event::Ended(StreamId::CONTROL) => return Err("it has nothing more to say".into()),
                    event => all.push(event),
                }
            }
        }
        Ok(())
    }

    /// The next answer, or event of the monitor.
    pub fn answer(&mut self) -> Result<Option<v1::Answer>, End> {
        self.talk.take().map_err(|e| e.to_string())
    }

    /// Fails when the guest has said nothing for too long.
    pub fn look_for_life(&mut self, now: Instant) -> Result<(), End> {
        let silent = now.saturating_duration_since(self.heard);
        if silent >= 2 * SILENCE {
            return Err(format!("it says nothing for {} s", silent.as_secs()));
        }
        if silent >= SILENCE && !std::mem::replace(&mut self.asked, true) {
            self.talk.mux().ping(1);
        }
        Ok(())
    }

    /// Sends what can be sent now; whether something was.
    pub fn send(&mut self) -> Result<bool, End> {
        let mut sent = false;
        loop {
            let bytes = self.talk.output().map_err(|e| e.to_string())?;
            if bytes.is_empty() {
                return Ok(sent);
            }
            match rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => self.talk.sent(n),
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

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn a_guest_that_says_nothing_is_asked_and_then_given_up() {
        let bytes = format!(r#"{{"address":"192.0.2.1:1","secret":"{}","log_dir":"/l"}}"#, "01".repeat(32));
        let target = Target::parse(zeroize::Zeroizing::new(bytes.into_bytes())).expect("a target");
        let (socket, _other) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("sockets");
        let mut session = Session::new(socket, &target).expect("a session");
        let heard = session.heard;
        assert_eq!(session.timer(), heard + SILENCE);
        session.look_for_life(heard + SILENCE / 2).expect("not yet");
        assert!(!session.mux().has_output());
        session.look_for_life(heard + SILENCE).expect("asked");
        assert!(session.mux().has_output() && session.timer() == heard + 2 * SILENCE);
        assert_eq!(session.look_for_life(heard + 2 * SILENCE).expect_err("given up"), "it says nothing for 40 s");
    }
}
