//! Use of pods and containers: reads through the backends and keeps what one reading alone can't tell.
//!
//! Kept in memory: the last CPU reading of each unit (for nanoseconds a second) and what each container has written.
//! The latter is measured in the background when somebody asks and the last value is old: no list ever waits for a disk.
//! A crash loses both; the next readings make them anew.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;

use super::{Engine, Scope, Shared};
use crate::core::error::{Error, Result};
use crate::core::ids::ContainerId;
use crate::core::records::{ContainerRecord, PodRecord};
use crate::core::state::{ContainerPhase, PodPhase};
use crate::core::stats::{
    ContainerStats, CpuSample, PodSample, PodStats, StatsTarget, StatsWanted, UnitSample, Written,
};

/// Readings closer together than this make no new rate: it would be mostly noise.
const RATE_WINDOW_NS: i64 = 1_000_000_000;
/// How long a measurement of what a container has written is good.
const WRITTEN_FRESH: Duration = Duration::from_secs(10);
/// File systems measured at once.
const MEASURE_PARALLEL: usize = 2;
/// Forgotten units that may be kept before they are looked for.
const SLACK: usize = 64;

/// A CPU reading and the rate up to it.
#[derive(Debug, Clone, Copy)]
struct Rate {
    at: i64,
    usage_ns: u64,
    nano_cores: Option<u64>,
}

/// A measurement of what a container has written; tried last at `tried`.
#[derive(Debug, Clone, Copy)]
struct Measured {
    tried: Instant,
    value: Option<Written>,
}

/// What is kept of earlier readings.
#[derive(Default)]
pub(super) struct Samples {
    /// By the id of the pod or container.
    rates: Mutex<HashMap<Box<str>, Rate>>,
    written: Mutex<HashMap<ContainerId, Measured>>,
    /// A measurement is under way.
    measuring: AtomicBool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Samples {
    /// Notes a reading; the rate between it and the one before.
    fn rate(rates: &mut HashMap<Box<str>, Rate>, id: &str, at: i64, cpu: &CpuSample) -> Option<u64> {
        let usage_ns = cpu.usage_ns;
        let Some(last) = rates.get_mut(id) else {
            rates.insert(id.into(), Rate { at, usage_ns, nano_cores: None });
            return None;
        };
        let passed = at.saturating_sub(last.at);
        if passed < 0 || usage_ns < last.usage_ns {
            // The clock was set, or the unit is a new one.
            *last = Rate { at, usage_ns, nano_cores: None };
        } else if passed >= RATE_WINDOW_NS {
            let rate = u128::from(usage_ns - last.usage_ns) * 1_000_000_000 / passed.unsigned_abs() as u128;
            *last = Rate { at, usage_ns, nano_cores: Some(u64::try_from(rate).unwrap_or(u64::MAX)) };
        }
        last.nano_cores
    }

    /// Forgets what is not in `live`, when there is much of it.
    fn forget(&self, live: impl Fn() -> HashSet<String>, count: usize) {
        let mut rates = locked(&self.rates);
        let mut written = locked(&self.written);
        if rates.len() > count + SLACK || written.len() > count + SLACK {
            let live = live();
            rates.retain(|id, _| live.contains(&**id));
            written.retain(|id, _| live.contains(id.as_str()));
        }
    }
}

impl Engine {
    /// Use of the containers that `select` takes, oldest first. Of those that do not run only what they have written.
    pub async fn container_stats(
        &self,
        scope: Scope,
        select: impl Fn(&ContainerRecord) -> bool,
    ) -> Result<Vec<ContainerStats>> {
        let chosen: Vec<_> = self.containers(scope).into_iter().filter(|c| select(c)).collect();
        let mut by_pod: HashMap<&str, Vec<Arc<ContainerRecord>>> = HashMap::new();
        for c in &chosen {
            by_pod.entry(c.pod.as_str()).or_default().push(c.clone());
        }
        let targets = {
            let index = self.shared.index();
            let target = |list: Vec<Arc<ContainerRecord>>| {
                let pod = index.pod(&list.first()?.pod)?;
                Some((pod, list))
            };
            by_pod.into_values().filter_map(target).collect()
        };
        let mut all: Vec<ContainerStats> = Vec::with_capacity(chosen.len());
        for pod in self.read(targets, StatsWanted::default()).await? {
            all.extend(pod.containers);
        }
        all.sort_by_key(|c| c.record.created_at);
        Ok(all)
    }

    /// Use of the pods that `select` takes and of their containers, oldest first; `details`: with what metrics need.
    pub async fn pod_stats(
        &self,
        scope: Scope,
        select: impl Fn(&PodRecord) -> bool,
        details: bool,
    ) -> Result<Vec<PodStats>> {
        let targets = {
            let index = self.shared.index();
            let pods = index.pods(scope).into_iter().filter(|p| select(p));
            pods.map(|p| (p.clone(), index.containers_of(&p.id))).collect()
        };
        self.read(targets, StatsWanted { pods: true, details }).await
    }

    async fn read(
        &self,
        targets: Vec<(Arc<PodRecord>, Vec<Arc<ContainerRecord>>)>,
        wanted: StatsWanted,
    ) -> Result<Vec<PodStats>> {
        let mut all: Vec<PodStats> = targets
            .into_iter()
            .map(|(record, containers)| PodStats {
                record,
                sample: None,
                nano_cores: None,
                network: None,
                containers: containers.into_iter().map(unread).collect(),
            })
            .collect();
        for backend in &self.shared.ports.backends {
            let own: Vec<usize> = (0..all.len())
                .filter(|i| all[*i].record.handler == backend.handler() && all[*i].record.phase == PodPhase::Ready)
                .collect();
            if own.is_empty() {
                continue;
            }
            let targets: Vec<_> = own.iter().map(|i| target(&all[*i])).collect();
            let read = match backend.stats(targets, wanted).await {
                Ok(read) => read,
                // The other handlers' pods are told all the same.
                Err(e) => {
                    tracing::warn!(handler = backend.handler(), error = e.chain(), "what its pods use is not known");
                    continue;
                }
            };
            if read.len() != own.len() {
                return Err(Error::internal(format!(
                    "handler {}: {} readings of {} pods",
                    backend.handler(),
                    read.len(),
                    own.len()
                )));
            }
            for (i, sample) in own.into_iter().zip(read) {
                take(&mut all[i], sample, wanted);
            }
        }
        self.add_rates(&mut all);
        self.add_written(&mut all);
        Ok(all)
    }

    fn add_rates(&self, all: &mut [PodStats]) {
        let samples = &self.shared.stats;
        {
            let mut rates = locked(&samples.rates);
            let mut rate = |id: &str, unit: &Option<UnitSample>| {
                let unit = unit.as_ref()?;
                Samples::rate(&mut rates, id, unit.at, unit.cpu.as_ref()?)
            };
            for pod in all {
                pod.nano_cores = rate(pod.record.id.as_str(), &pod.sample);
                for c in &mut pod.containers {
                    c.nano_cores = rate(c.record.id.as_str(), &c.sample);
                }
            }
        }
        let index = self.shared.index();
        let live = || {
            let pods = index.all_pods().into_iter().map(|p| p.id.to_string());
            pods.chain(index.all_container_ids().into_iter().map(String::from)).collect()
        };
        samples.forget(live, index.len());
    }

    /// Adds the last known values and has the old ones measured anew, for the next list.
    fn add_written(&self, all: &mut [PodStats]) {
        let samples = &self.shared.stats;
        let mut stale = Vec::new();
        {
            let written = locked(&samples.written);
            for c in all.iter_mut().flat_map(|p| &mut p.containers) {
                let known = written.get(&c.record.id);
                c.written = known.and_then(|m| m.value);
                if known.is_none_or(|m| m.tried.elapsed() >= WRITTEN_FRESH) {
                    stale.push(c.record.id.clone());
                }
            }
        }
        if stale.is_empty() || samples.measuring.swap(true, Ordering::AcqRel) {
            return;
        }
        let shared = self.shared.clone();
        self.shared.tasks.spawn_cancellable("measure what containers have written", async move {
            // Also when the task is cancelled or panics: the next list starts another one.
            let _done = Measuring(&shared);
            futures::stream::iter(stale).for_each_concurrent(MEASURE_PARALLEL, |id| measure(&shared, id)).await;
        });
    }
}

struct Measuring<'a>(&'a Arc<Shared>);

impl Drop for Measuring<'_> {
    fn drop(&mut self) {
        self.0.stats.measuring.store(false, Ordering::Release);
    }
}

async fn measure(shared: &Arc<Shared>, id: ContainerId) {
    let handler = {
        let index = shared.index();
        index.container(&id).and_then(|c| Some(index.pod(&c.pod)?.handler.clone()))
    };
    if handler.is_some_and(|h| shared.backend(&h).is_ok_and(|b| !b.on_node())) {
        return;
    }
    let measured = shared.ports.layers.rootfs_usage(&id).await;
    let mut written = locked(&shared.stats.written);
    let entry = written.entry(id.clone()).or_insert(Measured { tried: Instant::now(), value: None });
    entry.tried = Instant::now();
    match measured {
        Ok(usage) => entry.value = Some(Written { at: shared.ports.clock.now_ns(), usage }),
        // Removed meanwhile, most likely: the last value stays, if there is one.
        Err(e) => tracing::debug!(container = id.as_str(), error = e.chain(), "what it has written is not known"),
    }
}

fn unread(record: Arc<ContainerRecord>) -> ContainerStats {
    ContainerStats { record, sample: None, nano_cores: None, written: None }
}

fn has_unit(c: &ContainerRecord) -> bool {
    matches!(c.phase, ContainerPhase::Created | ContainerPhase::Running)
}

fn target(stats: &PodStats) -> StatsTarget {
    let containers = stats.containers.iter().map(|c| &c.record).filter(|c| has_unit(c)).cloned().collect();
    StatsTarget { pod: stats.record.clone(), containers }
}

/// Puts a backend's reading where it belongs.
fn take(stats: &mut PodStats, sample: PodSample, wanted: StatsWanted) {
    stats.network = sample.network;
    let asked = stats.containers.iter_mut().filter(|c| has_unit(&c.record));
    for (to, from) in asked.zip(sample.containers) {
        to.sample = from;
    }
    if wanted.pods {
        // Where the unit is shared with other pods, the pod is the sum of its containers.
        stats.sample =
            sample.unit.or_else(|| UnitSample::sum(stats.containers.iter().filter_map(|c| c.sample.as_ref())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(usage_ns: u64) -> CpuSample {
        CpuSample { usage_ns, ..Default::default() }
    }

    #[test]
    fn a_rate_needs_two_readings_a_second_apart() {
        let mut rates = HashMap::new();
        let mut rate = |at, usage| Samples::rate(&mut rates, "c", at, &cpu(usage));
        assert_eq!(rate(0, 1_000), None);
        assert_eq!(rate(500_000_000, 2_000), None, "too close");
        assert_eq!(rate(2_000_000_000, 1_000_001_000), Some(500_000_000), "from the first one on");
        assert_eq!(rate(2_100_000_000, 1_900_000_000), Some(500_000_000), "the last rate");
        assert_eq!(rate(1, 3_000_000_000), None, "the clock went back");
        assert_eq!(rate(2_000_000_001, 5), None, "a new unit");
        assert_eq!(
            rate(i64::MAX, u64::MAX),
            Some((u128::from(u64::MAX - 5) * 1_000_000_000 / (i64::MAX as u128 - 2_000_000_001)) as u64)
        );
    }

    #[test]
    fn the_dead_are_forgotten() {
        let samples = Samples::default();
        for i in 0..SLACK + 2 {
            Samples::rate(&mut locked(&samples.rates), &format!("{i}"), 1, &cpu(1));
        }
        samples.forget(|| HashSet::from(["1".to_owned()]), 1);
        assert_eq!(locked(&samples.rates).len(), 1);
    }
}
