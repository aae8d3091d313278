//! What a daemon does with a pod in a virtual machine, with the real agent and crun behind the relay: run, logs, exec, attach, exit codes,
//! and everything in between killed or cut.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)]

mod harness;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use harness::agent::{Asks, LONG, SECRET, SERIAL, output, run};
use harness::monitor::{pipe, read_all, until};
use harness::proxy::Proxy;
use harness::{Daemon, Node, RECORD, World};
use lxcri_guest_proto::v1::{self as guest_v1, answer::Answer, call::Call};
use lxcri_monitor_proto::v1::{self, ContainerPhase, ErrorCode, reply::Body, request::Op};

fn lines(count: usize) -> String {
    (1..=count).map(|n| format!("line {n}\n")).collect()
}

fn input_pipe() -> (std::os::fd::OwnedFd, std::fs::File) {
    let (r, w) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    (r, w.into())
}

#[test]
fn a_containers_life() {
    let world = World::start();
    let mut daemon = world.node.daemon();
    world.create(
        &mut daemon,
        "c1",
        "id -u; echo to-stderr >&2; for n in $(seq 5000); do echo line $n; done; exit 42",
        false,
    );
    let report = daemon.report("c1");
    assert_eq!((report.phase(), report.pid), (ContainerPhase::PhaseCreated, 0));
    assert_eq!(report.info, b"the record of c1");
    let again = world.node.on_node(world.guest.plan(&mut daemon, "c1", "true", false));
    assert_eq!(daemon.0.error(Op::Create(again)).code(), ErrorCode::ErrorExists);
    let started_at = daemon.0.start("c1");
    let exit = daemon.0.exited("c1");
    assert_eq!((exit.code, exit.signal, exit.oom, exit.note.as_str()), (42, 0, false, ""));
    assert!(exit.finished_at >= started_at);
    // The log is whole when the end is told, and so is the exit record.
    let log = world.node.log_text("c1");
    assert!(output(&log, "stdout") == format!("1000\n{}", lines(5000)));
    assert_eq!(output(&log, "stderr"), "to-stderr\n");
    let record = world.node.pod.json("c1.exit.json");
    assert_eq!((record["exit_code"].as_i64(), record["started_at"].as_i64()), (Some(42), Some(started_at)));
    let report = daemon.report("c1");
    assert_eq!((report.phase(), report.exit.unwrap().code), (ContainerPhase::PhaseExited, 42));
    assert!(matches!(daemon.signal("c1", 15), Body::Done(_)), "it has ended");
    world.delete(&mut daemon, "c1");
    daemon.0.delete("c1");
    assert_eq!(daemon.0.hello().containers, []);
    // One that is killed, and one that is deleted while it runs.
    world.launch(&mut daemon, "c2", "sleep 1000");
    assert!(matches!(daemon.signal("c2", 9), Body::Done(_)));
    let exit = daemon.0.exited("c2");
    assert_eq!((exit.code, exit.signal), (137, 9));
    world.delete(&mut daemon, "c2");
    world.launch(&mut daemon, "c3", "echo up; sleep 1000");
    until("it runs", || world.node.log_text("c3").ends_with("up\n"));
    world.delete(&mut daemon, "c3");
    assert_eq!(daemon.0.exited("c3").code, 137);
    // A create that fails tells why, and leaves nothing.
    let plan = world.guest.plan(&mut daemon, "c4", "true", false);
    daemon.write("bundles/c4/config.json", b"{}");
    assert_eq!(daemon.0.error(Op::Create(world.node.on_node(plan))).code(), ErrorCode::ErrorProgram);
    assert_eq!(daemon.0.hello().containers, []);
    world.delete(&mut daemon, "c4");
    // What has no log, and what is asked that makes no sense.
    let mut plan = world.node.on_node(world.guest.plan(&mut daemon, "c5", "seq 100000; exit 3", false));
    plan.log_path = String::new();
    assert!(matches!(daemon.0.call(Op::Create(plan.clone()), &[]), Body::Created(_)));
    daemon.0.start("c5");
    assert_eq!(daemon.0.exited("c5").code, 3);
    world.delete(&mut daemon, "c5");
    for (change, why) in [
        ((|p| p.id = "../x".into()) as fn(&mut v1::CreateContainer), "no container's id"),
        (|p| p.exit_path = "x".into(), "absolute"),
        (|p| p.pid_file = "x".into(), "pid file"),
        (|p| p.rootfs_mount_point = "/x".into(), "mounts"),
    ] {
        let mut plan = plan.clone();
        change(&mut plan);
        let error = daemon.0.error(Op::Create(plan));
        assert!(error.code() == ErrorCode::ErrorInvalid && error.message.contains(why), "{error:?}");
    }
    assert_eq!(daemon.0.error(Op::Lend(v1::Lend::default())).code(), ErrorCode::ErrorUnknownOperation);
    let start = v1::StartContainer { id: "none".into() };
    assert_eq!(daemon.0.error(Op::Start(start)).code(), ErrorCode::ErrorNotFound);
}

#[test]
fn without_a_guest() {
    let mut node = Node::start();
    let mut daemon = node.daemon();
    assert_eq!(daemon.0.hello().pod_info, RECORD);
    assert!(matches!(daemon.0.call(Op::SetPodInfo(v1::SetPodInfo { pod_info: b"new".to_vec() }), &[]), Body::Done(_)));
    assert_eq!(daemon.0.hello().pod_info, b"new");
    let start = || Op::Start(v1::StartContainer { id: "c1".into() });
    let error = daemon.0.error(start());
    assert_eq!((error.code(), error.message.as_str()), (ErrorCode::ErrorState, "the guest is not known yet"));
    let error = daemon.guest(&guest_v1::Call::default()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::ErrorState);
    // A file that is none says so, and not what is in it.
    std::fs::write(node.pod.path("guest.json"), "secret").unwrap();
    let error = daemon.0.error(start());
    assert!(error.code() == ErrorCode::ErrorState && error.message.contains("guest.json"), "{error:?}");
    let mut silent = node.pod.connect_silent();
    assert_eq!(silent.error(start()).message, "the first request is Hello");
    node.pod.shutdown();
    assert!(!std::fs::exists(node.pod.path("monitor.sock")).unwrap());
}

#[test]
fn calls_of_the_guests() {
    let world = World::start();
    let mut daemon = world.node.daemon();
    let Answer::Hello(hello) = daemon.done(Call::Hello(guest_v1::Hello {})) else { panic!("no hello") };
    assert_eq!((hello.run_dir, hello.data_dir), (world.guest.text("run"), world.guest.text("data")));
    // More than what may be under way, both ways.
    let file = |n: usize| guest_v1::File {
        path: format!("f{n}"),
        content: vec![n as u8; 900_000],
        mode: 0o444,
        ..Default::default()
    };
    daemon.done(Call::Sync(guest_v1::Sync {
        volume: "config".into(),
        files: (0..4).map(file).collect(),
        folder: None,
    }));
    assert_eq!(std::fs::read(world.guest.path("data/volumes/config/f3")).unwrap(), vec![3; 900_000]);
    (0..20).for_each(|n| daemon.write(&format!("files/{n}"), &[n; 60_000]));
    let paths = (0..20).map(|n| world.guest.text(&format!("run/files/{n}"))).chain(["/proc/none".into()]).collect();
    let Answer::Contents(read) = daemon.done(Call::Read(guest_v1::Read { paths })) else { panic!("no contents") };
    assert!(read.contents[..20].iter().enumerate().all(|(n, c)| c.content == vec![n as u8; 60_000]));
    assert_eq!(read.contents[20].errno, 2);
    // The guest's own refusals are errors as any, and what is not passed on is refused.
    let call = |call| guest_v1::Call { id: 1, call: Some(call) };
    let root = guest_v1::MakeRoot { container_id: "c".into(), serial: "none".into(), fs_type: "ext4".into() };
    assert_eq!(daemon.guest(&call(Call::MakeRoot(root))).unwrap_err().code(), ErrorCode::ErrorNotFound);
    for refused in [
        Call::EndLog(guest_v1::EndLog { stream: 1 }),
        Call::ForgetLog(guest_v1::ForgetLog { container_id: "c".into() }),
        Call::Monitor(guest_v1::MonitorCall::default()),
    ] {
        assert_eq!(daemon.guest(&call(refused)).unwrap_err().code(), ErrorCode::ErrorInvalid);
    }
    assert_eq!(daemon.guest(&guest_v1::Call::default()).unwrap_err().code(), ErrorCode::ErrorInvalid);
    assert_eq!(daemon.0.error(Op::GuestCall(v1::GuestCall {})).code(), ErrorCode::ErrorInvalid);
    daemon.done(Call::DropImage(guest_v1::DropImage { serial: SERIAL.into() }));
}

fn exec(world: &World, daemon: &mut Daemon, id: &str, script: &str, terminal: bool) -> v1::Exec {
    world.guest.exec(daemon, "c1", id, script, terminal)
}

#[test]
fn execs() {
    let world = World::start();
    let mut daemon = world.node.daemon();
    world.launch(&mut daemon, "c1", "sleep 1000");
    // More than what may be under way, both ways at once.
    let many: Vec<u8> = (0..500_000u32).map(|n| b'a' + (n % 26) as u8).collect();
    let ((stdin, mut typed), (out, w), (err, we)) = (input_pipe(), pipe(), pipe());
    let mut request = exec(&world, &mut daemon, "e1", "cat; echo bad >&2; exit 9", false);
    (request.has_stdin, request.has_stdout, request.has_stderr) = (true, true, true);
    let started = daemon.0.call(Op::Exec(request.clone()), &[stdin.as_fd(), w.as_fd(), we.as_fd()]);
    assert!(matches!(started, Body::ExecStarted(v1::ExecStarted { pid: 0 })), "{started:?}");
    drop((stdin, w, we));
    let writer = std::thread::spawn({
        let many = many.clone();
        move || typed.write_all(&many)
    });
    assert!(read_all(out).as_bytes() == many);
    writer.join().unwrap().unwrap();
    assert_eq!(read_all(err), "bad\n");
    let exited = daemon.0.exec_exited("e1");
    assert_eq!((exited.container_id.as_str(), exited.exit.unwrap().code, exited.timed_out), ("c1", 9, false));
    // One whose reader takes nothing holds up nobody else, and its end is told all the same.
    let (slow, w) = pipe();
    let mut request = exec(&world, &mut daemon, "e2", "dd if=/dev/zero bs=1000 count=300 2>/dev/null; exit 4", false);
    request.has_stdout = true;
    assert!(matches!(daemon.0.call(Op::Exec(request), &[w.as_fd()]), Body::ExecStarted(_)));
    drop(w);
    let (out, w) = pipe();
    let mut request = exec(&world, &mut daemon, "e3", "echo quick; exit 5", false);
    request.has_stdout = true;
    assert!(matches!(daemon.0.call(Op::Exec(request), &[w.as_fd()]), Body::ExecStarted(_)));
    drop(w);
    assert_eq!(read_all(out), "quick\n");
    assert_eq!(daemon.0.exec_exited("e3").exit.unwrap().code, 5);
    assert_eq!(read_all(slow).len(), 300_000);
    assert_eq!(daemon.0.exec_exited("e2").exit.unwrap().code, 4);
    // What its process leaves running holds its output open, and its end is told before that.
    let (out, w) = pipe();
    let mut request = exec(&world, &mut daemon, "e4", "(sleep 3; echo late) & exit 6", false);
    request.has_stdout = true;
    assert!(matches!(daemon.0.call(Op::Exec(request), &[w.as_fd()]), Body::ExecStarted(_)));
    drop(w);
    assert_eq!(daemon.0.exec_exited("e4").exit.unwrap().code, 6);
    drop(out);
    // Its time, its end on demand, the end of whoever asked for it.
    let mut request = exec(&world, &mut daemon, "e5", "sleep 1000", false);
    request.timeout_ms = 200;
    assert!(matches!(daemon.0.call(Op::Exec(request), &[]), Body::ExecStarted(_)));
    let exited = daemon.0.exec_exited("e5");
    assert!(exited.timed_out && exited.exit.unwrap().signal == 9);
    let request = exec(&world, &mut daemon, "e6", "sleep 1000", false);
    assert!(matches!(daemon.0.call(Op::Exec(request), &[]), Body::ExecStarted(_)));
    assert!(matches!(daemon.0.call(Op::KillExec(v1::KillExec { exec_id: "e6".into() }), &[]), Body::Done(_)));
    assert_eq!(daemon.0.exec_exited("e6").exit.unwrap().signal, 9);
    let mut other = world.node.daemon();
    let (out, w) = pipe();
    let mut request = exec(&world, &mut other, "e7", "echo up; sleep 1000", false);
    request.has_stdout = true;
    assert!(matches!(other.0.call(Op::Exec(request), &[w.as_fd()]), Body::ExecStarted(_)));
    drop((w, other));
    assert_eq!(read_all(out), "up\n");
    assert_eq!(daemon.0.exec_exited("e7").exit.unwrap().signal, 9);
    // What fails, and what does not fit.
    let mut request = exec(&world, &mut daemon, "e8", "true", false);
    let args = &mut request.program.as_mut().unwrap().args;
    let at = args.iter().position(|a| a == "--process").unwrap();
    args[at + 1] = "/none".into();
    let error = daemon.0.error(Op::Exec(request.clone()));
    assert_eq!(error.code(), ErrorCode::ErrorProgram, "{error:?}");
    request.has_stdin = true;
    assert_eq!(daemon.0.error(Op::Exec(request.clone())).code(), ErrorCode::ErrorInvalid);
    request.has_stdin = false;
    request.container_id = "none".into();
    assert_eq!(daemon.0.error(Op::Exec(request)).code(), ErrorCode::ErrorNotFound);
    world.delete(&mut daemon, "c1");
}

#[test]
fn terminals() {
    let world = World::start();
    let mut daemon = world.node.daemon();
    world.create(&mut daemon, "c1", "read x; stty size; echo \"got $x\"; exit 7", true);
    daemon.0.start("c1");
    let resize = |exec: &str, width| {
        Op::Resize(v1::ResizeTerminal { container_id: "c1".into(), exec_id: exec.into(), width, height: 20 })
    };
    assert!(matches!(daemon.0.call(resize("", 90), &[]), Body::Done(_)));
    // An exec's, of its own size.
    let ((stdin, mut typed), (out, w)) = (input_pipe(), pipe());
    let mut request = exec(&world, &mut daemon, "e1", "read x; stty size; exit 3", true);
    (request.has_stdin, request.has_stdout) = (true, true);
    assert!(matches!(daemon.0.call(Op::Exec(request), &[stdin.as_fd(), w.as_fd()]), Body::ExecStarted(_)));
    drop((stdin, w));
    assert!(matches!(daemon.0.call(resize("e1", 70), &[]), Body::Done(_)));
    typed.write_all(b"go\n").unwrap();
    assert_eq!(daemon.0.exec_exited("e1").exit.unwrap().code, 3);
    assert!(read_all(out).ends_with("20 70\r\n"));
    // The container's, by an attached client.
    let ((stdin, mut typed), (out, w)) = (input_pipe(), pipe());
    let attach = v1::Attach {
        container_id: "c1".into(),
        attach_id: "a1".into(),
        has_stdin: true,
        has_stdout: true,
        ..Default::default()
    };
    assert!(matches!(daemon.0.call(Op::Attach(attach), &[stdin.as_fd(), w.as_fd()]), Body::Done(_)));
    drop((stdin, w));
    typed.write_all(b"typed\n").unwrap();
    assert_eq!(daemon.0.exited("c1").code, 7);
    assert!(read_all(out).ends_with("20 90\r\ngot typed\r\n"));
    assert!(output(&world.node.log_text("c1"), "stdout").contains("got typed"));
    world.delete(&mut daemon, "c1");
}

#[test]
fn attached_clients() {
    let world = World::start();
    let mut daemon = world.node.daemon();
    world.launch(&mut daemon, "c1", "cat; echo over; sleep 0.2; seq 200000; exit 8");
    let attach = |id: &str, has_stdin| v1::Attach {
        container_id: "c1".into(),
        attach_id: id.into(),
        has_stdin,
        has_stdout: true,
        ..Default::default()
    };
    let ((stdin, mut typed), (out, w)) = (input_pipe(), pipe());
    rustix::pipe::fcntl_setpipe_size(&w, 1 << 20).unwrap();
    assert!(matches!(daemon.0.call(Op::Attach(attach("a1", true)), &[stdin.as_fd(), w.as_fd()]), Body::Done(_)));
    let (slow, ws) = pipe();
    assert!(matches!(daemon.0.call(Op::Attach(attach("a2", false)), &[ws.as_fd()]), Body::Done(_)));
    // One that goes before anything is said.
    let (gone, wg) = pipe();
    assert!(matches!(daemon.0.call(Op::Attach(attach("a3", false)), &[wg.as_fd()]), Body::Done(_)));
    drop((stdin, w, ws, wg, gone));
    let ended = |daemon: &mut Daemon, id: &str| {
        daemon.0.event(&format!("the end of {id}"), |e| match e {
            Body::AttachEnded(e) if e.attach_id == id => Some(e.lagged),
            _ => None,
        })
    };
    assert!(!ended(&mut daemon, "a3"));
    typed.write_all(b"typed\n").unwrap();
    until("it is echoed", || output(&world.node.log_text("c1"), "stdout") == "typed\n");
    let reader = std::thread::spawn(move || read_all(out));
    assert!(matches!(daemon.0.call(Op::CloseStdin(v1::CloseStdin { container_id: "c1".into() }), &[]), Body::Done(_)));
    daemon.0.event("its stdin is closed", |e| matches!(e, Body::StdinClosed(_)).then_some(()));
    assert_eq!(daemon.0.exited("c1").code, 8);
    let want = format!("typed\nover\n{}", (1..=200_000).map(|n| format!("{n}\n")).collect::<String>());
    // Who lags behind by more than the buffers is cut off, and has a beginning.
    assert!(ended(&mut daemon, "a2"));
    let cut = read_all(slow);
    assert!(cut.len() < want.len() && want.starts_with(&cut));
    assert!(output(&world.node.log_text("c1"), "stdout") == want, "the log has all");
    let lagged = ended(&mut daemon, "a1");
    let got = reader.join().unwrap();
    assert!(if lagged { want.starts_with(&got) } else { got == want }, "{} of {}", got.len(), want.len());
    world.delete(&mut daemon, "c1");
}

#[test]
fn logs_are_rotated() {
    let world = World::start();
    let mut daemon = world.node.daemon();
    world.launch(&mut daemon, "c1", "for n in $(seq 3000); do echo line $n; done; exit 0");
    let reopen = || Op::ReopenLog(v1::ReopenLog { container_id: "c1".into() });
    let mut parts = Vec::new();
    for n in 0..5 {
        let old = world.node.pod.path(&format!("logs/c1.log.{n}"));
        std::fs::rename(world.node.log("c1"), &old).unwrap();
        assert!(matches!(daemon.0.call(reopen(), &[]), Body::Done(_)));
        parts.push(old);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(daemon.0.exited("c1").code, 0);
    parts.push(world.node.log("c1"));
    let all: String = parts.iter().map(|p| std::fs::read_to_string(p).unwrap()).collect();
    assert!(output(&all, "stdout") == lines(3000));
    world.delete(&mut daemon, "c1");
    assert_eq!(daemon.0.error(reopen()).code(), ErrorCode::ErrorNotFound);
}

/// A small file system, unmounted whatever becomes of the test.
struct Small(String);

impl Small {
    fn mount(path: String) -> Self {
        run("mount", &["-t", "tmpfs", "-o", "size=64k", "lxcri-test", &path]);
        Self(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").args(["-l", &self.0]).status();
    }
}

#[test]
fn a_disk_that_is_full_holds_the_log_up_and_loses_nothing() {
    let mut world = World::start();
    let small = Small::mount(world.node.pod.path("logs"));
    let mut daemon = world.node.daemon();
    world.launch(&mut daemon, "c1", "for n in $(seq 10000); do echo line $n; done; exit 4");
    let trouble = |daemon: &mut Daemon, wanted: bool| {
        daemon.0.event("what is told of the log", |e| match e {
            Body::LogTrouble(t) if t.message.is_empty() != wanted => Some(t.message.clone()),
            _ => None,
        })
    };
    let told = trouble(&mut daemon, true);
    assert!(told.contains("No space left"), "{told}");
    // A relay that is killed meanwhile makes it no worse.
    world.node.kill_relay();
    let mut daemon = world.node.daemon();
    assert!(trouble(&mut daemon, true).contains("No space left"));
    run("mount", &["-o", "remount,size=64m", &small.0]);
    assert_eq!(trouble(&mut daemon, false), "");
    let exit = match daemon.report("c1") {
        v1::ContainerReport { exit: Some(exit), .. } => exit,
        _ => daemon.0.exited("c1"),
    };
    assert_eq!(exit.code, 4);
    assert!(output(&world.node.log_text("c1"), "stdout") == lines(10000), "every line, once, in order");
    world.delete(&mut daemon, "c1");
}

#[test]
fn no_line_is_lost_or_doubled_when_the_relay_is_killed() {
    let mut world = World::start();
    let mut daemon = world.node.daemon();
    world.launch(&mut daemon, "c1", "n=0; while [ $n -lt 60000 ]; do n=$((n+1)); echo line $n; done; exit 5");
    let mut kills = 0;
    let mut killed_at = 0;
    while kills < 15 {
        let until = Instant::now() + Duration::from_millis(7 * (kills % 5) + 3);
        // In the middle of writing.
        while world.node.log_text("c1").len() == killed_at && Instant::now() < until + LONG {}
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        world.node.kill_relay();
        kills += 1;
        daemon = world.node.daemon();
        killed_at = world.node.log_text("c1").len();
        let report = daemon.report("c1");
        assert_eq!(report.info, b"the record of c1");
        if report.phase() == ContainerPhase::PhaseExited {
            break;
        }
    }
    println!("figure: {kills} relays killed");
    assert!(kills >= 3, "it ended too early for this test");
    let exit = match daemon.report("c1") {
        v1::ContainerReport { exit: Some(exit), .. } => exit,
        _ => daemon.0.exited("c1"),
    };
    assert_eq!(exit.code, 5);
    assert!(output(&world.node.log_text("c1"), "stdout") == lines(60000), "every line, once, in order");
    assert_eq!(world.node.exit_code("c1"), 5);
    world.delete(&mut daemon, "c1");
}

#[test]
fn what_happened_while_there_was_no_relay() {
    let mut world = World::start();
    let mut daemon = world.node.daemon();
    world.launch(&mut daemon, "c1", "read x; echo end; exit 3");
    world.create(&mut daemon, "c2", "exit 0", false);
    world.node.pod.kill_monitor();
    // The same, as of an agent that nobody is connected to.
    let stdin = world.guest.path("run/bundles/c1/in");
    std::fs::File::options().write(true).open(stdin).unwrap().write_all(b"go\n").unwrap();
    until("it has ended", || world.guest.path("run/bundles/c1/exit.json").exists());
    world.node.pod.start_again(RECORD, &harness::program());
    let mut daemon = world.node.daemon();
    let exit = match daemon.report("c1") {
        v1::ContainerReport { exit: Some(exit), .. } => exit,
        _ => daemon.0.exited("c1"),
    };
    assert_eq!((exit.code, world.node.exit_code("c1")), (3, 3));
    assert_eq!(output(&world.node.log_text("c1"), "stdout"), "end\n");
    assert_eq!(daemon.report("c2").phase(), ContainerPhase::PhaseCreated);
    daemon.0.start("c2");
    assert_eq!(daemon.0.exited("c2").code, 0);
    world.delete(&mut daemon, "c1");
    world.delete(&mut daemon, "c2");
}

#[test]
fn an_agent_that_is_killed_and_connections_that_are_cut() {
    let mut world = World::start();
    let proxy = Proxy::to(world.guest.address);
    world.node.know(proxy.address, SECRET, "");
    let mut daemon = world.node.daemon();
    world.launch(&mut daemon, "c1", "n=0; while [ $n -lt 30000 ]; do n=$((n+1)); echo line $n; done; read x; exit 5");
    let (out, w) = pipe();
    let mut request = exec(&world, &mut daemon, "e1", "echo up; sleep 1000", false);
    request.has_stdout = true;
    assert!(matches!(daemon.0.call(Op::Exec(request), &[w.as_fd()]), Body::ExecStarted(_)));
    drop(w);
    let mut out = out;
    out.read_exact(&mut [0; 3]).unwrap();
    assert!(proxy.cut() > 0);
    // Execs end with their connection, containers go on.
    let exit = daemon.0.exec_exited("e1").exit.unwrap();
    assert!(exit.code == 255 && exit.note.contains("connection"), "{exit:?}");
    assert_eq!(read_all(out), "");
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(30));
        proxy.cut();
    }
    world.guest.kill_agent();
    // Requests wait for it.
    let start = v1::StartContainer { id: "c1".into() };
    assert_eq!(daemon.0.error(Op::Start(start)).code(), ErrorCode::ErrorState);
    until("all lines", || world.node.log_text("c1").ends_with(" line 30000\n"));
    assert!(output(&world.node.log_text("c1"), "stdout") == lines(30000), "every line, once, in order");
    assert_eq!(daemon.report("c1").phase(), ContainerPhase::PhaseRunning);
    let close = Op::CloseStdin(v1::CloseStdin { container_id: "c1".into() });
    assert!(matches!(daemon.0.call(close, &[]), Body::Done(_)));
    let exit = daemon.0.exited("c1");
    assert!(exit.code == 5, "{exit:?}");
    world.delete(&mut daemon, "c1");
}

#[test]
fn a_shutdown_ends_what_runs() {
    let mut world = World::start();
    let mut daemon = world.node.daemon();
    world.launch(&mut daemon, "c1", "sleep 1000");
    let shutdown = |force| Op::Shutdown(v1::Shutdown { force });
    assert_eq!(daemon.0.error(shutdown(false)).code(), ErrorCode::ErrorState);
    world.node.pod.shutdown();
    assert_eq!(daemon.0.exited("c1").code, 137);
    assert!(!std::fs::exists(world.node.pod.path("monitor.sock")).unwrap());
    assert_eq!(std::fs::read_dir(world.node.pod.path("state")).unwrap().count(), 0);
}

/// A relay at rest with a container, and after much work.
#[test]
fn memory_is_little() {
    let world = World::start();
    let mut daemon = world.node.daemon();
    world.launch(&mut daemon, "c1", "seq 50000; sleep 1000");
    until("its output", || world.node.log_text("c1").ends_with(" 50000\n"));
    let (out, w) = pipe();
    let mut request = exec(&world, &mut daemon, "e1", "dd if=/dev/zero bs=65536 count=200 2>/dev/null", false);
    request.has_stdout = true;
    assert!(matches!(daemon.0.call(Op::Exec(request), &[w.as_fd()]), Body::ExecStarted(_)));
    drop(w);
    assert_eq!(read_all(out).len(), 200 * 65536);
    daemon.0.exec_exited("e1");
    let pid = world.node.pod.child.id();
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let of = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    println!("figure: guest relay {} KiB, of its own {} KiB", of("Pss:"), of("Pss_Anon:"));
    // Its code is shared by all relays of a node, and bigger in a build for tests.
    assert!(of("Pss_Anon:") < 1024, "{text}");
    assert!(std::env::var_os("GUEST_RELAY").is_none() || of("Pss:") < 1280, "{text}");
    world.delete(&mut daemon, "c1");
}
