//! The engine on a fake world: idempotence of every verb, failures at every step, recovery.

mod fakes;
mod observe;
mod recovery;

use std::sync::Arc;
use std::time::Duration;

use camino::Utf8Path;
use fakes::*;

use super::*;
use crate::core::config::Router;
use crate::core::ports::{MonitorEvent, NoFdStore};
use crate::core::state::ContainerPhase;

struct Bench {
    world: Arc<World>,
    dir: tempfile::TempDir,
    engine: Engine,
    tasks: TaskSet,
}

fn engine_on(world: &Arc<World>, dir: &Utf8Path, boot: &str) -> (Engine, TaskSet) {
    engine_with(vec![Arc::new(FakeBackend(world.clone()))], world, dir, boot)
}

fn engine_with(backends: Vec<Arc<dyn Backend>>, world: &Arc<World>, dir: &Utf8Path, boot: &str) -> (Engine, TaskSet) {
    let tasks = TaskSet::new("test");
    let config = EngineConfig {
        state: dir.join("state"),
        default_handler: "fake".into(),
        router: Router::default(),
        policies: Default::default(),
        container_quota: 0,
        exec_drain: Duration::from_secs(1),
        boot_id: boot.into(),
    };
    let ports = Ports {
        backends,
        layers: Arc::new(FakeLayers(world.clone())),
        images: Arc::new(FakeImages),
        supervisor: Arc::new(FakeSupervisor(world.clone())),
        parked: Arc::new(NoFdStore),
        plugins: None,
        clock: world.clone(),
    };
    let records = RecordStore::open(&dir.join("root")).expect("records");
    (Engine::new(config, ports, records, tasks.clone()), tasks)
}

impl Bench {
    fn new() -> Self {
        let (world, dir) = (Arc::new(World::default()), tempfile::tempdir().expect("tempdir"));
        let (engine, tasks) = engine_on(&world, Utf8Path::from_path(dir.path()).expect("utf8"), "boot-1");
        Self { world, dir, engine, tasks }
    }

    /// The daemon dies and another one starts.
    async fn restart(&mut self, boot: &str) -> RecoveryReport {
        self.tasks.shutdown().await;
        let path = Utf8Path::from_path(self.dir.path()).expect("utf8");
        (self.engine, self.tasks) = engine_on(&self.world, path, boot);
        self.engine.recover().await.expect("recovery is never fatal")
    }

    async fn pod(&self, name: &str) -> PodId {
        self.engine.run_sandbox(Owner::Cri, pod_config(name), "").await.expect("a pod")
    }

    async fn running(&self, pod: &PodId, name: &str) -> ContainerId {
        let id = self.engine.create_container(Scope::Cri, pod.as_str(), container_config(name)).await.expect("created");
        self.engine.start_container(Scope::Cri, id.as_str()).await.expect("started");
        id
    }

    fn phase(&self, id: &ContainerId) -> ContainerPhase {
        self.engine.container(Scope::Cri, id.as_str()).expect("known").phase
    }

    async fn until(&self, id: &ContainerId, phase: ContainerPhase) {
        tokio::time::timeout(Duration::from_secs(5), async {
            while self.phase(id) != phase {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("in time");
    }

    fn records_left(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("root/pods")).expect("folder").count()
    }
}

#[tokio::test]
async fn a_whole_life_leaves_nothing_and_every_verb_repeats() {
    let b = Bench::new();
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    assert_eq!(b.phase(&c), ContainerPhase::Running);
    let again = b.engine.start_container(Scope::Cri, c.as_str()).await.expect_err("runs already");
    assert_eq!(again.kind(), Kind::FailedPrecondition);
    for _ in 0..2 {
        b.engine.stop_container(Scope::Cri, c.as_str(), Duration::from_secs(5)).await.expect("stop");
    }
    assert_eq!(b.engine.container(Scope::Cri, c.as_str()).expect("known").exit.clone().expect("ended").code, 143);
    for _ in 0..2 {
        b.engine.stop_sandbox(Scope::Cri, pod.as_str()).await.expect("stop pod");
    }
    let late = b.engine.create_container(Scope::Cri, pod.as_str(), container_config("d")).await.expect_err("not ready");
    assert_eq!(late.kind(), Kind::FailedPrecondition);
    for _ in 0..2 {
        b.engine.remove_container(Scope::Cri, c.as_str()).await.expect("remove");
        b.engine.remove_sandbox(Scope::Cri, pod.as_str()).await.expect("remove pod");
        b.engine.stop_sandbox(Scope::Cri, pod.as_str()).await.expect("gone is stopped");
    }
    assert_eq!((b.world.left(), b.records_left()), ((0, 0, 0), 0));
    assert_eq!(b.engine.pod(Scope::Cri, pod.as_str()).expect_err("gone").kind(), Kind::NotFound);
}

#[tokio::test]
async fn a_create_that_fails_anywhere_leaves_nothing_and_frees_the_name() {
    let b = Bench::new();
    for step in ["spawn", "sandbox"] {
        *locked(&b.world.fail) = Some(step);
        b.engine.run_sandbox(Owner::Cri, pod_config("a"), "").await.expect_err(step);
        assert_eq!((b.world.left(), b.records_left()), ((0, 0, 0), 0), "{step}");
    }
    let pod = b.pod("a").await;
    for step in ["rootfs", "plan", "create"] {
        *locked(&b.world.fail) = Some(step);
        b.engine.create_container(Scope::Cri, pod.as_str(), container_config("c")).await.expect_err(step);
        assert_eq!(b.world.left(), (1, 1, 0), "{step}");
        assert!(b.engine.containers(Scope::Cri).is_empty(), "{step}");
    }
    b.running(&pod, "c").await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_taken_back_is_tried_again_until_it_is_gone() {
    let b = Bench::new();
    *locked(&b.world.hang) = Some("sandbox");
    let stop = async {
        b.world.reached.notified().await;
        *locked(&b.world.fail) = Some("teardown");
        // Nobody was told the id yet; a stop finds it all the same and ends the hanging create.
        let id = b.engine.shared.index().all_pods()[0].id.clone();
        let _ = b.engine.stop_sandbox(Scope::Cri, id.as_str()).await;
    };
    let (made, ()) = tokio::join!(b.engine.run_sandbox(Owner::Cri, pod_config("a"), ""), stop);
    made.expect_err("stopped while it was made");
    tokio::time::timeout(Duration::from_secs(120), async {
        while b.world.left() != (0, 0, 0) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await
    .expect("cleaned up");
    *locked(&b.world.hang) = None;
    b.pod("a").await;
}

#[tokio::test]
async fn names_are_taken_once_and_a_second_caller_joins() {
    let b = Bench::new();
    let (first, second) = tokio::join!(
        b.engine.run_sandbox(Owner::Cri, pod_config("a"), ""),
        b.engine.run_sandbox(Owner::Cri, pod_config("a"), "")
    );
    assert_eq!(first.expect("first"), second.expect("joined"));
    let third = b.engine.run_sandbox(Owner::Cri, pod_config("a"), "").await.expect_err("taken");
    assert_eq!(third.kind(), Kind::AlreadyExists);
    assert_eq!(
        b.engine.run_sandbox(Owner::Cri, pod_config("b"), "nope").await.expect_err("handler").kind(),
        Kind::InvalidArgument
    );
    let pod = b.engine.pods(Scope::Cri)[0].id.clone();
    b.running(&pod, "c").await;
    let twin = b.engine.create_container(Scope::Cri, pod.as_str(), container_config("c")).await.expect_err("taken");
    assert_eq!(twin.kind(), Kind::AlreadyExists);
}

#[tokio::test(start_paused = true)]
async fn a_container_that_ignores_its_signal_is_killed_when_its_grace_is_over() {
    let b = Bench::new();
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    *locked(&b.world.hang) = Some("sigterm");
    let before = tokio::time::Instant::now();
    b.engine.stop_container(Scope::Cri, c.as_str(), Duration::from_secs(30)).await.expect("stop");
    assert!(before.elapsed() >= Duration::from_secs(30));
    assert_eq!(b.engine.container(Scope::Cri, c.as_str()).expect("known").exit.clone().expect("ended").code, 137);
}

#[tokio::test]
async fn local_pods_are_hidden_from_the_cri() {
    let b = Bench::new();
    let pod = b.engine.run_sandbox(Owner::Local, pod_config("a"), "").await.expect("local");
    assert!(b.engine.pods(Scope::Cri).is_empty());
    assert_eq!(b.engine.pods(Scope::Local).len(), 1);
    b.engine.remove_sandbox(Scope::Cri, pod.as_str()).await.expect("unknown there");
    assert_eq!(b.engine.pods(Scope::Local).len(), 1);
    b.pod("a").await; // the same name, another owner
}

#[tokio::test]
async fn a_restart_finds_everything_and_hears_of_ends_that_nobody_heard() {
    let mut b = Bench::new();
    let pod = b.pod("a").await;
    let (runs, ends) = (b.running(&pod, "runs").await, b.running(&pod, "ends").await);
    b.tasks.shutdown().await;
    b.world.end(&pod, &ends, 7).await;
    let report = b.restart("boot-1").await;
    assert_eq!((report.pods, report.running), (1, 1));
    assert_eq!(b.phase(&runs), ContainerPhase::Running);
    assert_eq!(b.engine.container(Scope::Cri, ends.as_str()).expect("known").exit.clone().expect("ended").code, 7);
    b.world.end(&pod, &runs, 3).await;
    b.until(&runs, ContainerPhase::Exited).await;
    b.engine.remove_sandbox(Scope::Cri, pod.as_str()).await.expect("remove");
    assert_eq!((b.world.left(), b.records_left()), ((0, 0, 0), 0));
}

#[tokio::test]
async fn after_a_reboot_pods_are_not_ready_and_containers_have_ended() {
    let mut b = Bench::new();
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    b.tasks.shutdown().await;
    locked(&b.world.monitors).clear();
    b.restart("boot-2").await;
    assert_eq!(b.engine.pod(Scope::Cri, pod.as_str()).expect("listed").phase, PodPhase::NotReady);
    let record = b.engine.container(Scope::Cri, c.as_str()).expect("listed");
    assert_eq!((record.phase, record.exit.clone().expect("ended").code), (ContainerPhase::Exited, 255));
}

#[tokio::test]
async fn a_lost_record_is_rebuilt_from_what_the_monitor_keeps() {
    let mut b = Bench::new();
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    b.tasks.shutdown().await;
    RecordStore::open(&Utf8Path::from_path(b.dir.path()).expect("utf8").join("root"))
        .expect("records")
        .delete_pod(&pod)
        .expect("lost");
    let report = b.restart("boot-1").await;
    assert_eq!((report.pods, report.running), (1, 1));
    assert_eq!(b.phase(&c), ContainerPhase::Running);
}

#[tokio::test]
async fn shortened_ids_must_be_clear() {
    let b = Bench::new();
    let (one, _two) = (b.pod("a").await, b.pod("b").await);
    assert_eq!(b.engine.pod(Scope::Cri, &one.as_str()[..20]).expect("one").id, one);
    assert_eq!(b.engine.pod(Scope::Cri, "").expect_err("empty").kind(), Kind::InvalidArgument);
    assert_eq!(b.engine.pod(Scope::Cri, "zz").expect_err("none").kind(), Kind::NotFound);
}

#[tokio::test(start_paused = true)]
async fn no_grace_is_too_long_for_the_clock() {
    let b = Bench::new();
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    *locked(&b.world.hang) = Some("sigterm");
    b.engine.stop_container(Scope::Cri, c.as_str(), Duration::from_secs(i64::MAX as u64)).await.expect("stop");
    assert_eq!(b.phase(&c), ContainerPhase::Exited);
    assert_eq!(
        b.engine.stop_container(Scope::Cri, "", Duration::ZERO).await.expect_err("which").kind(),
        Kind::InvalidArgument
    );
}

#[tokio::test]
async fn a_stop_that_is_cut_off_is_no_success() {
    let b = Bench::new();
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    *locked(&b.world.hang) = Some("sigterm");
    let stop = b.engine.stop_container(Scope::Cri, c.as_str(), Duration::from_secs(600));
    let (stopped, ()) = tokio::join!(stop, b.tasks.shutdown());
    assert_eq!(stopped.expect_err("it runs").kind(), Kind::Aborted);
    // Nor is one to a pod whose task is gone.
    b.engine.stop_sandbox(Scope::Cri, pod.as_str()).await.expect_err("it runs");
    b.engine.remove_sandbox(Scope::Cri, pod.as_str()).await.expect_err("it runs");
    b.engine.remove_container(Scope::Cri, c.as_str()).await.expect_err("it runs");
}

#[tokio::test]
async fn a_pod_that_can_have_no_more_containers_is_not_ready() {
    let mut b = Bench::new();
    let (now, later) = (b.pod("now").await, b.pod("later").await);
    // No other monitor can be had.
    *locked(&b.world.broken) = Some("spawn");
    let events = locked(&b.world.monitors).remove(&now).and_then(|m| m.events).expect("connected");
    events.send(MonitorEvent::Gone).await.expect("heard");
    let not_ready = async |b: &Bench, id: &PodId| {
        tokio::time::timeout(Duration::from_secs(5), async {
            while b.engine.pod(Scope::Cri, id.as_str()).expect("listed").phase != PodPhase::NotReady {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("in time");
    };
    not_ready(&b, &now).await;
    b.tasks.shutdown().await;
    locked(&b.world.monitors).remove(&later);
    b.restart("boot-1").await;
    not_ready(&b, &later).await;
}

#[tokio::test]
async fn a_clock_that_jumps_turns_no_life_around() {
    let b = Bench::new();
    let pod = b.pod("a").await;
    for (name, jump) in [("back", -3_600_000_000_000), ("ahead", 86_400_000_000_000), ("before-1970", -2 << 60)] {
        let c = b.running(&pod, name).await;
        b.world.clock.fetch_add(jump, std::sync::atomic::Ordering::Relaxed);
        b.world.end(&pod, &c, 3).await;
        b.until(&c, ContainerPhase::Exited).await;
        let record = b.engine.container(Scope::Cri, c.as_str()).expect("listed");
        assert!(record.finished_at >= record.started_at && record.finished_at > 0, "{name}: {record:?}");
        assert_eq!(record.exit.as_ref().expect("ended").code, 3);
    }
    b.engine.remove_sandbox(Scope::Cri, pod.as_str()).await.expect("remove");
    assert_eq!((b.world.left(), b.records_left()), ((0, 0, 0), 0));
}

#[tokio::test]
async fn another_monitor_takes_a_pod_over() {
    let mut b = Bench::new();
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    let die = |b: &Bench| locked(&b.world.monitors).remove(&pod).and_then(|m| m.events);
    die(&b).expect("connected").send(MonitorEvent::Gone).await.expect("heard");
    // Containers can be made again, and the one that runs is known to the new monitor.
    let d = b.running(&pod, "d").await;
    b.world.end(&pod, &c, 5).await;
    b.until(&c, ContainerPhase::Exited).await;
    let exit = |b: &Bench, id: &ContainerId| b.engine.container(Scope::Cri, id.as_str()).expect("known").exit.clone();
    assert_eq!(exit(&b, &c).expect("ended").code, 5);
    // Daemon and monitor at once.
    b.tasks.shutdown().await;
    die(&b);
    let report = b.restart("boot-1").await;
    assert_eq!((report.pods, report.running), (1, 1));
    b.world.end(&pod, &d, 6).await;
    b.until(&d, ContainerPhase::Exited).await;
    assert_eq!(exit(&b, &d).expect("ended").code, 6);
    assert_eq!(b.engine.pod(Scope::Cri, pod.as_str()).expect("listed").phase, PodPhase::Ready);
    b.engine.remove_sandbox(Scope::Cri, pod.as_str()).await.expect("remove");
    assert_eq!((b.world.left(), b.records_left()), ((0, 0, 0), 0));
}

#[tokio::test]
async fn what_is_left_of_a_failed_create_holds_no_name_after_a_restart() {
    let mut b = Bench::new();
    *locked(&b.world.hang) = Some("sandbox");
    let made = b.engine.run_sandbox(Owner::Cri, pod_config("a"), "");
    let cut = async {
        b.world.reached.notified().await;
        b.tasks.shutdown().await;
    };
    tokio::join!(made, cut).0.expect_err("cut off");
    (*locked(&b.world.hang), *locked(&b.world.fail)) = (None, Some("teardown"));
    b.restart("boot-1").await;
    assert_eq!(b.engine.pods(Scope::Local).len(), 1, "kept until it is taken down");
    b.pod("a").await;
}

#[tokio::test]
async fn a_monitor_that_hangs_keeps_no_pod() {
    let b = Bench::new();
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    *locked(&b.world.fail) = Some("signal");
    b.engine.stop_sandbox(Scope::Cri, pod.as_str()).await.expect("stop pod");
    assert_eq!(b.engine.container(Scope::Cri, c.as_str()).expect("known").exit.clone().expect("ended").code, 137);
    b.engine.remove_sandbox(Scope::Cri, pod.as_str()).await.expect("remove pod");
    assert_eq!((b.world.left(), b.records_left()), ((0, 0, 0), 0));
}

#[tokio::test]
async fn a_pod_whose_task_panics_is_taken_up_from_its_record() {
    let b = Bench::new();
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    *locked(&b.world.panic) = Some("plan");
    let e = b.engine.create_container(Scope::Cri, pod.as_str(), container_config("d")).await.expect_err("panics");
    assert_eq!(e.kind(), Kind::Aborted, "{e:?}");
    // What runs is there still, what was half made is gone, and the pod works again.
    tokio::time::timeout(Duration::from_secs(5), async {
        while b.engine.create_container(Scope::Cri, pod.as_str(), container_config("d")).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("works again");
    assert_eq!(b.engine.pod_panics(&pod), 1);
    assert_eq!(b.phase(&c), ContainerPhase::Running);
    assert_eq!((b.engine.containers(Scope::Cri).len(), locked(&b.world.rootfs).len()), (2, 2));
    b.engine.stop_container(Scope::Cri, c.as_str(), Duration::from_secs(5)).await.expect("stop");
    b.until(&c, ContainerPhase::Exited).await;
    // One that panics while it is made is taken down, and its name is free.
    *locked(&b.world.panic) = Some("sandbox");
    b.engine.run_sandbox(Owner::Cri, pod_config("p"), "").await.expect_err("panics");
    tokio::time::timeout(Duration::from_secs(5), async {
        while b.engine.run_sandbox(Owner::Cri, pod_config("p"), "").await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("its name is free");
    for pod in b.engine.pods(Scope::Cri) {
        b.engine.remove_sandbox(Scope::Cri, pod.id.as_str()).await.expect("removed");
    }
    assert_eq!((b.world.left(), b.records_left()), ((0, 0, 0), 0));
}

#[tokio::test]
async fn a_task_that_always_panics_is_given_up() {
    let b = Bench::new();
    let pod = b.pod("a").await;
    tokio::time::timeout(Duration::from_secs(10), async {
        while b.engine.pod_panics(&pod) < 6 {
            *locked(&b.world.panic) = Some("plan");
            let _ = b.engine.create_container(Scope::Cri, pod.as_str(), container_config("d")).await;
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("panics");
    let e = b.engine.create_container(Scope::Cri, pod.as_str(), container_config("d")).await.expect_err("given up");
    assert_eq!(e.kind(), Kind::Aborted, "{e:?}");
    // It is still listed, and the next daemon takes it up.
    assert_eq!(b.engine.pods(Scope::Cri).len(), 1);
    *locked(&b.world.panic) = None;
    let mut b = b;
    b.restart("boot-1").await;
    b.running(&pod, "d").await;
}

#[tokio::test]
async fn a_local_pods_name_is_taken_until_it_is_gone() {
    let b = Bench::new();
    let run = |uid: &str, owner| {
        let mut config = pod_config("web");
        config.metadata.uid = uid.into();
        b.engine.run_sandbox(owner, config, "")
    };
    let first = run("1", Owner::Local).await.expect("first");
    assert_eq!(run("2", Owner::Local).await.expect_err("taken").kind(), Kind::AlreadyExists);
    // A kubelet's pods have uids to tell them apart.
    run("1", Owner::Cri).await.expect("a kubelet's");
    run("2", Owner::Cri).await.expect("another");
    b.engine.remove_sandbox(Scope::Local, first.as_str()).await.expect("removed");
    run("2", Owner::Local).await.expect("free again");
}
