//! Programs: the OCI runtime, liblxc, the monitor, CNI plugins.

use std::time::Duration;

use camino::Utf8Path;

use super::{Finding, Host};
use crate::core::config::Config;
use crate::integrations::cni;
use crate::utils::process::{Spawn, SpawnError};

/// How long a program may take to say what it is.
const TELL: Duration = Duration::from_secs(10);
/// The oldest crun that works, and the oldest that has everything that is used (`features`, 1.8.5).
const OLDEST: [u32; 3] = [1, 8, 0];
const WHOLE: [u32; 3] = [1, 8, 5];
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// "crun version 1.21" in the first line; runtimes with other names have their own.
fn version(text: &str) -> Option<(String, [u32; 3])> {
    let (name, rest) = text.lines().next()?.split_once(" version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
    let mut next = || numbers.next();
    Some((name.to_owned(), [next()?, next().unwrap_or(0), next().unwrap_or(0)]))
}

pub(super) async fn crun(_: &Host, config: &Config) -> Vec<Finding> {
    let path = &config.handlers.crun.path;
    let advice = "apt install crun (Debian 13 and Proxmox 9 have 1.21), or say handlers.crun.path";
    let told = Spawn::new(path.as_str(), ["--version"]).env("PATH", PATH).deadline(TELL).run_ok().await;
    let text = match told {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(SpawnError::Missing { .. }) => return vec![Finding::fault("crun", format!("{path} is not there"), advice)],
        Err(e) => return vec![Finding::fault("crun", format!("{path} does not work: {e}"), advice)],
    };
    let dotted = |v: [u32; 3]| v.map(|n| n.to_string()).join(".");
    vec![match version(&text) {
        Some((name, is)) if name == "crun" && is < OLDEST => {
            Finding::fault("crun", format!("{path} is crun {}, older than {}", dotted(is), dotted(OLDEST)), advice)
        }
        Some((name, is)) if name == "crun" && is < WHOLE => {
            let message = format!(
                "{path} is crun {}: it does not tell its features, pods can't have user namespaces",
                dotted(is)
            );
            Finding::warning("crun", message, advice)
        }
        Some((name, is)) if name == "crun" => Finding::good("crun", format!("{path}, {}", dotted(is))),
        _ => {
            let first = text.lines().next().unwrap_or_default().to_owned();
            Finding::warning("crun", format!("{path} is no crun ({first:?}): nobody has tried that"), "")
        }
    }]
}

/// liblxc is a fault only where its handler is the default: elsewhere its pods alone are refused.
pub(super) async fn lxc(config: &Config) -> Vec<Finding> {
    let handler = crate::daemon::lxc_config(config, "".into());
    let needed = config.runtime.default_handler != "crun" || config.handlers.proxmox_lxc.enabled;
    let bad = |message: String, advice: &str| {
        vec![if needed {
            Finding::fault("liblxc", message, advice)
        } else {
            Finding::warning("liblxc", message, advice)
        }]
    };
    for program in [&handler.helper, &handler.init] {
        if !program.is_file() {
            return bad(
                format!("{program} is not there"),
                "install the package whole, or say handlers.lxc.helper and handlers.lxc.init",
            );
        }
    }
    let mut args = vec!["version"];
    if !handler.library.is_empty() {
        args.extend(["--library", handler.library.as_str()]);
    }
    match Spawn::new(handler.helper.as_str(), args).env("PATH", PATH).deadline(TELL).run_ok().await {
        Ok(output) => vec![Finding::good("liblxc", String::from_utf8_lossy(&output.stdout).trim().to_owned())],
        Err(e) => bad(
            format!("liblxc can't be used, pods of handler lxc are refused: {e}"),
            "apt install liblxc1 (Proxmox has lxc-pve), or say handlers.lxc.library",
        ),
    }
}

pub(super) fn monitor(config: &Config) -> Vec<Finding> {
    vec![match crate::daemon::monitor_program(config) {
        Ok(path) if path.is_file() => Finding::good("monitor", path.to_string()),
        Ok(path) => Finding::fault(
            "monitor",
            format!("{path} is not there"),
            "install the package whole, or say runtime.monitor_path",
        ),
        Err(e) => Finding::fault("monitor", e.chain(), "install the package whole, or say runtime.monitor_path"),
    }]
}

pub(super) fn network(host: &Host, config: &Config) -> Vec<Finding> {
    let network = &config.network;
    let folder = host.path(&network.conf_dir);
    let folders: Vec<_> = network.plugin_dirs.iter().map(|d| host.path(d)).collect();
    let found = match cni::examine(&[folder], &folders) {
        Ok(found) => found,
        Err(e) => return vec![Finding::fault("cni", format!("{} can't be read: {e}", network.conf_dir), "ls -l it")],
    };
    let mut all: Vec<Finding> = found
        .refused
        .iter()
        .map(|why| {
            Finding::fault("cni", format!("a configuration can't be used: {why}"), "mend the file, or remove it")
        })
        .collect();
    match found.network {
        None if network.embedded => all.extend(embedded(&folders)),
        None if all.is_empty() => all.push(Finding::fault(
            "cni",
            format!("{} has no configuration: pods have no network", network.conf_dir),
            "install the cluster's network (Cilium, Calico, Flannel), which writes one; without a cluster: network.embedded = true",
        )),
        None => {}
        Some((name, missing)) if missing.is_empty() => all.push(Finding::good("cni", format!("network {name}"))),
        Some((name, missing)) => all.push(Finding::fault(
            "cni",
            format!("network {name} needs {}, not in {}", missing.join(", "), list(&network.plugin_dirs)),
            "apt install containernetworking-plugins, wait for the cluster's network to install its own, or say network.plugin_dirs",
        )),
    }
    all
}

fn embedded(folders: &[camino::Utf8PathBuf]) -> Vec<Finding> {
    let there = |name: &str| folders.iter().any(|f| f.join(name).is_file());
    let missing: Vec<&str> = ["bridge", "host-local"].into_iter().filter(|n| !there(n)).collect();
    vec![if missing.is_empty() {
        Finding::good("cni", "the embedded bridge network")
    } else {
        let message = format!("the embedded network needs the plugins {}", missing.join(", "));
        Finding::fault("cni", message, "apt install containernetworking-plugins, or say network.plugin_dirs")
    }]
}

fn list(paths: &[impl AsRef<Utf8Path>]) -> String {
    paths.iter().map(|p| p.as_ref().as_str()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_runtimes() {
        let of = |text: &str| version(text).map(|(name, v)| (name, v[0], v[1], v[2]));
        assert_eq!(of("crun version 1.21\ncommit: 1\n"), Some(("crun".into(), 1, 21, 0)));
        assert_eq!(of("crun version 1.8.1.0.0-dirty"), Some(("crun".into(), 1, 8, 1)));
        assert_eq!(of("runc version 1.1.15+ds1"), Some(("runc".into(), 1, 1, 15)));
        assert_eq!((of(""), of("crun"), of("crun version x")), (None, None, None));
    }
}
