//! `kubectl logs` in its forms, and rotation under load.

use std::io::Read;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;

use super::ctx::{Ctx, LONG, PODTOOL, container, pod, pod_with, shell};
use super::harness::Scenario;

pub const SCENARIOS: &[Scenario] = &[("log_rotation_loses_no_line", rotation), ("logs_follow_previous_since", logs)];

/// What the kubelets' log rotation is set to in the clusters of these scenarios.
pub fn kubelet_config() -> serde_json::Value {
    json!({"containerLogMaxSize": "1Mi", "containerLogMaxFiles": 50, "containerLogMonitorInterval": "3s"})
}

fn logs(ctx: &Ctx) {
    let crash = pod_with(
        "crash",
        json!({"containers": [shell("c", "echo run $(cat /proc/sys/kernel/random/uuid); sleep 1; exit 1")]}),
    );
    let slow = "i=0; while [ $i -lt 12 ]; do echo line $i; echo error $i >&2; i=$((i+1)); sleep 0.5; done";
    ctx.apply(&[crash, pod("slow", slow)]);
    ctx.wait_pod("slow", "started", |p| {
        container(p, "c")["state"]["waiting"].is_null() && p["status"]["phase"] != "Pending"
    });
    // Followed to its end, which ends kubectl.
    let followed = ctx.logs(&["slow", "-f"]);
    let lines: Vec<&str> = followed.lines().filter(|l| l.starts_with("line")).collect();
    assert_eq!(lines, (0..12).map(|i| format!("line {i}")).collect::<Vec<_>>());
    assert_eq!(followed.lines().filter(|l| l.starts_with("error")).count(), 12, "{followed}");
    assert_eq!(ctx.logs(&["slow", "--tail=1"]).lines().count(), 1);
    let stamped = ctx.logs(&["slow", "--timestamps"]);
    let line_8 = stamped.lines().find(|l| l.ends_with("line 8")).expect("line 8");
    let since = format!("--since-time={}", line_8.split(' ').next().expect("its time"));
    let later: Vec<String> =
        ctx.logs(&["slow", &since]).lines().filter(|l| l.starts_with("line")).map(str::to_owned).collect();
    // The time of the line itself is within the second that the API gives.
    assert!(later.contains(&"line 9".into()) && !later.contains(&"line 2".into()), "{later:?}");
    assert_eq!(ctx.logs(&["slow", "--since=1h"]).lines().count(), 24);
    ctx.wait_pod("crash", "restarted twice", |p| container(p, "c")["restartCount"].as_i64() >= Some(2));
    let previous = ctx.logs(&["crash", "--previous"]);
    assert!(previous.starts_with("run ") && previous.lines().count() == 1, "{previous}");
}

/// Tens of thousands of lines while the kubelet rotates every three seconds: each is in exactly one of the files.
fn rotation(ctx: &Ctx) {
    const LINES: usize = 60_000;
    let tool = json!({"name": "c", "image": PODTOOL, "args": ["lines", LINES.to_string(), "4000"]});
    ctx.apply(&[pod_with("p", json!({"containers": [tool]}))]);
    let uid = ctx.ready("p")["metadata"]["uid"].as_str().expect("a uid").to_owned();
    let mut follow = ctx.command(&["logs", "-f", "p"]).stdout(Stdio::piped()).spawn().expect("kubectl");
    let mut out = follow.stdout.take().expect("stdout");
    let follower = std::thread::spawn(move || {
        let mut text = String::new();
        out.read_to_string(&mut text).map(|_| text)
    });
    let node = ctx.cluster.nodes()[0].dir.clone();
    let folder = node.join(format!("logs/pods/{}_p_{uid}/c", ctx.ns));
    let last = format!("line {:08}", LINES - 1);
    ctx.wait("the last line", LONG, || {
        std::fs::read_to_string(folder.join("0.log")).ok()?.contains(&last).then_some(())
    });
    let mut seen = vec![0_u8; LINES];
    let mut files = 0;
    for entry in std::fs::read_dir(&folder).expect("the log's folder").flatten() {
        let mut text = String::new();
        let mut file = std::fs::File::open(entry.path()).expect("a log file");
        if entry.path().extension().is_some_and(|e| e == "gz") {
            flate2::read::MultiGzDecoder::new(file).read_to_string(&mut text).expect("gzip");
        } else {
            file.read_to_string(&mut text).expect("text");
        }
        files += 1;
        for line in text.lines() {
            let number =
                line.split(" F line ").nth(1).and_then(|l| l.split(' ').next()).and_then(|n| n.parse::<usize>().ok());
            seen[number.unwrap_or_else(|| panic!("{:?}: a broken line: {line}", entry.path()))] += 1;
        }
    }
    let wrong: Vec<_> = seen.iter().enumerate().filter(|(_, n)| **n != 1).take(20).collect();
    assert!(wrong.is_empty(), "lines lost or doubled (number, times): {wrong:?}");
    assert!(files >= 3, "only {files} files: not rotated");
    println!("figure: {LINES} log lines in {files} rotated files, none lost");
    ctx.kubectl(&["delete", "pod", "p", "--wait=true"]);
    let status = crate::support::wait_for("the follower's end", Duration::from_secs(30), || {
        follow.try_wait().expect("its status")
    });
    let followed = follower.join().expect("the reader").expect("UTF-8");
    println!("figure: kubectl logs -f saw {} of them ({status})", followed.lines().count());
}
