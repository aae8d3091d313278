//! What monitors take: run with `cargo test -p proxmox-lxcri-monitor --test memory -- --ignored --nocapture`, with
//! the static build's path in MONITOR (see monitor/Cargo.toml).
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)]

mod harness;

use std::path::PathBuf;

use harness::*;

/// Budget of a monitor, KiB of PSS.
const BUDGET: u64 = 200;
/// The same of the only one on a node, which has the program's code to itself: the kernel maps 64 KiB of it wherever one page is needed.
const ALONE: u64 = 256;

/// Fields of smaps_rollup, KiB.
fn memory(pid: u32) -> (u64, u64, u64) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let field = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (field("Pss:"), field("Private_Dirty:"), field("Rss:"))
}

fn pod(program: &std::path::Path) -> (Pod, Client) {
    let pod = Pod::start_with(&[b'x'; 2000], program);
    let mut client = pod.connect();
    pod.run(&mut client, pod.plan("c1", "echo up; exec sleep 1000"));
    until("it is up", || pod.output("c1.log", "stdout") == b"up\n");
    (pod, client)
}

/// Waits until code that is not in use has been given back.
fn quiet(pods: &[&(Pod, Client)]) {
    for (pod, _) in pods {
        let before = memory(pod.child.id()).2;
        until("quiet", || memory(pod.child.id()).2 + 100 < before || before < 300);
    }
}

#[test]
fn a_monitor_fits_its_budget() {
    let program = PathBuf::from(std::env::var("MONITOR").expect("MONITOR names the static build"));
    let one = pod(&program);
    println!("1 monitor, busy: PSS {} KiB", memory(one.0.child.id()).0);
    quiet(&[&one]);
    let (pss, dirty, rss) = memory(one.0.child.id());
    println!("1 monitor:   PSS {pss} KiB, private dirty {dirty} KiB, RSS {rss} KiB");
    let more: Vec<_> = (0..9).map(|_| pod(&program)).collect();
    let refs: Vec<_> = std::iter::once(&one).chain(&more).collect();
    quiet(&refs);
    let all: Vec<_> = refs.iter().map(|(p, _)| memory(p.child.id())).collect();
    let mean = |f: fn(&(u64, u64, u64)) -> u64| all.iter().map(f).sum::<u64>() / 10;
    println!("10 monitors: PSS {} KiB, private dirty {} KiB each", mean(|m| m.0), mean(|m| m.1));
    // After a burst of output, 200 lines at a time.
    let (busy, mut client) = (&one.0, one.0.connect());
    busy.run(&mut client, busy.plan("c2", "seq 300000"));
    client.exited("c2");
    client.delete("c2");
    println!("after 300,000 lines: private dirty {} KiB", memory(busy.child.id()).1);
    assert!(mean(|m| m.0) <= BUDGET && pss <= ALONE);
}
