//! A container's life under the real monitor, with a shell script in the place of the runtime.
#![allow(clippy::unwrap_used, unsafe_code, clippy::disallowed_methods)]

mod harness;

use std::os::fd::AsFd;

use harness::*;
use lxcri_monitor_proto::v1::{self, ErrorCode, reply::Body, request::Op};

#[test]
fn output_exit_code_and_record() {
    let pod = Pod::start();
    let mut client = pod.connect_silent();
    let hello = client.hello();
    assert_eq!(
        (hello.version, hello.pid, hello.pod_info.as_slice()),
        (1, pod.child.id() as i32, &b"the pod's record"[..])
    );

    let created = pod.create(&mut client, pod.plan("c1", "echo one; echo two >&2; printf three; exit 7"));
    assert!(alive(created.pid) && created.pid_start_time > 0);
    let started_at = client.start("c1");
    let exit = client.exited("c1");
    assert_eq!((exit.code, exit.signal, exit.oom, exit.note.as_str()), (7, 0, false, ""));
    assert!(exit.finished_at >= started_at);
    assert_eq!(pod.output("c1.log", "stdout"), b"one\nthree");
    assert_eq!(pod.output("c1.log", "stderr"), b"two\n");
    let record = pod.json("c1.exit.json");
    assert_eq!((record["exit_code"].as_i64(), record["started_at"].as_i64()), (Some(7), Some(started_at)));

    let report = &pod.connect_silent().hello().containers[0];
    assert_eq!((report.phase(), report.pid), (v1::ContainerPhase::PhaseExited, created.pid));
    assert_eq!(report.exit.as_ref(), Some(&exit));
    client.delete("c1");
    client.delete("c1");
    assert!(!std::fs::exists(pod.path("c1.out")).unwrap());
    assert!(!std::fs::exists(pod.path("c1.pid")).unwrap(), "delete has run");
    assert!(pod.connect_silent().hello().containers.is_empty());
    // What the monitor has is not what its containers get.
    let mut plan =
        pod.plan("c2", "ls -l /proc/self/fd | wc -l; grep -c . /proc/self/environ; grep Sig[BI] /proc/self/status");
    plan.info = b"info".to_vec();
    pod.run(&mut client, plan);
    client.exited("c2");
    let text = String::from_utf8(pod.output("c2.log", "stdout")).unwrap();
    // A background job of a shell ignores SIGINT and SIGQUIT; what the C library keeps to itself (32, 33) is not ours.
    assert!(text.contains("SigBlk:\t0000000000000000\n"), "{text}");
    let ignored = text.split("SigIgn:\t").nth(1).map(|t| u64::from_str_radix(t.trim(), 16).unwrap()).unwrap();
    assert_eq!(ignored & !0x1_8000_0006, 0, "{text}");
    assert_eq!(pod.connect_silent().hello().containers[0].info, b"info");
}

#[test]
fn a_hundred_thousand_lines_in_order_and_none_lost() {
    let pod = Pod::start();
    let mut client = pod.connect();
    pod.run(&mut client, pod.plan("c1", "seq 100000; seq 5 >&2"));
    assert_eq!(client.exited("c1").code, 0);
    let want: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(pod.output("c1.log", "stdout") == want.as_bytes());
    assert_eq!(pod.output("c1.log", "stderr"), b"1\n2\n3\n4\n5\n");
}

#[test]
fn long_lines_are_cut_and_unfinished_ones_written_at_once() {
    let pod = Pod::start();
    let mut client = pod.connect();
    let mut plan = pod.plan("c1", "head -c 100000 /dev/zero | tr '\\0' x; printf prompt: >&2; read never; echo");
    plan.log_line_max = 1000;
    plan.stdio.as_mut().unwrap().stdin = pod.path("c1.in");
    pod.run(&mut client, plan);
    until("the prompt is in the log", || pod.output("c1.log", "stderr") == b"prompt:");
    let answer = client.call(Op::CloseStdin(v1::CloseStdin { container_id: "c1".into() }), &[]);
    assert!(matches!(answer, Body::Done(_)));
    client.exited("c1");
    let log = pod.log("c1.log");
    assert!(log.iter().all(|(_, _, content)| content.len() <= 1000));
    assert_eq!(pod.output("c1.log", "stdout"), [vec![b'x'; 100_000], vec![b'\n']].concat());
}

#[test]
fn a_log_that_grows_too_fast_begins_anew_and_says_so() {
    const LIMIT: u64 = 1 << 20;
    let pod = Pod::start();
    let mut client = pod.connect();
    let mut plan = pod.plan("c1", "head -c 30000000 /dev/zero | tr '\\0' x | fold -w 99; echo; echo the end");
    plan.log_size_max = LIMIT;
    pod.run(&mut client, plan);
    let (mut dropped, mut largest) = (0, 0);
    let exit = loop {
        // Of each look the size is no more than the limit and what one write has in it.
        largest = largest.max(std::fs::metadata(pod.path("c1.log")).map_or(0, |m| m.len()));
        let told = client.event("a log that begins anew, or the end", |e| {
            matches!(e, Body::LogDropped(_) | Body::ContainerExited(_)).then(|| e.clone())
        });
        match told {
            Body::LogDropped(e) => dropped += e.bytes,
            Body::ContainerExited(e) => break e.exit.unwrap(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(exit.code, 0);
    assert!(largest <= LIMIT, "{largest}");
    assert!(dropped > 29_000_000, "{dropped}");
    let text = String::from_utf8(std::fs::read(pod.path("c1.log")).unwrap()).unwrap();
    let first = text.lines().next().unwrap();
    assert!(first.contains(" stderr F proxmox-lxcri: the ") && first.contains("log_size_max"), "{first}");
    assert!(text.ends_with(" stdout F the end\n") && text.len() as u64 <= LIMIT, "{}", text.len());
    // Nothing beside it is left.
    let names = std::fs::read_dir(std::path::Path::new(&pod.path("c1.log")).parent().unwrap()).unwrap();
    let logs = names.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with("c1.log")).count();
    assert_eq!(logs, 1);
}

#[test]
fn signals_and_stdin() {
    let pod = Pod::start();
    let mut client = pod.connect();
    pod.run(&mut client, pod.plan("killed", "kill -SEGV $$"));
    let exit = client.exited("killed");
    assert_eq!((exit.code, exit.signal), (128 + 11, 11));

    let mut plan = pod.plan("cat", "exec cat");
    plan.stdio.as_mut().unwrap().stdin = pod.path("cat.in");
    pod.run(&mut client, plan);
    let mut stdin = std::fs::File::options().write(true).open(pod.path("cat.in")).unwrap();
    std::io::Write::write_all(&mut stdin, b"hello\n").unwrap();
    drop(stdin);
    until("cat has answered", || pod.output("cat.log", "stdout") == b"hello\n");
    let signal = |signal| Op::Signal(v1::SignalContainer { id: "cat".into(), signal, all: false });
    assert_eq!(client.error(signal(65)).code(), ErrorCode::ErrorInvalid);
    // A real-time signal, as systemd's stop signal is one.
    assert!(matches!(client.call(signal(libc::SIGRTMIN() + 3), &[]), Body::Done(_)));
    assert_eq!(client.exited("cat").signal, libc::SIGRTMIN() + 3);
    assert!(matches!(client.call(signal(15), &[]), Body::Done(_)), "one that has ended is no error");
    assert_eq!(
        client.error(Op::Signal(v1::SignalContainer { id: "x".into(), signal: 15, all: false })).code(),
        ErrorCode::ErrorNotFound
    );
}

#[test]
fn an_exit_before_the_pid_file_is_read_is_not_lost() {
    let pod = Pod::start();
    let mut client = pod.connect();
    let mut plan = pod.plan("c1", "");
    // The init is dead, and reaped by us or by the script's end, when `create` ends.
    plan.create = Some(sh(
        "sh -c 'echo said; exit 3' & echo $! >$0; while read -r l </proc/$!/stat; do case $l in *') Z '*) exit 0; esac; done",
        &[&plan.pid_file],
    ));
    pod.create(&mut client, plan);
    assert_eq!(client.exited("c1").code, 3);
    assert_eq!(pod.output("c1.log", "stdout"), b"said\n");
    // Reaped by us long before.
    let mut plan = pod.plan("c2", "");
    plan.create = Some(sh(
        "p=$(sh -c 'sh -c \"exit 4\" >/dev/null & echo $!'); echo $p >$0; while [ -e /proc/$p ]; do :; done",
        &[&plan.pid_file],
    ));
    pod.create(&mut client, plan);
    assert_eq!(client.exited("c2").code, 4);
    assert_eq!(client.error(Op::Start(v1::StartContainer { id: "c2".into() })).code(), ErrorCode::ErrorState);
}

#[test]
fn a_failed_create_is_undone_and_says_why() {
    let pod = Pod::start();
    let mut client = pod.connect();
    let mut plan = pod.plan("c1", "");
    let mut create = sh("echo 'the reason is here' >$0; exit 9", &[&pod.path("error.log")]);
    create.error_log = pod.path("error.log");
    plan.create = Some(create);
    plan.delete = Some(sh("echo undone >$0", &[&pod.path("undone")]));
    let error = client.error(Op::Create(plan.clone()));
    assert_eq!(error.code(), ErrorCode::ErrorProgram);
    assert!(error.message == "the reason is here (sh: exit status 9)", "{error:?}");
    assert_eq!(pod.read("undone"), b"undone\n");
    assert!(!std::fs::exists(pod.path("c1.out")).unwrap());

    for (change, code) in [
        (
            &(|p: &mut v1::CreateContainer| p.create.as_mut().unwrap().path = "/no/such".into()) as &dyn Fn(&mut _),
            ErrorCode::ErrorProgram,
        ),
        (&|p: &mut v1::CreateContainer| p.start = None, ErrorCode::ErrorInvalid),
        (&|p: &mut v1::CreateContainer| p.exit_path = "relative".into(), ErrorCode::ErrorInvalid),
        (&|p: &mut v1::CreateContainer| p.rootfs_mount_point = "/mnt".into(), ErrorCode::ErrorInvalid),
        (
            &|p: &mut v1::CreateContainer| p.stdio.as_mut().unwrap().stdout = "/no/such/folder/out".into(),
            ErrorCode::ErrorSystem,
        ),
        (&|p: &mut v1::CreateContainer| p.log_path = "/no/such/folder/log".into(), ErrorCode::ErrorSystem),
        (&|p: &mut v1::CreateContainer| p.create = Some(sh("exit 0", &[])), ErrorCode::ErrorSystem),
    ] {
        let mut bad = pod.plan("c1", "");
        change(&mut bad);
        let error = client.error(Op::Create(bad));
        assert_eq!(error.code(), code, "{error:?}");
    }
    assert!(client.hello().containers.is_empty());
    // The name is free again.
    pod.create(&mut client, pod.plan("c1", "true"));
    assert_eq!(client.error(Op::Create(pod.plan("c1", ""))).code(), ErrorCode::ErrorExists);
}

#[test]
fn a_create_that_hangs_is_killed_and_the_monitor_serves_meanwhile() {
    let pod = Pod::start();
    let mut client = pod.connect();
    let mut plan = pod.plan("slow", "");
    let mut create = sh("(sleep 1000 & echo $! >$0; wait) & sleep 1000", &[&pod.path("child")]);
    create.deadline_ms = 1500;
    plan.create = Some(create);
    let slow = client.send(Op::Create(plan), &[]);
    pod.run(&mut client, pod.plan("quick", "echo quick"));
    client.exited("quick");
    match client.answer(slow) {
        Body::Error(error) => {
            assert_eq!(error.code(), ErrorCode::ErrorDeadline);
            assert!(error.message.contains("not done after 1500 ms"), "{error:?}");
        }
        other => panic!("{other:?}"),
    }
    let child: i32 = String::from_utf8(pod.read("child")).unwrap().trim().parse().unwrap();
    assert!(!alive(child), "what create started is killed with it");

    // DeleteContainer interrupts one, too.
    let mut plan = pod.plan("slow", "");
    plan.create = Some(sh("echo >$0; sleep 1000", &[&pod.path("runs")]));
    let slow = client.send(Op::Create(plan), &[]);
    until("create runs", || std::fs::exists(pod.path("runs")).unwrap());
    client.delete("slow");
    assert!(matches!(client.answer(slow), Body::Error(_)));
}

#[test]
fn delete_kills_what_runs() {
    let pod = Pod::start();
    let mut client = pod.connect();
    let created = pod.run(&mut client, pod.plan("c1", "trap '' TERM; echo up; while :; do sleep 1; done"));
    until("it is up", || pod.output("c1.log", "stdout") == b"up\n");
    client.delete("c1");
    assert!(!alive(created.pid));
    assert_eq!(client.exited("c1").code, 137);
    assert_eq!(pod.json("c1.exit.json")["signal"], 9);
    // Created and never started.
    let created = pod.create(&mut client, pod.plan("c2", "true"));
    client.delete("c2");
    assert!(!alive(created.pid));
}

#[test]
fn a_delete_that_fails_can_be_tried_again() {
    let pod = Pod::start();
    let mut client = pod.connect();
    let mut plan = pod.plan("c1", "true");
    plan.delete = Some(sh("test -e $0", &[&pod.path("allowed")]));
    pod.run(&mut client, plan);
    client.exited("c1");
    let error = client.error(Op::Delete(v1::DeleteContainer { id: "c1".into() }));
    assert_eq!(error.code(), ErrorCode::ErrorProgram);
    let error = client.error(Op::Shutdown(v1::Shutdown { force: true }));
    assert_eq!(error.code(), ErrorCode::ErrorProgram);
    write_file(pod.path("allowed").as_ref(), "");
    client.delete("c1");
}

#[test]
fn logs_are_reopened_under_load() {
    let pod = Pod::start();
    let mut client = pod.connect();
    pod.run(&mut client, pod.plan("c1", "seq 200000"));
    let mut parts = Vec::new();
    for n in 0..20 {
        until("some output", || {
            std::fs::metadata(pod.path("c1.log")).is_ok_and(|m| m.len() > 0)
                || !client.hello().containers.iter().all(|c| c.exit.is_none())
        });
        let name = format!("c1.log.{n}");
        std::fs::rename(pod.path("c1.log"), pod.path(&name)).unwrap();
        let answer = client.call(Op::ReopenLog(v1::ReopenLog { container_id: "c1".into() }), &[]);
        assert!(matches!(answer, Body::Done(_)), "{answer:?}");
        parts.push(name);
    }
    client.exited("c1");
    parts.push("c1.log".into());
    let all: Vec<_> = parts.iter().flat_map(|name| pod.log(name)).collect();
    let want: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert!(join(&all, "stdout") == want.as_bytes());
    assert!(parts.iter().filter(|p| !pod.read(p).is_empty()).count() > 1);
}

#[test]
fn a_full_disk_pauses_the_stream_and_loses_nothing() {
    // Mounted before the monitor has its own view of mounts.
    let dir = tempfile::tempdir().unwrap();
    let small = folder(dir.path().join("small"));
    rustix::mount::mount("none", &small, "tmpfs", rustix::mount::MountFlags::empty(), c"size=256k").unwrap();
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
        }
    }
    let _unmount = Unmount(small.clone());
    let pod = Pod::start();
    let mut client = pod.connect();
    let mut plan = pod.plan("c1", "seq 20000; seq 20000 >&2");
    plan.log_path = small.join("log").to_str().unwrap().into();
    pod.run(&mut client, plan);
    let trouble = client.event("trouble", |e| match e {
        Body::LogTrouble(t) => Some(t.clone()),
        _ => None,
    });
    assert!(trouble.container_id == "c1" && trouble.message.contains("No space left"), "{trouble:?}");
    // Others are not concerned.
    pod.run(&mut client, pod.plan("c2", "echo fine"));
    client.exited("c2");
    rustix::mount::mount_remount(&small, rustix::mount::MountFlags::empty(), c"size=64m").unwrap();
    let trouble = client.event("the end of trouble", |e| match e {
        Body::LogTrouble(t) => Some(t.clone()),
        _ => None,
    });
    assert_eq!(trouble.message, "");
    assert_eq!(client.exited("c1").code, 0);
    let want: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    assert!(pod.output(small.join("log").to_str().unwrap(), "stdout") == want.as_bytes());
    assert!(pod.output(small.join("log").to_str().unwrap(), "stderr") == want.as_bytes());
}

#[test]
fn connections_come_and_go_and_all_hear_of_an_exit() {
    let mut pod = Pod::start();
    let mut first = pod.connect();
    let mut second = pod.connect();
    let mut silent = pod.connect_silent();
    let error = silent.error(Op::ReopenLog(v1::ReopenLog { container_id: "x".into() }));
    assert_eq!(error.code(), ErrorCode::ErrorState);
    pod.create(&mut first, pod.plan("c1", "exit 5"));
    // A connection that breaks in the middle of everything, with garbage last.
    let mut third = pod.connect();
    third.send(Op::Start(v1::StartContainer { id: "c1".into() }), &[]);
    rustix::net::send(&third.socket, b"\xff\xff\xff\xff", rustix::net::SendFlags::NOSIGNAL).unwrap();
    drop(third);
    assert_eq!(first.exited("c1").code, 5);
    assert_eq!(second.exited("c1").code, 5);
    // The silent one has got nothing but its answers.
    silent.hello();
    assert!(silent.events.is_empty());
    let unknown = lxcri_monitor_proto::v1::Request { id: 99, op: None };
    lxcri_monitor_proto::wire::send(&first.socket, &unknown, &[]).unwrap();
    match first.answer(99) {
        Body::Error(e) => assert_eq!(e.code(), ErrorCode::ErrorUnknownOperation),
        other => panic!("{other:?}"),
    }
    let null = null();
    let set = Op::SetPodInfo(v1::SetPodInfo { pod_info: vec![7; 300_000] });
    assert!(matches!(first.call(set, &[null.as_fd(), null.as_fd()]), Body::Done(_)));
    assert_eq!(second.hello().pod_info, vec![7; 300_000]);
    assert_eq!(first.error(Op::Shutdown(v1::Shutdown { force: false })).code(), ErrorCode::ErrorState);
    pod.shutdown();
    assert!(!std::fs::exists(pod.path("monitor.sock")).unwrap());
}

#[test]
fn a_killed_monitor_leaves_the_container_running() {
    let mut pod = Pod::start();
    let mut client = pod.connect();
    let created = pod.run(&mut client, pod.plan("c1", "while :; do echo tick; sleep 0.01; done"));
    until("output", || !pod.read("c1.log").is_empty());
    pod.kill_monitor();
    let io = || std::fs::read_to_string(format!("/proc/{}/io", created.pid)).unwrap();
    let before = io();
    until("it goes on writing", || io() != before);
    assert!(alive(created.pid));
}
