//! The built-in seccomp profile (RuntimeDefault) and the reading of Localhost ones.
//!
//! An allow list: what is not named fails with EPERM. Some calls are allowed only to containers that hold the
//! capability they need anyway, so that the kernel's own check is not the only one. clone3 can't be filtered by its
//! flags (they are behind a pointer): it fails with ENOSYS, upon which C libraries use clone.

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompBuilder,
    LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

use crate::core::caps::CapSet;
use crate::core::error::{Error, Kind, Result};

/// Always allowed.
const ALLOWED: &str = "accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32 \
    clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep \
    clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 \
    epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit \
    exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 \
    fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat \
    fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait \
    futex_waitv futex_wake futimesat getcpu getcwd getdents getdents64 getegid getegid32 geteuid geteuid32 getgid \
    getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom \
    getresgid getresgid32 getresuid getresuid32 getrlimit get_robust_list getrusage getsid getsockname getsockopt \
    get_thread_area gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init \
    inotify_init1 inotify_rm_watch io_cancel ioctl io_destroy io_getevents io_pgetevents io_pgetevents_time64 \
    ioprio_get ioprio_set io_setup io_submit ipc kill landlock_add_rule landlock_create_ruleset \
    landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount listxattr listxattrat llistxattr \
    _llseek lremovexattr lseek lsetxattr lstat lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret \
    mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open \
    mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget \
    msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat _newselect open openat \
    openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 \
    prctl pread64 preadv preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev ptrace pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read \
    readahead readlink readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr \
    removexattrat rename renameat renameat2 restart_syscall riscv_hwprobe rmdir rseq rt_sigaction rt_sigpending \
    rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 \
    rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam sched_get_priority_max sched_get_priority_min \
    sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr \
    sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64 \
    send sendfile sendfile64 sendmmsg sendmsg sendto setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 \
    setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid \
    setresuid32 setreuid setreuid32 setrlimit set_robust_list setsid setsockopt set_thread_area set_tid_address \
    setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 \
    sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs statfs64 statmount statx symlink symlinkat \
    sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime \
    timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime \
    timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime \
    utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev";

/// Allowed with a capability.
const WITH_CAPABILITY: &[(&str, &str)] = &[
    ("DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr \
         lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree perf_event_open quotactl \
         quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("SYS_BOOT", "reboot"),
    ("SYS_CHROOT", "chroot"),
    ("SYS_MODULE", "delete_module finit_module init_module query_module"),
    ("SYS_PACCT", "acct"),
    ("SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("SYS_RAWIO", "ioperm iopl"),
    ("SYS_TIME", "clock_settime clock_settime64 settimeofday stime"),
    ("SYS_TTY_CONFIG", "vhangup"),
    ("SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("SYSLOG", "syslog"),
    ("BPF", "bpf"),
    ("PERFMON", "perf_event_open"),
];

/// Flags of clone(2) that make namespaces, cgroup and time namespaces apart.
const CLONE_NEW: u64 = 0x7E02_0000;
/// Values of personality(2) that only ask or set Linux with or without the old layout.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
/// AF_VSOCK: reaches the hypervisor, not namespaced.
const AF_VSOCK: u64 = 40;

fn built<T>(result: std::result::Result<T, impl std::error::Error + Send + Sync + 'static>) -> Result<T> {
    result.map_err(|e| Error::because(Kind::Internal, "build the seccomp profile", e))
}

fn allow(names: &str) -> Result<LinuxSyscall> {
    let names: Vec<String> = names.split_whitespace().map(String::from).collect();
    built(LinuxSyscallBuilder::default().names(names).action(LinuxSeccompAction::ScmpActAllow).build())
}

fn allow_if(name: &str, args: Vec<LinuxSeccompArg>) -> Result<LinuxSyscall> {
    built(
        LinuxSyscallBuilder::default()
            .names(vec![name.to_string()])
            .action(LinuxSeccompAction::ScmpActAllow)
            .args(args)
            .build(),
    )
}

fn argument(index: usize, op: LinuxSeccompOperator, value: u64, value_two: Option<u64>) -> Result<LinuxSeccompArg> {
    let mut arg = LinuxSeccompArgBuilder::default().index(index).op(op).value(value);
    if let Some(two) = value_two {
        arg = arg.value_two(two);
    }
    built(arg.build())
}

/// The profile of a container that holds `caps`.
pub fn runtime_default(caps: CapSet) -> Result<LinuxSeccomp> {
    let mut calls = vec![allow(ALLOWED)?];
    for persona in PERSONALITIES {
        calls.push(allow_if("personality", vec![argument(0, LinuxSeccompOperator::ScmpCmpEq, persona, None)?])?);
    }
    calls.push(allow_if("socket", vec![argument(0, LinuxSeccompOperator::ScmpCmpNe, AF_VSOCK, None)?])?);
    let arches = if cfg!(target_arch = "aarch64") {
        vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm]
    } else {
        calls.push(allow("arch_prctl modify_ldt")?);
        vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]
    };
    if cfg!(target_arch = "aarch64") {
        calls.push(allow("arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls")?);
    }
    for (capability, names) in WITH_CAPABILITY {
        if caps.has(capability) {
            calls.push(allow(names)?);
        }
    }
    if !caps.has("SYS_ADMIN") {
        let masked = argument(0, LinuxSeccompOperator::ScmpCmpMaskedEq, CLONE_NEW, Some(0))?;
        calls.push(allow_if("clone", vec![masked])?);
        calls.push(built(
            LinuxSyscallBuilder::default()
                .names(vec!["clone3".to_string()])
                .action(LinuxSeccompAction::ScmpActErrno)
                .errno_ret(libc::ENOSYS as u32)
                .build(),
        )?);
    }
    built(
        LinuxSeccompBuilder::default()
            .default_action(LinuxSeccompAction::ScmpActErrno)
            .default_errno_ret(libc::EPERM as u32)
            .architectures(arches)
            .syscalls(calls)
            .build(),
    )
}

/// A profile from the JSON text of a Localhost file that errors call `name`.
pub fn parse(text: &str, name: &str) -> Result<LinuxSeccomp> {
    serde_json::from_str(text).map_err(|e| Error::because(Kind::InvalidArgument, format!("seccomp profile {name}"), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(caps: &[&str], call: &str) -> Vec<LinuxSeccompAction> {
        let profile = runtime_default(CapSet::of(caps).expect("caps")).expect("profile");
        let all = profile.syscalls().clone().unwrap_or_default();
        all.iter().filter(|s| s.names().iter().any(|n| n == call)).map(|s| s.action()).collect()
    }

    #[test]
    fn capabilities_open_what_they_need() {
        assert!(verdicts(&[], "mount").is_empty());
        assert_eq!(verdicts(&["SYS_ADMIN"], "mount"), [LinuxSeccompAction::ScmpActAllow]);
        assert_eq!(verdicts(&[], "clone3"), [LinuxSeccompAction::ScmpActErrno]);
        assert_eq!(verdicts(&["SYS_ADMIN"], "clone3"), [LinuxSeccompAction::ScmpActAllow]);
        assert!(verdicts(&[], "keyctl").is_empty() && verdicts(&[], "io_uring_setup").is_empty());
        assert_eq!(verdicts(&["SYS_PTRACE"], "kcmp"), [LinuxSeccompAction::ScmpActAllow]);
    }

    #[test]
    fn no_call_stands_twice_in_the_list() {
        let mut names: Vec<_> = ALLOWED.split_whitespace().collect();
        let n = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), n);
    }

    #[test]
    fn broken_profiles_are_named() {
        let e = parse("{\"defaultAction\": 3}", "localhost/x.json").expect_err("broken");
        assert!(e.chain().contains("localhost/x.json"), "{}", e.chain());
    }
}
