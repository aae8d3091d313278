//! The load that is put on a runtime, in plain CRI: the same for ours and for another one beside it. What it prints are
//! lines `figure: NAME: ...`, where NAME is the runtime's.
//!
//! Used by `tests/load.rs` alone. Whoever calls says where the runtime's socket and daemon are; nothing here knows one.

// Tests print as they like.
#![allow(clippy::print_stdout)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use k8s_cri::v1 as cri;

use crate::support::client::{Client, container, create_request, pod};
use crate::support::crictl::BUSYBOX;

/// A runtime under load.
#[derive(Clone)]
pub struct Target {
    /// Its name in figures.
    pub name: &'static str,
    /// Its CRI socket.
    pub socket: PathBuf,
    /// Its daemon.
    pub daemon: u32,
    /// Beginnings of the names of processes that it keeps for its pods (the kernel shows 15 letters).
    pub helpers: &'static [&'static str],
    /// Where its pods' logs go.
    pub logs: PathBuf,
}

/// Memory of a process in KiB; 0 when it is gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Proportional set size.
    pub pss: u64,
    /// Resident set size.
    pub rss: u64,
}

impl std::ops::Add for Memory {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { pss: self.pss + other.pss, rss: self.rss + other.rss }
    }
}

/// Of one process.
pub fn memory(pid: u32) -> Memory {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default();
        line.trim().trim_end_matches(" kB").trim().parse().unwrap_or(0)
    };
    Memory { pss: field("Pss:"), rss: field("Rss:") }
}

/// Open descriptors of a process.
pub fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

impl Target {
    /// Processes that it keeps for its pods.
    pub fn helpers(&self) -> Vec<u32> {
        let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
        let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
        let named = |pid: &u32| {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            self.helpers.iter().any(|h| comm.starts_with(h))
        };
        pids.filter(named).collect()
    }

    /// The least that daemon and helpers hold within a few seconds of quiet: memory is given back a while after work.
    pub async fn quiet(&self) -> Quiet {
        let mut least = self.now();
        for _ in 0..25 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = self.now();
            least.daemon.pss = least.daemon.pss.min(now.daemon.pss);
            least.daemon.rss = least.daemon.rss.min(now.daemon.rss);
            least.helpers.pss = least.helpers.pss.min(now.helpers.pss);
            least.helpers.rss = least.helpers.rss.min(now.helpers.rss);
            least.descriptors = least.descriptors.min(now.descriptors);
        }
        least
    }

    fn now(&self) -> Quiet {
        let helpers = self.helpers().into_iter().map(memory).fold(Memory::default(), std::ops::Add::add);
        Quiet { daemon: memory(self.daemon), helpers, descriptors: descriptors(self.daemon) }
    }

    /// A figure of this runtime.
    pub fn figure(&self, text: impl std::fmt::Display) {
        println!("figure: {}: {text}", self.name);
    }
}

/// What a runtime holds when it has nothing to do.
#[derive(Debug, Clone, Copy)]
pub struct Quiet {
    /// The daemon.
    pub daemon: Memory,
    /// All processes for pods together.
    pub helpers: Memory,
    /// The daemon's open descriptors.
    pub descriptors: usize,
}

/// Durations of one kind of call.
#[derive(Default)]
pub struct Times(std::sync::Mutex<Vec<Duration>>);

impl Times {
    /// Runs a call and notes its time.
    pub async fn of<T>(&self, call: impl Future<Output = T>) -> T {
        let begun = Instant::now();
        let done = call.await;
        self.0.lock().expect("times").push(begun.elapsed());
        done
    }

    /// How many there were, their median and the value below which 95 of 100 are, in milliseconds.
    pub fn summary(&self) -> (usize, f64, f64) {
        let mut all = self.0.lock().expect("times").clone();
        all.sort();
        let at = |part: f64| {
            let i = ((all.len() as f64 * part) as usize).min(all.len().saturating_sub(1));
            all.get(i).map_or(0.0, |d| d.as_secs_f64() * 1000.0)
        };
        (all.len(), at(0.5), at(0.95))
    }
}

/// What the load measures.
#[derive(Default)]
pub struct Measured {
    /// RunPodSandbox.
    pub run: Times,
    /// CreateContainer.
    pub create: Times,
    /// StartContainer.
    pub start: Times,
    /// ExecSync.
    pub exec: Times,
    /// StopPodSandbox and RemovePodSandbox.
    pub remove: Times,
    /// A pod's whole life.
    pub life: Times,
    /// Lists, Status and statistics under load.
    pub lists: Times,
}

/// A started container in a pod of its own; their ids and the pod's configuration.
pub struct Made {
    /// Pod.
    pub pod: String,
    /// Container.
    pub container: String,
    /// As it was asked for.
    pub config: cri::PodSandboxConfig,
}

/// Runs a pod with one container.
pub async fn make(c: &mut Client, target: &Target, name: &str, script: &str, m: &Measured) -> Made {
    let config = pod(name, &target.logs);
    let request = cri::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
    let pod = m.run.of(c.runtime.run_pod_sandbox(request)).await.expect("RunPodSandbox").into_inner().pod_sandbox_id;
    let request = create_request(&pod, container("c", BUSYBOX, script), &config);
    let made = m.create.of(c.runtime.create_container(request)).await.expect("CreateContainer");
    let container = made.into_inner().container_id;
    let request = cri::StartContainerRequest { container_id: container.clone() };
    m.start.of(c.runtime.start_container(request)).await.expect("StartContainer");
    Made { pod, container, config }
}

/// Runs a shell script in a container; its exit code and what it said.
pub async fn exec(c: &mut Client, id: &str, script: &str, m: &Measured) -> (i32, Vec<u8>) {
    let cmd = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    let request = cri::ExecSyncRequest { container_id: id.to_owned(), cmd, timeout: 60 };
    let said = m.exec.of(c.runtime.exec_sync(request)).await.expect("ExecSync").into_inner();
    (said.exit_code, said.stdout)
}

/// Stops and removes a pod.
pub async fn remove(c: &mut Client, pod: &str, m: &Measured) {
    let work = async {
        let stop = cri::StopPodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        c.runtime.stop_pod_sandbox(stop).await.expect("StopPodSandbox");
        let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        c.runtime.remove_pod_sandbox(remove).await.expect("RemovePodSandbox");
    };
    m.remove.of(work).await;
}

/// A pod from its beginning to its end, with execs in the middle; some execs fail, some pods end by themselves.
async fn live(c: &mut Client, target: &Target, n: usize, m: &Measured) {
    let name = format!("load-{n}");
    let by_itself = n.is_multiple_of(3);
    // One that ends by itself does so when an exec has told it to.
    let script = match by_itself {
        true => format!("echo begin; until [ -e /end ]; do sleep 0.05; done; exit {}", n % 100),
        false => "echo begin; exec sleep 100000".to_owned(),
    };
    let made = make(c, target, &name, &script, m).await;
    let id = made.container.clone();
    assert_eq!(exec(c, &id, "echo out; exit 3", m).await, (3, b"out\n".to_vec()), "{name}");
    let (code, said) = exec(c, &id, "head -c 100000 /dev/zero | tr '\\0' x", m).await;
    assert_eq!((code, said.len()), (0, 100_000), "{name}");
    if by_itself {
        // The container's end may come before that of the exec that asked for it, and kills it then.
        let code = exec(c, &id, ": > /end", m).await.0;
        assert!(matches!(code, 0 | 137), "{name}: {code}");
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let request = cri::ContainerStatusRequest { container_id: id.clone(), verbose: false };
            let answer = c.runtime.container_status(request).await.expect("ContainerStatus").into_inner();
            let status = answer.status.expect("a status");
            if status.state == cri::ContainerState::ContainerExited as i32 {
                assert_eq!(status.exit_code, (n % 100) as i32, "{name}");
                break;
            }
            assert!(Instant::now() < end, "{name} does not end");
            tokio::time::sleep(Duration::from_millis(50)).await; // the poll of a condition with a deadline
        }
    } else {
        let stop = cri::StopContainerRequest { container_id: id, timeout: 0 };
        c.runtime.stop_container(stop).await.expect("StopContainer");
    }
    remove(c, &made.pod, m).await;
}

/// What a kubelet asks for all the time.
async fn look(c: &mut Client, m: &Measured) {
    let pods = m.lists.of(c.runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default())).await;
    pods.expect("ListPodSandbox");
    let all = m.lists.of(c.runtime.list_containers(cri::ListContainersRequest::default())).await;
    all.expect("ListContainers");
    m.lists.of(c.runtime.status(cri::StatusRequest::default())).await.expect("Status");
    // One that goes in the middle of it makes other runtimes' list fail: only ours is held to it elsewhere.
    let stats = c.runtime.list_container_stats(cri::ListContainerStatsRequest::default());
    drop(m.lists.of(stats).await);
}

/// Pods come and go, `parallel` at once, for `time`; one worker looks at everything all the while. Gives the number of
/// pods.
pub async fn churn(c: &Client, target: &Target, parallel: usize, time: Duration, m: &Arc<Measured>) -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let (begun, first) = (Instant::now(), NEXT.load(Ordering::Relaxed));
    let over = AtomicBool::new(false);
    let workers = (0..parallel).map(|_| {
        let mut c = c.clone();
        async move {
            while begun.elapsed() < time {
                let n = NEXT.fetch_add(1, Ordering::Relaxed);
                let begun = Instant::now();
                live(&mut c, target, n, m).await;
                m.life.0.lock().expect("times").push(begun.elapsed());
            }
        }
    });
    let mut own = c.clone();
    let looking = async {
        while !over.load(Ordering::Relaxed) {
            look(&mut own, m).await;
            tokio::time::sleep(Duration::from_millis(100)).await; // as often as somebody would
        }
    };
    let working = async {
        futures::future::join_all(workers).await;
        over.store(true, Ordering::Relaxed);
    };
    tokio::join!(working, looking);
    NEXT.load(Ordering::Relaxed) - first
}

/// Prints what was measured of `pods` pods in `time`.
pub fn tell(target: &Target, pods: usize, time: Duration, parallel: usize, m: &Measured) {
    target.figure(format_args!("churn at {parallel}: {:.1} pods a minute", pods as f64 * 60.0 / time.as_secs_f64()));
    for (what, times) in [
        ("RunPodSandbox", &m.run),
        ("CreateContainer", &m.create),
        ("StartContainer", &m.start),
        ("ExecSync", &m.exec),
        ("stop and remove a pod", &m.remove),
        ("a pod's life", &m.life),
        ("lists, Status, stats", &m.lists),
    ] {
        let (n, median, p95) = times.summary();
        target.figure(format_args!("{what}: median {median:.1} ms, 95 % below {p95:.1} ms ({n} calls)"));
    }
}
