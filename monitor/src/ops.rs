//! The requests of monitor.proto, each handed to who knows about it.
//!
//! Called by the server for every packet. A request that fails here is answered here; the others are answered when
//! what they asked for is done.

use std::os::fd::OwnedFd;

use lxcri_monitor_proto::v1::request::Op;
use lxcri_monitor_proto::v1::{self, ErrorCode, Request, reply::Body};
use rustix::termios::Winsize;

use crate::connection::Asker;
use crate::fail_point;
use crate::failure::{Failure, Result};
use crate::init::Init;
use crate::server::Server;
use crate::writer::{LogId, Order};

impl Server {
    /// Takes one request; descriptors that it has no use for are closed.
    pub fn request(&mut self, connection: u64, request: Request, fds: Vec<OwnedFd>) {
        let asker = Asker { connection, request: request.id };
        match self.dispatch(asker, request, fds) {
            Ok(Some(body)) => self.reply(asker, Ok(body)),
            // It will be answered.
            Ok(None) => {}
            Err(failure) => self.reply(asker, Err(failure)),
        }
    }

    fn dispatch(&mut self, asker: Asker, request: Request, fds: Vec<OwnedFd>) -> Result<Option<Body>> {
        let done = Ok(Some(Body::Done(v1::Done {})));
        if request.id == 0 {
            return Err(Failure::invalid("a request needs an id"));
        }
        let unknown = || Failure::new(ErrorCode::ErrorUnknownOperation, "this monitor does not know the operation");
        let op = request.op.ok_or_else(unknown)?;
        if !matches!(op, Op::Hello(_)) && !self.greeted(asker.connection) {
            return Err(Failure::state("the first request is Hello"));
        }
        match op {
            Op::Hello(hello) => return self.hello(asker.connection, &hello).map(Some),
            Op::Create(plan) => self.create(asker, plan, fds)?,
            Op::Start(r) => self.start(asker, &r.id)?,
            Op::Signal(r) => {
                self.signal(&r)?;
                return done;
            }
            Op::Delete(r) => self.delete(Some(asker), &r.id),
            Op::Exec(r) => self.exec(asker, r, fds)?,
            Op::KillExec(r) => {
                self.kill_exec(&r.exec_id);
                return done;
            }
            Op::Attach(r) => self.attach(asker, r, fds)?,
            Op::ReopenLog(r) => {
                let log = self.container(&r.container_id)?.log;
                self.reopening.push((log, asker));
                self.writer.order(Order::Reopen(log));
            }
            Op::StartInit(r) => self.start_init(asker, &r)?,
            Op::SetPodInfo(r) => {
                self.pod_info = r.pod_info;
                return done;
            }
            Op::Shutdown(r) => self.shut_down(asker, r.force)?,
            Op::Resize(r) => {
                self.resize(&r)?;
                return done;
            }
            Op::Lend(r) => {
                let (lent, fds) = self.lend(&r.container_id)?;
                self.reply_with(asker, Ok(Body::Lent(lent)), fds);
            }
            Op::Adopt(r) => self.adopt_container(asker, r, fds)?,
            Op::AdoptInit(r) => {
                self.adopt_init(&r, fds)?;
                return done;
            }
            Op::CloseStdin(r) => {
                self.close_stdin(&r.container_id)?;
                return done;
            }
            Op::KeepProgram(r) => {
                self.kept.keep(r, fds)?;
                return done;
            }
            // There is no guest.
            Op::GuestCall(_) => return Err(unknown()),
        }
        Ok(None)
    }

    fn hello(&mut self, connection: u64, hello: &v1::Hello) -> Result<Body> {
        if hello.version == 0 {
            return Err(Failure::invalid("a version is 1 or more"));
        }
        self.greet(connection);
        Ok(Body::Hello(v1::HelloReply {
            version: hello.version.min(lxcri_monitor_proto::VERSION),
            pid: std::process::id() as i32,
            pod_info: self.pod_info.clone(),
            containers: self.containers.values().map(|c| c.report()).collect(),
            init_pid: match &self.init {
                Init::Running(process) => process.pid,
                _ => 0,
            },
        }))
    }

    fn resize(&mut self, request: &v1::ResizeTerminal) -> Result<()> {
        let cells = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let size = Winsize { ws_row: cells(request.height), ws_col: cells(request.width), ws_xpixel: 0, ws_ypixel: 0 };
        let (what, terminal) = if request.exec_id.is_empty() {
            (&request.container_id, self.container(&request.container_id)?.terminal.as_ref())
        } else {
            let exec = self.execs.get_mut(&request.exec_id);
            let exec = exec.ok_or_else(|| Failure::not_found(format!("exec {}: there is none", request.exec_id)))?;
            if exec.terminal_to_come() {
                exec.size = Some(size);
                return Ok(());
            }
            (&request.exec_id, exec.terminal.as_ref())
        };
        let terminal = terminal.ok_or_else(|| Failure::state(format!("{what}: no terminal")))?;
        rustix::termios::tcsetwinsize(terminal, size).map_err(|e| Failure::errno(format_args!("resize {what}"), e))
    }

    /// The writer has opened a log anew, or could not.
    pub fn log_reopened(&mut self, log: LogId, result: std::io::Result<()>) {
        fail_point!("monitor.log.reopened");
        let Some(at) = self.reopening.iter().position(|(l, _)| *l == log) else { return };
        let (_, asker) = self.reopening.remove(at);
        let answer = match result {
            Ok(()) => Ok(Body::Done(v1::Done {})),
            Err(error) => Err(Failure::io("open the log anew", &error)),
        };
        self.reply(asker, answer);
    }
}
