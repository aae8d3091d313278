//! `storage migrate`: moves images and ended containers' root file systems from the overlay store to the ZFS pool that the
//! configuration names, while no daemon runs.
//!
//! Every layer goes through the same tar as a pulled one and is committed as such; then each image's whole tree is compared
//! on both sides, contents included. What is there already is compared and not copied: after an interruption at any point it
//! is called again. The overlay store stays as it is. Fails by name while a daemon or a container runs; a tree that differs
//! takes the layers with it that this run made and no compared image has, and nothing that was in the pool before.

use std::collections::{BTreeSet, HashSet};
use std::io::BufWriter;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Arg, ArgMatches};

use super::{StateLock, images_config, storage};
use crate::cli::output::say;
use crate::cli::{self, Command, Context};
use crate::core::blocking::blocking;
use crate::core::config::{Config, LayerDriver};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, Digest};
use crate::core::ports::{ImageStore, LayerStore, RootfsChanges, RootfsOptions};
use crate::core::records::RecordStore;
use crate::integrations::images::LocalImageStore;
use crate::integrations::layers::confined::{Place, Unpacker};
use crate::integrations::layers::unpack::{Limits, Whiteouts};
use crate::integrations::layers::{compare, export};
use crate::integrations::overlay::{OverlayOptions, OverlayStore};
use crate::utils::pidfd::{self, ProcessId};
use crate::utils::tasks::TaskSet;

/// How long what was removed may take to be destroyed.
const SETTLED: Duration = Duration::from_secs(120);

/// `storage` with the verbs that need no daemon.
pub struct Storage;

#[async_trait::async_trait]
impl Command for Storage {
    fn name(&self) -> &'static str {
        "storage"
    }
    fn about(&self) -> &'static str {
        "Compare what is stored with what is known (check), or move all from overlay to ZFS while no daemon runs (migrate)"
    }
    fn arguments(&self) -> Vec<Arg> {
        let verb = Arg::new("VERB").required(true).value_parser(["check", "migrate"]).help("check or migrate");
        // All but the verb are of `check`.
        let more = cli::Storage.arguments().into_iter().filter(|a| a.get_id() != "VERB");
        [verb].into_iter().chain(more).collect()
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> anyhow::Result<u8> {
        if matches.get_one::<String>("VERB").is_some_and(|v| v == "check") {
            return cli::Storage.run(context, matches).await;
        }
        anyhow::ensure!(!matches.get_flag("repair"), "storage migrate: --repair is of `check`");
        migrate(&context.config).await.map_err(|e| anyhow::anyhow!(e.chain()))
    }
}

async fn migrate(config: &Config) -> Result<u8> {
    if config.images.driver != LayerDriver::Zfs {
        return Err(Error::precondition("images.driver is \"overlay\": the configuration has to name the pool first"));
    }
    let (root, state) = (&config.server.root, &config.server.state);
    let from = root.join("overlay");
    if !from.join("layers").is_dir() {
        say!("nothing to move: {from} is not there").map_err(untold)?;
        return Ok(0);
    }
    std::fs::create_dir_all(state).map_err(|e| Error::io(format!("make folder {state}"), e))?;
    let _lock = StateLock::take(root, state)?;
    let claimed = ended(config)?;
    let tasks = TaskSet::new("migrate");
    let unpacker = storage::unpacker(config, &tasks).await?;
    let to = storage::open(config, unpacker.clone(), &tasks).await?;
    let overlay = OverlayStore::open(from.clone(), OverlayOptions::default(), tasks.clone())?;
    let images =
        LocalImageStore::open(images_config(config, unpacker.clone())?, overlay.clone(), tasks.clone()).await?;
    let mover = Mover { overlay, to, unpacker };
    let done = mover.all(&*images, &claimed).await;
    // What was removed is destroyed in the background, which ends here.
    if !mover.to.settled(SETTLED).await {
        say!("not all that was removed is destroyed yet: the daemon's next start goes on with it").map_err(untold)?;
    }
    tasks.shutdown().await;
    let behind = done?;
    match behind {
        0 => say!("all is in {}; {from} is not used any more", config.images.zfs.dataset).map_err(untold)?,
        n => say!("containers left behind: {n}; remove them, or go back to the overlay driver for them")
            .map_err(untold)?,
    }
    Ok(u8::from(behind > 0))
}

/// Standard output can't be written. What was moved is moved: called again, it goes on.
fn untold(error: anyhow::Error) -> Error {
    Error::new(Kind::Internal, format!("{error:#}"))
}

/// All containers that there are; none of them may run.
fn ended(config: &Config) -> Result<BTreeSet<ContainerId>> {
    let boot_id = pidfd::boot_id().map_err(|e| Error::io("read the boot id", e))?;
    let mut all = BTreeSet::new();
    let store = RecordStore::open(&config.server.root)?;
    let (pods, unreadable) = store.load()?;
    if !unreadable.is_empty() || store.has_quarantined_pods() {
        return Err(Error::precondition("a pod's record can't be read: it is not known what its containers need"));
    }
    for (_, containers) in pods {
        for c in containers {
            let process = ProcessId { pid: c.pid, start_time: c.pid_start_time, boot_id: boot_id.clone() };
            if c.pid > 0 && process.open().map_err(|e| Error::io("look for a container's process", e))?.is_some() {
                return Err(Error::precondition(format!(
                    "container {} ({:?}) runs: stop it first",
                    c.id, c.config.name
                )));
            }
            all.insert(c.id);
        }
    }
    Ok(all)
}

struct Mover {
    overlay: Arc<OverlayStore>,
    to: Arc<dyn LayerStore>,
    unpacker: Unpacker,
}

impl Mover {
    /// How many containers could not be moved.
    async fn all(&self, images: &dyn ImageStore, claimed: &BTreeSet<ContainerId>) -> Result<usize> {
        let mut compared: HashSet<Digest> = HashSet::new();
        let mut made: Vec<Digest> = Vec::new();
        for image in images.list() {
            let name = image.repo_tags.first().or(image.repo_digests.first()).cloned();
            let name = name.unwrap_or_else(|| image.id.to_string());
            let moved = self.layers(&image.chains, &mut made).await.map_err(|e| e.context(format!("image {name}")))?;
            if let Err(e) = self.same_image(&image.chains).await {
                self.take_back(&made, &compared).await?;
                return Err(e.context(format!("image {name}")));
            }
            compared.extend(image.chains.iter().cloned());
            say!("{name}: {moved} of {} layers moved, the same on both sides", image.chains.len()).map_err(untold)?;
        }
        let mut behind = 0;
        for id in self.overlay.list_rootfs().await? {
            if !claimed.contains(&id) {
                continue;
            }
            match self.container(&id, &mut made).await {
                Ok(()) => say!("container {}: moved, the same on both sides", id.short()).map_err(untold)?,
                Err(e) => {
                    behind += 1;
                    // What has come of it is not what it is here, and would be served.
                    self.to.remove_rootfs(&id).await?;
                    say!("container {}: stays behind: {}", id.short(), e.chain()).map_err(untold)?;
                }
            }
        }
        Ok(behind)
    }

    /// What this run made goes, unless it was compared; what was in the pool before may be of an image that is nowhere else.
    async fn take_back(&self, made: &[Digest], compared: &HashSet<Digest>) -> Result<()> {
        let there = self.to.layer_states()?.into_iter().map(|l| l.chain);
        let keep: Vec<Digest> = there.filter(|c| compared.contains(c) || !made.contains(c)).collect();
        self.to.retain_layers(&keep).await.map(drop)
    }

    /// How many were not there yet.
    async fn layers(&self, chains: &[Digest], made: &mut Vec<Digest>) -> Result<usize> {
        let mut moved = 0;
        for (n, chain) in chains.iter().enumerate() {
            if self.to.has(chain).await? {
                continue;
            }
            let (reader, verify) = piped(self.overlay.layer_changes(chain).await?)?;
            let parent = n.checked_sub(1).map(|n| &chains[n]);
            self.to.apply(parent, chain, Box::new(reader), verify).await?;
            made.push(chain.clone());
            moved += 1;
        }
        Ok(moved)
    }

    /// Compares what a container of the image would see. The root file systems are nobody's: the daemon's next start
    /// would remove them.
    async fn same_image(&self, chains: &[Digest]) -> Result<()> {
        let (id, options) = (ContainerId::new(), RootfsOptions::default());
        self.overlay.create_rootfs(&id, chains, &options).await?;
        self.to.create_rootfs(&id, chains, &options).await?;
        let same = self.same(&id).await;
        self.overlay.remove_rootfs(&id).await?;
        self.to.remove_rootfs(&id).await?;
        same
    }

    async fn same(&self, id: &ContainerId) -> Result<()> {
        let (one, other) = (self.overlay.mount_rootfs(id).await?, self.to.mount_rootfs(id).await?);
        blocking(move || {
            let found = compare::difference(&path_of(&one), &path_of(&other));
            match found.map_err(|e| Error::io("comparing both sides", e))? {
                None => Ok(()),
                Some((path, what)) => Err(Error::internal(format!("/{}: its {what} differs", path.display()))),
            }
        })
        .await
    }

    /// What a container that has ended has written.
    async fn container(&self, id: &ContainerId, made: &mut Vec<Digest>) -> Result<()> {
        let (chains, options) = self.overlay.rootfs_layers(id)?;
        self.layers(&chains, made).await?;
        self.to.create_rootfs(id, &chains, &options).await?;
        let mount = self.to.mount_rootfs(id).await?;
        let mut changes = self.overlay.rootfs_changes(id).await?;
        changes.changed.insert(0, b".".to_vec());
        let (reader, verify) = piped(changes)?;
        let unpacker = self.unpacker.clone();
        blocking(move || {
            unpacker.unpack(Place::Mount(&mount), reader, Whiteouts::Apply, &Limits::default())?;
            verify()
        })
        .await?;
        self.same(id).await
    }
}

type Verify = Box<dyn FnOnce() -> Result<()> + Send>;

/// The changes as a tar that is written while it is read, and whether it was written to its end.
fn piped(changes: RootfsChanges) -> Result<(std::io::PipeReader, Verify)> {
    let (reader, writer) = std::io::pipe().map_err(|e| Error::io("a pipe", e))?;
    let (told, result) = std::sync::mpsc::sync_channel(1);
    let written = move || {
        let _ = told.send(export::write(&changes, BufWriter::with_capacity(256 << 10, writer)).map_err(Error::from));
    };
    tokio::task::spawn_blocking(written);
    let verify = move || result.recv().unwrap_or_else(|_| Err(Error::internal("the writer of a layer is gone")));
    Ok((reader, Box::new(verify)))
}

fn path_of(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}
