//! The overlay driver of [`LayerStore`]: a folder per unpacked layer, an overlay mount per container.
//!
//! Called by the image store (layers) and the engine (root file systems). On disk, below one root:
//! `layers/<chain>/{fs,layer.json}` (there is only what was committed), `containers/<id>/{fs,work,rootfs.json}`, `tmp/`
//! (what is being made), `trash/` (what is being removed), `quarantine/` (what could not be read), `empty/` (a layer
//! without anything: overlayfs wants two where nothing is written). Fails by name when a
//! layer or container is not there, with ResourceExhausted on a full disk. A crash leaves entries in `tmp/` and `trash/`,
//! which the next start removes; a layer counts only after it was synced and renamed into place.

mod adopt;
mod changes;
mod check;
mod mount;
mod state;
mod usage;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};

use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, Digest};
use crate::core::ports::{Claims, LayerStore, RootfsChanges, RootfsOptions, StorageReport, StorageTrouble, Usage};
use crate::core::spec::{IdMapping, UserNamespace};
use crate::fail_point;
use crate::integrations::layers::confined::{Place, Unpacker};
use crate::integrations::layers::unpack::{Limits, Whiteouts};
use crate::utils::beneath;
use crate::utils::tasks::TaskSet;

use state::{LayerMeta, RootfsMeta};

/// How long a container's measured usage is good.
const USAGE_TTL: Duration = Duration::from_secs(10);
/// Most layers that overlayfs stacks.
const MAX_LAYERS: usize = 500;

/// How the store works; the default fits.
#[derive(Debug, Clone, Default)]
pub struct OverlayOptions {
    /// What one layer may hold.
    pub limits: Limits,
    /// Mount the old way, as on kernels before 6.8, even if this one can do better.
    pub legacy_mount: bool,
    /// Who unpacks.
    pub unpacker: Unpacker,
}

struct Inner {
    root: Utf8PathBuf,
    options: OverlayOptions,
    tasks: TaskSet,
    /// Held for moments only, never across disk work.
    state: Mutex<State>,
    /// Held by blocking work that changes which layers and root file systems there are.
    changing: Mutex<()>,
    /// One apply per chain.
    applying: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
    usage: Mutex<HashMap<ContainerId, MeasuredUsage>>,
    /// One layer is summed up at a time.
    summing: tokio::sync::Mutex<()>,
    boot_id: String,
    /// Held as long as the store is: two daemons on one folder would remove each other's layers.
    _lock: std::fs::File,
}

type MeasuredUsage = Arc<tokio::sync::Mutex<Option<(Instant, Usage)>>>;

#[derive(Default)]
struct State {
    layers: HashMap<Digest, LayerMeta>,
    /// None: there, but its metadata can't be read.
    rootfs: HashMap<ContainerId, Option<RootfsMeta>>,
}

impl Inner {
    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A name that nothing in `folder` has.
    fn unique(&self, folder: &str, what: &str) -> Utf8PathBuf {
        self.root.join(folder).join(format!("{what}-{}", uuid::Uuid::new_v4().simple()))
    }

    fn layer_folder(&self, chain: &Digest) -> Utf8PathBuf {
        self.root.join("layers").join(chain.hex())
    }

    fn layer_fs(&self, chain: &Digest) -> Utf8PathBuf {
        self.layer_folder(chain).join("fs")
    }

    fn container(&self, id: &ContainerId) -> Utf8PathBuf {
        self.root.join("containers").join(id.as_str())
    }

    /// Takes `path` away at once and removes it in the background.
    fn discard(&self, path: &Utf8Path) -> Result<()> {
        if let Some(trash) = self.to_trash(path)? {
            self.remove_later(trash);
        }
        Ok(())
    }

    /// Takes `path` away; where it is now. None: it was not there.
    fn to_trash(&self, path: &Utf8Path) -> Result<Option<Utf8PathBuf>> {
        let name = path.file_name().unwrap_or("x");
        let trash = self.unique("trash", name);
        match std::fs::rename(path, &trash) {
            Ok(()) => Ok(Some(trash)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format!("moving {path} to the trash"), e)),
        }
    }

    fn remove_later(&self, path: Utf8PathBuf) {
        self.tasks.spawn(format!("remove {path}"), async move {
            let _ = tokio::task::spawn_blocking(move || remove_now(&path)).await;
        });
    }

    /// `chain` and its parents, top first; None if one is missing.
    fn ancestry(&self, chain: &Digest) -> Option<Vec<Digest>> {
        let state = self.state();
        let mut list = Vec::new();
        let mut next = Some(chain.clone());
        while let Some(chain) = next {
            next = state.layers.get(&chain)?.parent.clone();
            list.push(chain);
            if list.len() > MAX_LAYERS {
                return None;
            }
        }
        Some(list)
    }

    /// Layers that neither `keep` nor a container needs, themselves or as parents.
    fn unwanted(&self, keep: Vec<Digest>) -> Result<BTreeSet<Digest>> {
        let state = self.state();
        if state.rootfs.values().any(Option::is_none) {
            return Err(Error::precondition(
                "overlay store: the layers of a container can't be told, so none is removed",
            ));
        }
        let mut wanted: HashSet<Digest> = keep.into_iter().collect();
        let used = state.rootfs.values().flatten().flat_map(|meta| meta.chains.iter().chain(&meta.volumes));
        wanted.extend(used.cloned());
        let mut pending: Vec<Digest> = wanted.iter().cloned().collect();
        while let Some(chain) = pending.pop() {
            if let Some(parent) = state.layers.get(&chain).and_then(|meta| meta.parent.clone())
                && wanted.insert(parent.clone())
            {
                pending.push(parent);
            }
        }
        Ok(state.layers.keys().filter(|chain| !wanted.contains(chain)).cloned().collect())
    }

    /// The blocking part of [`LayerStore::create_rootfs`].
    fn make_rootfs(&self, container: ContainerId, meta: RootfsMeta) -> Result<()> {
        let _alone = self.change();
        {
            let state = self.state();
            match state.rootfs.get(&container) {
                Some(Some(there)) if *there == meta => return Ok(()),
                Some(_) => {
                    return Err(Error::new(
                        Kind::AlreadyExists,
                        format!("container {}: it has a root file system of other layers or ids", container.short()),
                    ));
                }
                None => {}
            }
            if let Some(missing) = meta.chains.iter().chain(&meta.volumes).find(|c| !state.layers.contains_key(c)) {
                return Err(Error::not_found(format!("layer {missing} is not in the overlay store")));
            }
        }
        let folder = self.unique("tmp", container.as_str());
        let lower = meta.chains.last().map(|top| self.layer_fs(top)).unwrap_or_default();
        let made = state::make_rootfs(&folder, &lower, &meta).and_then(|()| {
            fail_point!("overlay.rootfs.made");
            state::rename(&folder, &self.container(&container))
        });
        fail_point!("overlay.rootfs.renamed");
        if let Err(e) = made {
            // If that fails too, the next start removes it.
            let _ = beneath::remove_tree(folder.as_std_path());
            return Err(e.context(format!("root file system of container {}", container.short())));
        }
        self.state().rootfs.insert(container, Some(meta));
        Ok(())
    }

    /// An overlay with an idmapped layer, made in `folder` and let go at once.
    fn try_idmap(&self, folder: &Utf8Path) -> Result<()> {
        let [lower, upper, work, scratch] = ["lower", "fs", "work", "scratch"].map(|name| folder.join(name));
        for path in [folder, &lower, &upper, &work, &scratch] {
            state::make_folder(path, 0o700)?;
        }
        let one = || vec![IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
        let user = Some(UserNamespace { uids: one(), gids: one() });
        let legacy = self.options.legacy_mount;
        let writable = Some(mount::Writable { upper, work });
        mount::mount(&mount::Request { lowers: vec![lower], writable, scratch, legacy, user })?;
        Ok(())
    }

    /// The blocking part of [`LayerStore::apply`].
    fn unpack_and_commit(
        &self,
        parent: Option<&Digest>,
        chain: &Digest,
        tar: Box<dyn Read + Send>,
        verify: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<Usage> {
        let folder = self.unique("tmp", chain.hex());
        let done = self.unpack_into(&folder, parent, chain, tar, verify);
        if done.is_err()
            && let Err(error) = beneath::remove_tree(folder.as_std_path())
        {
            tracing::warn!(%folder, %error, "a discarded layer can't be removed");
        }
        done
    }

    fn unpack_into(
        &self,
        folder: &Utf8Path,
        parent: Option<&Digest>,
        chain: &Digest,
        tar: Box<dyn Read + Send>,
        verify: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<Usage> {
        let fs = folder.join("fs");
        state::make_folder(folder, 0o700)?;
        state::make_folder(&fs, 0o755)?;
        fail_point!("overlay.layer.folder");
        let place = Place::Folder(fs.as_std_path());
        let unpacked = self.options.unpacker.unpack(place, tar, Whiteouts::Overlay, &self.options.limits);
        let unpacked = unpacked.map_err(|e| e.context(format!("layer {chain}")))?;
        fail_point!("overlay.layer.unpacked");
        verify()?;
        fail_point!("overlay.layer.verified");
        if let Some(parent) = parent {
            let parents = self.ancestry(parent).ok_or_else(|| {
                Error::precondition(format!("layer {chain}: its parent {parent} is not in the overlay store"))
            })?;
            let parents: Vec<_> = parents.iter().map(|p| self.layer_fs(p)).collect();
            adopt::attributes(&fs, &unpacked, &parents).map_err(|e| {
                Error::io(format!("layer {chain}: taking over the attributes of its parent's folders"), e)
            })?;
        }
        let meta = LayerMeta { parent: parent.cloned(), usage: unpacked.usage };
        state::commit_layer(&self.root, folder, chain, &meta)?;
        let usage = meta.usage;
        self.state().layers.insert(chain.clone(), meta);
        Ok(usage)
    }
}

/// Removes what was discarded; the next start tries again where that fails.
fn remove_now(path: &Utf8Path) {
    if let Err(error) = beneath::remove_tree(path.as_std_path()) {
        tracing::warn!(%path, %error, "what was discarded can't be removed");
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::because(Kind::Internal, "overlay store work ended", e))?
}

/// See the module's words. Clones are the same store.
#[derive(Clone)]
pub struct OverlayStore(Arc<Inner>);

impl OverlayStore {
    /// Opens the store in `root`, made if missing, and removes what a former run did not finish. `tasks` owns the
    /// removals that go on in the background. Blocks on the disk; needs a tokio runtime.
    pub fn open(root: Utf8PathBuf, options: OverlayOptions, tasks: TaskSet) -> Result<Arc<Self>> {
        if root.as_str().contains([':', ',', '\\']) || !root.is_absolute() {
            return Err(Error::invalid(format!(
                "overlay store {root}: its path has to be absolute, without ':', ',' and '\\'"
            )));
        }
        let lock = state::prepare(&root)?;
        let state =
            State { layers: state::load_layers(&root)?, rootfs: state::load_rootfs(&root)?.into_iter().collect() };
        let store = Arc::new(Inner {
            boot_id: state::boot_id()?,
            root,
            options,
            tasks,
            state: Mutex::new(state),
            changing: Mutex::default(),
            applying: Mutex::default(),
            usage: Mutex::default(),
            summing: tokio::sync::Mutex::default(),
            _lock: lock,
        });
        for folder in ["tmp", "trash"] {
            for entry in state::names(&store.root.join(folder))? {
                store.remove_later(store.root.join(folder).join(entry));
            }
        }
        Ok(Arc::new(Self(store)))
    }

    /// All that a committed layer has, its root folder's attributes included (".").
    pub async fn layer_changes(&self, chain: &Digest) -> Result<RootfsChanges> {
        if !self.0.state().layers.contains_key(chain) {
            return Err(Error::not_found(format!("layer {chain} is not in the overlay store")));
        }
        let folder = self.0.layer_fs(chain);
        let mut changes = blocking(move || changes::list(&folder)).await?;
        changes.changed.insert(0, b".".to_vec());
        Ok(changes)
    }

    /// How a container's root file system was asked for: its layers, base first, and the rest.
    pub fn rootfs_layers(&self, container: &ContainerId) -> Result<(Vec<Digest>, RootfsOptions)> {
        let state = self.0.state();
        let meta = match state.rootfs.get(container) {
            Some(Some(meta)) => meta,
            Some(None) => return Err(Error::precondition("its root file system's record can't be read")),
            None => return Err(Error::not_found(format!("container {} has no root file system", container.short()))),
        };
        let user = meta.user.clone().unwrap_or_default();
        let volumes = meta.volumes.clone();
        Ok((meta.chains.clone(), RootfsOptions { uid_map: user.uids, gid_map: user.gids, volumes, quota: 0 }))
    }
}

#[async_trait]
impl LayerStore for OverlayStore {
    fn driver(&self) -> &'static str {
        "overlay"
    }

    fn weakness(&self) -> Option<StorageTrouble> {
        self.0.options.unpacker.weakness()
    }

    async fn has(&self, chain: &Digest) -> Result<bool> {
        Ok(self.0.state().layers.contains_key(chain))
    }

    fn parallel_unpack(&self) -> bool {
        true
    }

    fn layer_usage(&self, chain: &Digest) -> Option<Usage> {
        self.0.state().layers.get(chain).map(|meta| meta.usage)
    }

    async fn apply(
        &self,
        parent: Option<&Digest>,
        chain: &Digest,
        tar: Box<dyn Read + Send>,
        verify: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<Usage> {
        let turn = {
            let mut applying = self.0.applying.lock().unwrap_or_else(PoisonError::into_inner);
            applying.retain(|_, turn| Arc::strong_count(turn) > 1);
            applying.entry(chain.clone()).or_default().clone()
        };
        let turn = turn.lock_owned().await;
        if let Some(usage) = self.layer_usage(chain) {
            return Ok(usage);
        }
        let (store, parent, chain) = (self.0.clone(), parent.cloned(), chain.clone());
        blocking(move || {
            // The turn ends with the work, even if the caller has gone.
            let _turn = turn;
            let usage = store.unpack_and_commit(parent.as_ref(), &chain, tar, verify)?;
            check::sum_later(&store, &chain);
            Ok(usage)
        })
        .await
    }

    async fn retain_layers(&self, keep: &[Digest]) -> Result<u64> {
        let (store, keep) = (self.0.clone(), keep.to_vec());
        blocking(move || {
            let (mut freed, mut trash) = (0, Vec::new());
            let result = {
                let _alone = store.change();
                store.unwanted(keep)?.into_iter().try_for_each(|chain| {
                    trash.extend(store.to_trash(&store.root.join("layers").join(chain.hex()))?);
                    freed += store.state().layers.remove(&chain).map_or(0, |meta| meta.usage.bytes);
                    Ok(())
                })
            };
            // Here and now, but without the lock: a kubelet that removes images because the disk is full looks at once
            // whether that was enough, and ends pods if it was not.
            trash.iter().for_each(|path| remove_now(path));
            result.map(|()| freed)
        })
        .await
    }

    async fn create_rootfs(&self, container: &ContainerId, chains: &[Digest], options: &RootfsOptions) -> Result<()> {
        if options.quota > 0 {
            return Err(Error::new(
                Kind::Unimplemented,
                format!("container {}: the overlay driver has no quota for root file systems", container.short()),
            ));
        }
        let user = match (options.uid_map.is_empty(), options.gid_map.is_empty()) {
            (true, true) => None,
            (false, false) => Some(UserNamespace { uids: options.uid_map.clone(), gids: options.gid_map.clone() }),
            _ => return Err(Error::invalid(format!("container {}: half an id map", container.short()))),
        };
        if chains.is_empty() || chains.len() > MAX_LAYERS {
            return Err(Error::invalid(format!(
                "container {}: a root file system is made of 1 to {MAX_LAYERS} layers, not {}",
                container.short(),
                chains.len()
            )));
        }
        let (volumes, boot_id) = (options.volumes.clone(), self.0.boot_id.clone());
        let meta = RootfsMeta { chains: chains.to_vec(), volumes, boot_id, user };
        let (store, container) = (self.0.clone(), container.clone());
        blocking(move || store.make_rootfs(container, meta)).await
    }

    async fn mount_rootfs(&self, container: &ContainerId) -> Result<OwnedFd> {
        let meta = match self.0.state().rootfs.get(container) {
            Some(Some(meta)) => meta.clone(),
            Some(None) => {
                return Err(Error::precondition(format!("container {}: rootfs.json can't be read", container.short())));
            }
            None => return Err(Error::not_found(format!("container {} has no root file system", container.short()))),
        };
        if meta.boot_id != self.0.boot_id {
            // It was mounted volatile: what the last boot wrote may be there in part.
            return Err(Error::precondition(format!(
                "container {}: its root file system was written before the last boot and may be incomplete",
                container.short()
            )));
        }
        let (store, container) = (self.0.clone(), container.clone());
        blocking(move || {
            let folder = store.container(&container);
            let request = mount::Request {
                lowers: meta.chains.iter().rev().map(|chain| store.layer_fs(chain)).collect(),
                writable: Some(mount::Writable { upper: folder.join("fs"), work: folder.join("work") }),
                scratch: store.root.join("tmp"),
                legacy: store.options.legacy_mount,
                user: meta.user,
            };
            mount::mount(&request).map_err(|e| Error::from(e).context(format!("container {}", container.short())))
        })
        .await
    }

    async fn mount_volume(&self, chains: &[Digest], user: Option<&UserNamespace>) -> Result<OwnedFd> {
        if chains.is_empty() || chains.len() >= MAX_LAYERS {
            return Err(Error::invalid(format!(
                "a volume is made of 1 to {} layers, not {}",
                MAX_LAYERS - 1,
                chains.len()
            )));
        }
        if let Some(missing) = chains.iter().find(|c| !self.0.state().layers.contains_key(c)) {
            return Err(Error::not_found(format!("layer {missing} is not in the overlay store")));
        }
        let (store, chains, user) = (self.0.clone(), chains.to_vec(), user.cloned());
        blocking(move || {
            let layers = chains.iter().rev().map(|chain| store.layer_fs(chain));
            let request = mount::Request {
                lowers: layers.chain([store.root.join("empty")]).collect(),
                writable: None,
                scratch: store.root.join("tmp"),
                legacy: store.options.legacy_mount,
                user,
            };
            mount::mount(&request).map_err(|e| Error::from(e).context("an image as a volume"))
        })
        .await
    }

    async fn remove_rootfs(&self, container: &ContainerId) -> Result<()> {
        let (store, container) = (self.0.clone(), container.clone());
        blocking(move || {
            let _alone = store.change();
            store.discard(&store.container(&container))?;
            store.state().rootfs.remove(&container);
            store.usage.lock().unwrap_or_else(PoisonError::into_inner).remove(&container);
            Ok(())
        })
        .await
    }

    async fn list_rootfs(&self) -> Result<Vec<ContainerId>> {
        Ok(self.0.state().rootfs.keys().cloned().collect())
    }

    async fn rootfs_usage(&self, container: &ContainerId) -> Result<Usage> {
        if !self.0.state().rootfs.contains_key(container) {
            return Err(Error::not_found(format!("container {} has no root file system", container.short())));
        }
        let measured =
            self.0.usage.lock().unwrap_or_else(PoisonError::into_inner).entry(container.clone()).or_default().clone();
        let mut measured = measured.lock().await;
        if let Some((at, usage)) = *measured
            && at.elapsed() < USAGE_TTL
        {
            return Ok(usage);
        }
        let upper = self.0.container(container).join("fs");
        let usage =
            blocking(move || usage::measure(&upper).map_err(|e| Error::io(format!("measuring {upper}"), e))).await?;
        *measured = Some((Instant::now(), usage));
        Ok(usage)
    }

    async fn try_idmap(&self) -> Result<()> {
        let store = self.0.clone();
        blocking(move || {
            let folder = store.unique("tmp", "idmap");
            let done = store.try_idmap(&folder);
            let gone = beneath::remove_tree(folder.as_std_path());
            done.and(gone.map_err(|e| Error::io(format!("removing {folder}"), e)))
        })
        .await
    }

    async fn rootfs_changes(&self, container: &ContainerId) -> Result<RootfsChanges> {
        let user = match self.0.state().rootfs.get(container) {
            Some(Some(meta)) => meta.user.clone(),
            Some(None) => return Err(Error::precondition("its root file system's record can't be read")),
            None => return Err(Error::not_found(format!("container {} has no root file system", container.short()))),
        };
        let upper = self.0.container(container).join("fs");
        blocking(move || Ok(RootfsChanges { user, ..changes::list(&upper)? })).await
    }

    async fn layer_changes(&self, chain: &Digest) -> Result<RootfsChanges> {
        // The store's own, not this one.
        OverlayStore::layer_changes(self, chain).await
    }

    async fn check(&self, claims: &(dyn Fn() -> Claims + Send + Sync)) -> Result<StorageReport> {
        check::check(&self.0, claims).await
    }

    async fn write_rootfs(&self, container: &ContainerId, layer: std::fs::File) -> Result<()> {
        // A mount of its own: the unpacker closes it to devices.
        let mount = self.mount_rootfs(container).await?;
        let (unpacker, limits) = (self.0.options.unpacker.clone(), self.0.options.limits);
        blocking(move || {
            let source = std::io::BufReader::with_capacity(256 << 10, layer);
            unpacker.unpack(Place::Mount(&mount), source, Whiteouts::Apply, &limits).map(drop)
        })
        .await
        .map_err(|e| e.context(format!("files of container {}", container.short())))
    }

    fn mountpoint(&self) -> Utf8PathBuf {
        self.0.root.clone()
    }
}
