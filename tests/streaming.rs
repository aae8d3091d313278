//! Exec, Attach and PortForward with the real crictl over both transports, and with clients that crictl is not: legacy
//! protocols, clients that vanish or do not read, tokens used twice.
//!
//! Run by `cargo test --test streaming`, as root. A crash leaves nothing: see `support`.

// Tests start programs as they like.
#![allow(clippy::disallowed_methods, clippy::print_stdout)]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use k8s_cri::v1::{AttachRequest, ExecRequest, ExecSyncRequest, PortForwardRequest};
use serde_json::{Value, json};
use support::client::{Client, block_on};
use support::crictl::{BUSYBOX, Crictl, container_config, pod_config, read_log, stream_lines};
use support::node::{Node, Options};
use support::ws::Ws;
use support::{describe, isolated, wait_for};

const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];
const LONG: Duration = Duration::from_secs(30);

fn sleeper(crictl: &Crictl) -> (String, String) {
    crictl.run(&["pull", BUSYBOX]);
    let pod = crictl.run_pod("p");
    let id = crictl.create(&pod, "p", "c", BUSYBOX, "exec sleep 100000");
    crictl.run(&["start", &id]);
    (pod, id)
}

fn log_lines(node: &Node, container: &str, stream: &str) -> Vec<String> {
    let path = node.pod_logs("p").join(container).join("0.log");
    stream_lines(&read_log(&path), stream)
}

/// Runs crictl with bytes on stdin, which then ends.
fn fed(crictl: &Crictl, args: &[&str], input: Vec<u8>) -> Output {
    let mut command = crictl.command(args);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("crictl");
    let mut stdin = child.stdin.take().expect("stdin");
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let out = child.wait_with_output().expect("crictl's output");
    writer.join().expect("the writer");
    out
}

/// Ends a program when the test is done with it, whatever came of it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pids_of(command_line: &str) -> Vec<i32> {
    let pids =
        std::fs::read_dir("/proc").expect("/proc").flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    let has = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).replace('\0', " ").trim() == command_line
    };
    pids.filter(has).collect()
}

fn wait_gone(command_line: &str) {
    wait_for(&format!("the end of {command_line}"), LONG, || pids_of(command_line).is_empty().then_some(()));
}

fn wait_there(command_line: &str) -> i32 {
    wait_for(&format!("{command_line} to run"), LONG, || pids_of(command_line).first().copied())
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut data)).expect("random bytes");
    data
}

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

/// crictl on a terminal of its own, which is `width` by `height`.
struct OnTerminal {
    child: Running,
    master: std::fs::File,
}

impl OnTerminal {
    fn start(command: &Command, width: u16, height: u16) -> Self {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("openpt");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("unlockpt");
        let name = ptsname(&master, Vec::new()).expect("ptsname");
        let slave =
            || std::fs::File::options().read(true).write(true).open(name.to_str().expect("UTF-8")).expect("pts");
        Self::resize_of(&master, width, height);
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(slave())
            .stdout(slave())
            .stderr(slave())
            .spawn()
            .expect("setsid");
        Self { child: Running(child), master: master.into() }
    }

    fn resize_of(master: impl std::os::fd::AsFd, width: u16, height: u16) {
        let size = rustix::termios::Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(master, size).expect("a size");
    }

    fn resize(&self, width: u16, height: u16) {
        Self::resize_of(&self.master, width, height);
    }

    fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("typed");
    }

    /// Reads until the screen has shown `text`.
    fn until(&mut self, text: &str) -> String {
        let mut seen = String::new();
        let mut buffer = [0; 4096];
        while !seen.contains(text) {
            let n = self.master.read(&mut buffer).unwrap_or_else(|e| panic!("{e} before {text:?}: {seen:?}"));
            seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
        seen
    }

    fn status(&mut self) -> std::process::ExitStatus {
        wait_for("crictl's end", LONG, || self.child.0.try_wait().expect("its status"))
    }
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

fn create_with(crictl: &Crictl, pod: &str, name: &str, script: &str, change: &Value) -> String {
    let mut config = container_config(name, BUSYBOX, script);
    for (key, value) in change.as_object().expect("an object") {
        config[key] = value.clone();
    }
    let file = crictl.file(&format!("container-{name}"), &config);
    let id = crictl.run(&["create", "--no-pull", pod, &file, &crictl.pod_file("p")]);
    crictl.run(&["start", &id]);
    id
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

async fn exec_url(client: &mut Client, id: &str, cmd: &[&str], stdin: bool) -> String {
    let request = ExecRequest {
        container_id: id.to_owned(),
        cmd: cmd.iter().map(|c| (*c).to_owned()).collect(),
        stdin,
        stdout: true,
        stderr: true,
        tty: false,
    };
    client.runtime.exec(request).await.expect("Exec").into_inner().url
}

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
            let mut last = 0;
            wait_for("the client to be stopped by a full connection", LONG, || {
                let now = written(pid);
                let stopped = now > 0 && now == last;
                last = now;
                std::thread::sleep(Duration::from_millis(200)); // between two looks at a counter
                stopped.then_some(())
            });
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
            let mut last = 0;
            wait_for("`yes` to be stopped", LONG, || {
                let now = written(pid);
                let stopped = now > 0 && now == last;
                last = now;
                std::thread::sleep(Duration::from_millis(200)); // between two looks at a counter
                stopped.then_some(())
            });
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

/// Descriptors and threads of a process.
fn holdings(pid: i32) -> (usize, usize) {
    let count = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, Iterator::count);
    (count("fd"), count("task"))
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
        let monitor = monitor.and_then(|p| i32::try_from(p).ok()).unwrap_or_else(|| {
            let named = |pid: &i32| {
                std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == "lxcri-monitor")
            };
            let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
            let mut pids = pids.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(named);
            pids.next().expect("the monitor")
        });
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
            println!("\nfigure: 1000 ExecSync in {middle:?}, 100 streamed execs in {:?}", start.elapsed() - middle);
            let after = settled(Some(before));
            println!("figure: fds, threads of the daemon; of the monitor; cgroups; files: {before:?} -> {after:?}");
        });
    });
}

#[test]
fn our_own_command_line() {
    isolated("our_own_command_line", || {
        let node = Node::start(Options::default());
        let (_pod, id) = sleeper(&node.crictl());
        let config = node.dir.join("config.toml");
        let verb = |args: &[&str]| {
            let mut command = Command::new(support::daemon_program());
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
            assert_eq!(silent.finish().await.error, b"");
            wait_gone("sleep 4321");
            talks.until("x\nx\n").await;
            let third = exec_url(&mut client, &id, &["true"], false).await;
            let said = Ws::connect(&third, "v5.channel.k8s.io").await.finish().await;
            assert_eq!(said.status()["status"], "Success");
        });
    });
}
