//! ListMetricDescriptors and ListPodSandboxMetrics: cAdvisor's metrics by cAdvisor's names, for `/metrics/cadvisor` of
//! a kubelet that takes them from the runtime (KEP-2371).
//!
//! One table names every metric, its labels and where its values come from: descriptors and samples can't disagree. A
//! value that this node does not tell has no sample. Samples of a pod as a whole have an empty `container` label, as
//! cAdvisor's have.

use crate::api::v1;
use crate::core::error::Result;
use crate::core::spec::Resources;
use crate::core::state::PodPhase;
use crate::core::stats::{ContainerStats, DeviceIo, InterfaceSample, MemorySample, PodStats, Pressure, UnitSample};
use crate::cri::Front;

/// Labels of every metric, in this order.
const LABELS: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];
const NS: u64 = 1_000_000_000;
const US: u64 = 1_000_000;

/// What a metric's values are taken from.
struct Subject<'a> {
    labels: [&'a str; 6],
    sample: Option<&'a UnitSample>,
    /// Of containers.
    container: Option<&'a ContainerStats>,
    /// Of pods.
    interfaces: &'a [InterfaceSample],
    /// Unix time in nanoseconds at which it began.
    since: i64,
    limits: Option<&'a Resources>,
    /// Of the containers' root file systems.
    device: &'a str,
}

/// Values of one metric: with its own labels, if it has any.
type Values = Vec<(Vec<String>, u64)>;

struct Metric {
    name: &'static str,
    help: &'static str,
    kind: v1::MetricType,
    /// Beside [`LABELS`].
    labels: &'static [&'static str],
    values: fn(&Subject<'_>) -> Values,
}

fn one(value: Option<u64>) -> Values {
    value.map(|v| (Vec::new(), v)).into_iter().collect()
}

fn memory(s: &Subject<'_>) -> Option<MemorySample> {
    s.sample?.memory
}

fn limit(s: &Subject<'_>, pick: fn(&Resources) -> i64) -> Values {
    one(s.limits.map(|r| u64::try_from(pick(r)).unwrap_or(0)))
}

fn interfaces(s: &Subject<'_>, pick: fn(&InterfaceSample) -> u64) -> Values {
    s.interfaces.iter().map(|i| (vec![i.name.clone()], pick(i))).collect()
}

fn devices(s: &Subject<'_>, pick: fn(&DeviceIo) -> u64) -> Values {
    let devices = s.sample.and_then(|s| s.io.as_ref()).map(|io| &io.devices[..]).unwrap_or_default();
    devices.iter().map(|d| (vec![d.name.clone()], pick(d))).collect()
}

fn pressure(s: &Subject<'_>, of: fn(&UnitSample) -> Option<Pressure>, full: bool) -> Values {
    let pressure = s.sample.and_then(of);
    one(pressure.map(|p| if full { p.full.total_us } else { p.some.total_us } / US))
}

macro_rules! metrics {
    ($($kind:ident $name:literal [$($label:literal),*] $help:literal, $values:expr;)*) => {
        &[$(Metric {
            name: $name,
            help: $help,
            kind: v1::MetricType::$kind,
            labels: &[$($label),*],
            values: $values,
        }),*]
    };
}

/// Every metric. Seconds are whole ones: the wire has no fractions.
static METRICS: &[Metric] = metrics! {
    Counter "container_cpu_usage_seconds_total" ["cpu"] "Cumulative cpu time consumed in seconds.",
        |s| s.sample.and_then(|s| s.cpu).map(|c| (vec!["total".into()], c.usage_ns / NS)).into_iter().collect();
    Counter "container_cpu_user_seconds_total" [] "Cumulative user cpu time consumed in seconds.",
        |s| one(s.sample.and_then(|s| s.cpu?.user_ns).map(|n| n / NS));
    Counter "container_cpu_system_seconds_total" [] "Cumulative system cpu time consumed in seconds.",
        |s| one(s.sample.and_then(|s| s.cpu?.system_ns).map(|n| n / NS));
    Counter "container_cpu_cfs_periods_total" [] "Number of elapsed enforcement period intervals.",
        |s| one(s.sample.and_then(|s| s.cpu?.throttling).map(|t| t.periods));
    Counter "container_cpu_cfs_throttled_periods_total" [] "Number of throttled period intervals.",
        |s| one(s.sample.and_then(|s| s.cpu?.throttling).map(|t| t.throttled_periods));
    Counter "container_cpu_cfs_throttled_seconds_total" [] "Total time duration the container has been throttled.",
        |s| one(s.sample.and_then(|s| s.cpu?.throttling).map(|t| t.throttled_ns / NS));

    Gauge "container_memory_usage_bytes" [] "Current memory usage in bytes, including all memory regardless of when it was accessed.",
        |s| one(memory(s).map(|m| m.usage));
    Gauge "container_memory_working_set_bytes" [] "Current working set in bytes.",
        |s| one(memory(s).map(|m| m.working_set));
    Gauge "container_memory_rss" [] "Size of RSS in bytes.", |s| one(memory(s).map(|m| m.rss));
    Gauge "container_memory_cache" [] "Number of bytes of page cache memory.", |s| one(memory(s).map(|m| m.cache));
    Gauge "container_memory_mapped_file" [] "Size of memory mapped files in bytes.",
        |s| one(memory(s).map(|m| m.mapped_file));
    Gauge "container_memory_swap" [] "Container swap usage in bytes.", |s| one(memory(s).and_then(|m| m.swap));
    Gauge "container_memory_kernel_usage" [] "Size of kernel memory allocated in bytes.",
        |s| one(memory(s).and_then(|m| m.kernel));
    Gauge "container_memory_max_usage_bytes" [] "Maximum memory usage recorded in bytes.",
        |s| one(memory(s).and_then(|m| m.peak));
    Gauge "container_memory_total_active_file_bytes" [] "Total active file in bytes.",
        |s| one(memory(s).map(|m| m.active_file));
    Gauge "container_memory_total_inactive_file_bytes" [] "Total inactive file in bytes.",
        |s| one(memory(s).map(|m| m.inactive_file));
    Counter "container_memory_failcnt" [] "Number of memory usage hits limits.",
        |s| one(memory(s).and_then(|m| m.limit_hits));
    Counter "container_memory_failures_total" ["failure_type", "scope"] "Cumulative count of memory allocation failures.",
        |s| memory(s).map_or_else(Vec::new, |m| {
            let row = |kind: &str, n| (vec![kind.to_owned(), "hierarchy".to_owned()], n);
            vec![row("pgfault", m.faults), row("pgmajfault", m.major_faults)]
        });
    Counter "container_oom_events_total" [] "Count of out of memory events observed for the container.",
        |s| one(memory(s).and_then(|m| m.oom_kills));

    Counter "container_network_receive_bytes_total" ["interface"] "Cumulative count of bytes received.",
        |s| interfaces(s, |i| i.rx_bytes);
    Counter "container_network_receive_packets_total" ["interface"] "Cumulative count of packets received.",
        |s| interfaces(s, |i| i.rx_packets);
    Counter "container_network_receive_packets_dropped_total" ["interface"] "Cumulative count of packets dropped while receiving.",
        |s| interfaces(s, |i| i.rx_dropped);
    Counter "container_network_receive_errors_total" ["interface"] "Cumulative count of errors encountered while receiving.",
        |s| interfaces(s, |i| i.rx_errors);
    Counter "container_network_transmit_bytes_total" ["interface"] "Cumulative count of bytes transmitted.",
        |s| interfaces(s, |i| i.tx_bytes);
    Counter "container_network_transmit_packets_total" ["interface"] "Cumulative count of packets transmitted.",
        |s| interfaces(s, |i| i.tx_packets);
    Counter "container_network_transmit_packets_dropped_total" ["interface"] "Cumulative count of packets dropped while transmitting.",
        |s| interfaces(s, |i| i.tx_dropped);
    Counter "container_network_transmit_errors_total" ["interface"] "Cumulative count of errors encountered while transmitting.",
        |s| interfaces(s, |i| i.tx_errors);

    Gauge "container_fs_usage_bytes" ["device"] "Number of bytes that are consumed by the container on this filesystem.",
        |s| s.container.and_then(|c| c.written).map(|w| (vec![s.device.to_owned()], w.usage.bytes)).into_iter().collect();
    Gauge "container_fs_inodes_used" ["device"] "Number of inodes that the container uses on this filesystem.",
        |s| s.container.and_then(|c| c.written).map(|w| (vec![s.device.to_owned()], w.usage.inodes)).into_iter().collect();
    Counter "container_fs_reads_bytes_total" ["device"] "Cumulative count of bytes read.",
        |s| devices(s, |d| d.read_bytes);
    Counter "container_fs_reads_total" ["device"] "Cumulative count of reads completed.", |s| devices(s, |d| d.reads);
    Counter "container_fs_writes_bytes_total" ["device"] "Cumulative count of bytes written.",
        |s| devices(s, |d| d.written_bytes);
    Counter "container_fs_writes_total" ["device"] "Cumulative count of writes completed.",
        |s| devices(s, |d| d.writes);
    Counter "container_blkio_device_usage_total" ["device", "major", "minor", "operation"] "Blkio Device bytes usage.",
        |s| {
            let devices = s.sample.and_then(|s| s.io.as_ref()).map(|io| &io.devices[..]).unwrap_or_default();
            let row = |d: &DeviceIo, operation: &str, n| {
                let (major, minor) = (d.major.to_string(), d.minor.to_string());
                (vec![d.name.clone(), major, minor, operation.to_owned()], n)
            };
            devices.iter().flat_map(|d| [row(d, "Read", d.read_bytes), row(d, "Write", d.written_bytes)]).collect()
        };

    Gauge "container_processes" [] "Number of processes running inside the container.",
        |s| one(s.sample.and_then(|s| s.tasks?.processes));
    Gauge "container_threads" [] "Number of threads running inside the container.",
        |s| one(s.sample.and_then(|s| s.tasks).map(|t| t.threads));
    Gauge "container_threads_max" [] "Maximum number of threads allowed inside the container, infinity if value is zero.",
        |s| one(s.sample.and_then(|s| s.tasks).map(|t| t.threads_limit.unwrap_or(0)));

    Gauge "container_spec_cpu_period" [] "CPU period of the container.", |s| limit(s, |r| r.cpu_period);
    Gauge "container_spec_cpu_quota" [] "CPU quota of the container.",
        |s| if s.limits.is_some_and(|r| r.cpu_quota > 0) { limit(s, |r| r.cpu_quota) } else { Vec::new() };
    Gauge "container_spec_cpu_shares" [] "CPU share of the container.", |s| limit(s, |r| r.cpu_shares);
    Gauge "container_spec_memory_limit_bytes" [] "Memory limit for the container.", |s| limit(s, |r| r.memory_limit);
    Gauge "container_spec_memory_reservation_limit_bytes" [] "Memory reservation limit for the container.",
        |s| limit(s, |r| r.unified.get("memory.low").and_then(|v| v.parse().ok()).unwrap_or(0));
    Gauge "container_spec_memory_swap_limit_bytes" [] "Memory swap limit for the container.",
        |s| limit(s, |r| r.memory_swap_limit);

    Counter "container_pressure_cpu_waiting_seconds_total" [] "Total time duration tasks in the container have waited due to CPU congestion.",
        |s| pressure(s, |u| u.cpu?.pressure, false);
    Counter "container_pressure_cpu_stalled_seconds_total" [] "Total time duration no tasks in the container could make progress due to CPU congestion.",
        |s| pressure(s, |u| u.cpu?.pressure, true);
    Counter "container_pressure_memory_waiting_seconds_total" [] "Total time duration tasks in the container have waited due to memory congestion.",
        |s| pressure(s, |u| u.memory?.pressure, false);
    Counter "container_pressure_memory_stalled_seconds_total" [] "Total time duration no tasks in the container could make progress due to memory congestion.",
        |s| pressure(s, |u| u.memory?.pressure, true);
    Counter "container_pressure_io_waiting_seconds_total" [] "Total time duration tasks in the container have waited due to IO congestion.",
        |s| pressure(s, |u| u.io.as_ref()?.pressure, false);
    Counter "container_pressure_io_stalled_seconds_total" [] "Total time duration no tasks in the container could make progress due to IO congestion.",
        |s| pressure(s, |u| u.io.as_ref()?.pressure, true);

    Gauge "container_last_seen" [] "Last time a container was seen by the exporter.",
        |s| one(s.sample.and_then(|s| u64::try_from(s.at).ok()).map(|n| n / NS));
    Gauge "container_start_time_seconds" [] "Start time of the container since unix epoch in seconds.",
        |s| one(u64::try_from(s.since).ok().filter(|n| *n > 0).map(|n| n / NS));
};

/// Every metric's name, help and label names.
pub(super) fn descriptors() -> Vec<v1::MetricDescriptor> {
    let descriptor = |m: &Metric| v1::MetricDescriptor {
        name: m.name.into(),
        help: m.help.into(),
        label_keys: LABELS.iter().chain(m.labels).map(ToString::to_string).collect(),
    };
    METRICS.iter().map(descriptor).collect()
}

fn samples(subject: &Subject<'_>) -> Vec<v1::Metric> {
    let timestamp = subject.sample.map_or(0, |s| s.at);
    let rows = |m: &'static Metric| (m.values)(subject).into_iter().map(move |row| (m, row));
    let to_wire = |(m, (own, value)): (&Metric, (Vec<String>, u64))| v1::Metric {
        name: m.name.into(),
        timestamp,
        metric_type: m.kind.into(),
        label_values: subject.labels.iter().map(ToString::to_string).chain(own).collect(),
        value: Some(v1::UInt64Value { value }),
    };
    METRICS.iter().flat_map(rows).map(to_wire).collect()
}

fn of_container(pod: &PodStats, c: &ContainerStats, device: &str) -> v1::ContainerMetrics {
    let (m, config) = (&pod.record.config.metadata, &c.record.config);
    // What the user wrote, where the kubelet tells it.
    let image = [&config.image.user_specified_image, &c.record.image_ref].into_iter().find(|i| !i.is_empty());
    let id = c.sample.as_ref().map_or("", |s| &s.cgroup);
    let subject = Subject {
        labels: [&config.name, id, image.map_or("", |i| i), c.record.id.as_str(), &m.namespace, &m.name],
        sample: c.sample.as_ref(),
        container: Some(c),
        interfaces: &[],
        since: c.record.started_at,
        limits: Some(&config.resources),
        device,
    };
    v1::ContainerMetrics { container_id: c.record.id.to_string(), metrics: samples(&subject) }
}

fn of_pod(pod: &PodStats, device: &str) -> v1::PodSandboxMetrics {
    let m = &pod.record.config.metadata;
    let id = pod.sample.as_ref().map_or("", |s| &s.cgroup);
    let subject = Subject {
        labels: ["", id, "", pod.record.id.as_str(), &m.namespace, &m.name],
        sample: pod.sample.as_ref(),
        container: None,
        interfaces: pod.network.as_ref().map(|n| &n.interfaces[..]).unwrap_or_default(),
        since: pod.record.created_at,
        limits: None,
        device,
    };
    // Ended containers have no samples: their last ones would be told for ever.
    let running = pod.containers.iter().filter(|c| c.sample.is_some());
    v1::PodSandboxMetrics {
        pod_sandbox_id: pod.record.id.to_string(),
        metrics: samples(&subject),
        container_metrics: running.map(|c| of_container(pod, c, device)).collect(),
    }
}

impl Front {
    pub(super) async fn list_metrics(&self) -> Result<Vec<v1::PodSandboxMetrics>> {
        let device = self.engine.layers().mountpoint();
        let pods = self.engine.pod_stats(self.scope, |p| p.phase == PodPhase::Ready, true).await?;
        Ok(pods.iter().map(|p| of_pod(p, device.as_str())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ports::Usage;
    use crate::core::stats::*;
    use std::collections::{BTreeMap, HashSet};
    use std::sync::Arc;

    /// A pod with every value there is, and a container with the same.
    fn full() -> PodStats {
        let pressure =
            Some(Pressure { some: PressureLine { total_us: 2 * US, ..Default::default() }, ..Default::default() });
        let unit = UnitSample {
            at: 7 * NS as i64,
            cgroup: "/kubepods/x".into(),
            cpu: Some(CpuSample {
                usage_ns: 3 * NS,
                user_ns: Some(2 * NS),
                system_ns: Some(NS),
                throttling: Some(Throttling::default()),
                pressure,
            }),
            memory: Some(MemorySample {
                usage: 10,
                swap: Some(1),
                kernel: Some(2),
                peak: Some(3),
                limit_hits: Some(4),
                oom_kills: Some(5),
                pressure,
                ..Default::default()
            }),
            io: Some(IoSample {
                devices: ["/dev/sda", "/dev/sdb"]
                    .map(|name| DeviceIo { name: name.into(), ..Default::default() })
                    .to_vec(),
                pressure,
            }),
            tasks: Some(TaskSample { threads: 6, threads_limit: None, processes: Some(2) }),
        };
        let pod = Arc::new(crate::core::records::tests::pod("web"));
        let config = crate::cri::convert::container(Some(v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "c".into(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: "x".into(), user_specified_image: "x:1".into(), ..Default::default() }),
            ..Default::default()
        }));
        let record = crate::core::records::tests::container(&pod.id, config.expect("fits"));
        let container = ContainerStats {
            record: Arc::new(record),
            sample: Some(unit.clone()),
            nano_cores: None,
            written: Some(Written { at: 1, usage: Usage { bytes: 4096, inodes: 2 } }),
        };
        let interfaces =
            ["eth0", "net1"].map(|name| InterfaceSample { name: name.into(), ..Default::default() }).to_vec();
        PodStats {
            record: pod,
            sample: Some(unit),
            nano_cores: None,
            network: Some(NetworkSample { at: 1, interfaces }),
            containers: vec![container],
        }
    }

    #[test]
    fn samples_fit_their_descriptors_and_are_unique() {
        let known: BTreeMap<_, _> = descriptors().into_iter().map(|d| (d.name, d.label_keys)).collect();
        assert_eq!(known.len(), METRICS.len(), "a name is there twice");
        for (name, keys) in &known {
            assert_eq!(keys.iter().collect::<HashSet<_>>().len(), keys.len(), "{name}: a label is there twice");
            assert!(name.starts_with("container_"), "{name}");
        }
        let pod = of_pod(&full(), "/var/lib/x");
        let all: Vec<_> = pod.metrics.iter().chain(pod.container_metrics.iter().flat_map(|c| &c.metrics)).collect();
        let mut seen = HashSet::new();
        for m in &all {
            assert_eq!(m.label_values.len(), known[&m.name].len(), "{}", m.name);
            assert!(seen.insert((&m.name, &m.label_values)), "{} {:?} is there twice", m.name, m.label_values);
        }
        let names: HashSet<_> = all.iter().map(|m| m.name.as_str()).collect();
        let missing: Vec<_> =
            known.keys().filter(|n| !names.contains(n.as_str()) && *n != "container_spec_cpu_quota").collect();
        assert!(missing.is_empty(), "never told, though everything was there: {missing:?}");
    }

    #[test]
    fn values_and_labels() {
        let pod = of_pod(&full(), "/var/lib/x");
        let find = |all: &[v1::Metric], name: &str| all.iter().find(|m| m.name == name).cloned().expect("a sample");
        let cpu = find(&pod.container_metrics[0].metrics, "container_cpu_usage_seconds_total");
        assert_eq!(cpu.value.expect("value").value, 3);
        let id = pod.container_metrics[0].container_id.as_str();
        assert_eq!(cpu.label_values, ["c", "/kubepods/x", "x:1", id, "ns", "web", "total"]);
        assert_eq!((cpu.timestamp, cpu.metric_type), (7 * NS as i64, v1::MetricType::Counter as i32));
        let bytes = find(&pod.metrics, "container_network_receive_bytes_total");
        assert_eq!(bytes.label_values, ["", "/kubepods/x", "", pod.pod_sandbox_id.as_str(), "ns", "web", "eth0"]);
        assert_eq!(find(&pod.metrics, "container_pressure_cpu_waiting_seconds_total").value.expect("value").value, 2);
        // What is not told is not there.
        let mut stats = full();
        stats.sample = None;
        stats.containers[0].sample = None;
        let empty = of_pod(&stats, "/var/lib/x");
        assert!(empty.container_metrics.is_empty());
        assert!(
            empty
                .metrics
                .iter()
                .all(|m| m.name.starts_with("container_network") || m.name == "container_start_time_seconds")
        );
    }
}
