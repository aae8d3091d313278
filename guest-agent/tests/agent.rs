//! What a node does with a guest, with the real crun: run, exec, attach, signal, exit codes, volumes, ports, connections that are lost.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)]

mod harness;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use harness::*;
use lxcri_guest_proto::v1::{self, ResetCode, answer::Answer as Body, call::Call as Op, purpose};
use lxcri_monitor_proto::v1::{self as monitor, ErrorCode, reply, request};

#[test]
fn a_container_runs_from_a_disk() {
    let guest = Guest::start();
    let mut node = guest.connect();
    let hello = node.hello();
    assert_eq!((hello.run_dir, hello.data_dir), (guest.text("run"), guest.text("data")));
    assert_eq!(hello.boot_id, std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim());
    node.greet();
    let log = node.log("c1", 0);
    node.held.insert(log.number());
    guest.launch(&mut node, "c1", "id -u; echo to-stderr >&2; cat; echo over; exit 42");
    node.until("its first words", |n| {
        output(&n.text(log), "stdout") == "1000\n" && output(&n.text(log), "stderr") == "to-stderr\n"
    });
    // Figures, from the kernel's files.
    let memory = format!("/sys/fs/cgroup/memory{}/memory.limit_in_bytes", guest.cgroup("c1"));
    let Body::Contents(read) = node.done(Op::Read(v1::Read { paths: vec![memory] })) else { panic!("no contents") };
    assert_eq!(read.contents[0].content, b"33554432\n");
    // What it reads comes by an attached client.
    let (input, out) = (node.descriptor(true), node.descriptor(false));
    let attach = monitor::Attach {
        container_id: "c1".into(),
        attach_id: "a1".into(),
        has_stdin: true,
        has_stdout: true,
        ..Default::default()
    };
    assert!(matches!(node.ask(request::Op::Attach(attach), &[input, out]), reply::Body::Done(_)));
    node.send(input, b"typed\n");
    node.until("the echo", |n| n.text(out) == "typed\n");
    node.end(input);
    let close = request::Op::CloseStdin(monitor::CloseStdin { container_id: "c1".into() });
    assert!(matches!(node.ask(close, &[]), reply::Body::Done(_)));
    let exit = node.exited("c1");
    assert_eq!((exit.code, exit.signal, exit.oom), (42, 0, false));
    node.until("the end of the attached client's", |n| n.ended.contains(&out.number()));
    assert_eq!(node.text(out), "typed\nover\n");
    // The log is whole when the end is told, and has an end when the node says so.
    node.done(Op::EndLog(v1::EndLog { stream: log.number() }));
    node.until("the log's end", |n| n.ended.contains(&log.number()));
    assert_eq!(output(&node.text(log), "stdout"), "1000\ntyped\nover\n");
    // Its image can't be taken away under it; afterwards it can, and nothing is left.
    let drop_image = || Op::DropImage(v1::DropImage { serial: SERIAL.into() });
    assert_eq!(node.error(drop_image()).code(), ErrorCode::ErrorState);
    guest.delete(&mut node, "c1");
    node.done(drop_image());
    node.done(Op::ForgetLog(v1::ForgetLog { container_id: "c1".into() }));
    node.done(Op::Remove(v1::Remove { what: Some(v1::remove::What::Run("bundles/c1".into())) }));
    for gone in ["run/images/lxcri-image-1", "run/roots/c1", "run/bundles/c1", "data/logs/c1.log"] {
        assert!(!guest.path(gone).exists(), "{gone}");
    }
}

#[test]
fn execs_and_signals() {
    let guest = Guest::start();
    let mut node = guest.connect();
    node.greet();
    guest.launch(&mut node, "c1", "sleep 1000");
    let (input, out, err) = (node.descriptor(true), node.descriptor(false), node.descriptor(false));
    let mut exec = guest.exec(&mut node, "c1", "e1", "cat; echo bad >&2; exit 9", false);
    (exec.has_stdin, exec.has_stdout, exec.has_stderr) = (true, true, true);
    let started = node.ask(request::Op::Exec(exec), &[input, out, err]);
    assert!(matches!(started, reply::Body::ExecStarted(_)), "{started:?}");
    // More than what may be under way, both ways at once.
    let many: Vec<u8> = (0..300_000u32).map(|n| b'a' + (n % 26) as u8).collect();
    node.send(input, &many);
    node.end(input);
    assert_eq!(node.exec_exited("e1").code, 9);
    node.until("all of its output", |n| n.ended.contains(&out.number()) && n.ended.contains(&err.number()));
    assert!(node.data[&out.number()] == many, "{} bytes of {}", node.data[&out.number()].len(), many.len());
    assert_eq!(node.text(err), "bad\n");
    // A terminal, and its size.
    let (input, out) = (node.descriptor(true), node.descriptor(false));
    let mut exec = guest.exec(&mut node, "c1", "e2", "read x; stty size; exit 3", true);
    (exec.has_stdin, exec.has_stdout) = (true, true);
    let started = node.ask(request::Op::Exec(exec), &[input, out]);
    assert!(matches!(started, reply::Body::ExecStarted(_)), "{started:?}");
    let resize = monitor::ResizeTerminal { exec_id: "e2".into(), width: 90, height: 20, ..Default::default() };
    assert!(matches!(node.ask(request::Op::Resize(resize), &[]), reply::Body::Done(_)));
    node.send(input, b"go\n");
    node.until("its size", |n| n.text(out).ends_with("20 90\r\n"));
    assert_eq!(node.exec_exited("e2").code, 3);
    // What is no descriptor is refused by name, as is what the agent keeps to itself.
    let exec = guest.exec(&mut node, "c1", "e3", "true", false);
    let call = |op, descriptors| Op::Monitor(v1::MonitorCall { request: Some(op), descriptors });
    let request = |id, op| monitor::Request { id, op: Some(op) };
    assert_eq!(
        node.error(call(request(9999, request::Op::Exec(exec.clone())), vec![])).code(),
        ErrorCode::ErrorInvalid
    );
    let id = node.next_id();
    assert_eq!(
        node.error(call(request(id, request::Op::Exec(exec)), vec![out.number()])).code(),
        ErrorCode::ErrorNotFound
    );
    let lend = request::Op::Lend(monitor::Lend { container_id: "c1".into() });
    let id = node.next_id();
    assert_eq!(node.error(call(request(id, lend), vec![])).code(), ErrorCode::ErrorUnknownOperation);
    let signal = monitor::SignalContainer { id: "c1".into(), signal: 9, all: true };
    assert!(matches!(node.ask(request::Op::Signal(signal), &[]), reply::Body::Done(_)));
    let exit = node.exited("c1");
    assert_eq!((exit.code, exit.signal), (137, 9));
    guest.delete(&mut node, "c1");
}

#[test]
fn no_line_is_lost_when_connections_and_agents_are() {
    let mut guest = Guest::start();
    let mut node = guest.connect();
    node.greet();
    let log = node.log("c1", 0);
    node.held.insert(log.number());
    guest.launch(&mut node, "c1", "for n in $(seq 20000); do echo line $n; done; exit 5");
    // Not more is sent than what may be under way. The node has the first half of it for good, and is gone.
    node.until("as much as may be under way", |n| n.data.get(&log.number()).is_some_and(|d| d.len() == 65536));
    let mut kept = node.data[&log.number()][..32768].to_vec();
    node.acknowledge(log, kept.len());
    drop(node);

    // The container goes on and ends, with nobody there; the agent is killed.
    let exit_record = guest.path("run/bundles/c1/exit.json");
    let end = Instant::now() + LONG;
    while !exit_record.exists() {
        assert!(Instant::now() < end, "the container does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    guest.kill_agent();

    let mut node = guest.connect();
    let containers = node.greet().containers;
    assert_eq!(containers.len(), 1);
    assert_eq!(containers[0].exit.as_ref().map(|e| e.code), Some(5));
    let log = node.log("c1", kept.len() as u64);
    node.done(Op::EndLog(v1::EndLog { stream: log.number() }));
    node.until("the log's end", |n| n.ended.contains(&log.number()));
    kept.extend(&node.data[&log.number()]);
    let expected: String = (1..=20000).map(|n| format!("line {n}\n")).collect();
    assert!(output(&String::from_utf8(kept).unwrap(), "stdout") == expected, "every line, once, in order");
    // What the node has for good is not kept; what is not there can't be asked for.
    let again = node.log("c1", 0);
    node.until("its refusal", |n| n.resets.contains_key(&again.number()));
    assert_eq!(node.resets[&again.number()], ResetCode::ResetGone as u32);
    let beyond = node.log("c1", 1 << 40);
    node.until("its refusal", |n| n.resets.contains_key(&beyond.number()));
    assert_eq!(node.resets[&beyond.number()], ResetCode::ResetInvalid as u32);
    guest.delete(&mut node, "c1");
}

#[test]
fn containers_outlive_the_guests_monitor() {
    let guest = Guest::start();
    let mut node = guest.connect();
    node.greet();
    let log = node.log("c1", 0);
    guest.launch(
        &mut node,
        "c1",
        "n=0; while [ $n -lt 300 ]; do n=$((n+1)); echo line $n; sleep 0.01; done; cat; exit 5",
    );
    node.until("its first lines", |n| output(&n.text(log), "stdout").lines().count() > 5);
    let expected: String = (1..=300).map(|n| format!("line {n}\n")).collect();
    let (mut log, mut have) = (log, Vec::new());
    for _ in 0..2 {
        let old = guest.monitor();
        rustix::process::kill_process(rustix::process::Pid::from_raw(old).unwrap(), rustix::process::Signal::KILL)
            .unwrap();
        // The connection ends with the monitor that it talked to.
        let end = Instant::now() + LONG;
        while node.turn(Instant::now() + Duration::from_millis(20)).is_ok() {
            assert!(Instant::now() < end, "the connection goes on");
        }
        have.extend(node.data.remove(&log.number()).unwrap_or_default());
        node = guest.connect();
        let hello = node.greet();
        assert_ne!(hello.pid, old);
        assert_eq!(hello.containers.len(), 1);
        assert_eq!(hello.containers[0].phase(), monitor::ContainerPhase::PhaseRunning);
        log = node.log("c1", have.len() as u64);
        // Some lines by each of them.
        node.until("the next lines", |n| n.data.get(&log.number()).is_some_and(|d| d.len() > 200));
    }
    node.until("all its lines", |n| {
        let all = [have.clone(), n.data.get(&log.number()).cloned().unwrap_or_default()].concat();
        output(&String::from_utf8(all).unwrap(), "stdout") == expected
    });
    // Its stdin is whole, too: it ends when it is said to.
    let close = request::Op::CloseStdin(monitor::CloseStdin { container_id: "c1".into() });
    assert!(matches!(node.ask(close, &[]), reply::Body::Done(_)));
    let exit = node.exited("c1");
    assert!(exit.code == 5 || exit.code == 255 && !exit.note.is_empty(), "{exit:?}");
    guest.delete(&mut node, "c1");
}

#[test]
fn a_newer_connection_ends_the_older_and_its_execs() {
    let guest = Guest::start();
    let mut old = guest.connect();
    old.greet();
    guest.launch(&mut old, "c1", "sleep 1000");
    let out = old.descriptor(false);
    let mut exec = guest.exec(&mut old, "c1", "e1", "echo up; sleep 1000", false);
    exec.has_stdout = true;
    assert!(matches!(old.ask(request::Op::Exec(exec), &[out]), reply::Body::ExecStarted(_)));
    old.until("it runs", |n| n.text(out) == "up\n");
    let before = guest.processes().len();
    // Who proves nothing ends nobody's connection.
    let stranger = std::net::TcpStream::connect(guest.address).unwrap();
    assert!(Node::connect(guest.address, [8; 32], LONG).is_err(), "another secret");
    old.hello();
    drop(stranger);
    let mut node = guest.connect();
    assert_eq!(node.greet().containers.len(), 1);
    let end = Instant::now() + LONG;
    while old.turn(Instant::now() + Duration::from_millis(20)).is_ok() {
        assert!(Instant::now() < end, "the old connection goes on");
    }
    while guest.processes().len() >= before {
        assert!(Instant::now() < end, "the exec goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
    // A secret that others may read is none.
    std::fs::set_permissions(guest.path("secret"), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    assert!(Node::connect(guest.address, SECRET, LONG).is_err());
    guest.delete(&mut node, "c1");
}

#[test]
fn ports_of_the_pod() {
    let guest = Guest::start();
    let mut node = guest.connect();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = match TcpListener::bind(address) {
            Ok(listener) => listener,
            Err(e) if address.starts_with('[') && e.kind() == std::io::ErrorKind::AddrNotAvailable => {
                println!("not run: no IPv6 here");
                continue;
            }
            Err(e) => panic!("{address}: {e}"),
        };
        let port = listener.local_addr().unwrap().port();
        // Says back all that it is told, when it has been told all.
        let echo = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
        });
        let stream = node.open(purpose::Purpose::Port(v1::Port { port: port.into() }));
        let many: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
        node.send(stream, &many);
        node.end(stream);
        node.until("the echo", |n| n.ended.contains(&stream.number()));
        assert!(node.data[&stream.number()] == many);
        echo.join().unwrap();
        let refused = node.open(purpose::Purpose::Port(v1::Port { port: port.into() }));
        node.until("its refusal", |n| n.resets.contains_key(&refused.number()));
        assert_eq!(node.resets[&refused.number()], ResetCode::ResetRefused as u32);
    }
    for port in [0, 65536] {
        let invalid = node.open(purpose::Purpose::Port(v1::Port { port }));
        node.until("its refusal", |n| n.resets.contains_key(&invalid.number()));
        assert_eq!(node.resets[&invalid.number()], ResetCode::ResetInvalid as u32);
    }
}

#[test]
fn a_volume_changes_at_once_in_a_running_container() {
    let guest = Guest::start();
    let mut node = guest.connect();
    node.greet();
    let file = |path: &str, content: &[u8]| v1::File {
        path: path.into(),
        content: content.into(),
        mode: 0o444,
        uid: 0,
        gid: 0,
    };
    let sync = |files: Vec<v1::File>| Op::Sync(v1::Sync { volume: "config".into(), files, folder: None });
    node.done(sync(vec![file("key", b"one\n"), file("deep/other", b"1\n")]));
    guest.volume.set(true);
    let log = node.log("c1", 0);
    let script = "cat /volume/key; while [ \"$(cat /volume/..data/key)\" = one ]; do :; done; cat /volume/key /volume/deep/other";
    guest.launch(&mut node, "c1", script);
    node.until("the first state", |n| output(&n.text(log), "stdout") == "one\n");
    // Longer than what may be under way.
    let long = vec![b'x'; 1024 * 1024];
    node.done(sync(vec![file("key", b"two\n"), file("deep/other", b"2\n"), file("long", &long)]));
    assert_eq!(node.exited("c1").code, 0);
    node.until("the second state", |n| output(&n.text(log), "stdout") == "one\ntwo\n2\n");
    assert!(std::fs::read(guest.path("data/volumes/config/long")).unwrap() == long);
    assert_eq!(node.error(sync(vec![file("../key", b"")])).code(), ErrorCode::ErrorInvalid);
    guest.delete(&mut node, "c1");
    node.done(Op::Remove(v1::Remove { what: Some(v1::remove::What::Volume("config".into())) }));
    assert!(!guest.path("data/volumes/config").exists());
}

#[test]
fn a_create_that_fails_tells_why_and_disks_that_are_not_there() {
    let guest = Guest::start();
    let mut node = guest.connect();
    node.greet();
    let mut plan = guest.plan(&mut node, "c1", "true", false);
    let config = std::fs::read_to_string(guest.path("run/bundles/c1/config.json")).unwrap();
    node.write("bundles/c1/config.json", config.replace("/bin/sh", "/bin/missing").as_bytes());
    match node.ask(request::Op::Create(plan.clone()), &[]) {
        reply::Body::Error(error) => {
            assert_eq!(error.code(), ErrorCode::ErrorProgram);
            assert!(error.message.contains("/bin/missing"), "{error:?}");
        }
        other => panic!("{other:?}"),
    }
    node.write("bundles/c1/config.json", config.as_bytes());
    plan.exit_path = guest.text("run/bundles/c1/second.json");
    assert!(matches!(node.ask(request::Op::Create(plan), &[]), reply::Body::Created(_)));
    node.start("c1");
    assert_eq!(node.exited("c1").code, 0);
    guest.delete(&mut node, "c1");
    let root = |serial: &str, fs_type: &str| {
        Op::MakeRoot(v1::MakeRoot { container_id: "c2".into(), serial: serial.into(), fs_type: fs_type.into() })
    };
    assert_eq!(node.error(root("none", "ext4")).code(), ErrorCode::ErrorNotFound);
    assert_eq!(node.error(root("a/b", "ext4")).code(), ErrorCode::ErrorInvalid);
    assert_eq!(node.error(root(SERIAL, "nfs")).code(), ErrorCode::ErrorInvalid);
}

/// Agent and monitor together, with a container, at rest and after much work.
#[test]
fn memory_is_little() {
    let guest = Guest::start();
    let mut node = guest.connect();
    node.greet();
    guest.launch(&mut node, "c1", "sleep 1000");
    let out = node.descriptor(false);
    let mut exec = guest.exec(&mut node, "c1", "e1", "dd if=/dev/zero bs=65536 count=200 2>/dev/null", false);
    exec.has_stdout = true;
    assert!(matches!(node.ask(request::Op::Exec(exec), &[out]), reply::Body::ExecStarted(_)));
    node.until("its output", |n| n.ended.contains(&out.number()));
    assert_eq!(node.data[&out.number()].len(), 200 * 65536);
    let pss = |pid: i32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let line = text.lines().find(|l| l.starts_with("Pss:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let (agent, monitor) = (pss(guest.agent.id() as i32), pss(guest.monitor()));
    println!("figure: guest agent {agent} KiB, its monitor {monitor} KiB");
    assert!(agent + monitor < 4096, "agent {agent} KiB, monitor {monitor} KiB");
    guest.delete(&mut node, "c1");
}
