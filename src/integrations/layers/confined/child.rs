//! The process itself: what `proxmox-lxcri` does when it is started as an unpacker.
//!
//! Started by the parent's side only; not a command for people. Each puts its walls up before it reads a byte. What a
//! layer does wrong is told in the report and ends with 0; another end is a failure of the process. It owns nothing: a
//! folder that was unpacked half is the layer store's.
#![allow(unsafe_code)] // the number of the folder's descriptor is an argument

use std::io::{self, BufReader, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use prost::Message;

use super::ANSWERS;
use super::report::{Report, printable};
use super::walls::Walls;
use crate::core::error::{Error, Kind};
use crate::integrations::layers::pipeline::{Compression, decode};
use crate::integrations::layers::unpack::{Later, Limits, Whiteouts, unpack_in};
use crate::utils::beneath::Root;

const UNPACK: &str = "__unpack-layer";
const DECOMPRESS: &str = "__decompress-layer";
pub(super) const PROBE: &str = "__confined-probe";
/// A process behind the unpacker's walls that tries to get out; in programs built for tests only.
#[cfg(feature = "failpoints")]
const BREAK_OUT: &str = "__confined-break-out";

pub(super) fn unpack_arguments(folder: RawFd, whiteouts: Whiteouts, limits: &Limits) -> Vec<String> {
    let whiteouts = match whiteouts {
        Whiteouts::Overlay => "overlay",
        Whiteouts::Apply => "apply",
    };
    let Limits { entries, bytes, path, depth } = limits;
    let numbers = [entries.to_string(), bytes.to_string(), path.to_string(), depth.to_string()];
    [UNPACK.into(), folder.to_string(), whiteouts.into()].into_iter().chain(numbers).collect()
}

pub(super) fn decompress_arguments(how: Compression, window: u32) -> Vec<String> {
    let how = if how == Compression::Zstd { "zstd" } else { "gzip" };
    vec![DECOMPRESS.into(), how.into(), window.to_string()]
}

/// First thing in `main`, before any thread: where the program was started as an unpacker this does its work, and the
/// answer is what `main` ends with.
pub fn entry() -> Option<ExitCode> {
    ANSWERS.store(true, Ordering::Relaxed);
    // Others' arguments may be no text; ours are.
    let mut arguments = std::env::args_os().skip(1);
    let verb = arguments.next()?.into_string().ok()?;
    let arguments = arguments.map(|a| a.into_string().ok()).collect::<Option<Vec<String>>>()?;
    let done = match verb.as_str() {
        UNPACK => unpack(&arguments),
        DECOMPRESS => decompress(&arguments),
        PROBE => probe(),
        #[cfg(feature = "failpoints")]
        BREAK_OUT => break_out(&arguments),
        _ => return None,
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let _ = rustix::io::write(rustix::stdio::stderr(), printable(&why).as_bytes());
            ExitCode::FAILURE
        }
    })
}

struct Streams;

impl Read for Streams {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(rustix::stdio::stdin(), buffer)?)
    }
}

impl Write for Streams {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stdout(), data)?)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn tell(report: &Report) -> Result<(), String> {
    Streams.write_all(&report.encode_to_vec()).map_err(|e| format!("writing the report: {e}"))
}

fn folder(argument: Option<&String>) -> Result<OwnedFd, String> {
    let number: RawFd = argument.and_then(|n| n.parse().ok()).filter(|n| *n > 2).ok_or("which folder?")?;
    // SAFETY: the parent has passed this descriptor to us, and nothing else in this new process knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn unpack(arguments: &[String]) -> Result<(), String> {
    let folder = folder(arguments.first())?;
    let whiteouts = match arguments.get(1).map(String::as_str) {
        Some("overlay") => Whiteouts::Overlay,
        Some("apply") => Whiteouts::Apply,
        _ => return Err("which whiteouts?".into()),
    };
    let number = |n: usize| arguments.get(n).and_then(|a| a.parse().ok()).ok_or("which limits?");
    let size = |n| number(n).map(|v| usize::try_from(v).unwrap_or(usize::MAX));
    let limits = Limits { entries: number(2)?, bytes: number(3)?, path: size(4)?, depth: size(5)? };
    Walls::unpacking(folder).enter().map_err(|e| e.to_string())?;
    let unpacked = Root::open("/".as_ref()).map_err(|e| Error::io("opening the layer's folder", e)).and_then(|root| {
        let source = BufReader::with_capacity(256 << 10, Streams);
        Ok(unpack_in(root, source, whiteouts, &limits, Some(Later::default()))?)
    });
    tell(&match unpacked {
        Ok((unpacked, later)) => Report::done(unpacked, later.unwrap_or_default()),
        Err(e) => {
            let text = e.chain();
            let text = text.strip_prefix("unpacking failed: ").unwrap_or(&text);
            Report::failed(e.kind(), printable(text))
        }
    })
}

fn decompress(arguments: &[String]) -> Result<(), String> {
    let how = match arguments.first().map(String::as_str) {
        Some("gzip") => Compression::Gzip,
        Some("zstd") => Compression::Zstd,
        _ => return Err("which compression?".into()),
    };
    let window = arguments.get(1).and_then(|a| a.parse().ok()).ok_or("which window?")?;
    Walls::decompressing().enter().map_err(|e| e.to_string())?;
    let input = BufReader::with_capacity(256 << 10, Streams);
    let mut decoder = decode(how, window, input).map_err(|e| e.to_string())?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let got = match decoder.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e.to_string()),
        };
        if let Err(e) = Streams.write_all(&buffer[..got]) {
            // Nobody wants the rest.
            return if e.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(e.to_string()) };
        }
    }
}

fn probe() -> Result<(), String> {
    let folder = rustix::fs::open("/", rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY, 0.into());
    let walls = Walls::unpacking(folder.map_err(|e| format!("opening /: {e}"))?);
    tell(&match walls.enter() {
        Ok(landlock) => Report { landlock: landlock.number(), ..Report::default() },
        Err(e) => Report::failed(Kind::FailedPrecondition, e.to_string()),
    })
}

/// What a taken-over unpacker would try. One line each: what it did and how it ended.
#[cfg(feature = "failpoints")]
fn break_out(arguments: &[String]) -> Result<(), String> {
    use rustix::fs::{CWD, FileType, Mode, OFlags};
    let folder = folder(arguments.first())?;
    let outside = arguments.get(1).cloned().unwrap_or_default();
    let leaked = arguments.get(2).and_then(|n| n.parse::<RawFd>().ok()).unwrap_or(-1);
    Walls::unpacking(folder).enter().map_err(|e| e.to_string())?;
    let mut said = String::new();
    let mut note = |what: &str, done: Result<(), rustix::io::Errno>| {
        said += &format!("{what}: {}\n", done.map_or_else(|e| format!("{e:?}"), |()| "DONE".into()));
    };
    let open = |path: &str, flags| rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map(drop);
    note("write inside", open("/inside", OFlags::WRONLY | OFlags::CREATE));
    note("read outside", open(&outside, OFlags::RDONLY));
    note("write outside", open(&outside, OFlags::WRONLY));
    note("read /etc/passwd", open("/etc/passwd", OFlags::RDONLY));
    note("read ../../etc/passwd", open("../../../../../../etc/passwd", OFlags::RDONLY));
    note("read a leaked descriptor", open(&format!("/proc/self/fd/{leaked}"), OFlags::RDONLY));
    let device = rustix::fs::makedev(1, 3);
    let made = rustix::fs::mknodat(CWD, "/null", FileType::CharacterDevice, Mode::from_raw_mode(0o666), device);
    note("make a device", made);
    note("open a device", open("/null", OFlags::RDWR));
    let call = |number: i64, arguments: [i64; 5]| {
        let [a, b, c, d, e] = arguments;
        // SAFETY: all of these are to be refused before they look at their arguments; none has a pointer that is written.
        let done = unsafe { libc::syscall(number, a, b, c, d, e, 0_i64) };
        match done {
            -1 => Err(rustix::io::Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(rustix::io::Errno::IO)),
            _ => Ok(()),
        }
    };
    let dot = c".".as_ptr() as i64;
    note("socket", call(libc::SYS_socket, [i64::from(libc::AF_INET), i64::from(libc::SOCK_STREAM), 0, 0, 0]));
    note("unix socket", call(libc::SYS_socket, [i64::from(libc::AF_UNIX), i64::from(libc::SOCK_STREAM), 0, 0, 0]));
    note("chroot", call(libc::SYS_chroot, [dot, 0, 0, 0, 0]));
    note("mount", call(libc::SYS_mount, [dot, dot, 0, i64::from(libc::MS_BIND as i32), 0]));
    note("unshare", call(libc::SYS_unshare, [i64::from(libc::CLONE_NEWUSER), 0, 0, 0, 0]));
    note("fork", call(libc::SYS_fork, [0; 5]));
    note("kill", call(libc::SYS_kill, [1, 0, 0, 0, 0]));
    note("ptrace", call(libc::SYS_ptrace, [i64::from(libc::PTRACE_ATTACH), 1, 0, 0, 0]));
    note("exec", call(libc::SYS_execve, [c"/inside".as_ptr() as i64, 0, 0, 0, 0]));
    note("open by handle", call(libc::SYS_open_by_handle_at, [libc::AT_FDCWD.into(), dot, 0, 0, 0]));
    note("io_uring", call(libc::SYS_io_uring_setup, [1, dot, 0, 0, 0]));
    note("bpf", call(libc::SYS_bpf, [0; 5]));
    note("two GiB of memory", call(libc::SYS_mmap, [0, 2 << 30, 3, 0x22, -1]));
    note("runnable memory", call(libc::SYS_mmap, [0, 4096, 7, 0x22, -1]));
    note("capabilities back", call(libc::SYS_capset, [0; 5]));
    note("trusted attribute", call(libc::SYS_lsetxattr, [dot, dot, dot, 1, 0]));
    Streams.write_all(said.as_bytes()).map_err(|e| e.to_string())
}
