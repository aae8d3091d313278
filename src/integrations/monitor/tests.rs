//! The client and the supervisor with the real monitor, and a shell script in the place of the runtime.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use tokio::time::timeout;

use super::{MonitorConfig, MonitorSupervisor};
use crate::core::error::Kind;
use crate::core::ids::{ContainerId, PodId};
use crate::core::ports::{MonitorEvent, MonitorLink, Supervisor, monitor_v1 as v1};
use crate::utils::tasks::TaskSet;

const LONG: Duration = Duration::from_secs(20);
const HANDLER: &str = "crun";

/// The monitor's binary, built into the same folder as this test.
fn program() -> Utf8PathBuf {
    built("proxmox-lxcri-monitor")
}

fn built(name: &str) -> Utf8PathBuf {
    let test = std::env::current_exe().expect("current_exe");
    let folder = test.parent().and_then(|deps| deps.parent()).expect("target folder");
    let path = folder.join(name);
    assert!(path.is_file(), "{}: build it first (cargo build -p {name})", path.display());
    Utf8PathBuf::from_path_buf(path).expect("UTF-8")
}

struct World {
    supervisor: MonitorSupervisor,
    pod: PodId,
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        // Longer than a socket's address.
        let run_root =
            Utf8PathBuf::from_path_buf(dir.path().join("a-run-folder-with-a-long-name/pods")).expect("UTF-8");
        let tasks = TaskSet::new("test");
        let config = MonitorConfig {
            program: program(),
            others: BTreeMap::new(),
            runtime: "/bin/true".into(),
            run_root,
            cgroup: None,
            tasks,
        };
        Self { supervisor: MonitorSupervisor::new(config), pod: PodId::new(), dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    fn plan(&self, id: &ContainerId, command: &str) -> v1::CreateContainer {
        let p = |name: &str| self.path(&format!("{}.{name}", id.short()));
        let (go, pid) = (p("go"), p("pid"));
        v1::CreateContainer {
            id: id.to_string(),
            create: Some(sh(&format!("mkfifo {go}; (read x <{go}; exec sh -c \"$0\") & echo $! >{pid}"), &[command])),
            start: Some(sh(&format!("echo >{go}"), &[])),
            delete: Some(sh("exit 0", &[])),
            pid_file: pid,
            stdio: Some(v1::Stdio { stdout: p("out"), stderr: p("err"), ..Default::default() }),
            log_path: p("log"),
            exit_path: p("exit.json"),
            ..Default::default()
        }
    }
}

/// Whatever became of the test, its monitors are gone with it.
impl Drop for World {
    fn drop(&mut self) {
        let root = Utf8Path::from_path(self.dir.path()).expect("UTF-8");
        for pid in super::supervisor::running_below(root) {
            for child in children(pid) {
                if let Some(child) = rustix::process::Pid::from_raw(child) {
                    let _ = rustix::process::kill_process(child, rustix::process::Signal::KILL);
                }
            }
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

fn children(pid: rustix::process::Pid) -> Vec<i32> {
    let n = pid.as_raw_pid();
    let text = std::fs::read_to_string(format!("/proc/{n}/task/{n}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|p| p.parse().ok()).collect()
}

fn sh(script: &str, args: &[&str]) -> v1::Program {
    let mut all = vec!["-c".to_owned(), script.to_owned()];
    all.extend(args.iter().map(|a| (*a).to_owned()));
    v1::Program { path: "/bin/sh".into(), args: all, env: vec!["PATH=/usr/bin:/bin".into()], ..Default::default() }
}

async fn next(link: &mut MonitorLink) -> MonitorEvent {
    timeout(LONG, link.events.recv()).await.expect("an event in time").expect("an event")
}

fn pipe() -> (std::fs::File, OwnedFd) {
    let (r, w) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
    (r.into(), w)
}

async fn read_all(mut file: std::fs::File) -> String {
    tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        file.read_to_string(&mut text).expect("read");
        text
    })
    .await
    .expect("join")
}

fn gone(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.is_empty() || stat.contains(") Z ")
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    timeout(LONG, async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn a_pods_life() {
    let world = World::new();
    let s = &world.supervisor;
    assert_eq!(s.connect(&world.pod).await.err().map(|e| e.kind()), Some(Kind::NotFound));
    assert_eq!(s.list().await.expect("list"), []);
    let mut link = s.spawn(&world.pod, HANDLER, vec![9; 200_000]).await.expect("spawn");
    assert_eq!((link.hello.version, link.hello.pod_info.len()), (1, 200_000));
    assert_eq!(s.spawn(&world.pod, HANDLER, vec![]).await.err().map(|e| e.kind()), Some(Kind::AlreadyExists));
    assert_eq!(s.list().await.expect("list"), std::slice::from_ref(&world.pod));
    assert_eq!(s.cleanup(&world.pod).await.err().map(|e| e.kind()), Some(Kind::FailedPrecondition));

    let id = ContainerId::new();
    let plan = world.plan(&id, "echo hello; exit 3");
    let log = plan.log_path.clone();
    let created = link.monitor.create(plan.clone(), vec![]).await.expect("create");
    assert!(!gone(created.pid));
    assert_eq!(link.monitor.create(plan, vec![]).await.err().map(|e| e.kind()), Some(Kind::AlreadyExists));
    let started_at = link.monitor.start(&id).await.expect("start");
    match next(&mut link).await {
        MonitorEvent::ContainerExited(container, exit) => {
            assert_eq!((container, exit.code), (id.clone(), 3));
            assert!(exit.finished_at >= started_at);
        }
        other => panic!("{other:?}"),
    }
    assert!(std::fs::read_to_string(&log).expect("log").ends_with(" stdout F hello\n"));
    link.monitor.reopen_log(&id).await.expect("reopen");
    assert_eq!(link.monitor.start(&id).await.err().map(|e| e.kind()), Some(Kind::FailedPrecondition));

    // A second daemon finds everything.
    let mut second = s.connect(&world.pod).await.expect("connect");
    assert_eq!(second.hello.containers[0].exit.as_ref().map(|e| e.code), Some(3));
    assert_eq!(second.monitor.pid(), link.monitor.pid());
    second.monitor.set_pod_info(b"new".to_vec()).await.expect("set_pod_info");
    assert_eq!(second.monitor.shutdown(false).await.err().map(|e| e.kind()), Some(Kind::FailedPrecondition));
    link.monitor.delete(&id).await.expect("delete");
    link.monitor.delete(&id).await.expect("again");
    link.monitor.signal(&id, 15, true).await.expect("unknown is success");
    assert_eq!(link.monitor.reopen_log(&id).await.err().map(|e| e.kind()), Some(Kind::NotFound));
    let pid = second.monitor.pid();
    second.monitor.shutdown(false).await.expect("shutdown");
    until("no zombie of it is left", || !std::fs::exists(format!("/proc/{pid}")).expect("stat")).await;
    for link in [&mut link, &mut second] {
        assert_eq!(next(link).await, MonitorEvent::Gone);
        assert!(link.events.recv().await.is_none());
        assert_eq!(link.monitor.delete(&id).await.err().map(|e| e.kind()), Some(Kind::Unavailable));
    }
    s.cleanup(&world.pod).await.expect("cleanup");
    s.cleanup(&world.pod).await.expect("again");
    assert_eq!(s.list().await.expect("list"), []);
}

#[tokio::test]
async fn execs_end_time_out_and_are_dropped() {
    let world = World::new();
    let link = world.supervisor.spawn(&world.pod, HANDLER, vec![]).await.expect("spawn");
    let id = ContainerId::new();
    link.monitor.create(world.plan(&id, "exec sleep 1000"), vec![]).await.expect("create");
    link.monitor.start(&id).await.expect("start");
    let exec = |name: &str, command: &str| v1::Exec {
        container_id: id.to_string(),
        exec_id: name.into(),
        program: Some(sh("setsid sh -c \"$0\" & echo $! >$1", &[command, &world.path(name)])),
        pid_file: world.path(name),
        ..Default::default()
    };
    let (out, w) = pipe();
    let (err, we) = pipe();
    let exit = link.monitor.exec(exec("e1", "echo out; echo err >&2; exit 6"), [None, Some(w), Some(we)]);
    let exit = exit.await.expect("exec");
    assert_eq!((exit.exit.code, exit.timed_out), (6, false));
    assert_eq!((read_all(out).await, read_all(err).await), ("out\n".into(), "err\n".into()));

    let mut slow = exec("e2", "sleep 1000 & sleep 1000");
    slow.timeout_ms = 300;
    let (out, w) = pipe();
    let exit = link.monitor.exec(slow, [None, Some(w), None]).await.expect("exec");
    assert!(exit.timed_out && exit.exit.signal == 9);
    assert_eq!(timeout(LONG, read_all(out)).await.expect("its child is dead, too"), "");

    let (out, w) = pipe();
    let dropped = link.monitor.exec(exec("e3", "echo up; sleep 1000 & sleep 1000"), [None, Some(w), None]);
    assert!(timeout(Duration::from_millis(300), dropped).await.is_err());
    assert_eq!(timeout(LONG, read_all(out)).await.expect("killed"), "up\n");

    let mut bad = exec("e4", "");
    bad.program = Some(sh("echo no such thing >&2; exit 1", &[]));
    assert_eq!(link.monitor.exec(bad, [None, None, None]).await.err().map(|e| e.kind()), Some(Kind::Internal));
    let mut unknown = exec("e5", "");
    unknown.container_id = ContainerId::new().to_string();
    assert_eq!(link.monitor.exec(unknown, [None, None, None]).await.err().map(|e| e.kind()), Some(Kind::NotFound));
    link.monitor.shutdown(true).await.expect("shutdown");
}

#[tokio::test]
async fn attached_clients_get_output_and_a_slow_one_is_cut() {
    let world = World::new();
    let mut link = world.supervisor.spawn(&world.pod, HANDLER, vec![]).await.expect("spawn");
    let id = ContainerId::new();
    let mut plan = world.plan(&id, "cat; echo err >&2; seq 100000; read never");
    // The container's own stdin: kept open by the script for its child.
    if let (Some(create), Some(stdio)) = (&mut plan.create, &mut plan.stdio) {
        create.args[1] = format!("exec 3<&0; {}", create.args[1].replace("sh -c \"$0\"", "sh -c \"$0\" <&3"));
        stdio.stdin = world.path("stdin");
    }
    let (log, stdin) = (plan.log_path.clone(), world.path("stdin"));
    link.monitor.create(plan, vec![]).await.expect("create");
    let ((out, w), (err, we), (slow, ws)) = (pipe(), pipe(), pipe());
    rustix::pipe::fcntl_setpipe_size(&w, 1 << 20).expect("a megabyte of buffer");
    let quick = link.monitor.attach(&id, [None, Some(w), Some(we)]).await.expect("attach");
    let late = link.monitor.attach(&id, [None, Some(ws), None]).await.expect("attach");
    link.monitor.start(&id).await.expect("start");
    tokio::fs::OpenOptions::new().write(true).open(&stdin).await.expect("stdin");
    let mut input = std::fs::File::options().write(true).open(&stdin).expect("stdin");
    std::io::Write::write_all(&mut input, b"typed\n").expect("write");
    drop(input);
    link.monitor.close_stdin(&id).await.expect("close_stdin");
    assert_eq!(next(&mut link).await, MonitorEvent::StdinClosed(id.clone()));
    assert_eq!(link.monitor.resize(&id, None, 1, 1).await.err().map(|e| e.kind()), Some(Kind::FailedPrecondition));
    assert!(matches!(next(&mut link).await, MonitorEvent::ContainerExited(..)));
    let want: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    let want = format!("typed\n{want}");
    // Every byte for the one with room; the slow one has its buffer's worth and then an end.
    assert!(read_all(out).await == want);
    assert_eq!(read_all(err).await, "err\n");
    let cut = read_all(slow).await;
    assert!(cut.len() < want.len() && want.starts_with(&cut));
    let log = std::fs::read_to_string(log).expect("log");
    assert_eq!(log.lines().filter(|l| l.contains(" F ")).count(), 100_002, "and the log has all");
    assert_eq!((quick.await.expect("its end"), late.await.expect("its end")), (false, true));
    let (out, w) = pipe();
    drop(out);
    let error = link.monitor.attach(&id, [None, Some(w), None]).await.err().map(|e| e.kind());
    assert_eq!(error, Some(Kind::FailedPrecondition));
    link.monitor.shutdown(true).await.expect("shutdown");
}

#[tokio::test]
async fn a_monitor_that_can_not_start_says_why() {
    let mut world = World::new();
    let config = MonitorConfig {
        program: program(),
        others: [(HANDLER.to_owned(), "/bin/false".into())].into(),
        runtime: "/bin/true".into(),
        run_root: Utf8PathBuf::from(world.path("pods")),
        cgroup: None,
        tasks: TaskSet::new("test"),
    };
    world.supervisor = MonitorSupervisor::new(config);
    let error = world.supervisor.spawn(&world.pod, HANDLER, vec![]).await.err().expect("fails");
    assert!(error.chain().contains("exit status: 1"), "{}", error.chain());
    assert_eq!(world.supervisor.connect(&world.pod).await.err().map(|e| e.kind()), Some(Kind::NotFound));
    world.supervisor.cleanup(&world.pod).await.expect("cleanup");
    // The program is the handler's: others have theirs.
    let link = world.supervisor.spawn(&world.pod, "other", vec![]).await.expect("the monitor's own");
    assert_eq!(link.monitor.guest(vec![]).await.err().map(|e| e.kind()), Some(Kind::Unimplemented));
    link.monitor.shutdown(true).await.expect("shutdown");
}

#[tokio::test]
async fn the_relay_of_a_guest_is_a_monitor_to_the_daemon() {
    let mut world = World::new();
    world.supervisor.config.others = [("vm".to_owned(), built("proxmox-lxcri-guest-relay"))].into();
    let mut link = world.supervisor.spawn(&world.pod, "vm", b"its record".to_vec()).await.expect("spawn");
    assert_eq!((link.hello.version, link.hello.pod_info.as_slice()), (1, &b"its record"[..]));
    let failed = link.monitor.guest(vec![0; 100_000]).await.expect_err("no guest is known");
    assert_eq!((failed.kind(), failed.to_string().as_str()), (Kind::FailedPrecondition, "the guest is not known yet"));
    let id = ContainerId::new();
    assert_eq!(link.monitor.lend(&id).await.err().map(|e| e.kind()), Some(Kind::Unimplemented));
    assert_eq!(world.supervisor.list().await.expect("list"), std::slice::from_ref(&world.pod));
    world.supervisor.kill(&world.pod).await.expect("killed, as any monitor");
    assert_eq!(next(&mut link).await, MonitorEvent::Gone);
    world.supervisor.cleanup(&world.pod).await.expect("cleanup");
}

#[tokio::test]
async fn a_monitor_that_does_not_answer_is_killed_by_cleanup() {
    let world = World::new();
    let mut link = world.supervisor.spawn(&world.pod, HANDLER, vec![]).await.expect("spawn");
    let pid = rustix::process::Pid::from_raw(link.monitor.pid()).expect("pid");
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stop");
    world.supervisor.cleanup(&world.pod).await.expect("cleanup");
    assert_eq!(next(&mut link).await, MonitorEvent::Gone);
    assert_eq!(world.supervisor.list().await.expect("list"), []);
}
