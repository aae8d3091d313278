//! The built-in seccomp profile as the kernel enforces it: what a container may call with which capabilities.
//!
//! Run by `cargo test --test seccomp`, as root; needs gcc. The probe makes each call with arguments that the kernel refuses
//! with anything but EPERM once the filter lets it through, so that the errno tells who refused.

mod support;

use std::collections::BTreeMap;
use std::process::Command;

use k8s_cri::v1 as cri;
use support::client::{Client, block_on, container, create_request, pod};
use support::crictl::BUSYBOX;
use support::isolated;
use support::node::{Node, Options};

const EPERM: i32 = libc::EPERM;
const ENOSYS: i32 = libc::ENOSYS;

/// Calls by name with the argument that the probe gets.
fn probes() -> Vec<(&'static str, String)> {
    let n = |number: i64| number.to_string();
    vec![
        ("getpid", n(libc::SYS_getpid)),
        ("ptrace", format!("{}:0x4206", libc::SYS_ptrace)), // PTRACE_SEIZE of pid -1
        ("personality", format!("{}:0xffffffff", libc::SYS_personality)),
        ("personality-odd", format!("{}:0x1", libc::SYS_personality)),
        ("socket-vsock", format!("{}:40", libc::SYS_socket)),
        ("keyctl", n(libc::SYS_keyctl)),
        ("add_key", n(libc::SYS_add_key)),
        ("io_uring_setup", n(libc::SYS_io_uring_setup)),
        ("userfaultfd", n(libc::SYS_userfaultfd)),
        ("kexec_load", n(libc::SYS_kexec_load)),
        ("clone3", n(libc::SYS_clone3)),
        ("clone-newuser", format!("{}:0x10000000", libc::SYS_unshare)),
        ("mount", n(libc::SYS_mount)),
        ("setns", n(libc::SYS_setns)),
        ("bpf", n(libc::SYS_bpf)),
        ("perf_event_open", n(libc::SYS_perf_event_open)),
        ("open_by_handle_at", n(libc::SYS_open_by_handle_at)),
        ("kcmp", n(libc::SYS_kcmp)),
        ("pidfd_getfd", n(libc::SYS_pidfd_getfd)),
        ("chroot", n(libc::SYS_chroot)),
        ("settimeofday", n(libc::SYS_settimeofday)),
        ("init_module", n(libc::SYS_init_module)),
        ("mbind", n(libc::SYS_mbind)),
        ("syslog", n(libc::SYS_syslog)),
        ("iopl", n(libc::SYS_iopl)),
    ]
}

/// Errno of each probe in a container with `add` and `drop`, and seccomp as `profile`.
async fn verdicts(
    node: &Node,
    program: &str,
    name: &str,
    (add, drop): (&[&str], &[&str]),
    profile: i32,
) -> BTreeMap<&'static str, i32> {
    let mut c = Client::connect(&node.socket()).await;
    let pod = pod(name, &node.pod_logs(name));
    let request = cri::RunPodSandboxRequest { config: Some(pod.clone()), ..Default::default() };
    let id = c.runtime.run_pod_sandbox(request).await.expect("RunPodSandbox").into_inner().pod_sandbox_id;
    let mut config = container("probe", BUSYBOX, "sleep 600");
    config.mounts.push(cri::Mount {
        container_path: "/probe".into(),
        host_path: program.into(),
        readonly: true,
        ..Default::default()
    });
    let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    security.seccomp = Some(cri::SecurityProfile { profile_type: profile, localhost_ref: String::new() });
    security.capabilities = Some(cri::Capability {
        add_capabilities: add.iter().map(|s| s.to_string()).collect(),
        drop_capabilities: drop.iter().map(|s| s.to_string()).collect(),
        ..Default::default()
    });
    let created = c.runtime.create_container(create_request(&id, config, &pod)).await.expect("CreateContainer");
    let container_id = created.into_inner().container_id;
    let start = cri::StartContainerRequest { container_id: container_id.clone() };
    c.runtime.start_container(start).await.expect("StartContainer");
    let probes = probes();
    let cmd = std::iter::once("/probe".to_string()).chain(probes.iter().map(|(_, p)| p.clone())).collect();
    let done = c.runtime.exec_sync(cri::ExecSyncRequest { container_id, cmd, timeout: 30 }).await.expect("ExecSync");
    let done = done.into_inner();
    let text = String::from_utf8(done.stdout).expect("text");
    assert_eq!(
        (done.exit_code, text.lines().count()),
        (0, probes.len()),
        "{text}{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let errno = |line: &str| line.rsplit(' ').next().and_then(|n| n.parse().ok()).expect("an errno");
    let verdicts = probes.iter().zip(text.lines()).map(|((name, _), line)| (*name, errno(line))).collect();
    c.runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id }).await.expect("RemovePodSandbox");
    verdicts
}

#[test]
fn each_capability_opens_its_calls_and_nothing_else() {
    // The environment has no compiler: the probe is made before it is entered.
    let program = concat!(env!("CARGO_TARGET_TMPDIR"), "/syscalls");
    if std::env::var_os("LXCRI_TEST_ENV").is_none() {
        #[allow(clippy::disallowed_methods)] // a test compiles its own probe
        let compiled = Command::new("gcc")
            .args(["-static", "-O1", "-Wall", "-Werror", "-o", program])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/c/syscalls.c"))
            .output()
            .expect("gcc");
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    }
    isolated("each_capability_opens_its_calls_and_nothing_else", || {
        let node = Node::start(Options::default());
        block_on(async {
            Client::connect(&node.socket()).await.pull(BUSYBOX).await;
            let (default, unconfined) = (0, 1);

            let base = verdicts(&node, program, "base", (&[], &[]), default).await;
            for call in [
                "keyctl",
                "add_key",
                "io_uring_setup",
                "userfaultfd",
                "kexec_load",
                "clone-newuser",
                "mount",
                "setns",
                "bpf",
                "perf_event_open",
                "open_by_handle_at",
                "kcmp",
                "pidfd_getfd",
                "settimeofday",
                "init_module",
                "mbind",
                "syslog",
                "iopl",
                "socket-vsock",
                "personality-odd",
            ] {
                assert_eq!(base[call], EPERM, "{call} by default");
            }
            assert_eq!(base["clone3"], ENOSYS, "C libraries fall back to clone upon it");
            for call in ["getpid", "personality"] {
                assert_eq!(base[call], 0, "{call}");
            }
            for call in ["ptrace", "chroot"] {
                assert_ne!(base[call], EPERM, "{call} is let through");
            }

            // Each with one capability more: its own calls are let through, the others stay shut.
            let opened: [(&str, &[&str]); 9] = [
                ("SYS_ADMIN", &["mount", "setns", "bpf", "perf_event_open", "clone3", "clone-newuser"]),
                ("DAC_READ_SEARCH", &["open_by_handle_at"]),
                ("SYS_PTRACE", &["kcmp", "pidfd_getfd"]),
                ("SYS_TIME", &["settimeofday"]),
                ("SYS_MODULE", &["init_module"]),
                ("SYS_NICE", &["mbind"]),
                ("SYSLOG", &["syslog"]),
                ("SYS_RAWIO", &["iopl"]),
                ("BPF", &["bpf"]),
            ];
            for (capability, calls) in opened {
                let name = capability.to_lowercase().replace('_', "-");
                let with = verdicts(&node, program, &name, (&[capability], &[]), default).await;
                for (call, errno) in &with {
                    if calls.contains(call) {
                        let shut = if *call == "clone3" { ENOSYS } else { EPERM };
                        assert_ne!(*errno, shut, "{call} with {capability}");
                    } else {
                        assert_eq!(*errno, base[call], "{call} with {capability}");
                    }
                }
            }

            let bare = verdicts(&node, program, "bare", (&[], &["ALL"]), default).await;
            assert_eq!(bare["chroot"], EPERM, "without SYS_CHROOT");
            let open = verdicts(&node, program, "open", (&[], &[]), unconfined).await;
            assert_ne!(open["keyctl"], EPERM);
            assert_ne!(open["clone3"], ENOSYS);
        });
    });
}
