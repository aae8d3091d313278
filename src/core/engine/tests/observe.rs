//! Events, statistics and new limits on the fake world.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::super::{EventKind, EventStream};
use super::*;
use crate::core::spec::Resources;

/// Events that are there, as (what, of the pod or a container, containers then).
async fn heard(events: &mut EventStream, n: usize) -> Vec<(EventKind, bool, usize)> {
    let mut all = Vec::new();
    for _ in 0..n {
        let next = tokio::time::timeout(Duration::from_secs(5), events.next()).await.expect("in time");
        let e = next.expect("no end").expect("no error");
        all.push((e.kind, e.container.is_none(), e.containers.len()));
    }
    all
}

#[tokio::test]
async fn a_life_is_told_in_order_to_all_who_may_hear_it() {
    use EventKind::*;
    let b = Bench::new();
    let (mut cri, mut local) = (b.engine.events(Scope::Cri), b.engine.events(Scope::Local));
    let pod = b.pod("a").await;
    let hidden = b.engine.run_sandbox(Owner::Local, pod_config("hidden"), "").await.expect("local");
    let c = b.running(&pod, "c").await;
    b.world.end(&pod, &c, 0).await;
    b.until(&c, ContainerPhase::Exited).await;
    b.engine.remove_container(Scope::Cri, c.as_str()).await.expect("removed");
    b.running(&pod, "d").await;
    b.engine.remove_sandbox(Scope::Cri, pod.as_str()).await.expect("removed");
    let expected = [
        (Created, true, 0),
        (Started, true, 0),
        (Created, false, 1),
        (Started, false, 1),
        (Stopped, false, 1),
        (Deleted, false, 0),
        (Created, false, 1),
        (Started, false, 1),
        (Stopped, false, 1),
        (Stopped, true, 1),
        (Deleted, false, 0),
        (Deleted, true, 0),
    ];
    assert_eq!(heard(&mut cri, expected.len()).await, expected);
    let all = heard(&mut local, expected.len() + 2).await;
    assert_eq!(all.iter().filter(|e| e.1).count(), 6, "the local pod's, too: {all:?}");
    b.engine.remove_sandbox(Scope::Local, hidden.as_str()).await.expect("removed");
    b.engine.close_events();
    assert!(cri.next().await.is_some_and(|e| e.is_err()), "nothing of the local pod before the end");
}

#[tokio::test]
async fn events_carry_the_state_they_tell_of() {
    let b = Bench::new();
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    let mut events = b.engine.events(Scope::Cri);
    b.world.end(&pod, &c, 7).await;
    let event = events.next().await.expect("one").expect("event");
    assert_eq!((event.kind, event.container.as_ref()), (EventKind::Stopped, Some(&c)));
    assert_eq!(event.containers[0].exit.as_ref().map(|e| e.code), Some(7));
    b.engine.stop_sandbox(Scope::Cri, pod.as_str()).await.expect("stopped");
    let event = events.next().await.expect("one").expect("event");
    assert_eq!((event.kind, event.pod.phase), (EventKind::Stopped, PodPhase::NotReady));
}

#[tokio::test]
async fn new_limits_are_merged_carried_out_and_shown() {
    let b = Bench::new();
    let pod = b.pod("a").await;
    let mut config = container_config("c");
    config.resources.cpu_shares = 512;
    let c = b.engine.create_container(Scope::Cri, pod.as_str(), config).await.expect("created");
    let asked = Resources { memory_limit: 64 << 20, ..Default::default() };
    b.engine.update_container(Scope::Cri, c.as_str(), asked.clone()).await.expect("created ones, too");
    b.engine.start_container(Scope::Cri, c.as_str()).await.expect("started");
    b.engine.update_container(Scope::Cri, &c.as_str()[..13], asked.clone()).await.expect("shortened");
    let shown = || b.engine.container(Scope::Cri, c.as_str()).expect("known").config.resources.clone();
    assert_eq!((shown().cpu_shares, shown().memory_limit), (512, 64 << 20));
    assert_eq!(*locked(&b.world.limits), [shown(), shown()]);

    *locked(&b.world.fail) = Some("update");
    let more = Resources { memory_limit: 128 << 20, ..Default::default() };
    b.engine.update_container(Scope::Cri, c.as_str(), more.clone()).await.expect_err("fails");
    assert_eq!(shown().memory_limit, 64 << 20, "what failed is not shown");
    let bad = Resources { memory_limit: 9, memory_swap_limit: 8, ..Default::default() };
    let e = b.engine.update_container(Scope::Cri, c.as_str(), bad).await.expect_err("nonsense");
    assert_eq!(e.kind(), Kind::InvalidArgument);
    assert_eq!(locked(&b.world.limits).len(), 2, "nothing was tried");

    b.world.end(&pod, &c, 0).await;
    b.until(&c, ContainerPhase::Exited).await;
    let e = b.engine.update_container(Scope::Cri, c.as_str(), more.clone()).await.expect_err("ended");
    assert_eq!(e.kind(), Kind::FailedPrecondition);
    let e = b.engine.update_container(Scope::Cri, "zz", more.clone()).await.expect_err("unknown");
    assert_eq!(e.kind(), Kind::NotFound);
    let e = b.engine.update_sandbox(Scope::Cri, pod.as_str(), more.clone(), more).await.expect_err("not offered");
    assert_eq!(e.kind(), Kind::Unimplemented);
}

#[tokio::test]
async fn limits_survive_a_restart() {
    let mut b = Bench::new();
    let pod = b.pod("a").await;
    let c = b.running(&pod, "c").await;
    let asked = Resources { cpu_quota: 20_000, ..Default::default() };
    b.engine.update_container(Scope::Cri, c.as_str(), asked).await.expect("updated");
    b.restart("boot-1").await;
    assert_eq!(b.engine.container(Scope::Cri, c.as_str()).expect("known").config.resources.cpu_quota, 20_000);
}

#[tokio::test]
async fn statistics_never_wait_for_a_disk() {
    let b = Bench::new();
    let pod = b.pod("a").await;
    let (runs, ends) = (b.running(&pod, "runs").await, b.running(&pod, "ends").await);
    b.world.end(&pod, &ends, 0).await;
    b.until(&ends, ContainerPhase::Exited).await;
    // The measurement hangs: the list does not, and does not start a second one.
    *locked(&b.world.hang) = Some("measure");
    for _ in 0..3 {
        let all = b.engine.container_stats(Scope::Cri, |_| true).await.expect("stats");
        let told: Vec<_> = all.iter().map(|s| (s.record.id.clone(), s.sample.is_some(), s.written)).collect();
        assert_eq!(told, [(runs.clone(), true, None), (ends.clone(), false, None)]);
        b.world.reached.notified().await;
        b.world.reached.notify_one();
    }
    assert!(b.world.measured.load(Ordering::Relaxed) <= 2);
    assert_eq!(b.engine.container_stats(Scope::Cri, |c| c.id == ends).await.expect("stats").len(), 1);

    let pods = b.engine.pod_stats(Scope::Cri, |_| true, false).await.expect("stats");
    assert_eq!((pods.len(), pods[0].containers.len(), pods[0].sample.is_some()), (1, 2, true));
    b.engine.stop_sandbox(Scope::Cri, pod.as_str()).await.expect("stopped");
    let pods = b.engine.pod_stats(Scope::Cri, |_| true, false).await.expect("stats");
    assert!(pods[0].sample.is_none() && pods[0].containers.iter().all(|c| c.sample.is_none()));
}

#[tokio::test]
async fn what_was_written_is_told_once_it_is_measured() {
    let b = Bench::new();
    let pod = b.pod("a").await;
    b.running(&pod, "c").await;
    let written = tokio::time::timeout(Duration::from_secs(5), async {
        loop {
            let all = b.engine.container_stats(Scope::Cri, |_| true).await.expect("stats");
            if let Some(written) = all[0].written {
                break written;
            }
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(written.await.expect("in time").usage.bytes, 4096);
    assert_eq!(b.world.measured.load(Ordering::Relaxed), 1, "fresh values are not measured again");
}
