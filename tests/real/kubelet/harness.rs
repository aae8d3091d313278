//! Runs groups of scenarios: outside the tests' environment it starts itself again inside for each group; inside it
//! runs the group, says `test <group>::<scenario> ... ok` for each, and the whole ends as cargo's own harness does, with
//! `test result: ...`.

use std::collections::BTreeMap;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::cluster::Cluster;
use super::ctx::Ctx;
use super::{disk, gates, load, multi, one, shutdown, standalone};
use crate::support::{daemon_program, lxc_helper, lxc_init, monitor_program, repository, run, target_folder};

/// A scenario in a cluster: it gets a namespace of its own.
pub type Scenario = (&'static str, fn(&Ctx));

/// A group's name and what runs it.
type Group = (&'static str, fn(&Runner));

const GROUPS: &[Group] = &[
    ("standalone", standalone::group),
    ("node", one::group),
    ("load", load::group),
    ("gates", gates::group),
    ("disk", disk::group),
    ("shutdown", shutdown::group),
    ("two_nodes", multi::two),
    ("three_nodes", multi::three),
];
/// So many of them run one after the other, then the next one beside the rest.
const ALONE: usize = 2;

pub fn main() -> i32 {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    match std::env::var("KUBELET_GROUP") {
        Ok(group) => inside(&group, args.first().cloned().unwrap_or_default()),
        Err(_) => outside(args.first().cloned().unwrap_or_default()),
    }
}

fn outside(filter: String) -> i32 {
    let tool = |name: &str| {
        let out = run(&mut Command::new(repository().join("tests/tools").join(name)));
        PathBuf::from(out.lines().last().unwrap_or_default())
    };
    let monitor = monitor_program();
    let tools = [
        ("LXCRI_CRI_TOOLS", "cri-tools"),
        ("LXCRI_KUBERNETES", "kubernetes"),
        ("LXCRI_ETCD", "etcd"),
        ("LXCRI_DBUS", "dbus"),
        ("LXCRI_IMAGES", "kubelet-images"),
    ]
    .map(|(variable, name)| (variable, tool(name)));
    // GROUP, GROUP::PART or PART
    let (wanted, filter) = match filter.split_once("::") {
        Some((group, part)) => (group.to_owned(), part.to_owned()),
        None if GROUPS.iter().any(|(g, _)| *g == filter) => (filter, String::new()),
        None => (String::new(), filter),
    };
    let tally = Mutex::new(Tally::default());
    let run_groups = |some: &[Group]| {
        for (group, _) in some.iter().filter(|(g, _)| wanted.is_empty() || wanted == *g) {
            let ended = run_group(group, &filter, &monitor, &tools);
            ended(&mut tally.lock().expect("the tally"));
        }
    };
    let (alone, beside) = GROUPS.split_at(ALONE);
    run_groups(alone);
    // The first of these waits most of its time, for pods to stay and to be collected.
    let (load, rest) = beside.split_at(1);
    std::thread::scope(|scope| {
        scope.spawn(|| run_groups(load));
        run_groups(rest);
    });
    let Tally { passed, mut failed, broken } = tally.into_inner().expect("the tally");
    failed.extend(broken);
    if !failed.is_empty() {
        println!("\nfailures:");
        failed.iter().for_each(|f| println!("    {f}"));
    }
    let word = if failed.is_empty() { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {} failed; 0 ignored; 0 measured; 0 filtered out", failed.len());
    i32::from(!failed.is_empty() || passed == 0)
}

/// What all groups came to.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: Vec<String>,
    /// Groups that ended before their time.
    broken: Vec<String>,
}

/// Runs a group in the tests' environment; gives what notes its results.
fn run_group(group: &str, filter: &str, monitor: &Path, tools: &[(&str, PathBuf)]) -> impl FnOnce(&mut Tally) {
    let logs = target_folder().join("test-logs").join(format!("kubelet-{group}"));
    let _ = std::fs::remove_dir_all(&logs);
    std::fs::create_dir_all(&logs).expect("the folder for logs");
    let status = Command::new(repository().join("tests/env/enter"))
        .args(["--root", "trixie", "--net", "--"])
        .arg(std::env::current_exe().expect("the test's own program"))
        .arg(filter)
        .env("KUBELET_GROUP", group)
        .env("RUST_BACKTRACE", "0")
        .env("LXCRI_BIN", daemon_program())
        .env("LXCRI_MONITOR", monitor)
        .env("LXCRI_LXC", lxc_helper())
        .env("LXCRI_LXC_INIT", lxc_init())
        .env("LXCRI_LOGS", &logs)
        .envs(tools.iter().map(|(k, v)| (*k, v)))
        .stdin(Stdio::null())
        .status()
        .expect("tests/env/enter starts");
    let group = group.to_owned();
    move |tally| {
        let said = std::fs::read_to_string(logs.join("results")).unwrap_or_default();
        let before = tally.failed.len();
        for line in said.lines() {
            match line.split_once(' ') {
                Some(("ok", _)) => tally.passed += 1,
                Some((_, name)) => tally.failed.push(name.to_owned()),
                None => {}
            }
        }
        if !said.ends_with("done\n") || (!status.success() && tally.failed.len() == before) {
            tally.broken.push(format!("{group}, which ended early: {status}"));
        }
    }
}

fn inside(group: &str, filter: String) -> i32 {
    let body = GROUPS.iter().find(|(g, _)| *g == group).expect("a group").1;
    let runner = Runner::new(group, filter);
    // What a group does beside its scenarios (to start a cluster) can fail, too.
    let result = catch_unwind(AssertUnwindSafe(|| body(&runner)));
    if result.is_err() {
        runner.note("a part beside the scenarios", false, 0);
    }
    let failed = runner.finish();
    i32::from(failed)
}

/// Runs and counts the scenarios of a group.
pub struct Runner {
    group: String,
    filter: String,
    results: Mutex<BTreeMap<String, bool>>,
}

impl Runner {
    fn new(group: &str, filter: String) -> Self {
        Self { group: group.to_owned(), filter, results: Mutex::new(BTreeMap::new()) }
    }

    fn wanted(&self, name: &str) -> bool {
        self.filter.split(',').any(|f| name.contains(f))
    }

    fn note(&self, name: &str, ok: bool, seconds: u64) {
        println!("test {}::{name} ... {} ({seconds} s)", self.group, if ok { "ok" } else { "FAILED" });
        let _ = std::io::stdout().flush();
        self.results.lock().expect("results").insert(name.to_owned(), ok);
    }

    fn finish(&self) -> bool {
        let results = self.results.lock().expect("results");
        let lines: Vec<_> = results
            .iter()
            .map(|(n, ok)| format!("{} {}::{n}\n", if *ok { "ok" } else { "FAILED" }, self.group))
            .collect();
        let logs = crate::support::given("LXCRI_LOGS");
        let _ = std::fs::write(logs.join("results"), lines.concat() + "done\n");
        results.values().any(|ok| !ok)
    }

    /// Whether a scenario of this group has failed so far.
    pub fn failed(&self) -> bool {
        self.results.lock().expect("results").values().any(|ok| !ok)
    }

    /// One scenario, here and now. False: it failed (or is not wanted).
    pub fn scenario(&self, name: &str, body: impl FnOnce()) -> bool {
        if !self.wanted(name) {
            return true;
        }
        let start = Instant::now();
        let ok = catch_unwind(AssertUnwindSafe(body)).is_ok();
        self.note(name, ok, start.elapsed().as_secs());
        ok
    }

    /// Scenarios in namespaces of their own, `width` at a time.
    pub fn parallel(&self, cluster: &Arc<Cluster>, width: usize, scenarios: &[Scenario]) {
        let next = AtomicUsize::new(0);
        let wanted: Vec<_> = scenarios.iter().filter(|(name, _)| self.wanted(name)).collect();
        std::thread::scope(|scope| {
            for _ in 0..width {
                scope.spawn(|| {
                    while let Some((name, body)) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                        self.one(cluster, name, *body);
                    }
                });
            }
        });
    }

    /// One scenario in a namespace of its own, which is shown when it fails.
    pub fn one(&self, cluster: &Arc<Cluster>, name: &str, body: fn(&Ctx)) {
        if !self.wanted(name) {
            return;
        }
        let start = Instant::now();
        let (cluster, name_) = (cluster.clone(), name.to_owned());
        // A thread of its own: its name stands before the message of its panic.
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let ctx = Ctx::new(cluster, &name_.replace('_', "-"));
            let result = catch_unwind(AssertUnwindSafe(|| body(&ctx)));
            if result.is_err() {
                ctx.show();
            }
            ctx.close();
            result.is_ok()
        });
        let ok = thread.expect("a thread").join().unwrap_or(false);
        self.note(name, ok, start.elapsed().as_secs());
    }
}

/// Keeps a folder's files for whoever looks into a failure.
pub fn keep(folder: &Path, name: &str) {
    let logs = crate::support::given("LXCRI_LOGS").join(name);
    let _ = std::fs::create_dir_all(&logs);
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|e| e == "log" || e == "yaml" || e == "toml") {
            let _ = std::fs::copy(entry.path(), logs.join(entry.file_name()));
        }
    }
}

/// Whether the long waits are wanted.
pub fn long() -> bool {
    std::env::var_os("KUBELET_LONG").is_some()
}

/// Stays until the environment ends, when `KUBELET_KEEP` is set.
pub fn keep_up() {
    if std::env::var_os("KUBELET_KEEP").is_some() {
        println!("kept up; pid {} in the environment", std::process::id());
        loop {
            std::thread::park();
        }
    }
}
