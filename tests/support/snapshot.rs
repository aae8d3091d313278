//! What a runtime may leave behind on its machine, listed before and after. The tests' environment has its own
//! namespaces and cgroups, so that the lists must be equal, not merely similar.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::node::Node;

/// Where liblxc listens for its tools: one for all containers there will ever be, made with the first.
const LXC_NET: &str = "/run/lxc.net";

/// Name of a list and its entries.
pub type Snapshot = BTreeMap<&'static str, Vec<String>>;

/// Takes stock of mounts, namespaces, cgroups, processes, network and the node's own folders.
pub fn take(node: &Node) -> Snapshot {
    let mut lists = take_of(&node.dir);
    if let Some(pve) = &node.pve {
        lists.insert("Proxmox's containers and their volumes", pve.cts_and_volumes());
    }
    lists
}

/// The same for a daemon whose folders `run` and `lib` are in `dir`.
pub fn take_of(dir: &Path) -> Snapshot {
    let mut lists = Snapshot::new();
    lists.insert("mounts", mounts());
    lists.insert("network namespaces", names(Path::new("/run/netns")));
    lists.insert("cgroups", folders(Path::new("/sys/fs/cgroup")));
    lists.insert("processes", processes());
    lists.insert("interfaces", command("ip", &["-o", "link"], |l| l.split(": ").nth(1).map(|n| n.to_owned())));
    lists.insert("iptables rules", command("iptables-save", &[], |l| l.starts_with("-A").then(|| l.to_owned())));
    lists.insert("addresses leased", leases(Path::new("/var/lib/cni/networks")));
    lists.insert("state files", files(&dir.join("run")));
    lists.insert("records and layers", files(&dir.join("lib")));
    lists
}

/// Waits until nothing has been added to `before`; panics with what stays. Asynchronous destroys may take a moment.
pub fn assert_back_to(before: &Snapshot, node: &Node) {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let left = added(before, &take(node));
        if left.is_empty() {
            return;
        }
        let shown = &left[..left.len().min(40)];
        assert!(Instant::now() < deadline, "left behind, {} entries:\n{}", left.len(), shown.join("\n"));
        std::thread::sleep(Duration::from_millis(100)); // the poll of a condition with a deadline
    }
}

/// Entries of `after` that were not there before, with their list's name.
pub fn added(before: &Snapshot, after: &Snapshot) -> Vec<String> {
    let mut left = Vec::new();
    for (list, entries) in after {
        let mut old = before.get(list).cloned().unwrap_or_default();
        for entry in entries {
            match old.iter().position(|o| o == entry) {
                Some(i) => drop(old.swap_remove(i)),
                None => left.push(format!("{list}: {entry}")),
            }
        }
    }
    left
}

fn mounts() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    // Without ids and peer groups: mount point, then type and source.
    let line = |l: &str| {
        let point = l.split(' ').nth(4)?;
        let kind = l.split(" - ").nth(1)?.split(' ').next()?;
        Some(format!("{point} ({kind})")).filter(|_| !point.ends_with(LXC_NET))
    };
    text.lines().filter_map(line).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

fn folders(root: &Path) -> Vec<String> {
    walk(root, true)
}

/// Files below a folder, but for lock files and half-written ones, which are reused or removed at the next start.
fn files(root: &Path) -> Vec<String> {
    let counts = |f: &String| !f.ends_with(".lock") && !f.contains("/.tmp-") && !is_sum(f) && !f.ends_with(LXC_NET);
    walk(root, false).into_iter().filter(counts).collect()
}

/// Of a layer that is there: it is summed up some time after its commit.
fn is_sum(file: &str) -> bool {
    file.rsplit_once("/overlay/layers/").is_some_and(|(_, rest)| rest.split_once('/').is_some_and(|(_, f)| f == "sum"))
}

fn walk(root: &Path, want_folders: bool) -> Vec<String> {
    let mut found = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(folder) = todo.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            let is_folder = entry.file_type().is_ok_and(|t| t.is_dir());
            if is_folder {
                todo.push(entry.path());
            }
            if is_folder == want_folders {
                found.push(entry.path().display().to_string());
            }
        }
    }
    found
}

/// Command lines of all processes of the environment. Kernel threads have none; zombies are named as such.
fn processes() -> Vec<String> {
    let mut found = Vec::new();
    for pid in names(Path::new("/proc")).iter().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) {
        let Ok(line) = std::fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).replace('\0', " ").trim().to_owned();
        if !line.is_empty() {
            found.push(line);
        } else if let Ok(comm) = std::fs::read_to_string(format!("/proc/{pid}/comm")) {
            found.push(format!("[{}]", comm.trim()));
        }
    }
    found
}

fn command(program: &str, args: &[&str], entry: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let out = super::run(Command::new(program).args(args));
    out.lines().filter_map(entry).collect()
}

/// host-local's leases: files named by the address.
fn leases(folder: &Path) -> Vec<String> {
    let is_lease = |f: &String| f.rsplit('/').next().is_some_and(|n| n.parse::<std::net::IpAddr>().is_ok());
    walk(folder, false).into_iter().filter(is_lease).collect()
}
