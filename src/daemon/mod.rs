//! Wires the layers: from a configuration to an engine with its backends, stores and network ([`wire`]), and from
//! there to a daemon that serves it ([`command::Serve`]). [`program`] is the whole program.
//!
//! The library's users get an engine of their own by [`wire`]; see `examples/basic_backend.rs`.

pub mod backend;
pub mod bfc;
pub mod command;
pub mod debug;
pub mod doctor;
mod lock;
mod metrics;
pub mod migrate;
pub mod program;
pub mod proxmox;
pub mod registry;
mod reload;
mod storage;
mod traces;
mod watchdog;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};

use crate::backends::crun::{CrunBackend, CrunConfig};
use crate::backends::lxc::{LxcBackend, LxcConfig};
use crate::backends::pods::{NodePods, PodsConfig};
use crate::backends::proxmox_lxc::{CtNets, CtNetwork, ProxmoxLxcBackend, ProxmoxLxcConfig};
use crate::backends::proxmox_vm::{ProxmoxVmBackend, ProxmoxVmConfig};
use crate::core::backend::Backend;
use crate::core::caps::CapSet;
use crate::core::config::{CgroupDriver, Config, CtProfile, NetworkKind, Router};
use crate::core::engine::{Engine, EngineConfig, Ports};
use crate::core::error::{Error, Kind, Result};
use crate::core::plugins::Plugins;
use crate::core::ports::{Clock, ImageStore, PodNetwork, Supervisor};
use crate::core::records::RecordStore;
use crate::integrations::cgroup::{Driver, Hierarchy, Mode};
use crate::integrations::cni::{Cni, CniConfig, embedded_conflist};
use crate::integrations::fdstore::SystemdFdStore;
use crate::integrations::images::{ImagesConfig, LocalImageStore};
use crate::integrations::layers::confined::Unpacker;
use crate::integrations::monitor::{MonitorConfig, MonitorSupervisor};
use crate::integrations::mounts;
use crate::integrations::netns::NamespacePins;
use crate::integrations::nri::{Nri, NriConfig};
use crate::integrations::proxmox_api::{Proxmox, Vmid};
use crate::integrations::registry::keychain::Keychain;
use crate::integrations::registry::proxy::Proxies;
use crate::utils::pidfd;
use crate::utils::tasks::TaskSet;

pub use crate::integrations::layers::confined::entry;
pub use lock::StateLock;

/// Where `ip netns` and other tools look for network namespaces.
const NETNS_FOLDER: &str = "/run/netns";
/// How often is looked whether there is something to sync or to give back.
const LOOK: Duration = Duration::from_secs(1);
/// Looks from one sync of the records to the next.
const SYNC: u64 = 3;
/// Looks after which memory is given back although the work goes on.
const LONG: u32 = 10;
/// Where a package puts the monitor.
const LIBEXEC: &str = "/usr/libexec/proxmox-lxcri";
/// The monitor's file name.
const MONITOR: &str = "proxmox-lxcri-monitor";
/// That of what stands for the monitor of a pod in a virtual machine.
const RELAY: &str = "proxmox-lxcri-guest-relay";
/// File names of what the handler `lxc` runs.
const LXC_HELPER: &str = "proxmox-lxcri-lxc";
const LXC_INIT: &str = "proxmox-lxcri-lxc-init";
/// Cgroup of the processes that liblxc runs in, where our own unit has none to give.
const HOLDERS: &str = "proxmox-lxcri-lxc";

/// An engine, and what must live as long as it.
pub struct Wired {
    /// The engine, recovered.
    pub engine: Engine,
    /// Who makes cgroups.
    pub cgroup_driver: CgroupDriver,
    /// All tasks of it; to be shut down last.
    pub tasks: TaskSet,
    /// Keeps a second daemon from the same folders.
    _lock: StateLock,
}

struct SystemClock;

impl Clock for SystemClock {
    fn now_ns(&self) -> i64 {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        now.tv_sec * 1_000_000_000 + now.tv_nsec
    }
    fn since_boot(&self) -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
    }
}

/// Makes an engine with everything that `config` names and takes up what an earlier one left.
pub async fn wire(config: &Config) -> Result<Wired> {
    let tasks = TaskSet::new("daemon");
    let (root, state) = (&config.server.root, &config.server.state);
    private_dir(root)?;
    make_dir(state, 0o711)?;
    for folder in [state.join("pods"), state.join("console"), state.join("crun")] {
        private_dir(&folder)?;
    }
    // Who is root in a pod's user namespace is nobody out here, and has to pass to the container's root file system.
    let rootfs = state.join("rootfs");
    make_dir(&rootfs, 0o711)?;
    let lock = StateLock::take(root, state)?;
    // Root file systems are mounted below it in the monitors' namespaces: nothing of that may reach the node's.
    mounts::make_private(rootfs.as_std_path())?;
    private_dir(&rootfs.join("mnt"))?;
    // As `ip netns` does it, before the first pod: namespaces pinned there are seen in every mount namespace.
    std::fs::create_dir_all(NETNS_FOLDER).map_err(|e| Error::io(format!("make folder {NETNS_FOLDER}"), e))?;
    mounts::make_shared(NETNS_FOLDER.as_ref())?;
    let hierarchy = Hierarchy::detect()?;
    let cgroup_driver = config.runtime.cgroup_driver.unwrap_or_else(|| default_driver(&hierarchy));
    let monitors = hierarchy.delegate()?;
    let unpacker = storage::unpacker(config, &tasks).await?;
    let layers = storage::open(config, unpacker.clone(), &tasks).await?;
    let images: Arc<dyn ImageStore> =
        LocalImageStore::open(images_config(config, unpacker)?, layers.clone(), tasks.clone()).await?;
    let supervisor: Arc<dyn Supervisor> = Arc::new(MonitorSupervisor::new(MonitorConfig {
        program: monitor_program(config)?,
        others: other_monitors(config),
        runtime: config.handlers.crun.path.clone(),
        run_root: state.join("pods"),
        cgroup: monitors.clone(),
        tasks: tasks.clone(),
    }));
    let network = Cni::new(cni_config(config)?);
    let pins = NamespacePins::new(NETNS_FOLDER, state);
    // Not in a pod's group, and not in our own unit's: liblxc turns on controllers all the way down, and systemd can start
    // nothing in a group that hands them on: a daemon that was killed would not come back.
    let holders = HOLDERS.into();
    let idmapped = layers.try_idmap().await.map_err(|e| e.chain());
    let pods = pods_config(config, cgroup_driver, idmapped)?;
    let in_cts = PodsConfig { driver: Driver::Cgroupfs, ..pods.clone() };
    let in_cts = (in_cts, hierarchy.clone(), pins.clone(), network.clone());
    let plugins = config.nri.enabled.then(|| Nri::new(nri_config(config), tasks.clone()));
    let pods = NodePods::new(pods, hierarchy, pins, network, tasks.clone()).await?;
    let pods = Arc::new(pods.with_plugins(plugins.clone()));
    let crun = CrunBackend::new(crun_config(config), pods.clone()).await;
    let lxc = LxcBackend::new(lxc_config(config, holders), pods.clone());
    let mut backends: Vec<Arc<dyn Backend>> = vec![Arc::new(crun), Arc::new(lxc)];
    // One for all handlers: its queues and its ticket are the node's.
    let mut client: Option<Proxmox> = None;
    let mut proxmox = || -> Result<Proxmox> {
        let known = client.take().map_or_else(|| Proxmox::new(&config.proxmox), Ok)?;
        Ok(client.insert(known).clone())
    };
    if config.handlers.proxmox_lxc.enabled {
        let (settings, hierarchy, pins, cni) = in_cts;
        let network: Arc<dyn PodNetwork> = match ct_nets(config)? {
            Some(nets) => Arc::new(CtNetwork::new(&nets, cni)),
            None => cni,
        };
        let pods = Arc::new(NodePods::new(settings, hierarchy, pins, network, tasks.clone()).await?);
        let api = proxmox()?;
        backends.push(Arc::new(ProxmoxLxcBackend::new(proxmox_lxc_config(config, &api)?, api, pods)));
    }
    if config.handlers.proxmox_vm.enabled {
        let api = proxmox()?;
        backends.push(Arc::new(ProxmoxVmBackend::new(proxmox_vm_config(config, &api)?, api, pods, tasks.clone())));
    }
    let engine = Engine::new(
        EngineConfig {
            state: state.clone(),
            default_handler: config.runtime.default_handler.clone(),
            router: Router::new(&config.routing)?,
            policies: config.handlers.policies().map(|(handler, policy)| (handler, policy.clone())).into(),
            container_quota: config.images.container_quota()?,
            exec_drain: Duration::from_secs(config.runtime.exec_sync_drain),
            boot_id: pidfd::boot_id().map_err(|e| Error::io("read the boot id", e))?,
        },
        Ports {
            backends,
            layers,
            images,
            supervisor,
            clock: Arc::new(SystemClock),
            parked: Arc::new(SystemdFdStore::open()),
            plugins: plugins.clone().map(|p| p as Arc<dyn Plugins>),
        },
        RecordStore::open(root)?,
        tasks.clone(),
    );
    let report = engine.recover().await?;
    if let Some(plugins) = plugins {
        // Before anybody can ask for a pod: none is made without those that the node has.
        plugins.start(engine.plugin_host()).await?;
    }
    tasks.spawn_cancellable("housekeeping", keep_house(engine.clone()));
    if config.handlers.proxmox_lxc.enabled || config.handlers.proxmox_vm.enabled {
        tasks.spawn_cancellable("look at the Proxmox API", doctor::proxmox::tell(config.clone()));
    }
    tracing::info!(pods = report.pods, running = report.running, quarantined = report.quarantined.len(), "recovered");
    Ok(Wired { engine, cgroup_driver, tasks, _lock: lock })
}

/// What is done a while after work and not on its path: records are synced, memory is given back when the work is over.
async fn keep_house(engine: Engine) {
    // Looks since work was first seen that nothing was given back after: the start is work as well.
    let mut untidy = 1;
    for look in 1_u64.. {
        tokio::time::sleep(LOOK).await;
        if look.is_multiple_of(SYNC)
            && let Err(e) = engine.sync_records().await
        {
            tracing::error!(error = e.chain(), "records may not outlive a power cut");
        }
        untidy = match (engine.take_activity(), untidy) {
            (false, 0) => 0,
            (true, n) if n < LONG => n + 1,
            _ => {
                crate::utils::memory::trim();
                0
            }
        };
    }
}

pub(in crate::daemon) fn images_config(config: &Config, unpacker: Unpacker) -> Result<ImagesConfig> {
    Ok(ImagesConfig {
        unpacker,
        root: config.server.root.join("images"),
        certs_dirs: config.images.config_path.clone(),
        keychain: keychain(config),
        proxies: Proxies::parse(&config.images.proxies)?,
        policy_file: config.images.policy_file.clone(),
        default_registry: config.images.default_registry.clone(),
        max_concurrent_downloads: config.images.max_concurrent_downloads,
        progress_timeout: config.images.progress_timeout(),
        bfc: config.images.bfc.clone(),
    })
}

/// The node's own credentials.
pub(in crate::daemon) fn keychain(config: &Config) -> Keychain {
    Keychain {
        file: config.images.auth_file.clone(),
        helper_dirs: config.images.credential_helper_dirs.clone(),
        helper_timeout: Duration::from_secs(config.images.credential_helper_timeout.max(1)),
    }
}

fn cni_config(config: &Config) -> Result<CniConfig> {
    let network = &config.network;
    let embedded = match network.embedded {
        true => Some(embedded_conflist(&network.plugin_dirs, &network.embedded_subnet)?),
        false => None,
    };
    Ok(CniConfig {
        conf_dirs: vec![network.conf_dir.clone()],
        plugin_dirs: network.plugin_dirs.clone(),
        embedded,
        template: network.conf_template.clone(),
        plugin_timeout: Duration::from_secs(network.plugin_timeout.max(1)),
        ..CniConfig::new(config.server.root.join("cni"))
    })
}

fn nri_config(config: &Config) -> NriConfig {
    let nri = &config.nri;
    NriConfig {
        plugin_dir: nri.plugin_dir.clone(),
        plugin_config_dir: nri.plugin_config_dir.clone(),
        socket: nri.connecting_plugins.then(|| nri.socket.clone()),
        registration_timeout: nri.registration_timeout.get(),
        request_timeout: nri.request_timeout.get(),
        required: nri.required_plugins.clone(),
        // Those whose containers are made from a specification on the node, by what can hold what plugins change.
        handlers: vec!["crun", "lxc"],
    }
}

fn crun_config(config: &Config) -> CrunConfig {
    CrunConfig {
        program: config.handlers.crun.path.clone(),
        timeout: Duration::from_secs(config.handlers.crun.timeout.max(1)),
        checkpoint_timeout: Duration::from_secs(config.handlers.crun.checkpoint_timeout.max(1)),
    }
}

fn lxc_config(config: &Config, holders: Utf8PathBuf) -> LxcConfig {
    let lxc = &config.handlers.lxc;
    // Without one the handler is there and says what it lacks.
    let at = |given: &Option<Utf8PathBuf>, name: &str| {
        given.clone().or_else(|| beside_us(name)).unwrap_or_else(|| Utf8Path::new(LIBEXEC).join(name))
    };
    LxcConfig {
        helper: at(&lxc.helper, LXC_HELPER),
        init: at(&lxc.init, LXC_INIT),
        library: lxc.library.as_ref().map(ToString::to_string).unwrap_or_default(),
        timeout: Duration::from_secs(lxc.timeout.max(1)),
        holders,
    }
}

fn proxmox_lxc_config(config: &Config, api: &Proxmox) -> Result<ProxmoxLxcConfig> {
    let handler = &config.handlers.proxmox_lxc;
    let programs = lxc_config(config, HOLDERS.into());
    let (first, last) = handler.vmids()?;
    let vmid = |n: u32| Vmid::new(n.into()).map_err(|e| Error::invalid(format!("handlers.proxmox-lxc.vmids: {e}")));
    Ok(ProxmoxLxcConfig {
        node: api.node(),
        installation: storage::installation(&config.server.root)?,
        vmids: (vmid(first)?, vmid(last)?),
        storage: handler.storage.clone(),
        pool: handler.pool.clone(),
        template_storage: handler.template_storage.clone(),
        init: programs.init,
        helper: programs.helper,
        runtime: config.handlers.crun.path.clone(),
        timeout: programs.timeout,
        ids: (handler.first_id, handler.ids),
        orphans: handler.orphans,
        orphans_after: handler.orphans_after.get(),
        network: ct_nets(config)?,
        native: handler.profile == CtProfile::Native,
    })
}

fn proxmox_vm_config(config: &Config, api: &Proxmox) -> Result<ProxmoxVmConfig> {
    let handler = &config.handlers.proxmox_vm;
    let (first, last) = handler.vmids()?;
    let vmid = |n: u32| Vmid::new(n.into()).map_err(|e| Error::invalid(format!("handlers.proxmox-vm: {e}")));
    Ok(ProxmoxVmConfig {
        node: api.node(),
        installation: storage::installation(&config.server.root)?,
        vmids: (vmid(first)?, vmid(last)?),
        template: vmid(handler.template)?,
        storage: handler.storage.clone(),
        pool: handler.pool.clone(),
        memory: handler.memory,
        guest_memory: handler.guest_memory,
        relay: relay_program(config),
        cores: handler.cores,
        port: handler.port,
        start_timeout: handler.start_timeout.get(),
        kubelet_root: handler.kubelet_root.clone(),
        orphans: handler.orphans,
        orphans_after: handler.orphans_after.get(),
        images_after: handler.images_after.get(),
        network: handler.network.clone(),
        addresses: handler.network.addresses(u128::from(last - first) + 1)?,
    })
}

fn relay_program(config: &Config) -> Utf8PathBuf {
    let given = config.handlers.proxmox_vm.relay_path.clone();
    given.or_else(|| beside_us(RELAY)).unwrap_or_else(|| Utf8Path::new(LIBEXEC).join(RELAY))
}

/// Programs in place of the monitor, by handler.
fn other_monitors(config: &Config) -> BTreeMap<String, Utf8PathBuf> {
    let of_vms = config.handlers.proxmox_vm.enabled.then(|| ("proxmox-vm".to_owned(), relay_program(config)));
    of_vms.into_iter().collect()
}

/// What Proxmox connects CTs with; None: CNI does.
fn ct_nets(config: &Config) -> Result<Option<CtNets>> {
    let handler = &config.handlers.proxmox_lxc;
    if handler.network.kind == NetworkKind::Cni {
        return Ok(None);
    }
    let (first, last) = handler.vmids()?;
    let addresses = handler.network.addresses(u128::from(last - first) + 1)?;
    Ok(Some(CtNets { settings: handler.network.clone(), addresses }))
}

/// A program in our own folder or in the package's.
fn beside_us(name: &str) -> Option<Utf8PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|p| Utf8PathBuf::from_path_buf(p).ok());
    let beside = beside.and_then(|p| p.parent().map(|d| d.join(name)));
    beside.into_iter().chain([Utf8Path::new(LIBEXEC).join(name)]).find(|p| p.try_exists().unwrap_or(false))
}

fn pods_config(
    config: &Config,
    driver: CgroupDriver,
    idmapped_rootfs: std::result::Result<(), String>,
) -> Result<PodsConfig> {
    Ok(PodsConfig {
        state: config.server.state.clone(),
        driver: match driver {
            CgroupDriver::Systemd => Driver::Systemd,
            CgroupDriver::Cgroupfs => Driver::Cgroupfs,
        },
        log_line_max: config.runtime.log_line_max,
        log_size_max: config.runtime.log_size_max,
        pids_limit: config.runtime.pids_limit,
        default_caps: CapSet::of(&config.runtime.default_capabilities)?,
        cdi_spec_dirs: config.runtime.cdi_spec_dirs.clone(),
        hooks_dirs: config.runtime.hooks_dirs.clone(),
        blockio_config_file: config.runtime.blockio_config_file.clone(),
        rdt_classes: config.runtime.rdt_classes.clone(),
        seccomp_root: config.runtime.seccomp_root.clone(),
        unprivileged_ports: config.runtime.enable_unprivileged_ports,
        unprivileged_icmp: config.runtime.enable_unprivileged_icmp,
        idmapped_rootfs,
    })
}

/// systemd where it is init (as sd_booted(3) asks) and cgroups are v2 alone.
fn default_driver(hierarchy: &Hierarchy) -> CgroupDriver {
    let systemd = Utf8Path::new("/run/systemd/system").try_exists().unwrap_or(false);
    match (systemd, hierarchy.mode) {
        (true, Mode::Unified) => CgroupDriver::Systemd,
        _ => CgroupDriver::Cgroupfs,
    }
}

fn monitor_program(config: &Config) -> Result<Utf8PathBuf> {
    if let Some(path) = &config.runtime.monitor_path {
        return Ok(path.clone());
    }
    beside_us(MONITOR).ok_or_else(|| {
        Error::new(
            Kind::FailedPrecondition,
            format!("no monitor program {MONITOR} beside this one or in {LIBEXEC}; set runtime.monitor_path"),
        )
    })
}

fn private_dir(path: &Utf8Path) -> Result<()> {
    make_dir(path, 0o700)
}

fn make_dir(path: &Utf8Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)))
        .map_err(|e| Error::io(format!("make folder {path}"), e))
}
