//! The ZFS driver of [`LayerStore`]: a dataset per layer chain, a clone per container.
//!
//! Called by the image store (layers) and the engine (root file systems). Below one dataset: `layers/<chain>`, a clone of
//! its parent's `@ready` and committed by a `@ready` of its own, and `containers/<id>`, a clone of a layer's `@ready`.
//! Everything carries the installation's tag; what does not is never touched. All that is asked for often is answered
//! from memory; what is removed goes at once and is destroyed in the background ([`reaper`]). Fails by name, with
//! Unavailable while the pool is away or suspended ([`health`]), ResourceExhausted when it is full. A crash leaves at most
//! a layer without `@ready`, which the next start destroys, or a clone that no record claims, which the engine removes.

mod check;
mod cuts;
mod diff;
mod fork;
mod health;
mod kept;
mod layers;
mod mount;
mod reaper;
mod root;
mod state;
mod streams;
mod usage;
mod views;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use camino::Utf8PathBuf;
use tokio::sync::{Notify, oneshot};

use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, Digest};
use crate::core::ports::{
    Claims, FileChange, LayerState, LayerStore, RootfsChanges, RootfsOptions, StorageReport, StorageTrouble,
    StreamFrom, Usage,
};
use crate::core::spec::UserNamespace;
use crate::fail_point;
use crate::integrations::layers::confined::{Place, Unpacker};
use crate::integrations::layers::unpack::{Limits, Whiteouts};
use crate::integrations::zfs::{Dataset, Flavor, Property, RESUME_TOKEN, Reason, Snapshot, Zfs, ZfsConfig, ZfsError};
use crate::utils::tasks::TaskSet;
use crate::utils::turns::Turns;

pub use state::OWNER;
use state::{Doomed, Known, READY, Rootfs, State};

/// Settings of the store.
#[derive(Debug, Clone)]
pub struct ZfsStoreConfig {
    /// The programs.
    pub zfs: ZfsConfig,
    /// Everything is below it. Made if only its parent is there.
    pub dataset: Dataset,
    /// Where that dataset is mounted, for whoever asks the file system how full it is. Made if absent.
    pub folder: Utf8PathBuf,
    /// This installation's id: the tag of everything that is made.
    pub owner: String,
    /// What one layer may hold.
    pub limits: Limits,
    /// Who unpacks.
    pub unpacker: Unpacker,
    /// How often the pool's health is looked at.
    pub health_interval: Duration,
}

/// Room that a fork of a full container has.
const SOME_ROOM: u64 = 1 << 20;
/// How long a layer's commit waits for zfs-fuse to be told of its closed files, and how often it looks.
const LET_GO: Duration = Duration::from_secs(5);
const LET_GO_PAUSE: Duration = Duration::from_millis(10);

struct Inner {
    config: ZfsStoreConfig,
    zfs: Zfs,
    /// Streams that were cut can be gone on with.
    resumes: bool,
    tasks: TaskSet,
    /// Held for moments only.
    state: Mutex<State>,
    /// One apply per chain.
    applying: Turns<Digest>,
    /// There is something to destroy.
    doom: Notify,
    /// Something was destroyed.
    reaped: Notify,
    trouble: Mutex<Option<StorageTrouble>>,
    /// The pool should be looked at now.
    look: Notify,
    /// A thread asks the file system how full it is.
    asking: AtomicBool,
    used: usage::Cache,
}

/// See the module's words. Clones are the same store.
#[derive(Clone)]
pub struct ZfsStore(Arc<Inner>);

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, part: &str) -> Result<Dataset> {
        Ok(self.config.dataset.child(part).map_err(ZfsError::from)?)
    }

    fn layer(&self, chain: &Digest) -> Result<Dataset> {
        self.place(&format!("layers/{}", chain.hex()))
    }

    fn container(&self, id: &ContainerId) -> Result<Dataset> {
        self.place(&format!("containers/{id}"))
    }

    fn ready(&self, chain: &Digest) -> Result<Snapshot> {
        Ok(self.layer(chain)?.snapshot(READY).map_err(ZfsError::from)?)
    }

    /// Where zfs-fuse mounts a dataset.
    fn kept(&self, dataset: &Dataset) -> Utf8PathBuf {
        self.kept_below().join(dataset.leaf())
    }

    fn kept_below(&self) -> Utf8PathBuf {
        let mut folder = self.config.folder.clone().into_string();
        folder.push_str(".mnt");
        folder.into()
    }

    /// What every dataset of ours gets: the tag, and that nobody else mounts it.
    fn properties(&self, dataset: &Dataset) -> Result<Vec<Property>> {
        let mountpoint = match self.zfs.flavor() {
            Flavor::Kernel(..) => "legacy".to_owned(),
            Flavor::Fuse => self.kept(dataset).into_string(),
        };
        let list = [(OWNER, self.config.owner.clone()), ("canmount", "noauto".into()), ("mountpoint", mountpoint)];
        let made: std::result::Result<_, _> = list.into_iter().map(|(k, v)| Property::new(k, v)).collect();
        Ok(made.map_err(ZfsError::from)?)
    }

    /// Fails while the pool can't work: at once, not after a program's deadline.
    fn usable(&self) -> Result<()> {
        match &*self.trouble.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(trouble) if trouble.blocks => Err(Error::new(Kind::Unavailable, trouble.message.clone())),
            _ => Ok(()),
        }
    }

    /// A failure that may be the pool's has its health looked at now.
    fn noted(&self, e: ZfsError) -> Error {
        if matches!(e.reason(), Reason::NoPool | Reason::Suspended | Reason::NotFound)
            || matches!(e, ZfsError::Spawn(_))
        {
            self.look.notify_one();
        }
        e.into()
    }

    async fn mount(&self, dataset: &Dataset) -> Result<OwnedFd> {
        match self.zfs.flavor() {
            Flavor::Kernel(..) => {
                let name = dataset.to_string();
                blocking(move || Ok(mount::by_kernel(&name, false)?)).await
            }
            Flavor::Fuse => Ok(mount::by_fuse(&self.zfs, dataset, &self.kept(dataset)).await?),
        }
    }

    /// Takes the mount away that zfs-fuse keeps of it, so that it can be destroyed, rolled back or is just not held. Busy
    /// while anybody uses it. OpenZFS keeps none.
    async fn let_go(&self, dataset: &Dataset) -> std::result::Result<(), ZfsError> {
        if self.zfs.flavor() != Flavor::Fuse {
            return Ok(());
        }
        let (name, at) = (dataset.clone(), self.kept(dataset));
        tokio::task::spawn_blocking(move || kept::release(&name, &at)).await.unwrap_or_else(|e| {
            let what = format!("unmount {dataset}");
            Err(ZfsError::Failed { what, reason: Reason::Other, message: e.to_string() })
        })
    }

    /// [`Self::let_go`] of what nobody uses any more, as soon as zfs-fuse has been told; later, if that takes long.
    async fn let_go_soon(&self, dataset: &Dataset) {
        let deadline = tokio::time::Instant::now() + LET_GO;
        while let Err(e) = self.let_go(dataset).await {
            if tokio::time::Instant::now() > deadline {
                tracing::debug!(%dataset, error = %e, "stays mounted for now");
                return;
            }
            tokio::time::sleep(LET_GO_PAUSE).await;
        }
    }

    /// Gives a dataset to the reaper.
    fn doom(&self, dataset: Dataset, doomed: Doomed) {
        let mut state = self.state();
        state.temporary.remove(&dataset);
        state.doomed.insert(dataset, doomed);
        drop(state);
        self.doom.notify_one();
    }

    async fn make_rootfs(&self, id: &ContainerId, top: &Digest, options: &RootfsOptions) -> Result<()> {
        self.make_clone(id, &self.ready(top)?, top, None, options).await
    }

    /// A clone of `origin`, whose files are those of the layer `top` and what was written to them.
    async fn make_clone(
        &self,
        id: &ContainerId,
        origin: &Snapshot,
        top: &Digest,
        fork_of: Option<Snapshot>,
        options: &RootfsOptions,
    ) -> Result<()> {
        let dataset = self.container(id)?;
        let user = match (options.uid_map.is_empty(), options.gid_map.is_empty()) {
            (true, true) => None,
            (false, false) => {
                self.may_idmap()?;
                Some(UserNamespace { uids: options.uid_map.clone(), gids: options.gid_map.clone() })
            }
            _ => return Err(Error::invalid("half an id map")),
        };
        let (referenced, made) = {
            let mut state = self.state();
            if let Some(missing) = options.volumes.iter().find(|c| !state.layers.contains_key(c)) {
                return Err(Error::not_found(format!("layer {missing} is not in the ZFS store")));
            }
            let volumes = state.uppermost(&options.volumes);
            let made = Rootfs { top: top.clone(), cuts: Vec::new(), fork_of, user, volumes };
            if state.making.contains_key(id) {
                let what = format!("container {}: its root file system is being made", id.short());
                return Err(Error::new(Kind::Aborted, what));
            }
            match state.rootfs.get(id) {
                Some(there) if *there == (Rootfs { cuts: there.cuts.clone(), ..made.clone() }) => return Ok(()),
                Some(_) => {
                    return Err(Error::new(
                        Kind::AlreadyExists,
                        format!("container {}: it has a root file system of other layers or ids", id.short()),
                    ));
                }
                None => {}
            }
            let layer = state.layers.get(top);
            let layer = layer.ok_or_else(|| Error::not_found(format!("layer {top} is not in the ZFS store")))?;
            let referenced = layer.referenced;
            // From here on its layers stay, whatever becomes of the image meanwhile.
            state.making.insert(id.clone(), made.clone());
            (referenced, made)
        };
        let done = self.clone_for(&dataset, origin, referenced, &made, options).await;
        let mut state = self.state();
        // Not there any more: it was removed meanwhile.
        let wanted = state.making.remove(id).is_some();
        let doomed = Doomed { fork_of: made.fork_of.clone(), ..Doomed::new(Vec::new()) };
        let done = match done {
            Ok(()) if wanted => {
                state.rootfs.insert(id.clone(), made);
                drop(state);
                fail_point!("zfs.clone.known");
                return Ok(());
            }
            Ok(()) => Err(Error::new(Kind::Aborted, format!("container {} was removed meanwhile", id.short()))),
            Err(e) if e.kind() == Kind::AlreadyExists => return Err(e),
            // One that was late may be made all the same.
            failed => failed,
        };
        state.doomed.insert(dataset, doomed);
        drop(state);
        self.doom.notify_one();
        done
    }

    async fn clone_for(
        &self,
        dataset: &Dataset,
        origin: &Snapshot,
        referenced: u64,
        made: &Rootfs,
        options: &RootfsOptions,
    ) -> Result<()> {
        let mut properties = self.properties(dataset)?;
        if options.quota > 0 {
            // A clone refers to all of its layer from the start, a fork to what its source has written as well.
            let mut limit = referenced.saturating_add(options.quota);
            if made.fork_of.is_some() {
                limit = limit.max(self.measured(origin).await?.0.saturating_add(SOME_ROOM));
            }
            properties.push(Property::new("refquota", limit.to_string()).map_err(ZfsError::from)?);
        }
        let told = [
            (state::IDMAP, made.user.as_ref().map(state::idmap_text).unwrap_or_default()),
            (state::VOLUMES, state::volumes_text(&made.volumes)),
        ];
        for (name, text) in told.into_iter().filter(|(_, text)| !text.is_empty()) {
            properties.push(Property::new(name, text).map_err(ZfsError::from)?);
        }
        fail_point!("zfs.clone.before");
        self.zfs.clone_snapshot(origin, dataset, &properties).await.map_err(|e| self.noted(e))?;
        fail_point!("zfs.clone.after");
        Ok(())
    }

    /// All that is in the pool.
    async fn read_pool(&self) -> Result<State> {
        let token = self.resumes.then_some(RESUME_TOKEN);
        let listed: Vec<&str> = state::LISTED.iter().copied().chain(token).collect();
        let all = self.zfs.get_all(&self.config.dataset, &listed).await.map_err(|e| self.noted(e))?;
        Ok(state::read(&self.config.dataset, &self.config.owner, &all))
    }

    /// Whether a layer's dataset is being unpacked or received into.
    fn at_work(&self, dataset: &Dataset) -> bool {
        let leaf = dataset.leaf();
        let Some(chain) = state::received(leaf).or_else(|| format!("sha256:{leaf}").parse().ok()) else { return false };
        self.applying.taken(&chain)
    }

    /// Reads the pool anew; what was being removed and is still there goes on being removed.
    async fn load(&self) -> Result<()> {
        loop {
            let before = self.state().known();
            let fresh = self.read_pool().await?;
            fail_point!("zfs.open.listed");
            // What an operation under way has changed meanwhile may be in the list or not. No new one begins while the pool is away.
            if self.take_over(fresh, &before) {
                self.doom.notify_one();
                return Ok(());
            }
        }
    }

    /// Makes what the pool told the state, if that is what it was `before` still.
    fn take_over(&self, mut fresh: State, before: &Known) -> bool {
        // What a task is at work on is neither a crash's leavings nor nobody's.
        fresh.doomed.retain(|dataset, _| !self.at_work(dataset));
        fresh.parts.retain(|_, part| !self.at_work(&part.dataset));
        let mut state = self.state();
        if state.known() != *before {
            return false;
        }
        fresh.parts.retain(|_, part| !state.doomed.contains_key(&part.dataset));
        for dataset in state.doomed.keys() {
            let leaf = dataset.leaf();
            if let Ok(id) = leaf.parse::<ContainerId>() {
                fresh.rootfs.remove(&id);
            }
            if let Ok(chain) = format!("sha256:{leaf}").parse::<Digest>() {
                fresh.layers.remove(&chain);
            }
        }
        fresh.doomed.append(&mut state.doomed);
        fresh.objects = std::mem::take(&mut state.objects);
        // What is being made or looked at by somebody is his.
        fresh.doomed.retain(|dataset, _| !state.temporary.contains(dataset));
        fresh.foreign.retain(|name| !state.temporary.iter().any(|d| d.as_str() == name));
        fresh.rootfs.retain(|id, _| !state.making.contains_key(id));
        fresh.making = std::mem::take(&mut state.making);
        fresh.temporary = std::mem::take(&mut state.temporary);
        *state = fresh;
        for name in state.foreign.iter().chain(&state.odd) {
            tracing::warn!(dataset = name, "not of this installation, left alone");
        }
        true
    }

    /// Snapshots of a dataset alone, oldest first, as the pool has them.
    async fn snapshots(&self, dataset: &Dataset) -> std::result::Result<Vec<String>, ZfsError> {
        let all = self.zfs.get_all(dataset, &["type", state::MADE]).await?;
        Ok(state::snapshots_of(dataset.as_str(), &all))
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    crate::core::blocking::blocking(work).await
}

impl ZfsStore {
    /// Opens the store: asks which ZFS this is, makes what is missing, removes what a former run did not finish. `tasks`
    /// owns what goes on in the background.
    pub async fn open(config: ZfsStoreConfig, tasks: TaskSet) -> Result<Arc<Self>> {
        let zfs = Zfs::probe(config.zfs.clone())
            .await
            .map_err(|e| Error::from(e).context("asking for the version of ZFS"))?;
        tracing::info!(zfs = zfs.flavor().describe(), dataset = %config.dataset, "ZFS store");
        let resumes = match zfs.resumes(config.dataset.pool()).await {
            Ok(resumes) => resumes,
            // What is wrong with the pool is told by name when it is used.
            Err(e) => {
                tracing::info!(error = %e, "streams that are cut begin anew");
                false
            }
        };
        let store = Arc::new(Inner {
            config,
            zfs,
            resumes,
            tasks: tasks.clone(),
            state: Mutex::default(),
            applying: Turns::default(),
            doom: Notify::new(),
            reaped: Notify::new(),
            trouble: Mutex::default(),
            look: Notify::new(),
            asking: AtomicBool::new(false),
            used: usage::Cache::default(),
        });
        store.prepare().await.map_err(|e| e.context(format!("ZFS store {}", store.config.dataset)))?;
        store.load().await?;
        store.drop_idle_forks().await;
        tasks.spawn_cancellable("destroy datasets", reaper::run(store.clone()));
        tasks.spawn_cancellable("watch the pool", health::run(store.clone()));
        Ok(Arc::new(Self(store)))
    }

    /// Runs `work` to its end even when the caller goes away: half a clone would be known to nobody.
    async fn to_its_end<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (told, answer) = oneshot::channel();
        self.0.tasks.spawn(what, async move {
            let _ = told.send(work.await);
        });
        answer.await.unwrap_or_else(|_| Err(Error::internal(format!("{what}: ended without a result"))))
    }
}

#[async_trait]
impl LayerStore for ZfsStore {
    fn driver(&self) -> &'static str {
        "zfs"
    }

    fn weakness(&self) -> Option<StorageTrouble> {
        self.0.config.unpacker.weakness()
    }

    async fn has(&self, chain: &Digest) -> Result<bool> {
        Ok(self.0.state().layers.contains_key(chain))
    }

    fn layer_usage(&self, chain: &Digest) -> Option<Usage> {
        self.0.state().layers.get(chain).map(|l| l.usage)
    }

    async fn apply(
        &self,
        parent: Option<&Digest>,
        chain: &Digest,
        tar: Box<dyn std::io::Read + Send>,
        verify: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<Usage> {
        self.0.usable()?;
        let turn = self.0.applying.take(chain).await;
        let (store, parent, chain) = (self.0.clone(), parent.cloned(), chain.clone());
        self.to_its_end("unpack a layer", async move {
            let _turn = turn;
            store.apply(parent.as_ref(), &chain, tar, verify).await.map_err(|e| e.context(format!("layer {chain}")))
        })
        .await
    }

    async fn retain_layers(&self, keep: &[Digest]) -> Result<u64> {
        let mut freed = 0u64;
        {
            let mut state = self.0.state();
            for chain in state.unwanted(keep) {
                let dataset = self.0.layer(&chain)?;
                let Some(layer) = state.layers.remove(&chain) else { continue };
                freed = freed.saturating_add(layer.usage.bytes);
                let doomed = Doomed { layer: Some((chain, layer)), ..Doomed::new(vec![READY.into()]) };
                state.doomed.insert(dataset, doomed);
            }
            let parts = std::mem::take(&mut state.parts);
            for (chain, part) in parts {
                match keep.contains(&chain) {
                    true => drop(state.parts.insert(chain, part)),
                    false => drop(state.doomed.insert(part.dataset, Doomed::new(Vec::new()))),
                }
            }
        }
        self.0.doom.notify_one();
        Ok(freed)
    }

    async fn settled(&self, longest: Duration) -> bool {
        tokio::time::timeout(longest, reaper::settled(&self.0)).await.is_ok()
    }

    async fn create_rootfs(&self, container: &ContainerId, chains: &[Digest], options: &RootfsOptions) -> Result<()> {
        self.0.usable()?;
        let Some(top) = chains.last().cloned() else {
            return Err(Error::invalid(format!("container {}: a root file system of no layer", container.short())));
        };
        let (store, container, options) = (self.0.clone(), container.clone(), options.clone());
        self.to_its_end("clone a root file system", async move {
            let made = store.make_rootfs(&container, &top, &options).await;
            made.map_err(|e| e.context(format!("root file system of container {}", container.short())))
        })
        .await
    }

    async fn mount_rootfs(&self, container: &ContainerId) -> Result<OwnedFd> {
        self.0.usable()?;
        let rootfs = self.0.state().rootfs.get(container).map(|r| r.user.clone());
        let user = rootfs
            .ok_or_else(|| Error::not_found(format!("container {} has no root file system", container.short())))?;
        let fd = self.0.mount_for(container, user).await;
        let fd = fd.map_err(|e| e.context(format!("container {}", container.short())))?;
        fail_point!("zfs.clone.mounted");
        if self.0.zfs.flavor() == Flavor::Fuse {
            let objects = mount::objects(std::os::fd::AsFd::as_fd(&fd)).map_err(|e| Error::io("statvfs", e))?;
            self.0.state().objects.entry(container.clone()).or_insert(objects);
        }
        Ok(fd)
    }

    async fn mount_volume(&self, chains: &[Digest], user: Option<&UserNamespace>) -> Result<OwnedFd> {
        self.0.usable()?;
        self.0.volume(chains, user.cloned()).await.map_err(|e| e.context("an image as a volume"))
    }

    async fn try_idmap(&self) -> Result<()> {
        self.0.try_idmap().await
    }

    async fn rootfs_changes(&self, container: &ContainerId) -> Result<RootfsChanges> {
        self.0.usable()?;
        let (store, container) = (self.0.clone(), container.clone());
        self.to_its_end("compare a container with its image", async move { store.changes(&container).await }).await
    }

    async fn remove_rootfs(&self, container: &ContainerId) -> Result<()> {
        let dataset = self.0.container(container)?;
        {
            let mut state = self.0.state();
            state.objects.remove(container);
            // One that is being made goes as soon as it is.
            state.making.remove(container);
            let Some(rootfs) = state.rootfs.remove(container) else { return Ok(()) };
            state.doomed.insert(dataset, Doomed { fork_of: rootfs.fork_of, ..Doomed::new(rootfs.cuts) });
        }
        fail_point!("zfs.destroy.queued");
        self.0.used.forget(container);
        self.0.doom.notify_one();
        Ok(())
    }

    async fn list_rootfs(&self) -> Result<Vec<ContainerId>> {
        Ok(self.0.state().rootfs.keys().cloned().collect())
    }

    async fn rootfs_usage(&self, container: &ContainerId) -> Result<Usage> {
        if !self.0.state().rootfs.contains_key(container) {
            return Err(Error::not_found(format!("container {} has no root file system", container.short())));
        }
        usage::of(&self.0, container).await
    }

    async fn write_rootfs(&self, container: &ContainerId, layer: std::fs::File) -> Result<()> {
        // A mount of its own: the unpacker closes it to devices.
        let mount = self.mount_rootfs(container).await?;
        let (unpacker, limits) = (self.0.config.unpacker.clone(), self.0.config.limits);
        blocking(move || {
            let source = std::io::BufReader::with_capacity(256 << 10, layer);
            unpacker.unpack(Place::Mount(&mount), source, Whiteouts::Apply, &limits).map(drop)
        })
        .await
        .map_err(|e| e.context(format!("files of container {}", container.short())))
    }

    fn mountpoint(&self) -> Utf8PathBuf {
        self.0.config.folder.clone()
    }

    async fn snapshot_rootfs(&self, containers: &[ContainerId], name: &str) -> Result<()> {
        self.0.usable()?;
        let (store, containers, name) = (self.0.clone(), containers.to_vec(), name.to_owned());
        self.to_its_end("snapshot root file systems", async move { store.snapshot(&containers, &name).await }).await
    }

    async fn rollback_rootfs(&self, containers: &[ContainerId], name: &str) -> Result<()> {
        self.0.usable()?;
        let (store, containers, name) = (self.0.clone(), containers.to_vec(), name.to_owned());
        self.to_its_end("roll root file systems back", async move { store.rollback(&containers, &name).await }).await
    }

    async fn rootfs_snapshots(&self, container: &ContainerId) -> Result<Vec<String>> {
        self.0.cuts(container)
    }

    async fn diff_rootfs(&self, container: &ContainerId, from: Option<&str>) -> Result<Vec<FileChange>> {
        self.0.usable()?;
        let (store, container, from) = (self.0.clone(), container.clone(), from.map(str::to_owned));
        self.to_its_end("compare root file systems", async move { store.diff(&container, from.as_deref()).await }).await
    }

    async fn fork_point(&self, containers: &[ContainerId], name: Option<&str>) -> Result<String> {
        self.0.usable()?;
        let (store, containers, name) = (self.0.clone(), containers.to_vec(), name.map(str::to_owned));
        self.to_its_end("snapshot for a fork", async move { store.fork_point(&containers, name.as_deref()).await })
            .await
    }

    async fn fork_rootfs(
        &self,
        of: &ContainerId,
        point: &str,
        container: &ContainerId,
        options: &RootfsOptions,
    ) -> Result<()> {
        self.0.usable()?;
        let (store, of, point) = (self.0.clone(), of.clone(), point.to_owned());
        let (container, options) = (container.clone(), options.clone());
        self.to_its_end("fork a root file system", async move {
            let made = store.fork(&of, &point, &container, &options).await;
            made.map_err(|e| e.context(format!("fork of container {}", of.short())))
        })
        .await
    }

    async fn drop_fork_point(&self, containers: &[ContainerId], point: &str) -> Result<()> {
        let (store, containers, point) = (self.0.clone(), containers.to_vec(), point.to_owned());
        self.to_its_end("give a fork's snapshot back", async move { store.drop_fork_point(&containers, &point).await })
            .await
    }

    fn layer_states(&self) -> Result<Vec<LayerState>> {
        Ok(self.0.layer_states())
    }

    async fn can_go_on(&self, chain: &Digest, token: &str) -> Result<()> {
        self.0.usable()?;
        self.0.can_go_on(chain, token).await
    }

    async fn send_layer(&self, chain: &Digest, from: &StreamFrom, out: OwnedFd) -> Result<()> {
        self.0.usable()?;
        self.0.send_layer(chain, from, out).await
    }

    async fn receive_layer(
        &self,
        chain: &Digest,
        usage: Usage,
        token: Option<&str>,
        input: OwnedFd,
        verify: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<()> {
        self.0.usable()?;
        let turn = self.0.applying.take(chain).await;
        let (store, chain, token) = (self.0.clone(), chain.clone(), token.map(str::to_owned));
        self.to_its_end("receive a layer", async move {
            let _turn = turn;
            store.receive_layer(&chain, usage, token.as_deref(), input, verify).await
        })
        .await
    }

    fn trouble(&self) -> Option<StorageTrouble> {
        self.0.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn check(&self, claims: &(dyn Fn() -> Claims + Send + Sync)) -> Result<StorageReport> {
        check::check(&self.0, claims).await
    }
}

/// A path to the folder behind a descriptor, which need not be mounted anywhere.
fn path_of(fd: &OwnedFd) -> std::path::PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}
