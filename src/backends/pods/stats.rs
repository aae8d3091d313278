//! Use of pods and containers: their cgroups, and the interfaces in the pods' network namespaces; and new limits of pods.
//!
//! All readings of a call are made on one thread for blocking work and one in the namespaces. Interfaces are read once a
//! second at most. A crash in a change of limits leaves a part of them changed.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use camino::Utf8PathBuf;

use super::NodePods;
use crate::backends::oci::linux;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::PodId;
use crate::core::records::{ContainerRecord, PodRecord};
use crate::core::spec::Resources;
use crate::core::stats::{NetworkSample, PodSample, StatsTarget, StatsWanted};
use crate::integrations::cgroup::{self, Depth, Driver, Parent};
use crate::integrations::netns;

/// How long a pod's counters are good.
const TRAFFIC_FRESH: Duration = Duration::from_secs(1);

/// Counters of pods' interfaces, read last.
#[derive(Debug, Default)]
pub(in crate::backends) struct TrafficCache(Mutex<HashMap<PodId, (Instant, NetworkSample)>>);

impl TrafficCache {
    /// Values that are fresh; what is old is dropped, so that the cache never outgrows the pods.
    fn fresh(&self) -> HashMap<PodId, NetworkSample> {
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cache.retain(|_, (at, _)| at.elapsed() < TRAFFIC_FRESH);
        cache.iter().map(|(id, (_, sample))| (id.clone(), sample.clone())).collect()
    }

    fn put(&self, id: PodId, sample: NetworkSample) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id, (Instant::now(), sample));
    }
}

fn now_ns() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

impl NodePods {
    pub(in crate::backends) async fn read_stats(
        &self,
        targets: Vec<StatsTarget>,
        wanted: StatsWanted,
    ) -> Result<Vec<PodSample>> {
        let network = async {
            match wanted.pods {
                true => self.traffic(&targets).await,
                false => HashMap::new(),
            }
        };
        let mut plan = Vec::with_capacity(targets.len());
        for t in &targets {
            // A parent that does not fit: the driver was changed while the pod ran. Nothing is known of it then.
            let parent = self.parent(&t.pod).ok();
            // The default slice is every pod's: what it uses says nothing of one.
            let own = |p: &&Parent| wanted.pods && !(p.driver() == Driver::Systemd && p.is_default());
            let unit = parent.as_ref().filter(own).map(|p| p.relative().to_owned());
            let containers: Vec<_> = t.containers.iter().map(|c| Some(parent.as_ref()?.container(&c.id))).collect();
            plan.push((unit, containers));
        }
        let mut reader = self.hierarchy.stats_reader();
        let cgroups = blocking(move || {
            let depth = |tasks| Depth { details: wanted.details, tasks };
            let mut read = |path: &Option<Utf8PathBuf>, tasks| reader.read(path.as_ref()?, depth(tasks), now_ns);
            let read_pod = |(unit, containers): (Option<Utf8PathBuf>, Vec<Option<Utf8PathBuf>>)| PodSample {
                unit: read(&unit, true),
                network: None,
                containers: containers.iter().map(|path| read(path, wanted.pods)).collect(),
            };
            Ok(plan.into_iter().map(read_pod).collect::<Vec<_>>())
        });
        let (mut traffic, samples) = tokio::join!(network, cgroups);
        let mut samples = samples?;
        for (t, sample) in targets.iter().zip(&mut samples) {
            sample.network = traffic.remove(&t.pod.id);
        }
        Ok(samples)
    }

    async fn traffic(&self, targets: &[StatsTarget]) -> HashMap<PodId, NetworkSample> {
        let mut known = self.traffic.fresh();
        let own = |t: &StatsTarget| Some((t.pod.id.clone(), t.pod.facts.as_ref()?.netns.clone()?));
        let (ids, paths): (Vec<_>, Vec<_>) =
            targets.iter().filter_map(own).filter(|(id, _)| !known.contains_key(id)).unzip();
        if ids.is_empty() {
            return known;
        }
        let read = match netns::traffic(paths).await {
            Ok(read) => read,
            Err(e) => {
                tracing::warn!(error = Error::from(e).chain(), "network counters of pods can't be read");
                return known;
            }
        };
        let at = now_ns();
        for (id, interfaces) in ids.into_iter().zip(read) {
            if let Some(interfaces) = interfaces {
                let sample = NetworkSample { at, interfaces };
                self.traffic.put(id.clone(), sample.clone());
                known.insert(id, sample);
            }
        }
        known
    }

    /// Writes a running container's new limits: `files` into `group`.
    pub(in crate::backends) async fn change_limits(
        &self,
        parent: &Parent,
        container: &ContainerRecord,
        group: Utf8PathBuf,
        files: Vec<(String, String)>,
        asked: &Resources,
    ) -> Result<()> {
        self.narrow_execs(parent, container, asked).await?;
        let hierarchy = self.hierarchy.clone();
        blocking(move || Ok(hierarchy.set(&group, &files)?)).await?;
        self.change_oom_score(parent, container, asked).await
    }

    /// To be called before a container's cpuset changes, where that is not by `change_limits`.
    pub(in crate::backends) async fn narrow_execs(
        &self,
        parent: &Parent,
        container: &ContainerRecord,
        asked: &Resources,
    ) -> Result<()> {
        if asked.cpusets().next().is_none() {
            return Ok(());
        }
        let (hierarchy, parent, id, asked) =
            (self.hierarchy.clone(), parent.clone(), container.id.clone(), asked.clone());
        blocking(move || Ok(hierarchy.narrow_execs(&parent, &id, &asked)?)).await
    }

    /// A container's new oom_score_adj, where one is asked for.
    pub(in crate::backends) async fn change_oom_score(
        &self,
        parent: &Parent,
        container: &ContainerRecord,
        asked: &Resources,
    ) -> Result<()> {
        match asked.oom_score_adj {
            Some(score) if score != 0 && asked.oom_score_adj != container.config.resources.oom_score_adj => {
                let folder = self.hierarchy.container(parent, &container.id).kill;
                let allowed = blocking(move || Ok(cgroup::set_oom_score_adj(&folder, score)?)).await?;
                if !allowed {
                    tracing::warn!(
                        container = container.id.as_str(),
                        score,
                        "oom_score_adj can't be lowered that far: no CAP_SYS_RESOURCE"
                    );
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    pub(in crate::backends) async fn change_pod_limits(
        &self,
        pod: &PodRecord,
        resources: &Resources,
        overhead: &Resources,
    ) -> Result<()> {
        let total = with_overhead(resources, overhead);
        linux::update(&total, &total, &self.host_now(&total))?;
        let parent = self.parent(pod)?;
        if parent.driver() == Driver::Systemd && parent.is_default() {
            if total == (Resources { oom_score_adj: total.oom_score_adj, ..Default::default() }) {
                return Ok(());
            }
            return Err(Error::new(
                Kind::Unimplemented,
                format!(
                    "pod {} has no slice of its own (cgroup_parent was empty): it can't be limited as a whole",
                    pod.id
                ),
            ));
        }
        let (hierarchy, id) = (self.hierarchy.clone(), pod.id.clone());
        let ours = blocking(move || Ok(hierarchy.limit_parent(&parent, &id, &total)?)).await?;
        if !ours {
            tracing::debug!(
                pod = pod.id.as_str(),
                "the pod's cgroup is its maker's: new limits are only put on record"
            );
        }
        Ok(())
    }
}

/// What the pod as a whole may use: its containers' limits and the overhead. No limit stays none.
fn with_overhead(resources: &Resources, overhead: &Resources) -> Resources {
    let sum = |a: i64, b: i64| if a > 0 { a.saturating_add(b.max(0)) } else { a };
    // Quotas go together when their periods are the same; else the overhead's is scaled.
    let period = if resources.cpu_period > 0 { resources.cpu_period } else { 100_000 };
    let quota = match overhead.cpu_period {
        p if p > 0 && p != period => (i128::from(overhead.cpu_quota) * i128::from(period) / i128::from(p)) as i64,
        _ => overhead.cpu_quota,
    };
    Resources {
        cpu_quota: sum(resources.cpu_quota, quota),
        cpu_shares: sum(resources.cpu_shares, overhead.cpu_shares),
        memory_limit: sum(resources.memory_limit, overhead.memory_limit),
        memory_swap_limit: sum(resources.memory_swap_limit, overhead.memory_limit.max(overhead.memory_swap_limit)),
        ..resources.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overhead_goes_on_top_of_limits_that_are_there() {
        let r = Resources { cpu_quota: 50_000, cpu_period: 100_000, memory_limit: 100, ..Default::default() };
        let o =
            Resources { cpu_quota: 10_000, cpu_period: 50_000, memory_limit: 7, cpu_shares: 9, ..Default::default() };
        let sum = with_overhead(&r, &o);
        assert_eq!((sum.cpu_quota, sum.cpu_period, sum.memory_limit, sum.cpu_shares), (70_000, 100_000, 107, 0));
        assert_eq!(with_overhead(&Resources::default(), &o).memory_limit, 0);
        assert_eq!(with_overhead(&Resources { memory_limit: -1, ..r }, &o).memory_limit, -1);
    }
}
