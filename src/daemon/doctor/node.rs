//! The kernel and what it was told: release, cgroups, AppArmor, forwarding, limits, ranges of users, the clock.

use std::time::{Duration, SystemTime};

use super::{Finding, Host};
use crate::core::config::Config;

/// Controllers without which a pod's limits don't hold.
const CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];
/// The oldest kernel that has what is used: clone3 into a cgroup, mount_setattr, cgroup.kill (5.14).
const KERNEL: (u32, u32) = (5, 15);
/// No clock is before this: 1 January 2026.
const EPOCH: Duration = Duration::from_secs(1_767_225_600);
/// Where a distribution's unprivileged containers have their users.
const GUESTS: std::ops::Range<u64> = 100_000..165_536;

pub(super) fn check(host: &Host, config: &Config) -> Vec<Finding> {
    let mut all = vec![kernel(host)];
    all.extend(cgroups(host));
    all.extend([apparmor(host), ip_forward(host)]);
    all.extend(bridge(host));
    all.push(clock(host));
    all.extend(users(host, config));
    all.extend(limits(host));
    all
}

fn kernel(host: &Host) -> Finding {
    let mut numbers = host.release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= KERNEL => Finding::good("kernel", host.release.clone()),
        (Some(Ok(_)), Some(Ok(_))) => {
            let message = format!("{} is older than {}.{}", host.release, KERNEL.0, KERNEL.1);
            Finding::fault("kernel", message, "boot a newer kernel: Proxmox 8 has 6.2 and later")
        }
        _ => Finding::warning("kernel", format!("{:?} is no release that is understood", host.release), ""),
    }
}

/// Types and options of the mounts at /sys/fs/cgroup, as /proc/self/mounts has them.
fn cgroups(host: &Host) -> Vec<Finding> {
    const UNIFIED: &str = "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line (Proxmox: /etc/kernel/cmdline \
         or /etc/default/grub, then proxmox-boot-tool refresh), which is the default without cgroup options there";
    let Ok(mounts) = host.read("/proc/self/mounts") else {
        return vec![Finding::fault("cgroups", "/proc/self/mounts can't be read", "mount /proc")];
    };
    let at = |fstype: &str| {
        let fits = |line: &&str| {
            let mut fields = line.split(' ').skip(1);
            fields.next().is_some_and(|target| target.starts_with("/sys/fs/cgroup")) && fields.next() == Some(fstype)
        };
        mounts.lines().filter(fits).count()
    };
    match (at("cgroup2"), at("cgroup")) {
        (0, 0) => vec![Finding::fault(
            "cgroups",
            "no cgroups are mounted at /sys/fs/cgroup",
            "mount -t cgroup2 none /sys/fs/cgroup",
        )],
        (0, _) => vec![Finding::fault(
            "cgroups",
            "cgroups are version 1, which the kubelet and crun no longer serve",
            UNIFIED,
        )],
        (_, 0) => controllers(host),
        _ => vec![Finding::fault(
            "cgroups",
            "cgroups are hybrid: versions 1 and 2 beside each other, which crun refuses",
            UNIFIED,
        )],
    }
}

fn controllers(host: &Host) -> Vec<Finding> {
    let there = host.read("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    let lacking: Vec<&str> = CONTROLLERS.into_iter().filter(|c| !there.split_whitespace().any(|t| t == *c)).collect();
    if lacking.is_empty() {
        return vec![Finding::good("cgroups", format!("version 2 with {}", there.trim()))];
    }
    let advice = "take cgroup_disable=, cgroup_no_v1= and cgroup_enable= off the kernel's command line; in a container its \
                  host has to delegate them";
    vec![Finding::fault("cgroups", format!("the controllers {} are missing", lacking.join(", ")), advice)]
}

/// Where Debian has the parser.
const PARSERS: [&str; 2] = ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser"];

fn apparmor(host: &Host) -> Finding {
    let on = host.read("/sys/module/apparmor/parameters/enabled").is_ok_and(|s| s.starts_with('Y'));
    // Named on the command line it is wanted, whatever became of it.
    let wanted = host.read("/proc/cmdline").is_ok_and(|line| {
        line.split_whitespace().any(|w| {
            w == "apparmor=1"
                || w == "security=apparmor"
                || w.strip_prefix("lsm=").is_some_and(|l| l.contains("apparmor"))
        })
    });
    match (on, PARSERS.iter().any(|p| host.has(p))) {
        (true, true) => Finding::good("apparmor", "on"),
        (true, false) => Finding::fault(
            "apparmor",
            "AppArmor is on, but apparmor_parser is missing: containers with the default profile are refused",
            "apt install apparmor, then restart the daemon",
        ),
        (false, parser) if wanted || parser => Finding::fault(
            "apparmor",
            "AppArmor is configured, but the kernel has it off: containers run without a profile, and those that name one are refused",
            "take apparmor=0 off the kernel's command line, or add lsm=...,apparmor; if it is not wanted: apt remove apparmor",
        ),
        (false, _) => Finding::warning(
            "apparmor",
            "the kernel has no AppArmor: containers that name a profile are refused",
            "boot a kernel with AppArmor (Proxmox's has it), apt install apparmor",
        ),
    }
}

fn ip_forward(host: &Host) -> Finding {
    let advice = "the package sets it (/etc/sysctl.d/30-proxmox-lxcri.conf) unless a file of a later name does not; else: \
                  echo net.ipv4.ip_forward=1 > /etc/sysctl.d/90-kubernetes.conf && sysctl --system";
    match host.number("/proc/sys/net/ipv4/ip_forward") {
        Some(0) => Finding::fault("ip_forward", "net.ipv4.ip_forward is 0: pods reach no other node", advice),
        Some(_) => Finding::good("ip_forward", "on"),
        None => Finding::warning("ip_forward", "net.ipv4.ip_forward can't be read", advice),
    }
}

/// Bridged packets pass iptables, where a bridge connects pods: else Services don't work from pod to pod on one node.
fn bridge(host: &Host) -> Option<Finding> {
    let file = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    let advice = "where the pods' network is a bridge, take the # off the lines for it in /etc/modules-load.d/proxmox-lxcri.conf and \
                  /etc/sysctl.d/30-proxmox-lxcri.conf, then: modprobe br_netfilter && sysctl --system; Proxmox's firewall sets it where it is on";
    match host.number(file) {
        Some(1) => Some(Finding::good("bridge", "bridged packets pass iptables")),
        Some(_) => Some(Finding::warning(
            "bridge",
            "bridge-nf-call-iptables is 0: with a bridge network, Services on the same node may not answer",
            advice,
        )),
        None => Some(Finding::warning(
            "bridge",
            "br_netfilter is not loaded: with a bridge network, Services on the same node may not answer",
            advice,
        )),
    }
}

fn clock(host: &Host) -> Finding {
    let advice = "timedatectl set-ntp true; apt install chrony; chronyc makestep";
    if host.now < SystemTime::UNIX_EPOCH + EPOCH {
        let message =
            "the clock is years behind: certificates of registries, the API server and Proxmox seem not valid yet";
        return Finding::fault("clock", message, advice);
    }
    match host.synchronized {
        Some(true) => Finding::good("clock", "kept right"),
        Some(false) => Finding::warning("clock", "nothing keeps the clock right", advice),
        None => Finding::warning("clock", "whether the clock is kept right can't be asked", advice),
    }
}

/// A line of /etc/subuid: who, first, one after the last.
fn ranges(text: &str) -> Vec<(String, u64, u64)> {
    let parse = |line: &str| {
        let mut fields = line.trim().split(':');
        let (who, first, count) =
            (fields.next()?, fields.next()?.parse::<u64>().ok()?, fields.next()?.parse::<u64>().ok()?);
        Some((who.to_owned(), first, first.checked_add(count)?))
    };
    text.lines().filter_map(parse).collect()
}

fn users(host: &Host, config: &Config) -> Vec<Finding> {
    let mut all = Vec::new();
    for file in ["/etc/subuid", "/etc/subgid"] {
        let ranges = ranges(&host.read(file).unwrap_or_default());
        let kubelet: Vec<_> = ranges.iter().filter(|(who, ..)| who == "kubelet").collect();
        for (_, first, end) in &kubelet {
            let others = ranges.iter().filter(|(who, ..)| who != "kubelet").map(|(who, f, e)| (who.as_str(), *f, *e));
            let guests = [("unprivileged containers of Proxmox", GUESTS.start, GUESTS.end)];
            if let Some((who, f, e)) = others.chain(guests).find(|(_, f, e)| first < e && f < end) {
                let message = format!(
                    "{file}: the kubelet's users {first} to {} are also those of {who} ({f} to {}): a pod could touch their files",
                    end - 1,
                    e - 1
                );
                let advice = format!(
                    "give the kubelet a range above 165535, a multiple of 65536 long: kubelet:196608:7208960 in {file}"
                );
                all.push(Finding::fault("subuid", message, advice));
            }
        }
        let handler = &config.handlers.proxmox_lxc;
        let (first, end) = (u64::from(handler.first_id), u64::from(handler.first_id) + u64::from(handler.ids));
        let has = ranges.iter().any(|(who, f, e)| who == "root" && *f <= first && end <= *e);
        if handler.enabled && !has {
            let message =
                format!("{file} does not give root the users {first} to {} that handler proxmox-lxc uses", end - 1);
            all.push(Finding::fault(
                "subuid",
                message,
                format!("root:{first}:{} in {file}, or handlers.proxmox-lxc.first_id", end - first),
            ));
        }
    }
    if all.is_empty() {
        all.push(Finding::good("subuid", "no range of users is two owners'"));
    }
    all
}

/// What many pods need, with the least that is enough for some hundred.
pub const LIMITS: [(&str, &str, u64, &str); 4] = [
    (
        "/proc/sys/fs/inotify/max_user_instances",
        "fs.inotify.max_user_instances",
        1024,
        "kubelet, systemd in pods and log agents each take some",
    ),
    (
        "/proc/sys/fs/inotify/max_user_watches",
        "fs.inotify.max_user_watches",
        65_536,
        "log agents watch every container's log",
    ),
    ("/proc/sys/kernel/pid_max", "kernel.pid_max", 65_536, "processes of all pods together"),
    ("/proc/sys/kernel/keys/maxkeys", "kernel.keys.maxkeys", 200, "each container may have a key ring"),
];

fn limits(host: &Host) -> Vec<Finding> {
    let low = LIMITS.into_iter().filter_map(|(file, name, least, why)| {
        let is = host.number(file).filter(|n| *n < least)?;
        Some(Finding::warning(
            "limits",
            format!("{name} is {is}: {why}"),
            format!("{name}={least} in /etc/sysctl.d, sysctl --system"),
        ))
    });
    let low: Vec<Finding> = low.collect();
    if low.is_empty() { vec![Finding::good("limits", "enough for some hundred pods")] } else { low }
}
