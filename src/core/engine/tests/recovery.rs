//! What a daemon finds that starts after its predecessor, a monitor, or both have died at a bad moment.

use super::*;
use crate::core::ports::monitor_v1;
use crate::utils::pidfd::ProcessId;

/// A process that lives until this is dropped.
struct Process(std::process::Child);

impl Process {
    fn start() -> Self {
        #[allow(clippy::disallowed_methods)] // outlives the call, unlike what the spawner is for
        Self(std::process::Command::new("sleep").arg("600").spawn().expect("sleep"))
    }

    fn id(&self) -> ProcessId {
        ProcessId::of(self.0.id() as i32).expect("it lives")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Bench {
    fn die(&self, pod: &PodId) {
        locked(&self.world.monitors).remove(pod);
    }

    /// A pod with an init of its own, which its monitor knows.
    async fn pod_with(&self, name: &str, init: &Process) -> PodId {
        *locked(&self.world.init) = Some(init.id());
        let pod = self.pod(name).await;
        locked(&self.world.monitors).get_mut(&pod).expect("a monitor").init = init.id().pid;
        pod
    }

    fn pod_phase(&self, pod: &PodId) -> PodPhase {
        self.engine.pod(Scope::Cri, pod.as_str()).expect("listed").phase
    }

    fn init_of_monitor(&self, pod: &PodId) -> i32 {
        locked(&self.world.monitors).get(pod).map_or(0, |m| m.init)
    }
}

#[tokio::test]
async fn a_pod_that_cannot_be_taken_up_keeps_what_it_owns() {
    let mut b = Bench::new();
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    b.tasks.shutdown().await;
    let path = Utf8Path::from_path(b.dir.path()).expect("utf8").to_owned();
    // Its handler is gone from the configuration.
    (b.engine, b.tasks) = engine_with(Vec::new(), &b.world, &path, "boot-1");
    let report = b.engine.recover().await.expect("recovery is never fatal");
    assert_eq!(report.pods, 0);
    assert!(report.garbage_kept.expect("kept").contains("not garbage"));
    assert!(locked(&b.world.rootfs).contains(&c) && locked(&b.world.units).contains(&pod));
    // And is there again.
    let report = b.restart("boot-1").await;
    assert_eq!((report.pods, report.running, report.garbage_kept), (1, 1, None));
    b.engine.remove_sandbox(Scope::Cri, pod.as_str()).await.expect("remove");
    assert_eq!((b.world.left(), b.records_left()), ((0, 0, 0), 0));
}

#[tokio::test]
async fn an_end_that_was_told_before_all_died_is_taken_out_of_the_runtime() {
    let mut b = Bench::new();
    let pod = b.pod("a").await;
    let (ended, runs) = (b.running(&pod, "ended").await, b.running(&pod, "runs").await);
    b.tasks.shutdown().await;
    // The monitor wrote the exit down and died before it could remove the container.
    let told =
        r#"{"version": 1, "exit_code": 7, "signal": 0, "finished_at": 1700000000000000009, "oom": false, "note": ""}"#;
    let folder = b.engine.shared.run_dir(&pod, &ended);
    std::fs::create_dir_all(&folder).expect("folder");
    #[allow(clippy::disallowed_methods)] // a monitor's file
    std::fs::write(folder.join("exit.json"), told).expect("written");
    b.die(&pod);
    locked(&b.world.removed).clear();
    b.restart("boot-1").await;
    assert_eq!(b.engine.container(Scope::Cri, ended.as_str()).expect("known").exit.clone().expect("ended").code, 7);
    assert_eq!(*locked(&b.world.removed), [ended].into(), "its successor is not told of it, and removes nothing");
    assert_eq!(b.phase(&runs), ContainerPhase::Running);
}

#[tokio::test]
async fn a_monitor_that_took_over_all_but_the_init_is_replaced() {
    let mut b = Bench::new();
    let init = Process::start();
    let pod = b.pod_with("a", &init).await;
    let c = b.running(&pod, "c").await;
    b.tasks.shutdown().await;
    // Interrupted: the daemon died between the containers and the init.
    locked(&b.world.monitors).get_mut(&pod).expect("a monitor").init = 0;
    b.restart("boot-1").await;
    assert_eq!((b.init_of_monitor(&pod), b.pod_phase(&pod)), (init.id().pid, PodPhase::Ready));
    assert_eq!(b.phase(&c), ContainerPhase::Running);
}

#[tokio::test]
async fn an_init_that_ended_unseen_makes_its_pod_not_ready() {
    for monitor_died in [false, true] {
        let mut b = Bench::new();
        let init = Process::start();
        let pod = b.pod_with("a", &init).await;
        b.tasks.shutdown().await;
        drop(init);
        match monitor_died {
            true => b.die(&pod),
            false => locked(&b.world.monitors).get_mut(&pod).expect("a monitor").init = 0,
        }
        b.restart("boot-1").await;
        tokio::time::timeout(Duration::from_secs(5), async {
            while b.pod_phase(&pod) != PodPhase::NotReady {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("in time");
    }
}

#[tokio::test(start_paused = true)]
async fn a_take_over_that_fails_at_the_start_is_tried_again() {
    let mut b = Bench::new();
    let process = Process::start();
    let boot = process.id().boot_id;
    b.restart(&boot).await;
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    b.tasks.shutdown().await;
    // A process that lives, so that it is watched while nobody has it.
    let path = Utf8Path::from_path(b.dir.path()).expect("utf8").join("root");
    let store = RecordStore::open(&path).expect("records");
    let (_, mut containers) = store.load_one(&pod).expect("readable").expect("there");
    let record = containers.iter_mut().find(|r| r.id == c).expect("on record");
    (record.pid, record.pid_start_time) = (process.id().pid, process.id().start_time);
    store.save_container(record).expect("saved");
    drop(store);
    b.die(&pod);
    *locked(&b.world.fail) = Some("adopt");
    b.restart(&boot).await;
    assert_eq!((b.phase(&c), b.pod_phase(&pod)), (ContainerPhase::Running, PodPhase::Ready));
    assert!(!locked(&b.world.monitors).contains_key(&pod), "half a take-over is none");
    tokio::time::sleep(Duration::from_secs(60)).await;
    b.until(&c, ContainerPhase::Running).await;
    let taken = || locked(&b.world.monitors).get(&pod).is_some_and(|m| m.containers.contains_key(c.as_str()));
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while !taken() && std::time::Instant::now() < end {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(taken());
    b.world.end(&pod, &c, 4).await;
    b.until(&c, ContainerPhase::Exited).await;
    assert_eq!(b.engine.container(Scope::Cri, c.as_str()).expect("known").exit.clone().expect("ended").code, 4);
}

#[tokio::test]
async fn a_monitor_that_finds_out_what_runs_is_given_nothing() {
    let mut b = Bench::new();
    let pod = b.pod("a").await;
    let (lives, started, ended) = (b.running(&pod, "c").await, b.running(&pod, "d").await, b.running(&pod, "e").await);
    b.tasks.shutdown().await;
    // Its start was not on record yet.
    let path = Utf8Path::from_path(b.dir.path()).expect("utf8").join("root");
    let store = RecordStore::open(&path).expect("records");
    let (_, mut containers) = store.load_one(&pod).expect("readable").expect("there");
    let record = containers.iter_mut().find(|r| r.id == started).expect("on record");
    record.phase = ContainerPhase::Created;
    store.save_container(record).expect("saved");
    drop(store);
    // They run where this node has no processes of theirs.
    let mut found = locked(&b.world.monitors).remove(&pod).expect("a monitor").containers;
    let told = found.get_mut(ended.as_str()).expect("there");
    told.phase = monitor_v1::ContainerPhase::PhaseExited.into();
    told.exit = Some(monitor_v1::Exit { code: 7, finished_at: b.world.now_ns(), ..Default::default() });
    *locked(&b.world.found) = found;
    *locked(&b.world.broken) = Some("adopt");
    b.restart("boot-1").await;
    assert_eq!(b.pod_phase(&pod), PodPhase::Ready);
    assert_eq!((b.phase(&lives), b.phase(&started)), (ContainerPhase::Running, ContainerPhase::Running));
    let exit = b.engine.container(Scope::Cri, ended.as_str()).expect("known").exit.clone().expect("ended");
    assert_eq!(exit.code, 7);
    b.world.end(&pod, &lives, 4).await;
    b.until(&lives, ContainerPhase::Exited).await;
    assert_eq!(b.engine.container(Scope::Cri, lives.as_str()).expect("known").exit.clone().expect("ended").code, 4);
}
