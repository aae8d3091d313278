//! Containers' logs on their way: streams of the guest's, opened where the node's files are, written, and ended with their containers.
//!
//! Called by the relay. What the guest can't send is said once, and is then no reason to wait; what the node can't write waits in the guest.
//! A crash leaves positions ([`crate::log`]).

use std::time::{Duration, Instant};

use lxcri_guest_proto::StreamId;
use lxcri_guest_proto::v1::{self as guest_v1, EndLog, Purpose, ResetCode, call::Call, purpose};
use lxcri_monitor_proto::v1::{self, reply::Body};
use prost::Message;
use proxmox_lxcri_monitor::failure::{Failure, Result};

use crate::log::Wrote;
use crate::requests::Pending;
use crate::server::Relay;
use crate::store::{Phase, Record};

/// A log that the guest can't send now is asked for again after this time.
const AGAIN: Duration = Duration::from_secs(1);

impl Relay {
    /// Asks for the log from where it is, unless that was done.
    pub fn open_log(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Record { log_over, .. } = container.record;
        let (Some(log), None, false) = (&container.log, container.stream, log_over) else { return };
        if container.record.phase() == Phase::Creating {
            return;
        }
        container.again = None;
        let Some(session) = self.link.session() else { return };
        let purpose = purpose::Purpose::Log(guest_v1::Log { container_id: id.into(), from: log.position() });
        let Some(stream) = session.mux().open(&Purpose { purpose: Some(purpose) }.encode_to_vec()) else {
            container.again = Some(Instant::now() + AGAIN);
            return;
        };
        // Nothing is said of it.
        session.mux().end(stream);
        container.stream = Some(stream);
        self.logs.insert(stream, id.to_owned());
        if container.record.phase() >= Phase::Ended || container.deleted {
            self.end_log(id);
        }
    }

    /// Nothing more is written to it: its end is to come.
    pub fn end_log(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let (Some(stream), false) = (container.stream, container.ending) else { return };
        container.ending = true;
        let stream = stream.number();
        let _ = self.call(Call::EndLog(EndLog { stream }), Pending::EndLog(id.into(), stream));
    }

    /// Bytes of a stream that is no descriptor.
    pub fn log_data(&mut self, stream: StreamId, data: &[u8]) {
        let id = self.logs.get(&stream);
        if let Some(log) = id.and_then(|id| self.containers.get_mut(id)).and_then(|c| c.log.as_mut()) {
            log.input(data);
        }
    }

    /// All of it has come.
    pub fn log_stream_ended(&mut self, stream: StreamId) {
        if let Some(container) = self.logs.get(&stream).and_then(|id| self.containers.get_mut(id)) {
            container.ended = true;
        }
    }

    /// The guest sends no more of it.
    pub fn log_stream_reset(&mut self, stream: StreamId, code: u32) {
        let Some(id) = self.logs.remove(&stream) else { return };
        let Some(container) = self.containers.get_mut(&id) else { return };
        (container.stream, container.ending) = (None, false);
        if let Some(log) = &mut container.log {
            log.forget_partial();
        }
        match ResetCode::try_from(u32::cast_signed(code)) {
            // It is another guest's, or the node's position is an old one: nobody can tell what is missing.
            Ok(ResetCode::ResetGone | ResetCode::ResetInvalid) => {
                let message = "the guest has not the part of the log that is missing here: it ends".into();
                self.log_trouble(&id, message);
                self.log_is_over(&id);
            }
            _ => container.again = Some(Instant::now() + AGAIN),
        }
    }

    /// The guest knows no end of a log that it was asked for.
    pub fn log_has_no_end(&mut self, id: &str) {
        if let Some(container) = self.containers.get_mut(id)
            && container.ending
        {
            // It has sent all of it, or has reset the stream, which is told otherwise.
            container.ended |= container.stream.is_some();
        }
    }

    /// Nothing more comes of it.
    pub fn log_is_over(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else { return };
        if let Some(stream) = container.stream.take() {
            self.logs.remove(&stream);
        }
        if let Some(log) = &mut container.log {
            log.forget_partial();
        }
        container.record.log_over = true;
        container.save(self.folder.as_ref());
    }

    /// Says what is wrong with a log; "": nothing any more.
    pub fn log_trouble(&mut self, id: &str, message: String) {
        self.broadcast(&Body::LogTrouble(v1::LogTrouble { container_id: id.into(), message }));
    }

    /// Writes what has come, and gives its room back.
    pub fn step_logs(&mut self) {
        let now = Instant::now();
        let (mut trouble, mut over, mut dropped) = (Vec::new(), Vec::new(), Vec::new());
        for (id, container) in &mut self.containers {
            let Some(log) = &mut container.log else { continue };
            loop {
                match log.flush(now) {
                    Wrote::Good(0) | Wrote::Waiting => break,
                    Wrote::Good(count) => {
                        if let (Some(stream), Some(session)) = (container.stream, self.link.session()) {
                            session.mux().consumed(stream, u32::try_from(count).unwrap_or(u32::MAX));
                        }
                    }
                    Wrote::Trouble(message) => {
                        trouble.push((id.clone(), message));
                        break;
                    }
                }
            }
            if log.recovered() {
                trouble.push((id.clone(), String::new()));
            }
            match log.take_dropped() {
                0 => {}
                bytes => dropped.push((id.clone(), bytes)),
            }
            if log.has_refused() {
                trouble.push((id.clone(), "what the guest sends has lines that are none: they are left out".into()));
            }
            if container.ended && container.stream.is_some() && log.again().is_none() {
                over.push(id.clone());
            }
        }
        trouble.into_iter().for_each(|(id, message)| self.log_trouble(&id, message));
        for (container_id, bytes) in dropped {
            self.broadcast(&Body::LogDropped(v1::LogDropped { container_id, bytes }));
        }
        over.iter().for_each(|id| self.log_is_over(id));
    }

    /// ReopenLog.
    pub fn reopen_log(&mut self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        match &mut container.log {
            Some(log) => log.reopen().map_err(|e| Failure::io("open the log anew", &e)),
            None => Ok(()),
        }
    }
}
