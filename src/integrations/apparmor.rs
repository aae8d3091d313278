//! AppArmor: whether the kernel has it on, which profiles are loaded, and our own default profile.
//!
//! Used by the backends that run OCI containers. Loading needs `apparmor_parser`; a profile that is not loaded is an
//! error of the container that asks for it, never an unconfined container. Nothing is left behind but the profile.

use std::time::Duration;

use crate::core::error::{Error, Kind, Result};
use crate::utils::process::Spawn;

/// Name of our default profile.
pub const DEFAULT_PROFILE: &str = "proxmox-lxcri-default";
const PARSER: [&str; 2] = ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser"];
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";

/// What a container may not do, whatever its capabilities: write to the kernel's knobs, mount, trace other profiles.
const PROFILE: &str = "
profile proxmox-lxcri-default flags=(attach_disconnected,mediate_deleted) {
  network,
  capability,
  file,
  umount,
  # From the node (a runtime that stops it), and within the profile.
  signal (receive) peer=unconfined,
  signal (receive) peer=crun,
  signal (send, receive) peer=proxmox-lxcri-default,
  ptrace (trace, read, tracedby, readby) peer=proxmox-lxcri-default,
  deny mount,
  deny /proc/* w,
  deny /proc/{[^1-9],[^1-9][^0-9],[^1-9s][^0-9y][^0-9s],[^1-9][^0-9][^0-9][^0-9/]*}/** w,
  deny /proc/sys/[^kn]** w,
  deny /proc/sys/kernel/{?,??,[^s][^h][^m]**} w,
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,
  deny /proc/{mem,kmem} rwklx,
  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/fs/cg[^r]*/** wklx,
  deny /sys/firmware/** rwklx,
  # What it takes to guess keys by the power that using them needs.
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
}
";

/// Whether the kernel confines.
pub fn is_enabled() -> bool {
    std::fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|s| s.starts_with('Y'))
}

/// Whether the profile is loaded. Blocks shortly.
pub fn is_loaded(name: &str) -> Result<bool> {
    let text = std::fs::read_to_string(LOADED).map_err(|e| Error::io(format!("read {LOADED}"), e))?;
    Ok(text.lines().any(|l| l.rsplit_once(" (").is_some_and(|(n, _)| n == name)))
}

/// Loads our default profile unless it is loaded.
pub async fn load_default() -> Result<()> {
    if is_loaded(DEFAULT_PROFILE)? {
        return Ok(());
    }
    let parser =
        PARSER.into_iter().find(|p| std::path::Path::new(p).try_exists().unwrap_or(false)).ok_or_else(|| {
            Error::new(
                Kind::FailedPrecondition,
                "AppArmor is on, but apparmor_parser is not installed (package apparmor)",
            )
        })?;
    Spawn::new(parser, ["--replace", "--skip-cache"])
        .stdin(PROFILE)
        .deadline(Duration::from_secs(30))
        .run_ok()
        .await
        .map_err(|e| Error::because(Kind::FailedPrecondition, format!("load AppArmor profile {DEFAULT_PROFILE}"), e))?;
    Ok(())
}
