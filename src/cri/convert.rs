//! From the wire to `core::spec`: parsed once, refused by name. Pure.

use std::collections::BTreeMap;

use crate::api::v1;
use crate::core::error::{Error, Result};
use crate::core::ports::RegistryAuth;
use crate::core::spec::*;

/// Longest name, label key or path that is taken.
const NAME_MAX: usize = 4096;

/// A pod's configuration.
pub fn sandbox(config: Option<v1::PodSandboxConfig>) -> Result<SandboxConfig> {
    let config = config.ok_or_else(|| Error::invalid("the sandbox's config is missing"))?;
    let m = config.metadata.ok_or_else(|| Error::invalid("the sandbox's metadata is missing"))?;
    for (what, value) in [("name", &m.name), ("namespace", &m.namespace), ("uid", &m.uid)] {
        if value.is_empty() {
            return Err(Error::invalid(format!("the sandbox's metadata has no {what}")));
        }
        printable(&format!("the sandbox's {what}"), value)?;
    }
    if config.windows.is_some() {
        return Err(Error::invalid("windows settings on a Linux node"));
    }
    let linux = config.linux.unwrap_or_default();
    if config.hostname.len() > 64 || config.hostname.contains(['\0', '/', '\n']) {
        return Err(Error::invalid(format!(
            "hostname {:?} does not fit a Linux host name (64 bytes)",
            config.hostname
        )));
    }
    let log_directory = match config.log_directory.as_str() {
        "" => None,
        path if path.starts_with('/') => Some(path.into()),
        path => return Err(Error::invalid(format!("log_directory {path:?} is not absolute"))),
    };
    Ok(SandboxConfig {
        metadata: PodMetadata { name: m.name, uid: m.uid, namespace: m.namespace, attempt: m.attempt },
        hostname: config.hostname,
        log_directory,
        dns: config.dns_config.map(dns).transpose()?,
        port_mappings: config.port_mappings.into_iter().map(port_mapping).collect::<Result<_>>()?,
        labels: config.labels,
        annotations: config.annotations,
        cgroup_parent: linux.cgroup_parent,
        sysctls: linux.sysctls,
        security: sandbox_security(linux.security_context.unwrap_or_default())?,
        overhead: resources(linux.overhead.unwrap_or_default()),
        resources: resources(linux.resources.unwrap_or_default()),
    })
}

fn printable(what: &str, value: &str) -> Result<()> {
    if value.len() > NAME_MAX || value.chars().any(char::is_control) {
        return Err(Error::invalid(format!("{what} {value:?} is too long or has control characters")));
    }
    Ok(())
}

fn dns(dns: v1::DnsConfig) -> Result<DnsConfig> {
    for value in dns.servers.iter().chain(&dns.searches).chain(&dns.options) {
        if value.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(Error::invalid(format!("dns_config: {value:?} has white space in it")));
        }
    }
    Ok(DnsConfig { servers: dns.servers, searches: dns.searches, options: dns.options })
}

fn port_mapping(p: v1::PortMapping) -> Result<PortMapping> {
    let port = |n: i32, what: &str| {
        u16::try_from(n).map_err(|_| Error::invalid(format!("port mapping: {what} {n} is not a port")))
    };
    Ok(PortMapping {
        protocol: match p.protocol() {
            v1::Protocol::Tcp => Protocol::Tcp,
            v1::Protocol::Udp => Protocol::Udp,
            v1::Protocol::Sctp => Protocol::Sctp,
        },
        container_port: port(p.container_port, "container_port")?,
        host_port: port(p.host_port, "host_port")?,
        host_ip: match p.host_ip.as_str() {
            "" => None,
            ip => Some(ip.parse().map_err(|_| Error::invalid(format!("port mapping: {ip:?} is not an IP address")))?),
        },
    })
}

fn namespace_mode(mode: i32, what: &str) -> Result<NamespaceMode> {
    match v1::NamespaceMode::try_from(mode) {
        Ok(v1::NamespaceMode::Pod) => Ok(NamespaceMode::Pod),
        Ok(v1::NamespaceMode::Container) => Ok(NamespaceMode::Container),
        Ok(v1::NamespaceMode::Node) => Ok(NamespaceMode::Node),
        Ok(v1::NamespaceMode::Target) => Ok(NamespaceMode::Target),
        Err(_) => Err(Error::invalid(format!("{what} namespace: mode {mode} is not known"))),
    }
}

fn namespaces(options: Option<v1::NamespaceOption>) -> Result<Namespaces> {
    let options = options.unwrap_or_default();
    let (network, pid, ipc) = (
        namespace_mode(options.network, "network")?,
        namespace_mode(options.pid, "pid")?,
        namespace_mode(options.ipc, "ipc")?,
    );
    for (what, mode) in [("network", network), ("ipc", ipc)] {
        if !matches!(mode, NamespaceMode::Pod | NamespaceMode::Node) {
            return Err(Error::invalid(format!("{what} namespace: {mode:?} is not possible, only POD and NODE")));
        }
    }
    let user = match options.userns_options {
        Some(u) => match namespace_mode(u.mode, "user")? {
            NamespaceMode::Node => None,
            NamespaceMode::Pod => Some(UserNamespace { uids: mappings(&u.uids), gids: mappings(&u.gids) }),
            other => return Err(Error::invalid(format!("user namespace: {other:?} is not possible"))),
        },
        None => None,
    };
    let target = (!options.target_id.is_empty()).then_some(options.target_id);
    Ok(Namespaces { network, pid, ipc, target, user })
}

fn mappings(list: &[v1::IdMapping]) -> Vec<IdMapping> {
    list.iter().map(|m| IdMapping { host_id: m.host_id, container_id: m.container_id, length: m.length }).collect()
}

/// The newer field wins; the older one ("", "runtime/default", "unconfined", "localhost/x") counts without it.
fn profile(new: Option<v1::SecurityProfile>, old: &str, what: &str) -> Result<Profile> {
    use v1::security_profile::ProfileType;
    match new {
        Some(p) => match ProfileType::try_from(p.profile_type) {
            Ok(ProfileType::RuntimeDefault) => Ok(Profile::RuntimeDefault),
            Ok(ProfileType::Unconfined) => Ok(Profile::Unconfined),
            Ok(ProfileType::Localhost) if p.localhost_ref.is_empty() => {
                Err(Error::invalid(format!("{what} profile: Localhost without a name")))
            }
            // Kubelets have written the older form's prefix into the newer field; no profile or file has such a name.
            Ok(ProfileType::Localhost) => Ok(Profile::Localhost(
                p.localhost_ref.strip_prefix("localhost/").unwrap_or(&p.localhost_ref).to_owned(),
            )),
            Err(_) => Err(Error::invalid(format!("{what} profile: type {} is not known", p.profile_type))),
        },
        None => match old {
            "" | "unconfined" => Ok(Profile::Unconfined),
            "runtime/default" | "docker/default" => Ok(Profile::RuntimeDefault),
            name => match name.strip_prefix("localhost/") {
                Some(path) => Ok(Profile::Localhost(path.to_string())),
                None => Err(Error::invalid(format!("{what} profile {name:?} is not known"))),
            },
        },
    }
}

fn selinux(o: Option<v1::SeLinuxOption>) -> Option<SelinuxOptions> {
    o.map(|o| SelinuxOptions { user: o.user, role: o.role, kind: o.r#type, level: o.level })
}

fn groups_policy(policy: i32) -> Result<SupplementalGroupsPolicy> {
    match v1::SupplementalGroupsPolicy::try_from(policy) {
        Ok(v1::SupplementalGroupsPolicy::Merge) => Ok(SupplementalGroupsPolicy::Merge),
        Ok(v1::SupplementalGroupsPolicy::Strict) => Ok(SupplementalGroupsPolicy::Strict),
        Err(_) => Err(Error::invalid(format!("supplemental_groups_policy {policy} is not known"))),
    }
}

#[allow(deprecated)]
fn sandbox_security(s: v1::LinuxSandboxSecurityContext) -> Result<SandboxSecurity> {
    Ok(SandboxSecurity {
        namespaces: namespaces(s.namespace_options)?,
        privileged: s.privileged,
        seccomp: profile(s.seccomp, &s.seccomp_profile_path, "seccomp")?,
        apparmor: profile(s.apparmor, "", "AppArmor")?,
        selinux: selinux(s.selinux_options),
        run_as_user: s.run_as_user.map(|v| v.value),
        run_as_group: s.run_as_group.map(|v| v.value),
        readonly_rootfs: s.readonly_rootfs,
        supplemental_groups: s.supplemental_groups,
        supplemental_groups_policy: groups_policy(s.supplemental_groups_policy)?,
    })
}

/// Limits.
pub fn resources(r: v1::LinuxContainerResources) -> Resources {
    Resources {
        cpu_period: r.cpu_period,
        cpu_quota: r.cpu_quota,
        cpu_shares: r.cpu_shares,
        memory_limit: r.memory_limit_in_bytes,
        memory_swap_limit: r.memory_swap_limit_in_bytes,
        oom_score_adj: Some(r.oom_score_adj),
        cpuset_cpus: r.cpuset_cpus,
        cpuset_mems: r.cpuset_mems,
        hugepages: r.hugepage_limits.into_iter().map(|h| (h.page_size, h.limit)).collect(),
        unified: r.unified,
    }
}

/// An image by name.
pub fn image_spec(spec: Option<v1::ImageSpec>) -> Result<ImageSpec> {
    match spec {
        Some(s) if !s.image.is_empty() => Ok(ImageSpec {
            image: s.image,
            user_specified_image: s.user_specified_image,
            runtime_handler: s.runtime_handler,
            annotations: s.annotations,
            image_ref: s.image_ref,
        }),
        _ => Err(Error::invalid("the image is missing")),
    }
}

fn mount(m: v1::Mount) -> Result<Mount> {
    let propagation = match v1::MountPropagation::try_from(m.propagation) {
        Ok(v1::MountPropagation::PropagationPrivate) => Propagation::Private,
        Ok(v1::MountPropagation::PropagationHostToContainer) => Propagation::HostToContainer,
        Ok(v1::MountPropagation::PropagationBidirectional) => Propagation::Bidirectional,
        Err(_) => {
            return Err(Error::invalid(format!("mount at {:?}: propagation {}", m.container_path, m.propagation)));
        }
    };
    // An image without a name is none.
    let image = m.image.filter(|i| !i.image.is_empty());
    match (&image, m.host_path.as_str()) {
        (None, "") => {
            return Err(Error::invalid(format!("mount at {:?}: neither host_path nor image", m.container_path)));
        }
        (Some(_), path) if !path.is_empty() => {
            return Err(Error::invalid(format!("mount at {:?}: both host_path and image", m.container_path)));
        }
        _ => {}
    }
    // In a pod with an image volume the kubelet (1.36, `makeMounts`) gives the sub-path of every volume here as well; a host
    // path has it in it already.
    let image_sub_path = if image.is_some() { m.image_sub_path } else { String::new() };
    Ok(Mount {
        image: image.map(|i| image_spec(Some(i))).transpose()?,
        container_path: m.container_path,
        host_path: m.host_path,
        readonly: m.readonly,
        recursive_read_only: m.recursive_read_only,
        selinux_relabel: m.selinux_relabel,
        propagation,
        uid_mappings: mappings(&m.uid_mappings),
        gid_mappings: mappings(&m.gid_mappings),
        image_sub_path,
        options: m.mount_options,
    })
}

fn device(d: v1::Device) -> Result<Device> {
    let permissions = if d.permissions.is_empty() { "rwm".to_string() } else { d.permissions };
    if !permissions.chars().all(|c| "rwm".contains(c)) {
        return Err(Error::invalid(format!("device {:?}: permissions {permissions:?} are not of rwm", d.host_path)));
    }
    Ok(Device { container_path: d.container_path, host_path: d.host_path, permissions })
}

fn env_var(kv: v1::KeyValue) -> Result<EnvVar> {
    if kv.key.is_empty() || kv.key.contains(['=', '\0']) {
        return Err(Error::invalid(format!("environment variable {:?} has no usable name", kv.key)));
    }
    // The value is not named: it may be a secret.
    let value = String::from_utf8(kv.value)
        .ok()
        .filter(|v| !v.contains('\0'))
        .ok_or_else(|| Error::invalid(format!("the value of environment variable {:?} is not UTF-8 text", kv.key)))?;
    Ok(EnvVar { name: kv.key, value })
}

/// A container's configuration.
#[allow(deprecated)]
pub fn container(config: Option<v1::ContainerConfig>) -> Result<ContainerConfig> {
    let config = config.ok_or_else(|| Error::invalid("the container's config is missing"))?;
    let stop_signal = signal(config.stop_signal)?;
    let m = config.metadata.ok_or_else(|| Error::invalid("the container's metadata is missing"))?;
    if m.name.is_empty() {
        return Err(Error::invalid("the container's metadata has no name"));
    }
    printable("the container's name", &m.name)?;
    let named = |e: Error| e.context(format!("container {:?}", m.name));
    if config.windows.is_some() {
        return Err(named(Error::invalid("windows settings on a Linux node")));
    }
    let linux = config.linux.unwrap_or_default();
    let s = linux.security_context.unwrap_or_default();
    let caps = s.capabilities.unwrap_or_default();
    let security = ContainerSecurity {
        add_capabilities: caps.add_capabilities,
        drop_capabilities: caps.drop_capabilities,
        ambient_capabilities: caps.add_ambient_capabilities,
        privileged: s.privileged,
        namespaces: namespaces(s.namespace_options).map_err(named)?,
        selinux: selinux(s.selinux_options),
        run_as_user: s.run_as_user.map(|v| v.value),
        run_as_group: s.run_as_group.map(|v| v.value),
        run_as_username: s.run_as_username,
        readonly_rootfs: s.readonly_rootfs,
        supplemental_groups: s.supplemental_groups,
        supplemental_groups_policy: groups_policy(s.supplemental_groups_policy).map_err(named)?,
        no_new_privs: s.no_new_privs,
        masked_paths: s.masked_paths,
        readonly_paths: s.readonly_paths,
        seccomp: profile(s.seccomp, &s.seccomp_profile_path, "seccomp").map_err(named)?,
        apparmor: profile(s.apparmor, &s.apparmor_profile, "AppArmor").map_err(named)?,
    };
    Ok(ContainerConfig {
        image: image_spec(config.image).map_err(named)?,
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        envs: config.envs.into_iter().map(env_var).collect::<Result<_>>().map_err(named)?,
        mounts: config.mounts.into_iter().map(mount).collect::<Result<_>>().map_err(named)?,
        devices: config.devices.into_iter().map(device).collect::<Result<_>>().map_err(named)?,
        cdi_devices: config.cdi_devices.into_iter().map(|d| d.name).collect(),
        labels: config.labels,
        annotations: config.annotations,
        log_path: config.log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        stop_signal,
        resources: resources(linux.resources.unwrap_or_default()),
        security,
        name: m.name,
        attempt: m.attempt,
    })
}

/// Whether the request says anything of namespaces.
pub fn has_namespace_options(config: Option<&v1::ContainerConfig>) -> bool {
    let security = config.and_then(|c| c.linux.as_ref()).and_then(|l| l.security_context.as_ref());
    security.is_some_and(|s| s.namespace_options.is_some())
}

/// The node's pod networks, as "10.1.0.0/24" or "10.1.0.0/24,fd00::/64"; "": none.
pub fn pod_cidrs(list: &str) -> Result<Vec<String>> {
    let parts = list.split(',').map(str::trim).filter(|c| !c.is_empty());
    let check = |cidr: &str| {
        let fits = cidr.split_once('/').is_some_and(|(ip, bits)| match ip.parse::<std::net::IpAddr>() {
            Ok(ip) => bits.parse::<u8>().is_ok_and(|bits| bits <= if ip.is_ipv4() { 32 } else { 128 }),
            Err(_) => false,
        });
        if fits {
            Ok(cidr.to_owned())
        } else {
            Err(Error::invalid(format!("pod_cidr: {cidr:?} is not an address range")))
        }
    };
    parts.map(check).collect()
}

/// Credentials of a pull.
pub fn auth(auth: Option<v1::AuthConfig>) -> Option<RegistryAuth> {
    auth.map(|a| RegistryAuth {
        username: a.username,
        password: a.password,
        auth: a.auth,
        server_address: a.server_address,
        identity_token: a.identity_token,
        registry_token: a.registry_token,
    })
}

/// Linux signal numbers by the wire's names; RUNTIME_DEFAULT is None.
fn signal(number: i32) -> Result<Option<i32>> {
    let signal =
        v1::Signal::try_from(number).map_err(|_| Error::invalid(format!("stop_signal {number} is not known")))?;
    if signal == v1::Signal::RuntimeDefault {
        return Ok(None);
    }
    let name = signal.as_str_name().trim_start_matches("SIGNAL_");
    signal_number(name).map(Some).ok_or_else(|| Error::invalid(format!("stop_signal {name} is not known")))
}

/// Number of "SIGTERM", "TERM", "SIGRTMIN+3" (also "RTMINPLUS3" as the CRI spells it) or "15".
pub fn signal_number(name: &str) -> Option<i32> {
    crate::core::signals::number(name)
}

/// The wire's value for a signal number; unknown ones are RUNTIME_DEFAULT.
pub fn signal_to_wire(number: i32) -> v1::Signal {
    let values: BTreeMap<i32, v1::Signal> = (1..=65)
        .filter_map(|n| v1::Signal::try_from(n).ok())
        .filter_map(|s| signal_number(s.as_str_name().trim_start_matches("SIGNAL_")).map(|n| (n, s)))
        .rev()
        .collect();
    values.get(&number).copied().unwrap_or(v1::Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_of_the_wire_has_a_number_and_back() {
        for n in 1..=65 {
            let s = v1::Signal::try_from(n).expect("known");
            let number = signal(n).expect("number").expect("not default");
            assert_eq!(signal(signal_to_wire(number).into()).expect("back"), Some(number), "{}", s.as_str_name());
        }
        assert_eq!(signal(0).expect("a default"), None);
        for unknown in [-1, 66, 99, 999] {
            assert!(signal(unknown).expect_err("unknown").chain().contains(&unknown.to_string()));
        }
        assert_eq!(signal_to_wire(15), v1::Signal::Sigterm);
    }

    #[test]
    fn missing_parts_are_named() {
        assert!(sandbox(None).is_err());
        let e = sandbox(Some(v1::PodSandboxConfig::default())).expect_err("no metadata");
        assert!(e.chain().contains("metadata"), "{}", e.chain());
        let e = container(Some(v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "c".into(), attempt: 0 }),
            ..Default::default()
        }))
        .expect_err("no image");
        assert!(e.chain().contains("image"), "{}", e.chain());
    }

    #[test]
    fn a_sub_path_of_an_image_means_nothing_without_one() {
        let wire = v1::Mount {
            container_path: "/a".into(),
            host_path: "/pods/u/volume-subpaths/e/c/0".into(),
            image_sub_path: "a/b".into(),
            ..Default::default()
        };
        let m = mount(wire.clone()).expect("what the kubelet sends beside an image volume");
        assert_eq!((m.host_path, m.image_sub_path), (wire.host_path.clone(), String::new()));
        let image = Some(v1::ImageSpec { image: "busybox".into(), ..Default::default() });
        let m = mount(v1::Mount { host_path: String::new(), image, ..wire }).expect("an image volume");
        assert_eq!(m.image_sub_path, "a/b");
    }

    #[test]
    fn pod_networks_are_one_or_two_ranges() {
        assert_eq!(pod_cidrs("10.1.0.0/24, fd00::/64").expect("two"), ["10.1.0.0/24", "fd00::/64"]);
        assert_eq!(pod_cidrs("").expect("none"), Vec::<String>::new());
        for bad in ["10.1.0.0", "10.1.0.0/33", "fd00::/129", "x/8", "10.1.0.0/-1", "10.1.0.0/24\"}"] {
            assert!(pod_cidrs(bad).expect_err("refused").chain().contains("pod_cidr"), "{bad}");
        }
    }

    #[test]
    fn secret_values_are_not_in_errors() {
        let e = env_var(v1::KeyValue { key: "TOKEN".into(), value: b"hunter2\xff".to_vec() }).expect_err("not utf-8");
        assert!(!e.chain().contains("hunter2"));
        let v = env_var(v1::KeyValue { key: "TOKEN".into(), value: b"hunter2".to_vec() }).expect("fits");
        assert!(!format!("{v:?}").contains("hunter2"));
    }
}
