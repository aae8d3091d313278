//! One full life with the real crun: root file system by descriptor, limits, execs, a terminal.
//!
//! crun refuses hybrid cgroup hierarchies, so the monitor runs in a mount namespace without the v2 one.
#![allow(clippy::unwrap_used, unsafe_code, clippy::disallowed_methods)]

mod harness;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use harness::*;
use lxcri_monitor_proto::v1::{self, reply::Body, request::Op};
use rustix::fs::CWD;
use rustix::mount::OpenTreeFlags;

/// A monitor for crun.
fn start() -> Pod {
    let dir = tempfile::tempdir().unwrap();
    let wrapper = dir.path().join("monitor");
    write_file(
        &wrapper,
        &format!(
            "#!/bin/sh\nif [ \"$1\" = inside ]; then shift; umount /sys/fs/cgroup/unified 2>/dev/null; exec {} \"$@\"; fi\n\
             PATH=/usr/bin:/bin; export PATH\nexec unshare -m \"$0\" inside \"$@\"\n",
            program().display()
        ),
    );
    std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o700)).unwrap();
    let pod = Pod::start_with(b"", &wrapper);
    pod.connect();
    pod
}

/// A folder with busybox, as a detached mount.
fn rootfs(pod: &Pod) -> OwnedFd {
    let root = folder(pod.dir.path().join("image"));
    let bin = folder(root.join("bin"));
    for name in ["proc", "dev", "sys", "tmp"] {
        folder(root.join(name));
    }
    std::fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
    for name in ["sh", "cat", "echo", "sleep", "seq", "head", "tail", "ls", "stty", "tty", "id"] {
        let _ = std::os::unix::fs::symlink("busybox", bin.join(name));
    }
    rustix::mount::open_tree(CWD, &root, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC).unwrap()
}

fn crun(pod: &Pod, args: &[&str]) -> v1::Program {
    let (root, log) = (pod.path("crun"), pod.path("crun.log"));
    let mut all: Vec<String> =
        ["--root", &root, "--log", &log, "--cgroup-manager", "cgroupfs"].map(String::from).to_vec();
    all.extend(args.iter().map(|a| a.to_string()));
    v1::Program {
        path: "/usr/bin/crun".into(),
        args: all,
        env: vec!["PATH=/usr/bin:/bin".into()],
        error_log: log,
        ..Default::default()
    }
}

fn process(command: &str, terminal: bool) -> serde_json::Value {
    serde_json::json!({
        "terminal": terminal, "user": {"uid": 1000, "gid": 1000}, "args": ["/bin/sh", "-c", command], "cwd": "/",
        "env": ["PATH=/bin"], "noNewPrivileges": true
    })
}

/// A plan for crun; the cgroup is the container's id.
fn plan(pod: &Pod, id: &str, command: &str, terminal: bool) -> v1::CreateContainer {
    let bundle = folder(pod.dir.path().join(format!("{id}.bundle")));
    let mount_point = folder(bundle.join("rootfs"));
    let cgroup = format!("/lxcri-test-{}-{id}", pod.child.id());
    let config = serde_json::json!({
        "ociVersion": "1.0.2", "process": process(command, terminal),
        "root": {"path": mount_point}, "hostname": id,
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                   {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                   {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                    "options": ["newinstance", "ptmxmode=0666", "mode=0620"]}],
        "linux": {"cgroupsPath": cgroup, "resources": {"memory": {"limit": 33554432, "swap": 33554432}},
                  "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]}
    });
    write_file(&bundle.join("config.json"), &config.to_string());
    let p = |name: &str| pod.path(&format!("{id}.{name}"));
    let mut create = vec!["create", "--bundle", bundle.to_str().unwrap(), "--pid-file"];
    let (pid_file, console) = (p("pid"), p("console"));
    create.push(&pid_file);
    if terminal {
        create.extend(["--console-socket", &console]);
    }
    create.push(id);
    v1::CreateContainer {
        id: id.into(),
        create: Some(crun(pod, &create)),
        start: Some(crun(pod, &["start", id])),
        delete: Some(crun(pod, &["delete", "--force", id])),
        pid_file: pid_file.clone(),
        stdio: Some(v1::Stdio {
            terminal,
            console_socket: if terminal { console.clone() } else { String::new() },
            stdin: p("in"),
            stdout: p("out"),
            stderr: p("err"),
            uid: 1000,
            gid: 1000,
            ..Default::default()
        }),
        log_path: p("log"),
        exit_path: p("exit.json"),
        rootfs_mount_point: mount_point.to_str().unwrap().into(),
        cgroups: Some(v1::Cgroups {
            memory: format!("/sys/fs/cgroup/memory{cgroup}"),
            kill: format!("/sys/fs/cgroup/memory{cgroup}"),
        }),
        ..Default::default()
    }
}

fn create(client: &mut Client, pod: &Pod, plan: v1::CreateContainer, root: &OwnedFd) -> v1::Created {
    match client.call(Op::Create(plan), &[root.as_fd()]) {
        Body::Created(created) => {
            pod.pids.borrow_mut().push(created.pid);
            created
        }
        other => panic!("{other:?}"),
    }
}

fn exec(pod: &Pod, container: &str, id: &str, command: &str) -> v1::Exec {
    let (spec, pid_file) = (pod.path(&format!("{id}.json")), pod.path(&format!("{id}.pid")));
    write_file(Path::new(&spec), &process(command, false).to_string());
    v1::Exec {
        container_id: container.into(),
        exec_id: id.into(),
        program: Some(crun(pod, &["exec", "--detach", "--pid-file", &pid_file, "--process", &spec, container])),
        pid_file,
        has_stdout: true,
        ..Default::default()
    }
}

#[test]
fn a_full_life() {
    let mut pod = start();
    let mut client = pod.connect();
    let script = "id -u; echo to-stderr >/dev/stderr; cat; echo over; exit 42";
    let plan = plan(&pod, "c1", script, false);
    let created = create(&mut client, &pod, plan.clone(), &rootfs(&pod));
    assert!(alive(created.pid));
    // The runtime has it; here it is not mounted any more.
    let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", pod.child.id())).unwrap();
    assert!(!mounts.contains("c1.bundle"), "{mounts}");
    client.start("c1");
    until("it runs", || pod.output("c1.log", "stdout") == b"1000\n");
    until("stderr", || pod.output("c1.log", "stderr") == b"to-stderr\n");

    // An exec, and one whose children are killed with it.
    let (out, w) = pipe();
    let id = client.send(Op::Exec(exec(&pod, "c1", "e1", "echo in; id -u; exit 9")), &[w.as_fd()]);
    drop(w);
    assert!(matches!(client.answer(id), Body::ExecStarted(_)));
    assert_eq!(client.exec_exited("e1").exit.unwrap().code, 9);
    assert_eq!(read_all(out), "in\n1000\n");
    let (out, w) = pipe();
    let mut slow = exec(&pod, "c1", "e2", "sh -c 'sleep 1000 & exit 0'; (sleep 1000; :) & echo up; sleep 1000");
    slow.timeout_ms = 500;
    let id = client.send(Op::Exec(slow), &[w.as_fd()]);
    drop(w);
    assert!(matches!(client.answer(id), Body::ExecStarted(_)));
    assert!(client.exec_exited("e2").timed_out);
    assert_eq!(read_all(out), "up\n", "and no sleeper holds the pipe");
    let error = match client.call(Op::Exec(exec(&pod, "c1", "e3", "")), &[null().as_fd()]) {
        // An empty script is fine; a missing program is not.
        Body::ExecStarted(_) => client.exec_exited("e3").exit.unwrap().code,
        other => panic!("{other:?}"),
    };
    assert_eq!(error, 0);

    use std::io::Write;
    let mut stdin = std::fs::File::options().write(true).open(pod.path("c1.in")).unwrap();
    stdin.write_all(b"typed\n").unwrap();
    drop(stdin);
    assert!(matches!(client.call(Op::CloseStdin(v1::CloseStdin { container_id: "c1".into() }), &[]), Body::Done(_)));
    let exit = client.exited("c1");
    assert_eq!((exit.code, exit.oom), (42, false));
    assert_eq!(pod.output("c1.log", "stdout"), b"1000\ntyped\nover\n");
    client.delete("c1");
    assert!(!Path::new(&plan.cgroups.unwrap().kill).exists());
    pod.shutdown();
}

#[test]
fn a_failed_create_tells_what_crun_said() {
    let pod = start();
    let mut client = pod.connect();
    let mut plan = plan(&pod, "c1", "true", false);
    let config = pod.dir.path().join("c1.bundle/config.json");
    let text = std::fs::read_to_string(&config).unwrap().replace("/bin/sh", "/bin/missing");
    write_file(&config, &text);
    let root = rootfs(&pod);
    match client.call(Op::Create(plan.clone()), &[root.as_fd()]) {
        Body::Error(error) => {
            assert_eq!(error.code(), v1::ErrorCode::ErrorProgram);
            assert!(error.message.contains("/bin/missing"), "{error:?}");
        }
        other => panic!("{other:?}"),
    }
    // Nothing of it is left in crun's state either: the same id works at once.
    write_file(&config, &text.replace("/bin/missing", "/bin/sh"));
    plan.exit_path = pod.path("second.json");
    create(&mut client, &pod, plan, &rootfs(&pod));
    client.start("c1");
    assert_eq!(client.exited("c1").code, 0);
    client.delete("c1");
}

#[test]
fn out_of_memory_is_told() {
    let pod = start();
    let mut client = pod.connect();
    // head's output is one line without end, which tail keeps in memory.
    let plan = plan(&pod, "c1", "head -c 100000000 /dev/zero | tail; exit 3", false);
    create(&mut client, &pod, plan, &rootfs(&pod));
    client.start("c1");
    let exit = client.exited("c1");
    assert!(exit.oom, "{exit:?}");
    assert_eq!(pod.json("c1.exit.json")["oom"], true);
    client.delete("c1");
}

#[test]
fn a_terminal_and_a_kill() {
    let pod = start();
    let mut client = pod.connect();
    let plan = plan(&pod, "c1", "tty; stty size; sleep 1000", true);
    create(&mut client, &pod, plan, &rootfs(&pod));
    let resize = v1::ResizeTerminal { container_id: "c1".into(), width: 90, height: 20, ..Default::default() };
    assert!(matches!(client.call(Op::Resize(resize), &[]), Body::Done(_)));
    client.start("c1");
    until("its output", || pod.output("c1.log", "stdout").ends_with(b"20 90\r\n"));
    let signal = v1::SignalContainer { id: "c1".into(), signal: 9, all: true };
    assert!(matches!(client.call(Op::Signal(signal), &[]), Body::Done(_)));
    assert_eq!(client.exited("c1").signal, 9);
    client.delete("c1");
}
