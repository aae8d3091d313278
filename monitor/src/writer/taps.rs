//! Attached clients of the log writer: pipes into which output is copied as it is read.
//!
//! Part of the writer's thread. No client is waited for: one whose pipe is full is cut off. A crash closes the pipes.

use std::os::fd::OwnedFd;

use rustix::event::epoll;
use rustix::io::Errno;

use super::{Log, LogId, Report, Stream, Thread};

/// An attached client's pipe.
pub(super) struct Tap {
    client: u64,
    stream: Stream,
    to: OwnedFd,
    token: u64,
}

impl Thread {
    pub(super) fn attach(&mut self, id: LogId, client: u64, to: Vec<(Stream, OwnedFd)>) {
        let mut taps = Vec::with_capacity(to.len());
        for (stream, to) in to {
            let token = self.next_token;
            self.next_token += 1;
            // No event is asked for: that its other end is closed is always told.
            let _ = epoll::add(&self.epoll, &to, epoll::EventData::new_u64(token), epoll::EventFlags::empty());
            taps.push(Tap { client, stream, to, token });
        }
        self.report(Report::Attached(client));
        match self.logs.get_mut(&id) {
            Some(log) => log.taps.append(&mut taps),
            None => return self.end_taps(taps),
        }
        self.end_dry_taps(id);
    }

    /// Copies output to the clients. One whose pipe is full is cut off.
    pub(super) fn copy(&mut self, id: LogId, stream: Stream, input: &[u8]) {
        let Some(log) = self.logs.get_mut(&id).filter(|log| !log.taps.is_empty()) else { return };
        let mut cut = Vec::new();
        for tap in log.taps.iter().filter(|t| t.stream == stream) {
            match rustix::io::write(&tap.to, input) {
                Ok(n) if n == input.len() => {}
                Ok(_) | Err(Errno::AGAIN) => cut.push((tap.client, true)),
                Err(_) => cut.push((tap.client, false)),
            }
        }
        for (client, lagged) in cut {
            self.cut(id, client, lagged);
        }
    }

    /// Ends a client: both of its streams.
    fn cut(&mut self, id: LogId, client: u64, lagged: bool) {
        let Some(log) = self.logs.get_mut(&id) else { return };
        let (gone, kept): (Vec<_>, Vec<_>) = log.taps.drain(..).partition(|t| t.client == client);
        log.taps = kept;
        // Told first, so that whoever sees the end of a pipe can know why.
        self.report(Report::AttachOver(client, lagged));
        self.close(gone);
    }

    /// The other end of a client's pipe was closed.
    pub(super) fn left(&mut self, token: u64) {
        let find = |(id, log): (&LogId, &Log)| Some((*id, log.taps.iter().find(|t| t.token == token)?.client));
        if let Some((id, client)) = self.logs.iter().find_map(find) {
            self.cut(id, client, false);
        }
    }

    /// Ends the clients' streams that nothing will come from any more.
    pub(super) fn end_dry_taps(&mut self, id: LogId) {
        let Some(log) = self.logs.get_mut(&id) else { return };
        let dry = |t: &Tap| !log.sources.iter().any(|s| s.stream == t.stream);
        if log.taps.iter().any(dry) {
            let (dry, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut log.taps).into_iter().partition(dry);
            log.taps = kept;
            self.end_taps_beside(id, dry);
        }
    }

    pub(super) fn end_taps(&mut self, taps: Vec<Tap>) {
        self.end_taps_beside(0, taps);
    }

    /// Closes pipes; clients of the log that have no other are over.
    fn end_taps_beside(&mut self, id: LogId, taps: Vec<Tap>) {
        let mut over: Vec<u64> = taps.iter().map(|t| t.client).collect();
        over.sort_unstable();
        over.dedup();
        if let Some(log) = self.logs.get(&id) {
            over.retain(|client| !log.taps.iter().any(|t| t.client == *client));
        }
        over.into_iter().for_each(|client| self.report(Report::AttachOver(client, false)));
        self.close(taps);
    }

    /// Ends all clients of a log.
    pub(super) fn detach(&mut self, id: LogId) {
        if let Some(log) = self.logs.get_mut(&id) {
            let taps = std::mem::take(&mut log.taps);
            self.end_taps(taps);
        }
    }

    fn close(&self, taps: Vec<Tap>) {
        for tap in taps {
            let _ = epoll::delete(&self.epoll, &tap.to);
        }
    }
}
