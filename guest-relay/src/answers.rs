//! What the guest says: answers to calls, and its monitor's events. None of it is trusted.
//!
//! Called by the relay. What does not fit the question, or is of something that the relay does not know, changes nothing; texts are cut,
//! numbers are brought into their ranges, times into the node's clock.

use lxcri_guest_proto::v1::{self as guest_v1, answer::Answer as Guest};
use lxcri_monitor_proto::v1::{self, ErrorCode, Exit, reply::Body};
use lxcri_monitor_proto::wire;
use prost::Message;
use proxmox_lxcri_monitor::clock;
use proxmox_lxcri_monitor::connection::Asker;
use proxmox_lxcri_monitor::failure::{Failure, Result};

use crate::container::Container;
use crate::group::Kind;
use crate::link::short;
use crate::requests::Pending;
use crate::server::Relay;

fn failure(error: &v1::Error) -> Failure {
    Failure { code: error.code(), message: error.message.clone(), errno: error.errno.clamp(0, 4095) }
}

fn nonsense() -> Failure {
    Failure::new(ErrorCode::ErrorUnspecified, "the guest's answer makes no sense")
}

fn done(body: Body) -> Result<Body> {
    match body {
        Body::Done(_) => Ok(body),
        _ => Err(nonsense()),
    }
}

impl Relay {
    /// An answer, or an event.
    pub fn answered(&mut self, answer: guest_v1::Answer) {
        if answer.id == 0 {
            if let Some(Guest::Monitor(v1::Reply { body: Some(event), .. })) = answer.answer {
                self.event(event);
            }
            return;
        }
        // Nobody has asked.
        let Some(pending) = self.pending.remove(&answer.id) else { return };
        let said = answer.answer.ok_or_else(nonsense);
        if let Pending::Call(asker, id) = pending {
            return self.guest_answered(asker, id, said);
        }
        let said = said.and_then(|said| match said {
            Guest::Error(error) => Err(failure(&error)),
            Guest::Monitor(v1::Reply { body: Some(Body::Error(error)), .. }) => Err(failure(&error)),
            Guest::Monitor(v1::Reply { body: Some(body), .. }) => Ok(body),
            Guest::Done(_) => Ok(Body::Done(v1::Done {})),
            _ => Err(nonsense()),
        });
        match pending {
            Pending::Nobody | Pending::Call(..) => {}
            Pending::EndLog(id, stream) => {
                let is = |c: &Container| c.stream.is_some_and(|s| s.number() == stream);
                // One that was opened anew meanwhile is asked by itself.
                if said.is_err() && self.containers.get(&id).is_some_and(is) {
                    self.log_has_no_end(&id);
                }
            }
            Pending::Done(asker) | Pending::Unknown(asker) => self.reply(asker, said.and_then(done)),
            Pending::Init(asker) => {
                let answer = said.and_then(|body| match body {
                    Body::InitStarted(_) => {
                        self.has_init = true;
                        Ok(Body::InitStarted(v1::InitStarted::default()))
                    }
                    _ => Err(nonsense()),
                });
                self.reply(asker, answer);
            }
            Pending::Create(asker, id) => {
                let answer = said.and_then(|body| match body {
                    Body::Created(_) => Ok(Body::Created(v1::Created::default())),
                    _ => Err(nonsense()),
                });
                self.created(&id, answer.is_ok());
                self.reply(asker, answer);
            }
            Pending::Start(asker, id) => {
                let answer = said.and_then(|body| match body {
                    Body::Started(started) => {
                        let started_at = self.started(&id, started.started_at);
                        Ok(Body::Started(v1::Started { started_at }))
                    }
                    _ => Err(nonsense()),
                });
                self.reply(asker, answer);
            }
            Pending::Delete(id) => self.deleted(&id, said.and_then(done).map(|_| ())),
            Pending::Group { asker, key } => {
                let answer = said.and_then(|body| match (key.0, body) {
                    (Kind::Exec, Body::ExecStarted(_)) => Ok(Body::ExecStarted(v1::ExecStarted::default())),
                    (Kind::Attach, Body::Done(_)) => Ok(Body::Done(v1::Done {})),
                    _ => Err(nonsense()),
                });
                if answer.is_err() {
                    self.drop_group(&key);
                }
                self.reply(asker, answer);
            }
        }
    }

    /// GuestAnswered.
    fn guest_answered(&mut self, asker: Asker, id: u64, said: Result<Guest>) {
        let answer = said.and_then(|said| match said {
            Guest::Error(error) => Err(failure(&error)),
            Guest::Monitor(_) => Err(nonsense()),
            answer @ (Guest::Done(_) | Guest::Hello(_) | Guest::Root(_) | Guest::Contents(_)) => {
                let answer = guest_v1::Answer { id, answer: Some(answer) };
                wire::to_memfd(&answer.encode_to_vec())
                    .map_err(|e| Failure::new(ErrorCode::ErrorSystem, format!("a guest's answer: {e}")))
            }
        });
        match answer {
            Ok(memfd) => self.reply_with(asker, Ok(Body::GuestAnswered(v1::GuestAnswered {})), vec![memfd]),
            Err(failure) => self.reply(asker, Err(failure)),
        }
    }

    fn event(&mut self, event: Body) {
        match event {
            Body::ContainerExited(e) => {
                let exit = self.exit_of(e.exit);
                self.ended(&e.id, exit);
            }
            Body::ExecExited(e) => {
                let key = (Kind::Exec, e.exec_id);
                let Some(container_id) = self.groups.get(&key).map(|g| g.container.clone()) else { return };
                let (exec_id, exit, timed_out) = (key.1.clone(), Some(self.exit_of(e.exit)), e.timed_out);
                self.group_ended(&key, Body::ExecExited(v1::ExecExited { container_id, exec_id, exit, timed_out }));
            }
            Body::AttachEnded(e) => {
                let key = (Kind::Attach, e.attach_id);
                let Some(container_id) = self.groups.get(&key).map(|g| g.container.clone()) else { return };
                let (attach_id, lagged) = (key.1.clone(), e.lagged);
                self.group_ended(&key, Body::AttachEnded(v1::AttachEnded { container_id, attach_id, lagged }));
            }
            Body::InitExited(e) if std::mem::take(&mut self.has_init) => {
                let exit = Some(self.exit_of(e.exit));
                self.broadcast(&Body::InitExited(v1::InitExited { exit }));
            }
            Body::LogTrouble(e) if self.containers.get_mut(&e.container_id).is_some_and(Container::tells_trouble) => {
                let message = match short(&e.message) {
                    "" => String::new(),
                    message => format!("in the guest: {message}"),
                };
                self.broadcast(&Body::LogTrouble(v1::LogTrouble { container_id: e.container_id, message }));
            }
            Body::StdinClosed(e) if self.containers.get_mut(&e.container_id).is_some_and(Container::tells_closed) => {
                self.broadcast(&Body::StdinClosed(e));
            }
            // Of others, or of a newer guest.
            _ => {}
        }
    }

    /// The guest's time as the node's; 0 stays 0.
    pub fn node_time(&self, time: i64) -> i64 {
        if time == 0 { 0 } else { time.saturating_add(self.offset).min(clock::now_ns()).max(1) }
    }

    /// How something ended. An end without a code is never success.
    pub fn exit_of(&self, exit: Option<Exit>) -> Exit {
        let unknown = || Exit { code: 255, note: "the guest told no exit".into(), ..Default::default() };
        let Exit { code, signal, finished_at, oom, note } = exit.unwrap_or_else(unknown);
        let known = (0..=255).contains(&code);
        Exit {
            code: if known { code } else { 255 },
            signal: signal.clamp(0, 64),
            finished_at: if finished_at == 0 { clock::now_ns() } else { self.node_time(finished_at) },
            oom,
            note: if known { short(&note).to_owned() } else { format!("the guest told {code}") },
        }
    }
}
