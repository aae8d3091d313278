//! Classes of block I/O and of Intel RDT, where the configuration has some.

use super::{Finding, Host};
use crate::core::config::Config;
use crate::integrations::{blockio, rdt};

pub(super) fn check(host: &Host, config: &Config) -> Vec<Finding> {
    let mut all = Vec::new();
    if let Some(file) = &config.runtime.blockio_config_file {
        all.push(block_io(&host.path(file)));
    }
    if !config.runtime.rdt_classes.is_empty() {
        all.push(groups(host, &config.runtime.rdt_classes));
    }
    all
}

fn block_io(file: &camino::Utf8Path) -> Finding {
    const CHECK: &str = "blockio";
    let classes = match blockio::read(file) {
        Ok(classes) => classes,
        Err(e) => {
            let message = format!("{}: pods that ask for a class are refused", e.chain());
            return Finding::warning(CHECK, message, "mend the file, or take runtime.blockio_config_file away");
        }
    };
    let names = classes.names();
    let lacking = |name: &&str| {
        let unmatched = classes.class(name).ok()?.unmatched;
        (!unmatched.is_empty()).then(|| format!("class {name}: no block device is {}", unmatched.join(", ")))
    };
    match names.iter().find_map(lacking) {
        Some(message) => Finding::warning(CHECK, message, "name disks that are there (no partitions); see lsblk"),
        None => Finding::good(CHECK, format!("classes: {}", names.join(", "))),
    }
}

fn groups(host: &Host, names: &[String]) -> Finding {
    const CHECK: &str = "rdt";
    let mounted = |mounts: String| {
        mounts.lines().any(|l| l.split(' ').nth(1) == Some(rdt::MOUNT) && l.split(' ').nth(2) == Some("resctrl"))
    };
    if !host.read("/proc/self/mounts").is_ok_and(mounted) {
        let message = format!("resctrl is not mounted at {}: pods that ask for a class are refused", rdt::MOUNT);
        return Finding::warning(
            CHECK,
            message,
            "mount -t resctrl resctrl /sys/fs/resctrl, on a CPU that has it; else empty runtime.rdt_classes",
        );
    }
    let lacking: Vec<&str> =
        names.iter().map(String::as_str).filter(|n| !host.has(format!("{}/{n}", rdt::MOUNT))).collect();
    match lacking.is_empty() {
        true => Finding::good(CHECK, format!("groups: {}", names.join(", "))),
        false => {
            let message = format!("there is no group {} in {}", lacking.join(", "), rdt::MOUNT);
            Finding::warning(CHECK, message, "make it (mkdir) and write its schemata, at each boot")
        }
    }
}
