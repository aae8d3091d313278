//! A pod's VM: cloned, told its secret and address, started, waited for, and taken away.
//!
//! The number is in the journal before it is asked for; a VM is ours if its notes say so. The secret is made for the VM, and is on its
//! own small disk and in the pod's folder, for root alone. A crash leaves what the journal names.

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::plan::{self, CONFIG_DISK, VM};
use super::{ProxmoxVmBackend, guest};
use crate::backends::pods::files;
use crate::core::backend::Journal;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::{Monitor, NetworkResult};
use crate::core::records::{PodRecord, SandboxFacts};
use crate::fail_point;
use crate::integrations::proxmox_api::{GuestId, Vmid};
use crate::utils::atomic::{self, Durability};

/// How long a device node may take to appear.
const DEVICE: Duration = Duration::from_secs(10);
/// Pause between looks at what comes by itself.
const PAUSE: Duration = Duration::from_millis(100);
/// What the relay is told of its guest.
const GUEST: &str = "guest.json";

impl ProxmoxVmBackend {
    pub(super) async fn make_unit(
        &self,
        pod: &PodRecord,
        pod_dir: &Utf8Path,
        monitor: &dyn Monitor,
        journal: &mut dyn Journal,
        cancel: &CancellationToken,
    ) -> Result<SandboxFacts> {
        let vmid = self.clone_template(pod, journal).await?;
        let named = |e: Error| e.context(format!("VM {vmid} of pod {}", pod.id));
        let stopped = || match cancel.is_cancelled() {
            true => Err(Error::new(Kind::Aborted, format!("pod {} was stopped while it was made", pod.id))),
            false => Ok(()),
        };
        stopped()?;
        fail_point!("vm.cloned");
        let n = vmid.get() - self.config.vmids.0.get();
        self.configure(pod, vmid, pod_dir, n).await.map_err(named)?;
        fail_point!("vm.configured");
        stopped()?;
        let id = GuestId::vm(&self.config.node, vmid);
        self.api.guest_start(id).await.map_err(|e| named(e.into()))?;
        fail_point!("vm.started");
        self.wait_for_agent(vmid, monitor, cancel).await.map_err(named)?;
        let network = NetworkResult { ips: self.ips(n) };
        self.write_files(pod, &network, monitor).await.map_err(named)?;
        self.watch(&pod.id, vmid);
        tracing::debug!(pod = pod.id.as_str(), %vmid, "its VM runs");
        Ok(SandboxFacts { network, ..SandboxFacts::default() })
    }

    /// Makes the VM; its number.
    async fn clone_template(&self, pod: &PodRecord, journal: &mut dyn Journal) -> Result<Vmid> {
        let config = &self.config;
        let spec = plan::clone(&pod.config, &self.vms.identity(pod), &config.pool)?;
        let (api, spec, template) = (&self.api, &spec, GuestId::vm(&config.node, config.template));
        let make = |vmid: Vmid| {
            fail_point!("vm.noted_number");
            async move {
                let made = async { api.guest_clone(template, vmid, spec).await?.wait().await.map(drop) }.await;
                made.inspect_err(|e| self.vms.failed(vmid, e, true))
            }
        };
        let claimed = self.vms.claim(pod, journal, make).await?;
        claimed.map_err(|e| Error::from(e).context(format!("clone VM {} for pod {}", config.template, pod.id)))
    }

    /// Size, network and the disk with what the guest has to know; and the same for the relay.
    async fn configure(&self, pod: &PodRecord, vmid: Vmid, pod_dir: &Utf8Path, n: u32) -> Result<()> {
        let config = &self.config;
        let limits = plan::limits(&pod.config.resources, &pod.config.overhead, config);
        let change = plan::change(&pod.config, limits, config)?;
        self.api.guest_update(GuestId::vm(&config.node, vmid), &change).await.map_err(Error::from)?;
        let secret = new_secret()?;
        let text = plan::text(&secret, config.port, &config.addresses, n);
        let path = self.disk_path(vmid, CONFIG_DISK).await?;
        blocking(move || write_disk(&path, text.as_bytes())).await?;
        let ip = self.ips(n).first().copied().ok_or_else(|| Error::internal("a VM without an address"))?;
        let positions = pod_dir.join("positions");
        let told = Zeroizing::new(
            serde_json::json!({
                "address": SocketAddr::new(ip, config.port).to_string(), "secret": *secret, "log_dir": positions,
            })
            .to_string(),
        );
        let file = pod_dir.join(GUEST);
        blocking(move || {
            std::fs::create_dir_all(&positions).map_err(|e| Error::io(format!("make folder {positions}"), e))?;
            atomic::write(file.as_std_path(), told.as_bytes(), 0o600, Durability::Process)
                .map_err(|e| Error::io(format!("write {file}"), e))
        })
        .await
    }

    /// Where the node has a VM's disk.
    pub(super) async fn disk_path(&self, vmid: Vmid, key: &str) -> Result<Utf8PathBuf> {
        let node = &self.config.node;
        let config = self.api.vm_config(node, vmid).await.map_err(Error::from)?;
        let disk =
            config.volumes.get(key).ok_or_else(|| Error::precondition(format!("VM {vmid} has no disk {key}")))?;
        let storage = disk.storage().unwrap_or_default();
        let path = self.api.volume_path(node, storage, &disk.volume).await.map_err(Error::from)?;
        let end = Instant::now() + DEVICE;
        while !path.try_exists().unwrap_or(false) {
            if Instant::now() >= end || !path.is_absolute() {
                let what =
                    format!("{} is at {path}, which this node has not (handlers.proxmox-vm.storage)", disk.volume);
                return Err(Error::precondition(what));
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(path)
    }

    async fn wait_for_agent(&self, vmid: Vmid, monitor: &dyn Monitor, cancel: &CancellationToken) -> Result<()> {
        let limit = self.config.start_timeout;
        let end = Instant::now() + limit;
        loop {
            let asked = cancel.run_until_cancelled(guest::hello(monitor)).await;
            let failed = match asked {
                Some(Ok(_)) => return Ok(()),
                Some(Err(e)) => e,
                None => return Err(Error::new(Kind::Aborted, "it was stopped while its agent was waited for")),
            };
            let status = self.api.guest_status(GuestId::vm(&self.config.node, vmid)).await.map_err(Error::from)?;
            if !status.is_running() {
                return Err(Error::precondition("it has ended before its agent answered (its console says why)"));
            }
            if Instant::now() >= end {
                let what = format!(
                    "its agent has not answered within {limit:?} (handlers.proxmox-vm.start_timeout; its console says how far it came)"
                );
                return Err(Error::because(Kind::DeadlineExceeded, what, failed));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// The pod's own files, of which containers have bind mounts.
    pub(super) async fn write_files(
        &self,
        pod: &PodRecord,
        network: &NetworkResult,
        monitor: &dyn Monitor,
    ) -> Result<()> {
        let hostname = &pod.config.hostname;
        let resolv = match &pod.config.dns {
            Some(dns) if *dns != Default::default() => files::resolv_conf(dns),
            _ => blocking(|| Ok(std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default())).await?,
        };
        let hosts = files::hosts(hostname, &network.ips);
        for (name, text) in [("hostname", format!("{hostname}\n")), ("hosts", hosts), ("resolv.conf", resolv)] {
            guest::write(monitor, format!("pod/{name}"), text.into_bytes(), 0o644, guest::ROOT).await?;
        }
        Ok(())
    }

    /// Takes down what the journal notes.
    pub(super) async fn end_unit(&self, pod: &PodRecord, pod_dir: &Utf8Path) -> Result<()> {
        self.give_up(&pod.id);
        let mut first = Ok(());
        for note in pod.resources.iter().filter(|n| n.kind != VM.taken) {
            fail_point!("teardown.step");
            let removed = match note.kind.as_str() {
                kind if kind == VM.note => {
                    let vmid: Vmid = note.name.parse().map_err(|e| Error::internal(format!("pod {}: {e}", pod.id)))?;
                    let removed = self.remove(pod, vmid).await;
                    if removed.is_ok() {
                        self.vms.release(vmid);
                    }
                    removed.map_err(|e| e.context(format!("remove VM {vmid} of pod {}", pod.id)))
                }
                other => {
                    Err(Error::internal(format!("pod {} owns a {other:?}, which this version does not know", pod.id)))
                }
            };
            if let Err(e) = removed {
                tracing::error!(pod = pod.id.as_str(), kind = note.kind, error = e.chain(), "can't take it down");
                first = first.and(Err(e));
            }
        }
        // The secret is of no use any more.
        if first.is_ok() {
            let _ = std::fs::remove_file(pod_dir.join(GUEST));
        }
        first
    }

    /// Stops and deletes a VM that is this pod's, where it is.
    async fn remove(&self, pod: &PodRecord, vmid: Vmid) -> Result<()> {
        match self.find_own(pod, vmid).await? {
            Some(node) => self.delete_vm(&node, vmid).await,
            None => Ok(()),
        }
    }

    /// Stops and deletes a VM of ours, its own disks included.
    pub(super) async fn delete_vm(&self, node: &str, vmid: Vmid) -> Result<()> {
        let id = GuestId::vm(node, vmid);
        self.api.guest_stop(id).await.map_err(|e| VM.locked(vmid, e))?;
        fail_point!("vm.stopped");
        self.api.guest_delete(id, true).await.map_err(|e| VM.locked(vmid, e))
    }
}

/// 64 hexadecimal digits that nobody knows.
fn new_secret() -> Result<Zeroizing<String>> {
    let mut bytes = Zeroizing::new([0u8; 32]);
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::io("random bytes for a guest's secret", e.into()))?;
    }
    let mut text = Zeroizing::new(String::with_capacity(64));
    for byte in bytes.iter() {
        for half in [byte >> 4, byte & 15] {
            text.extend(char::from_digit(half.into(), 16));
        }
    }
    Ok(text)
}

/// Writes a disk's beginning: a file or a block device that is there.
fn write_disk(path: &Utf8Path, text: &[u8]) -> Result<()> {
    let written = (|| {
        let mut disk = std::fs::File::options().write(true).open(path)?;
        disk.write_all(text)?;
        disk.write_all(&[0; 4096])?;
        disk.sync_all()
    })();
    written.map_err(|e| Error::io(format!("write the configuration's disk {path}"), e))
}
