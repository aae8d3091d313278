//! Execs, terminals and the pod's init under the real monitor.
#![allow(clippy::unwrap_used, unsafe_code, clippy::disallowed_methods)]

mod harness;

use std::io::{Read, Write};
use std::os::fd::AsFd;

use harness::*;
use lxcri_monitor_proto::v1::{self, ErrorCode, reply::Body, request::Op};

/// A program that leaves `sh -c command` in a session of its own, as `crun exec --detach` does.
fn exec(pod: &Pod, id: &str, command: &str) -> v1::Exec {
    let pid_file = pod.path(&format!("{id}.exec"));
    v1::Exec {
        container_id: "c1".into(),
        exec_id: id.into(),
        program: Some(sh(
            "exec 3<&0; setsid sh -c \"$0\" <&3 3<&- & echo $! >$1.tmp; mv $1.tmp $1",
            &[command, &pid_file],
        )),
        pid_file,
        ..Default::default()
    }
}

fn running(pod: &Pod) -> Client {
    let mut client = pod.connect();
    pod.run(&mut client, pod.plan("c1", "sleep 1000"));
    client
}

fn started(client: &mut Client, id: u64) -> i32 {
    match client.answer(id) {
        Body::ExecStarted(started) => started.pid,
        other => panic!("{other:?}"),
    }
}

#[test]
fn streams_and_exit_codes() {
    let pod = Pod::start();
    let mut client = running(&pod);
    let mut request = exec(&pod, "e1", "cat; echo err >&2; exit 4");
    (request.has_stdin, request.has_stdout, request.has_stderr) = (true, true, true);
    let (in_read, in_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let ((out, w), (err, we)) = (pipe(), pipe());
    let id = client.send(Op::Exec(request.clone()), &[in_read.as_fd(), w.as_fd(), we.as_fd()]);
    drop((in_read, w, we));
    assert!(started(&mut client, id) > 1);
    std::fs::File::from(in_write).write_all(b"through cat").unwrap();
    let exited = client.exec_exited("e1");
    assert_eq!((exited.exit.unwrap().code, exited.timed_out), (4, false));
    assert_eq!((read_all(out).as_str(), read_all(err).as_str()), ("through cat", "err\n"));

    // What is wrong is said before anything runs.
    assert_eq!(client.error(Op::Exec(request)).code(), ErrorCode::ErrorInvalid);
    let mut other = exec(&pod, "e2", "");
    other.container_id = "nobody".into();
    assert_eq!(client.error(Op::Exec(other)).code(), ErrorCode::ErrorNotFound);
    let mut bad = exec(&pod, "e3", "");
    bad.program = Some(sh("exit 1", &[]));
    assert_eq!(client.error(Op::Exec(bad)).code(), ErrorCode::ErrorProgram);
    assert!(matches!(client.call(Op::KillExec(v1::KillExec { exec_id: "none".into() }), &[]), Body::Done(_)));
}

#[test]
fn a_timeout_kills_children_in_the_background_too() {
    let pod = Pod::start();
    let mut client = running(&pod);
    let mut request = exec(
        &pod,
        "e1",
        "(sleep 1000; :) & (trap '' TERM; while :; do sleep 1; done) & sh -c 'sleep 1000 & exit 0'; echo up; sleep 1000",
    );
    request.timeout_ms = 700;
    request.has_stdout = true;
    let (out, w) = pipe();
    let id = client.send(Op::Exec(request), &[w.as_fd()]);
    drop(w);
    let pid = started(&mut client, id);
    let exited = client.exec_exited("e1");
    assert!(exited.timed_out);
    assert_eq!(exited.exit.unwrap().code, 137);
    // All that held the pipe are dead, the orphan of a parent that has ended among them.
    assert_eq!(read_all(out), "up\n");
    assert!(!alive(pid));

    // The program itself hangs.
    let mut request = exec(&pod, "e2", "");
    request.program = Some(sh("sleep 1000 & sleep 1000", &[]));
    request.timeout_ms = 200;
    let id = client.send(Op::Exec(request), &[]);
    assert_eq!(started(&mut client, id), 0);
    assert!(client.exec_exited("e2").timed_out);
}

#[test]
fn execs_die_with_their_connection_and_by_kill() {
    let pod = Pod::start();
    let mut watcher = running(&pod);
    let mut client = pod.connect();
    let mut request = exec(&pod, "e1", "sleep 1000 & echo up; sleep 1000");
    request.has_stdout = true;
    let (mut out, w) = pipe();
    let id = client.send(Op::Exec(request), &[w.as_fd()]);
    drop(w);
    let pid = started(&mut client, id);
    let mut up = [0; 3];
    out.read_exact(&mut up).unwrap();
    drop(client);
    assert_eq!(watcher.exec_exited("e1").exit.unwrap().signal, 9);
    assert_eq!((&up, read_all(out).as_str()), (b"up\n", ""));
    assert!(!alive(pid));

    let id = watcher.send(Op::Exec(exec(&pod, "e2", "sleep 1000")), &[]);
    started(&mut watcher, id);
    assert!(matches!(watcher.call(Op::KillExec(v1::KillExec { exec_id: "e2".into() }), &[]), Body::Done(_)));
    let exited = watcher.exec_exited("e2");
    assert!(!exited.timed_out && exited.exit.unwrap().signal == 9);
    // The container has not been harmed.
    assert_eq!(watcher.hello().containers[0].phase(), v1::ContainerPhase::PhaseRunning);
}

/// A cgroup, removed with what is in and below it.
struct Cgroup(std::path::PathBuf);

impl Cgroup {
    fn make(name: &str) -> Self {
        let root = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].into_iter().find(|r| folder_is(r)).unwrap();
        let path = std::path::Path::new(root).join(format!("lxcri-test-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn below(&self, name: &str) -> std::path::PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir(&path).unwrap();
        path
    }
}

fn folder_is(path: &str) -> bool {
    std::path::Path::new(path).join("cgroup.procs").is_file()
}

fn members(folder: &std::path::Path) -> usize {
    std::fs::read_to_string(folder.join("cgroup.procs")).map_or(0, |t| t.lines().count())
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let folders = std::fs::read_dir(&self.0).into_iter().flatten().flatten().map(|e| e.path());
        let folders: Vec<_> = folders.filter(|p| p.is_dir()).chain([self.0.clone()]).collect();
        for folder in folders {
            for _ in 0..200 {
                for pid in std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default().lines() {
                    // SAFETY: a plain system call.
                    unsafe { libc::kill(pid.parse().unwrap(), libc::SIGKILL) };
                }
                if std::fs::remove_dir(&folder).is_ok() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10)); // the poll of a condition with a limit
            }
        }
    }
}

#[test]
fn a_group_is_killed_with_its_exec_or_handed_to_the_container() {
    let pod = Pod::start();
    let mut client = running(&pod);
    let container = Cgroup::make("c1");
    let daemon = "(setsid sh -c 'sleep 1000 & exit 0' &); ";
    let mut grouped = |id: &str, command: &str, timeout_ms: u32| {
        let group = container.below(&format!("exec-{id}"));
        let join = format!("echo $$ > {}/cgroup.procs; ", group.display());
        let mut request = exec(&pod, id, &format!("{join}{command}"));
        request.cgroups = vec![group.to_str().unwrap().into()];
        request.timeout_ms = timeout_ms;
        let sent = client.send(Op::Exec(request), &[]);
        assert!(started(&mut client, sent) > 1);
        let exited = client.exec_exited(id);
        (exited.timed_out, group)
    };
    let (timed_out, group) = grouped("e1", &format!("{daemon}sleep 1000"), 500);
    assert!(timed_out);
    until("the group of the killed exec to go", || !group.exists());
    assert_eq!(members(&container.0), 0);
    let (timed_out, group) = grouped(
        "e2",
        &format!("{daemon}until [ $(wc -l < {}/exec-e2/cgroup.procs) -gt 2 ]; do :; done", container.0.display()),
        0,
    );
    assert!(!timed_out);
    until("the group of the exec to go", || !group.exists());
    // The shell between may be there for a moment longer.
    until("the daemon alone to be the container's", || members(&container.0) == 1);

    let mut request = exec(&pod, "e3", "");
    request.cgroups = vec![container.0.to_str().unwrap().into()];
    assert_eq!(client.error(Op::Exec(request)).code(), ErrorCode::ErrorInvalid);
}

/// Sends a new pty's master to a console socket and runs its arguments on the slave, as a runtime would.
const PTY: &str = r#"
import os, pty, socket, subprocess, sys, array
kind, console, pid_file, command = sys.argv[1:5]
master, slave = pty.openpty()
s = socket.socket(socket.AF_UNIX)
d = os.open(os.path.dirname(console), os.O_PATH)
s.connect(f"/proc/self/fd/{d}/{os.path.basename(console)}")
s.sendmsg([b"pty"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [master]))])
os.close(master)
if kind == "create":
    command = f"read x <{sys.argv[5]}; exec sh -c '{command}'"
p = subprocess.Popen(["setsid", "-c", "sh", "-c", command], stdin=slave, stdout=slave, stderr=slave)
open(pid_file, "w").write(str(p.pid))
os._exit(0)
"#;

fn python(args: &[&str]) -> v1::Program {
    let mut all = vec!["-c".to_owned(), PTY.to_owned()];
    all.extend(args.iter().map(|a| a.to_string()));
    v1::Program {
        path: "/usr/bin/python3".into(),
        args: all,
        env: vec!["PATH=/usr/bin:/bin".into()],
        ..Default::default()
    }
}

#[test]
fn a_terminal_container_is_logged_resized_and_typed_at() {
    let pod = Pod::start();
    let mut client = pod.connect();
    // Longer than an address of a socket can be.
    let deep = folder(pod.dir.path().join("d".repeat(150)));
    let console = deep.join("console").to_str().unwrap().to_owned();
    let mut plan = pod.plan("c1", "");
    let go = pod.path("c1.go");
    rustix::fs::mkfifoat(rustix::fs::CWD, &go, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    plan.create = Some(python(&[
        "create",
        &console,
        &plan.pid_file,
        "stty size; read line; echo got $line; stty size; exit 3",
        &go,
    ]));
    plan.stdio = Some(v1::Stdio {
        terminal: true,
        console_socket: console.clone(),
        stdin: pod.path("c1.in"),
        ..Default::default()
    });
    pod.create(&mut client, plan);
    let resize = |width, height| {
        Op::Resize(v1::ResizeTerminal { container_id: "c1".into(), width, height, ..Default::default() })
    };
    assert!(matches!(client.call(resize(100, 30), &[]), Body::Done(_)));
    client.start("c1");
    until("the first size", || pod.output("c1.log", "stdout") == b"30 100\r\n");
    assert!(matches!(client.call(resize(7, 9), &[]), Body::Done(_)));
    std::fs::File::options().write(true).open(pod.path("c1.in")).unwrap().write_all(b"hi\n").unwrap();
    assert_eq!(client.exited("c1").code, 3);
    assert_eq!(String::from_utf8(pod.output("c1.log", "stdout")).unwrap(), "30 100\r\nhi\r\ngot hi\r\n9 7\r\n");
    client.delete("c1");
    assert!(!std::fs::exists(&console).unwrap());
    assert_eq!(client.error(resize(1, 1)).code(), ErrorCode::ErrorNotFound);
}

#[test]
fn a_terminal_exec_is_relayed() {
    let pod = Pod::start();
    let mut client = running(&pod);
    let console = pod.path("console");
    let mut request = exec(&pod, "e1", "");
    request.program =
        Some(python(&["exec", &console, &request.pid_file, "read line; echo got $line; seq 3000; exit 5"]));
    (request.terminal, request.has_stdin, request.has_stdout) = (true, true, true);
    request.console_socket = console;
    let (in_read, in_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let (out, w) = pipe();
    let id = client.send(Op::Exec(request), &[in_read.as_fd(), w.as_fd()]);
    drop((in_read, w));
    started(&mut client, id);
    let resize = v1::ResizeTerminal { container_id: "c1".into(), exec_id: "e1".into(), width: 80, height: 24 };
    assert!(matches!(client.call(Op::Resize(resize), &[]), Body::Done(_)));
    std::fs::File::from(in_write).write_all(b"hi\n").unwrap();
    let text = read_all(out);
    assert!(text.starts_with("hi\r\ngot hi\r\n1\r\n2\r\n") && text.ends_with("\r\n2999\r\n3000\r\n"), "{text}");
    assert_eq!(client.exec_exited("e1").exit.unwrap().code, 5);
}

#[test]
fn the_pods_init_is_nobody_in_an_empty_root() {
    let mut pod = Pod::start();
    let mut client = pod.connect();
    let start = |cgroups: Vec<String>, namespaces: Vec<String>| {
        Op::StartInit(v1::StartInit { cgroups, namespaces, pid_namespace: String::new() })
    };
    let error = client.error(start(vec![], vec!["/no/such/ns".into()]));
    assert!(error.code() == ErrorCode::ErrorProgram && error.message.contains("open /no/such/ns"), "{error:?}");
    // In this user namespace nobody has no number: its root has to do, without a capability.
    let mut other = std::process::Command::new("unshare");
    let mut other = other.args(["-U", "-i", "sleep", "1000"]).spawn().unwrap();
    pod.pids.borrow_mut().push(other.id() as i32);
    let ns = |kind: &str| format!("/proc/{}/ns/{kind}", other.id());
    let link = |pid: u32, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    until("its namespaces", || std::fs::read_to_string(format!("/proc/{}/comm", other.id())).unwrap() == "sleep\n");
    for map in ["uid_map", "gid_map"] {
        std::fs::write(format!("/proc/{}/{map}", other.id()), "0 100000 1000").unwrap();
    }
    let Body::InitStarted(inside) = client.call(start(vec![], vec![ns("user"), ns("ipc")]), &[]) else { panic!() };
    for kind in ["user", "ipc"] {
        assert_eq!(link(inside.pid as u32, kind), link(other.id(), kind));
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", inside.pid)).unwrap();
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    // SAFETY: a plain system call.
    unsafe { libc::kill(inside.pid, libc::SIGKILL) };
    let exit = client.event("its end", |e| match e {
        Body::InitExited(e) => e.exit.clone(),
        _ => None,
    });
    assert_eq!(exit.signal, 9);
    other.kill().unwrap();
    other.wait().unwrap();

    let namespaces = vec![String::new(), "/proc/self/ns/ipc".into(), "/proc/self/ns/net".into()];
    let pid = match client.call(start(vec![], namespaces.clone()), &[]) {
        Body::InitStarted(started) => started.pid,
        other => panic!("{other:?}"),
    };
    pod.pids.borrow_mut().push(pid);
    match client.call(start(vec![], namespaces), &[]) {
        Body::InitStarted(again) => assert_eq!(again.pid, pid),
        other => panic!("{other:?}"),
    }
    assert_eq!(pod.connect_silent().hello().init_pid, pid);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap_or_default();
        line.split_once(':').map_or("", |(_, v)| v).trim().to_owned()
    };
    assert_eq!(field("Name"), "pod-init");
    assert!(field("NSpid").ends_with("\t1"), "{status}");
    assert_eq!(field("Uid"), "65534\t65534\t65534\t65534");
    assert_eq!(field("Gid"), "65534\t65534\t65534\t65534");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!((field("NoNewPrivs"), field("Groups")), ("1".into(), "".into()));
    assert_eq!(std::fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), 0);
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert!(exe.to_str().unwrap().contains("memfd:pod-init"), "{exe:?}");
    assert_eq!(std::fs::read(format!("/proc/{pid}/cmdline")).unwrap(), b"pod-init\0");

    // It reaps what is left to it in its namespace.
    let mut enter = std::process::Command::new("nsenter");
    enter.args(["-t", &pid.to_string(), "--pid", "sh", "-c", "(sh -c 'sleep 0.05 & :' &) ; sleep 0.01"]);
    assert!(enter.status().unwrap().success());
    until("no zombie is left", || descendants(pid).is_empty());
    // SAFETY: a plain system call.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    let exit = client.event("its end", |e| match e {
        Body::InitExited(e) => e.exit.clone(),
        _ => None,
    });
    assert_eq!((exit.code, exit.signal), (0, 0));
    assert_eq!(client.hello().init_pid, 0);
    let Body::InitStarted(second) = client.call(start(vec![], vec![]), &[]) else { panic!() };
    pod.shutdown();
    assert!(!alive(second.pid));
}
