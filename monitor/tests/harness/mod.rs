//! Drives the real monitor over its socket, with shell scripts or crun as the runtime.
//!
//! Everything that a test starts is ended when its [`Pod`] is dropped, whatever became of the test.
#![allow(dead_code, unsafe_code, clippy::disallowed_methods, clippy::unwrap_used)]

use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lxcri_monitor_proto::v1::{self, Reply, Request, reply::Body, request::Op};
use lxcri_monitor_proto::wire::{self, WireError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Nothing in these tests takes longer.
pub const LONG: Duration = Duration::from_secs(20);

/// The monitor: as built for this test, or the one that MONITOR names (the static build).
pub fn program() -> PathBuf {
    let built = option_env!("CARGO_BIN_EXE_proxmox-lxcri-monitor").map(PathBuf::from);
    std::env::var_os("MONITOR").map(PathBuf::from).or(built).expect("the monitor, built for its own tests alone")
}

/// A monitor and its folder.
pub struct Pod {
    pub dir: tempfile::TempDir,
    pub child: Child,
    pub pids: RefCell<Vec<i32>>,
    clean: Cell<bool>,
}

impl Pod {
    pub fn start() -> Self {
        Self::start_with(b"the pod's record", &program())
    }

    pub fn start_with(info: &[u8], program: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Self::spawn(&dir, info, program);
        Self { dir, child, pids: RefCell::default(), clean: Cell::new(false) }
    }

    /// Another one in the place of one that was killed.
    pub fn start_again(&mut self, info: &[u8], program: &Path) {
        std::fs::remove_file(self.dir.path().join("monitor.sock")).unwrap();
        self.child = Self::spawn(&self.dir, info, program);
        self.clean.set(false);
    }

    fn spawn(dir: &tempfile::TempDir, info: &[u8], program: &Path) -> Child {
        let flags = SocketFlags::CLOEXEC;
        let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(dir.path().join("monitor.sock")).unwrap()).unwrap();
        rustix::net::listen(&listener, 8).unwrap();
        let memfd = rustix::fs::memfd_create(c"info", MemfdFlags::CLOEXEC).unwrap();
        rustix::io::pwrite(&memfd, info, 0).unwrap();
        // Above the numbers that the monitor gets them under.
        let high = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 20).unwrap();
        let (socket, record) = (high(&listener), high(&memfd));
        let (s, r) = (socket.as_raw_fd(), record.as_raw_fd());
        let mut command = Command::new(program);
        command.arg("--pod").arg("test").arg("--run-dir").arg(dir.path()).env_clear().stdin(Stdio::null());
        // SAFETY: dup2 only, on numbers that are open until spawn returns.
        unsafe {
            command.pre_exec(move || {
                if libc::dup2(s, 3) < 0 || libc::dup2(r, 4) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command.spawn().unwrap()
    }

    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.path().join(name)).unwrap_or_default()
    }

    pub fn json(&self, name: &str) -> serde_json::Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }

    /// A connection that has said Hello.
    pub fn connect(&self) -> Client {
        let mut client = self.connect_silent();
        client.hello();
        client
    }

    pub fn connect_silent(&self) -> Client {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(self.dir.path().join("monitor.sock")).unwrap()).unwrap();
        Client { socket, next: 0, events: Vec::new(), replies: Vec::new() }
    }

    /// A plan whose `create` is a script that leaves `sh -c command` waiting for `start`.
    pub fn plan(&self, id: &str, command: &str) -> v1::CreateContainer {
        let p = |name: &str| self.path(&format!("{id}.{name}"));
        let script = format!(
            "mkfifo {go}; exec 3<&0; (read x <{go}; exec sh -c \"$0\" <&3 3<&-) & echo $! >{pid}.tmp; mv {pid}.tmp {pid}",
            go = p("go"),
            pid = p("pid")
        );
        v1::CreateContainer {
            id: id.into(),
            create: Some(sh(&script, &[command])),
            start: Some(sh(&format!("echo >{}", p("go")), &[])),
            delete: Some(sh(&format!("rm -f {} {}", p("go"), p("pid")), &[])),
            pid_file: p("pid"),
            stdio: Some(v1::Stdio { stdout: p("out"), stderr: p("err"), ..Default::default() }),
            log_path: p("log"),
            exit_path: p("exit.json"),
            ..Default::default()
        }
    }

    /// Creates and starts a container of [`Pod::plan`].
    pub fn run(&self, client: &mut Client, plan: v1::CreateContainer) -> v1::Created {
        let id = plan.id.clone();
        let created = self.create(client, plan);
        client.start(&id);
        created
    }

    pub fn create(&self, client: &mut Client, plan: v1::CreateContainer) -> v1::Created {
        match client.call(Op::Create(plan), &[]) {
            Body::Created(created) => {
                self.pids.borrow_mut().push(created.pid);
                created
            }
            other => panic!("create: {other:?}"),
        }
    }

    /// Log of a container, as (stream, tag, content).
    pub fn log(&self, name: &str) -> Vec<(String, char, Vec<u8>)> {
        let bytes = self.read(name);
        bytes.split_inclusive(|b| *b == b'\n').map(parse_line).collect()
    }

    /// What a stream's lines say, joined.
    pub fn output(&self, name: &str, stream: &str) -> Vec<u8> {
        join(&self.log(name), stream)
    }

    pub fn kill_monitor(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.clean.set(true);
    }

    /// Asks it to end and waits.
    pub fn shutdown(&mut self) {
        let mut client = self.connect();
        assert!(matches!(client.call(Op::Shutdown(v1::Shutdown { force: true }), &[]), Body::Done(_)));
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
        self.clean.set(true);
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if !self.clean.get() {
            let children: Vec<i32> = descendants(self.child.id() as i32);
            let _ = self.child.kill();
            let _ = self.child.wait();
            self.pids.borrow_mut().extend(children);
        }
        for pid in self.pids.borrow().iter() {
            // SAFETY: a plain system call.
            unsafe { libc::kill(*pid, libc::SIGKILL) };
        }
    }
}

/// All processes below `root`, the nearest first.
pub fn descendants(root: i32) -> Vec<i32> {
    let mut found = Vec::new();
    let mut next = vec![root];
    while let Some(pid) = next.pop() {
        let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children: Vec<i32> = text.split_whitespace().filter_map(|p| p.parse().ok()).collect();
        found.extend(&children);
        next.extend(children);
    }
    found
}

pub fn parse_line(line: &[u8]) -> (String, char, Vec<u8>) {
    let text = line.strip_suffix(b"\n").unwrap_or_else(|| panic!("a cut line: {:?}", String::from_utf8_lossy(line)));
    let (time, rest) = text.split_at(30);
    assert!(time[10] == b'T' && time[19] == b'.' && time[29] == b'Z', "{:?}", String::from_utf8_lossy(line));
    let rest = rest.strip_prefix(b" ").unwrap();
    let stream = String::from_utf8(rest[..6].to_vec()).unwrap();
    assert!(stream == "stdout" || stream == "stderr", "{stream}");
    assert!(rest[6] == b' ' && rest[8] == b' ');
    (stream, rest[7] as char, rest[9..].to_vec())
}

pub fn join(log: &[(String, char, Vec<u8>)], stream: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for (s, tag, content) in log {
        if s == stream {
            out.extend_from_slice(content);
            match tag {
                'F' => out.push(b'\n'),
                'P' => {}
                other => panic!("tag {other}"),
            }
        }
    }
    out
}

pub fn sh(script: &str, args: &[&str]) -> v1::Program {
    let mut all = vec!["-c".to_owned(), script.to_owned()];
    all.extend(args.iter().map(|a| a.to_string()));
    v1::Program { path: "/bin/sh".into(), args: all, env: vec!["PATH=/usr/bin:/bin".into()], ..Default::default() }
}

/// Waits until `done`, at most [`LONG`].
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn alive(pid: i32) -> bool {
    let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    !matches!(text[text.rfind(')').unwrap() + 2..].chars().next(), Some('Z' | 'X'))
}

/// A connection.
pub struct Client {
    pub socket: OwnedFd,
    next: u64,
    pub events: Vec<Body>,
    replies: Vec<(Reply, Vec<OwnedFd>)>,
}

impl Client {
    pub fn hello(&mut self) -> v1::HelloReply {
        match self.call(Op::Hello(v1::Hello { version: 1 }), &[]) {
            Body::Hello(hello) => hello,
            other => panic!("hello: {other:?}"),
        }
    }

    /// Sends; answers with the request's id.
    pub fn send(&mut self, op: Op, fds: &[BorrowedFd<'_>]) -> u64 {
        self.next += 1;
        wire::send(&self.socket, &Request { id: self.next, op: Some(op) }, fds).unwrap();
        self.next
    }

    pub fn call(&mut self, op: Op, fds: &[BorrowedFd<'_>]) -> Body {
        let id = self.send(op, fds);
        self.answer(id)
    }

    pub fn error(&mut self, op: Op) -> v1::Error {
        match self.call(op, &[]) {
            Body::Error(error) => error,
            other => panic!("not an error: {other:?}"),
        }
    }

    pub fn answer(&mut self, id: u64) -> Body {
        self.answer_in(id, LONG).0
    }

    /// With its descriptors.
    pub fn answer_in(&mut self, id: u64, longest: Duration) -> (Body, Vec<OwnedFd>) {
        let end = Instant::now() + longest;
        loop {
            if let Some(at) = self.replies.iter().position(|(r, _)| r.id == id) {
                let (reply, fds) = self.replies.remove(at);
                return (reply.body.unwrap(), fds);
            }
            self.receive(end, "an answer");
        }
    }

    /// The next event for which `wanted` has something to say.
    pub fn event<T>(&mut self, what: &str, mut wanted: impl FnMut(&Body) -> Option<T>) -> T {
        let end = Instant::now() + LONG;
        loop {
            for at in 0..self.events.len() {
                if let Some(found) = wanted(&self.events[at]) {
                    self.events.remove(at);
                    return found;
                }
            }
            self.receive(end, what);
        }
    }

    fn receive(&mut self, end: Instant, what: &str) {
        let left = end.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "no {what}; events: {:?}", self.events);
        let timeout = rustix::time::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout)).unwrap();
        match wire::recv::<Reply>(&self.socket) {
            Ok((reply, _)) if reply.id == 0 => self.events.push(reply.body.unwrap()),
            Ok(reply) => self.replies.push(reply),
            Err(WireError::NotReady) => {}
            Err(e) => panic!("waiting for {what}: {e}"),
        }
    }

    pub fn start(&mut self, id: &str) -> i64 {
        match self.call(Op::Start(v1::StartContainer { id: id.into() }), &[]) {
            Body::Started(started) => started.started_at,
            other => panic!("start: {other:?}"),
        }
    }

    pub fn delete(&mut self, id: &str) {
        let answer = self.call(Op::Delete(v1::DeleteContainer { id: id.into() }), &[]);
        assert!(matches!(answer, Body::Done(_)), "{answer:?}");
    }

    pub fn exited(&mut self, id: &str) -> v1::Exit {
        self.event(&format!("exit of {id}"), |e| match e {
            Body::ContainerExited(e) if e.id == id => e.exit.clone(),
            _ => None,
        })
    }

    pub fn exec_exited(&mut self, id: &str) -> v1::ExecExited {
        self.event(&format!("exit of exec {id}"), |e| match e {
            Body::ExecExited(e) if e.exec_id == id => Some(e.clone()),
            _ => None,
        })
    }
}

/// A pipe whose write end goes to an exec.
pub fn pipe() -> (std::fs::File, OwnedFd) {
    let (r, w) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    (std::fs::File::from(r), w)
}

/// Reads to the end, which must come.
pub fn read_all(mut file: std::fs::File) -> String {
    let end = Instant::now() + LONG;
    let mut bytes = Vec::new();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "no end of {:?}", String::from_utf8_lossy(&bytes));
        let timeout = rustix::time::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        if poll(&mut [PollFd::new(&file, PollFlags::IN)], Some(&timeout)).unwrap() > 0 {
            let mut buffer = [0; 4096];
            match file.read(&mut buffer).unwrap() {
                0 => return String::from_utf8(bytes).unwrap(),
                n => bytes.extend_from_slice(&buffer[..n]),
            }
        }
    }
}

/// A null device that is not the node's: runtimes give what they get to the container's user.
pub fn null() -> OwnedFd {
    lxcri_monitor_proto::null::own_null().unwrap()
}

pub fn write_file(path: &Path, text: &str) {
    std::fs::File::create(path).unwrap().write_all(text.as_bytes()).unwrap();
}

pub fn folder(path: PathBuf) -> PathBuf {
    std::fs::create_dir_all(&path).unwrap();
    path
}
