//! What the tests of the streaming server share: a pod with a sleeping container, programs fed with input, processes
//! looked for by their command lines.

use std::io::{Read, Write};
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use k8s_cri::v1::ExecRequest;
use serde_json::Value;

use super::client::Client;
use super::crictl::{BUSYBOX, Crictl, container_config, read_log, stream_lines};
use super::node::Node;
use super::wait_for;

/// What crictl calls its transports.
pub const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];
/// Nothing that is waited for takes longer.
pub const LONG: Duration = Duration::from_secs(30);

/// A pod "p" with a container that sleeps; their ids.
pub fn sleeper(crictl: &Crictl) -> (String, String) {
    crictl.run(&["pull", BUSYBOX]);
    let pod = crictl.run_pod("p");
    let id = crictl.create(&pod, "p", "c", BUSYBOX, "exec sleep 100000");
    crictl.run(&["start", &id]);
    (pod, id)
}

/// Runs crictl with bytes on stdin, which then ends.
pub fn fed(crictl: &Crictl, args: &[&str], input: Vec<u8>) -> Output {
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
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Processes with that command line.
pub fn pids_of(command_line: &str) -> Vec<i32> {
    let pids =
        std::fs::read_dir("/proc").expect("/proc").flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    let has = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).replace('\0', " ").trim() == command_line
    };
    pids.filter(has).collect()
}

/// Waits until there is no process with that command line.
pub fn wait_gone(command_line: &str) {
    wait_for(&format!("the end of {command_line}"), LONG, || pids_of(command_line).is_empty().then_some(()));
}

/// Waits for a process with that command line; its pid.
pub fn wait_there(command_line: &str) -> i32 {
    wait_for(&format!("{command_line} to run"), LONG, || pids_of(command_line).first().copied())
}

/// Random bytes.
pub fn noise(bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut data)).expect("random bytes");
    data
}

/// A started container of pod "p" whose configuration is changed.
pub fn create_with(crictl: &Crictl, pod: &str, name: &str, script: &str, change: &Value) -> String {
    let mut config = container_config(name, BUSYBOX, script);
    for (key, value) in change.as_object().expect("an object") {
        config[key] = value.clone();
    }
    let file = crictl.file(&format!("container-{name}"), &config);
    let id = crictl.run(&["create", "--no-pull", pod, &file, &crictl.pod_file("p")]);
    crictl.run(&["start", &id]);
    id
}

/// The URL of an exec.
pub async fn exec_url(client: &mut Client, id: &str, cmd: &[&str], stdin: bool) -> String {
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

/// Lines of a container's log, of one stream.
pub fn log_lines(node: &Node, container: &str, stream: &str) -> Vec<String> {
    let path = node.pod_logs("p").join(container).join("0.log");
    stream_lines(&read_log(&path), stream)
}
