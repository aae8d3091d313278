//! Becoming a process of a container, once inside its namespaces and root file system: limits, devices, terminal,
//! identity, capabilities, then exec(2).
//!
//! Called by a container's first process and by execs, with all privileges that the container's user namespace has. The
//! order is the kernel's: what needs a privilege comes before what takes it away. Fails with the step and the reason.
#![allow(unsafe_code)] // capset, prctl, execve: no safe wrapper for all of a process

use std::ffi::CString;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::fs::{Access, AtFlags, CWD, FileType, Gid, Mode, OFlags, PROC_SUPER_MAGIC, ResolveFlags, Uid, openat2};

use crate::plan::{Node, Plan};
use crate::{foreign, terminal, wire};

/// Inode of procfs' root (the kernel's PROC_ROOT_INO).
const PROC_ROOT: u64 = 1;
/// So much of a container's passwd is read.
const USERS_MAX: u64 = 4 << 20;

/// Why it can't be.
#[derive(Debug)]
pub enum Trouble {
    /// The program is not there or can't be executed.
    Program(String),
    /// Anything else.
    Step(String),
}

impl Trouble {
    /// Tells whoever waits.
    pub fn tell(&self, to: BorrowedFd<'_>) {
        let (kind, text) = match self {
            Self::Program(text) => (wire::NO_PROGRAM, text),
            Self::Step(text) => (wire::FAILED, text),
        };
        let _ = wire::send(to, kind, text, None);
    }
}

/// Ready to be executed.
pub struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    /// What comes last.
    filter: Option<Filter>,
}

/// A filter of system calls, compiled by somebody else.
pub struct Filter(Vec<libc::sock_filter>);

impl Filter {
    /// As the kernel has it: 8 bytes an instruction.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (instructions, rest) = bytes.as_chunks::<8>();
        if instructions.is_empty() || !rest.is_empty() || u16::try_from(instructions.len()).is_err() {
            return Err(format!("a filter of system calls of {} bytes", bytes.len()));
        }
        let one = |b: &[u8; 8]| libc::sock_filter {
            code: u16::from_ne_bytes([b[0], b[1]]),
            jt: b[2],
            jf: b[3],
            k: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        };
        Ok(Self(instructions.iter().map(one).collect()))
    }

    /// Puts it over this process.
    fn set(&self) -> io::Result<()> {
        foreign::set_filter(&self.0)
    }
}

fn step<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> Trouble {
    move |e| Trouble::Step(format!("{what}: {e}"))
}

/// Everything but exec(2). A terminal is sent to `tell`.
pub fn prepare(plan: &Plan, tell: BorrowedFd<'_>) -> Result<Program, Trouble> {
    prepare_filtered(plan, None, tell)
}

/// The same under a filter: from just before exec(2) on where that needs no privilege, else from before privileges are given up.
pub fn prepare_filtered(plan: &Plan, filter: Option<Filter>, tell: BorrowedFd<'_>) -> Result<Program, Trouble> {
    if let Some(score) = plan.oom_score_adj {
        match of_proc("oom_score_adj", OFlags::WRONLY) {
            // As far as the kernel permits.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
            opened => {
                let _ = rustix::io::write(opened.map_err(step("oom_score_adj"))?, score.to_string().as_bytes());
            }
        }
    }
    for limit in &plan.limits {
        let value = libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard };
        // SAFETY: the struct lives longer than the call.
        let done = unsafe { libc::prlimit64(0, limit.resource as _, &raw const value, std::ptr::null_mut()) };
        if done != 0 {
            return Err(step(format_args!("resource limit {}", limit.resource))(io::Error::last_os_error()));
        }
    }
    for node in &plan.nodes {
        make_node(node).map_err(step(format_args!("device {}", node.path)))?;
    }
    if plan.terminal {
        let master = terminal::take(plan.uid).map_err(step("terminal"))?;
        use std::os::fd::AsFd;
        wire::send(tell, wire::TERMINAL, "", Some(master.as_fd())).map_err(step("send the terminal"))?;
    }
    for (kind, label) in [("apparmor", &plan.apparmor), ("selinux", &plan.selinux)] {
        if let Some(label) = label {
            set_label(kind, label).map_err(step(format_args!("{kind} label {label:?}")))?;
        }
    }
    foreign::close(plan.architectures).map_err(step("system calls of other architectures"))?;
    make_folder(&plan.cwd).map_err(step(format_args!("working directory {:?}", plan.cwd)))?;
    let (early, late) = if plan.no_new_privs { (None, filter) } else { (filter, None) };
    if let Some(filter) = early {
        filter.set().map_err(step("filter of system calls"))?;
    }
    identity(plan)?;
    // Again as the user: it may not be its own.
    rustix::process::chdir(plan.cwd.as_str()).map_err(step(format_args!("working directory {:?}", plan.cwd)))?;
    if plan.no_new_privs {
        rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    }
    let text = |s: &String| CString::new(s.as_bytes()).map_err(step("an argument"));
    let args = plan.args.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    let mut env = plan.env.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    if !plan.env.iter().any(|line| line.starts_with("HOME=")) {
        env.push(text(&format!("HOME={}", home(plan.uid)))?);
    }
    Ok(Program { path: find(plan)?, args, env, filter: late })
}

/// The program of a process that is otherwise as its maker left it: environment and working directory alone.
pub fn plainly(plan: &Plan) -> Result<Program, Trouble> {
    rustix::process::chdir(plan.cwd.as_str()).map_err(step(format_args!("working directory {:?}", plan.cwd)))?;
    let text = |s: &String| CString::new(s.as_bytes()).map_err(step("an argument"));
    let args = plan.args.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    let env = plan.env.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    Ok(Program { path: find(plan)?, args, env, filter: None })
}

impl Program {
    /// exec(2); returns only what went wrong.
    pub fn execute(&self) -> io::Error {
        let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
            list.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
        };
        let (args, env) = (pointers(&self.args), pointers(&self.env));
        // SAFETY: signal calls on this frame's set; the arrays end with a null and live longer than the call. What is open
        // beyond the three streams is closed by exec.
        unsafe {
            for signal in 1..=64 {
                libc::signal(signal, libc::SIG_DFL);
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 4u32);
            if let Some(Err(e)) = self.filter.as_ref().map(Filter::set) {
                return e;
            }
            libc::execve(self.path.as_ptr(), args.as_ptr(), env.as_ptr());
        }
        io::Error::last_os_error()
    }
}

fn make_node(node: &Node) -> io::Result<()> {
    if let Some((folder, _)) = node.path.rsplit_once('/') {
        std::fs::create_dir_all(if folder.is_empty() { "/" } else { folder })?;
    }
    let kind = FileType::from_raw_mode(node.mode as _);
    let device = rustix::fs::makedev(node.major, node.minor);
    let made = rustix::fs::mknodat(CWD, node.path.as_str(), kind, Mode::from_raw_mode(node.mode & 0o7777), device);
    match made {
        // liblxc has made it, or the node's is mounted there: that one's mode and owner are not ours to change.
        Err(rustix::io::Errno::EXIST) => {
            let there = std::fs::symlink_metadata(&node.path)?;
            let same = FileType::from_raw_mode(there.mode() as _) == kind && there.rdev() == device;
            return if same { Ok(()) } else { Err(io::Error::other("something else is there")) };
        }
        other => other?,
    }
    rustix::fs::chmod(node.path.as_str(), Mode::from_raw_mode(node.mode & 0o7777))?;
    let (uid, gid) = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
    rustix::fs::chownat(CWD, node.path.as_str(), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

fn make_folder(path: &str) -> io::Result<()> {
    match std::fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => std::fs::create_dir_all(path),
        Err(e) => Err(e),
        Ok(meta) if !meta.is_dir() => Err(rustix::io::Errno::NOTDIR.into()),
        Ok(_) => Ok(()),
    }
}

/// A file of this process' in /proc. What somebody has mounted over it, or over /proc, is refused: the label or score would go into
/// their file, and the program would run without.
fn of_proc(file: &str, access: OFlags) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = rustix::fs::open(c"/proc", flags, Mode::empty())?;
    let is_procfs =
        rustix::fs::fstatfs(&proc)?.f_type == PROC_SUPER_MAGIC && rustix::fs::fstat(&proc)?.st_ino == PROC_ROOT;
    if !is_procfs {
        return Err(io::Error::other("/proc is not the kernel's"));
    }
    let path = format!("self/{file}");
    let no_mounts = ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    openat2(&proc, path, access | OFlags::CLOEXEC, Mode::empty(), no_mounts).map_err(|e| match e {
        rustix::io::Errno::XDEV => io::Error::other(format!("something is mounted over /proc/self/{file}")),
        e => e.into(),
    })
}

/// Of two files, which kernels have in different places, the first that is there.
fn of_proc_either(files: [&str; 2], access: OFlags) -> io::Result<OwnedFd> {
    match of_proc(files[0], access) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => of_proc(files[1], access),
        opened => opened,
    }
}

/// Name of the AppArmor profile that this process is under.
fn current_profile() -> io::Result<String> {
    let file = of_proc_either(["attr/apparmor/current", "attr/current"], OFlags::RDONLY)?;
    let text = io::read_to_string(std::fs::File::from(file))?;
    Ok(text.trim_end().rsplit_once(" (").map_or(text.trim_end(), |(name, _mode)| name).to_owned())
}

fn set_label(kind: &str, label: &str) -> io::Result<()> {
    // liblxc has put an exec under the container's profile at once, which may not change it.
    if kind == "apparmor" && current_profile()? == label {
        return Ok(());
    }
    let (text, files) = match kind {
        "apparmor" => (format!("exec {label}"), ["attr/apparmor/exec", "attr/exec"]),
        _ => (label.to_owned(), ["attr/selinux/exec", "attr/exec"]),
    };
    rustix::io::write(of_proc_either(files, OFlags::WRONLY)?, text.as_bytes())?;
    Ok(())
}

/// Groups, user and capabilities.
fn identity(plan: &Plan) -> Result<(), Trouble> {
    for number in 0..64 {
        if plan.bounding & 1 << number == 0 {
            // SAFETY: plain numbers; a capability that the kernel does not know is no error here.
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number as libc::c_ulong, 0, 0, 0) };
        }
    }
    // SAFETY: plain numbers.
    if unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) } != 0 {
        return Err(step("keep capabilities")(io::Error::last_os_error()));
    }
    let groups: Vec<Gid> = plan.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    rustix::thread::set_thread_groups(&groups).map_err(step("supplementary groups"))?;
    let (uid, gid) = (Uid::from_raw(plan.uid), Gid::from_raw(plan.gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(step(format_args!("group {}", plan.gid)))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(step(format_args!("user {}", plan.uid)))?;
    // Of what is asked for, what the user namespace and the bounding set of the runtime have.
    capset(plan.permitted, plan.permitted, plan.inheritable).map_err(step("capabilities"))?;
    for number in (0..64).filter(|n| plan.ambient & 1 << n != 0) {
        // SAFETY: plain numbers.
        let done = unsafe {
            libc::prctl(
                libc::PR_CAP_AMBIENT,
                libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong,
                number as libc::c_ulong,
                0,
                0,
            )
        };
        if done != 0 {
            return Err(step(format_args!("ambient capability {number}"))(io::Error::last_os_error()));
        }
    }
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0) };
    Ok(())
}

/// capset(2), version 3 of its format: the low halves, then the high ones.
fn capset(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let header = [0x2008_0522u32, 0];
    let half = |shift: u32| [effective, permitted, inheritable].map(|set| (set >> shift) as u32);
    let data = [half(0), half(32)];
    // SAFETY: both have the layout of capset(2) and outlive the call.
    match unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The user's folder, as the container's own passwd has it. That is hostile: it is read up to a limit, and what does not
/// parse is skipped.
fn home(uid: u32) -> String {
    let mut text = Vec::new();
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    if let Ok(file) = rustix::fs::open(c"/etc/passwd", flags, Mode::empty()) {
        let file = std::fs::File::from(file);
        if file.metadata().is_ok_and(|meta| meta.is_file()) {
            let _ = std::io::Read::read_to_end(&mut std::io::Read::take(file, USERS_MAX), &mut text);
        }
    }
    let text = String::from_utf8_lossy(&text);
    let of = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        let theirs = fields.get(2)?.parse() == Ok(uid);
        fields.get(5).filter(|home| theirs && !home.is_empty() && !home.contains('\0')).map(|home| home.to_string())
    };
    text.lines().find_map(of).unwrap_or_else(|| "/".to_owned())
}

/// The program's path, looked up in the process' own PATH, as the user that it will be.
fn find(plan: &Plan) -> Result<CString, Trouble> {
    let Some(name) = plan.args.first().filter(|name| !name.is_empty()) else {
        return Err(Trouble::Program("no command".into()));
    };
    let path = plan.env.iter().rev().find_map(|line| line.strip_prefix("PATH=")).unwrap_or("/bin:/usr/bin");
    let candidates: Vec<String> = match name.contains('/') {
        true => vec![name.clone()],
        false => path.split(':').map(|d| format!("{}/{name}", if d.is_empty() { "." } else { d })).collect(),
    };
    let mut found = None;
    for candidate in candidates {
        let Ok(meta) = std::fs::metadata(&candidate) else { continue };
        let good =
            meta.is_file() && rustix::fs::accessat(CWD, candidate.as_str(), Access::EXEC_OK, AtFlags::EACCESS).is_ok();
        if good {
            return CString::new(candidate).map_err(step("the program's path"));
        }
        found.get_or_insert((candidate, meta.is_file()));
    }
    Err(Trouble::Program(match found {
        None => format!("executable file `{name}` not found: No such file or directory"),
        Some((path, false)) => format!("the path `{path}` is not a regular file"),
        Some((path, true)) => format!("the path `{path}` exists but it is not executable"),
    }))
}
