//! `proxmox ct exec`: a command in a container of this node.
//!
//! The API has no exec: it is done on the node by `lxc-attach`, which knows the container's namespaces, cgroup, AppArmor and
//! seccomp profile. This process becomes it, so that streams, terminal, signals and the exit code are the caller's own.

use std::os::unix::process::CommandExt;

use anyhow::{Context as _, Result, bail};

use super::Call;
use crate::integrations::proxmox_api::{GuestId, Vmid};

/// From the package lxc-pve, or Debian's lxc.
const ATTACH: &str = "/usr/bin/lxc-attach";
/// Where programs of the container are looked for.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Returns only when it can't be done.
pub(super) async fn run(call: &Call, id: Vmid, command: &[String]) -> Result<()> {
    if call.node != call.api.node() {
        bail!(
            "CT {id} is on node {}: exec works on the container's own node only, here it is {}",
            call.node,
            call.api.node()
        );
    }
    if !call.api.guest_status(GuestId::ct(&call.node, id)).await?.is_running() {
        bail!("CT {id} does not run");
    }
    let arguments = arguments(call.api.lxc_path().as_str(), id, std::env::var("TERM").ok(), command);
    // No child to wait for: the helper for processes is for those.
    #[allow(clippy::disallowed_methods)]
    let failed = std::process::Command::new(ATTACH).args(arguments).env_clear().exec();
    Err(failed).with_context(|| format!("can't run {ATTACH}"))
}

/// The container gets nothing of our environment but the kind of terminal.
fn arguments(lxc_path: &str, id: Vmid, term: Option<String>, command: &[String]) -> Vec<String> {
    let mut all: Vec<String> =
        ["-P", lxc_path, "-n", &id.to_string(), "--clear-env", "-v", PATH].map(String::from).into();
    if let Some(term) = term {
        all.extend(["-v".to_owned(), format!("TERM={term}")]);
    }
    all.push("--".into());
    all.extend(command.iter().cloned());
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_own_options_are_its_own() {
        let all = arguments("/var/lib/lxc", Vmid::new(100).unwrap(), None, &["ls".into(), "-n".into()]);
        assert_eq!(all, ["-P", "/var/lib/lxc", "-n", "100", "--clear-env", "-v", PATH, "--", "ls", "-n"]);
    }
}
