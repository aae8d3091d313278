//! A monitor that is killed, or hangs: its containers go on, terminals included, another one takes them over, and exit codes
//! are right. What it had read and not written is lost: one read of 16 KiB at most for each death, also at full speed.
//!
//! Run by `cargo test --test monitor_death`, as root. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods)] // files that tell a container to go on are no state

mod support;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use support::crictl::{BUSYBOX, Crictl, LogLine, pod_config, read_log, stream_lines};
use support::manager::Manager;
use support::node::{Node, Options};
use support::streams::{LONG, Running, create_with, fed, log_lines, pids_of, wait_gone, wait_there};
use support::{isolated, snapshot, wait_for};

/// The one read that a monitor may hold, in bytes.
const READ: usize = 16 << 10;

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).expect("a pid"), signal).expect("a signal");
}

/// Pid of a pod's monitor.
fn monitor(pod: &str) -> Option<i32> {
    let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
    let mut pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let line = |pid: &i32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let is = |pid: &i32| line(pid).split(|b| *b == 0).skip(1).take(2).eq([&b"--pod"[..], pod.as_bytes()]);
    pids.find(is)
}

/// Kills it and waits for the next one.
fn kill_monitor(pod: &str) {
    let old = monitor(pod).expect("a monitor");
    signal(old, Signal::KILL);
    wait_for("another monitor", LONG, || monitor(pod).filter(|pid| *pid != old));
}

fn pod(node: &Node, shared_pids: bool) -> (Crictl, String) {
    let crictl = node.crictl();
    crictl.run(&["pull", BUSYBOX]);
    let mut config = pod_config("p", &node.pod_logs("p"));
    if shared_pids {
        config["linux"]["security_context"]["namespace_options"]["pid"] = json!(0);
    }
    let id = crictl.run(&["runp", &crictl.file("pod-p", &config)]);
    (crictl, id)
}

/// Numbered lines of 16 bytes: in order, with as many gaps as reads may be lost, none larger than a read.
fn check(log: &[LogLine], deaths: usize) -> (usize, usize) {
    let (mut next, mut gaps, mut lost) = (0, 0, 0);
    for line in stream_lines(log, "stdout") {
        // The ends of a lost read are cut lines.
        let number = line.strip_prefix("line ").filter(|n| n.len() == 10).and_then(|n| n.parse::<usize>().ok());
        let Some(n) = number else { continue };
        assert!(n >= next, "line {n} after line {next}");
        if n > next {
            gaps += 1;
            lost += n - next;
            assert!((n - next) * 16 <= READ + 2 * 16, "{} lines are lost at once", n - next);
        }
        next = n + 1;
    }
    assert!(gaps <= deaths, "{gaps} gaps by {deaths} deaths");
    (next, lost)
}

/// Types a line into the terminal of container "t" and waits until it has answered in its log.
fn type_in(node: &Node, id: &str) {
    let attach = node.crictl().command(&["attach", "-it", id]);
    let words = std::iter::once(attach.get_program()).chain(attach.get_args());
    let line: Vec<_> = words.map(|w| w.to_string_lossy().into_owned()).collect();
    let mut script = Command::new("script");
    script.args(["-q", "-c", &line.join(" "), "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut client = Running(script.spawn().expect("script"));
    client.0.stdin.as_mut().expect("its stdin").write_all(b"hello\n").expect("typed");
    wait_for("the terminal's answer", LONG, || {
        log_lines(node, "t", "stdout").iter().any(|l| l.trim_end() == "got hello").then_some(())
    });
}

#[test]
fn killed_at_full_speed_it_loses_one_read() {
    isolated("killed_at_full_speed_it_loses_one_read", || {
        let node = Node::start(Options::default());
        let (crictl, pod) = pod(&node, false);
        let before = snapshot::take(&node);
        let script = "i=0; while [ ! -e /stop ]; do seq -f 'line %010g' $i $((i+19999)); i=$((i+20000)); done; exit 5";
        let id = crictl.create(&pod, "p", "c", BUSYBOX, script);
        crictl.run(&["start", &id]);
        let log = node.pod_logs("p").join("c/0.log");
        let size = || std::fs::metadata(&log).map_or(0, |m| m.len());
        let started = Instant::now();
        let deaths = 4;
        for n in 0..deaths {
            let start = size();
            wait_for("output", 4 * LONG, || (size() > start + (512 << 10)).then_some(()));
            kill_monitor(&pod);
            if n == 1 {
                // A rotation goes to the new monitor, when it writes.
                let start = size();
                wait_for("output of the new monitor", 4 * LONG, || (size() > start).then_some(()));
                std::fs::rename(&log, log.with_extension("1")).expect("rotated");
                wait_for("the reopened log", LONG, || crictl.try_run(&["logs", "--reopen", &id]).0.then_some(()))
            }
        }
        // The container may end by it, and all of its processes with it, before `touch` itself has ended.
        let (good, said) = crictl.try_run(&["exec", "-s", &id, "touch", "/stop"]);
        assert!(good || said.contains("exited with 137"), "{said}");
        let status = crictl.wait_exit(&id);
        assert_eq!(status["exitCode"], 5, "{status}");
        let mut lines = read_log(&log.with_extension("1"));
        lines.extend(read_log(&log));
        let (written, lost) = check(&lines, deaths);
        assert!(written.is_multiple_of(20_000), "the last of {written} lines are missing");
        println!(
            "\nfigure: {deaths} monitors killed under load: {written} lines of 16 bytes in {:?}, {lost} lost ({} bytes a death)",
            started.elapsed(),
            lost * 16 / deaths
        );
        crictl.run(&["rm", &id]);
        snapshot::assert_back_to(&before, &node);
        crictl.run(&["rmp", "-f", &pod]);
    });
}

#[test]
fn streams_terminals_and_ends_outlive_it() {
    isolated("streams_terminals_and_ends_outlive_it", || {
        let mut node = Node::start(Options::default());
        let (crictl, pod) = pod(&node, false);
        let tty = json!({"tty": true, "stdin": true});
        let terminal = create_with(&crictl, &pod, "t", "while read x; do echo \"got $x\"; done; exit 4", &tty);
        let input = json!({"stdin": true, "stdin_once": true});
        let stdin = create_with(&crictl, &pod, "s", "cat; exit 3", &input);
        let go = |name: &str| format!("until [ -e /go ]; do sleep 0.1; done; echo {name}; exit 9");
        let late = create_with(&crictl, &pod, "late", &go("late"), &json!({}));
        let unseen = create_with(&crictl, &pod, "unseen", &go("unseen"), &json!({}));
        let idle = crictl.create(&pod, "p", "idle", BUSYBOX, "exit 8");
        let exec = std::thread::spawn({
            let crictl = node.crictl();
            let late = late.clone();
            move || crictl.try_run(&["exec", "-s", &late, "sleep", "54321"])
        });
        wait_there("sleep 54321");

        kill_monitor(&pod);
        // Execs of a dead monitor end.
        wait_gone("sleep 54321");
        assert!(!exec.join().expect("exec").0, "an exec that was killed has succeeded");
        for id in [&terminal, &stdin, &late, &unseen] {
            assert_eq!(crictl.container_state(id), "CONTAINER_RUNNING");
        }
        // What was created and not started can be; new ones can be made.
        crictl.run(&["start", &idle]);
        assert_eq!(crictl.wait_exit(&idle)["exitCode"], 8);
        let new = create_with(&crictl, &pod, "new", "echo new; exit 2", &json!({}));
        assert_eq!(crictl.wait_exit(&new)["exitCode"], 2);
        assert_eq!(log_lines(&node, "new", "stdout"), ["new"]);
        type_in(&node, &terminal);
        // Its input ends for good with this client, though the daemon has a duplicate of its writer.
        fed(&crictl, &["attach", "-i", &stdin], b"typed\n".to_vec());
        assert_eq!(crictl.wait_exit(&stdin)["exitCode"], 3);
        assert_eq!(log_lines(&node, "s", "stdout"), ["typed"]);

        // An end while there is no monitor, and nobody to start one: the daemon stands still.
        let daemon = i32::try_from(node.daemon_pid()).expect("a pid");
        let touch = |id: &str| {
            std::fs::write(format!("/proc/{}/root/go", init_of(&crictl, id)), "").expect("go");
        };
        let gone =
            |pid: i64| wait_for("its end", LONG, || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
        let pid = init_of(&crictl, &late);
        signal(daemon, Signal::STOP);
        signal(monitor(&pod).expect("a monitor"), Signal::KILL);
        std::fs::write(format!("/proc/{pid}/root/go"), "").expect("go");
        gone(pid);
        signal(daemon, Signal::CONT);
        let status = crictl.wait_exit(&late);
        assert_eq!((&status["exitCode"], &status["reason"]), (&9.into(), &"Error".into()), "{status}");
        assert_eq!(log_lines(&node, "late", "stdout"), ["late"], "what was in the FIFO is lost");

        // Daemon and monitor: what runs is taken over by the next of both.
        let second = create_with(&crictl, &pod, "second", &go("second"), &json!({}));
        node.kill_daemon();
        signal(monitor(&pod).expect("a monitor"), Signal::KILL);
        node.start_daemon();
        assert_eq!(crictl.container_state(&second), "CONTAINER_RUNNING");
        touch(&second);
        assert_eq!(crictl.wait_exit(&second)["exitCode"], 9);
        assert_eq!(log_lines(&node, "second", "stdout"), ["second"]);
        // An end that nobody has seen: not a success, and why.
        let pid = init_of(&crictl, &unseen);
        node.kill_daemon();
        signal(monitor(&pod).expect("a monitor"), Signal::KILL);
        std::fs::write(format!("/proc/{pid}/root/go"), "").expect("go");
        gone(pid);
        node.start_daemon();
        let status = crictl.wait_exit(&unseen);
        if std::env::var("LXCRI_TEST_HANDLER").is_ok_and(|h| h != "crun") {
            // Its parent is neither: that has seen it.
            assert_eq!(status["exitCode"], 9, "{status}");
        } else {
            assert_eq!(status["exitCode"], 255, "{status}");
            assert!(status["message"].as_str().is_some_and(|m| m.contains("not known")), "{status}");
        }
        crictl.run(&["rmp", "-f", &pod]);
    });
}

fn init_of(crictl: &Crictl, id: &str) -> i64 {
    crictl.json(&["inspect", id])["info"]["pid"].as_i64().expect("a pid")
}

/// With a service manager that keeps descriptors nothing is lost even when daemon and monitor die at once.
#[test]
fn what_is_parked_outlives_daemon_and_monitor() {
    isolated("what_is_parked_outlives_daemon_and_monitor", || {
        let mut node = Node::prepare(Options::default());
        node.manager = Some(Manager::start(Path::new("/tmp/notify")));
        node.start_daemon();
        let (crictl, pod) = pod(&node, false);
        let parked = |node: &Node, id: &str| {
            let names = node.manager.as_ref().expect("a manager").parked();
            names.iter().filter(|n| n.contains(id)).count()
        };
        let tty = json!({"tty": true, "stdin": true});
        let terminal = create_with(&crictl, &pod, "t", "while read x; do echo \"got $x\"; done; exit 4", &tty);
        let script = "until [ -e /go ]; do sleep 0.1; done; echo last words; exit 9";
        let unseen = create_with(&crictl, &pod, "unseen", script, &json!({}));
        assert_eq!((parked(&node, &terminal), parked(&node, &unseen)), (2, 3));
        // Once more with all as it is: nothing piles up.
        node.crash_daemon();
        wait_for("what is parked", LONG, || {
            ((parked(&node, &terminal), parked(&node, &unseen)) == (2, 3)).then_some(())
        });
        let pid = init_of(&crictl, &unseen);
        node.kill_daemon();
        signal(monitor(&pod).expect("a monitor"), Signal::KILL);
        std::fs::write(format!("/proc/{pid}/root/go"), "").expect("go");
        wait_for("its end", LONG, || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
        node.start_daemon();
        let status = crictl.wait_exit(&unseen);
        assert_eq!(status["exitCode"], 9, "{status}");
        assert_eq!(log_lines(&node, "unseen", "stdout"), ["last words"]);
        type_in(&node, &terminal);
        crictl.run(&["rmp", "-f", &pod]);
        wait_for("an empty store", LONG, || {
            node.manager.as_ref().expect("a manager").parked().is_empty().then_some(())
        });
    });
}

#[test]
fn the_init_of_shared_processes_is_taken_over() {
    isolated("the_init_of_shared_processes_is_taken_over", || {
        let node = Node::start(Options::default());
        let (crictl, pod) = pod(&node, true);
        let shared = json!({"linux": {"security_context": {"namespace_options": {"pid": 0}}}});
        let script = "trap 'exit 6' TERM; while :; do sleep 0.05; done";
        let first = create_with(&crictl, &pod, "first", script, &shared);
        kill_monitor(&pod);
        let second = create_with(&crictl, &pod, "second", "exit 3", &shared);
        assert_eq!(crictl.wait_exit(&second)["exitCode"], 3);
        crictl.run(&["stop", "-t", "20", &first]);
        assert_eq!(crictl.wait_exit(&first)["exitCode"], 6);
        let init = pids_of("pod-init");
        assert_eq!(init.len(), 1, "{init:?}");
        signal(init[0], Signal::KILL);
        wait_for("NOTREADY", LONG, || {
            (crictl.json(&["inspectp", &pod])["status"]["state"] == "SANDBOX_NOTREADY").then_some(())
        });
        crictl.run(&["rmp", "-f", &pod]);
    });
}

#[test]
fn one_that_hangs_holds_nothing_up() {
    isolated("one_that_hangs_holds_nothing_up", || {
        let mut node = Node::start(Options::default());
        let (crictl, pod) = pod(&node, false);
        let script = "trap 'exit 6' TERM; while :; do sleep 0.05; done";
        let [a, b, c] = ["a", "b", "c"].map(|name| create_with(&crictl, &pod, name, script, &json!({})));
        let hang = || signal(monitor(&pod).expect("a monitor"), Signal::STOP);
        let timed = |what: &str, limit: u64, call: &dyn Fn()| {
            let start = Instant::now();
            call();
            let took = start.elapsed();
            println!("\nfigure: {what} with a hung monitor: {took:?}");
            assert!(took < Duration::from_secs(limit), "{what} took {took:?}");
        };
        hang();
        timed("StopContainer (grace 5 s)", 40, &|| drop(crictl.run(&["stop", "-t", "5", &a])));
        assert_eq!(crictl.wait_exit(&a)["exitCode"], 6);
        // A daemon that starts meets it.
        hang();
        node.kill_daemon();
        node.start_daemon();
        assert_eq!(crictl.container_state(&b), "CONTAINER_RUNNING");
        crictl.run(&["stop", "-t", "5", &b]);
        assert_eq!(crictl.wait_exit(&b)["exitCode"], 6);
        hang();
        // What it was asked for when it began to hang is given up after 25 s (the end of the last container may be on its way), and
        // this call's own question after 10.
        timed("StopPodSandbox", 45, &|| drop(crictl.run(&["stopp", &pod])));
        assert_eq!(crictl.container_status(&c)["exitCode"], 137);
        crictl.run(&["rmp", &pod]);
    });
}
