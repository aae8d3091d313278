//! ContainerStats, PodSandboxStats and their lists: the engine's readings on the wire, with the CRI's filters.

use super::lists::{id_matches, labels_match};
use crate::api::v1;
use crate::core::error::{Error, Result};
use crate::core::state::PodPhase;
use crate::core::stats::{
    ContainerStats, InterfaceSample, NetworkSample, PodStats, Pressure, PressureLine, UnitSample, Written,
};
use crate::cri::{Front, to_wire};

impl Front {
    pub(super) async fn stats_of_container(&self, id: &str) -> Result<v1::ContainerStats> {
        let container = self.engine.container(self.scope, id)?;
        let found = self.engine.container_stats(self.scope, |c| c.id == container.id).await?;
        let stats = found.first().map(|c| self.container_stats_to_wire(c));
        stats.ok_or_else(|| Error::not_found(format!("no container {id:?}")))
    }

    pub(super) async fn list_stats(&self, filter: Option<v1::ContainerStatsFilter>) -> Result<Vec<v1::ContainerStats>> {
        let f = filter.unwrap_or_default();
        let found = self.engine.container_stats(self.scope, |c| {
            id_matches(&f.id, c.id.as_str())
                && id_matches(&f.pod_sandbox_id, c.pod.as_str())
                && labels_match(&f.label_selector, &c.config.labels)
        });
        Ok(found.await?.iter().map(|c| self.container_stats_to_wire(c)).collect())
    }

    pub(super) async fn stats_of_pod(&self, id: &str) -> Result<v1::PodSandboxStats> {
        let pod = self.engine.pod(self.scope, id)?;
        let found = self.engine.pod_stats(self.scope, |p| p.id == pod.id, false).await?;
        let stats = found.first().map(|p| self.pod_stats_to_wire(p));
        stats.ok_or_else(|| Error::not_found(format!("no pod sandbox {id:?}")))
    }

    /// Pods that are not ready use nothing and are left out.
    pub(super) async fn list_pod_stats(
        &self,
        filter: Option<v1::PodSandboxStatsFilter>,
    ) -> Result<Vec<v1::PodSandboxStats>> {
        let f = filter.unwrap_or_default();
        let found = self.engine.pod_stats(
            self.scope,
            |p| {
                p.phase == PodPhase::Ready
                    && id_matches(&f.id, p.id.as_str())
                    && labels_match(&f.label_selector, &p.config.labels)
            },
            false,
        );
        Ok(found.await?.iter().map(|p| self.pod_stats_to_wire(p)).collect())
    }

    fn container_stats_to_wire(&self, c: &ContainerStats) -> v1::ContainerStats {
        let line = to_wire::container(&c.record);
        let sample = c.sample.as_ref();
        v1::ContainerStats {
            attributes: Some(v1::ContainerAttributes {
                id: line.id,
                metadata: line.metadata,
                labels: line.labels,
                annotations: line.annotations,
            }),
            cpu: sample.and_then(|s| cpu(s, c.nano_cores)),
            memory: sample.and_then(memory),
            writable_layer: c.written.as_ref().map(|w| self.written(w)),
            swap: sample.and_then(swap),
            io: sample.and_then(io),
        }
    }

    fn written(&self, w: &Written) -> v1::FilesystemUsage {
        v1::FilesystemUsage {
            timestamp: w.at,
            fs_id: Some(v1::FilesystemIdentifier { mountpoint: self.engine.layers().mountpoint().to_string() }),
            used_bytes: number(w.usage.bytes),
            inodes_used: number(w.usage.inodes),
        }
    }

    fn pod_stats_to_wire(&self, p: &PodStats) -> v1::PodSandboxStats {
        let line = to_wire::pod(&p.record);
        let sample = p.sample.as_ref();
        let tasks = sample.and_then(|s| Some((s.at, s.tasks?)));
        v1::PodSandboxStats {
            attributes: Some(v1::PodSandboxAttributes {
                id: line.id,
                metadata: line.metadata,
                labels: line.labels,
                annotations: line.annotations,
            }),
            linux: Some(v1::LinuxPodSandboxStats {
                cpu: sample.and_then(|s| cpu(s, p.nano_cores)),
                memory: sample.and_then(memory),
                network: p.network.as_ref().map(network),
                process: tasks.map(|(timestamp, t)| v1::ProcessUsage { timestamp, process_count: number(t.threads) }),
                containers: p.containers.iter().map(|c| self.container_stats_to_wire(c)).collect(),
                io: sample.and_then(io),
            }),
            windows: None,
        }
    }
}

fn number(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

fn pressure(p: &Pressure) -> v1::PsiStats {
    let line = |l: &PressureLine| v1::PsiData { total: l.total_us, avg10: l.avg10, avg60: l.avg60, avg300: l.avg300 };
    v1::PsiStats { full: Some(line(&p.full)), some: Some(line(&p.some)) }
}

fn cpu(s: &UnitSample, nano_cores: Option<u64>) -> Option<v1::CpuUsage> {
    let cpu = s.cpu.as_ref()?;
    Some(v1::CpuUsage {
        timestamp: s.at,
        usage_core_nano_seconds: number(cpu.usage_ns),
        usage_nano_cores: nano_cores.and_then(number),
        psi: cpu.pressure.as_ref().map(pressure),
    })
}

fn memory(s: &UnitSample) -> Option<v1::MemoryUsage> {
    let m = s.memory.as_ref()?;
    Some(v1::MemoryUsage {
        timestamp: s.at,
        working_set_bytes: number(m.working_set),
        available_bytes: m.limit.and_then(|limit| number(limit.saturating_sub(m.working_set))),
        usage_bytes: number(m.usage),
        rss_bytes: number(m.rss),
        page_faults: number(m.faults),
        major_page_faults: number(m.major_faults),
        psi: m.pressure.as_ref().map(pressure),
    })
}

fn swap(s: &UnitSample) -> Option<v1::SwapUsage> {
    let m = s.memory.as_ref()?;
    let used = m.swap?;
    Some(v1::SwapUsage {
        timestamp: s.at,
        swap_available_bytes: m.swap_limit.and_then(|limit| number(limit.saturating_sub(used))),
        swap_usage_bytes: number(used),
    })
}

fn io(s: &UnitSample) -> Option<v1::IoUsage> {
    let psi = s.io.as_ref()?.pressure.as_ref().map(pressure);
    psi.map(|psi| v1::IoUsage { timestamp: s.at, psi: Some(psi) })
}

fn network(n: &NetworkSample) -> v1::NetworkUsage {
    let interface = |i: &InterfaceSample| v1::NetworkInterfaceUsage {
        name: i.name.clone(),
        rx_bytes: number(i.rx_bytes),
        rx_errors: number(i.rx_errors),
        tx_bytes: number(i.tx_bytes),
        tx_errors: number(i.tx_errors),
    };
    // CNI's first interface; in other networks the first there is.
    let default = n.interfaces.iter().find(|i| i.name == "eth0").or(n.interfaces.first());
    v1::NetworkUsage {
        timestamp: n.at,
        default_interface: default.map(interface),
        interfaces: n.interfaces.iter().map(interface).collect(),
    }
}
