//! Every call of the Proxmox API that the handler proxmox-lxc makes over a pod's life, under every fault that such a call can
//! meet: the pod's call succeeds, or fails with a code and words that fit; what the kubelet does then ends well; and nothing is
//! left, on Proxmox or here.
//!
//! The calls are those that the server saw in a life without faults: one that is in no table fails the test. Run by
//! `cargo test --test proxmox_faults`, as root: every sixth of the cases; all with LXCRI_PVE_FAULTS=all (make test-proxmox-lxc).

#![allow(clippy::disallowed_methods, clippy::print_stdout)] // tests write files, look into folders and tell figures

mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use k8s_cri::v1::{
    ListPodSandboxRequest, PodSandboxState, PodSandboxStatusRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    StopPodSandboxRequest,
};
use proxmox_lxcri::api::v1;
use serde_json::json;
use support::client::{self, Client, block_on};
use support::crictl::BUSYBOX;
use support::isolated;
use support::node::{Node, Options};
use support::pve::{Pve, Seen, What};
use tonic::{Code, Status};

const LONG: Duration = Duration::from_secs(40);
/// Which part of the cases is run where not all are wanted.
const SLICE: usize = 6;
/// Memory of a pod after its change, in MiB.
const MEMORY: &str = "96";

/// What a call of the API is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    /// It only looks.
    Look,
    /// It changes something before it answers.
    Change,
    /// It starts a task.
    Task,
    /// It uploads the template, and starts a task.
    Upload,
}
use Sort::{Change, Look, Task, Upload};

/// A call: as the request log has it, its sort, and what finds it for a fault.
type Place = (&'static str, Sort, &'static str);

const PLACES: [Place; 16] = [
    ("GET /nodes/pve1/storage/local/content", Look, "/content$"),
    ("POST /nodes/pve1/storage/local/upload", Upload, "/upload$"),
    ("GET /nodes/pve1/tasks/imgcopy/status", Look, ":imgcopy:"),
    ("GET /cluster/resources", Look, "/resources$"),
    ("POST /nodes/pve1/lxc", Task, "/lxc$"),
    ("GET /nodes/pve1/tasks/vzcreate/status", Look, ":vzcreate:"),
    ("POST /nodes/pve1/lxc/N/status/start", Task, "/status/start$"),
    ("GET /nodes/pve1/tasks/vzstart/status", Look, ":vzstart:"),
    ("GET /nodes/pve1/lxc/N/status/current", Look, "/status/current$"),
    ("PUT /nodes/pve1/lxc/N/config", Change, "/config$"),
    ("GET /nodes/pve1/lxc/N/pending", Look, "/pending$"),
    ("GET /nodes/pve1/lxc/N/config", Look, "/config$"),
    ("POST /nodes/pve1/lxc/N/status/stop", Task, "/status/stop$"),
    ("GET /nodes/pve1/tasks/vzstop/status", Look, ":vzstop:"),
    ("DELETE /nodes/pve1/lxc/N", Task, "/lxc/"),
    ("GET /nodes/pve1/tasks/vzdestroy/status", Look, ":vzdestroy:"),
];

/// A request as [`PLACES`] has it.
fn place_of(seen: &Seen) -> String {
    let part = |p: &str| match p {
        p if p.starts_with("UPID:") => p.split(':').nth(5).unwrap_or_default().to_owned(),
        p if p.parse::<u32>().is_ok() => "N".to_owned(),
        p => p.to_owned(),
    };
    format!("{} {}", seen.method, seen.path.split('/').map(part).collect::<Vec<_>>().join("/"))
}

/// What a fault makes of the pod's call that meets it.
#[derive(Debug, Clone)]
enum Then {
    /// Nobody notices.
    Well,
    /// It fails with the code, and with these words among its own.
    Fails(Code, &'static str),
}
use Then::{Fails, Well};

/// A fault of a call.
struct Case {
    place: Place,
    name: &'static str,
    what: What,
    then: Then,
    /// It stays for the kubelet's next try, too.
    stays: bool,
}

fn faults(place: Place) -> Vec<(&'static str, What, Then)> {
    let status = |code: u16, words: &str| What::Status(code, words.to_owned());
    let ends = |words: &str| What::TaskEnds(words.to_owned());
    let slow = ("slow", What::Slow(Duration::from_millis(300)), Well);
    let odd = "unable to open file '/etc/pve/x': Input/output error";
    let odd_answer = if place.1 == Upload { "no task" } else { "answer" };
    let always = vec![
        slow,
        ("500 words", status(500, odd), Fails(Code::Internal, "Input/output error")),
        ("401", status(401, ""), Fails(Code::PermissionDenied, "token or ticket not accepted")),
        (
            "403",
            status(403, "Permission check failed (/vms/9000, VM.Audit)"),
            Fails(Code::PermissionDenied, "lacks VM.Audit on /vms/9000"),
        ),
        ("text for data", What::Data(json!("what")), Fails(Code::Internal, odd_answer)),
    ];
    // Looking is repeated, changing is not.
    let lost = |words| if place.1 == Look { Well } else { Fails(Code::Unavailable, words) };
    let passing = [
        ("595", status(595, "Connection refused"), lost("Connection refused")),
        ("596", status(596, "Broken pipe"), lost("Broken pipe")),
        ("cut", What::Cut, lost("the connection broke")),
        ("cut after", What::CutAfter, lost("the connection broke")),
        (
            "timeout",
            status(500, "got timeout"),
            if place.1 == Look { Well } else { Fails(Code::DeadlineExceeded, "got timeout") },
        ),
    ];
    let locked = status(500, "can't lock file '/run/lock/lxc/pve-config-9000.lock' - got timeout");
    let quorum = status(500, "cluster not ready - no quorum?");
    let broken = Fails(Code::Unavailable, "got timeout");
    let changes = [
        ("lock file", locked, if place.1 == Upload { broken } else { Well }),
        ("no quorum", quorum, Fails(Code::Unavailable, "no quorum")),
        ("object for data", What::Data(json!({})), Fails(Code::Internal, odd_answer)),
        ("done, garbled", What::Garbled(json!([1])), Fails(Code::Internal, odd_answer)),
    ];
    let making = place.1 == Upload || place.0 == "POST /nodes/pve1/lxc";
    // The pod is there: a kubelet would take a "not found" for its end. What can't be stopped is deleted, which stops it.
    let stop = place.0.ends_with("/status/stop");
    let gone = if stop { Well } else { Fails(Code::FailedPrecondition, "does not exist") };
    let late = ("late", What::Late(Duration::from_millis(2500)), Fails(Code::DeadlineExceeded, "no answer within"));
    let tasks = [
        ("task fails", ends("command 'x' failed: exit code 1"), Fails(Code::Internal, "exit code 1")),
        ("task dies", ends("unexpected status"), Fails(Code::Internal, "unexpected status")),
        ("task meets a lock", ends("CT is locked (backup)"), Fails(Code::FailedPrecondition, "is locked (backup)")),
        ("task is full", ends("No space left on device"), Fails(Code::ResourceExhausted, "No space left")),
        ("task warns", What::TaskWarns(2), Well),
        (
            "task meets the lock file",
            ends("can't lock file '/run/lock/lxc/pve-config-9000.lock' - got timeout"),
            if making { Fails(Code::Unavailable, "got timeout") } else { Well },
        ),
        ("task misses its storage", ends("storage 'gone' does not exist"), gone.clone()),
    ];
    let mut all = always;
    all.extend(passing);
    if place.1 == Look {
        let object = Fails(Code::Internal, "answer");
        all.push(("object for data", What::Data(json!({})), object));
    } else {
        all.extend(changes);
        all.push(("something is missing", status(500, "storage 'gone' does not exist"), gone.clone()));
    }
    if matches!(place.1, Task | Change) {
        all.push(late);
    }
    if matches!(place.1, Task | Upload) {
        all.extend(tasks);
    }
    if place.0 == "POST /nodes/pve1/lxc" {
        all.push(("half done", What::HalfDone, Fails(Code::Internal, "unexpected status")));
    }
    all
}

fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for place in PLACES {
        for (name, what, then) in faults(place) {
            // What may not be stopped is deleted, which stops it.
            let stop = (place.0.ends_with("/status/stop") || place.2 == ":vzstop:") && name == "403";
            let then = if stop { Well } else { then };
            // One that is only repeated as long as it lasts would last longer than its caller.
            let passes = matches!(name, "slow" | "late" | "task warns" | "lock file") || matches!(then, Well);
            for stays in [false, true].into_iter().filter(|stays| !stays || !passes) {
                all.push(Case { place, name, what: what.clone(), then: then.clone(), stays });
            }
        }
    }
    all
}

/// A node, and who is its kubelet.
struct Lab {
    node: Node,
    client: Client,
    newer: v1::runtime_service_client::RuntimeServiceClient<tonic::transport::Channel>,
    attempt: u32,
}

impl Lab {
    async fn start() -> Self {
        // Orphans are looked for once, at start: no other look meets a fault.
        let lines = ["timeout = \"2s\"\ntask_timeout = \"20s\"".to_owned(), "orphans_after = \"1h\"".to_owned()];
        let options = Options { handler: "proxmox-lxc".into(), proxmox_lines: lines, ..Options::default() };
        let node = tokio::task::block_in_place(|| Node::start(options));
        let client = Client::connect(&node.socket()).await;
        let newer = client::newer(&node.socket()).await;
        Self { node, client, newer, attempt: 0 }
    }

    fn pve(&self) -> &Pve {
        self.node.pve.as_ref().expect("a Proxmox")
    }

    async fn restart(&mut self) {
        tokio::task::block_in_place(|| self.node.crash_daemon());
        self.client = Client::connect(&self.node.socket()).await;
        self.newer = client::newer(&self.node.socket()).await;
    }

    /// Another daemon, which knows of no template, and none is there.
    async fn again(&mut self) {
        self.restart().await;
        self.pve().drop_templates();
    }

    async fn pods(&mut self) -> Vec<k8s_cri::v1::PodSandbox> {
        self.client.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.expect("a list").into_inner().items
    }

    async fn stop(&mut self, id: &str) -> Result<(), Status> {
        self.client.runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: id.into() }).await.map(drop)
    }

    async fn remove(&mut self, id: &str) -> Result<(), Status> {
        self.client.runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id.into() }).await.map(drop)
    }

    async fn run(&mut self) -> Result<String, Status> {
        let mut config = client::pod("p", &self.node.pod_logs("p"));
        config.metadata.as_mut().expect("metadata").attempt = self.attempt;
        self.attempt += 1;
        let request = RunPodSandboxRequest { config: Some(config), runtime_handler: "proxmox-lxc".into() };
        Ok(self.client.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    async fn resize(&mut self, id: &str) -> Result<(), Status> {
        let memory_limit_in_bytes = MEMORY.parse::<i64>().expect("a number") << 20;
        let request = v1::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: id.into(),
            resources: Some(v1::LinuxContainerResources { memory_limit_in_bytes, ..Default::default() }),
            ..Default::default()
        };
        self.newer.update_pod_sandbox_resources(request).await.map(drop)
    }

    /// A pod's life as a kubelet has it, which goes on until each call succeeds. `failed` is told of each failure and says whether
    /// there may be one.
    async fn life(&mut self, mut failed: impl FnMut(&Pve, &str, &Status)) {
        let id = loop {
            match self.run().await {
                Ok(id) => break id,
                Err(e) => failed(self.pve(), "RunPodSandbox", &e),
            }
            for pod in self.pods().await {
                assert_ne!(pod.state, PodSandboxState::SandboxReady as i32, "a pod whose making has failed");
                while let Err(e) = self.stop(&pod.id).await {
                    // What died of its making is in no pool, and locked: that takes an operator, who does what the words say.
                    if let Some((_, rest)) = e.message().split_once("; pct destroy ") {
                        let words: Vec<&str> = rest.split('`').next().expect("words").split_whitespace().collect();
                        let number = words[0].parse().expect("a number");
                        tokio::task::block_in_place(|| match words[1..] {
                            ["--destroy-unreferenced-disks", "1"] => self.pve().destroy_guest_and_volumes(number),
                            _ => self.pve().destroy_guest(number),
                        });
                        continue;
                    }
                    let not_yet = [" yet is known in ", " is being made by task "];
                    if e.code() == Code::Unavailable && not_yet.iter().any(|w| e.message().contains(w)) {
                        tokio::time::sleep(Duration::from_millis(100)).await; // the kubelet comes again
                        continue;
                    }
                    failed(self.pve(), "StopPodSandbox of what has failed", &e);
                }
            }
        };
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false };
        let status = self.client.runtime.pod_sandbox_status(request).await.expect("its status").into_inner();
        assert_eq!(status.status.expect("a status").state, PodSandboxState::SandboxReady as i32);
        while let Err(e) = self.resize(&id).await {
            failed(self.pve(), "UpdatePodSandboxResources", &e);
        }
        let pve = self.pve();
        let changed = pve.guests().into_iter().find(|n| pve.config(*n, "memory").as_deref() == Some(MEMORY));
        let group = format!("lxc/{}", changed.expect("a CT with that memory"));
        let limit = support::cgroup_file(&group, "memory.limit_in_bytes", "memory.max");
        let limit = std::fs::read_to_string(limit).expect("the limit of its cgroup");
        assert_eq!(limit.trim().parse::<u64>().map(|n| n >> 20).map(|n| n.to_string()).as_deref(), Ok(MEMORY));
        while let Err(e) = self.stop(&id).await {
            failed(self.pve(), "StopPodSandbox", &e);
        }
        for pod in self.pods().await {
            while let Err(e) = self.remove(&pod.id).await {
                failed(self.pve(), "RemovePodSandbox", &e);
            }
        }
    }

    /// What is left, if anything is.
    async fn left(&mut self) -> Result<(), String> {
        let names = |path: &std::path::Path| -> Vec<String> {
            let list = std::fs::read_dir(path).into_iter().flatten().flatten();
            list.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
        };
        let pods: Vec<String> = self.pods().await.into_iter().map(|p| p.id).collect();
        let pve = self.pve();
        let guests: Vec<String> = pve.guests().iter().map(ToString::to_string).collect();
        let (records, running) = (self.node.dir.join("lib/pods"), std::path::Path::new("/var/lib/lxc"));
        for (what, found) in [
            ("CTs", guests),
            ("volumes", pve.cts_and_volumes()),
            ("pods", pods),
            ("records", names(&records)),
            ("containers of lxc", names(running).into_iter().filter(|n| n.starts_with('9')).collect()),
        ] {
            if !found.is_empty() {
                return Err(format!("{what}: {found:?}"));
            }
        }
        Ok(())
    }

    /// Waits until nothing is left; what is, if that lasts.
    async fn empty(&mut self) -> Result<(), String> {
        let end = Instant::now() + LONG;
        while let Err(left) = self.left().await {
            if Instant::now() >= end {
                return Err(format!("left after {LONG:?}: {left}"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await; // the poll of a condition with a deadline
        }
        Ok(())
    }

    async fn nothing_is_left(&mut self) {
        self.empty().await.unwrap_or_else(|left| panic!("{left}"));
    }

    async fn case(&mut self, case: &Case) {
        let (call, sort, path) = case.place;
        if sort == Upload || path == ":imgcopy:" || path == "/content$" {
            self.again().await;
        }
        let method = call.split(' ').next().expect("a method");
        self.pve().mend();
        match case.stays {
            true => self.pve().fault_for_long(method, path, case.what.clone()),
            false => self.pve().fault(method, path, 1, case.what.clone()),
        }
        let mut failures = 0;
        let life = self.life(|pve, step, e| {
            failures += 1;
            let Fails(code, words) = &case.then else { panic!("{step} fails: {e:?}") };
            assert_eq!(e.code(), *code, "{step}: {e:?}");
            assert!(e.message().contains(words) && e.message().contains("proxmox: "), "{step}: {e:?}");
            match (case.stays, failures) {
                (false, 1) | (true, 1) => {}
                // The kubelet has tried twice: now it gets better.
                (true, 2) => drop(pve.mend()),
                _ => panic!("{step} fails without a fault: {e:?}"),
            }
        });
        tokio::time::timeout(LONG * 2, life).await.expect("a life that ends");
        let met = self.pve().mend();
        assert!(case.stays || met == 1, "met {met} times");
        // What had been done although it failed is not done a second time, so that the fault is met once, if it stays or not.
        let expected = if matches!(case.then, Well) { 0..=0 } else { 1..=1 + usize::from(case.stays) };
        assert!(expected.contains(&failures), "{failures} failures");
        self.nothing_is_left().await;
    }
}

#[test]
fn every_call_meets_every_fault() {
    isolated("every_call_meets_every_fault", || {
        block_on(async {
            let mut lab = Lab::start().await;
            // The log of requests without those of the daemon's start and of its looks whether Proxmox is there.
            let before = lab.pve().requests().len();
            lab.life(|_, step, e| panic!("{step} without a fault: {e:?}")).await;
            lab.nothing_is_left().await;
            let seen = lab.pve().requests();
            let looks = ["GET /version", "GET /nodes", "GET /access/permissions", "GET /nodes/pve1/lxc"];
            let seen: BTreeSet<String> =
                seen[before..].iter().map(place_of).filter(|p| !looks.contains(&p.as_str())).collect();
            let known: BTreeSet<String> = PLACES.iter().map(|p| p.0.to_owned()).collect();
            assert_eq!(seen, known, "the calls of a pod's life");

            let all = std::env::var("LXCRI_PVE_FAULTS").is_ok_and(|s| s == "all");
            let only = std::env::var("LXCRI_PVE_CASE").unwrap_or_default();
            let mut bad = Vec::new();
            let mut count = 0;
            for (n, case) in cases().iter().enumerate() {
                let name = format!("{}, {}{}", case.place.0, case.name, if case.stays { ", stays" } else { "" });
                let wanted = if only.is_empty() { all || n % SLICE == 0 } else { name.contains(&only) };
                if !wanted {
                    continue;
                }
                count += 1;
                println!("case: {name}");
                let result = {
                    use futures::FutureExt as _;
                    std::panic::AssertUnwindSafe(lab.case(case)).catch_unwind().await
                };
                if let Err(why) = result {
                    let text = why.downcast_ref::<String>().cloned();
                    let text = text.or_else(|| why.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                    bad.push(format!("{name}: {}", text.unwrap_or_default()));
                    // The next one is not to suffer from it.
                    lab.pve().mend();
                    for pod in lab.pods().await {
                        let _ = lab.remove(&pod.id).await;
                    }
                    let _ = lab.empty().await;
                }
            }
            assert!(bad.is_empty(), "{} of {count} cases:\n{}", bad.len(), bad.join("\n"));
            assert!(count > 0, "no case is wanted");
            println!("figure: {count} faults of {} calls of the Proxmox API", PLACES.len());
            // And after all of that a pod runs a container.
            tokio::task::block_in_place(|| {
                let crictl = lab.node.crictl();
                crictl.run(&["pull", BUSYBOX]);
                let pod = crictl.run_pod("last");
                let id = crictl.create(&pod, "last", "c", BUSYBOX, "exec sleep 1000");
                crictl.run(&["start", &id]);
                assert_eq!(crictl.run(&["exec", "-s", &id, "echo", "well"]), "well");
                crictl.run(&["rmp", "-f", &pod]);
                if let Some(violations) = lab.pve().violations() {
                    assert!(violations.is_empty(), "{violations:?}");
                }
            });
            lab.nothing_is_left().await;
        });
    });
}

#[test]
fn what_is_made_behind_our_back_is_ours() {
    isolated("what_is_made_behind_our_back_is_ours", || {
        block_on(async {
            let mut lab = Lab::start().await;
            // While a CT is made Proxmox shows a lock and no notes; or nothing, to whose rights come from a pool.
            for (what, hidden) in [
                (("GET", ":vzcreate:", What::Status(401, String::new())), false),
                (("POST", "/lxc$", What::CutAfter), false),
                (("POST", "/lxc$", What::CutAfter), true),
                (("POST", "/lxc$", What::Late(Duration::from_millis(2500))), false),
            ] {
                let (method, path, fault) = what;
                lab.pve().dawdle(Duration::from_millis(1500));
                lab.pve().fault(method, path, 1, fault);
                if hidden {
                    let refused = "Permission check failed (/vms/9000, VM.Audit)".to_owned();
                    lab.pve().fault("GET", "/config$", 1, What::Status(403, refused));
                }
                lab.run().await.expect_err("an answer that is lost");
                let made = Instant::now() + LONG;
                while lab.pve().count("DELETE", "/lxc/") == 0 {
                    assert!(Instant::now() < made, "{method} {path}: the CT is not deleted");
                    tokio::time::sleep(Duration::from_millis(50)).await; // the poll of a condition with a deadline
                }
                lab.nothing_is_left().await;
                lab.pve().forget_requests();
                lab.pve().mend();
            }
            // A daemon that dies while its call is under way: what Proxmox makes after that is found by the next one.
            lab.pve().dawdle(Duration::ZERO);
            lab.pve().fault("POST", "/lxc$", 1, What::Late(Duration::from_millis(1700)));
            let mut caller = Client::connect(&lab.node.socket()).await;
            let config = client::pod("killed", &lab.node.pod_logs("killed"));
            let request = RunPodSandboxRequest { config: Some(config), runtime_handler: "proxmox-lxc".into() };
            let call = tokio::spawn(async move { caller.runtime.run_pod_sandbox(request).await });
            let sent = Instant::now() + LONG;
            while lab.pve().count("POST", "/nodes/pve1/lxc") == 0 {
                assert!(Instant::now() < sent, "nothing is asked for");
                tokio::time::sleep(Duration::from_millis(10)).await; // the poll of a condition with a deadline
            }
            assert_eq!(lab.pve().guests(), [0; 0], "it is not begun yet");
            lab.restart().await;
            call.await.expect("its end").expect_err("nobody there");
            let made = Instant::now() + LONG;
            while lab.pve().count("DELETE", "/lxc/") == 0 {
                assert!(Instant::now() < made, "the CT is not deleted");
                tokio::time::sleep(Duration::from_millis(50)).await; // the poll of a condition with a deadline
            }
            lab.nothing_is_left().await;
            lab.pve().mend();
            // Nobody's, with the lock of its making: left alone.
            lab.pve().add_guest_under_way(9000);
            lab.pve().dawdle(Duration::ZERO);
            let id = lab.run().await.expect("the next number");
            assert_eq!(lab.pve().guests(), [9000, 9001]);
            lab.remove(&id).await.expect("removed");
            assert_eq!(lab.pve().guests(), [9000], "somebody else's CT is gone");
        });
    });
}

#[test]
fn what_an_operator_has_locked_is_named_and_goes_later() {
    isolated("what_an_operator_has_locked_is_named_and_goes_later", || {
        block_on(async {
            let mut lab = Lab::start().await;
            let refused = |result: Result<(), Status>, words: &str| {
                let e = result.expect_err(words);
                assert!(e.code() == Code::FailedPrecondition && e.message().contains(words), "{e:?}");
            };
            for lock in ["backup", "migrate", "protection"] {
                let id = lab.run().await.expect("a pod");
                lab.resize(&id).await.expect("not locked yet");
                match lock {
                    "protection" => lab.pve().set_config(9000, "protection", "1"),
                    lock => lab.pve().lock_guest(9000, Some(lock)),
                }
                if lock != "protection" {
                    refused(lab.resize(&id).await, &format!("is locked ({lock})"));
                }
                let words = format!("can't be removed as long as it has the lock {lock:?}");
                refused(lab.stop(&id).await, &words);
                refused(lab.remove(&id).await, &words);
                assert_eq!(lab.pods().await[0].state, PodSandboxState::SandboxNotready as i32);
                assert_eq!(lab.pve().guests(), [9000], "it is left alone");
                lab.pve().set_config(9000, "protection", "0");
                lab.pve().lock_guest(9000, None);
                lab.remove(&id).await.expect("nothing is in the way any more");
                lab.nothing_is_left().await;
            }
            // One that runs is stopped by a backup in mode "stop": its pod is over, and goes when the backup has ended.
            let id = lab.run().await.expect("a pod");
            tokio::task::block_in_place(|| lab.pve().stop_guest(9000));
            lab.pve().lock_guest(9000, Some("backup"));
            let end = Instant::now() + LONG;
            while lab.pods().await.first().is_some_and(|p| p.state == PodSandboxState::SandboxReady as i32) {
                assert!(Instant::now() < end, "the pod is ready without its CT");
                tokio::time::sleep(Duration::from_millis(50)).await; // the poll of a condition with a deadline
            }
            lab.pve().lock_guest(9000, None);
            lab.remove(&id).await.expect("removed");
            lab.nothing_is_left().await;
        });
    });
}

#[test]
fn a_template_that_somebody_deletes_is_uploaded_again() {
    isolated("a_template_that_somebody_deletes_is_uploaded_again", || {
        block_on(async {
            let mut lab = Lab::start().await;
            lab.life(|_, step, e| panic!("{step}: {e:?}")).await;
            lab.pve().drop_templates();
            let e = lab.run().await.expect_err("no template");
            assert!(e.code() == Code::FailedPrecondition && e.message().contains("vztmpl"), "{e:?}");
            lab.life(|_, step, e| panic!("{step}: {e:?}")).await;
            // Half of one, as an upload that broke has left it.
            lab.pve().cut_templates();
            lab.restart().await;
            lab.life(|_, step, e| panic!("{step}: {e:?}")).await;
            lab.nothing_is_left().await;
        });
    });
}
