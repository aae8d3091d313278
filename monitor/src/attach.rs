//! Clients attached to a container: their input is copied to its stdin or terminal, its output into their pipes.
//!
//! Called by the server. Output is the log writer's, which copies what it reads; input is a relay. Nobody waits for a
//! client. A crash closes the pipes.

use std::os::fd::OwnedFd;

use lxcri_monitor_proto::v1::{self, reply::Body};

use crate::connection::Asker;
use crate::crilog::Stream;
use crate::failure::{Failure, Result};
use crate::relay::Owner;
use crate::server::Server;
use crate::stdio::set_nonblocking;
use crate::writer::{LogId, Order};

/// Most clients of a pod at a time.
const MAX: usize = 64;

/// An attached client.
pub struct Attached {
    container: String,
    id: String,
    /// Who asked, until it is answered.
    asker: Option<Asker>,
    /// The read end of its input, until the output is connected.
    input: Option<OwnedFd>,
    /// It gets output: with that it ends.
    has_output: bool,
}

impl Server {
    /// Attach.
    pub fn attach(&mut self, asker: Asker, request: v1::Attach, fds: Vec<OwnedFd>) -> Result<()> {
        let v1::Attach { container_id, attach_id, has_stdin, has_stdout, has_stderr } = request;
        let wanted = [has_stdin, has_stdout, has_stderr];
        if attach_id.is_empty() || fds.is_empty() || fds.len() != wanted.iter().filter(|w| **w).count() {
            return Err(Failure::invalid(format!("{} descriptors do not fit the attach", fds.len())));
        }
        if self.attached.len() >= MAX {
            return Err(Failure::state(format!("{MAX} clients are attached in this pod already")));
        }
        let container = self.container(&container_id)?;
        if !container.life.init_lives() {
            return Err(Failure::state(format!("container {container_id}: it does not run")));
        }
        let log = container.log;
        for fd in &fds {
            set_nonblocking(fd).map_err(|e| Failure::errno("attach: a descriptor", e))?;
        }
        let mut fds = fds.into_iter();
        let [input, stdout, stderr] = wanted.map(|wanted| if wanted { fds.next() } else { None });
        let to: Vec<_> = [(Stream::Stdout, stdout), (Stream::Stderr, stderr)]
            .into_iter()
            .filter_map(|(stream, fd)| Some((stream, fd?)))
            .collect();
        // Names of logs are never used twice, nor are those of clients.
        self.next_log += 1;
        let client = self.next_log;
        let (asker, has_output) = (Some(asker), !to.is_empty());
        self.attached.insert(client, Attached { container: container_id, id: attach_id, asker, input, has_output });
        match has_output {
            true => self.writer.order(Order::Attach { id: log, client, to }),
            false => self.attached(client),
        }
        Ok(())
    }

    /// The client's output is connected: now its input may have an effect.
    pub fn attached(&mut self, client: u64) {
        let Some(attached) = self.attached.get_mut(&client) else { return };
        let (asker, input, container) = (attached.asker.take(), attached.input.take(), attached.container.clone());
        if let Some(asker) = asker {
            self.reply(asker, Ok(Body::Done(v1::Done {})));
        }
        let Some(from) = input else { return };
        let to = self.containers.get(&container).and_then(|c| c.input()?.try_clone().ok());
        match to {
            Some(to) => self.relay(Owner::Attach(container, client), from, to),
            // It was closed: the client's writes fail.
            None => self.input_over(client),
        }
    }

    /// An attached client's input has ended, or nobody takes it any more.
    pub fn attached_input_over(&mut self, container: &str, client: u64) {
        let once = |c: &crate::container::Container| c.plan.stdio.as_ref().is_some_and(|s| s.stdin_once);
        if self.containers.get(container).is_some_and(once) {
            let _ = self.close_stdin(container);
        }
        self.input_over(client);
    }

    fn input_over(&mut self, client: u64) {
        if self.attached.get(&client).is_some_and(|a| !a.has_output) {
            self.attach_over(client, false);
        }
    }

    /// An attached client gets no more output.
    pub fn attached_output_over(&mut self, client: u64, lagged: bool) {
        self.attach_over(client, lagged);
    }

    fn attach_over(&mut self, client: u64, lagged: bool) {
        if let Some(Attached { container, id, .. }) = self.attached.remove(&client) {
            // A container that does not read its stdin would hold what is left of the client for its whole life.
            self.hurry_relays(&Owner::Attach(container.clone(), client));
            self.broadcast(&Body::AttachEnded(v1::AttachEnded { container_id: container, attach_id: id, lagged }));
        }
    }

    /// Closes a container's stdin for good, whoever is attached.
    pub fn close_stdin(&mut self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        container.close_stdin();
        // A terminal's input has no end.
        if container.terminal.is_none() {
            self.end_inputs(id);
        }
        self.end_relays(&Owner::Container(id.into()));
        // Whoever has a duplicate of the writer has to close it, too, or the container waits on.
        self.broadcast(&Body::StdinClosed(v1::StdinClosed { container_id: id.into() }));
        Ok(())
    }

    fn end_inputs(&mut self, id: &str) {
        self.end_relays_if(|owner| matches!(owner, Owner::Attach(container, _) if container == id));
    }

    /// The container has ended and its output is drained, or is not waited for: clients get no more.
    pub fn detach_all(&mut self, id: &str, log: LogId) {
        self.end_inputs(id);
        if self.attached.values().any(|a| a.container == id) {
            self.writer.order(Order::Detach(log));
        }
    }
}
