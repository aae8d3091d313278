//! Counters of pods' network interfaces, read inside their network namespaces.
//!
//! Called by the backends for stats. One thread visits all namespaces of a call and ends; a pod whose namespace is gone
//! has no counters. Nothing is changed, nothing is left behind.

use camino::Utf8PathBuf;

use super::{NetnsError, Which, enter, in_thread};
use crate::core::stats::InterfaceSample;

/// The thread's own view: /proc/net would be that of the process's first thread.
const FILE: &str = "/proc/thread-self/net/dev";

/// Counters of each namespace pinned at `list`, in its order; None: it can't be entered or read.
pub async fn traffic(list: Vec<Utf8PathBuf>) -> Result<Vec<Option<Vec<InterfaceSample>>>, NetnsError> {
    in_thread(move || {
        Ok(list
            .iter()
            .map(|path| {
                enter(path, Which::Net).ok()?;
                std::fs::read_to_string(FILE).ok().map(|text| parse(&text))
            })
            .collect())
    })
    .await
}

/// /proc/net/dev (proc_pid_net(5)), without `lo`; lines that are not understood are left out.
fn parse(text: &str) -> Vec<InterfaceSample> {
    let line = |line: &str| {
        let (name, numbers) = line.rsplit_once(':')?;
        let name = name.trim();
        let n: Vec<u64> = numbers.split_ascii_whitespace().map_while(|n| n.parse().ok()).collect();
        // bytes packets errs drop fifo frame compressed multicast, then the same for what goes out.
        (n.len() >= 12 && name != "lo" && !name.is_empty()).then(|| InterfaceSample {
            name: name.to_owned(),
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
    text.lines().skip(2).filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::PodId;
    use crate::integrations::mounts::tests::in_private_mounts;
    use crate::integrations::netns::{NamespacePins, Wanted};
    use proptest::prelude::*;

    const CAPTURED: &str = "Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 1022     12    0    0    0     0          0         0     1022      12    0    0    0     0       0          0
  eth0:    5006      47    1    2    0     0          0         0     1286      17    3    4    0     0       0          0
";

    #[test]
    fn counters_of_the_interfaces() {
        let found = parse(CAPTURED);
        assert_eq!(found.len(), 1);
        let InterfaceSample {
            name,
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
        } = found[0].clone();
        assert_eq!((name.as_str(), rx_bytes, rx_packets, rx_errors, rx_dropped), ("eth0", 5006, 47, 1, 2));
        assert_eq!((tx_bytes, tx_packets, tx_errors, tx_dropped), (1286, 17, 3, 4));
    }

    #[test]
    fn each_namespace_has_its_own() {
        in_private_mounts(|dir| {
            let run = Utf8PathBuf::try_from(dir.to_path_buf()).unwrap();
            let pins = NamespacePins::new(run.join("netns"), &run);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let pod = PodId::new();
                let wanted = Wanted { net: true, ipc: false, uts: false, ..Default::default() };
                let net = pins.create(&pod, wanted).await.unwrap().net.unwrap();
                let found = traffic(vec![net.clone(), run.join("gone"), net]).await.unwrap();
                // A new namespace has `lo` and, with some modules loaded, tunnels that never had a packet.
                let idle = |all: &Option<Vec<InterfaceSample>>| {
                    all.as_ref().is_some_and(|all| all.iter().all(|i| i.rx_bytes == 0))
                };
                assert!(idle(&found[0]) && found[1].is_none() && found[0] == found[2], "{found:?}");
                pins.unpin(&pod).await.unwrap();
            });
        });
    }

    proptest! {
        #[test]
        fn hostile_files_never_panic(text in "(?s)[a-z0-9: |\n]{0,300}|(?s).{0,200}") {
            let _ = (parse(&text), parse(&format!("\n\n{text}")), parse(&format!("a\nb\neth0:{text}")));
        }
    }
}
