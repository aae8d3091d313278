//! Exec, Attach and PortForward with the real crictl over both transports, and with our own command line.
//!
//! Run by `cargo test --test streaming`, as root. A crash leaves nothing: see `support`.

// Tests start programs as they like.
#![allow(clippy::disallowed_methods, clippy::print_stdout)]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::Stdio;
use std::time::Instant;

use serde_json::json;
use support::crictl::{BUSYBOX, pod_config};
use support::node::{Node, Options};
use support::streams::*;
use support::{describe, isolated, wait_for};

#[test]
fn exec_over_both_transports() {
    isolated("exec_over_both_transports", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        let (_pod, id) = sleeper(&crictl);
        let big = noise(100 << 20);
        for transport in TRANSPORTS {
            let exec = |args: &[&str]| crictl.output(&[&["exec", "--transport", transport, &id], args].concat());
            let out = exec(&["sh", "-c", "echo out; echo err >&2"]);
            assert!(out.status.success(), "{transport}: {}", describe(&out));
            assert_eq!((&out.stdout[..], &out.stderr[..]), (&b"out\n"[..], &b"err\n"[..]), "{transport}");
            let out = exec(&["sh", "-c", "echo before; exit 7"]);
            assert!(!out.status.success() && describe(&out).contains("exit code 7"), "{transport}: {}", describe(&out));
            assert_eq!(out.stdout, b"before\n");
            let out = exec(&["/no/such/program"]);
            let said = describe(&out);
            assert!(!out.status.success() && said.contains("/no/such/program"), "{transport}: {said}");

            let out = fed(&crictl, &["exec", "-i", "--transport", transport, &id, "cat"], b"through\n".to_vec());
            assert_eq!((out.status.success(), &out.stdout[..]), (true, &b"through\n"[..]), "{}", describe(&out));
            // A process that does not read its input ends all the same.
            let out = fed(&crictl, &["exec", "-i", "--transport", transport, &id, "echo", "deaf"], noise(1 << 20));
            assert_eq!((out.status.success(), &out.stdout[..]), (true, &b"deaf\n"[..]), "{}", describe(&out));

            let start = Instant::now();
            let out = fed(&crictl, &["exec", "-i", "--transport", transport, &id, "cat"], big.clone());
            assert!(out.status.success(), "{transport}: {}", String::from_utf8_lossy(&out.stderr));
            assert!(out.stdout == big, "{transport}: {} bytes came back, or others", out.stdout.len());
            println!("\nfigure: {transport}: 100 MiB through `crictl exec -i cat` in {:?}", start.elapsed());
        }
    });
}

#[test]
fn exec_on_a_terminal() {
    isolated("exec_on_a_terminal", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        let (_pod, id) = sleeper(&crictl);
        for transport in TRANSPORTS {
            let command = crictl.command(&["exec", "-it", "--transport", transport, &id, "sh"]);
            let mut terminal = OnTerminal::start(&command, 101, 33);
            terminal.until("# ");
            terminal.type_in("echo si''ze $(stty size)\n");
            terminal.until("size 33 101");
            terminal.resize(90, 20);
            // The new size takes its way through crictl: asked for until it is there.
            terminal.type_in("until [ \"$(stty size)\" = '20 90' ]; do sleep 0.05; done; echo re''sized\n");
            terminal.until("resized");
            terminal.type_in("sleep 1000\n");
            wait_there("sleep 1000");
            terminal.type_in("\x03");
            wait_gone("sleep 1000");
            terminal.type_in("exit 3\n");
            assert!(!terminal.status().success(), "{transport}");
            // What a short command says is there to the last byte.
            for _ in 0..10 {
                let command = crictl.command(&["exec", "-it", "--transport", transport, &id, "seq", "300"]);
                let mut terminal = OnTerminal::start(&command, 80, 24);
                terminal.until("\r\n300\r\n");
                assert!(terminal.status().success(), "{transport}");
            }
        }
    });
}

#[test]
fn attach_over_both_transports() {
    isolated("attach_over_both_transports", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        for transport in TRANSPORTS {
            // stdin_once: the container's input ends with its first client's, and so does `cat`.
            let name = format!("once-{transport}");
            let once = json!({"stdin": true, "stdin_once": true});
            let id = create_with(&crictl, &pod, &name, "echo up; cat; echo end >&2; exit 4", &once);
            let out = fed(&crictl, &["attach", "-i", "--transport", transport, &id], b"one\ntwo\n".to_vec());
            assert!(out.status.success(), "{transport}: {}", describe(&out));
            assert!(String::from_utf8_lossy(&out.stdout).ends_with("one\ntwo\n"), "{transport}: {}", describe(&out));
            assert!(String::from_utf8_lossy(&out.stderr).contains("end\n"), "{transport}: {}", describe(&out));
            assert_eq!(crictl.wait_exit(&id)["exitCode"], 4);
            assert_eq!(log_lines(&node, &name, "stdout"), ["up", "one", "two"]);
            assert_eq!(log_lines(&node, &name, "stderr"), ["end"]);
            assert!(!crictl.output(&["attach", "--transport", transport, &id]).status.success(), "it has ended");

            // Without it, the input stays open for the next client, and all clients see all output.
            let name = format!("many-{transport}");
            let id = create_with(&crictl, &pod, &name, "while read x; do echo got $x; done", &json!({"stdin": true}));
            let mut watcher = crictl.command(&["attach", "--transport", transport, &id]);
            let mut watcher = Running(watcher.stdout(Stdio::piped()).spawn().expect("crictl"));
            let mut seen = watcher.0.stdout.take().expect("stdout");
            for n in 1..4 {
                let mut client = crictl.command(&["attach", "-i", "--transport", transport, &id]);
                let mut client = Running(client.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("crictl"));
                let mut stdin = client.0.stdin.take().expect("stdin");
                writeln!(stdin, "{n}").expect("typed");
                let want = format!("got {n}\n");
                let mut got = vec![0; want.len()];
                client.0.stdout.as_mut().expect("stdout").read_exact(&mut got).expect("an answer");
                assert_eq!(String::from_utf8_lossy(&got), want);
                // The watcher may have come after the first line.
                if n > 1 {
                    let mut text = String::new();
                    while !text.ends_with(&want) {
                        let mut byte = [0];
                        seen.read_exact(&mut byte).expect("the watcher sees it");
                        text.push(char::from(byte[0]));
                    }
                }
            }
            assert_eq!(crictl.container_state(&id), "CONTAINER_RUNNING");
            assert_eq!(log_lines(&node, &name, "stdout"), ["got 1", "got 2", "got 3"]);
            crictl.run(&["stop", "-t", "0", &id]);
            wait_for("the watcher's end", LONG, || watcher.0.try_wait().expect("its status"));

            // A container with a terminal.
            let name = format!("tty-{transport}");
            let id = create_with(&crictl, &pod, &name, "exec sh", &json!({"stdin": true, "tty": true}));
            let command = crictl.command(&["attach", "-it", "--transport", transport, &id]);
            let mut terminal = OnTerminal::start(&command, 77, 22);
            terminal.type_in("until [ \"$(stty size)\" = '22 77' ]; do sleep 0.05; done; echo si''zed\n");
            terminal.until("sized");
            terminal.type_in("exit 6\n");
            terminal.status();
            assert_eq!(crictl.wait_exit(&id)["exitCode"], 6);
        }
        let id = create_with(&crictl, &pod, "mute", "exec sleep 1000", &json!({}));
        let out = crictl.output(&["attach", "-i", &id]);
        assert!(describe(&out).contains("without stdin"), "{}", describe(&out));
    });
}

/// Sends all, says so, and reads to the end.
fn talk(port: u16, data: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(LONG))?;
    let mut half = stream.try_clone()?;
    let owned = data.to_vec();
    let writer = std::thread::spawn(move || half.write_all(&owned).and_then(|()| half.shutdown(Shutdown::Write)));
    let mut got = Vec::new();
    stream.read_to_end(&mut got)?;
    writer.join().expect("the writer")?;
    Ok(got)
}

/// A server in the network namespace of a process: gives back all it got, once it has all of it.
fn echo_server(netns_of: i32, address: &'static str) {
    let netns = std::fs::File::open(format!("/proc/{netns_of}/ns/net")).expect("a network namespace");
    let (ready, listens) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        use std::os::fd::AsFd;
        let kind = rustix::thread::LinkNameSpaceType::Network;
        rustix::thread::move_into_link_name_space(netns.as_fd(), Some(kind)).expect("setns");
        let listener = std::net::TcpListener::bind(address).expect("listen");
        ready.send(()).expect("the test waits");
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut stream, mut got) = (stream, Vec::new());
                if stream.read_to_end(&mut got).is_ok() {
                    let _ = stream.write_all(&got);
                }
            });
        }
    });
    listens.recv().expect("the server listens");
}

#[test]
fn port_forward_over_both_transports() {
    isolated("port_forward_over_both_transports", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let id = crictl.create(&pod, "p", "nc", BUSYBOX, "exec nc -ll -p 8080 -e cat");
        crictl.run(&["start", &id]);
        let inside = wait_there("nc -ll -p 8080 -e cat");
        echo_server(inside, "127.0.0.1:9090");
        echo_server(inside, "[::1]:9091");
        let mut host_config = pod_config("host", &node.pod_logs("host"));
        host_config["linux"]["security_context"]["namespace_options"] = json!({"network": 2, "pid": 1});
        let host = crictl.run(&["runp", &crictl.file("pod-host", &host_config)]);
        echo_server(std::process::id() as i32, "127.0.0.1:9090");
        for transport in TRANSPORTS {
            let start = |pod: &str, ports: &[&str]| {
                let mut forward = crictl.command(&[&["port-forward", "--transport", transport, pod], ports].concat());
                Running(forward.stdout(Stdio::null()).spawn().expect("crictl"))
            };
            let works = |port| {
                wait_for("the forwarded port", LONG, || (talk(port, b"hi").ok()? == b"hi").then_some(()));
            };
            let mut forward = start(&pod, &["18080:8080", "18090:9090", "18091:9091", "18099:7"]);
            [18080, 18090, 18091].into_iter().for_each(works);
            let big = noise(20 << 20);
            assert!(talk(18090, &big).expect("a connection") == big, "{transport}: other bytes");
            let many: Vec<_> = (0..40)
                .map(|n| std::thread::spawn(move || talk(18090, format!("number {n}").repeat(n * 500).as_bytes())))
                .collect();
            for (n, client) in many.into_iter().enumerate() {
                let got = client.join().expect("a client").expect("a connection");
                assert!(got == format!("number {n}").repeat(n * 500).as_bytes(), "{transport}: client {n}");
            }
            // Nobody listens on port 7: that connection ends. crictl then gives up the others, as kubectl does.
            assert_eq!(talk(18099, b"").unwrap_or_default(), b"");
            wait_for("crictl's end", LONG, || forward.0.try_wait().expect("its status"));

            let _forward = start(&host, &["18081:9090"]);
            works(18081);
        }
    });
}

#[test]
fn our_own_command_line() {
    isolated("our_own_command_line", || {
        let node = Node::start(Options::default());
        let (_pod, id) = sleeper(&node.crictl());
        let config = node.dir.join("config.toml");
        let verb = |args: &[&str]| {
            let mut command = std::process::Command::new(support::daemon_program());
            command.arg(args[0]).arg("--config").arg(&config).args(&args[1..]).stdin(Stdio::null());
            command
        };
        let fed = |args: &[&str], input: &[u8]| {
            let mut command = verb(args);
            let mut child =
                command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("us");
            let (mut stdin, input) = (child.stdin.take().expect("stdin"), input.to_vec());
            let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
            let out = child.wait_with_output().expect("our output");
            writer.join().expect("the writer");
            (out.status.code(), out.stdout, String::from_utf8_lossy(&out.stderr).into_owned())
        };
        let big = noise(20 << 20);
        let (code, out, err) = fed(&["exec", "-i", &id, "cat"], &big);
        assert!(code == Some(0) && out == big, "{code:?}, {} bytes: {err}", out.len());
        let (code, out, err) = fed(&["exec", &id, "sh", "-c", "echo out; echo err >&2; exit 9"], b"");
        assert_eq!((code, &out[..], err.as_str()), (Some(9), &b"out\n"[..], "err\n"));
        let (code, out, err) = fed(&["exec", "--timeout", "1", &id, "sleep", "30"], b"");
        assert!(code == Some(1) && out.is_empty() && err.contains("did not end within"), "{code:?} {err}");
        let mut terminal = OnTerminal::start(&verb(&["exec", "-i", "-t", &id, "sh"]), 99, 31);
        terminal.until("# ");
        terminal.type_in("stty size; exit 3\n");
        terminal.until("31 99");
        assert_eq!(terminal.status().code(), Some(3));

        // `run` sees the first words, its input ends, and its exit code is the container's.
        let (code, out, err) = fed(&["run", "--rm", "-i", BUSYBOX, "sh", "-c", "echo first; cat; exit 4"], b"typed\n");
        assert_eq!((code, out.as_slice()), (Some(4), &b"first\ntyped\n"[..]), "{err}");
        let mut terminal = OnTerminal::start(&verb(&["run", "-it", "--name", "shell", BUSYBOX, "sh"]), 88, 30);
        terminal.until("# ");
        terminal.type_in("until [ \"$(stty size)\" = '30 88' ]; do sleep 0.05; done; echo si''zed\n");
        terminal.until("sized");
        // Left by its keys, it runs on; found again, it ends.
        terminal.type_in("\x10\x11");
        assert_eq!(terminal.status().code(), Some(0));
        let mut terminal = OnTerminal::start(&verb(&["attach", "-it", "shell"]), 70, 20);
        terminal.type_in("echo ba''ck; exit 5\n");
        terminal.until("back");
        assert_eq!(terminal.status().code(), Some(0));
        wait_for("the shell's end", LONG, || {
            verb(&["rm", "shell"]).output().expect("rm").status.success().then_some(())
        });
        // A kubelet's client sees none of it.
        assert_eq!(node.crictl().json(&["pods"])["items"].as_array().map_or(0, Vec::len), 1);
    });
}
