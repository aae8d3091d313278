//! Starts host programs: the one place where the daemon spawns a process that it waits for.
//!
//! Used by every integration that drives a tool (CNI plugins, crun, zfs). The program is an absolute path, its
//! environment is what the caller gives and nothing else, it inherits no descriptor but its three pipes and those that
//! the caller names, it leads a
//! process group of its own and that group is killed when its deadline passes or the caller goes away. What it leaves
//! running after a regular end (a daemonised child) is left alone, and can hold the pipes for [`DRAIN`] at most.
//!
//! Fails narrowly with [`SpawnError`]; every variant names the command with listed secrets blotted out. A crash of
//! the daemon leaves the program running to its own end: killing it would only leave half-done work.
#![allow(unsafe_code)] // pre_exec: descriptors and the OOM score must be set between fork and exec

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tracing::Instrument;

use super::trace;

/// How long output is read after the program's end when something else still holds its pipes.
pub const DRAIN: Duration = Duration::from_secs(2);
/// How long a killed program is waited for before it is left to the background reaper (state D).
const REAP: Duration = Duration::from_secs(2);
/// Longest command line in an error text, in bytes.
const COMMAND_MAX: usize = 1024;

/// A program to run. Build with [`Spawn::new`], change what differs, then [`Spawn::run`] or [`Spawn::run_ok`].
#[derive(Clone)]
pub struct Spawn {
    program: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    cwd: String,
    stdin: Vec<u8>,
    deadline: Duration,
    stdout_cap: usize,
    stderr_cap: usize,
    oom_score_adj: i32,
    secrets: Vec<String>,
    stdin_from: Option<Arc<OwnedFd>>,
    stdout_to: Option<Arc<OwnedFd>>,
    passed: Vec<Arc<OwnedFd>>,
}

/// What a program left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// All of its standard output (never more than the cap).
    pub stdout: Vec<u8>,
    /// The last bytes of its standard error, at most the cap; not valid UTF-8 is replaced.
    pub stderr: String,
}

/// Why a program gave no [`Output`].
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The program is not an absolute path, or an argument holds a NUL byte.
    #[error("{command}: a program is started by its absolute path and without NUL bytes")]
    Invalid {
        /// Program and arguments.
        command: String,
    },
    /// There is no such program.
    #[error("{command}: no such program")]
    Missing {
        /// Program and arguments.
        command: String,
    },
    /// fork or exec failed.
    #[error("{command}: can't start")]
    Start {
        /// Program and arguments.
        command: String,
        /// From fork, exec or chdir.
        source: io::Error,
    },
    /// It was not done in time and was killed with its process group.
    #[error("{command}: not done after {} ms, killed{}", after.as_millis(), tail(stderr))]
    Deadline {
        /// Program and arguments.
        command: String,
        /// The deadline.
        after: Duration,
        /// Tail of its standard error.
        stderr: String,
    },
    /// It wrote more than the cap to its standard output and was killed.
    #[error("{command}: wrote more than {cap} bytes to its standard output, killed")]
    TooMuch {
        /// Program and arguments.
        command: String,
        /// Cap in bytes.
        cap: usize,
    },
    /// Its pipes or its status could not be read.
    #[error("{command}: can't read what it writes")]
    Io {
        /// Program and arguments.
        command: String,
        /// From read or wait.
        source: io::Error,
    },
    /// It ended with a status that is not 0 ([`Spawn::run_ok`] only).
    #[error("{command}: {}{}", describe(*status), tail(stderr))]
    Failed {
        /// Program and arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// Tail of its standard error.
        stderr: String,
    },
}

impl Output {
    /// Whether it ended with status 0.
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// Exit code; None when a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }
}

impl Spawn {
    /// A program (absolute path) with its arguments: empty environment, folder `/`, empty stdin, 30 s, 1 MiB of
    /// stdout, the last 8 KiB of stderr.
    pub fn new<A: Into<String>>(program: impl Into<String>, args: impl IntoIterator<Item = A>) -> Self {
        Self {
            program: program.into(),
            args: args.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            cwd: "/".into(),
            stdin: Vec::new(),
            deadline: Duration::from_secs(30),
            stdout_cap: 1 << 20,
            stderr_cap: 8 << 10,
            oom_score_adj: 0,
            secrets: Vec::new(),
            stdin_from: None,
            stdout_to: None,
            passed: Vec::new(),
        }
    }

    /// Adds a variable to the (else empty) environment.
    pub fn env(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    /// Working directory.
    pub fn cwd(mut self, folder: impl Into<String>) -> Self {
        self.cwd = folder.into();
        self
    }

    /// What it reads; then end of file.
    pub fn stdin(mut self, data: impl Into<Vec<u8>>) -> Self {
        self.stdin = data.into();
        self
    }

    /// A descriptor that it reads instead: a pipe or file.
    pub fn stdin_from(mut self, input: OwnedFd) -> Self {
        self.stdin_from = Some(Arc::new(input));
        self
    }

    /// A descriptor that it writes its standard output to; [`Output::stdout`] stays empty.
    pub fn stdout_to(mut self, output: OwnedFd) -> Self {
        self.stdout_to = Some(Arc::new(output));
        self
    }

    /// A descriptor that it gets beside its streams, under the number that it has here: tell it by an argument.
    pub fn pass(mut self, fd: OwnedFd) -> Self {
        self.passed.push(Arc::new(fd));
        self
    }

    /// Time from start to the end of its output.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Most bytes of standard output; more is [`SpawnError::TooMuch`].
    pub fn stdout_cap(mut self, bytes: usize) -> Self {
        self.stdout_cap = bytes;
        self
    }

    /// How many of the last bytes of standard error are kept.
    pub fn stderr_cap(mut self, bytes: usize) -> Self {
        self.stderr_cap = bytes;
        self
    }

    /// OOM score adjustment of the program (0 unless set); kept as inherited where the kernel does not allow it.
    pub fn oom_score_adj(mut self, value: i32) -> Self {
        self.oom_score_adj = value;
        self
    }

    /// Text that must not show up in errors or [`Output::stderr`] (passwords, tokens).
    pub fn secret(mut self, text: impl Into<String>) -> Self {
        let text = text.into();
        if !text.is_empty() {
            self.secrets.push(text);
        }
        self
    }

    /// Runs it to its end, whatever its status.
    pub async fn run(&self) -> Result<Output, SpawnError> {
        let name = Path::new(&self.program).file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
        let step = trace::step(&name);
        let done = self.to_its_end().instrument(step.clone()).await;
        if !done.as_ref().is_ok_and(Output::success) {
            trace::failed(&step);
        }
        done
    }

    async fn to_its_end(&self) -> Result<Output, SpawnError> {
        let nul = self.args.iter().chain(self.env.iter().flat_map(|(k, v)| [k, v])).any(|s| s.contains('\0'));
        if !Path::new(&self.program).is_absolute() || self.program.contains('\0') || nul {
            return Err(SpawnError::Invalid { command: self.command() });
        }
        let mut child = Guard(self.start()?);
        let (stdin, out, err) = (child.0.stdin.take(), child.0.stdout.take(), child.0.stderr.take());
        let mut stdout = Sink::new(self.stdout_cap, false);
        let mut stderr = Sink::new(self.stderr_cap, true);
        let mut ended = None;

        let finished = tokio::time::timeout(self.deadline, async {
            let feed = async {
                if let Some(mut stdin) = stdin {
                    // A program that does not read its input is its own business: EPIPE is no failure.
                    let _ = stdin.write_all(&self.stdin).await;
                }
                std::future::pending::<()>().await;
            };
            let mut reads = Box::pin(async { tokio::try_join!(stdout.fill(out), stderr.fill(err)) });
            tokio::pin!(feed);
            let mut read_done = false;
            let status = loop {
                tokio::select! {
                    status = child.0.wait() => break status?,
                    read = &mut reads, if !read_done => { read?; read_done = true; }
                    () = &mut feed => {}
                }
            };
            ended = Some(status);
            if !read_done && let Ok(read) = tokio::time::timeout(DRAIN, reads).await {
                read?;
            }
            Ok::<ExitStatus, io::Error>(status)
        })
        .await;

        // A deadline that passes while only the pipes are still held by someone else comes too late to count.
        let finished = finished.or_else(|late| ended.map(Ok).ok_or(late));
        let error = match finished {
            Ok(Ok(_)) if stdout.over => SpawnError::TooMuch { command: self.command(), cap: self.stdout_cap },
            Ok(Ok(status)) => {
                return Ok(Output { status, stdout: stdout.data, stderr: self.redact(stderr.text()) });
            }
            Ok(Err(_)) if stdout.over => SpawnError::TooMuch { command: self.command(), cap: self.stdout_cap },
            Ok(Err(source)) => SpawnError::Io { command: self.command(), source },
            Err(_) => SpawnError::Deadline {
                command: self.command(),
                after: self.deadline,
                stderr: self.redact(stderr.text()),
            },
        };
        child.kill();
        let _ = tokio::time::timeout(REAP, child.0.wait()).await;
        Err(error)
    }

    /// Runs it to its end; a status that is not 0 is [`SpawnError::Failed`].
    pub async fn run_ok(&self) -> Result<Output, SpawnError> {
        let output = self.run().await?;
        if output.success() {
            return Ok(output);
        }
        Err(SpawnError::Failed { command: self.command(), status: output.status, stderr: output.stderr })
    }

    /// Program and arguments as errors show them: quoted where needed, shortened, without secrets.
    pub fn command(&self) -> String {
        let mut text = self.redact(self.program.clone());
        for argument in &self.args {
            let plain = !argument.is_empty() && argument.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
            let argument = self.redact(argument.clone());
            text.push(' ');
            text.push_str(&if plain { argument } else { format!("{argument:?}") });
        }
        if text.len() > COMMAND_MAX {
            text.truncate(text.floor_char_boundary(COMMAND_MAX));
            text.push_str(" ...");
        }
        text
    }

    fn redact(&self, mut text: String) -> String {
        for secret in &self.secrets {
            text = text.replace(secret.as_str(), "[secret]");
        }
        text
    }

    fn start(&self) -> Result<Child, SpawnError> {
        let copy = |given: &Option<Arc<OwnedFd>>, otherwise: Stdio| match given {
            None => Ok(otherwise),
            Some(fd) => fd.as_fd().try_clone_to_owned().map(Stdio::from),
        };
        let failed = |source| SpawnError::Start { command: self.command(), source };
        let stdin = if self.stdin.is_empty() { Stdio::null() } else { Stdio::piped() };
        let stdin = copy(&self.stdin_from, stdin).map_err(failed)?;
        let stdout = copy(&self.stdout_to, Stdio::piped()).map_err(failed)?;
        #[allow(clippy::disallowed_methods)] // the one place where programs are started
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .env_clear()
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .current_dir(&self.cwd)
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let score = self.oom_score_adj.to_string();
        let passed: Vec<i32> = self.passed.iter().map(|fd| fd.as_raw_fd()).collect();
        // SAFETY: between fork and exec only async-signal-safe system calls are made; nothing allocates or locks.
        unsafe {
            command.pre_exec(move || {
                // Descriptors that some library opened without CLOEXEC must not reach a plugin. A kernel or seccomp
                // filter without the call leaves us with Rust's own CLOEXEC everywhere.
                libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int);
                for fd in &passed {
                    if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                set_oom_score(c"/proc/self/oom_score_adj", score.as_bytes());
                Ok(())
            });
        }
        command.spawn().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound if matches!(Path::new(&self.program).try_exists(), Ok(false)) => {
                SpawnError::Missing { command: self.command() }
            }
            _ => SpawnError::Start { command: self.command(), source },
        })
    }
}

impl fmt::Debug for Spawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the environment or stdin: they may be secrets.
        f.debug_tuple("Spawn").field(&self.command()).finish()
    }
}

/// Without CAP_SYS_RESOURCE a lower score than the inherited one is refused; then the inherited one stays.
fn set_oom_score(path: &CStr, score: &[u8]) {
    use rustix::fs::{Mode, OFlags};
    if let Ok(file) = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        let _ = rustix::io::write(&file, score);
    }
}

/// A child whose whole process group is killed when it is dropped before its end was seen.
struct Guard(Child);

impl Guard {
    fn kill(&mut self) {
        // id() is None once the child is reaped: from then on the group's number may belong to someone else.
        if let Some(pid) = self.0.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Collects a stream: up to a cap and then an error, or its last bytes.
struct Sink {
    data: Vec<u8>,
    cap: usize,
    tail: bool,
    over: bool,
}

impl Sink {
    fn new(cap: usize, tail: bool) -> Self {
        Self { data: Vec::new(), cap, tail, over: false }
    }

    async fn fill(&mut self, stream: Option<impl AsyncRead + Unpin>) -> io::Result<()> {
        let Some(mut stream) = stream else { return Ok(()) };
        let mut chunk = vec![0; 16 << 10];
        loop {
            let n = stream.read(&mut chunk).await?;
            if n == 0 {
                return Ok(());
            }
            self.data.extend_from_slice(&chunk[..n]);
            if self.data.len() > self.cap {
                if !self.tail {
                    self.over = true;
                    return Err(io::Error::other("too much output"));
                }
                self.data.drain(..self.data.len() - self.cap);
            }
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.data).trim().to_owned()
    }
}

/// "exit status 3" or "killed by signal 9".
fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended without a status".into(),
    }
}

fn tail(stderr: &str) -> String {
    if stderr.is_empty() { String::new() } else { format!(": {stderr}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn sh(script: &str) -> Spawn {
        Spawn::new("/bin/sh", ["-c", script]).env("PATH", "/usr/bin:/bin")
    }

    /// Waits until no process of the group is left (a zombie that init has yet to reap counts as gone).
    async fn gone(pid: i32) {
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')) {
                return;
            }
            assert!(Instant::now() < until, "process {pid} is still there: {stat}");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn gives_status_and_both_streams() {
        let out = sh("read a; echo out:$a; echo err >&2; exit 3").stdin("hello\n").run().await.unwrap();
        assert_eq!((out.code(), out.stdout.as_slice(), out.stderr.as_str()), (Some(3), &b"out:hello\n"[..], "err"));
        let e = sh("echo why >&2; exit 4").run_ok().await.unwrap_err().to_string();
        assert!(e.contains("/bin/sh -c") && e.ends_with("exit status 4: why"), "{e}");
        let e = sh("kill -9 $$").run_ok().await.unwrap_err().to_string();
        assert!(e.ends_with("killed by signal 9"), "{e}");
    }

    #[tokio::test]
    async fn environment_folder_and_descriptors_are_clean() {
        // A descriptor without CLOEXEC, as a careless library would leave it.
        let file = std::fs::File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        let out = Spawn::new("/bin/sh", ["-c", "/usr/bin/env; pwd; ls /proc/self/fd"])
            .env("A", "b c")
            .cwd("/usr")
            .run()
            .await
            .unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(text.contains("A=b c\n") && text.contains("\n/usr\n"), "{text}");
        assert!(!text.contains("CARGO"), "{text}");
        // 0, 1, 2 and the folder that ls itself reads.
        assert!(text.ends_with("0\n1\n2\n3\n"), "{text}");
    }

    #[tokio::test]
    async fn a_background_child_does_not_hold_the_caller() {
        let start = Instant::now();
        let out = sh("sleep 30 & echo $!").run().await.unwrap();
        assert!(out.success() && start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        let pid: i32 = String::from_utf8(out.stdout).unwrap().trim().parse().unwrap();
        // Its end came within its deadline, however long the pipes are held.
        let out = sh("sleep 30 & echo $!").deadline(Duration::from_secs(1)).run().await.unwrap();
        let other: i32 = String::from_utf8(out.stdout).unwrap().trim().parse().unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(other).unwrap(), rustix::process::Signal::KILL)
            .unwrap();
        // A regular end leaves it alone; the test does not.
        let pid_ = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid_, rustix::process::Signal::KILL).unwrap();
        gone(pid).await;
    }

    #[tokio::test]
    async fn a_hung_program_is_killed_with_its_children() {
        let start = Instant::now();
        let e = sh("echo going >&2; sleep 60 & echo $! >&2; wait")
            .deadline(Duration::from_millis(300))
            .run()
            .await
            .unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(5));
        let SpawnError::Deadline { stderr, .. } = &e else { panic!("{e}") };
        assert!(stderr.starts_with("going"), "{stderr}");
        gone(stderr.lines().last().unwrap().parse().unwrap()).await;
    }

    #[tokio::test]
    async fn dropping_the_caller_kills_the_group() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let spawn = sh(&format!("sleep 60 & echo $! > {0}.x; mv {0}.x {0}; wait", file.display()));
        let read = || std::fs::read_to_string(&file).unwrap_or_default().trim().parse::<i32>();
        tokio::select! {
            r = spawn.run() => panic!("{r:?}"),
            () = async { while read().is_err() { tokio::task::yield_now().await } } => {}
        }
        gone(read().unwrap()).await;
    }

    #[tokio::test]
    async fn too_much_output_and_unread_input() {
        let e = sh("yes").stdout_cap(1 << 16).run().await.unwrap_err();
        assert!(matches!(e, SpawnError::TooMuch { cap: 65536, .. }), "{e}");
        let out = sh("i=0; while [ $i -lt 3000 ]; do echo 1234567890 >&2; i=$((i+1)); done; echo end >&2")
            .stderr_cap(100)
            .run()
            .await
            .unwrap();
        assert!(out.stderr.len() <= 100 && out.stderr.ends_with("end"), "{}", out.stderr);
        let out = sh("exit 0").stdin(vec![b'x'; 4 << 20]).run().await.unwrap();
        assert!(out.success());
        let out = sh("cat").stdin(vec![b'x'; 700_000]).run().await.unwrap();
        assert_eq!(out.stdout.len(), 700_000);
    }

    #[tokio::test]
    async fn bad_programs_are_named() {
        let e = Spawn::new("sh", ["-c", "true"]).run().await.unwrap_err();
        assert!(matches!(e, SpawnError::Invalid { .. }), "{e}");
        let e = Spawn::new("/bin/sh", ["a\0b"]).run().await.unwrap_err();
        assert!(matches!(e, SpawnError::Invalid { .. }), "{e}");
        let e = Spawn::new("/no/such/tool", ["x y"]).run().await.unwrap_err();
        assert!(matches!(e, SpawnError::Missing { .. }), "{e}");
        assert_eq!(e.to_string(), "/no/such/tool \"x y\": no such program");
        let e = Spawn::new("/etc/passwd", [""; 0]).run().await.unwrap_err();
        assert!(matches!(e, SpawnError::Start { .. }), "{e}");
        let e = sh("true").cwd("/no/such/folder").run().await.unwrap_err();
        assert!(matches!(e, SpawnError::Start { .. }), "{e}");
    }

    #[tokio::test]
    async fn secrets_stay_out_of_errors() {
        let spawn = Spawn::new("/bin/sh", ["-c", "echo token hunter2 >&2; exit 1", "hunter2"]).secret("hunter2");
        let e = spawn.run_ok().await.unwrap_err();
        assert!(!e.to_string().contains("hunter2") && e.to_string().contains("[secret]"), "{e}");
        assert!(!format!("{e:?} {spawn:?}").contains("hunter2"));
    }
}
