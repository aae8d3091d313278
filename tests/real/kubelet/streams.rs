//! exec, attach, port-forward, cp, run and debug.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;

use super::ctx::{BUSYBOX, Ctx, LONG, NGINX, container, pod, pod_with, shell, with};
use super::harness::Scenario;
use crate::support::{describe, wait_for};

pub const SCENARIOS: &[Scenario] = &[
    ("exec", exec),
    ("attach_and_run", attach),
    ("port_forward", port_forward),
    ("cp", cp),
    ("debug_shares_the_process_namespace", debug),
];

fn exec(ctx: &Ctx) {
    ctx.apply(&[pod("p", "sleep 1000")]);
    ctx.ready("p");
    assert_eq!(ctx.exec("p", "echo out; echo err >&2"), "out");
    let out = ctx.output(&["exec", "p", "--", "sh", "-c", "echo out; echo err >&2; exit 23"]);
    assert_eq!(out.status.code(), Some(23), "{}", describe(&out));
    assert_eq!(String::from_utf8_lossy(&out.stdout), "out\n");
    assert!(String::from_utf8_lossy(&out.stderr).starts_with("err\n"), "{}", describe(&out));
    // stdin to its end, a million bytes, back again
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|i| b'a' + (i % 23) as u8).collect();
    let echoed = ctx.kubectl_with(&["exec", "-i", "p", "--", "cat"], &bytes);
    assert!(echoed.as_bytes() == bytes.as_slice(), "{} of {} bytes", echoed.len(), bytes.len());
    let missing = ctx.output(&["exec", "p", "--", "/no/such/program"]);
    assert!(!missing.status.success(), "{}", describe(&missing));
    // A terminal at both ends: script(1) gives kubectl one.
    // Its size comes on a stream of its own, at or soon after the start, with every runtime.
    let script = "tty; n=0; until stty size 2> /dev/null || [ $n = 100 ]; do n=$((n + 1)); sleep 0.1; done; exit 5";
    let kubectl = ctx.command(&["exec", "-it", "p", "--", "sh", "-c", script]);
    let words: Vec<String> = std::iter::once(kubectl.get_program())
        .chain(kubectl.get_args())
        .map(|w| format!("'{}'", w.to_string_lossy()))
        .collect();
    let out = std::process::Command::new("script")
        .args(["-q", "-e", "-c", &format!("stty rows 33 cols 77; {}", words.join(" ")), "/dev/null"])
        .stdin(Stdio::null())
        .output()
        .expect("script");
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(said.contains("/dev/pts/") && said.contains("33 77"), "{}", describe(&out));
    assert_eq!(out.status.code(), Some(5), "{}", describe(&out));
}

fn attach(ctx: &Ctx) {
    let cat = with(shell("c", "while read l; do echo got $l; [ $l = end ] && exit 6; done"), json!({"stdin": true}));
    ctx.apply(&[pod_with("p", json!({"restartPolicy": "Never", "containers": [cat]}))]);
    ctx.ready("p");
    let said = ctx.kubectl_with(&["attach", "-i", "p"], b"one\ntwo\nend\n");
    assert!(said.contains("got one\ngot two\ngot end\n"), "{said}");
    let p = ctx.phase("p", "Failed");
    assert_eq!(container(&p, "c")["state"]["terminated"]["exitCode"], 6);
    // A pod for one command, its input from here, removed at its end.
    let said = ctx.kubectl_with(
        &[
            "run",
            "once",
            "--image",
            BUSYBOX,
            "--restart=Never",
            "-i",
            "--rm",
            "--quiet",
            "--",
            "sh",
            "-c",
            "sleep 1; wc -c",
        ],
        &[b'x'; 5000],
    );
    assert!(said.contains("5000"), "{said}");
    ctx.gone("once");
}

fn port_forward(ctx: &Ctx) {
    ctx.apply(&[pod_with("web", json!({"containers": [{"name": "c", "image": NGINX}]}))]);
    ctx.ready("web");
    let mut child = ctx
        .command(&["port-forward", "pod/web", ":80"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kubectl");
    let mut out = child.stdout.take().expect("stdout");
    let mut line = Vec::new();
    let mut byte = [0];
    while out.read(&mut byte).expect("its first line") == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    let line = String::from_utf8_lossy(&line).into_owned();
    let port: u16 =
        line.split("127.0.0.1:").nth(1).and_then(|r| r.split(' ').next()).and_then(|p| p.parse().ok()).expect(&line);
    for _ in 0..3 {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("the forwarded port");
        socket.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        socket.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("a request");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("an answer");
        assert!(answer.contains("Welcome to nginx"), "{answer}");
    }
    child.kill().expect("its end");
    child.wait().expect("its end");
}

fn cp(ctx: &Ctx) {
    ctx.apply(&[pod("p", "sleep 1000")]);
    ctx.ready("p");
    let dir = format!("/tmp/cp-{}", ctx.ns);
    std::fs::create_dir_all(format!("{dir}/tree/sub")).expect("a folder");
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i * 7 % 251) as u8).collect();
    std::fs::write(format!("{dir}/tree/sub/file"), &bytes).expect("a file");
    ctx.kubectl(&["cp", &format!("{dir}/tree"), "p:/tmp/tree"]);
    ctx.kubectl(&["cp", "p:/tmp/tree/sub/file", &format!("{dir}/back")]);
    assert!(std::fs::read(format!("{dir}/back")).expect("what came back") == bytes, "another file came back");
}

fn debug(ctx: &Ctx) {
    ctx.apply(&[pod_with("p", json!({"containers": [shell("c", "echo secret > /of-c; sleep 12345")]}))]);
    ctx.ready("p");
    let script = "ps; cat /proc/1/root/of-c; echo seen";
    ctx.kubectl(&[
        "debug",
        "p",
        "--image",
        BUSYBOX,
        "--target=c",
        "--container=look",
        "--profile=general",
        "--",
        "sh",
        "-c",
        script,
    ]);
    ctx.wait_pod("p", "the ephemeral container's end", |p| container(p, "look")["state"]["terminated"].is_object());
    let said = ctx.wait("its log", LONG, || Some(ctx.logs(&["p", "-c", "look"])).filter(|l| l.contains("seen")));
    assert!(said.contains("sleep 12345"), "does not see the processes of its target:\n{said}");
    assert!(said.contains("secret"), "does not see the target's files:\n{said}");
    let p = ctx.pod("p");
    assert_eq!(container(&p, "look")["state"]["terminated"]["exitCode"], 0, "{p}");
    assert_eq!(container(&p, "c")["restartCount"], 0, "{p}");
    let _ = wait_for("the target to go on", Duration::from_secs(5), || Some(ctx.exec("p", "echo here")));
}
