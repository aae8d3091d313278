//! Graceful shutdown of the node: logind says that it goes down, the kubelet ends the pods in their order and within their
//! time, and only then lets go. logind is `gomod/logind` on a bus of its own; the kubelet's side is what `deploy/` sets.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::{Cluster, condition};
use super::ctx::{Ctx, LONG, container, pod, pod_with, shell, with};
use super::harness::{Runner, keep_up};
use super::process::Process;
use crate::support::{given, wait_for};

const DIR: &str = "/tmp/bus";
const ADDRESS: &str = "unix:path=/tmp/bus/socket";

pub fn group(runner: &Runner) {
    let (_bus, _logind) = start_bus();
    let cluster = Arc::new(Cluster::lone(|plan, _| plan.bus = Some(ADDRESS.into())));
    runner.one(&cluster, "pods_end_before_the_node_does", ends);
    if runner.failed() {
        cluster.keep_logs();
        super::harness::keep(Path::new(DIR), "bus");
    }
    keep_up();
}

fn start_bus() -> (Process, Process) {
    let dir = Path::new(DIR);
    std::fs::create_dir_all(dir).expect("the bus's folder");
    let config = format!(
        r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>{ADDRESS}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>"#
    );
    std::fs::write(dir.join("bus.xml"), config).expect("the bus's configuration");
    let programs = given("LXCRI_DBUS");
    let mut command = Command::new(programs.join("dbus-daemon"));
    command.env("LD_LIBRARY_PATH", &programs).arg("--nofork").arg(format!("--config-file={DIR}/bus.xml"));
    let mut bus = Process::start("dbus", dir, &mut command);
    bus.wait_until("its socket", Duration::from_secs(20), || dir.join("socket").exists());
    let mut command = Command::new(given("LXCRI_KUBERNETES").join("logind"));
    let mut logind = Process::start("logind", dir, command.env("DBUS_SYSTEM_BUS_ADDRESS", ADDRESS));
    logind.wait_until("its name", Duration::from_secs(20), || said("here"));
    (bus, logind)
}

fn said(word: &str) -> bool {
    std::fs::read_to_string(format!("{DIR}/logind.log")).is_ok_and(|t| t.lines().any(|l| l.starts_with(word)))
}

/// To logind, whose process is found by its program.
fn tell(signal: rustix::process::Signal) {
    let found = std::fs::read_dir("/proc").expect("/proc").flatten().find_map(|e| {
        let line = std::fs::read_to_string(e.path().join("cmdline")).ok()?;
        line.split('\0').next()?.ends_with("/logind").then(|| e.file_name().to_string_lossy().parse().ok())?
    });
    let pid = found.and_then(rustix::process::Pid::from_raw).expect("logind");
    rustix::process::kill_process(pid, signal).expect("a signal to logind");
}

fn ends(ctx: &Ctx) {
    wait_for("the kubelet's inhibitor", Duration::from_secs(30), || said("inhibited by kubelet").then_some(()));
    let folder = format!("/tmp/{}", ctx.ns);
    let volume = json!([{"name": "v", "hostPath": {"path": folder, "type": "DirectoryOrCreate"}}]);
    let polite = |name: &str, more: Value| {
        let script = format!(
            "trap 'echo {name} ends >> /v/log; sleep 2; echo {name} ended >> /v/log; exit 0' TERM; touch /v/{name}; while :; do sleep 0.1; done"
        );
        let c = with(shell("c", &script), json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}));
        let spec = json!({"terminationGracePeriodSeconds": 30, "containers": [c], "volumes": volume});
        pod_with(name, with(spec, more))
    };
    ctx.apply(&[polite("plain", json!({})), polite("critical", json!({"priorityClassName": "system-node-critical"}))]);
    for name in ["plain", "critical"] {
        ctx.ready(name);
        ctx.wait("the trap", LONG, || std::fs::exists(format!("{folder}/{name}")).ok()?.then_some(()));
    }
    let start = Instant::now();
    tell(rustix::process::Signal::USR1);
    wait_for("the kubelet to let go", Duration::from_secs(80), || said("released by kubelet").then_some(()));
    let took = start.elapsed();
    assert!(took < Duration::from_secs(40), "took {took:?}, as if nobody had noticed that they have ended");
    println!("figure: the pods ended and the kubelet let the node go after {:.1} s", took.as_secs_f64());
    let log = std::fs::read_to_string(format!("{folder}/log")).expect("the log");
    assert_eq!(log, "plain ends\nplain ended\ncritical ends\ncritical ended\n");
    for name in ["plain", "critical"] {
        // Ended by itself when it was asked to, which is a success.
        let p = ctx.phase(name, "Succeeded");
        assert_eq!(container(&p, "c")["state"]["terminated"]["exitCode"], 0, "{p}");
    }
    let node = || ctx.cluster.get("/api/v1/nodes/node-1");
    ctx.wait("the node to say so", LONG, || (condition(&node()?, "Ready")? == "False").then_some(()));
    // Thought better of.
    tell(rustix::process::Signal::USR2);
    ctx.cluster.wait_node_ready("node-1");
    ctx.apply(&[pod("after", "sleep 1000")]);
    ctx.ready("after");
}
