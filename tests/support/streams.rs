//! What the tests of the streaming server share: a pod with a sleeping container, programs fed with input, processes
//! looked for by their command lines.

use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
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

/// crictl on a terminal of its own, which is `width` by `height`.
pub struct OnTerminal {
    child: Running,
    master: std::fs::File,
}

impl OnTerminal {
    /// Starts it.
    pub fn start(command: &Command, width: u16, height: u16) -> Self {
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

    /// Gives the terminal another size.
    pub fn resize(&self, width: u16, height: u16) {
        Self::resize_of(&self.master, width, height);
    }

    /// Types.
    pub fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("typed");
    }

    /// Reads until the screen has shown `text`.
    pub fn until(&mut self, text: &str) -> String {
        let mut seen = String::new();
        let mut buffer = [0; 4096];
        while !seen.contains(text) {
            let n = self.master.read(&mut buffer).unwrap_or_else(|e| panic!("{e} before {text:?}: {seen:?}"));
            seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
        seen
    }

    /// Its end.
    pub fn status(&mut self) -> std::process::ExitStatus {
        wait_for("crictl's end", LONG, || self.child.0.try_wait().expect("its status"))
    }
}
