//! The real crictl, pod and container configurations as it reads them, and CRI log files.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::node::Node;
use super::{describe, given};

/// The busybox stand-in by its public name.
pub const BUSYBOX: &str = "registry.k8s.io/e2e-test-images/busybox:1.29-2";
/// Seven layers, over 100 MB packed.
pub const BIG: &str = "registry.k8s.io/lxcri/big:1";

/// crictl, told where the node's daemon is.
pub struct Crictl {
    program: PathBuf,
    socket: PathBuf,
    dir: PathBuf,
}

impl Node {
    /// crictl for this node.
    pub fn crictl(&self) -> Crictl {
        Crictl { program: given("LXCRI_CRI_TOOLS").join("crictl"), socket: self.socket(), dir: self.dir.clone() }
    }
}

impl Crictl {
    /// Runs crictl and gives all it did.
    pub fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap_or_else(|e| panic!("{}: {e}", self.program.display()))
    }

    /// crictl with its configuration and nothing on stdin, not started.
    pub fn command(&self, args: &[&str]) -> Command {
        let endpoint = format!("unix://{}", self.socket.display());
        // A configuration file of our own: without one crictl complains about endpoints on stderr.
        let config = self.dir.join("crictl.yaml");
        if !config.exists() {
            let text = format!("runtime-endpoint: {endpoint}\nimage-endpoint: {endpoint}\ntimeout: 60\n");
            std::fs::write(&config, text).expect("crictl.yaml");
        }
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&config).args(args).stdin(Stdio::null());
        command
    }

    /// Whether it succeeded, and stdout and stderr.
    pub fn try_run(&self, args: &[&str]) -> (bool, String) {
        let out = self.output(args);
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        (out.status.success(), text)
    }

    /// Stdout of a call that must succeed, without the newline at its end.
    pub fn run(&self, args: &[&str]) -> String {
        let out = self.output(args);
        assert!(out.status.success(), "crictl {args:?}: {}", describe(&out));
        String::from_utf8(out.stdout).expect("UTF-8").trim_end_matches('\n').to_owned()
    }

    /// The JSON that a call with `-o json` prints. crictl wants options before the ids.
    pub fn json(&self, args: &[&str]) -> Value {
        let args = [&args[..1], &["-o", "json"], &args[1..]].concat();
        let text = self.run(&args);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("crictl {args:?}: {e}: {text}"))
    }

    /// Writes a configuration to a file for crictl to read.
    pub fn file(&self, name: &str, config: &Value) -> String {
        let path = self.dir.join(format!("{name}.json"));
        std::fs::write(&path, config.to_string()).expect("a configuration file");
        path.to_str().expect("UTF-8").to_owned()
    }

    /// Runs a pod of that name; gives its id.
    pub fn run_pod(&self, name: &str) -> String {
        self.run(&["runp", &self.pod_file(name)])
    }

    /// Writes the configuration of a pod; gives the file.
    pub fn pod_file(&self, name: &str) -> String {
        self.file(&format!("pod-{name}"), &pod_config(name, &self.dir.join("logs").join(name)))
    }

    /// Creates a container of a pod that runs a shell script; gives its id.
    pub fn create(&self, pod_id: &str, pod: &str, name: &str, image: &str, script: &str) -> String {
        let container = self.file(&format!("container-{pod}-{name}"), &container_config(name, image, script));
        self.run(&["create", "--no-pull", pod_id, &container, &self.pod_file(pod)])
    }

    /// `status` of `crictl inspect`.
    pub fn container_status(&self, id: &str) -> Value {
        self.json(&["inspect", id])["status"].take()
    }

    /// State ("CONTAINER_RUNNING", ...) of a container.
    pub fn container_state(&self, id: &str) -> String {
        self.container_status(id)["state"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits for a container's end; gives its status.
    pub fn wait_exit(&self, id: &str) -> Value {
        super::wait_for(&format!("the end of container {id}"), std::time::Duration::from_secs(60), || {
            let status = self.container_status(id);
            (status["state"] == "CONTAINER_EXITED").then_some(status)
        })
    }
}

/// A pod as crictl reads it.
pub fn pod_config(name: &str, logs: &Path) -> Value {
    json!({
        "metadata": {"name": name, "uid": format!("uid-{name}"), "namespace": "tests", "attempt": 1},
        "hostname": name,
        "log_directory": logs,
        "labels": {"app": "test", "pod": name},
        "annotations": {"note": "kept as it is"},
        "linux": {"cgroup_parent": "/tests", "security_context": {"namespace_options": {"pid": 1}}},
    })
}

/// A container that runs a shell script, as crictl reads it.
pub fn container_config(name: &str, image: &str, script: &str) -> Value {
    json!({
        "metadata": {"name": name, "attempt": 1},
        "image": {"image": image},
        "command": ["/bin/sh", "-c", script],
        "envs": [{"key": "GREETING", "value": "hello"}],
        "labels": {"app": "test", "container": name},
        "log_path": format!("{name}/0.log"),
        "linux": {"security_context": {"namespace_options": {"pid": 1}}},
    })
}

/// A line of a CRI log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// `stdout` or `stderr`.
    pub stream: String,
    /// The line ends here (F), or goes on in the next record (P).
    pub full: bool,
    /// Its content.
    pub content: String,
}

/// Reads a CRI log; panics on a line that is not one.
pub fn read_log(path: &Path) -> Vec<LogLine> {
    let text = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.is_empty() || text.ends_with('\n'), "{} ends in the middle of a line", path.display());
    let parse = |line: &str| {
        let mut parts = line.splitn(4, ' ');
        let (time, stream, tag) = (parts.next()?, parts.next()?, parts.next()?);
        let content = parts.next()?.to_owned();
        let good = time.len() >= 20
            && time.as_bytes()[10] == b'T'
            && time.contains('.')
            && matches!(stream, "stdout" | "stderr")
            && matches!(tag, "F" | "P");
        good.then(|| LogLine { stream: stream.to_owned(), full: tag == "F", content })
    };
    text.lines().map(|l| parse(l).unwrap_or_else(|| panic!("{}: not a CRI log line: {l:?}", path.display()))).collect()
}

/// Contents of one stream, records of one line joined.
pub fn stream_lines(log: &[LogLine], stream: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut unfinished = String::new();
    for record in log.iter().filter(|r| r.stream == stream) {
        unfinished.push_str(&record.content);
        if record.full {
            lines.push(std::mem::take(&mut unfinished));
        }
    }
    if !unfinished.is_empty() {
        lines.push(unfinished);
    }
    lines
}
