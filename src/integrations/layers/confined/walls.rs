//! What a process gives up before it reads a layer: the rest of the file system, the network, other processes, memory
//! without end, capabilities, and all system calls that its work does not need.
//!
//! Called by the child alone, on the only thread of its process. Several walls stand behind one another, so that a hole
//! in one is not a hole in all: a root folder of its own, in which no device opens (the parent's view); Landlock, where
//! the kernel has it; capabilities for files and none for the system; seccomp. Fails with the step, and nothing is read
//! then. Nothing is left behind.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::process::{Resource, Rlimit, chroot, fchdir, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// The newest Landlock that is asked for; an older kernel gives what it has.
const WANTED: ABI = ABI::V6;

/// What the kernel has of Landlock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landlock {
    /// Nothing.
    Absent,
    /// An old one: files, not yet network or signals.
    Partial,
    /// All that is used.
    Full,
}

impl Landlock {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Absent => 0,
            Self::Partial => 1,
            Self::Full => 2,
        }
    }

    pub(super) fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Absent,
            1 => Self::Partial,
            _ => Self::Full,
        }
    }
}

/// What a kind of process keeps.
pub struct Walls {
    /// Its root folder; None: it opens no file at all.
    pub root: Option<OwnedFd>,
    /// Capabilities.
    pub capabilities: CapabilitySet,
    /// Bytes of address space.
    pub memory: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// System calls beside those of every process.
    pub calls: &'static [i64],
}

/// A step that failed.
#[derive(Debug)]
pub struct Failed(String);

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn step<E: fmt::Display>(what: &'static str) -> impl Fn(E) -> Failed {
    move |e| Failed(format!("{what}: {e}"))
}

/// What every process needs: its streams, memory, its end.
const ALWAYS: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What making files takes.
const FILES: &[i64] = &[
    // Where there is the old call, it is used for paths that begin nowhere in particular.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_pwrite64,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_fcntl,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_readlinkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_utimensat,
    libc::SYS_fsetxattr,
    libc::SYS_getpid,
];

impl Walls {
    /// Of the process that unpacks into `root`.
    pub fn unpacking(root: OwnedFd) -> Self {
        let capabilities = CapabilitySet::CHOWN
            | CapabilitySet::DAC_OVERRIDE
            | CapabilitySet::FOWNER
            | CapabilitySet::FSETID
            | CapabilitySet::MKNOD
            | CapabilitySet::SETFCAP;
        Self { root: Some(root), capabilities, memory: 1 << 30, descriptors: 256, calls: FILES }
    }

    /// Of the process that decompresses from one pipe into another.
    pub fn decompressing() -> Self {
        // The window of zstd has at most 128 MiB, of an archive that root loads; a layer's has 32.
        Self { root: None, capabilities: CapabilitySet::empty(), memory: 512 << 20, descriptors: 16, calls: &[] }
    }

    /// Puts them up. There is no way back for this process.
    pub fn enter(self) -> Result<Landlock, Failed> {
        alone()?;
        let limit = |what, value: u64| {
            let now = rustix::process::getrlimit(what);
            let value = now.maximum.map_or(value, |most| value.min(most));
            setrlimit(what, Rlimit { current: Some(value), maximum: Some(value) }).map_err(step("setting a limit"))
        };
        limit(Resource::As, self.memory)?;
        limit(Resource::Nofile, self.descriptors)?;
        limit(Resource::Core, 0)?;
        rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
        if let Some(root) = &self.root {
            fchdir(root).and_then(|()| chroot(".")).map_err(step("entering the layer's folder"))?;
        }
        let landlock = landlock(self.root.as_ref().map(AsFd::as_fd)).map_err(step("Landlock"))?;
        drop(self.root);
        let sets = CapabilitySets {
            effective: self.capabilities,
            permitted: self.capabilities,
            inheritable: CapabilitySet::empty(),
        };
        rustix::thread::set_capabilities(None, sets).map_err(step("giving up capabilities"))?;
        let filter = filter(self.calls).map_err(step("making the seccomp filter"))?;
        seccompiler::apply_filter(&filter).map_err(step("seccomp"))?;
        Ok(landlock)
    }
}

/// Another thread would share all memory and have none of the walls.
fn alone() -> Result<(), Failed> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(step("reading /proc/self/status"))?;
    let threads = status.lines().find_map(|l| l.strip_prefix("Threads:")).map(str::trim);
    match threads {
        Some("1") => Ok(()),
        _ => Err(Failed("an unpacking process has more than one thread: entry comes before anything else".into())),
    }
}

fn landlock(root: Option<BorrowedFd<'_>>) -> Result<Landlock, landlock::RulesetError> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(WANTED))?
        .handle_access(AccessNet::from_all(WANTED))?
        .scope(Scope::from_all(WANTED))?
        .create()?;
    let ruleset = match root {
        // Nothing in a layer is run, and no device in it is opened.
        Some(root) => {
            let rights = AccessFs::from_all(WANTED) & !AccessFs::Execute & !AccessFs::IoctlDev & !AccessFs::MakeSock;
            ruleset.add_rule(PathBeneath::new(root, rights))?
        }
        None => ruleset,
    };
    Ok(match ruleset.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Landlock::Full,
        RulesetStatus::PartiallyEnforced => Landlock::Partial,
        RulesetStatus::NotEnforced => Landlock::Absent,
    })
}

/// All other calls fail with EPERM: an unpacker that meets one tells what it was doing.
fn filter(calls: &[i64]) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALWAYS.iter().chain(calls).map(|n| (*n, Vec::new())).collect();
    // Memory that can be run comes from nowhere.
    let exec = libc::PROT_EXEC.unsigned_abs().into();
    let no_exec =
        SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(exec), 0).map(|c| vec![c])?;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![SeccompRule::new(no_exec.clone())?]);
    }
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, arch)?.try_into()
}
