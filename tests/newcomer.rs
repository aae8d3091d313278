//! The way of somebody who knows nothing but README.md: its commands, taken out of it, are run one after the other as they stand there. A
//! command that this test does not know is run; one that can't be had here (systemd, apt, the long builds) has its stand-in
//! in [`STAND_INS`], by its own words.
//!
//! Run by `make test`, as root. A crash leaves nothing: see `support`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod support;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use support::{repository, wait_for};

/// What stands for a command that can't be run here.
#[derive(Debug, Clone, Copy)]
enum StandIn {
    /// It is what the suites themselves are, or what they have built before: `make` has it.
    Make,
    /// What apt would install is what `tests/package.rs` and the node's guest install by dpkg.
    Apt,
    /// The daemon is started by what the unit says.
    Start,
    /// The same, after its end.
    Restart,
    /// A terminal is given to it, and the registry's image is one that is here.
    Terminal,
    /// It may find what a test's environment lacks: what counts is that it looks, and says what to do.
    Looks,
}

/// Commands of the document, as they stand there, each of which has to be there.
const STAND_INS: &[(&str, StandIn)] = &[
    ("make run", StandIn::Make),
    ("make test", StandIn::Make),
    ("make deb", StandIn::Make),
    ("apt install ./target/deb/proxmox-lxcri_*_amd64.deb", StandIn::Apt),
    ("make build", StandIn::Make),
    ("systemctl enable --now proxmox-lxcri", StandIn::Start),
    ("systemctl restart proxmox-lxcri", StandIn::Restart),
    ("proxmox-lxcri doctor", StandIn::Looks),
    ("proxmox-lxcri run --rm -it busybox sh", StandIn::Terminal),
];

/// The document's commands: lines of its blocks, without the words behind them.
fn commands() -> Vec<String> {
    let text = std::fs::read_to_string(repository().join("README.md")).unwrap();
    let mut found = Vec::new();
    let mut before = "";
    for line in text.lines() {
        if let Some(command) = line.strip_prefix("    ").filter(|c| !c.starts_with(' ')) {
            assert!(before.is_empty() || before.starts_with("    "), "a block without an empty line above: {line}");
            found.push(command.split("  #").next().unwrap().trim().to_owned());
        }
        before = line;
    }
    assert!(found.len() > 12, "{found:?}");
    found
}

/// The daemon of the unit that was installed.
struct Daemon(Option<Child>);

impl Daemon {
    fn start(&mut self) {
        let unit = std::fs::read_to_string("/etc/systemd/system/proxmox-lxcri.service").expect("the unit");
        let command = unit.lines().find_map(|l| l.strip_prefix("ExecStart=")).expect("what it starts");
        let log = std::fs::File::options().create(true).append(true).open("/tmp/daemon.log").unwrap();
        let mut words = command.split(' ');
        let mut daemon = Command::new(words.next().unwrap()).args(words).stderr(log).spawn().unwrap();
        wait_for("the daemon", Duration::from_secs(30), || {
            let ended = daemon.try_wait().unwrap();
            assert!(ended.is_none(), "{}", std::fs::read_to_string("/tmp/daemon.log").unwrap());
            Command::new("proxmox-lxcri").arg("ps").output().unwrap().status.success().then_some(())
        });
        self.0 = Some(daemon);
    }

    fn stop(&mut self) {
        let Some(mut daemon) = self.0.take() else { return };
        let pid = rustix::process::Pid::from_child(&daemon);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(daemon.wait().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.0 {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

fn isolated(name: &str, body: impl FnOnce()) {
    support::isolated_in("trixie", name, support::monitor_program, &[("LXCRI_RELAY", support::relay_program)], body);
}

/// A checkout after `make build`: the programs of this build in the release's places.
fn checkout(tree: &Path, programs: [PathBuf; 5]) {
    let fixed = "target/x86_64-unknown-linux-musl/monitor";
    let places = [
        "target/release/proxmox-lxcri".to_owned(),
        format!("{fixed}/proxmox-lxcri-monitor"),
        format!("{fixed}/proxmox-lxcri-guest-relay"),
        format!("{fixed}/proxmox-lxcri-lxc-init"),
        "target/monitor/proxmox-lxcri-lxc".to_owned(),
    ];
    for (place, program) in places.into_iter().zip(programs) {
        let place = tree.join(place);
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        symlink(program, place).unwrap();
    }
    for folder in ["deploy", "scripts"] {
        symlink(repository().join(folder), tree.join(folder)).unwrap();
    }
}

#[test]
fn the_readme_is_all_that_a_newcomer_needs() {
    let all = commands();
    for (command, _) in STAND_INS {
        assert!(all.iter().any(|c| c == command), "README.md has no command {command:?} any more");
    }
    isolated("the_readme_is_all_that_a_newcomer_needs", || {
        let tree = Path::new("/tmp/checkout");
        checkout(tree, ["BIN", "MONITOR", "RELAY", "LXC_INIT", "LXC"].map(|p| support::given(&format!("LXCRI_{p}"))));
        let makefile = std::fs::read_to_string(repository().join("Makefile")).unwrap();
        let (mut daemon, mut said) = (Daemon(None), String::new());
        for command in commands() {
            let shell = |text: &str| {
                let out =
                    Command::new("bash").args(["-ec", text]).current_dir(tree).stdin(Stdio::null()).output().unwrap();
                let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
                (out.status.code(), text)
            };
            let stand_in = STAND_INS.iter().find(|(c, _)| *c == command).map(|(_, s)| *s);
            match stand_in {
                Some(StandIn::Make) => {
                    let target = format!("\n{}: ##", command.strip_prefix("make ").unwrap());
                    assert!(makefile.contains(&target), "{command}: the Makefile has no such target");
                }
                Some(StandIn::Apt) => {}
                Some(StandIn::Start) => daemon.start(),
                Some(StandIn::Restart) => {
                    daemon.stop();
                    daemon.start();
                }
                Some(StandIn::Looks) => {
                    let (code, text) = shell(&command);
                    assert!(matches!(code, Some(0 | 1)) && text.contains("\nfaults: "), "{command}: {code:?} {text}");
                }
                Some(StandIn::Terminal) => {
                    let (code, text) = shell("proxmox-lxcri tag busybox docker.io/library/busybox:latest");
                    assert_eq!(code, Some(0), "{text}");
                    let typed = format!(
                        "{{ sleep 1; echo 'echo on $(tty)'; echo 'exit 3'; }} | script -qec '{command}' /dev/null"
                    );
                    let (code, text) = shell(&typed);
                    assert!(code == Some(3) && text.contains("on /dev/"), "{command}: {code:?} {text}");
                }
                None => {
                    let (code, text) = shell(&command);
                    assert_eq!(
                        code,
                        Some(0),
                        "{command}: {text}\n{}",
                        std::fs::read_to_string("/tmp/daemon.log").unwrap_or_default()
                    );
                    said += &format!("$ {command}\n{text}");
                }
            }
        }
        daemon.stop();
        assert!(said.contains("echo hello\nhello\n"), "{said}");
    });
}

/// What `make run` runs when it has built, on this machine itself: it says what it does, and leaves nothing.
#[test]
fn the_first_command_runs_a_pod_and_leaves_nothing() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let programs =
        [support::daemon_program(), support::monitor_program(), support::relay_program(), support::lxc_init()];
    let [daemon, monitor, relay, init] = programs;
    checkout(folder.path(), [daemon, monitor, relay, init, support::lxc_helper()]);
    let mut demo = Command::new(repository().join("scripts/run-demo"));
    let out = demo
        .env("CARGO_TARGET_DIR", folder.path().join("target"))
        .env("RUN_SECONDS", "1")
        .stdin(Stdio::null())
        .output();
    let out = out.unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    for word in ["hello from hello", "its exit code: 7", "says: hello from web", "nothing is left"] {
        assert!(said.contains(word), "{word:?}: {said}");
    }
    assert!(out.status.success(), "{said}");
}
