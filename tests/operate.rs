//! What an operator does with a whole daemon: its configuration from several sources, a reload, the doctor.
//!
//! Run by `make test`, as root. A crash leaves nothing: see `support`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod support;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use support::crictl::BUSYBOX;
use support::manager::Manager;
use support::node::{Node, Options};
use support::pve::{self, Pve};
use support::{daemon_program, isolated, wait_for};

/// Our own command line with the node's configuration: status, output, errors.
fn lxcri(node: &Node, args: &[&str]) -> (Option<i32>, String, String) {
    said(Command::new(daemon_program()).args(args).arg("--config").arg(node.dir.join("config.toml")))
}

fn said(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

fn log_since(node: &Node, from: usize) -> String {
    std::fs::read_to_string(node.log_file()).unwrap().split_off(from)
}

/// The log from `from` on, when it has `words`.
fn logged(node: &Node, from: usize, words: &str) -> String {
    wait_for(words, Duration::from_secs(10), || Some(log_since(node, from)).filter(|l| l.contains(words)))
}

#[test]
fn the_configuration_is_checked_read_again_and_explained() {
    isolated("the_configuration_is_checked_read_again_and_explained", || {
        let routing = "[[routing]]\nmatch = { namespace = \"elsewhere\" }\nhandler = \"lxc\"\n";
        let mut node =
            Node::prepare(Options { handler: "crun".into(), more_config: routing.into(), ..Options::default() });
        let path = node.dir.join("config.toml");
        let good = std::fs::read_to_string(&path).unwrap();
        let write = |text: &str| std::fs::write(&path, text).unwrap();

        // All that is wrong, at once, before anything is made.
        write(&good.replace("[runtime]\n", "[runtime]\nlog_line_maxx = 5\npids_limit = \"x\"\n"));
        let (status, _, errors) = lxcri(&node, &["serve"]);
        assert_eq!(status, Some(1), "{errors}");
        for words in [
            "configuration: 2 problems",
            "runtime.log_line_maxx",
            "did you mean runtime.log_line_max?",
            "runtime.pids_limit",
        ] {
            assert!(errors.contains(words), "{words}: {errors}");
        }
        assert!(!node.dir.join("run/daemon.lock").exists(), "the daemon began");
        let (status, _, errors) = lxcri(&node, &["config", "check"]);
        assert!(status == Some(1) && errors.contains("2 problems"), "{errors}");
        write(&good);
        assert_eq!(lxcri(&node, &["config", "check"]).0, Some(0));

        // Whatever lies in the working directory, a bundle's config.json among it, is nobody's configuration.
        let elsewhere = node.dir.join("bundle");
        std::fs::create_dir(&elsewhere).unwrap();
        for name in ["config.toml", "config.json", "10.toml"] {
            std::fs::write(elsewhere.join(name), "nonsense").unwrap();
        }
        let (status, dump, errors) = said(
            Command::new(daemon_program())
                .args(["config", "dump", "--config-set", "runtime.pids_limit=9"])
                .env("PROXMOX_LXCRI__LOG__FORMAT", "json")
                .current_dir(&elsewhere),
        );
        assert_eq!(status, Some(0), "{errors}");
        for line in [
            "pids_limit = 9  # --config-set",
            "format = \"json\"  # environment PROXMOX_LXCRI__LOG__FORMAT",
            "version = 1  # default",
        ] {
            assert!(dump.lines().any(|l| l == line), "{line}: {dump}");
        }

        // SIGHUP: the level changes, other keys are named, nonsense changes nothing.
        node.start_daemon();
        let pid = rustix::process::Pid::from_raw(node.daemon_pid().cast_signed()).unwrap();
        let reload = |text: &str| {
            write(text);
            let from = std::fs::metadata(node.log_file()).unwrap().len() as usize;
            rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
            from
        };
        let from = reload(
            &good.replace("level = \"info,proxmox_lxcri=debug\"", "level = \"warn\"").replace("cri.sock", "other.sock"),
        );
        let log = logged(&node, from, "this key counts from the next restart");
        assert!(log.contains("server.listen"), "{log}");
        // The line that says so is below the new level.
        let crictl = node.crictl();
        crictl.try_run(&["inspectp", "0123"]);
        assert!(!log_since(&node, from).contains("DEBUG"), "{}", log_since(&node, from));
        let from = reload(&good.replace("[runtime]\n", "[runtime]\nnonsense = 1\n"));
        let log = logged(&node, from, "the configuration stays as it was: it does not fit");
        assert!(log.contains("runtime.nonsense"), "{log}");
        let from = reload(&good);
        logged(&node, from, "the configuration was read again");

        // Levels by a command: those of modules, until SIGHUP puts the configured ones back; what makes none changes nothing.
        let level = |levels: &[&str]| lxcri(&node, &[&["debug", "level"], levels].concat());
        let configured = "info,proxmox_lxcri=debug\n";
        assert_eq!(level(&[]).1, configured);
        assert_eq!(level(&["warn,proxmox_lxcri::cri=trace"]).1, "warn,proxmox_lxcri::cri=trace\n");
        let from = log_since(&node, 0).len();
        crictl.try_run(&["inspectp", "0123"]);
        assert!(!log_since(&node, from).contains("INFO"), "{}", log_since(&node, from));
        for bad in ["proxmox_lxcri=loud", "", "a=b=c"] {
            let (status, out, errors) = level(&[bad]);
            assert!(status == Some(1) && out.is_empty() && errors.contains("level"), "{bad:?}: {out}{errors}");
        }
        assert_eq!(level(&[]).1, "warn,proxmox_lxcri::cri=trace\n");
        reload(&good);
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while level(&[]).1 != configured {
            assert!(std::time::Instant::now() < until, "SIGHUP did not put the level back");
        }

        // Where a rule sends a pod that names no handler.
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("here");
        let inspected: serde_json::Value = serde_json::from_str(&crictl.run(&["inspectp", &pod])).unwrap();
        assert_eq!(inspected["status"]["runtimeHandler"], "crun", "{inspected}");
        node.stop_daemon();
    });
}

#[test]
fn the_doctor_names_what_proxmox_does_not_give() {
    let doctor = |pve: &Pve, fingerprint: &str, pool: &str| {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.toml");
        let text = format!(
            "[server]\nlisten = \"{dir}/cri.sock\"\nlocal_listen = \"{dir}/local.sock\"\nroot = \"{dir}/root\"\n\
             [proxmox]\nendpoints = [\"{url}\"]\nnode = \"pve1\"\ntoken_id = \"{token}\"\ntoken_file = \"{secret}\"\n{fingerprint}\n\
             [handlers.proxmox-lxc]\nenabled = true\nstorage = \"local\"\npool = \"{pool}\"\n",
            dir = folder.path().display(),
            url = pve.url(),
            token = pve::TOKEN,
            secret = pve.file("token"),
        );
        std::fs::write(&config, text).unwrap();
        let (status, out, errors) =
            said(Command::new(daemon_program()).args(["doctor", "-o", "json", "--config"]).arg(&config));
        assert!(matches!(status, Some(0 | 1)), "{errors}");
        let found: Vec<serde_json::Value> = serde_json::from_str(&out).unwrap();
        let found = found.into_iter().filter(|f| f["check"] == "proxmox" || f["check"] == "clock");
        found
            .map(|f| format!("{} {}", f["state"].as_str().unwrap(), f["message"].as_str().unwrap()))
            .collect::<Vec<_>>()
    };
    let pve = Pve::start(pve::Options::default());
    let right = format!("ca_file = \"{}\"", pve.file("ca.pem"));
    let found = doctor(&pve, &right, "k8s");
    assert!(found.iter().any(|f| f.starts_with("good the token has every privilege")), "{found:#?}");
    assert!(found.iter().any(|f| f.starts_with("good agrees with that of Proxmox")), "{found:#?}");
    let found = doctor(&pve, &right, "other");
    assert!(found.iter().any(|f| f.starts_with("fault the token lacks VM.Allocate on /pool/other")), "{found:#?}");
    let wrong = format!("fingerprint = \"{}\"", ["AB"; 32].join(":"));
    let found = doctor(&pve, &wrong, "k8s");
    assert!(found.iter().any(|f| f.starts_with("fault") && f.contains("certificate")), "{found:#?}");
}

#[test]
fn status_is_one_when_a_condition_is_not_well() {
    isolated("status_is_one_when_a_condition_is_not_well", || {
        let mut node = Node::start(Options { handler: "crun".into(), ..Options::default() });
        let (status, text, errors) = lxcri(&node, &["status"]);
        assert!(status == Some(0) && text.contains("RuntimeReady"), "{text}{errors}");
        let (_, doctor, _) = lxcri(&node, &["doctor"]);
        assert!(
            doctor.contains("our daemon answers") && doctor.lines().any(|l| l.starts_with("good     crun")),
            "{doctor}"
        );
        std::fs::remove_file(node.dir.join("cni/10-test.conflist")).unwrap();
        let (status, text, _) = lxcri(&node, &["status", "-o", "json"]);
        let said: serde_json::Value = serde_json::from_str(&text).unwrap();
        let network = said["conditions"].as_array().unwrap().iter().find(|c| c["name"] == "NetworkReady").unwrap();
        assert_eq!((status, &network["reason"]), (Some(1), &"NetworkPluginNotReady".into()), "{said}");
        node.stop_daemon();
        let (status, _, errors) = lxcri(&node, &["status"]);
        assert!(status == Some(1) && errors.contains("proxmox-lxcri doctor"), "{errors}");
    });
}

#[test]
fn systemd_is_told_that_the_daemon_lives() {
    isolated("systemd_is_told_that_the_daemon_lives", || {
        let mut node = Node::prepare(Options { handler: "crun".into(), ..Options::default() });
        node.manager = Some(Manager::start(Path::new("/tmp/notify")));
        node.start_daemon();
        let told = |node: &Node| node.manager.as_ref().unwrap().told_alive();
        let more = |node: &Node, than: usize| {
            wait_for("a word of life", Duration::from_secs(10), || (told(node) > than + 2).then_some(()));
        };
        more(&node, 0);
        let pid = rustix::process::Pid::from_raw(node.daemon_pid().cast_signed()).unwrap();
        let signal = |which| rustix::process::kill_process(pid, which).unwrap();
        signal(rustix::process::Signal::STOP);
        let before = told(&node);
        std::thread::sleep(Duration::from_secs(2)); // what is not said needs time to be missed
        assert!(told(&node) <= before + 1, "a daemon that hangs says that it lives");
        signal(rustix::process::Signal::CONT);
        more(&node, told(&node));
        node.stop_daemon();
    });
}
