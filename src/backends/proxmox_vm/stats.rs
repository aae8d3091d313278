//! Use of pods and containers in VMs, of the files of the guest's cgroups and network: one call to each guest.
//!
//! A guest that does not answer soon is left out; nothing is changed.

use std::collections::HashMap;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};

use super::guest::{self, CGROUP, CGROUPS};
use super::{ProxmoxVmBackend, locked};
use crate::core::ids::ContainerId;
use crate::core::ports::Monitor;
use crate::core::stats::{InterfaceSample, NetworkSample, PodSample, StatsTarget, StatsWanted};
use crate::integrations::cgroup::{Depth, StatsReader, V2_FILES};

/// How long a guest may take.
const PATIENCE: Duration = Duration::from_secs(2);
const TRAFFIC: &str = "/proc/net/dev";

fn now_ns() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

impl ProxmoxVmBackend {
    pub(super) async fn read_stats(&self, targets: Vec<StatsTarget>, wanted: StatsWanted) -> Vec<PodSample> {
        let all = targets.iter().map(|target| async move {
            let nothing = PodSample { containers: vec![None; target.containers.len()], ..PodSample::default() };
            let monitor = locked(&self.live).get(&target.pod.id).and_then(|live| live.monitor.clone());
            let Some(monitor) = monitor else { return nothing };
            match tokio::time::timeout(PATIENCE, read(&*monitor, target, wanted)).await {
                Ok(Some(sample)) => sample,
                _ => nothing,
            }
        });
        futures::future::join_all(all).await
    }
}

async fn read(monitor: &dyn Monitor, target: &StatsTarget, wanted: StatsWanted) -> Option<PodSample> {
    let group = |id: &ContainerId| format!("{CGROUP}/{id}");
    let mut groups: Vec<String> = target.containers.iter().map(|c| group(&c.id)).collect();
    groups.extend(wanted.pods.then(|| CGROUP.to_owned()));
    let of = |group: &String| V2_FILES.map(|file| format!("{CGROUPS}{group}/{file}"));
    let mut paths: Vec<String> = groups.iter().flat_map(of).collect();
    paths.extend(wanted.pods.then(|| TRAFFIC.to_owned()));
    let at = now_ns();
    let mut texts = HashMap::new();
    // As many at once as a guest reads.
    for some in paths.chunks(255) {
        let read = guest::read(monitor, some.to_vec()).await.ok()?;
        let whole = some.iter().zip(read).filter(|(_, content)| content.errno == 0);
        texts.extend(whole.map(|(p, c)| (Utf8PathBuf::from(p), String::from_utf8_lossy(&c.content).into_owned())));
    }
    let network = texts.get(Utf8Path::new(TRAFFIC)).map(|text| NetworkSample { at, interfaces: traffic(text) });
    let mut reader = StatsReader::of_texts(CGROUPS.into(), texts);
    let mut sample = |group: &str, tasks| {
        let depth = Depth { details: wanted.details, tasks };
        reader.read(group.trim_start_matches('/').into(), depth, || at)
    };
    let containers = target.containers.iter().map(|c| sample(&group(&c.id), wanted.pods)).collect();
    let unit = if wanted.pods { sample(CGROUP, true) } else { None };
    Some(PodSample { unit, network, containers })
}

/// Of `/proc/net/dev`: a line a interface, its name, then eight numbers in and eight out.
fn traffic(text: &str) -> Vec<InterfaceSample> {
    let parse = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let n: Vec<u64> = rest.split_whitespace().map_while(|n| n.parse().ok()).collect();
        let name = name.trim().to_owned();
        (n.len() >= 12 && name != "lo").then(|| InterfaceSample {
            name,
            rx_bytes: n[0],
            rx_packets: n[1],
            rx_errors: n[2],
            rx_dropped: n[3],
            tx_bytes: n[8],
            tx_packets: n[9],
            tx_errors: n[10],
            tx_dropped: n[11],
        })
    };
    text.lines().skip(2).filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_interfaces() {
        let text = "Inter-|   Receive |  Transmit\n face |bytes packets errs\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n\
                    \x20 eth0: 10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\n  bad: 1\n";
        let all = traffic(text);
        assert_eq!(all.len(), 1);
        let e = &all[0];
        assert_eq!((e.name.as_str(), e.rx_bytes, e.rx_dropped, e.tx_bytes, e.tx_dropped), ("eth0", 10, 4, 50, 8));
    }
}
