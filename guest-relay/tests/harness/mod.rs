//! Drives the real relay over its socket, as the daemon does, with the real agent on its other side ([`World`]) or one that does as a
//! test says ([`fake`]).
//!
//! Everything that a test starts is ended when its [`World`] is dropped, whatever became of the test.
#![allow(dead_code, clippy::disallowed_methods, clippy::unwrap_used)]

#[path = "../../../guest-agent/tests/harness/mod.rs"]
pub mod agent;
pub mod fake;
#[path = "../../../monitor/tests/harness/mod.rs"]
pub mod monitor;
pub mod proxy;

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use agent::{Asks, Guest};
use lxcri_guest_proto::v1 as guest_v1;
use lxcri_monitor_proto::v1::{self, reply::Body, request::Op};
use lxcri_monitor_proto::wire;
use monitor::{Client, Pod};
use prost::Message;

pub const RECORD: &[u8] = b"the pod's record";

/// The relay: as built for this test, or the one that GUEST_RELAY names (the static build).
pub fn program() -> PathBuf {
    std::env::var_os("GUEST_RELAY")
        .map_or_else(|| env!("CARGO_BIN_EXE_proxmox-lxcri-guest-relay").into(), PathBuf::from)
}

/// A relay, its folders, and what the daemon and the backend do about it.
pub struct Node {
    pub pod: Pod,
}

impl Node {
    pub fn start() -> Self {
        let pod = Pod::start_with(RECORD, &program());
        std::fs::create_dir(pod.path("state")).unwrap();
        std::fs::create_dir(pod.path("logs")).unwrap();
        Self { pod }
    }

    /// Tells where the guest is, as the backend does; `more`: of its fields.
    pub fn know(&self, address: SocketAddr, secret: [u8; 32], more: &str) {
        let secret: String = secret.iter().map(|b| format!("{b:02x}")).collect();
        let log_dir = self.pod.path("state");
        let text = format!(r#"{{"address":"{address}","secret":"{secret}","log_dir":"{log_dir}"{more}}}"#);
        let new = self.pod.path("guest.json.new");
        std::fs::write(&new, text).unwrap();
        std::fs::set_permissions(&new, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::rename(&new, self.pod.path("guest.json")).unwrap();
    }

    pub fn daemon(&self) -> Daemon {
        Daemon(self.pod.connect())
    }

    /// kill -9 of the relay, and another one.
    pub fn kill_relay(&mut self) {
        self.pod.kill_monitor();
        self.pod.start_again(RECORD, &program());
    }

    /// The node's paths in a plan.
    pub fn on_node(&self, mut plan: v1::CreateContainer) -> v1::CreateContainer {
        plan.log_path = self.log(&plan.id);
        plan.exit_path = self.pod.path(&format!("{}.exit.json", plan.id));
        plan.info = format!("the record of {}", plan.id).into_bytes();
        plan
    }

    pub fn log(&self, id: &str) -> String {
        self.pod.path(&format!("logs/{id}.log"))
    }

    pub fn log_text(&self, id: &str) -> String {
        std::fs::read_to_string(self.log(id)).unwrap_or_default()
    }

    pub fn exit_code(&self, id: &str) -> i64 {
        self.pod.json(&format!("{id}.exit.json"))["exit_code"].as_i64().unwrap()
    }
}

/// A relay that knows its guest.
pub struct World {
    pub node: Node,
    pub guest: Guest,
}

impl World {
    pub fn start() -> Self {
        let (node, guest) = (Node::start(), Guest::start());
        node.know(guest.address, agent::SECRET, "");
        Self { node, guest }
    }

    pub fn create(&self, daemon: &mut Daemon, id: &str, script: &str, terminal: bool) {
        let plan = self.guest.plan(daemon, id, script, terminal);
        let created = daemon.0.call(Op::Create(self.node.on_node(plan)), &[]);
        // A pid of the guest's would be another process's on the node.
        assert!(matches!(created, Body::Created(v1::Created { pid: 0, .. })), "{created:?}");
    }

    pub fn launch(&self, daemon: &mut Daemon, id: &str, script: &str) {
        self.create(daemon, id, script, false);
        assert!(daemon.0.start(id) > 0);
    }

    pub fn delete(&self, daemon: &mut Daemon, id: &str) {
        daemon.0.delete(id);
        daemon.done(guest_v1::call::Call::RemoveRoot(guest_v1::RemoveRoot { container_id: id.into() }));
        assert!(!self.guest.path(&format!("data/containers/{id}")).exists());
        assert!(!self.guest.path(&format!("data/logs/{id}.log")).exists());
        let left: Vec<_> = std::fs::read_dir(self.node.pod.path("state")).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(!left.iter().any(|p| p.to_string_lossy().contains(&format!("/{id}."))), "{left:?}");
    }
}

/// The daemon's connection.
pub struct Daemon(pub Client);

impl Daemon {
    /// A call for the agent.
    pub fn guest(&mut self, call: &guest_v1::Call) -> Result<guest_v1::Answer, v1::Error> {
        let memfd = wire::to_memfd(&call.encode_to_vec()).unwrap();
        let id = self.0.send(Op::GuestCall(v1::GuestCall {}), &[memfd.as_fd()]);
        match self.0.answer_in(id, 2 * monitor::LONG) {
            (Body::GuestAnswered(_), fds) => {
                assert_eq!(fds.len(), 1);
                Ok(guest_v1::Answer::decode(wire::from_memfd(&fds[0]).unwrap().as_slice()).unwrap())
            }
            (Body::Error(error), _) => Err(error),
            (other, _) => panic!("{other:?}"),
        }
    }

    pub fn signal(&mut self, id: &str, signal: i32) -> Body {
        self.0.call(Op::Signal(v1::SignalContainer { id: id.into(), signal, all: signal == 9 }), &[])
    }

    pub fn report(&mut self, id: &str) -> v1::ContainerReport {
        self.0.hello().containers.into_iter().find(|c| c.id == id).unwrap()
    }
}

impl Asks for Daemon {
    fn done(&mut self, op: guest_v1::call::Call) -> guest_v1::answer::Answer {
        let call = guest_v1::Call { id: 4711, call: Some(op) };
        let answer = self.guest(&call).unwrap();
        assert_eq!(answer.id, 4711);
        answer.answer.unwrap()
    }
}
