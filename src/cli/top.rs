//! `top`: what running containers use, again and again, the largest first.
//!
//! CPU is what was used between two readings of the daemon's. On a terminal the screen is written anew each time, as many rows as
//! fit; elsewhere, and with `--output`, one reading is printed unless `--count` says more.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Result;
use clap::{Arg, ArgMatches, value_parser};
use serde::Serialize;

use super::client::{Client, called};
use super::ps::size;
use super::{Command, Context, output, string, terminal};
use crate::api::v1;

pub(super) struct Top;

/// What a container uses.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Row {
    pod: String,
    container: String,
    id: String,
    /// Thousandths of a CPU; None: it was not there at the reading before.
    cpu_millis: Option<u64>,
    /// Bytes of its working set.
    memory: Option<u64>,
    /// Bytes that its limit leaves it; None: it has none.
    memory_available: Option<u64>,
    /// Bytes that it has written into its root file system; None: not measured yet.
    disk: Option<u64>,
}

/// CPU time of containers at some moment, both in nanoseconds.
type Used = HashMap<String, (i64, u64)>;

#[async_trait::async_trait]
impl Command for Top {
    fn name(&self) -> &'static str {
        "top"
    }
    fn about(&self) -> &'static str {
        "What running containers use, again and again, the largest first"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            Arg::new("sort")
                .long("sort")
                .value_name("COLUMN")
                .value_parser(["cpu", "memory", "disk"])
                .default_value("cpu")
                .help("By what"),
            Arg::new("interval")
                .long("interval")
                .short('d')
                .value_name("SECONDS")
                .value_parser(value_parser!(u64).range(1..=3600))
                .default_value("2")
                .help("Time between two readings"),
            Arg::new("count")
                .long("count")
                .short('n')
                .value_name("NUMBER")
                .value_parser(value_parser!(u64).range(1..))
                .help("So many readings (default: without an end on a terminal, else one)"),
            output::argument("table"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let interval = Duration::from_secs(matches.get_one::<u64>("interval").copied().unwrap_or(2));
        let screen = std::io::stdout().is_terminal() && string(matches, "output") == "table";
        let endless = if screen { u64::MAX } else { 1 };
        let count = matches.get_one::<u64>("count").copied().unwrap_or(endless);
        let names = pod_names(&mut client).await?;
        let (mut before, _) = read(&mut client, &Used::new(), &names).await?;
        for _ in 0..count {
            tokio::time::sleep(interval).await;
            let names = pod_names(&mut client).await?;
            let (used, mut rows) = read(&mut client, &before, &names).await?;
            before = used;
            sort(&mut rows, &string(matches, "sort"));
            if output::structured(matches, &rows)?.is_some() {
                continue;
            }
            let text = match (screen, terminal::size()) {
                (true, Some((columns, lines))) => format!("\x1b[H\x1b[2J{}", fitting(&table(&rows), columns, lines)),
                _ => table(&rows),
            };
            if !output::print_more(&text)? {
                break;
            }
        }
        Ok(0)
    }
}

/// Pods by id, as "namespace/name".
async fn pod_names(client: &mut Client) -> Result<HashMap<String, String>> {
    let all = called(client.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await)?.items;
    let name = |m: v1::PodSandboxMetadata| format!("{}/{}", m.namespace, m.name);
    let pods: HashMap<String, String> =
        all.into_iter().map(|p| (p.id, p.metadata.map(name).unwrap_or_default())).collect();
    let containers = client.containers().await?;
    Ok(containers.into_iter().filter_map(|c| Some((c.id, pods.get(&c.pod_sandbox_id)?.clone()))).collect())
}

/// What containers have used until now, and what each uses since `before`.
async fn read(client: &mut Client, before: &Used, pods: &HashMap<String, String>) -> Result<(Used, Vec<Row>)> {
    let request = v1::ListContainerStatsRequest::default();
    let stats = called(client.runtime.list_container_stats(request).await)?.stats;
    Ok(rows(stats, before, pods))
}

fn rows(stats: Vec<v1::ContainerStats>, before: &Used, pods: &HashMap<String, String>) -> (Used, Vec<Row>) {
    let mut used = Used::new();
    let rows = stats.into_iter().map(|s| {
        let attributes = s.attributes.unwrap_or_default();
        let now = s.cpu.and_then(|c| Some((c.timestamp, c.usage_core_nano_seconds?.value)));
        if let Some(now) = now {
            used.insert(attributes.id.clone(), now);
        }
        let memory = s.memory.unwrap_or_default();
        Row {
            pod: pods.get(&attributes.id).cloned().unwrap_or_default(),
            cpu_millis: now.zip(before.get(&attributes.id).copied()).and_then(|(now, then)| millis(then, now)),
            memory: memory.working_set_bytes.map(|b| b.value),
            memory_available: memory.available_bytes.map(|b| b.value),
            disk: s.writable_layer.and_then(|w| w.used_bytes).map(|b| b.value),
            container: attributes.metadata.map(|m| m.name).unwrap_or_default(),
            id: attributes.id,
        }
    });
    let rows = rows.collect();
    (used, rows)
}

/// Thousandths of a CPU between two readings; None: the daemon has not read in between.
fn millis((then, before): (i64, u64), (at, now): (i64, u64)) -> Option<u64> {
    let time = u128::from(u64::try_from(at - then).ok()?);
    let used = u128::from(now.saturating_sub(before)) * 1000;
    u64::try_from(used.checked_div(time)?).ok()
}

fn sort(rows: &mut [Row], by: &str) {
    let key = |row: &Row| match by {
        "memory" => row.memory,
        "disk" => row.disk,
        _ => row.cpu_millis,
    };
    rows.sort_by(|a, b| key(b).cmp(&key(a)).then_with(|| (&a.pod, &a.container).cmp(&(&b.pod, &b.container))));
}

fn table(rows: &[Row]) -> String {
    let shown = |value: Option<u64>| value.map_or_else(|| "-".into(), size);
    let total = |of: fn(&Row) -> Option<u64>| rows.iter().filter_map(of).sum::<u64>();
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            let clean = |name: &str| name.replace(char::is_control, " ");
            vec![
                r.id.get(..13).unwrap_or(&r.id).to_owned(),
                clean(&r.pod),
                clean(&r.container),
                r.cpu_millis.map_or_else(|| "-".into(), |m| format!("{m}m")),
                shown(r.memory),
                shown(r.memory_available),
                shown(r.disk),
            ]
        })
        .collect();
    format!(
        "containers: {}, CPU: {}m, memory: {}, disk: {}\n\n{}",
        rows.len(),
        total(|r| r.cpu_millis),
        size(total(|r| r.memory)),
        size(total(|r| r.disk)),
        output::table(&["CONTAINER", "POD", "NAME", "CPU", "MEMORY", "AVAILABLE", "DISK"], &cells, 4)
    )
}

/// What fits on a screen.
fn fitting(text: &str, columns: u16, lines: u16) -> String {
    let cut = |line: &str| line.chars().take(columns.into()).collect::<String>();
    text.lines().take(usize::from(lines).saturating_sub(1)).map(|l| cut(l) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(id: &str, at: i64, used: u64, memory: u64) -> v1::ContainerStats {
        let value = |value| Some(v1::UInt64Value { value });
        v1::ContainerStats {
            attributes: Some(v1::ContainerAttributes {
                id: id.into(),
                metadata: Some(v1::ContainerMetadata { name: "web".into(), attempt: 0 }),
                ..Default::default()
            }),
            cpu: Some(v1::CpuUsage { timestamp: at, usage_core_nano_seconds: value(used), ..Default::default() }),
            memory: Some(v1::MemoryUsage { working_set_bytes: value(memory), ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn cpu_is_what_was_used_between_two_readings() {
        let pods = HashMap::from([("a".into(), "n/p".into())]);
        let (before, first) = rows(vec![stats("a", 1_000, 500, 5)], &Used::new(), &pods);
        assert_eq!((first[0].cpu_millis, first[0].pod.as_str()), (None, "n/p"));
        let second = vec![stats("a", 3_000, 1_500, 5), stats("b", 3_000, 9, 7)];
        let (_, mut second) = rows(second, &before, &pods);
        assert_eq!(second[0].cpu_millis, Some(500));
        assert_eq!(millis((5, 5), (5, 5)), None, "the same reading");
        assert_eq!(millis((5, 50), (6, 5)), Some(0), "a counter that began anew");
        sort(&mut second, "memory");
        assert_eq!(second[0].id, "b");
        sort(&mut second, "cpu");
        assert_eq!(second[0].id, "a");
        let text = table(&second);
        assert!(text.starts_with("containers: 2, CPU: 500m, memory: 12, disk: 0\n\nCONTAINER"), "{text}");
        assert_eq!(fitting("abc\ndef\nghi\n", 2, 3), "ab\nde\n");
    }
}
