//! The Debian package: what is in it, what it needs, and that its scripts stop nothing in an upgrade.
//!
//! Run by `make test`; needs dpkg-deb, binutils and lintian. Leaves nothing.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use support::{daemon_program, lxc_helper, lxc_init, monitor_program, relay_program, repository, run};

/// The package of this build's programs, and its unpacked files with `DEBIAN`.
struct Package {
    _folder: tempfile::TempDir,
    deb: PathBuf,
    tree: PathBuf,
}

static PACKAGE: LazyLock<Package> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let deb = make(folder.path(), "1.2.3");
    let tree = folder.path().join("tree");
    run(Command::new("dpkg-deb").arg("-R").args([&deb, &tree]));
    Package { _folder: folder, deb, tree }
});

fn make(out: &Path, version: &str) -> PathBuf {
    let mut command = Command::new(repository().join("scripts/deb"));
    command.args(["--version", version, "--out"]).arg(out).env("DEB_COMPRESSION", "none");
    command.env("LXCRI_BIN", daemon_program()).env("LXCRI_MONITOR", monitor_program());
    command.env("LXCRI_RELAY", relay_program());
    command.env("LXCRI_LXC", lxc_helper()).env("LXCRI_LXC_INIT", lxc_init());
    run(&mut command).trim().into()
}

fn field(name: &str) -> String {
    run(Command::new("dpkg-deb").arg("-f").arg(&PACKAGE.deb).arg(name)).trim().to_owned()
}

fn programs() -> Vec<PathBuf> {
    let libexec = "usr/libexec/proxmox-lxcri/proxmox-lxcri";
    [
        "usr/bin/proxmox-lxcri".into(),
        format!("{libexec}-monitor"),
        format!("{libexec}-guest-relay"),
        format!("{libexec}-lxc"),
        format!("{libexec}-lxc-init"),
    ]
    .map(|p| PACKAGE.tree.join(p))
    .to_vec()
}

#[test]
fn every_file_is_where_it_belongs_and_is_roots() {
    let listed = run(Command::new("dpkg-deb").arg("-c").arg(&PACKAGE.deb));
    let mut files = BTreeMap::new();
    for line in listed.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[1], "root/root", "{line}");
        let (mode, path) = (words[0], words[5].trim_start_matches("./"));
        assert!(mode.starts_with(['-', 'd', 'l']), "{line}");
        if mode.starts_with('-') {
            files.insert(path, mode);
        } else if mode.starts_with('d') {
            assert_eq!(mode, "drwxr-xr-x", "{line}");
        }
    }
    for (path, mode) in [
        ("usr/bin/proxmox-lxcri", "-rwxr-xr-x"),
        ("usr/libexec/proxmox-lxcri/proxmox-lxcri-monitor", "-rwxr-xr-x"),
        ("usr/libexec/proxmox-lxcri/proxmox-lxcri-guest-relay", "-rwxr-xr-x"),
        ("usr/libexec/proxmox-lxcri/proxmox-lxcri-lxc", "-rwxr-xr-x"),
        ("usr/libexec/proxmox-lxcri/proxmox-lxcri-lxc-init", "-rwxr-xr-x"),
        ("usr/lib/systemd/system/proxmox-lxcri.service", "-rw-r--r--"),
        ("etc/proxmox-lxcri/config.toml", "-rw-r--r--"),
        ("etc/sysctl.d/30-proxmox-lxcri.conf", "-rw-r--r--"),
        ("etc/modules-load.d/proxmox-lxcri.conf", "-rw-r--r--"),
        ("usr/share/proxmox-lxcri/crictl.yaml", "-rw-r--r--"),
        ("usr/share/proxmox-lxcri/runtimeclasses.yaml", "-rw-r--r--"),
        ("usr/share/proxmox-lxcri/kubelet/20-proxmox-lxcri.conf", "-rw-r--r--"),
        ("usr/share/proxmox-lxcri/kubelet/90-proxmox-lxcri.conf", "-rw-r--r--"),
        ("usr/share/proxmox-lxcri/monitoring/alerts.yaml", "-rw-r--r--"),
        ("usr/share/proxmox-lxcri/monitoring/dashboard.json", "-rw-r--r--"),
        ("usr/share/proxmox-lxcri/proxmox/role.sh", "-rwxr-xr-x"),
        ("usr/share/man/man1/proxmox-lxcri.1.gz", "-rw-r--r--"),
        ("usr/share/man/man1/proxmox-lxcri-config-migrate.1.gz", "-rw-r--r--"),
        ("usr/share/bash-completion/completions/proxmox-lxcri", "-rw-r--r--"),
        ("usr/share/zsh/vendor-completions/_proxmox-lxcri", "-rw-r--r--"),
        ("usr/share/fish/vendor_completions.d/proxmox-lxcri.fish", "-rw-r--r--"),
        ("usr/share/doc/proxmox-lxcri/copyright", "-rw-r--r--"),
        ("usr/share/doc/proxmox-lxcri/changelog.gz", "-rw-r--r--"),
    ] {
        assert_eq!(files.get(path), Some(&mode), "{path}\n{listed}");
    }
    for path in files.keys() {
        let known = [
            "usr/bin/",
            "usr/libexec/proxmox-lxcri/",
            "usr/lib/systemd/",
            "usr/share/",
            "etc/proxmox-lxcri/",
            "etc/sysctl.d/30-proxmox-lxcri.conf",
            "etc/modules-load.d/proxmox-lxcri.conf",
        ];
        assert!(known.iter().any(|k| path.starts_with(k)), "{path}: what is it doing there?");
        let runs = path.starts_with("usr/bin/") || path.contains("/libexec/") || path.ends_with(".sh");
        assert_eq!(files[path].contains('x'), runs, "{path} is {}", files[path]);
    }
    run(Command::new("md5sum").args(["--strict", "-c", "DEBIAN/md5sums"]).current_dir(&PACKAGE.tree));
    let summed = std::fs::read_to_string(PACKAGE.tree.join("DEBIAN/md5sums")).unwrap().lines().count();
    assert_eq!(summed, files.keys().filter(|p| !p.starts_with("etc/")).count(), "all but the configuration has a sum");
}

#[test]
fn the_unit_and_the_daemon_find_what_is_installed() {
    let unit = std::fs::read_to_string(PACKAGE.tree.join("usr/lib/systemd/system/proxmox-lxcri.service")).unwrap();
    let start = unit.lines().find_map(|l| l.strip_prefix("ExecStart=/")).unwrap();
    assert!(PACKAGE.tree.join(start.split(' ').next().unwrap()).is_file(), "{start}");
    for line in ["Type=notify", "Delegate=yes", "KillMode=process", "WatchdogSec=60s"] {
        assert!(unit.lines().any(|l| l == line), "{line}");
    }
    let after = unit.lines().find_map(|l| l.strip_prefix("After=")).unwrap();
    assert!(after.split(' ').any(|u| u == "pve-guests.service"), "{after}");
    // The configuration that it brings is one, and is kept when the administrator has changed it.
    let conffiles = std::fs::read_to_string(PACKAGE.tree.join("DEBIAN/conffiles")).unwrap();
    let of_the_kernel = ["/etc/modules-load.d/proxmox-lxcri.conf", "/etc/sysctl.d/30-proxmox-lxcri.conf"];
    let wanted = [of_the_kernel[0], "/etc/proxmox-lxcri/config.toml", of_the_kernel[1]].map(|p| format!("{p}\n"));
    assert_eq!(conffiles, wanted.concat());
    // What is set by itself is what is safe on a node with guests; the rest is there to be turned on, under the names that doctor tells.
    let [modules, sysctls] = of_the_kernel.map(|p| std::fs::read_to_string(PACKAGE.tree.join(&p[1..])).unwrap());
    let set = |text: &str| -> Vec<String> {
        text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')).map(str::to_owned).collect()
    };
    assert_eq!(
        (set(&sysctls), set(&modules)),
        (vec!["net.ipv4.ip_forward = 1".to_owned()], vec!["overlay".to_owned()])
    );
    assert!(sysctls.contains("\n#net.bridge.bridge-nf-call-iptables = 1\n") && modules.contains("\n#br_netfilter\n"));
    let (config, folder) =
        (PACKAGE.tree.join("etc/proxmox-lxcri/config.toml"), PACKAGE.tree.join("etc/proxmox-lxcri/conf.d"));
    assert!(folder.is_dir());
    run(Command::new(daemon_program())
        .args(["config", "check", "--config"])
        .arg(config)
        .arg("--config-dir")
        .arg(folder));
    let crictl = std::fs::read_to_string(PACKAGE.tree.join("usr/share/proxmox-lxcri/crictl.yaml")).unwrap();
    let socket = proxmox_lxcri::core::config::Config::default().server.listen;
    assert!(crictl.contains(&format!("runtime-endpoint: unix://{socket}\n")), "{crictl}");
}

#[test]
fn its_programs_need_what_it_says_and_no_newer_processor() {
    let depends = field("Depends");
    for package in ["libc6 (>= 2.", "libgcc-s1", "crun (>= 1.8)", "iproute2"] {
        assert!(depends.contains(package), "{package}: {depends}");
    }
    assert_eq!((field("Version"), field("Architecture")), ("1.2.3".into(), "amd64".into()));
    let least = depends.split("libc6 (>= 2.").nth(1).unwrap().split(')').next().unwrap().parse::<u32>().unwrap();
    for program in programs() {
        let (name, told) = (program.display(), run(Command::new("objdump").arg("-p").arg(&program)));
        let needed: Vec<&str> = told.lines().filter_map(|l| l.trim().strip_prefix("NEEDED")).map(str::trim).collect();
        let fixed = ["proxmox-lxcri-monitor", "proxmox-lxcri-guest-relay", "proxmox-lxcri-lxc-init"];
        if fixed.iter().any(|name| program.ends_with(name)) {
            assert!(needed.is_empty(), "{name} is to be static: {needed:?}");
        } else {
            // Of libc6 and libgcc-s1.
            let known =
                ["libc.so.6", "libm.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "libdl.so.2", "libpthread.so.0"];
            assert!(!needed.is_empty() && needed.iter().all(|n| known.contains(n)), "{name}: {needed:?}");
        }
        for word in told.split_whitespace().filter_map(|w| w.strip_prefix("GLIBC_2.")) {
            let minor: u32 = word.split('.').next().unwrap().parse().unwrap();
            assert!(minor <= least, "{name} needs glibc 2.{minor}, the package says 2.{least}");
        }
        let notes = run(Command::new("readelf").args(["-n", "-W"]).arg(&program));
        for line in notes.lines().filter(|l| l.contains("ISA needed")) {
            assert!(!line.contains("-v2") && !line.contains("-v3") && !line.contains("-v4"), "{name}: {line}");
        }
        let sections = run(Command::new("readelf").args(["-S", "-W"]).arg(&program));
        assert!(!sections.contains(".debug_info") && !sections.contains(".symtab"), "{name} is not stripped");
    }
    for flags in ["RUSTFLAGS", ".cargo/config.toml", "Cargo.toml", "scripts/build", "scripts/deb"] {
        let text =
            std::fs::read_to_string(repository().join(flags)).or_else(|_| std::env::var(flags)).unwrap_or_default();
        assert!(!text.contains("target-cpu"), "{flags} builds for one kind of processor");
    }
}

/// dpkg calls `prerm upgrade` of the old version before it unpacks the new one: nothing may be stopped by it.
#[test]
fn an_upgrade_stops_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let calls = folder.path().join("calls");
    for name in ["systemctl", "deb-systemd-invoke", "deb-systemd-helper", "proxmox-lxcri", "kill", "rm", "umount"] {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\necho \"{name} $*\" >> {}\n", calls.display())).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.path().display());
    let script = |name: &str, args: &[&str]| {
        run(Command::new(PACKAGE.tree.join("DEBIAN").join(name)).args(args).env("PATH", &path));
    };
    script("prerm", &["upgrade", "2.0"]);
    script("prerm", &["failed-upgrade", "1.0"]);
    script("postrm", &["upgrade", "2.0"]);
    script("postrm", &["failed-upgrade", "1.0"]);
    script("postrm", &["abort-upgrade", "1.0"]);
    assert!(!calls.exists(), "{}", std::fs::read_to_string(&calls).unwrap());
    // The scripts do call what is put in their way.
    script("prerm", &["remove"]);
    assert!(std::fs::read_to_string(&calls).unwrap().contains("proxmox-lxcri config dump"));
    for name in ["postinst", "prerm", "postrm"] {
        run(Command::new("sh").arg("-n").arg(PACKAGE.tree.join("DEBIAN").join(name)));
        assert!(!std::fs::read_to_string(PACKAGE.tree.join("DEBIAN").join(name)).unwrap().contains('@'), "{name}");
    }
}

#[test]
fn the_same_programs_make_the_same_package() {
    let folder = tempfile::tempdir().unwrap();
    let again = make(folder.path(), "1.2.3");
    assert!(std::fs::read(&PACKAGE.deb).unwrap() == std::fs::read(again).unwrap(), "two packages differ");
}

/// Debian's own lints. What is left out does not fit a package that is in no archive.
#[test]
fn lintian_finds_nothing() {
    let left_out = [
        "embedded-library",
        "initial-upload-closes-no-bugs",
        // dpkg-deb makes it from programs that are built already: no source package
        "unknown-field",
        // only here, where it is of a debug build and soon gone
        "uses-no-compression-for-control-tarball",
        "uses-no-compression-for-data-tarball",
    ];
    let mut command = Command::new("lintian");
    command.args(["--fail-on", "error,warning", "--tag-display-limit", "0", "--suppress-tags"]).arg(left_out.join(","));
    if rustix::process::geteuid().is_root() {
        command.arg("--allow-root");
    }
    let out = command.arg(&PACKAGE.deb).output().unwrap();
    let told = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{told}{}", String::from_utf8_lossy(&out.stderr));
}

/// dpkg itself, in a root of Debian's: what the scripts do without systemd, with a pod that knows nothing of it.
#[test]
fn dpkg_installs_upgrades_and_removes_it_under_a_pod() {
    let folder = support::target_folder().join("test-packages");
    if std::env::var_os("LXCRI_TEST_ENV").is_none() {
        std::fs::create_dir_all(&folder).unwrap();
        for version in ["1.0", "2.0"] {
            make(&folder, version);
        }
    }
    support::isolated("dpkg_installs_upgrades_and_removes_it_under_a_pod", || {
        let deb = |version: &str| folder.join(format!("proxmox-lxcri_{version}_amd64.deb")).display().to_string();
        let dpkg = |args: &[&str]| {
            let out = Command::new("dpkg").args(args).output().unwrap();
            assert!(out.status.success(), "dpkg {args:?}: {}", support::describe(&out));
            String::from_utf8_lossy(&out.stderr).into_owned()
        };
        let lxcri = |args: &[&str]| run(Command::new("/usr/bin/proxmox-lxcri").args(args)).trim().to_owned();
        let daemon = || {
            let log = std::fs::File::create("/tmp/daemon.log").unwrap();
            let mut daemon = Command::new("/usr/bin/proxmox-lxcri").arg("serve").stderr(log).spawn().unwrap();
            support::wait_for("the daemon", Duration::from_secs(30), || {
                assert!(
                    daemon.try_wait().unwrap().is_none(),
                    "{}",
                    std::fs::read_to_string("/tmp/daemon.log").unwrap()
                );
                Command::new("/usr/bin/proxmox-lxcri").arg("ps").output().unwrap().status.success().then_some(())
            });
            daemon
        };
        let end = |mut daemon: std::process::Child| {
            rustix::process::kill_process(rustix::process::Pid::from_child(&daemon), rustix::process::Signal::TERM)
                .unwrap();
            assert!(daemon.wait().unwrap().success());
        };
        dpkg(&["-i", "--force-depends", &deb("1.0")]);
        assert!(Path::new("/etc/crictl.yaml").is_file());
        std::fs::write("/etc/proxmox-lxcri/conf.d/10.toml", "[runtime]\ncgroup_driver = \"cgroupfs\"\n").unwrap();
        let first = daemon();
        let image = format!("oci:{}", support::given("LXCRI_IMAGES").join("oci/busybox").display());
        let script = "trap 'exit 3' TERM; echo $$; while :; do sleep 0.1; done";
        let id = lxcri(&["run", "--detach", "--host-network", "--name", "c", &image, "sh", "-c", script]);
        let dump: serde_json::Value = serde_json::from_str(&lxcri(&["debug", "dump"])).unwrap();
        let pid = dump["engine"]["pods"][0]["containers"][0]["pid"].as_u64().unwrap();
        let birth = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit(") ").next().unwrap().split(' ').nth(19).unwrap().to_owned()
        };
        let born = birth();

        dpkg(&["-i", "--force-depends", &deb("2.0")]);
        let version = || run(Command::new("dpkg-query").args(["-W", "-f", "${Version}", "proxmox-lxcri"]));
        assert_eq!((version().as_str(), birth()), ("2.0", born.clone()));
        end(first);
        let second = daemon();
        assert_eq!(lxcri(&["exec", "c", "echo", "in"]), "in");
        end(second);
        let told = dpkg(&["-r", "proxmox-lxcri"]);
        assert!(told.contains("1 pods are left"), "{told}");
        let told = dpkg(&["-P", "proxmox-lxcri"]);
        assert!(told.contains("pods are left") && Path::new("/var/lib/proxmox-lxcri/pods").is_dir(), "{told}");
        assert_eq!(birth(), born, "the container has gone with the package");

        dpkg(&["-i", "--force-depends", &deb("2.0")]);
        let third = daemon();
        assert_eq!(birth(), born);
        lxcri(&["stop", &id]);
        let dump: serde_json::Value = serde_json::from_str(&lxcri(&["debug", "dump"])).unwrap();
        assert_eq!(dump["engine"]["pods"][0]["containers"][0]["exitCode"], 3, "{dump}");
        lxcri(&["rm", &id]);
        end(third);
        std::fs::remove_file("/etc/proxmox-lxcri/conf.d/10.toml").unwrap();
        dpkg(&["-P", "proxmox-lxcri"]);
        for path in [
            "/var/lib/proxmox-lxcri",
            "/run/proxmox-lxcri",
            "/etc/proxmox-lxcri",
            "/etc/crictl.yaml",
            "/usr/libexec/proxmox-lxcri",
        ] {
            assert!(!Path::new(path).exists(), "{path} is left");
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(" /run/proxmox-lxcri"), "{mounts}");
    });
}
