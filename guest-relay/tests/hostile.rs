//! Guests that are not there, were started again, are gone for good, or say what no honest guest would: the relay believes nothing, goes on,
//! and tells the daemon what it may believe.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)]

mod harness;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use harness::agent::{LONG, SECRET, output};
use harness::fake::{Agent, Fake};
use harness::monitor::{pipe, read_all, sh, until};
use harness::{Daemon, Node};
use lxcri_guest_proto::v1::{self as guest_v1, answer::Answer, call::Call};
use lxcri_monitor_proto::v1::{self, ContainerPhase, ContainerReport, ErrorCode, reply::Body, request::Op};

const BOOT: &str = "11111111-0000";

fn plan(node: &Node, id: &str) -> v1::CreateContainer {
    node.on_node(v1::CreateContainer {
        id: id.into(),
        create: Some(sh("", &[])),
        start: Some(sh("", &[])),
        delete: Some(sh("", &[])),
        pid_file: format!("/run/guest/bundles/{id}/pid"),
        ..Default::default()
    })
}

fn line(n: usize) -> String {
    format!("2026-01-02T03:04:05.123456789Z stdout F line {n}\n")
}

/// A node with a container that the fake guest has started.
fn started(fake: &Fake, id: &str) -> (Node, Daemon, Agent) {
    let node = Node::start();
    node.know(fake.address, SECRET, "");
    let mut silent = node.pod.connect_silent();
    let hello = silent.send(Op::Hello(v1::Hello { version: 1 }), &[]);
    let mut daemon = Daemon(silent);
    let mut agent = fake.meet(BOOT, vec![]);
    assert!(matches!(daemon.0.answer(hello), Body::Hello(_)));
    let create = daemon.0.send(Op::Create(plan(&node, id)), &[]);
    let (call, asked) = agent.asked(|op| matches!(op, Op::Create(_)));
    // The guest is told its own paths, and nothing of the node's.
    let Op::Create(asked) = asked else { unreachable!() };
    assert_eq!(
        (asked.log_path.as_str(), asked.exit_path.as_str()),
        ("/data/logs/c1.log", "/run/guest/bundles/c1/exit.json")
    );
    assert_eq!(asked.info, b"");
    agent.reply(call, Body::Created(v1::Created { pid: 77, pid_start_time: 5 }));
    assert!(matches!(daemon.0.answer(create), Body::Created(v1::Created { pid: 0, pid_start_time: 0 })));
    let start = daemon.0.send(Op::Start(v1::StartContainer { id: id.into() }), &[]);
    let (call, _) = agent.asked(|op| matches!(op, Op::Start(_)));
    agent.reply(call, Body::Started(v1::Started { started_at: 1 }));
    assert!(matches!(daemon.0.answer(start), Body::Started(_)));
    (node, daemon, agent)
}

fn exited(id: &str, code: i32) -> Body {
    let exit = Some(v1::Exit { code, finished_at: 1, ..Default::default() });
    Body::ContainerExited(v1::ContainerExited { id: id.into(), exit })
}

#[test]
fn a_guest_that_was_started_again_has_ended_what_it_had() {
    let fake = Fake::start();
    let (node, mut daemon, mut agent) = started(&fake, "c1");
    let (log, from) = agent.log("c1");
    assert_eq!(from, 0);
    agent.say(log, line(1).as_bytes());
    until("the line is there", || node.log_text("c1") == line(1));
    drop(agent);
    // Its disk still has the rest of the log.
    let mut agent = fake.meet("22222222-0000", vec![]);
    let (log, from) = agent.log("c1");
    assert_eq!(from, line(1).len() as u64);
    agent.say(log, line(2).as_bytes());
    let call = agent.next(|op| matches!(op, Call::EndLog(_)));
    assert_eq!(call.call, Some(Call::EndLog(guest_v1::EndLog { stream: log.number() })));
    agent.answer(call.id, Answer::Done(guest_v1::Done {}));
    agent.connection.mux().end(log);
    agent.flush();
    let exit = daemon.0.exited("c1");
    assert_eq!((exit.code, exit.note.as_str()), (255, "the virtual machine was started again"));
    assert_eq!(node.log_text("c1"), line(1) + &line(2));
    assert_eq!(node.exit_code("c1"), 255);
    // A new container is one of the new run.
    let create = daemon.0.send(Op::Create(plan(&node, "c2")), &[]);
    let (call, _) = agent.asked(|op| matches!(op, Op::Create(_)));
    agent.reply(call, Body::Created(v1::Created::default()));
    assert!(matches!(daemon.0.answer(create), Body::Created(_)));
    drop(agent);
    let report =
        |id: &str, phase: ContainerPhase| ContainerReport { id: id.into(), phase: phase.into(), ..Default::default() };
    let agent = fake.meet("22222222-0000", vec![report("c2", ContainerPhase::PhaseCreated)]);
    assert_eq!(daemon.report("c1").phase(), ContainerPhase::PhaseExited);
    assert_eq!(daemon.report("c2").phase(), ContainerPhase::PhaseCreated);
    // The same guest that does not know it any more.
    drop(agent);
    let mut agent = fake.meet("22222222-0000", vec![]);
    let (log, _) = agent.log("c2");
    agent.connection.mux().reset(log, guest_v1::ResetCode::ResetInvalid as u32);
    agent.flush();
    assert_eq!(daemon.0.exited("c2").note, "the guest does not know the container any more");
}

#[test]
fn a_start_whose_answer_was_lost_is_no_failure() {
    let fake = Fake::start();
    let (node, mut daemon, mut agent) = started(&fake, "c1");
    for id in ["c2", "c3"] {
        let create = daemon.0.send(Op::Create(plan(&node, id)), &[]);
        let (call, _) = agent.asked(|op| matches!(op, Op::Create(_)));
        agent.reply(call, Body::Created(v1::Created::default()));
        assert!(matches!(daemon.0.answer(create), Body::Created(_)));
    }
    let starts = ["c2", "c3"].map(|id| daemon.0.send(Op::Start(v1::StartContainer { id: id.into() }), &[]));
    for _ in starts {
        agent.asked(|op| matches!(op, Op::Start(_)));
    }
    drop(agent);
    let report = |id: &str, started_at: i64| {
        let phase = if started_at == 0 { ContainerPhase::PhaseCreated } else { ContainerPhase::PhaseRunning };
        ContainerReport { id: id.into(), phase: phase.into(), started_at, ..Default::default() }
    };
    let mut agent = fake.meet(BOOT, vec![report("c1", 1), report("c2", 5), report("c3", 0)]);
    assert!(matches!(daemon.0.answer(starts[0]), Body::Started(_)));
    // Of the other one the guest had not heard.
    let (call, op) = agent.asked(|op| matches!(op, Op::Start(_)));
    assert!(matches!(op, Op::Start(start) if start.id == "c3"));
    agent.reply(call, Body::Started(v1::Started { started_at: 9 }));
    assert!(matches!(daemon.0.answer(starts[1]), Body::Started(_)));
}

#[test]
fn a_machine_that_is_gone_has_ended_what_it_had() {
    let fake = Fake::start();
    let (mut node, mut daemon, agent) = started(&fake, "c1");
    node.know(fake.address, SECRET, r#","gone":"it was stopped""#);
    drop(agent);
    // Found out by itself: the connection is lost, and the file is looked at.
    let exit = daemon.0.exited("c1");
    assert_eq!((exit.code, exit.note.as_str(), node.exit_code("c1")), (255, "it was stopped", 255));
    assert!(matches!(daemon.signal("c1", 9), Body::Done(_)));
    let error = daemon.0.error(Op::Create(plan(&node, "c2")));
    assert!(error.code() == ErrorCode::ErrorState && error.message.contains("it was stopped"), "{error:?}");
    daemon.0.delete("c1");
    assert_eq!(daemon.0.hello().containers, []);
    node.pod.shutdown();
}

#[test]
fn what_can_not_be_reached_has_its_time() {
    let fake = Fake::start();
    let node = Node::start();
    node.know(fake.address, SECRET, "");
    // Accepts and says nothing: an attempt is given up, and another one made.
    let begin = Instant::now();
    let mut silent = node.pod.connect_silent();
    let hello = silent.send(Op::Hello(v1::Hello { version: 1 }), &[]);
    let first = fake.accept_raw();
    let second = fake.accept_raw();
    assert!((1900..4000).contains(&(begin.elapsed().as_millis() as u64)), "{:?}", begin.elapsed());
    drop((first, second));
    let mut daemon = Daemon(silent);
    let Body::Hello(reply) = daemon.0.answer(hello) else { panic!("no hello") };
    assert_eq!(reply.containers, []);
    assert!((7900..10_000).contains(&(begin.elapsed().as_millis() as u64)), "{:?}", begin.elapsed());
    let begin = Instant::now();
    let answer = daemon.signal("c1", 15);
    let Body::Error(error) = answer else { panic!("{answer:?}") };
    assert!(error.code() == ErrorCode::ErrorState && error.message.contains("can't be reached"), "{error:?}");
    assert!((7900..10_000).contains(&(begin.elapsed().as_millis() as u64)), "{:?}", begin.elapsed());
    // Pings are answered all the while.
    let start = daemon.0.send(Op::Start(v1::StartContainer { id: "c1".into() }), &[]);
    let begin = Instant::now();
    daemon.0.hello();
    assert!(begin.elapsed() < Duration::from_secs(1));
    // It comes up, and what waits is asked.
    let mut agent = fake.meet(BOOT, vec![]);
    let (body, _) = daemon.0.answer_in(start, LONG);
    let Body::Error(error) = body else { panic!("{body:?}") };
    assert_eq!(error.code(), ErrorCode::ErrorNotFound, "the relay knows that there is none");
    agent.turn();
}

#[test]
fn a_relay_that_starts_without_its_guest_knows_what_ran() {
    let fake = Fake::start();
    let (mut node, daemon, mut agent) = started(&fake, "c1");
    let (log, _) = agent.log("c1");
    agent.say(log, line(1).as_bytes());
    until("the line is there", || node.log_text("c1") == line(1));
    drop((daemon, agent));
    node.kill_relay();
    // Nobody accepts: the first Hello has its time, and then says what was known.
    let mut daemon = node.daemon();
    let report = daemon.report("c1");
    assert_eq!((report.phase(), report.info.as_slice()), (ContainerPhase::PhaseRunning, &b"the record of c1"[..]));
    let ended = ContainerReport {
        id: "c1".into(),
        phase: ContainerPhase::PhaseExited.into(),
        exit: Some(v1::Exit { code: 3, ..Default::default() }),
        ..Default::default()
    };
    let mut agent = fake.meet(BOOT, vec![ended]);
    let (log, from) = agent.log("c1");
    assert_eq!(from, line(1).len() as u64);
    agent.say(log, line(2).as_bytes());
    agent.next(|op| matches!(op, Call::EndLog(_)));
    // Not before its log is at its end.
    assert_eq!(daemon.report("c1").phase(), ContainerPhase::PhaseRunning);
    agent.connection.mux().end(log);
    agent.flush();
    assert_eq!(daemon.0.exited("c1").code, 3);
    assert_eq!(node.log_text("c1"), line(1) + &line(2));
}

#[test]
fn another_secret() {
    let fake = Fake::start();
    let node = Node::start();
    node.know(fake.address, [9; 32], "");
    let mut silent = node.pod.connect_silent();
    let hello = silent.send(Op::Hello(v1::Hello { version: 1 }), &[]);
    // Its first words are not this secret's; an agent ends the connection, and so does this.
    let mut raw = fake.accept_raw();
    let mut record = [0; 50];
    raw.read_exact(&mut record).unwrap();
    let secret = lxcri_guest_proto::Secret::new(SECRET);
    let mut guest = lxcri_guest_proto::Connection::new(lxcri_guest_proto::Side::Guest, &secret).unwrap();
    assert!(guest.input(&record).is_err());
    drop(raw);
    // A guest with another one is not believed either.
    let mut raw = fake.accept_raw();
    raw.write_all(&[0, 48]).unwrap();
    raw.write_all(&[7; 48]).unwrap();
    let ended = raw.read_to_end(&mut Vec::new());
    assert!(
        ended.is_ok() || ended.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset),
        "the relay has ended it"
    );
    // The backend writes the right one, which is seen by the next attempt.
    node.know(fake.address, SECRET, "");
    let agent = fake.meet(BOOT, vec![]);
    let mut daemon = Daemon(silent);
    assert!(matches!(daemon.0.answer(hello), Body::Hello(_)));
    drop(agent);
}

#[test]
fn what_no_honest_guest_says() {
    let fake = Fake::start();
    let (node, mut daemon, mut agent) = started(&fake, "c1");
    // Answers to what nobody asked, events of what nobody knows, exits that are none.
    agent.reply(999, Body::Done(v1::Done {}));
    agent.reply(0, exited("../../etc/x", 0));
    agent.reply(0, exited("c9", 0));
    let text = "x".repeat(5000);
    let of = |container_id: &str| v1::LogTrouble { container_id: container_id.into(), message: text.clone() };
    agent.reply(0, Body::LogTrouble(of("c9")));
    (0..2000).for_each(|_| agent.reply(0, Body::LogTrouble(of("c1"))));
    (0..2000).for_each(|_| agent.reply(0, Body::StdinClosed(v1::StdinClosed { container_id: "c1".into() })));
    (0..2000).for_each(|_| agent.reply(0, Body::InitExited(v1::InitExited::default())));
    (0..2000).for_each(|_| agent.reply(0, Body::Hello(v1::HelloReply::default())));
    let exit = Some(v1::Exit { code: 0, ..Default::default() });
    agent.reply(0, Body::ExecExited(v1::ExecExited { exec_id: "e9".into(), exit, ..Default::default() }));
    // Answers that do not fit the question.
    let exec = daemon.0.send(Op::KillExec(v1::KillExec { exec_id: "e1".into() }), &[]);
    let (call, _) = agent.asked(|op| matches!(op, Op::KillExec(_)));
    agent.reply(call, Body::Hello(v1::HelloReply { pod_info: vec![1; 500_000], ..Default::default() }));
    let Body::Error(error) = daemon.0.answer(exec) else { panic!("no error") };
    assert_eq!(error.message, "the guest's answer makes no sense");
    let exec = daemon.0.send(Op::KillExec(v1::KillExec { exec_id: "e1".into() }), &[]);
    let (call, _) = agent.asked(|op| matches!(op, Op::KillExec(_)));
    agent.reply(call, Body::Error(v1::Error { code: 4711, message: "ä".repeat(200_000), errno: -1 }));
    let Body::Error(error) = daemon.0.answer(exec) else { panic!("no error") };
    assert!(error.message.len() <= 8192 && error.errno == 0, "{}", error.message.len());
    // Lines that are none, and one without an end.
    let (log, _) = agent.log("c1");
    agent.say(log, line(1).as_bytes());
    let bad = "no line\n\n2026-01-02T03:04:05.123456789Z stdin F x\n";
    agent.say(log, bad.as_bytes());
    agent.say(log, &vec![b'x'; 300_000]);
    agent.say(log, b"\n");
    agent.say(log, line(2).as_bytes());
    until("the good ones are there", || node.log_text("c1") == line(1) + &line(2));
    let all = line(1).len() + bad.len() + 300_001 + line(2).len();
    agent.until("all of it is given back", |agent| {
        agent.acknowledged.iter().filter(|(id, _)| *id == log).map(|(_, n)| *n as usize).sum::<usize>() == all
    });
    let told = daemon.0.events.iter().filter(|e| matches!(e, Body::LogTrouble(t) if t.message.len() < 2000)).count();
    assert!((1..30).contains(&told), "{told} of {:?}", daemon.0.events.len());
    assert!(daemon.0.events.len() < 100, "no floods: {}", daemon.0.events.len());
    // An end that is no number of an exit.
    agent.reply(0, exited("c1", 100_000));
    let call = agent.next(|op| matches!(op, Call::EndLog(_)));
    agent.answer(call.id, Answer::Error(v1::Error { code: ErrorCode::ErrorNotFound.into(), ..Default::default() }));
    let exit = daemon.0.exited("c1");
    assert!(exit.code == 255 && exit.note.contains("100000"), "{exit:?}");
    agent.reply(0, exited("c1", 0));
    assert_eq!(daemon.report("c1").exit.unwrap().code, 255, "it ends once");
}

#[test]
fn protocols_that_are_broken() {
    let fake = Fake::start();
    let (node, mut daemon, mut agent) = started(&fake, "c1");
    let running =
        || ContainerReport { id: "c1".into(), phase: ContainerPhase::PhaseRunning.into(), ..Default::default() };
    let (_, _) = agent.log("c1");
    // Streams of its own; bytes that are no records; calls that are no messages, or too long.
    agent.connection.mux().open(b"").unwrap();
    agent.flush();
    agent.ends();
    let mut agent = fake.meet(BOOT, vec![running()]);
    agent.socket.write_all(&[0xff; 1000]).unwrap();
    agent.ends();
    let mut agent = fake.meet(BOOT, vec![running()]);
    agent.say(lxcri_guest_proto::StreamId::CONTROL, &[0xff; 8]);
    agent.ends();
    let mut agent = fake.meet(BOOT, vec![running()]);
    agent.say(lxcri_guest_proto::StreamId::CONTROL, &[0, 0, 0, 2, 0xff, 0xff]);
    agent.ends();
    let mut agent = fake.meet(BOOT, vec![running()]);
    (0..100).for_each(|n| agent.connection.mux().ping(n));
    agent.flush();
    agent.until("pongs", |_| true);
    // Greetings that are none.
    drop(agent);
    for (boot_id, run_dir) in [("", "/run"), ("../x", "/run"), ("1", "run"), (BOOT, &"/".repeat(5000))] {
        let mut agent = fake.accept();
        let call = agent.next(|op| matches!(op, Call::Hello(_)));
        let (boot_id, run_dir) = (boot_id.to_owned(), run_dir.to_owned());
        let hello = guest_v1::HelloAnswer { boot_id, run_dir, data_dir: "/data".into(), ..Default::default() };
        agent.answer(call.id, Answer::Hello(hello));
        agent.ends();
    }
    // Reports that are none: a phase of no name, an end that never was, ids of others.
    let odd = |id: &str| ContainerReport { id: id.into(), phase: 99, pid: -1, ..Default::default() };
    let mut agent = fake.meet(BOOT, vec![odd("c1"), odd("../x"), odd("")]);
    let (log, _) = agent.log("c1");
    assert_eq!(daemon.report("c1").phase(), ContainerPhase::PhaseRunning);
    assert_eq!(daemon.0.hello().containers.len(), 1);
    // A log that the guest says it has not.
    agent.connection.mux().reset(log, guest_v1::ResetCode::ResetGone as u32);
    agent.flush();
    let told = daemon.0.event("it is told", |e| match e {
        Body::LogTrouble(t) => Some(t.message.clone()),
        _ => None,
    });
    assert!(told.contains("has not the part"), "{told}");
    agent.reply(0, exited("c1", 3));
    agent.flush();
    assert_eq!(daemon.0.exited("c1").code, 3);
    assert_eq!(output(&node.log_text("c1"), "stdout"), "");
}

#[test]
fn a_guest_that_answers_nothing_holds_nothing_up() {
    let fake = Fake::start();
    let (_node, mut daemon, mut agent) = started(&fake, "c1");
    // Execs whose output is more than what may be under way, to a reader that takes nothing; another one's goes on.
    let exec =
        |id: &str| v1::Exec { container_id: "c1".into(), exec_id: id.into(), has_stdout: true, ..Default::default() };
    let ((slow, ws), (quick, wq)) = (pipe(), pipe());
    let asked_slow = daemon.0.send(Op::Exec(exec("slow")), &[ws.as_fd()]);
    let asked_quick = daemon.0.send(Op::Exec(exec("quick")), &[wq.as_fd()]);
    drop((ws, wq));
    let mut streams = Vec::new();
    for asked in [asked_slow, asked_quick] {
        let call = agent.next(|op| matches!(op, Call::Monitor(_)));
        let Some(Call::Monitor(request)) = call.call else { unreachable!() };
        streams.push(agent.opened.iter().find(|(id, _)| id.number() == request.descriptors[0]).unwrap().0);
        agent.reply(call.id, Body::ExecStarted(v1::ExecStarted { pid: 3 }));
        assert!(matches!(daemon.0.answer(asked), Body::ExecStarted(v1::ExecStarted { pid: 0 })));
    }
    let mut filled = 0;
    let end = Instant::now() + Duration::from_secs(1);
    while Instant::now() < end {
        filled += agent.connection.mux().write(streams[0], &[b's'; 16384]);
        agent.turn();
    }
    assert!((65536..300_000).contains(&filled), "{filled} bytes: a window and a pipe");
    agent.say(streams[1], &[b'q'; 200_000][..60_000]);
    agent.connection.mux().end(streams[1]);
    agent.flush();
    assert_eq!(read_all(quick).len(), 60_000);
    // Many requests, none of which is answered: at most so many wait.
    let ids: Vec<u64> = (0..1500)
        .map(|n| daemon.0.send(Op::KillExec(v1::KillExec { exec_id: n.to_string() }), &[]))
        .inspect(|_| agent.turn_quick())
        .collect();
    let last = *ids.last().unwrap();
    let Body::Error(error) = daemon.0.answer(last) else { panic!("no error") };
    assert!(error.code() == ErrorCode::ErrorState && error.message.contains("too much"), "{error:?}");
    daemon.0.hello();
    // The connection ends: each of them is answered.
    drop(agent);
    for id in &ids[..10] {
        assert!(matches!(daemon.0.answer(*id), Body::Error(_)));
    }
    let exit = daemon.0.exec_exited("slow").exit.unwrap();
    assert_eq!(exit.code, 255);
    assert!(read_all(slow).len() <= filled);
}
