//! Drives the real agent over TCP, with crun as the runtime: as a process of this machine with a loop device as an image's disk
//! ([`Guest`]), or in a virtual machine.
//!
//! crun refuses hybrid cgroup hierarchies, so on this machine the agent runs in a mount namespace without the v2 one. Everything that a
//! test starts is ended when its [`Guest`] is dropped, whatever became of the test.
#![allow(dead_code, clippy::disallowed_methods, clippy::unwrap_used)]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lxcri_guest_proto::v1::{self, answer::Answer as Body, call::Call as Op, purpose};
use lxcri_guest_proto::{Connection, Event, Secret, Side, StreamId, calls};
use lxcri_monitor_proto::v1 as monitor;
use prost::Message;
use rustix::process::{Pid, Signal, kill_process};

/// Nothing in these tests takes longer.
pub const LONG: Duration = Duration::from_secs(20);
/// Serial number of the image's disk.
pub const SERIAL: &str = "lxcri-image-1";
/// What node and guest have in common.
pub const SECRET: [u8; 32] = [7; 32];

/// The agent: the one that GUEST_AGENT names (the static build), or as built for this test; for another crate's test, into the same
/// folder.
pub fn program() -> PathBuf {
    let built = option_env!("CARGO_BIN_EXE_proxmox-lxcri-guest-agent").map(PathBuf::from);
    std::env::var_os("GUEST_AGENT").map(PathBuf::from).or(built).unwrap_or_else(|| beside("proxmox-lxcri-guest-agent"))
}

fn beside(name: &str) -> PathBuf {
    let path = std::env::current_exe().unwrap().parent().unwrap().with_file_name(name);
    assert!(path.is_file(), "{}: build it first (cargo build -p {name})", path.display());
    path
}

/// Whoever has the guest carry out calls.
pub trait Asks {
    /// One that must not fail.
    fn done(&mut self, op: Op) -> Body;

    /// A file in the run folder.
    fn write(&mut self, path: &str, content: &[u8]) {
        self.done(Op::Write(v1::Write {
            path: path.into(),
            content: content.into(),
            mode: 0o600,
            ..Default::default()
        }));
    }
}

impl Asks for Node {
    fn done(&mut self, op: Op) -> Body {
        match self.call(op) {
            Body::Error(error) => panic!("{error:?}"),
            body => body,
        }
    }
}

pub fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

/// An image with busybox: a small ext4 file system.
pub fn make_image(file: &Path) {
    let dir = tempfile::tempdir().unwrap();
    for name in ["bin", "proc", "dev", "sys", "tmp", "volume"] {
        std::fs::create_dir_all(dir.path().join(name)).unwrap();
    }
    std::fs::copy("/bin/busybox", dir.path().join("bin/busybox")).unwrap();
    for name in ["sh", "cat", "echo", "sleep", "seq", "stty", "id", "touch", "dd"] {
        std::os::unix::fs::symlink("busybox", dir.path().join("bin").join(name)).unwrap();
    }
    run("mkfs.ext4", &["-q", "-d", dir.path().to_str().unwrap(), file.to_str().unwrap(), "8M"]);
}

/// An agent and its folders.
pub struct Guest {
    pub dir: tempfile::TempDir,
    pub address: SocketAddr,
    pub agent: Child,
    pub place: Place,
    disk: String,
    /// What is left when the agent is killed.
    pids: RefCell<BTreeSet<i32>>,
}

impl Guest {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let text = |p: PathBuf| p.to_str().unwrap().to_owned();
        make_image(&path("image.ext4"));
        let disk = run("losetup", &["--find", "--show", "--read-only", &text(path("image.ext4"))]);
        let device = path("block").join(disk.rsplit('/').next().unwrap());
        std::fs::create_dir_all(&device).unwrap();
        std::fs::write(device.join("serial"), format!("{SERIAL}\n")).unwrap();
        std::fs::write(path("secret"), SECRET).unwrap();
        std::fs::set_permissions(path("secret"), PermissionsExt::from_mode(0o600)).unwrap();
        // A port that was free a moment ago.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let wrapper = path("agent");
        std::fs::write(
            &wrapper,
            format!(
                "#!/bin/sh\nif [ \"$1\" = inside ]; then shift; umount /sys/fs/cgroup/unified 2>/dev/null; exec {} \"$@\"; fi\n\
                 PATH=/usr/bin:/bin; export PATH\nexec unshare -m \"$0\" inside \"$@\"\n",
                program().display()
            ),
        )
        .unwrap();
        std::fs::set_permissions(&wrapper, PermissionsExt::from_mode(0o700)).unwrap();
        let agent = agent(&dir, address, Command::new(wrapper));
        let place = Place {
            run: text(path("run")),
            data: text(path("data")),
            cgroups: "/sys/fs/cgroup/memory",
            volume: Cell::new(false),
        };
        Self { dir, address, agent, place, disk, pids: RefCell::default() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Processes of the guest: the agent's children, and theirs.
    pub fn processes(&self) -> BTreeSet<i32> {
        let mut found = BTreeSet::new();
        let mut next = vec![self.agent.id() as i32];
        next.extend(self.pids.borrow().iter());
        while let Some(pid) = next.pop() {
            let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            let children = text.split_whitespace().filter_map(|p| p.parse().ok());
            let new: Vec<i32> = children.filter(|p| found.insert(*p)).collect();
            next.extend(new);
        }
        found
    }

    /// Pid of the monitor.
    pub fn monitor(&self) -> i32 {
        let is = |pid: &i32| {
            std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.starts_with(b"lxcri-guest-monitor"))
        };
        self.processes().into_iter().find(is).expect("a monitor")
    }

    /// kill -9 of the agent, and another one in the same guest.
    pub fn kill_agent(&mut self) {
        let mut left = self.processes();
        let monitor = self.monitor();
        self.pids.borrow_mut().append(&mut left);
        self.agent.kill().unwrap();
        self.agent.wait().unwrap();
        // The guest's mounts are what the monitor sees.
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{monitor}/ns/mnt")).arg(program());
        self.agent = agent(&self.dir, self.address, command);
    }

    pub fn connect(&self) -> Node {
        let end = Instant::now() + LONG;
        loop {
            match Node::connect(self.address, SECRET, LONG) {
                Ok(node) => return node,
                Err(e) => assert!(Instant::now() < end, "no agent: {e}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends and removes a container.
    pub fn delete(&self, node: &mut Node, id: &str) {
        self.place.delete(node, id);
        assert!(!self.path(&format!("data/containers/{id}")).exists());
    }
}

/// Where a guest has its files.
pub struct Place {
    pub run: String,
    pub data: String,
    /// Of the memory controller.
    pub cgroups: &'static str,
    /// Containers have the volume `config`.
    pub volume: Cell<bool>,
}

impl Place {
    /// A container's cgroup: tests run beside each other on one machine.
    pub fn cgroup(&self, id: &str) -> String {
        let guest = self.run.trim_matches('/').replace(['/', '.'], "-");
        format!("/lxcri-guest-{guest}-{id}")
    }

    /// Makes everything for a container that runs `script`, as the image's user 1000.
    pub fn plan(&self, node: &mut impl Asks, id: &str, script: &str, terminal: bool) -> monitor::CreateContainer {
        let call = v1::MakeRoot { container_id: id.into(), serial: SERIAL.into(), fs_type: "ext4".into() };
        let Body::Root(root) = node.done(Op::MakeRoot(call)) else { panic!("no root") };
        let cgroup = self.cgroup(id);
        let mut mounts = vec![
            serde_json::json!({"destination": "/proc", "type": "proc", "source": "proc"}),
            serde_json::json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}),
            serde_json::json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                               "options": ["newinstance", "ptmxmode=0666", "mode=0620"]}),
        ];
        if self.volume.get() {
            let source = format!("{}/volumes/config", self.data);
            mounts.push(serde_json::json!({"destination": "/volume", "type": "bind", "source": source,
                                           "options": ["bind", "ro"]}));
        }
        let config = serde_json::json!({
            "ociVersion": "1.0.2", "process": process(script, terminal), "root": {"path": root.path}, "hostname": id,
            "mounts": mounts,
            "linux": {"cgroupsPath": cgroup, "resources": {"memory": {"limit": 33554432, "swap": 33554432}},
                      "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]}
        });
        node.write(&format!("bundles/{id}/config.json"), config.to_string().as_bytes());
        let p = |name: &str| format!("{}/bundles/{id}/{name}", self.run);
        let (bundle, pid_file, console) = (format!("{}/bundles/{id}", self.run), p("pid"), p("console"));
        let mut create = vec!["create", "--bundle", &bundle, "--pid-file", &pid_file];
        if terminal {
            create.extend(["--console-socket", &console]);
        }
        create.push(id);
        monitor::CreateContainer {
            id: id.into(),
            create: Some(self.crun(&create)),
            start: Some(self.crun(&["start", id])),
            delete: Some(self.crun(&["delete", "--force", id])),
            pid_file: pid_file.clone(),
            stdio: Some(monitor::Stdio {
                terminal,
                console_socket: if terminal { console.clone() } else { String::new() },
                stdin: p("in"),
                stdout: p("out"),
                stderr: p("err"),
                uid: 1000,
                gid: 1000,
                ..Default::default()
            }),
            log_path: format!("{}/logs/{id}.log", self.data),
            exit_path: p("exit.json"),
            cgroups: Some(monitor::Cgroups {
                memory: format!("{}{cgroup}", self.cgroups),
                kill: format!("{}{cgroup}", self.cgroups),
            }),
            ..Default::default()
        }
    }

    fn crun(&self, args: &[&str]) -> monitor::Program {
        let (root, log) = (format!("{}/crun", self.run), format!("{}/crun.log", self.run));
        let own = ["--root", &root, "--log", &log, "--cgroup-manager", "cgroupfs"];
        monitor::Program {
            path: "/usr/bin/crun".into(),
            args: own.iter().chain(args).map(|a| a.to_string()).collect(),
            env: vec!["PATH=/usr/bin:/bin".into()],
            error_log: log.clone(),
            ..Default::default()
        }
    }

    /// Creates and starts.
    pub fn launch(&self, node: &mut Node, id: &str, script: &str) {
        let plan = self.plan(node, id, script, false);
        let created = node.ask(monitor::request::Op::Create(plan), &[]);
        assert!(matches!(created, monitor::reply::Body::Created(_)), "{created:?}");
        node.start(id);
    }

    /// An exec's request; its process is written into the guest.
    pub fn exec(&self, node: &mut impl Asks, container: &str, id: &str, script: &str, terminal: bool) -> monitor::Exec {
        let path = format!("bundles/{container}/{id}.json");
        node.write(&path, process(script, terminal).to_string().as_bytes());
        let p = |name: &str| format!("{}/bundles/{container}/{id}.{name}", self.run);
        let (spec, pid_file, console) = (p("json"), p("pid"), p("console"));
        let mut args = vec!["exec", "--detach", "--pid-file", &pid_file, "--process", &spec];
        if terminal {
            args.extend(["--console-socket", &console]);
        }
        args.push(container);
        monitor::Exec {
            container_id: container.into(),
            exec_id: id.into(),
            program: Some(self.crun(&args)),
            pid_file: pid_file.clone(),
            terminal,
            console_socket: if terminal { console.clone() } else { String::new() },
            ..Default::default()
        }
    }

    /// Ends and removes a container.
    pub fn delete(&self, node: &mut Node, id: &str) {
        let answer = node.ask(monitor::request::Op::Delete(monitor::DeleteContainer { id: id.into() }), &[]);
        assert!(matches!(answer, monitor::reply::Body::Done(_)), "{answer:?}");
        node.done(Op::RemoveRoot(v1::RemoveRoot { container_id: id.into() }));
    }
}

impl std::ops::Deref for Guest {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}

fn agent(dir: &tempfile::TempDir, address: SocketAddr, mut command: Command) -> Child {
    let path = |name: &str| dir.path().join(name);
    command.args(["--listen", &address.to_string(), "--secret"]).arg(path("secret"));
    command.arg("--run-dir").arg(path("run")).arg("--data-dir").arg(path("data"));
    command.arg("--block-devices").arg(path("block")).stdin(Stdio::null()).spawn().unwrap()
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut all = self.processes();
        all.append(&mut self.pids.borrow_mut());
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        for pid in all.into_iter().filter_map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        // Gone with the last mount of it, if that is still there.
        let _ = Command::new("losetup").args(["-d", &self.disk]).env("PATH", "/usr/sbin:/sbin").status();
    }
}

pub fn process(script: &str, terminal: bool) -> serde_json::Value {
    serde_json::json!({
        "terminal": terminal, "user": {"uid": 1000, "gid": 1000}, "args": ["/bin/sh", "-c", script], "cwd": "/",
        "env": ["PATH=/bin"], "noNewPrivileges": true
    })
}

/// The node's side of a connection.
pub struct Node {
    socket: TcpStream,
    connection: Connection,
    next: u64,
    reader: calls::Reader,
    answers: BTreeMap<u64, Body>,
    pub events: Vec<monitor::reply::Body>,
    /// What came on streams.
    pub data: BTreeMap<u32, Vec<u8>>,
    pub ended: BTreeSet<u32>,
    pub resets: BTreeMap<u32, u32>,
    /// Streams whose bytes are not acknowledged.
    pub held: BTreeSet<u32>,
}

impl Node {
    /// Gives up when the guest has not proved itself in `limit`.
    pub fn connect(address: SocketAddr, secret: [u8; 32], limit: Duration) -> std::io::Result<Self> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        let connection = Connection::new(Side::Node, &Secret::new(secret)).unwrap();
        let mut node = Self {
            socket,
            connection,
            next: 0,
            reader: calls::Reader::default(),
            answers: BTreeMap::new(),
            events: Vec::new(),
            data: BTreeMap::new(),
            ended: BTreeSet::new(),
            resets: BTreeMap::new(),
            held: BTreeSet::new(),
        };
        let end = Instant::now() + limit;
        while !node.connection.is_up() {
            if Instant::now() >= end {
                return Err(ErrorKind::TimedOut.into());
            }
            node.turn(end)?;
        }
        Ok(node)
    }

    /// Sends what there is, and takes what comes until then.
    pub fn turn(&mut self, end: Instant) -> std::io::Result<()> {
        self.flush()?;
        let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.socket.set_read_timeout(Some(left))?;
        let mut buffer = [0; 65536];
        let count = match self.socket.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(()),
            Err(e) => return Err(e),
        };
        let events = self.connection.input(&buffer[..count]);
        for event in events.map_err(|e| std::io::Error::new(ErrorKind::PermissionDenied, e))? {
            self.event(event);
        }
        self.flush()
    }

    pub fn flush(&mut self) -> std::io::Result<()> {
        while let Some(record) = self.connection.output().unwrap() {
            self.socket.write_all(&record)?;
        }
        Ok(())
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Data(StreamId::CONTROL, data) => {
                self.connection.mux().consumed(StreamId::CONTROL, data.len() as u32);
                self.reader.input(&data);
                while let Some(answer) = self.reader.take::<v1::Answer>().unwrap() {
                    match answer.answer.unwrap() {
                        Body::Monitor(reply) if reply.id == 0 => self.events.push(reply.body.unwrap()),
                        body => drop(self.answers.insert(answer.id, body)),
                    }
                }
            }
            Event::Data(id, data) => {
                if !self.held.contains(&id.number()) {
                    self.connection.mux().consumed(id, data.len() as u32);
                }
                self.data.entry(id.number()).or_default().extend(data);
            }
            Event::Ended(id) => drop(self.ended.insert(id.number())),
            Event::Reset(id, code) => drop(self.resets.insert(id.number(), code)),
            _ => {}
        }
    }

    /// Takes what comes until `done`.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + LONG;
        while !done(self) {
            assert!(Instant::now() < end, "never: {what}; data: {:?}; resets: {:?}", self.shown(), self.resets);
            self.turn(Instant::now() + Duration::from_millis(50)).unwrap_or_else(|e| panic!("waiting for {what}: {e}"));
        }
    }

    fn shown(&self) -> BTreeMap<u32, String> {
        let tail = |d: &Vec<u8>| String::from_utf8_lossy(&d[d.len().saturating_sub(300)..]).into_owned();
        self.data.iter().map(|(id, d)| (*id, tail(d))).collect()
    }

    pub fn open(&mut self, purpose: purpose::Purpose) -> StreamId {
        let purpose = v1::Purpose { purpose: Some(purpose) };
        self.connection.mux().open(&purpose.encode_to_vec()).unwrap()
    }

    pub fn descriptor(&mut self, input: bool) -> StreamId {
        let id = self.open(purpose::Purpose::Descriptor(v1::Descriptor { input, buffer: 0 }));
        if !input {
            self.connection.mux().end(id);
        }
        id
    }

    pub fn log(&mut self, container: &str, from: u64) -> StreamId {
        let id = self.open(purpose::Purpose::Log(v1::Log { container_id: container.into(), from }));
        self.connection.mux().end(id);
        id
    }

    /// Writes all, and waits until the guest has taken it.
    pub fn send(&mut self, id: StreamId, bytes: &[u8]) {
        let mut rest = bytes;
        self.until("the guest takes what is sent", |node| {
            let count = node.connection.mux().write(id, rest);
            rest = &rest[count..];
            rest.is_empty()
        });
        self.flush().unwrap();
    }

    pub fn end(&mut self, id: StreamId) {
        self.connection.mux().end(id);
        self.flush().unwrap();
    }

    pub fn acknowledge(&mut self, id: StreamId, count: usize) {
        self.connection.mux().consumed(id, count as u32);
        self.flush().unwrap();
    }

    pub fn text(&self, id: StreamId) -> String {
        String::from_utf8(self.data.get(&id.number()).cloned().unwrap_or_default()).unwrap()
    }

    pub fn call(&mut self, op: Op) -> Body {
        self.next += 1;
        let id = self.next;
        let bytes = calls::frame(&v1::Call { id, call: Some(op) }).unwrap();
        self.send(StreamId::CONTROL, &bytes);
        self.until("an answer", |node| node.answers.contains_key(&id));
        self.answers.remove(&id).unwrap()
    }

    /// The id that the next call will have.
    pub fn next_id(&self) -> u64 {
        self.next + 1
    }

    pub fn error(&mut self, op: Op) -> monitor::Error {
        match self.call(op) {
            Body::Error(error) => error,
            body => panic!("not an error: {body:?}"),
        }
    }

    pub fn hello(&mut self) -> v1::HelloAnswer {
        match self.done(Op::Hello(v1::Hello {})) {
            Body::Hello(hello) => hello,
            other => panic!("{other:?}"),
        }
    }

    /// A request for the monitor.
    pub fn ask(&mut self, op: monitor::request::Op, descriptors: &[StreamId]) -> monitor::reply::Body {
        let request = Some(monitor::Request { id: self.next + 1, op: Some(op) });
        let descriptors = descriptors.iter().map(|id| id.number()).collect();
        match self.done(Op::Monitor(v1::MonitorCall { request, descriptors })) {
            Body::Monitor(reply) => reply.body.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// The monitor's Hello: containers as they are.
    pub fn greet(&mut self) -> monitor::HelloReply {
        match self.ask(monitor::request::Op::Hello(monitor::Hello { version: 1 }), &[]) {
            monitor::reply::Body::Hello(hello) => hello,
            other => panic!("{other:?}"),
        }
    }

    pub fn start(&mut self, id: &str) {
        let answer = self.ask(monitor::request::Op::Start(monitor::StartContainer { id: id.into() }), &[]);
        assert!(matches!(answer, monitor::reply::Body::Started(_)), "{answer:?}");
    }

    /// The same, without waiting for an answer.
    pub fn begin(&mut self, id: &str) {
        self.next += 1;
        let op = monitor::request::Op::Start(monitor::StartContainer { id: id.into() });
        let request = Some(monitor::Request { id: self.next, op: Some(op) });
        let call = Some(Op::Monitor(v1::MonitorCall { request, descriptors: Vec::new() }));
        let bytes = calls::frame(&v1::Call { id: self.next, call }).unwrap();
        self.send(StreamId::CONTROL, &bytes);
    }

    /// The first event for which `wanted` has something to say.
    pub fn event_of<T>(&mut self, what: &str, wanted: impl Fn(&monitor::reply::Body) -> Option<T>) -> T {
        let mut found = None;
        self.until(what, |node| {
            found = node.events.iter().find_map(&wanted);
            found.is_some()
        });
        found.unwrap()
    }

    pub fn exited(&mut self, id: &str) -> monitor::Exit {
        self.event_of(&format!("exit of {id}"), |e| match e {
            monitor::reply::Body::ContainerExited(e) if e.id == id => e.exit.clone(),
            _ => None,
        })
    }

    pub fn exec_exited(&mut self, id: &str) -> monitor::Exit {
        self.event_of(&format!("exit of exec {id}"), |e| match e {
            monitor::reply::Body::ExecExited(e) if e.exec_id == id => e.exit.clone(),
            _ => None,
        })
    }
}

/// Contents of a log's lines of a stream.
pub fn output(log: &str, stream: &str) -> String {
    let mut out = String::new();
    for line in log.lines() {
        let mut fields = line.splitn(4, ' ');
        let (_, of, tag, content) = (fields.next(), fields.next(), fields.next(), fields.next());
        if of == Some(stream) {
            out.push_str(content.unwrap_or_else(|| panic!("a cut line: {line:?}")));
            out.push_str(if tag == Some("F") { "\n" } else { "" });
        }
    }
    out
}
