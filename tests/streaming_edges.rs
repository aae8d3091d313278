//! The streaming server with clients that crictl is not: legacy protocols, clients that vanish or do not read, tokens used
//! twice, a thousand execs; TLS and limits.
//!
//! Run by `cargo test --test streaming_edges`, as root. A crash leaves nothing: see `support`.

// Tests start programs as they like.
#![allow(clippy::disallowed_methods, clippy::print_stdout)]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use k8s_cri::v1::{AttachRequest, ExecRequest, ExecSyncRequest, PortForwardRequest};
use serde_json::json;
use support::client::{Client, block_on};
use support::crictl::BUSYBOX;
use support::node::{Node, Options};
use support::streams::*;
use support::ws::Ws;
use support::{describe, isolated, wait_for};

/// One request on a connection of its own; the first line of the answer.
fn http(url: &str, method: &str, headers: &str) -> String {
    let (address, path) = url.trim_start_matches("http://").split_once('/').expect("a URL");
    let mut stream = TcpStream::connect(address).expect("the streaming server listens");
    stream.set_read_timeout(Some(LONG)).expect("a timeout");
    write!(stream, "{method} /{path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n").expect("a request");
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"\r\n") && stream.read(&mut byte).expect("an answer") == 1 {
        text.push(byte[0]);
    }
    String::from_utf8_lossy(&text).trim().to_owned()
}

#[test]
fn urls_are_good_once_and_refusals_have_their_codes() {
    isolated("urls_are_good_once_and_refusals_have_their_codes", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        let (pod, id) = sleeper(&crictl);
        block_on(async {
            let mut client = Client::connect(&node.socket()).await;
            let url = exec_url(&mut client, &id, &["echo", "hi"], false).await;
            assert!(url.starts_with("http://127.0.0.1:") && url.contains("/exec/"), "{url}");
            let said = Ws::connect(&url, "v5.channel.k8s.io").await.finish().await;
            assert_eq!((said.text().as_str(), said.status()["status"].as_str()), ("hi\n", Some("Success")));
            assert_eq!(Ws::try_connect(&url, "v5.channel.k8s.io").await.err(), Some(404));

            // A token at another path, and one that never was.
            let url = exec_url(&mut client, &id, &["true"], false).await;
            assert_eq!(Ws::try_connect(&url.replace("/exec/", "/attach/"), "").await.err(), Some(404));
            assert_eq!(Ws::try_connect(&url, "").await.err(), Some(404));
            assert_eq!(Ws::try_connect(&format!("{url}x"), "").await.err(), Some(404));

            let spdy = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";
            let cases = [
                ("GET", String::new(), "400"),
                ("POST", spdy.to_owned(), "400"),
                ("POST", format!("{spdy}X-Stream-Protocol-Version: v9.channel.k8s.io\r\n"), "403"),
                ("PUT", spdy.to_owned(), "405"),
                ("GET", "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n".into(), "400"),
                ("POST", format!("{spdy}X-Stream-Protocol-Version: v9, v3.channel.k8s.io\r\n"), "101"),
                (
                    "GET",
                    format!("{spdy}X-Stream-Protocol-Version: x\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n"),
                    "101",
                ),
            ];
            for (method, headers, code) in cases {
                let url = exec_url(&mut client, &id, &["true"], false).await;
                let line = tokio::task::spawn_blocking(move || http(&url, method, &headers)).await.expect("join");
                assert!(line.starts_with(&format!("HTTP/1.1 {code} ")), "{method}: {line}");
            }
            let url = exec_url(&mut client, &id, &["true"], false).await;
            assert_eq!(Ws::try_connect(&url, "chat").await.err(), Some(400));

            // What can't be is refused before there is a URL.
            let request = |tty, stdin, stdout, stderr, cmd: &[&str], id: &str| ExecRequest {
                container_id: id.to_owned(),
                cmd: cmd.iter().map(|c| (*c).to_owned()).collect(),
                tty,
                stdin,
                stdout,
                stderr,
            };
            for (request, code) in [
                (request(true, true, true, true, &["x"], &id), tonic::Code::InvalidArgument),
                (request(false, false, false, false, &["x"], &id), tonic::Code::InvalidArgument),
                (request(false, false, true, false, &[], &id), tonic::Code::InvalidArgument),
                (request(false, false, true, false, &["x"], "nobody"), tonic::Code::NotFound),
            ] {
                assert_eq!(client.runtime.exec(request).await.map_err(|s| s.code()).err(), Some(code));
            }
            let attach = AttachRequest { container_id: id.clone(), ..Default::default() };
            let refused = client.runtime.attach(attach).await.map_err(|s| s.code()).err();
            assert_eq!(refused, Some(tonic::Code::InvalidArgument));
            let forward = PortForwardRequest { pod_sandbox_id: pod.clone(), port: vec![70000] };
            let refused = client.runtime.port_forward(forward).await.map_err(|s| s.code()).err();
            assert_eq!(refused, Some(tonic::Code::InvalidArgument));
            crictl.run(&["stop", "-t", "0", &id]);
            let request = request(false, false, true, false, &["x"], &id);
            let refused = client.runtime.exec(request).await.map_err(|s| s.code()).err();
            assert_eq!(refused, Some(tonic::Code::FailedPrecondition));
            crictl.run(&["stopp", &pod]);
            let forward = PortForwardRequest { pod_sandbox_id: pod.clone(), port: vec![80] };
            let refused = client.runtime.port_forward(forward).await.map_err(|s| s.code()).err();
            assert_eq!(refused, Some(tonic::Code::FailedPrecondition));
        });
    });
}

#[test]
fn legacy_websocket_protocols() {
    isolated("legacy_websocket_protocols", || {
        use futures::{SinkExt as _, StreamExt as _};
        use tokio_tungstenite::tungstenite::Message;
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        let (pod, id) = sleeper(&crictl);
        let server = crictl.create(&pod, "p", "echo", BUSYBOX, "exec nc -ll -p 8080 -e cat");
        crictl.run(&["start", &server]);
        block_on(async {
            let mut client = Client::connect(&node.socket()).await;
            let script = ["sh", "-c", "echo out; echo err >&2; exit 7"];
            for protocol in ["", "channel.k8s.io", "v4.channel.k8s.io", "v5.channel.k8s.io"] {
                let url = exec_url(&mut client, &id, &script, false).await;
                let said = Ws::connect(&url, protocol).await.finish().await;
                assert_eq!((&said.stdout[..], &said.stderr[..]), (&b"out\n"[..], &b"err\n"[..]), "{protocol}");
                let error = String::from_utf8_lossy(&said.error).into_owned();
                match protocol {
                    "" | "channel.k8s.io" => assert!(error.ends_with("exit status 7"), "{error}"),
                    _ => assert_eq!(said.status()["details"]["causes"][0]["message"], "7", "{error}"),
                }
            }
            for protocol in ["base64.channel.k8s.io", "v4.base64.channel.k8s.io"] {
                let url = exec_url(&mut client, &id, &["sh", "-c", "read x; echo got $x"], true).await;
                let mut ws = Ws::connect(&url, protocol).await;
                // "hi\n" on channel 0.
                ws.socket.send(Message::text("0aGkK")).await.expect("send");
                let mut texts = Vec::new();
                while let Some(Ok(Message::Text(text))) = ws.socket.next().await {
                    texts.push(text.to_string());
                }
                // Empty ones first, then "got hi\n".
                assert_eq!(texts[..2], ["1", "2"], "{texts:?}");
                assert!(texts.contains(&"1Z290IGhpCg==".to_owned()), "{texts:?}");
            }

            // A pair of channels for each port, which it begins with.
            let request = PortForwardRequest { pod_sandbox_id: pod.clone(), port: vec![8080, 7] };
            let url = client.runtime.port_forward(request).await.expect("PortForward").into_inner().url;
            let mut ws = Ws::connect(&url, "v4.channel.k8s.io").await;
            ws.send(0, b"hello").await;
            let mut channels: [Vec<u8>; 4] = Default::default();
            while channels[0].len() < 7 || channels[3].len() < 10 {
                let (channel, data) = ws.next().await.expect("data");
                channels[usize::from(channel)].extend(data);
            }
            let [data, error, other, refused] = channels;
            assert_eq!((&data[..], &error[..], &other[..]), (&b"\x90\x1fhello"[..], &b"\x90\x1f"[..], &b"\x07\0"[..]));
            let refused = String::from_utf8_lossy(&refused[2..]).into_owned();
            assert!(refused.contains("port 7") && refused.contains("refused"), "{refused}");

            // One digit names a channel there: no sixth pair.
            let request = PortForwardRequest { pod_sandbox_id: pod.clone(), port: vec![1, 2, 3, 4, 5, 6] };
            let url = client.runtime.port_forward(request).await.expect("PortForward").into_inner().url;
            assert_eq!(Ws::try_connect(&url, "v4.base64.channel.k8s.io").await.err(), Some(400));
        });
    });
}

fn memory_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Bytes that a process has written.
fn written(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).expect("io");
    text.lines().find_map(|l| l.strip_prefix("wchar: ")).and_then(|n| n.parse().ok()).expect("wchar")
}

/// Waits until the process has written something and writes no more; how much it wrote.
fn wait_stopped(what: &str, pid: i32) -> u64 {
    let mut last = 0;
    wait_for(what, LONG, || {
        let now = written(pid);
        let stopped = now > 0 && now == last;
        last = now;
        std::thread::sleep(Duration::from_millis(200)); // between two looks at a counter
        stopped.then_some(now)
    })
}

#[test]
fn clients_that_vanish_or_do_not_read() {
    isolated("clients_that_vanish_or_do_not_read", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        let (_pod, id) = sleeper(&crictl);
        for transport in TRANSPORTS {
            let mut client = crictl.command(&["exec", "-i", "--transport", transport, &id, "sleep", "4321"]);
            let client = Running(client.stdin(Stdio::piped()).spawn().expect("crictl"));
            wait_there("sleep 4321");
            drop(client);
            wait_gone("sleep 4321");

            // Its input is full, so that nobody reads from the connection.
            let mut client = crictl.command(&["exec", "-i", "--transport", transport, &id, "sleep", "4321"]);
            let zero = std::fs::File::open("/dev/zero").expect("/dev/zero");
            let mut client = Running(client.stdin(zero).spawn().expect("crictl"));
            wait_there("sleep 4321");
            let pid = i32::try_from(client.0.id()).expect("a pid");
            wait_stopped("the client to be stopped by a full connection", pid);
            client.0.kill().expect("kill -9");
            wait_gone("sleep 4321");
        }

        // A client that does not read stops the process, and nothing piles up in the daemon.
        block_on(async {
            let mut cri = Client::connect(&node.socket()).await;
            let before = memory_kib(node.daemon_pid());
            let url = exec_url(&mut cri, &id, &["yes", "0123456789"], false).await;
            let ws = Ws::connect(&url, "v5.channel.k8s.io").await;
            let pid = wait_there("yes 0123456789");
            let last = wait_stopped("`yes` to be stopped", pid);
            let grown = memory_kib(node.daemon_pid()).saturating_sub(before);
            println!("\nfigure: `yes` stopped after {last} bytes, the daemon grew by {grown} KiB");
            assert!(last < 16 << 20 && grown < 16 << 10, "{last} bytes, {grown} KiB");
            drop(ws);
            wait_gone("yes 0123456789");
        });
    });
}

#[test]
fn an_attached_client_that_does_not_read_is_cut_off() {
    isolated("an_attached_client_that_does_not_read_is_cut_off", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let script = "read x; seq 1 1500000; echo done >&2; read x; exit 5";
        let id = create_with(&crictl, &pod, "flood", script, &json!({"stdin": true}));
        block_on(async {
            let mut cri = Client::connect(&node.socket()).await;
            let attach =
                |stdin| AttachRequest { container_id: id.clone(), stdin, stdout: true, stderr: true, tty: false };
            let url = cri.runtime.attach(attach(true)).await.expect("Attach").into_inner().url;
            let mut lazy = Ws::connect(&url, "v5.channel.k8s.io").await;
            lazy.send(0, b"go\n").await;
            // The container is not held up by it: everything goes into the log.
            let log = node.pod_logs("p").join("flood/0.log");
            wait_for("the flood in the log", Duration::from_secs(120), || {
                std::fs::read_to_string(&log).is_ok_and(|t| t.contains(" stderr F done")).then_some(())
            });
            let said = lazy.finish().await;
            assert!(said.status()["message"].as_str().is_some_and(|m| m.contains("1 MiB behind")), "{}", said.status());
            assert!(said.stdout.len() > 1 << 20, "{} bytes", said.stdout.len());
            // The container is as it was, and its input is open.
            let url = cri.runtime.attach(attach(true)).await.expect("Attach").into_inner().url;
            let mut next = Ws::connect(&url, "v5.channel.k8s.io").await;
            next.send(0, b"end\n").await;
            assert_eq!(next.finish().await.status()["status"], "Success");
        });
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 5);
        let lines = log_lines(&node, "flood", "stdout");
        assert!(lines.len() == 1_500_000 && lines.last().is_some_and(|l| l == "1500000"), "{} lines", lines.len());
    });
}

#[test]
fn what_the_node_ends_is_no_success() {
    isolated("what_the_node_ends_is_no_success", || {
        let mut node = Node::start(Options::default());
        let crictl = node.crictl();
        let (_pod, id) = sleeper(&crictl);
        // The daemon is stopped under execs that say something all the time.
        let endless = "echo begin; while :; do echo x; sleep 0.1; done";
        let talks = TRANSPORTS.map(|transport| {
            let mut client = crictl.command(&["exec", "--transport", transport, &id, "sh", "-c", endless]);
            client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("crictl")
        });
        wait_for("two execs", LONG, || (pids_of(&format!("sh -c {endless}")).len() == 2).then_some(()));
        node.stop_daemon();
        for (client, transport) in talks.into_iter().zip(TRANSPORTS) {
            let out = client.wait_with_output().expect("crictl's output");
            let said = describe(&out);
            assert!(!out.status.success() && said.contains("the daemon was stopped"), "{transport}: {said}");
        }
        // Nothing goes over the connection for too long.
        let path = node.dir.join("config.toml");
        let text = std::fs::read_to_string(&path).expect("config.toml");
        std::fs::write(&path, format!("{text}\n[server.stream]\nidle_timeout = \"1s\"\n")).expect("config.toml");
        node.start_daemon();
        for transport in TRANSPORTS {
            let script = "echo begin; sleep 4321; echo end";
            let out = crictl.command(&["exec", "--transport", transport, &id, "sh", "-c", script]).output();
            let out = out.expect("crictl");
            assert_eq!(String::from_utf8_lossy(&out.stdout), "begin\n", "{transport}");
            let said = describe(&out);
            assert!(!out.status.success() && said.contains("nothing went over it"), "{transport}: {said}");
            wait_gone("sleep 4321");
        }
    });
}

#[test]
fn clients_of_a_container_that_does_not_read_leave_nothing() {
    isolated("clients_of_a_container_that_does_not_read_leave_nothing", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let deaf = create_with(&crictl, &pod, "deaf", "exec sleep 4321", &json!({"stdin": true}));
        let monitor = monitors()[0];
        let mut before = None;
        for n in 0..6 {
            let mut client = crictl.command(&["attach", "-i", "--transport", TRANSPORTS[n % 2], &deaf]);
            let zero = std::fs::File::open("/dev/zero").expect("/dev/zero");
            let mut client = Running(client.stdin(zero).spawn().expect("crictl"));
            let pid = i32::try_from(client.0.id()).expect("a pid");
            wait_stopped("the client to be stopped by a full connection", pid);
            client.0.kill().expect("kill -9");
            // After the first one, which is what stays for all.
            match before {
                None => {
                    std::thread::sleep(Duration::from_secs(1)); // nothing tells when all of the first one is gone
                    before = Some(holdings(monitor).0);
                }
                Some(before) => {
                    wait_for("the client's descriptors to go", LONG, || (holdings(monitor).0 <= before).then_some(()));
                }
            }
        }
        // A client of one that was made without stdin is refused before it has a URL.
        let plain = create_with(&crictl, &pod, "plain", "exec sleep 4321", &json!({}));
        block_on(async {
            let mut cri = Client::connect(&node.socket()).await;
            let attach = AttachRequest { container_id: plain, stdin: true, stdout: true, stderr: true, tty: false };
            let refused = cri.runtime.attach(attach).await.expect_err("refused");
            assert!(refused.code() == tonic::Code::FailedPrecondition, "{refused}");
            assert!(refused.message().contains("was made without stdin"), "{refused}");
        });
    });
}

/// Descriptors and threads of a process.
fn holdings(pid: i32) -> (usize, usize) {
    let count = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, Iterator::count);
    (count("fd"), count("task"))
}

/// Monitors of this machine's pods.
fn monitors() -> Vec<i32> {
    let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let comm = |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    pids.filter(|pid| comm(pid).trim() == "lxcri-monitor").collect()
}

fn cgroups() -> usize {
    let mut todo = vec![PathBuf::from("/sys/fs/cgroup")];
    let mut found = 0;
    while let Some(folder) = todo.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                found += 1;
                todo.push(entry.path());
            }
        }
    }
    found
}

#[test]
fn a_thousand_execs_leave_nothing() {
    isolated("a_thousand_execs_leave_nothing", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        let (pod, id) = sleeper(&crictl);
        let daemon = i32::try_from(node.daemon_pid()).expect("a pid");
        let monitor = crictl.json(&["inspectp", &pod])["info"]["monitorPid"].as_i64();
        let monitor = monitor.and_then(|p| i32::try_from(p).ok()).unwrap_or_else(|| monitors()[0]);
        let run_files =
            || std::fs::read_dir(node.dir.join(format!("run/pods/{pod}/containers/{id}"))).map_or(0, Iterator::count);
        block_on(async {
            let mut client = Client::connect(&node.socket()).await;
            let sync = |mut client: Client, id: String| async move {
                let request = ExecSyncRequest { container_id: id, cmd: vec!["echo".into(), "x".into()], timeout: 10 };
                assert_eq!(client.runtime.exec_sync(request).await.expect("ExecSync").into_inner().stdout, b"x\n");
            };
            let streamed = async |client: &mut Client, n: usize| {
                let url = exec_url(client, &id, &["cat"], true).await;
                let mut ws = Ws::connect(&url, "v5.channel.k8s.io").await;
                ws.send(0, format!("{n}").as_bytes()).await;
                // Every other one vanishes in the middle.
                if n.is_multiple_of(2) {
                    ws.until(&n.to_string()).await;
                    return;
                }
                ws.send(255, &[0]).await;
                let said = ws.finish().await;
                assert_eq!((said.text(), said.status()["status"].as_str()), (n.to_string(), Some("Success")));
            };
            // What stays for all is there after the first ones.
            for n in 0..4 {
                sync(client.clone(), id.clone()).await;
                streamed(&mut client, n).await;
            }
            let settled = |before: Option<[usize; 6]>| {
                wait_for("what was there before", LONG, || {
                    let ((a, b), (c, d)) = (holdings(daemon), holdings(monitor));
                    let now = [a, b, c, d, cgroups(), run_files()];
                    // Threads of the daemon's pool come and go.
                    let fits = |b: [usize; 6]| (0..6).all(|i| now[i] <= b[i] || i == 1 && now[i] <= b[i] + 4);
                    (pids_of("cat").is_empty() && before.is_none_or(fits)).then_some(now)
                })
            };
            let before = settled(None);
            let start = Instant::now();
            for _ in 0..250 {
                futures::future::join_all((0..4).map(|_| sync(client.clone(), id.clone()))).await;
            }
            let middle = start.elapsed();
            for n in 0..100 {
                streamed(&mut client, n).await;
            }
            for n in 0..50 {
                let args = ["exec", "-i", "--transport", "spdy", &id, "cat"];
                let out = fed(&crictl, &args, format!("{n}").into_bytes());
                assert_eq!(out.stdout, format!("{n}").into_bytes(), "{}", describe(&out));
            }
            let streams = start.elapsed() - middle;
            println!("\nfigure: 1000 ExecSync in {middle:?}, 100 execs by WebSocket and 50 by SPDY in {streams:?}");
            let after = settled(Some(before));
            println!("figure: fds, threads of the daemon; of the monitor; cgroups; files: {before:?} -> {after:?}");
        });
    });
}

#[test]
fn tls_and_a_limit_of_streams() {
    isolated("tls_and_a_limit_of_streams", || {
        let request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost";
        let mut openssl = Command::new("openssl");
        support::run(openssl.args(request.split(' ')).args(["-keyout", "/tmp/key.pem", "-out", "/tmp/cert.pem"]));
        let stream = "[server.stream]\naddress = \"::1\"\nmax_streams = 2\nidle_timeout = \"1s\"\n\
                      tls_cert_file = \"/tmp/cert.pem\"\ntls_key_file = \"/tmp/key.pem\"";
        let mut node = Node::start(Options { more_config: stream.into(), ..Options::default() });
        let crictl = node.crictl();
        let (_pod, id) = sleeper(&crictl);
        let big = noise(10 << 20);
        for transport in TRANSPORTS {
            let out = fed(&crictl, &["exec", "-i", "--transport", transport, &id, "cat"], big.clone());
            assert!(out.status.success() && out.stdout == big, "{transport}: {}", String::from_utf8_lossy(&out.stderr));
        }
        // Half of it is refused by name.
        node.stop_daemon();
        let path = node.dir.join("config.toml");
        let text = std::fs::read_to_string(&path).expect("config.toml");
        std::fs::write(&path, text.replace("tls_cert_file = \"/tmp/cert.pem\"", "")).expect("config.toml");
        let out =
            Command::new(support::daemon_program()).args(["serve", "--config"]).arg(&path).output().expect("serve");
        assert!(!out.status.success() && describe(&out).contains("tls_key_file"), "{}", describe(&out));

        // Two streams, of which one ends because nothing goes over it.
        let plain =
            text.replace("tls_cert_file = \"/tmp/cert.pem\"", "").replace("tls_key_file = \"/tmp/key.pem\"", "");
        std::fs::write(&path, plain).expect("config.toml");
        node.start_daemon();
        block_on(async {
            let mut client = Client::connect(&node.socket()).await;
            let talks = exec_url(&mut client, &id, &["sh", "-c", "while :; do echo x; sleep 0.1; done"], false).await;
            assert!(talks.starts_with("http://[::1]:"), "{talks}");
            let mut talks = Ws::connect(&talks, "v5.channel.k8s.io").await;
            let silent = exec_url(&mut client, &id, &["sleep", "4321"], false).await;
            let mut silent = Ws::connect(&silent, "v5.channel.k8s.io").await;
            let third = exec_url(&mut client, &id, &["true"], false).await;
            assert_eq!(Ws::try_connect(&third, "v5.channel.k8s.io").await.err(), Some(503));
            let said = silent.finish().await.status();
            assert!(said["message"].as_str().is_some_and(|m| m.contains("nothing went over it")), "{said}");
            wait_gone("sleep 4321");
            talks.until("x\nx\n").await;
            // The same URL, which was to be tried again; the other stream counts until it is closed on both sides.
            let begun = Instant::now();
            let mut third = loop {
                match Ws::try_connect(&third, "v5.channel.k8s.io").await {
                    Ok(third) => break third,
                    Err(code) => assert!(code == 503 && begun.elapsed() < LONG, "{code}"),
                }
                tokio::time::sleep(Duration::from_millis(200)).await; // as the answer tells, and sooner
            };
            let said = third.finish().await;
            assert_eq!(said.status()["status"], "Success");
        });
    });
}
