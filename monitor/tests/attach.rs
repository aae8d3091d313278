//! Attached clients: what they get, what their input does, and that none of them leaves a descriptor behind.
#![allow(clippy::unwrap_used)]

mod harness;

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use harness::*;
use lxcri_monitor_proto::v1::{self, ErrorCode, reply::Body, request::Op};

/// A running container with stdin.
fn running(pod: &Pod, command: &str, once: bool) -> Client {
    let mut client = pod.connect();
    let mut plan = pod.plan("c1", command);
    if let Some(stdio) = &mut plan.stdio {
        (stdio.stdin, stdio.stdin_once) = (pod.path("c1.in"), once);
    }
    pod.run(&mut client, plan);
    client
}

fn attach(id: &str, fds: [bool; 3]) -> v1::Attach {
    let [has_stdin, has_stdout, has_stderr] = fds;
    v1::Attach { container_id: "c1".into(), attach_id: id.into(), has_stdin, has_stdout, has_stderr }
}

/// Attaches; gives the other ends of stdin and stdout.
fn attached(client: &mut Client, id: &str) -> (std::fs::File, std::fs::File) {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let (out, to) = pipe();
    let fds: Vec<BorrowedFd<'_>> = vec![read.as_fd(), to.as_fd()];
    let answer = client.call(Op::Attach(attach(id, [true, true, false])), &fds);
    assert!(matches!(answer, Body::Done(_)), "{answer:?}");
    (write.into(), out)
}

fn ended(client: &mut Client, id: &str) -> bool {
    client.event(&format!("the end of {id}"), |e| match e {
        Body::AttachEnded(e) if e.attach_id == id => Some(e.lagged),
        _ => None,
    })
}

fn descriptors(pod: &Pod) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", pod.child.id())).unwrap().count()
}

fn line(from: &mut std::fs::File) -> String {
    let mut text = String::new();
    while !text.ends_with('\n') {
        let mut byte = [0];
        from.read_exact(&mut byte).unwrap();
        text.push(char::from(byte[0]));
    }
    text
}

#[test]
fn several_clients_type_and_see_the_same() {
    let pod = Pod::start();
    let mut client = running(&pod, "while read x; do echo got $x; done", false);
    let before = descriptors(&pod);
    let (mut one, mut sees_one) = attached(&mut client, "a1");
    let (mut two, mut sees_two) = attached(&mut client, "a2");
    one.write_all(b"1\n").unwrap();
    assert_eq!((line(&mut sees_one).as_str(), line(&mut sees_two).as_str()), ("got 1\n", "got 1\n"));
    // The end of a client's input changes nothing here.
    drop(one);
    two.write_all(b"2\n").unwrap();
    assert_eq!((line(&mut sees_one).as_str(), line(&mut sees_two).as_str()), ("got 2\n", "got 2\n"));
    // One who goes while nothing is said is noticed.
    drop(sees_one);
    assert!(!ended(&mut client, "a1"));
    drop((two, sees_two));
    assert!(!ended(&mut client, "a2"));
    until("nothing of them is left", || descriptors(&pod) == before);
    assert_eq!(pod.output("c1.log", "stdout"), b"got 1\ngot 2\n");
    let body = client.call(Op::CloseStdin(v1::CloseStdin { container_id: "c1".into() }), &[]);
    assert!(matches!(body, Body::Done(_)));
    assert_eq!(client.exited("c1").code, 0);
}

#[test]
fn the_first_input_that_ends_is_the_last_when_stdin_is_once() {
    let pod = Pod::start();
    let mut client = running(&pod, "cat; echo end; exit 4", true);
    let (mut one, sees_one) = attached(&mut client, "a1");
    let (mut two, sees_two) = attached(&mut client, "a2");
    two.write_all(b"two\n").unwrap();
    one.write_all(b"one\n").unwrap();
    until("both in the log", || pod.output("c1.log", "stdout").len() == 8);
    drop(one);
    assert_eq!(client.exited("c1").code, 4);
    for (id, sees) in [("a1", sees_one), ("a2", sees_two)] {
        assert!(!ended(&mut client, id));
        assert!(read_all(sees).ends_with("end\n"));
    }
    assert!(two.write_all(b"x").is_err(), "nobody takes it");
    assert_eq!(client.error(Op::Attach(attach("a3", [false; 3]))).code(), ErrorCode::ErrorInvalid);
}

#[test]
fn input_alone_ends_with_itself() {
    let pod = Pod::start();
    let mut client = running(&pod, "read x; echo got $x; exec sleep 1000", false);
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let answer = client.call(Op::Attach(attach("a1", [true, false, false])), &[read.as_fd()]);
    assert!(matches!(answer, Body::Done(_)), "{answer:?}");
    drop(read);
    let mut write = std::fs::File::from(write);
    write.write_all(b"it\n").unwrap();
    until("the answer", || pod.output("c1.log", "stdout") == b"got it\n");
    drop(write);
    assert!(!ended(&mut client, "a1"));
    // And with the container, whoever holds it.
    let (read, _write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    client.call(Op::Attach(attach("a2", [true, false, false])), &[read.as_fd()]);
    client.delete("c1");
    assert!(!ended(&mut client, "a2"));
}

#[test]
fn a_client_without_room_is_cut_and_the_others_are_not() {
    let pod = Pod::start();
    let mut client = running(&pod, "read x; seq 100000; exit 3", false);
    let (mut input, slow) = attached(&mut client, "slow");
    let (out, to): (_, OwnedFd) = pipe();
    // All of it has room here, however busy the machine is.
    rustix::pipe::fcntl_setpipe_size(&to, 1 << 20).unwrap();
    let reader = std::thread::spawn(move || read_all(out));
    client.call(Op::Attach(attach("quick", [false, true, false])), &[to.as_fd()]);
    drop(to);
    input.write_all(b"go\n").unwrap();
    assert_eq!(client.exited("c1").code, 3);
    assert!(ended(&mut client, "slow") && !ended(&mut client, "quick"));
    let want: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(reader.join().unwrap() == want && pod.output("c1.log", "stdout") == want.as_bytes());
    let cut = read_all(slow);
    assert!(cut.len() < want.len() && want.starts_with(&cut));
}

#[test]
fn only_what_runs_can_be_attached_to_and_not_by_too_many() {
    let pod = Pod::start();
    let mut client = running(&pod, "exec sleep 1000", false);
    let mut held = Vec::new();
    for n in 0..64 {
        held.push(attached(&mut client, &format!("a{n}")));
    }
    let (_out, to) = pipe();
    let one = |id: &str| attach(id, [false, true, false]);
    let id = client.send(Op::Attach(one("more")), &[to.as_fd()]);
    assert!(matches!(client.answer(id), Body::Error(e) if e.code() == ErrorCode::ErrorState));
    held.clear();
    for n in 0..64 {
        assert!(!ended(&mut client, &format!("a{n}")));
    }
    let mut other = one("other");
    other.container_id = "nobody".into();
    let id = client.send(Op::Attach(other), &[to.as_fd()]);
    assert!(matches!(client.answer(id), Body::Error(e) if e.code() == ErrorCode::ErrorNotFound));
    client.delete("c1");
}
