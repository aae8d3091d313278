//! Whether values that are well formed make sense, each and together. Sections with much of it check themselves.
//!
//! Asks nothing outside: a file that is missing is `doctor`'s affair, or its user's.

use std::net::Ipv4Addr;

use super::faults::{Fault, Faults};
use super::{Config, Images, Network, Router, Runtime, Server, Tracing};
use crate::core::{caps, classes};

/// Longest path of a unix socket, in bytes.
const SOCKET_PATH_MAX: usize = 107;
/// A smaller log would be dropped before anybody has read it, in bytes.
const LOG_SIZE_LEAST: u64 = 1 << 20;
/// A day, in seconds: the longest that anything may take.
const DAY: u64 = 86_400;

impl Tracing {
    fn check(&self, faults: &mut Faults) {
        let key = "tracing.endpoint";
        if !self.endpoint.is_empty() {
            let host = ["http://", "https://"].iter().find_map(|scheme| self.endpoint.strip_prefix(scheme));
            match host.map(|rest| rest.trim_end_matches('/')) {
                Some(host) if !host.is_empty() && !host.contains(['/', '@', ' ']) => {}
                _ => faults.add(key, "is to be http://HOST:PORT, or https://HOST:PORT".to_owned()),
            }
        }
        faults.absolute("tracing.ca_file", &self.ca_file);
        if self.ca_file.is_some() && !self.endpoint.starts_with("https://") {
            faults.with("tracing.ca_file", key, "a CA is for an endpoint that begins with https://");
        }
        faults.range("tracing.sampling_per_million", self.sampling_per_million, 0..=1_000_000);
        if self.sampling_per_million > 0 && self.endpoint.is_empty() {
            faults.with("tracing.sampling_per_million", key, "tracing.endpoint says where traces go, and is empty");
        }
    }
}

impl Config {
    /// All that does not fit.
    pub(super) fn faults(&self) -> Vec<Fault> {
        let mut faults = Faults::default();
        if self.version != 1 {
            faults.add("version", format!("{} is not known, this is version 1", self.version));
        }
        self.server.check(&mut faults);
        check_level(&self.log.level, &mut faults);
        self.runtime.check(&mut faults);
        self.images.check(&mut faults);
        self.network.check(&mut faults);
        self.proxmox.check(&mut faults);
        self.tracing.check(&mut faults);
        self.nri.check(&mut faults);
        self.check_handlers(&mut faults);
        faults.into_vec()
    }

    /// Handlers that there are.
    pub fn handler_names(&self) -> Vec<&'static str> {
        let proxmox_lxc = self.handlers.proxmox_lxc.enabled.then_some("proxmox-lxc");
        let proxmox_vm = self.handlers.proxmox_vm.enabled.then_some("proxmox-vm");
        ["crun", "lxc"].into_iter().chain(proxmox_lxc).chain(proxmox_vm).collect()
    }

    fn check_handlers(&self, faults: &mut Faults) {
        let (crun, lxc) = (&self.handlers.crun, &self.handlers.lxc);
        faults.absolute("handlers.crun.path", [&crun.path]);
        faults.range("handlers.crun.timeout", crun.timeout, 1..=DAY);
        faults.range("handlers.crun.checkpoint_timeout", crun.checkpoint_timeout, 1..=7 * DAY);
        faults.absolute("handlers.lxc.helper", &lxc.helper);
        faults.absolute("handlers.lxc.init", &lxc.init);
        faults.absolute("handlers.lxc.library", &lxc.library);
        faults.range("handlers.lxc.timeout", lxc.timeout, 1..=DAY);
        self.handlers.proxmox_lxc.check(faults);
        let enabled = "handlers.proxmox-lxc.enabled";
        self.handlers.proxmox_vm.check(faults);
        let on = [
            (enabled, self.handlers.proxmox_lxc.enabled),
            ("handlers.proxmox-vm.enabled", self.handlers.proxmox_vm.enabled),
        ];
        for (key, _) in on.into_iter().filter(|(_, on)| *on && self.proxmox.endpoints.is_empty()) {
            faults.with(key, "proxmox.endpoints", "proxmox.endpoints says how Proxmox is reached, and is empty");
        }
        let unknown = |name: &str| {
            (!self.handler_names().contains(&name)).then(|| {
                format!("{name:?} is not a handler (crun, lxc, and proxmox-lxc and proxmox-vm where they are enabled)")
            })
        };
        if let Some(why) = unknown(&self.runtime.default_handler) {
            faults.with("runtime.default_handler", enabled, why);
        }
        for (n, route) in self.routing.iter().enumerate() {
            if let Some(why) = unknown(&route.handler) {
                faults.with(format!("routing[{n}].handler"), enabled, why);
            }
        }
        for fault in Router::faults(&self.routing) {
            faults.push(fault);
        }
        for (handler, policy) in self.handlers.policies() {
            for (key, why) in policy.faults() {
                faults.add(format!("handlers.{handler}.policy.{key}"), why);
            }
        }
    }
}

impl Server {
    fn check(&self, faults: &mut Faults) {
        for (key, path) in [("server.listen", &self.listen), ("server.local_listen", &self.local_listen)] {
            faults.absolute(key, [path]);
            if path.as_str().len() > SOCKET_PATH_MAX {
                faults.add(key, format!("{path}: a socket's path has at most {SOCKET_PATH_MAX} bytes"));
            }
        }
        if self.listen == self.local_listen {
            faults.with("server.local_listen", "server.listen", "both sockets can't have one path");
        }
        faults.absolute("server.root", [&self.root]);
        faults.absolute("server.state", [&self.state]);
        if self.root == self.state {
            let why = "what lives as long as the boot can't be in the folder of what outlives it (server.root)";
            faults.with("server.state", "server.root", why);
        }
        if !(1 << 20..=1 << 30).contains(&self.grpc_max_message_size) {
            faults.add("server.grpc_max_message_size", "1048576 (1 MiB) to 1073741824: less holds no request");
        }
        self.stream.check(faults);
    }
}

impl Runtime {
    fn check(&self, faults: &mut Faults) {
        faults.absolute("runtime.monitor_path", &self.monitor_path);
        faults.absolute("runtime.seccomp_root", [&self.seccomp_root]);
        faults.absolute("runtime.cdi_spec_dirs", &self.cdi_spec_dirs);
        faults.absolute("runtime.hooks_dirs", &self.hooks_dirs);
        faults.absolute("runtime.blockio_config_file", &self.blockio_config_file);
        for name in self.rdt_classes.iter().filter(|n| !classes::is_rdt_group(n)) {
            faults.add("runtime.rdt_classes", format!("{name:?} can't be a group of /sys/fs/resctrl"));
        }
        faults.range("runtime.log_line_max", self.log_line_max, 256..=16 << 20);
        if self.log_size_max != 0 {
            faults.range("runtime.log_size_max", self.log_size_max, LOG_SIZE_LEAST..=1 << 50);
        }
        faults.range("runtime.exec_sync_drain", self.exec_sync_drain, 0..=3600);
        faults.range("runtime.pids_limit", self.pids_limit, 0..=1 << 22);
        for capability in &self.default_capabilities {
            if let Err(e) = caps::parse(capability) {
                faults.add("runtime.default_capabilities", e.chain());
            }
        }
    }
}

impl Images {
    fn check(&self, faults: &mut Faults) {
        faults.absolute("images.config_path", &self.config_path);
        faults.absolute("images.auth_file", &self.auth_file);
        faults.absolute("images.credential_helper_dirs", &self.credential_helper_dirs);
        faults.range("images.credential_helper_timeout", self.credential_helper_timeout, 1..=DAY);
        faults.absolute("images.policy_file", &self.policy_file);
        faults.absolute("images.unpacker_path", &self.unpacker_path);
        faults.range("images.max_concurrent_downloads", self.max_concurrent_downloads, 1..=64);
        faults.range("images.progress_timeout", self.progress_timeout, 1..=DAY);
        let host = &self.default_registry;
        if host.is_empty() || host.contains(['/', '@', ' ']) {
            faults.add("images.default_registry", format!("{host:?} is no registry's host, such as \"docker.io\""));
        }
        for (pattern, way) in &self.proxies {
            let schemes = ["http://", "https://", "unix:"];
            if way != "direct" && !schemes.iter().any(|s| way.starts_with(s)) {
                let why = "\"direct\", http://HOST:PORT, https://HOST:PORT or unix:/PATH";
                faults.add(format!("images.proxies.{}", super::keys::quoted(pattern)), why);
            }
        }
        self.zfs.check(self.driver, faults);
        self.bfc.check(faults);
    }
}

impl Network {
    fn check(&self, faults: &mut Faults) {
        faults.absolute("network.plugin_dirs", &self.plugin_dirs);
        faults.absolute("network.conf_dir", [&self.conf_dir]);
        faults.absolute("network.conf_template", &self.conf_template);
        faults.range("network.plugin_timeout", self.plugin_timeout, 1..=DAY);
        if !is_subnet(&self.embedded_subnet) {
            let why = format!("{:?} is no IPv4 network of 8 to 29 bits: 10.213.0.0/20", self.embedded_subnet);
            faults.add("network.embedded_subnet", why);
        }
        if self.embedded && self.plugin_dirs.is_empty() {
            let why = "the embedded network is made of the plugins bridge and host-local: their folder is needed";
            faults.with("network.plugin_dirs", "network.embedded", why);
        }
    }
}

fn is_subnet(text: &str) -> bool {
    let parts = text.split_once('/').and_then(|(a, b)| Some((a.parse::<Ipv4Addr>().ok()?, b.parse::<u32>().ok()?)));
    parts.is_some_and(|(address, bits)| (8..=29).contains(&bits) && u32::from(address) & (u32::MAX >> bits) == 0)
}

/// A filter's words: the library takes any word for a module's name, so that "inof" would silence all but a module of that name.
fn check_level(level: &str, faults: &mut Faults) {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    if let Err(e) = level.parse::<tracing_subscriber::EnvFilter>() {
        faults.add("log.level", format!("{level:?} is no filter: {e}"));
        return;
    }
    for part in level.split(',').map(str::trim) {
        let word = part.rsplit_once('=').map_or(part, |(_, level)| level);
        let is_level = LEVELS.iter().any(|l| l.eq_ignore_ascii_case(word)) || word.parse::<u8>().is_ok_and(|n| n <= 5);
        if !is_level {
            let near = super::keys::nearest(word, LEVELS.into_iter());
            let near = near.map(|n| format!("; did you mean {n:?}?")).unwrap_or_default();
            faults.add("log.level", format!("{word:?} is no level ({}){near}", LEVELS.join(", ")));
        }
    }
}
