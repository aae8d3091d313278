//! What the server waits for: descriptors with a name each.
//!
//! Fails with the system call; a token of something that is gone names nothing and is skipped.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
pub use rustix::event::epoll::EventFlags;
use rustix::io::{Errno, Result};

use crate::trim::Code;

/// Something that became ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A daemon connects.
    Listener,
    /// A child ended.
    Children,
    /// The log writer has reports.
    Writer,
    /// A request; the connection's token.
    Connection,
    /// Bytes can be copied.
    Relay,
    /// The container of this log has an event in its memory cgroup.
    Memory(u64),
    /// This process, which is not our child, ended or was reaped.
    Foreign(i32),
}

/// Without an event for this long, the pod is quiet.
const QUIET: Duration = Duration::from_secs(1);

/// The set.
pub struct Poll {
    /// Found when it is quiet for the first time.
    code: Option<Code>,
    /// Nothing has happened since the code's memory was given back.
    quiet: bool,
    epoll: OwnedFd,
    next: u64,
    sources: BTreeMap<u64, Source>,
    ready: Vec<epoll::Event>,
}

impl Poll {
    /// An empty set.
    pub fn new() -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { code: None, quiet: false, epoll, next: 0, sources: BTreeMap::new(), ready: Vec::with_capacity(16) })
    }

    /// A new name for `source`, watched by nothing yet. Never used twice.
    pub fn token(&mut self, source: Source) -> u64 {
        self.next += 1;
        self.sources.insert(self.next, source);
        self.next
    }

    /// Watches `fd` under a token.
    pub fn watch(&self, fd: impl AsFd, token: u64, flags: EventFlags) -> Result<()> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags)
    }

    /// Changes what is watched.
    pub fn rewatch(&self, fd: impl AsFd, token: u64, flags: EventFlags) -> Result<()> {
        epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(token), flags)
    }

    /// Ends watching; call it before closing `fd`.
    pub fn unwatch(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Forgets a token.
    pub fn forget(&mut self, token: u64) {
        self.sources.remove(&token);
    }

    /// Token and descriptor at once.
    pub fn add(&mut self, fd: impl AsFd, source: Source, flags: EventFlags) -> Result<u64> {
        let token = self.token(source);
        let done = self.watch(fd, token, flags);
        if done.is_err() {
            self.forget(token);
        }
        done.map(|()| token)
    }

    /// Waits until something is ready or the time is up.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Vec<(u64, Source)>> {
        // Rounded up: a timer that is waited for is due when we wake.
        let timeout = timeout.map(|t| t + Duration::from_millis(1));
        let first = match timeout {
            _ if self.quiet => timeout,
            Some(timeout) if timeout <= QUIET => Some(timeout),
            _ => Some(QUIET),
        };
        self.ready.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut self.ready), first.map(timespec).as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
        if !self.ready.is_empty() {
            self.quiet = false;
        } else if first != timeout {
            let code = self.code.get_or_insert_with(Code::find);
            self.quiet = true;
            let rest = timeout.map(|t| timespec(t.saturating_sub(QUIET)));
            let mut events = [const { MaybeUninit::uninit() }; 16];
            match code.sleep(self.epoll.as_fd(), &mut events, rest.as_ref()) {
                Ok(events) => {
                    self.quiet = events.is_empty();
                    self.ready.extend_from_slice(events);
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(e),
            }
        }
        let named = |event: &epoll::Event| {
            let token = event.data.u64();
            Some((token, *self.sources.get(&token)?))
        };
        Ok(self.ready.iter().filter_map(named).collect())
    }

    /// Whether the token still names something.
    pub fn knows(&self, token: u64) -> bool {
        self.sources.contains_key(&token)
    }
}

fn timespec(time: Duration) -> rustix::time::Timespec {
    rustix::time::Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) }
}
