//! An agent that says what a test wants: another run of the guest, nothing at all, or what no honest agent would.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use lxcri_guest_proto::v1::{self, answer::Answer as Body, call::Call as Op, purpose};
use lxcri_guest_proto::{Connection, Event, Secret, Side, StreamId, calls};
use lxcri_monitor_proto::v1 as monitor;
use prost::Message;

use super::agent::{LONG, SECRET};

/// Listens.
pub struct Fake {
    listener: TcpListener,
    pub address: SocketAddr,
}

impl Fake {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        Self { listener, address }
    }

    /// The next connection, when the relay has proved itself.
    pub fn accept(&self) -> Agent {
        let end = Instant::now() + LONG;
        loop {
            assert!(Instant::now() < end, "the relay does not prove itself");
            if let Some(agent) = self.try_accept() {
                return agent;
            }
        }
    }

    /// None: it is over already, or has another secret.
    fn try_accept(&self) -> Option<Agent> {
        let (socket, _) = self.listener.accept().unwrap();
        socket.set_nodelay(true).unwrap();
        let connection = Connection::new(Side::Guest, &Secret::new(SECRET)).unwrap();
        let mut agent = Agent {
            socket,
            connection,
            reader: calls::Reader::default(),
            calls: Vec::new(),
            opened: Vec::new(),
            closed: false,
            acknowledged: Vec::new(),
        };
        let end = Instant::now() + LONG;
        while !agent.connection.is_up() {
            assert!(Instant::now() < end, "the relay says nothing");
            agent.turn();
            if agent.closed {
                return None;
            }
        }
        Some(agent)
    }

    /// The next connection, as bytes.
    pub fn accept_raw(&self) -> TcpStream {
        self.listener.accept().unwrap().0
    }

    /// The next connection, which is told the guest's run and its containers.
    pub fn meet(&self, boot_id: &str, containers: Vec<monitor::ContainerReport>) -> Agent {
        let mut agent = self.accept();
        let call = agent.next(|op| matches!(op, Op::Hello(_)));
        let hello = v1::HelloAnswer {
            boot_id: boot_id.into(),
            run_dir: "/run/guest".into(),
            data_dir: "/data".into(),
            ..Default::default()
        };
        agent.answer(call.id, Body::Hello(hello));
        let (call, _) = agent.asked(|op| matches!(op, monitor::request::Op::Hello(_)));
        let hello = monitor::HelloReply { version: 1, containers, ..Default::default() };
        agent.reply(call, monitor::reply::Body::Hello(hello));
        agent
    }
}

/// A connection.
pub struct Agent {
    pub socket: TcpStream,
    pub connection: Connection,
    reader: calls::Reader,
    calls: Vec<v1::Call>,
    /// Streams that the relay has opened.
    pub opened: Vec<(StreamId, purpose::Purpose)>,
    /// The relay has closed it.
    pub closed: bool,
    /// What it has given back of each stream.
    pub acknowledged: Vec<(StreamId, u32)>,
}

impl Agent {
    pub fn until(&mut self, what: &str, done: impl Fn(&mut Self) -> bool) {
        let end = Instant::now() + LONG;
        while !done(self) {
            assert!(Instant::now() < end, "never: {what}");
            assert!(!self.closed, "the relay has closed the connection; waiting for {what}");
            self.turn();
        }
    }

    /// The relay ends the connection.
    pub fn ends(mut self) {
        let end = Instant::now() + LONG;
        while !self.closed {
            assert!(Instant::now() < end, "the relay goes on");
            self.turn();
        }
    }

    pub fn turn(&mut self) {
        self.turn_for(Duration::from_millis(20));
    }

    pub fn turn_quick(&mut self) {
        self.turn_for(Duration::from_micros(1));
    }

    fn turn_for(&mut self, time: Duration) {
        self.flush();
        self.socket.set_read_timeout(Some(time)).unwrap();
        let mut buffer = [0; 65536];
        let count = match self.socket.read(&mut buffer) {
            Ok(0) => return self.closed = true,
            Ok(n) => n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return,
            Err(_) => return self.closed = true,
        };
        let Ok(events) = self.connection.input(&buffer[..count]) else { return self.closed = true };
        for event in events {
            match event {
                Event::Data(StreamId::CONTROL, data) => {
                    self.connection.mux().consumed(StreamId::CONTROL, data.len() as u32);
                    self.reader.input(&data);
                    while let Some(call) = self.reader.take::<v1::Call>().unwrap() {
                        self.calls.push(call);
                    }
                }
                Event::Opened(id, purpose) => {
                    self.opened.push((id, v1::Purpose::decode(purpose.as_slice()).unwrap().purpose.unwrap()));
                }
                Event::Acknowledged(id, count) => self.acknowledged.push((id, count)),
                _ => {}
            }
        }
        self.flush();
    }

    pub fn flush(&mut self) {
        while let Some(record) = self.connection.output().unwrap() {
            if self.socket.write_all(&record).is_err() {
                self.closed = true;
                return;
            }
        }
    }

    /// The next call that is wanted; others wait.
    pub fn next(&mut self, wanted: impl Fn(&Op) -> bool) -> v1::Call {
        let is = |call: &v1::Call| call.call.as_ref().is_some_and(&wanted);
        self.until("a call", |agent| agent.calls.iter().any(is));
        let at = self.calls.iter().position(is).unwrap();
        self.calls.remove(at)
    }

    /// The next request for the monitor that is wanted, and its call's id.
    pub fn asked(&mut self, wanted: impl Fn(&monitor::request::Op) -> bool) -> (u64, monitor::request::Op) {
        let op = |op: &Op| match op {
            Op::Monitor(call) => call.request.as_ref().and_then(|r| r.op.clone()),
            _ => None,
        };
        let call = self.next(|o| op(o).is_some_and(|op| wanted(&op)));
        (call.id, op(call.call.as_ref().unwrap()).unwrap())
    }

    pub fn answer(&mut self, id: u64, body: Body) {
        let bytes = calls::frame(&v1::Answer { id, answer: Some(body) }).unwrap();
        self.say(StreamId::CONTROL, &bytes);
    }

    pub fn reply(&mut self, id: u64, body: monitor::reply::Body) {
        self.answer(id, Body::Monitor(monitor::Reply { id, body: Some(body) }));
    }

    /// Writes all that there is room for, in turns.
    pub fn say(&mut self, stream: StreamId, bytes: &[u8]) {
        let mut rest = bytes;
        let end = Instant::now() + LONG;
        while !rest.is_empty() && !self.closed {
            assert!(Instant::now() < end, "the relay does not take what is said");
            let count = self.connection.mux().write(stream, rest);
            rest = &rest[count..];
            if count == 0 {
                self.turn();
            }
        }
        self.flush();
    }

    /// The stream for a container's log, and from where.
    pub fn log(&mut self, id: &str) -> (StreamId, u64) {
        let of = |(stream, purpose): &(StreamId, purpose::Purpose)| match purpose {
            purpose::Purpose::Log(log) if log.container_id == id => Some((*stream, log.from)),
            _ => None,
        };
        self.until("a log is asked for", |agent| agent.opened.iter().any(|o| of(o).is_some()));
        self.opened.iter().find_map(of).unwrap()
    }

    /// Creates and starts what the relay asks for.
    pub fn launches(&mut self, id: &str) {
        let (call, _) = self.asked(|op| matches!(op, monitor::request::Op::Create(plan) if plan.id == id));
        self.reply(call, monitor::reply::Body::Created(monitor::Created { pid: 77, pid_start_time: 5 }));
        let (call, _) = self.asked(|op| matches!(op, monitor::request::Op::Start(start) if start.id == id));
        self.reply(call, monitor::reply::Body::Started(monitor::Started { started_at: 1 }));
    }
}
