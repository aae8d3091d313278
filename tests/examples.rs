//! The examples do what they say: a command of one's own, and a backend's verbs from the library.
//!
//! Run by `make test`, as root. A crash leaves nothing: see `support`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and copy files plainly

mod support;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use support::crictl::BUSYBOX;
use support::node::{Node, Options};
use support::{example, given, isolated};

fn said(command: &mut Command) -> String {
    let out = command.stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", support::describe(&out));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn a_command_of_ones_own_is_one_of_all() {
    let program = example("custom_command");
    isolated("a_command_of_ones_own_is_one_of_all", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let runs = crictl.create(&pod, "p", "runs", BUSYBOX, "exec sleep 4321");
        crictl.run(&["start", &runs]);
        crictl.create(&pod, "p", "waits", BUSYBOX, "exec sleep 4321");
        let mine =
            |args: &[&str]| said(Command::new(&program).arg("--config").arg(node.dir.join("config.toml")).args(args));
        assert_eq!(mine(&["namespaces"]), "NAMESPACE  CONTAINERS\ntests               2\n");
        assert_eq!(mine(&["ns", "--running", "-o", "json"]), "{\n  \"tests\": 1\n}\n");
        // It is one of all that there are.
        assert!(mine(&["ps"]).contains("runs"));
        assert!(mine(&["help"]).contains("How many containers each namespace has"));
        assert!(mine(&["completion", "bash"]).contains("namespaces"));
        assert!(mine(&["man", "--markdown"]).contains("## `namespaces`"));
        crictl.run(&["rmp", "-f", &pod]);
    });
}

#[test]
fn a_backends_verbs_work_from_the_library() {
    let program = example("basic_backend");
    isolated("a_backends_verbs_work_from_the_library", || {
        // As the package has them: the helpers beside the program.
        let folder = PathBuf::from("/tmp/beside");
        std::fs::create_dir(&folder).unwrap();
        let beside = |from: PathBuf| {
            let to = folder.join(from.file_name().unwrap());
            std::fs::copy(&from, &to).unwrap();
            to
        };
        let program = beside(program.clone());
        for helper in ["LXCRI_MONITOR", "LXCRI_LXC", "LXCRI_LXC_INIT"] {
            beside(given(helper));
        }
        let layout = given("LXCRI_IMAGES").join("oci/busybox");
        let told = said(Command::new(program).arg(format!("oci:{}", layout.display())));
        let lines: Vec<&str> = told.lines().collect();
        let has = |start: &str| assert!(lines.iter().any(|l| l.starts_with(start)), "{start}: {told}");
        for start in ["create  ", "start   done", "list    ", "info    pid ", "delete  0 containers left"] {
            has(start);
        }
        has("exec    \"hello from inside\", exit code 7");
        has("stop    exit code 3");
        assert!(lines.iter().any(|l| l.starts_with("list    ") && l.ends_with(" running")), "{told}");
    });
}
