//! Starts the programs of a plan and says how they ended.
//!
//! Called by the server, which waits for them in its loop; nothing here waits longer than exec(2) takes. A failure
//! is told in the program's own words, or with its command line where it had none. A crash leaves the program running,
//! as a child of the host's init.
#![allow(unsafe_code)] // the hook between fork and exec

use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lxcri_monitor_proto::null::own_null;
use lxcri_monitor_proto::v1::{self, ErrorCode};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::process::{Pid, Signal};

use crate::failure::{Failure, Result};
use crate::kept::Kept;
use crate::reaper::Ended;

/// Deadline of a program whose plan says none, in milliseconds.
const DEADLINE_MS: u32 = 120_000;
/// So much of a program's own words goes into a failure, in bytes.
const TAIL: u64 = 4096;
/// So many bytes of a command line, about, and so many characters of an argument.
const COMMAND_MAX: usize = 400;
const ARGUMENT_MAX: usize = 32;

/// A program that runs.
pub struct Running {
    /// Its pid, which leads a process group.
    pub pid: i32,
    /// When it was started.
    pub since: Instant,
    /// When it will be killed.
    pub deadline: Instant,
    /// It was killed because its time was up.
    pub overdue: bool,
    /// The time it was given, once that is up.
    time: Option<Duration>,
    what: String,
    error_log: String,
    /// Its stderr, when that is not a container's.
    words: Option<OwnedFd>,
}

/// The three descriptors of a program; None is a null device, for stderr a place that failures quote.
#[derive(Default)]
pub struct Descriptors {
    /// 0.
    pub stdin: Option<OwnedFd>,
    /// 1.
    pub stdout: Option<OwnedFd>,
    /// 2.
    pub stderr: Option<OwnedFd>,
    /// What the program starts inherits them: the null device is their own, not the node's, and with no stderr it is that.
    pub mute: bool,
    /// That device, if there is one already.
    pub null: Option<OwnedFd>,
    /// argv[0] if it is not to be the program's path.
    pub argv0: Option<&'static str>,
}

/// Whether the plan's program can be started at all.
pub fn check(program: Option<&v1::Program>, what: &str) -> Result<()> {
    match program {
        Some(p) if Path::new(&p.path).is_absolute() && (p.cwd.is_empty() || Path::new(&p.cwd).is_absolute()) => Ok(()),
        Some(_) => Err(Failure::invalid(format!("{what}: not an absolute path"))),
        None => Err(Failure::invalid(format!("{what}: missing"))),
    }
}

/// Starts it, with its environment and nothing of ours, in a process group of its own. Our copies of the descriptors
/// are closed when this returns.
pub fn spawn(kept: &Kept, program: &v1::Program, fds: Descriptors) -> Result<Running> {
    let what = told(&program.path, &program.args);
    let mut words = None;
    let absent = || -> Result<Stdio> {
        if !fds.mute {
            return Ok(Stdio::null());
        }
        match &fds.null {
            Some(null) => null.try_clone().map(Stdio::from).map_err(|e| Failure::io("dup", &e)),
            None => own_null().map(Stdio::from).map_err(|e| Failure::errno("make a null device", e)),
        }
    };
    let given = |fd: Option<OwnedFd>| fd.map_or_else(&absent, |fd| Ok(Stdio::from(fd)));
    let stderr = match fds.stderr {
        Some(fd) => Stdio::from(fd),
        None if fds.mute => absent()?,
        None => {
            let memfd = rustix::fs::memfd_create(c"stderr", MemfdFlags::CLOEXEC)
                .map_err(|e| Failure::errno("memfd_create", e))?;
            let copy = memfd.try_clone().map_err(|e| Failure::io("dup", &e))?;
            words = Some(memfd);
            Stdio::from(copy)
        }
    };
    #[allow(clippy::disallowed_methods)] // the monitor's one place where programs are started
    let mut command = match kept.instead_of(&program.path) {
        Some(copy) => {
            let mut command = Command::new(copy);
            command.arg0(&program.path);
            command
        }
        None => Command::new(&program.path),
    };
    command
        .args(&program.args)
        .env_clear()
        .envs(program.env.iter().map(|pair| pair.split_once('=').unwrap_or((pair, ""))))
        .current_dir(if program.cwd.is_empty() { "/" } else { &program.cwd })
        .process_group(0)
        .stdin(given(fds.stdin)?)
        .stdout(given(fds.stdout)?)
        .stderr(stderr);
    if let Some(name) = fds.argv0 {
        command.arg0(name);
    }
    let score = program.oom_score_adj.clamp(-1000, 1000).to_string();
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec it only makes system calls, with memory that was allocated before.
    unsafe {
        command.pre_exec(move || {
            set_oom_score(&score);
            die_with(parent)
        });
    }
    let since = Instant::now();
    // Dropping the Child neither kills nor waits: the reaper sees its end.
    let child = command.spawn().map_err(|e| Failure {
        code: ErrorCode::ErrorProgram,
        message: format!("{what}: {e}"),
        errno: e.raw_os_error().unwrap_or(0),
    })?;
    let ms = if program.deadline_ms == 0 { DEADLINE_MS } else { program.deadline_ms };
    Ok(Running {
        pid: child.id() as i32,
        since,
        deadline: since + Duration::from_millis(ms.into()),
        overdue: false,
        time: None,
        what,
        error_log: program.error_log.clone(),
        words,
    })
}

/// In the child: without its monitor a program has nobody who takes up what it makes. What it leaves behind (a container, an
/// exec's process) is not bound by this: the kernel clears it in children.
fn die_with(parent: Pid) -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    match rustix::process::getppid() {
        Some(now) if now == parent => Ok(()),
        // It has died meanwhile.
        _ => Err(rustix::io::Errno::SRCH.into()),
    }
}

/// As far as the kernel permits: without CAP_SYS_RESOURCE the score can't go below what it was, and stays.
pub fn set_oom_score(score: &str) {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(c"/proc/self/oom_score_adj", flags, Mode::empty()) {
        let _ = rustix::io::write(&file, score.as_bytes());
    }
}

impl Running {
    /// Has it killed (again) at another time; what its deadline was stays what is told.
    pub fn kill_at(&mut self, at: Instant) {
        self.time.get_or_insert(self.deadline - self.since);
        self.deadline = at;
    }

    /// What the end of the program means.
    pub fn outcome(self, ended: Ended) -> Result<()> {
        if ended.code == 0 && !self.overdue {
            return Ok(());
        }
        let how = match ended.signal {
            _ if self.overdue => {
                let ms = self.time.unwrap_or(self.deadline - self.since).as_millis();
                format!("not done after {ms} ms")
            }
            0 => format!("exit status {}", ended.code),
            signal => format!("killed by signal {signal}"),
        };
        let words = [tail_of_log(&self.error_log), self.words.and_then(tail_of_fd)];
        let words: Vec<&str> = words.iter().flatten().map(|w| w.trim()).filter(|w| !w.is_empty()).collect();
        // Who says why need not be told by its whole command line.
        let message = if words.is_empty() {
            format!("{}: {how}", self.what)
        } else {
            let path = self.what.split(' ').next().unwrap_or_default();
            format!("{} ({}: {how})", words.join(": "), path.rsplit('/').next().unwrap_or(path))
        };
        let code = if self.overdue { ErrorCode::ErrorDeadline } else { ErrorCode::ErrorProgram };
        Err(Failure::new(code, message))
    }
}

/// A command line that can be read: some have dozens of long paths in them, of which the ends say most.
fn told(program: &str, args: &[String]) -> String {
    let mut line = program.to_owned();
    for (n, arg) in args.iter().enumerate() {
        if line.len() > COMMAND_MAX {
            line.push_str(&format!(" ... and {} more", args.len() - n));
            break;
        }
        let length = arg.chars().count();
        let dots = if length > ARGUMENT_MAX { "..." } else { "" };
        line.push(' ');
        line.push_str(dots);
        line.extend(arg.chars().skip(length.saturating_sub(ARGUMENT_MAX)));
    }
    line
}

fn tail_of_log(path: &str) -> Option<String> {
    if path.is_empty() {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    tail_of_fd(rustix::fs::open(path, flags, Mode::empty()).ok()?)
}

fn tail_of_fd(fd: OwnedFd) -> Option<String> {
    let mut file = std::fs::File::from(fd);
    let meta = file.metadata().ok()?;
    if !meta.is_file() {
        return None;
    }
    file.seek(SeekFrom::Start(meta.len().saturating_sub(TAIL))).ok()?;
    let mut text = Vec::new();
    file.take(TAIL).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}
