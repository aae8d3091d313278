//! The image store: pulls, loads, keeps and removes images. Implements [`ImageStore`].
//!
//! Called by the CRI's image service and the engine. Lists and lookups are answered from memory; every change is on disk
//! before it is in memory. One pull per digest runs however many ask, in a task of its own: a caller that gives up and
//! asks again joins it. Fails with errors that name reference, host and blob. A crash leaves complete images as they
//! were, and at most layers that no image names, which the next start removes.

mod archive;
mod assemble;
mod bfc;
mod check;
mod commit;
mod ends;
mod export;
mod load;
pub mod manifest;
pub mod pack;
pub mod platform;
mod pull;
mod push;
mod record;
mod source;
mod transfer;
mod verify;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use camino::Utf8PathBuf;
use tokio::sync::{mpsc, watch};

use crate::core::config::BfcImages;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::metrics::metrics;
use crate::core::ports::{
    Image, ImageEdit, ImageSource, ImageStore, LayerStore, PackedLayer, Pushed, RegistryAuth, RootfsChanges, SendImage,
    StorageReport, Usage,
};
use crate::core::progress::{PullProgress, PullView};
use crate::core::reference::Reference;
use crate::fail_point;
use crate::integrations::layers::confined::Unpacker;
use crate::integrations::registry::keychain::Keychain;
use crate::integrations::registry::proxy::Proxies;
use crate::integrations::registry::{RegistryClient, RegistryConfig};
use crate::utils::tasks::TaskSet;
use crate::utils::turns::Turns;

use platform::Platform;
use pull::PullResult;
use record::{Disk, Record};

/// Shortest prefix of an id that names an image, in digits.
const MIN_PREFIX: usize = 12;
/// Indexes inside indexes that are followed.
const MAX_NESTING: usize = 3;

/// Settings of the store.
#[derive(Debug, Clone)]
pub struct ImagesConfig {
    /// Folder for records and the blobs that describe images.
    pub root: Utf8PathBuf,
    /// Folders with `<host>/hosts.toml`; the first match counts.
    pub certs_dirs: Vec<Utf8PathBuf>,
    /// The node's own credentials for registries.
    pub keychain: Keychain,
    /// Ways to registries' hosts.
    pub proxies: Proxies,
    /// Which images may be pulled.
    pub policy_file: Option<Utf8PathBuf>,
    /// Registry of names without one: "docker.io".
    pub default_registry: String,
    /// Layers of one image that are downloaded at once.
    pub max_concurrent_downloads: usize,
    /// Limit for waiting without a byte from a registry.
    pub progress_timeout: Duration,
    /// Who decompresses.
    pub unpacker: Unpacker,
    /// Images in Binary File Containers.
    pub bfc: BfcImages,
}

impl ImagesConfig {
    /// How registries are talked to.
    fn registry(&self) -> RegistryConfig {
        RegistryConfig {
            certs_dirs: self.certs_dirs.clone(),
            keychain: self.keychain.clone(),
            proxies: self.proxies.clone(),
            connect_timeout: Duration::from_secs(10).min(self.progress_timeout),
            progress_timeout: self.progress_timeout,
        }
    }
}

struct Inner {
    config: ImagesConfig,
    platform: Platform,
    layers: Arc<dyn LayerStore>,
    registry: Arc<RegistryClient>,
    disk: Disk,
    tasks: TaskSet,
    images: RwLock<Index>,
    /// Held while records change on disk and in memory.
    changing: tokio::sync::Mutex<()>,
    /// Pulls under way by the digest they began with.
    pulls: Mutex<HashMap<Digest, UnderWay>>,
    /// One fetch per chain.
    turns: Turns<Digest>,
    /// Chains that unfinished pulls need, with how many do.
    leases: Mutex<HashMap<Digest, usize>>,
    /// Collections write, new leases read.
    collecting: tokio::sync::RwLock<()>,
    /// A record was set aside: its layers are unknown, so none is removed.
    quarantined: bool,
}

/// A pull under way: its end, and how far it is.
type UnderWay = (watch::Receiver<Option<PullResult>>, Arc<PullProgress>);

type Index = BTreeMap<Digest, (Record, Arc<Image>)>;

pub(super) fn now_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::because(Kind::Internal, "image store work ended", e))?
}

/// See the module's words. Clones are the same store.
#[derive(Clone)]
pub struct LocalImageStore(Arc<Inner>);

impl LocalImageStore {
    /// Opens the store, and lists the images whose layers `layers` has. `tasks` owns the pulls.
    pub async fn open(config: ImagesConfig, layers: Arc<dyn LayerStore>, tasks: TaskSet) -> Result<Arc<Self>> {
        let registry = RegistryClient::new(config.registry())?;
        let root = config.root.clone();
        let (disk, mut records, quarantined) = blocking(move || {
            let disk = Disk::open(&root)?;
            let (records, quarantined) = disk.load()?;
            Ok((disk, records, quarantined))
        })
        .await?;
        records.sort_by_key(|r| r.changed_at);
        let mut images = Index::new();
        for record in records {
            let mut missing = None;
            for layer in &record.layers {
                if !layers.has(&layer.chain).await? {
                    missing = Some(layer.chain.clone());
                    break;
                }
            }
            if let Some(layer) = missing {
                tracing::warn!(image = %record.id, %layer, "image lacks a layer and is not listed; a pull completes it");
                continue;
            }
            // A crash between two writes may have left a tag with two images: the later one has it.
            for (other, _) in images.values_mut() {
                other.repo_tags.retain(|tag| !record.repo_tags.contains(tag));
            }
            let image = Arc::new(record.image());
            images.insert(record.id.clone(), (record, image));
        }
        for (record, image) in images.values_mut() {
            *image = Arc::new(record.image());
        }
        let store = Arc::new(Inner {
            config,
            platform: Platform::host(),
            layers,
            registry,
            disk,
            tasks,
            images: RwLock::new(images),
            changing: tokio::sync::Mutex::default(),
            pulls: Mutex::default(),
            turns: Turns::default(),
            leases: Mutex::default(),
            collecting: tokio::sync::RwLock::default(),
            quarantined,
        });
        if let Err(error) = store.collect_layers().await {
            tracing::warn!(error = error.chain(), "unused layers can't be removed");
        }
        Ok(Arc::new(Self(store)))
    }

    /// Removes layers that no image, unfinished pull or container uses; answers with the bytes freed. Removing an image
    /// does this too; of use after containers were removed whose image was removed before.
    pub async fn collect_layers(&self) -> Result<u64> {
        self.0.collect_layers().await
    }
}

impl Inner {
    fn read(&self) -> RwLockReadGuard<'_, Index> {
        self.images.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Index> {
        self.images.write().unwrap_or_else(PoisonError::into_inner)
    }

    async fn collect_layers(&self) -> Result<u64> {
        if self.quarantined {
            return Err(Error::precondition(format!(
                "an image record is in {}/quarantine: its layers are unknown, so none is removed",
                self.config.root
            )));
        }
        let _alone = self.collecting.write().await;
        let mut keep: HashSet<Digest> = lock(&self.leases).keys().cloned().collect();
        keep.extend(self.read().values().flat_map(|(r, _)| r.layers.iter().map(|l| l.chain.clone())));
        let keep: Vec<Digest> = keep.into_iter().collect();
        let freed = self.layers.retain_layers(&keep).await;
        fail_point!("image.layers_gone");
        freed
    }

    /// Keeps `chains` from collection until dropped.
    async fn lease(self: &Arc<Self>, chains: &[Digest]) -> Lease {
        let _no_collection = self.collecting.read().await;
        let mut leases = lock(&self.leases);
        for chain in chains {
            *leases.entry(chain.clone()).or_default() += 1;
        }
        Lease { store: self.clone(), chains: chains.to_vec() }
    }

    /// Makes a record count: blobs, record, then what other images lose by it.
    async fn commit(self: &Arc<Self>, mut record: Record, blobs: Vec<(Digest, Bytes)>) -> Result<()> {
        let _alone = self.changing.lock().await;
        let mut changed = Vec::new();
        {
            let images = self.read();
            if let Some((old, _)) = images.get(&record.id) {
                merge(&mut record.repo_tags, &old.repo_tags);
                merge(&mut record.repo_digests, &old.repo_digests);
                merge(&mut record.manifests, &old.manifests);
                record.pinned = old.pinned;
            }
            for (other, _) in images.values() {
                if other.id != record.id && other.repo_tags.iter().any(|t| record.repo_tags.contains(t)) {
                    let mut other = other.clone();
                    other.repo_tags.retain(|t| !record.repo_tags.contains(t));
                    changed.push(other);
                }
            }
        }
        changed.insert(0, record);
        let disk = self.disk.clone();
        let changed = blocking(move || {
            for (digest, bytes) in &blobs {
                disk.save_blob(digest, bytes)?;
            }
            fail_point!("image.blobs");
            changed.iter().try_for_each(|record| disk.save(record))?;
            Ok(changed)
        })
        .await?;
        fail_point!("image.saved");
        let mut images = self.write();
        for record in changed {
            let image = Arc::new(record.image());
            images.insert(record.id.clone(), (record, image));
        }
        Ok(())
    }

    /// Gives the complete image `id` more names.
    async fn add_names(self: &Arc<Self>, id: &Digest, tags: Vec<String>, digests: Vec<String>) -> Result<Arc<Image>> {
        let record = {
            let images = self.read();
            let Some((old, image)) = images.get(id) else {
                return Err(Error::new(Kind::Aborted, format!("image {id} was removed meanwhile")));
            };
            let mut record = old.clone();
            merge(&mut record.repo_tags, &tags);
            merge(&mut record.repo_digests, &digests);
            if record == *old {
                return Ok(image.clone());
            }
            record.changed_at = now_ns();
            record
        };
        self.commit(record, Vec::new()).await?;
        self.by_id(id)
    }

    async fn set_pinned(self: &Arc<Self>, id: &Digest, pinned: bool) -> Result<Arc<Image>> {
        let _alone = self.changing.lock().await;
        let record = {
            let images = self.read();
            let (old, image) = images.get(id).ok_or_else(|| Error::not_found(format!("image {id} is not here")))?;
            if old.pinned == pinned {
                return Ok(image.clone());
            }
            Record { pinned, changed_at: now_ns(), ..old.clone() }
        };
        let disk = self.disk.clone();
        let record = blocking(move || disk.save(&record).map(|()| record)).await?;
        let image = Arc::new(record.image());
        self.write().insert(record.id.clone(), (record, image.clone()));
        Ok(image)
    }

    async fn pull_any(self: &Arc<Self>, name: &str, auth: Option<RegistryAuth>, view: &PullView) -> Result<Arc<Image>> {
        let reference = Reference::parse(name, &self.config.default_registry)?;
        let start = std::time::Instant::now();
        let pulled = match reference.registry() {
            // No network, ever.
            bfc::REGISTRY => self.pull_bfc(&reference).await,
            _ => self.pull_reference(&reference, auth.as_ref(), view).await,
        };
        metrics().pulled(start, pulled.is_ok());
        pulled.map_err(|e| e.context(format!("pull {reference}")))
    }

    fn by_id(&self, id: &Digest) -> Result<Arc<Image>> {
        let found = self.read().get(id).map(|(_, image)| image.clone());
        found.ok_or_else(|| Error::new(Kind::Aborted, format!("image {id} was removed meanwhile")))
    }

    /// The image that this manifest or index is here.
    fn by_manifest(&self, digest: &Digest) -> Option<Digest> {
        self.read().values().find(|(r, _)| r.manifests.contains(digest)).map(|(r, _)| r.id.clone())
    }

    /// What [`ImageStore::resolve`] finds.
    fn find(&self, reference: &str) -> Option<Digest> {
        let images = self.read();
        let digits = reference.strip_prefix("sha256:").unwrap_or(reference);
        if (MIN_PREFIX..=64).contains(&digits.len()) && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            let mut matching = images.keys().filter(|id| id.hex().starts_with(digits));
            match (matching.next(), matching.next()) {
                (Some(only), None) => return Some(only.clone()),
                (Some(_), Some(_)) => return None,
                (None, _) => {}
            }
        }
        let reference = Reference::parse(reference, &self.config.default_registry).ok()?;
        let (field, wanted): (fn(&Record) -> &Vec<String>, String) = match reference.digest() {
            Some(digest) => (|r| &r.repo_digests, reference.digested(digest)),
            None => (|r| &r.repo_tags, reference.tagged()?),
        };
        images.values().find(|(r, _)| field(r).contains(&wanted)).map(|(r, _)| r.id.clone())
    }
}

struct Lease {
    store: Arc<Inner>,
    chains: Vec<Digest>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut leases = lock(&self.store.leases);
        for chain in &self.chains {
            if let Some(count) = leases.get_mut(chain) {
                *count -= 1;
                if *count == 0 {
                    leases.remove(chain);
                }
            }
        }
    }
}

fn merge<T: Clone + PartialEq>(list: &mut Vec<T>, more: &[T]) {
    for item in more {
        if !list.contains(item) {
            list.push(item.clone());
        }
    }
}

#[async_trait]
impl ImageStore for LocalImageStore {
    async fn pull(&self, reference: &str, auth: Option<RegistryAuth>) -> Result<Arc<Image>> {
        self.0.pull_any(reference, auth, &PullView::default()).await
    }

    async fn pull_shown(&self, reference: &str, view: Arc<PullView>) -> Result<Arc<Image>> {
        self.0.pull_any(reference, None, &view).await
    }

    async fn export(&self, image: &Digest, name: Option<&str>, out: mpsc::Sender<Result<Bytes>>) -> Result<()> {
        self.0.export_image(image, name, out).await
    }

    async fn push(&self, source: &str, target: &str) -> Result<Pushed> {
        let done = self.0.push_image(source, target).await;
        done.map_err(|e| e.context(format!("push {source} to {target}")))
    }

    async fn check(&self, deep: bool) -> Result<StorageReport> {
        self.0.check(deep).await
    }

    async fn load(&self, source: &ImageSource, name: Option<&str>) -> Result<Vec<Arc<Image>>> {
        self.0.load_source(source, name).await
    }

    async fn set_pinned(&self, id: &Digest, pinned: bool) -> Result<Arc<Image>> {
        self.0.set_pinned(id, pinned).await
    }

    async fn tag(&self, id: &Digest, name: &str) -> Result<Arc<Image>> {
        let reference = Reference::parse(name, &self.0.config.default_registry)?;
        let Some(tag) = reference.tagged().filter(|_| reference.digest().is_none()) else {
            return Err(Error::invalid(format!("{name}: a digest is no name to give")));
        };
        self.0.add_names(id, vec![tag], Vec::new()).await
    }

    fn list(&self) -> Vec<Arc<Image>> {
        self.0.read().values().map(|(_, image)| image.clone()).collect()
    }

    fn resolve(&self, reference: &str) -> Option<Arc<Image>> {
        let id = self.0.find(reference)?;
        self.0.read().get(&id).map(|(_, image)| image.clone())
    }

    async fn remove(&self, reference: &str) -> Result<()> {
        let store = &self.0;
        {
            let _alone = store.changing.lock().await;
            let Some(id) = store.find(reference) else { return Ok(()) };
            let blobs: Vec<Digest> = {
                let images = store.read();
                let Some((record, _)) = images.get(&id) else { return Ok(()) };
                let used = |d: &Digest| images.values().any(|(r, _)| r.id != id && r.manifests.contains(d));
                record.manifests.iter().filter(|d| !used(d)).cloned().chain([id.clone()]).collect()
            };
            let (disk, gone) = (store.disk.clone(), id.clone());
            blocking(move || {
                disk.forget(&gone)?;
                fail_point!("image.forgotten");
                blobs.iter().try_for_each(|digest| disk.forget_blob(digest))
            })
            .await?;
            store.write().remove(&id);
            fail_point!("image.blobs_forgotten");
        }
        // The image is gone whatever becomes of its layers now; the next collection tries again.
        if let Err(error) = store.collect_layers().await {
            tracing::warn!(error = error.chain(), "unused layers can't be removed");
        }
        Ok(())
    }

    async fn collect_layers(&self) -> Result<u64> {
        self.0.collect_layers().await
    }

    async fn pack(&self, changes: RootfsChanges) -> Result<PackedLayer> {
        self.0.pack(changes).await
    }

    async fn commit(&self, base: &Digest, layer: PackedLayer, edit: &ImageEdit, reference: &str) -> Result<Arc<Image>> {
        let done = self.0.commit_container(base, layer, edit, reference).await;
        done.map_err(|e| e.context(format!("image {reference:?}")))
    }

    async fn send(&self, wanted: SendImage, out: mpsc::Sender<Result<Bytes>>) -> Result<()> {
        self.0.send_image(wanted, out).await
    }

    async fn receive(&self, input: Box<dyn tokio::io::AsyncRead + Send + Unpin>) -> Result<Arc<Image>> {
        self.0.receive_image(input).await
    }

    fn usage(&self) -> (Utf8PathBuf, Usage) {
        let images = self.0.read();
        let unique: HashMap<&Digest, Usage> =
            images.values().flat_map(|(r, _)| &r.layers).map(|l| (&l.chain, l.usage)).collect();
        let mut sum = Usage::default();
        for usage in unique.values() {
            sum.bytes = sum.bytes.saturating_add(usage.bytes);
            sum.inodes = sum.inodes.saturating_add(usage.inodes);
        }
        (self.0.layers.mountpoint(), sum)
    }
}
