//! kill -9 of the daemon, of monitors, or of both at every named point of a pod's, container's, exec's and image's life. What
//! ran still runs, exit codes and log lines are right, what was being made is there or gone, nothing is left behind.
//!
//! Run by `make test-faults` (and with all suites), as root. `FAULT_SEED` repeats a run (each prints its own), `FAULT_ROUNDS` is
//! how often each point is met (1), `FAULT_POINT` names the only one, `FAULT_POINTS` several, by their steps or the
//! beginnings of their names ("Start,monitor.create"). With LXCRI_TEST_HANDLER=lxc pods are that handler's. A crash leaves
//! nothing: see `support`.

#![allow(clippy::disallowed_methods)] // a file that says at which point to die is no state

mod faults_support;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use faults_support::{POINTS, Point, Step, check_table};
use k8s_cri::v1 as cri;
use support::client::{Client, block_on, container, create_request, image_spec, pod};
use support::crictl::{BUSYBOX, read_log, stream_lines};
use support::node::{Node, Options};
use support::{isolated_with, monitor_with_failpoints, snapshot};

/// One small layer of its own.
const IMAGE: &str = "registry.k8s.io/pause:3.10";
/// Written by the victim and by the one that is never touched: numbered lines, without end.
const WRITER: &str = "i=0; trap 'echo end; exit 7' TERM; while :; do echo line $i; i=$((i+1)); sleep 0.02; done";
const RUNNING: i32 = 1;
const EXITED: i32 = 2;
/// A monitor that is killed loses the one read that it holds, in bytes.
const READ: usize = 16 << 10;
/// No step takes longer, on a machine that does much else.
const LONG: Duration = Duration::from_secs(90);

type Answer<T> = Result<T, String>;

/// Numbers that a seed repeats.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n.max(1)
    }
    fn shuffle<T>(&mut self, list: &mut [T]) {
        (1..list.len()).rev().for_each(|i| list.swap(i, self.below(i + 1)));
    }
}

fn said(e: tonic::Status) -> String {
    format!("{:?}: {}", e.code(), e.message())
}

struct World {
    node: Node,
    client: Client,
    random: Random,
    file: PathBuf,
    /// Monitors that died while the victim, and the bystander, ran.
    lost: usize,
    /// Nobody may have watched the victim's end.
    unseen: bool,
    met: BTreeMap<&'static str, usize>,
    trace: Vec<String>,
}

impl World {
    /// Says who is to die at the point.
    fn arm(&mut self, point: &Point) {
        let hit = 1 + self.random.below(point.hits as usize);
        let both = self.random.below(2) == 1;
        let beside = match (both, point.is_monitors()) {
            (false, _) => String::new(),
            (true, false) => "monitors".into(),
            (true, true) => self.node.daemon_pid().to_string(),
        };
        self.trace.push(format!("{} (hit {hit}, and {beside:?})", point.name));
        if both || point.is_monitors() {
            self.lost += 1;
            self.unseen |= both;
        }
        std::fs::write(&self.file, format!("{} {hit} {beside}\n", point.name)).expect("armed");
    }

    fn armed(&self) -> bool {
        self.file.exists()
    }

    /// A daemon that has died is replaced, until one stays.
    fn revive(&mut self) {
        let end = Instant::now() + LONG;
        while self.node.daemon_has_ended() && !self.node.try_start_daemon() {
            assert!(Instant::now() < end, "no daemon stays: {:?}", self.trace);
        }
    }

    /// Makes a call again and again until it succeeds, whoever dies meanwhile; then the point has been met.
    async fn step<T>(
        &mut self,
        what: &str,
        point: Option<Point>,
        mut call: impl AsyncFnMut(&mut World) -> Answer<T>,
    ) -> T {
        if let Some(point) = &point {
            self.arm(point);
        }
        let end = Instant::now() + LONG;
        let mut result = None;
        let mut why = String::new();
        loop {
            if result.is_none() {
                match call(self).await {
                    Ok(done) => result = Some(done),
                    Err(e) => why = e,
                }
            }
            if self.node.daemon_has_ended() {
                // What it answered has to be true of its successor, too.
                result = None;
                self.revive();
            } else if result.is_some() && !self.armed() {
                tokio::time::sleep(Duration::from_millis(20)).await; // who was killed a moment ago is seen to be
                if !self.node.daemon_has_ended() {
                    break;
                }
                continue;
            }
            let trace = &self.trace;
            assert!(Instant::now() < end, "{what}: not done ({why}), armed still: {}; {trace:?}", self.armed());
            tokio::time::sleep(Duration::from_millis(20)).await; // the poll of a condition with a deadline
        }
        if let Some(point) = point {
            *self.met.entry(point.name).or_default() += 1;
        }
        result.expect("a result")
    }

    async fn status(&mut self, id: &str) -> Answer<cri::ContainerStatus> {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let answer = self.client.runtime.container_status(request).await.map_err(said)?.into_inner();
        answer.status.ok_or_else(|| "no status".into())
    }

    async fn run_pod(&mut self, config: &cri::PodSandboxConfig) -> Answer<String> {
        let name = &config.metadata.as_ref().expect("metadata").name;
        let list = self
            .client
            .runtime
            .list_pod_sandbox(cri::ListPodSandboxRequest::default())
            .await
            .map_err(said)?
            .into_inner();
        for there in list.items.into_iter().filter(|p| p.metadata.as_ref().is_some_and(|m| m.name == *name)) {
            if there.state == 0 {
                return Ok(there.id);
            }
            self.remove_pod(&there.id).await?;
        }
        let request = cri::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        Ok(self.client.runtime.run_pod_sandbox(request).await.map_err(said)?.into_inner().pod_sandbox_id)
    }

    async fn remove_pod(&mut self, id: &str) -> Answer<()> {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.client.runtime.remove_pod_sandbox(request).await.map(drop).map_err(said)
    }

    async fn create(&mut self, pod_id: &str, pod: &cri::PodSandboxConfig) -> Answer<String> {
        let filter = cri::ContainerFilter { pod_sandbox_id: pod_id.to_owned(), ..Default::default() };
        let request = cri::ListContainersRequest { filter: Some(filter) };
        let list = self.client.runtime.list_containers(request).await.map_err(said)?.into_inner();
        if let Some(there) = list.containers.into_iter().next() {
            assert_eq!(there.state, 0, "a container that was made is made: {:?}", self.trace);
            return Ok(there.id);
        }
        let mut config = container("c", BUSYBOX, WRITER);
        if let Some(security) = config.linux.as_mut().and_then(|l| l.security_context.as_mut()) {
            let options = pod.linux.as_ref().and_then(|l| l.security_context.as_ref());
            security.namespace_options = options.and_then(|s| s.namespace_options.clone());
        }
        let request = create_request(pod_id, config, pod);
        Ok(self.client.runtime.create_container(request).await.map_err(said)?.into_inner().container_id)
    }

    async fn start(&mut self, id: &str) -> Answer<()> {
        match self.status(id).await? {
            status if status.state == RUNNING => Ok(()),
            status if status.state == EXITED => panic!("it runs for ever: {status:?}; {:?}", self.trace),
            _ => {
                let request = cri::StartContainerRequest { container_id: id.to_owned() };
                self.client.runtime.start_container(request).await.map(drop).map_err(said)
            }
        }
    }

    async fn exec(&mut self, id: &str) -> Answer<()> {
        let cmd = ["echo", "said"].map(String::from).to_vec();
        let request = cri::ExecSyncRequest { container_id: id.to_owned(), cmd, timeout: 20 };
        let answer = self.client.runtime.exec_sync(request).await.map_err(said)?.into_inner();
        assert_eq!((answer.exit_code, &*answer.stdout), (0, &b"said\n"[..]), "{:?}", self.trace);
        Ok(())
    }

    async fn stop(&mut self, id: &str) -> Answer<()> {
        let request = cri::StopContainerRequest { container_id: id.to_owned(), timeout: 30 };
        self.client.runtime.stop_container(request).await.map_err(said)?;
        let status = self.status(id).await?;
        assert_eq!(status.state, EXITED, "{status:?}; {:?}", self.trace);
        let unknown = status.exit_code == 255 && !status.message.is_empty() && self.unseen;
        assert!(status.exit_code == 7 || unknown, "{status:?}; {:?}", self.trace);
        assert!(status.finished_at >= status.started_at && status.started_at > 0, "{status:?}");
        Ok(())
    }

    /// Numbered lines: none twice, none missing but for a read of each monitor that died.
    fn check_log(&self, log: &Path, deaths: usize, ended: bool) {
        let lines = stream_lines(&read_log(log), "stdout");
        let (mut next, mut gaps) = (0, 0);
        for line in lines.iter().filter(|l| *l != "end") {
            // A read that was lost may have ended or begun in the middle of a line.
            let Some(n) = line.strip_prefix("line ").and_then(|n| n.parse::<usize>().ok()) else {
                assert!(deaths > 0, "{line:?} in {}; {:?}", log.display(), self.trace);
                continue;
            };
            assert!(n >= next, "line {n} after line {next} in {}; {:?}", log.display(), self.trace);
            if n > next {
                gaps += 1;
                assert!((n - next) * "line 0\n".len() <= READ, "{} lines are lost; {:?}", n - next, self.trace);
            }
            next = n + 1;
        }
        assert!(gaps <= deaths, "{gaps} gaps, {} monitors died: {}; {:?}", deaths, log.display(), self.trace);
        let told = lines.last().is_some_and(|l| l == "end");
        assert!(!ended || told || deaths > 0, "no last word in {}; {:?}", log.display(), self.trace);
    }
}

/// Kills the monitor of a pod.
fn kill_monitor(pod: &str) {
    for pid in monitors_of(pod) {
        if let Some(pid) = rustix::process::Pid::from_raw(pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

fn monitors_of(pod: &str) -> Vec<i32> {
    let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let line = |pid: &i32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    pids.filter(|pid| line(pid).split(|b| *b == 0).skip(1).take(2).eq([&b"--pod"[..], pod.as_bytes()])).collect()
}

/// One life, with at most one point in each of its steps.
async fn live(world: &mut World, n: usize, mut points: BTreeMap<Step, Point>, bystander: (&str, &str, &Path)) {
    let (bystander_pod, bystander_id, bystander_log) = bystander;
    let mut at = |step| points.remove(&step);
    world.trace = vec![format!("life {n}")];
    let lost_before = world.lost;
    let image = || Some(image_spec(IMAGE));
    if let Some(point) = at(Step::Pull) {
        let pull = async |w: &mut World| {
            let request = cri::PullImageRequest { image: image(), ..Default::default() };
            w.client.images.pull_image(request).await.map(drop).map_err(said)
        };
        world.step("PullImage", Some(point), pull).await;
    }
    if let Some(point) = at(Step::RemoveImage) {
        let request = cri::PullImageRequest { image: image(), ..Default::default() };
        world.client.images.pull_image(request).await.expect("PullImage");
        let remove = async |w: &mut World| {
            let request = cri::RemoveImageRequest { image: image() };
            w.client.images.remove_image(request).await.map(drop).map_err(said)
        };
        world.step("RemoveImage", Some(point), remove).await;
    } else {
        world.client.images.remove_image(cri::RemoveImageRequest { image: image() }).await.expect("RemoveImage");
    }
    let logs = world.node.dir.join("logs");
    let name = format!("victim-{n}");
    let mut config = pod(&name, &logs);
    let wanted = at(Step::Run);
    let needs_init = wanted.is_some_and(|p| p.name.contains("init"));
    if needs_init || world.random.below(2) == 1 {
        let security = config.linux.as_mut().and_then(|l| l.security_context.as_mut()).expect("a security context");
        security.namespace_options = Some(cri::NamespaceOption::default());
    }
    let pod_id = world.step("RunPodSandbox", wanted, async |w| w.run_pod(&config).await).await;
    world.unseen = false;
    let id = world.step("CreateContainer", at(Step::Create), async |w| w.create(&pod_id, &config).await).await;
    world.unseen = false;
    world.step("StartContainer", at(Step::Start), async |w| w.start(&id).await).await;
    let log = logs.join(&name).join("c.log");
    let lines = |log: &Path| if log.exists() { read_log(log).len() } else { 0 };
    let before = lines(&log);
    world
        .step("lines", at(Step::Write), async |_| (lines(&log) >= before + 5).then_some(()).ok_or("few lines".into()))
        .await;
    let reopen = async |w: &mut World| {
        let request = cri::ReopenContainerLogRequest { container_id: id.clone() };
        w.client.runtime.reopen_container_log(request).await.map(drop).map_err(said)
    };
    world.step("ReopenContainerLog", at(Step::Reopen), reopen).await;
    world.step("ExecSync", at(Step::Exec), async |w| w.exec(&id).await).await;
    if let Some(point) = at(Step::TakeOver) {
        let die = async |w: &mut World| {
            // The point is met when there is no monitor.
            if w.armed() {
                kill_monitor(&pod_id);
            }
            w.lost += 1;
            w.exec(&id).await
        };
        world.step("take-over", Some(point), die).await;
    }
    if let Some(point) = at(Step::Recover) {
        for _ in 0..2 {
            world.arm(&point);
            world.node.kill_daemon();
            world.revive();
            world.step("recovery", None, async |w| w.status(&id).await.map(drop)).await;
        }
        *world.met.entry(point.name).or_default() += 1;
    }
    world.start(&id).await.expect("it runs");
    world.unseen = false;
    world.step("StopContainer", at(Step::Stop), async |w| w.stop(&id).await).await;
    world.check_log(&log, world.lost - lost_before, true);
    let remove = async |w: &mut World| {
        let request = cri::RemoveContainerRequest { container_id: id.clone() };
        w.client.runtime.remove_container(request).await.map(drop).map_err(said)
    };
    if points.contains_key(&Step::Remove) || !n.is_multiple_of(3) {
        world.step("RemoveContainer", points.remove(&Step::Remove), remove).await;
    }
    let stop = async |w: &mut World| {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: pod_id.clone() };
        w.client.runtime.stop_pod_sandbox(request).await.map(drop).map_err(said)
    };
    world.step("StopPodSandbox", points.remove(&Step::StopPod), stop).await;
    world.step("RemovePodSandbox", points.remove(&Step::RemovePod), async |w| w.remove_pod(&pod_id).await).await;
    // Whatever has died: who had nothing to do with it runs, and has a monitor.
    world
        .step("bystander", None, async |w| {
            let status = w.status(bystander_id).await?;
            assert_eq!(status.state, RUNNING, "{status:?}; {:?}", w.trace);
            w.exec(bystander_id).await
        })
        .await;
    assert_eq!(monitors_of(bystander_pod).len(), 1, "{:?}", world.trace);
    world.check_log(bystander_log, world.lost, false);
    let list = world
        .client
        .runtime
        .list_pod_sandbox(cri::ListPodSandboxRequest::default())
        .await
        .expect("ListPodSandbox")
        .into_inner();
    assert_eq!(list.items.len(), 1, "{:?}; {:?}", list.items, world.trace);
}

#[test]
fn every_point_is_in_the_table() {
    check_table();
}

#[test]
fn nothing_is_lost_wherever_it_dies() {
    isolated_with("nothing_is_lost_wherever_it_dies", monitor_with_failpoints, || {
        let given = |name: &str| std::env::var(name).ok();
        let seed = given("FAULT_SEED").and_then(|s| s.parse().ok()).unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
            now.as_nanos() as u64 | 1
        });
        println!("\nfigure: FAULT_SEED={seed}");
        let rounds: usize = given("FAULT_ROUNDS").and_then(|s| s.parse().ok()).unwrap_or(1);
        let only = given("FAULT_POINT");
        let some = given("FAULT_POINTS");
        let among = |p: &Point, part: &str| p.name.starts_with(part) || format!("{:?}", p.step) == part;
        let is_chosen = |p: &&Point| {
            only.as_ref().is_none_or(|only| p.name == only)
                && some.as_ref().is_none_or(|some| some.split(',').any(|part| among(p, part)))
        };
        let file = PathBuf::from("/tmp/failpoint");
        let options = Options { failpoint_file: Some(file.clone()), ..Default::default() };
        let met = |p: &&Point| p.is_met_by(&options.handler);
        let chosen: Vec<Point> = POINTS.iter().filter(is_chosen).filter(met).copied().collect();
        assert!(!chosen.is_empty(), "no such point");
        let node = Node::start(options);
        block_on(async {
            let client = Client::connect(&node.socket()).await;
            let mut world = World {
                node,
                client,
                random: Random(seed | 1),
                file,
                lost: 0,
                unseen: false,
                met: BTreeMap::new(),
                trace: Vec::new(),
            };
            world.client.pull(BUSYBOX).await;
            let logs = world.node.dir.join("logs");
            let config = pod("bystander", &logs);
            let pod_id = world.run_pod(&config).await.expect("RunPodSandbox");
            let id = world.create(&pod_id, &config).await.expect("CreateContainer");
            world.start(&id).await.expect("StartContainer");
            let log = logs.join("bystander/c.log");
            let bystander = (pod_id.as_str(), id.as_str(), log.as_path());
            // The first life makes what stays for all.
            live(&mut world, 0, BTreeMap::new(), bystander).await;
            let mut before = snapshot::take(&world.node);
            before.entry("processes").or_default().push("sleep 0.02".into());
            let started = Instant::now();
            let mut lives = 0;
            for _ in 0..rounds {
                let mut groups: BTreeMap<Step, Vec<Point>> = BTreeMap::new();
                for point in &chosen {
                    groups.entry(point.step).or_default().push(*point);
                }
                groups.values_mut().for_each(|group| world.random.shuffle(group));
                while groups.values().any(|group| !group.is_empty()) {
                    lives += 1;
                    let points = groups.iter_mut().filter_map(|(step, group)| Some((*step, group.pop()?))).collect();
                    live(&mut world, lives, points, bystander).await;
                    snapshot::assert_back_to(&before, &world.node);
                }
            }
            let met: BTreeSet<_> = world.met.keys().collect();
            assert_eq!(met.len(), chosen.len());
            println!(
                "figure: killed at {} points, {rounds} times each, in {lives} lives and {:?}; {} monitors died",
                met.len(),
                started.elapsed(),
                world.lost,
            );
        });
    });
}
