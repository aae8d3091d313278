//! The process section: arguments, environment, user, capabilities, limits.

use std::collections::HashSet;

use oci_spec::runtime::{
    Capability, LinuxCapabilities, LinuxCapabilitiesBuilder, PosixRlimitBuilder, PosixRlimitType, Process, User,
    UserBuilder,
};

use super::{SpecInput, built, selinux};
use crate::core::caps::CapSet;
use crate::core::error::{Error, Result};
use crate::core::spec::NamespaceMode;

/// Soft limit of open files: what programs expect that size tables by it or use select(2).
const NOFILE_SOFT: u64 = 1024;
/// PATH of images that set none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(super) fn plan(input: &SpecInput<'_>) -> Result<Process> {
    let (config, host) = (input.config, input.host);
    let mut process = Process::default();
    process.set_terminal(Some(config.tty));
    process.set_args(Some(arguments(input)?));
    process.set_env(Some(environment(input)));
    process.set_cwd(working_dir(input)?.into());
    process.set_user(user(input)?);
    process.set_capabilities(Some(capabilities(input)?));
    process.set_no_new_privileges(Some(config.security.no_new_privs));
    process.set_apparmor_profile(input.apparmor.clone());
    process.set_oom_score_adj(Some(oom_score_adj(input)));
    let soft = NOFILE_SOFT.min(host.nofile_hard);
    let nofile = PosixRlimitBuilder::default().typ(PosixRlimitType::RlimitNofile).soft(soft).hard(host.nofile_hard);
    process.set_rlimits(Some(vec![built(nofile.build())?]));
    process.set_selinux_label(selinux::labels(config.security.selinux.as_ref(), host.selinux)?.map(|l| l.process));
    Ok(process)
}

/// As Kubernetes combines them: a command replaces entry point and arguments of the image, arguments replace its own.
fn arguments(input: &SpecInput<'_>) -> Result<Vec<String>> {
    let (config, image) = (input.config, &input.image.config);
    let args = match (config.command.is_empty(), config.args.is_empty()) {
        (false, _) => [&config.command[..], &config.args[..]].concat(),
        (true, false) => [&image.entrypoint[..], &config.args[..]].concat(),
        (true, true) => [&image.entrypoint[..], &image.cmd[..]].concat(),
    };
    match args.first() {
        None => Err(Error::invalid("no command is given, and the image has none")),
        Some(first) if first.is_empty() => Err(Error::invalid("the command is empty")),
        Some(_) => Ok(args),
    }
}

/// The image's variables, then ours, then the request's; a later one replaces an earlier one in its place.
fn environment(input: &SpecInput<'_>) -> Vec<String> {
    let mut env: Vec<String> = Vec::new();
    let mut set = |name: &str, line: String| match env.iter_mut().find(|e| e.split('=').next() == Some(name)) {
        Some(old) => *old = line,
        None => env.push(line),
    };
    set("PATH", format!("PATH={DEFAULT_PATH}"));
    if !input.pod.config.hostname.is_empty() {
        set("HOSTNAME", format!("HOSTNAME={}", input.pod.config.hostname));
    }
    if input.config.tty {
        set("TERM", "TERM=xterm".to_string());
    }
    for line in &input.image.config.env {
        set(line.split('=').next().unwrap_or_default(), line.clone());
    }
    for var in &input.config.envs {
        set(&var.name, format!("{}={}", var.name, var.value));
    }
    env
}

fn working_dir(input: &SpecInput<'_>) -> Result<String> {
    let dir = [&input.config.working_dir, &input.image.config.working_dir]
        .into_iter()
        .find(|d| !d.is_empty())
        .map_or("/", String::as_str);
    if !dir.starts_with('/') {
        return Err(Error::invalid(format!("working directory {dir:?} is not absolute")));
    }
    Ok(dir.to_string())
}

fn user(input: &SpecInput<'_>) -> Result<User> {
    built(
        UserBuilder::default()
            .uid(input.user.uid)
            .gid(input.user.gid)
            .additional_gids(input.user.groups.clone())
            .build(),
    )
}

/// The capabilities that the container's processes may have at most.
pub fn bounding(input: &SpecInput<'_>) -> Result<CapSet> {
    let security = &input.config.security;
    if security.privileged {
        return Ok(input.host.bounding);
    }
    let asked = input.default_caps.adjusted(&security.add_capabilities, &security.drop_capabilities)?;
    let has = asked.and(input.host.bounding);
    let all = security.add_capabilities.iter().any(|n| n.eq_ignore_ascii_case("ALL"));
    if let Some(name) = CapSet(asked.0 & !has.0).oci_names().first()
        && !all
    {
        let added = CapSet::of(
            &security.add_capabilities.iter().filter(|n| !n.eq_ignore_ascii_case("ALL")).collect::<Vec<_>>(),
        )?;
        if added.oci_names().contains(name) {
            return Err(Error::invalid(format!(
                "capability {name} can't be given: the runtime itself does not have it"
            )));
        }
    }
    Ok(has)
}

fn capabilities(input: &SpecInput<'_>) -> Result<LinuxCapabilities> {
    let set = bounding(input)?;
    let ambient = CapSet::of(&input.config.security.ambient_capabilities)?;
    if let Some(name) = CapSet(ambient.0 & !set.0).oci_names().first() {
        return Err(Error::invalid(format!("ambient capability {name} is not among the container's capabilities")));
    }
    let names = |set: CapSet| -> HashSet<Capability> {
        set.oci_names().iter().filter_map(|n| n.trim_start_matches("CAP_").parse().ok()).collect()
    };
    built(
        LinuxCapabilitiesBuilder::default()
            .bounding(names(set))
            .effective(names(set))
            .permitted(names(set))
            .inheritable(names(ambient))
            .ambient(names(ambient))
            .build(),
    )
}

/// What was asked for, not below what the kernel lets the daemon set.
fn oom_score_adj(input: &SpecInput<'_>) -> i32 {
    // Its range was checked.
    let asked = input.config.resources.oom_score_adj.unwrap_or(0).clamp(-1000, 1000) as i32;
    if input.host.sys_resource { asked } else { asked.max(input.host.oom_score_adj) }
}

/// Whether the container sees the host's processes.
pub(super) fn host_pid(input: &SpecInput<'_>) -> bool {
    input.config.security.namespaces.pid == NamespaceMode::Node
}
