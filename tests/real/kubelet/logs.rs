//! `kubectl logs` in its forms, and rotation under load.

use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;

use super::ctx::{Ctx, LONG, PODTOOL, container, pod, pod_with, shell, with};
use super::harness::Scenario;

pub const SCENARIOS: &[Scenario] = &[("log_rotation_loses_no_line", rotation), ("logs_follow_previous_since", logs)];

/// What the kubelets' log rotation is set to in the clusters of these scenarios.
pub fn kubelet_config() -> serde_json::Value {
    json!({"containerLogMaxSize": "1Mi", "containerLogMaxFiles": 50, "containerLogMonitorInterval": "3s"})
}

fn logs(ctx: &Ctx) {
    // Ends twice, then stays: what came before the present one stays, too.
    let script = "echo run $(wc -l < /v/runs); echo >> /v/runs; [ $(wc -l < /v/runs) -gt 2 ] || exit 1; sleep 1000";
    let c = with(
        shell("c", &format!("touch /v/runs; {script}")),
        json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}),
    );
    let crash = pod_with("crash", json!({"containers": [c], "volumes": [{"name": "v", "emptyDir": {}}]}));
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
    ctx.wait_pod("crash", "restarted twice", |p| {
        container(p, "c")["restartCount"] == 2 && container(p, "c")["state"]["running"].is_object()
    });
    assert_eq!((ctx.logs(&["crash", "--previous"]), ctx.logs(&["crash"])), ("run 1\n".into(), "run 2\n".into()));
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
    // The kubelet may be packing one of them.
    let (files, text) = ctx.wait("files that stay while they are read", LONG, || whole_log(&folder));
    let mut lines = 0;
    let mut unfinished = String::new();
    for entry in text.lines() {
        let mut parts = entry.splitn(4, ' ').skip(2);
        let (tag, content) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        unfinished += content;
        if tag == "F" {
            assert_eq!(unfinished, format!("line {lines:08} {:085}", 0), "lost, doubled or out of order");
            lines += 1;
            unfinished.clear();
        }
    }
    assert_eq!(lines, LINES);
    assert!(files >= 3, "only {files} files: not rotated");
    println!("figure: {LINES} log lines in {files} rotated files, none lost");
    ctx.kubectl(&["delete", "pod", "p", "--wait=true"]);
    let status = crate::support::wait_for("the follower's end", Duration::from_secs(30), || {
        follow.try_wait().expect("its status")
    });
    let followed = follower.join().expect("the reader").expect("UTF-8");
    println!("figure: kubectl logs -f saw {} of them ({status})", followed.lines().count());
}

/// Number and joined text of a container's log files, oldest first; None: one of them went away meanwhile.
fn whole_log(folder: &Path) -> Option<(usize, String)> {
    let mut files: Vec<_> = std::fs::read_dir(folder).ok()?.flatten().map(|e| e.path()).collect();
    // 0.log.<time>[.gz], then 0.log
    files.sort_by_key(|f| (f.ends_with("0.log"), f.clone()));
    let mut text = String::new();
    for path in &files {
        if path.extension().is_some_and(|e| e == "tmp") {
            return None;
        }
        let mut file = std::fs::File::open(path).ok()?;
        if path.extension().is_some_and(|e| e == "gz") {
            flate2::read::MultiGzDecoder::new(file).read_to_string(&mut text).ok()?;
        } else {
            file.read_to_string(&mut text).ok()?;
        }
    }
    Some((files.len(), text))
}
